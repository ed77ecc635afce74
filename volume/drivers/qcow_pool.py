# SPDX-License-Identifier: Apache-2.0
"""One pool of the qcow driver: a directory of layers, and pointers to them.

===========================  ==============================================
``layers/<uuid>.<format>``   an image file; its name never changes
``volumes/<volume>``         link to the layer that the volume writes to
``snapshots/<volume>@<id>``  link to a layer that nobody writes to any more
``disowned/<volume>``        link to the layer of a volume that was let go
``merges/<layer>``           link to the layer that holds its bytes as well
``notes/<volume>.json``      what stands beside a volume
``mapped/<volume>``          the volume's path was handed out
``drafts/``                  layers that are being made, each under a lock
``.volume-pool``             what the pool is known by, see ``marker``
===========================  ==============================================

Which layer stands on which is in the headers of the layers, and nowhere
else. A layer is needed if a pointer names it or another layer stands on it;
what is not needed is removed at once, or by the next sweep. A layer that is
needed and has no name is called hidden.

Whoever changes or reads pointers and headers holds the pool's lock, for
milliseconds: long work is done outside, on layers that nobody else touches.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from volume import errors
from volume import ids
from volume.drivers import marker
from volume.drivers import qcow_layers
from volume.drivers.qcow_blank import Blanks
from volume.drivers.qcow_layers import FORMATS
from volume.drivers.qcow_layers import Header
from volume.drivers.qcow_tree import Layer
from volume.drivers.qcow_tree import Tree
from volume.node import CommandFailed
from volume.node import meaning
from volume.node import Node

T = TypeVar('T')

# What qemu-img says, and what it means to our caller. First match wins.
MEANING: tuple[tuple[str, type[errors.VolumeError]], ...] = (
    ('Failed to get', errors.Busy),  # another process has the file's lock
    ('Failed to lock', errors.Busy),
    ('No space left', errors.NoSpace),
    ('Disk quota exceeded', errors.NoSpace),
    ('size is too large', errors.Invalid),
    ('File too large', errors.Invalid),
    ('No such file', errors.NotFound),
    ('Permission denied', errors.Invalid),
    ('Read-only file system', errors.Invalid),
    ('is corrupt', errors.Corrupt),
    ('Image is not in', errors.Corrupt),
    ('Input/output error', errors.Corrupt),
)

POINTERS = ('disowned', 'snapshots', 'volumes')
DIRECTORIES = (*POINTERS, 'drafts', 'layers', 'mapped', 'merges', 'notes')
TARGET = re.compile(rf'\.\./layers/({qcow_layers.NAME.pattern})')
LOCK_FILE = '.lock'
LOCK_S = 60.0
DEPTH_MAX = 250  # more is a loop, or nothing that we made
SETTLED_NS = 10 ** 9
NOT_KNOWN: tuple[tuple[int, ...], Header | None] = ((), None)
MERGE_END_S = 5.0
MERGES = (['check', '-q'], ['commit', '-q'], ['rebase', '-q'])
TRIES = 3
WAITING_PART = 100  # one layer of so many may wait for a sweep


class PoolDirectory:
    """One directory, its lock, and the deeds that all methods share."""

    def __init__(
        self, node: Node, directory: str, cluster_bytes: int,
        preallocation: str,
    ) -> None:
        self.node = node
        self.name = os.path.basename(directory)
        self.directory = directory
        self._create_options = (
            f'cluster_size={cluster_bytes},preallocation={preallocation}'
        )
        self._cluster_bytes = cluster_bytes
        self._blanks = Blanks(node)
        self._mutex = threading.Lock()
        self._device: int | None = None
        # How many layers may still be left for a sweep.
        self._may_wait = 0
        # Headers by name, each with what the file was like when it was read.
        self._headers: dict[str, tuple[tuple[int, ...], Header]] = {}

    def path(self, *parts: str) -> str:
        return os.path.join(self.directory, *parts)

    def layer_path(self, name: str) -> str:
        """Return a layer's path, as daemons open it."""
        directory = self.node.blocking(
            lambda: os.path.realpath(self.directory)
        )
        return os.path.join(directory, 'layers', name)

    def mapped_path(self, volume_id: str) -> str:
        """Return what is there while somebody has the path of a volume."""
        return self.path('mapped', ids.check(volume_id))

    def prepare(self) -> None:
        """Have the directories.

        :raises Invalid: the directory is not ours to write to, or has lost
            its pool
        """
        self._device = None
        marker.check(self.node, self.directory)
        try:
            for name in DIRECTORIES:
                self.node.make_directory(self.path(name))
            marker.keep(self.node, self.directory)
            with self.node.open(self.path(LOCK_FILE), 'ab') as f:
                self._device = self._act('look at the lock', lambda: (
                    os.fstat(f.fileno()).st_dev
                ))
        except (errors.Invalid, errors.Conflict, errors.NotFound) as failed:
            raise errors.Invalid(
                f'cannot write to directory {self.directory} ({failed}): '
                'make it, mount it, or give it to the user of this service'
            ) from failed

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep pointers and headers as they are, here and elsewhere.

        :raises Unavailable: the directory is gone, or the lock is not free
        """
        deadline = time.monotonic() + LOCK_S
        stuck = errors.Unavailable(
            f'pool {self.name} was locked for {LOCK_S:g} s: see who has '
            f'{self.path(LOCK_FILE)} open'
        )
        if not self._mutex.acquire(timeout=LOCK_S):
            raise stuck
        try:
            f = self.node.blocking(self._lock_file)
            try:
                while not self.node.blocking(lambda: _flock(f.fileno())):
                    if time.monotonic() > deadline:
                        raise stuck
                    time.sleep(0.002)
                yield
            finally:
                self.node.blocking(f.close)
        finally:
            self._mutex.release()
            # Under eventlet whoever waits has its turn only if it is given.
            time.sleep(0)

    def _lock_file(self) -> Any:
        try:
            if self._device is None:
                # The last check failed, and a job is being run all the same.
                marker.check(self.node, self.directory)
        except errors.Invalid as other:
            raise errors.Unavailable(str(other)) from other
        try:
            f = open(self.path(LOCK_FILE), 'rb+')
        except OSError as failed:
            raise errors.Unavailable(
                f'directory {self.directory} is no pool now '
                f'({os.strerror(failed.errno or 0)}): mount it'
            ) from failed
        device = os.fstat(f.fileno()).st_dev
        if self._device not in (None, device):
            f.close()
            raise errors.Unavailable(
                f'directory {self.directory} is on another file system than '
                'when the backend started: mount the right one'
            )
        return f

    # Questions. Whoever asks holds the lock.

    def target(self, pointer: str) -> str | None:
        """Return the layer that a pointer names; None if it is not there."""
        try:
            text = self.node.readlink(self.path(pointer))
        except errors.NotFound:
            return None
        return self._target(pointer, text)

    def header(self, name: str) -> Header:
        """Return a layer's header.

        :raises Corrupt: it is missing, or not what it must be
        """
        return self._act(f'read {name}', lambda: self._header(name))

    def chain(self, name: str) -> list[tuple[str, Header]]:
        """Return a layer and all that it stands on, with their headers.

        :raises Corrupt: one is missing, or not what it must be
        """
        return self._act(f'read chain {name}', lambda: self._chain(name))

    def tree(self) -> Tree:
        """Return all layers and names of the pool."""
        return self._act(f'read tree {self.name}', self._tree)

    def is_empty(self, name: str, header: Header) -> bool:
        """Say whether a layer that nobody writes to stores nothing."""
        return self._act(f'read {name}', lambda: (
            qcow_layers.is_empty(self.layer_path(name), header)
        ))

    def is_mapped(self, volume_id: str) -> bool:
        """Say whether somebody has the path of a volume."""
        return self.node.exists(self.mapped_path(volume_id))

    def is_same_file(self, path: str, name: str) -> bool:
        """Say whether a path and a layer are one file."""
        return self._act(f'compare {name}', lambda: (
            os.path.samefile(path, self.layer_path(name))
        ))

    def is_served(self, name: str) -> bool:
        """Say whether the block daemon has the layer open."""
        # The kernel is quicker to ask than the daemon.
        return (
            self.node.blockd is not None and self.is_used(name)
            and self.node.blockd.is_open(self.layer_path(name))
        )

    def is_used(self, name: str) -> bool:
        """Say whether any QEMU has the layer open, the daemon or another."""
        return self._act(f'probe {name}', lambda: (
            qcow_layers.is_used(self.layer_path(name))
        ))

    def is_written(self, name: str) -> bool:
        """Say whether any QEMU may be writing to the layer."""
        return self._act(f'probe {name}', lambda: (
            qcow_layers.is_written(self.layer_path(name))
        ))

    def hidden_bytes(self) -> int:
        """Return what layers take up that have no name of their own.

        It is asked again and again, of all layers: no header is read.
        """

        def add() -> int:
            named = {name for _, name in self._pointers()}
            found = 0
            with os.scandir(self.path('layers')) as entries:
                for entry in entries:
                    if entry.name not in named and qcow_layers.NAME.fullmatch(
                        entry.name
                    ):
                        there = entry.stat(follow_symlinks=False)
                        found += there.st_blocks * 512
            return found

        return self._act(f'read layers {self.name}', add)

    # Deeds. Whoever does them holds the lock, except for ``make``.

    def point(self, pointer: str, name: str) -> None:
        """Have a pointer name a layer, instead of another if it did."""
        self.node.point(self.path(pointer), f'../layers/{name}')

    @contextlib.contextmanager
    def draft(self, name: str) -> Iterator[str]:
        """Have an empty file that a sweep leaves alone; yield its path.

        ``keep`` makes it a layer; otherwise it is removed in the end.
        """
        path = self.path('drafts', name)
        with self.node.open(path, 'xb') as f:
            self.node.blocking(lambda: _flock(f.fileno()))
            try:
                yield path
            except errors.VolumeError:
                with contextlib.suppress(errors.VolumeError):
                    self.node.unlink(path)
                raise
            finally:
                self.node.blocking(
                    lambda: fcntl.flock(f.fileno(), fcntl.LOCK_UN)
                )

    def make(self, path: str, size_bytes: int) -> None:
        """Make a draft an all-zero image, durably."""
        extension = qcow_layers.extension(path)
        if extension == 'raw':
            with self.node.open(path, 'rb+') as f:
                f.truncate(size_bytes)
                f.sync()
            return
        options = FORMATS[extension].create
        if extension == 'qcow2':
            if self._blanks.write(path, size_bytes):
                return
            options = ('-o', self._create_options)
        self.qemu_img(
            'create', '-q', '-f', FORMATS[extension].driver, *options, path,
            str(size_bytes),
        )
        self.sync(path)
        if extension == 'qcow2':
            self._blanks.learn(path, size_bytes)

    def keep(self, path: str) -> str:
        """Make a finished draft a layer, durably; return its name."""
        name = os.path.basename(path)
        self.node.rename(path, self.path('layers', name))
        return name

    def link(self, path: str, name: str) -> None:
        """Have a file of this file system be a layer as well, durably."""
        draft = self.path('drafts', name)
        self._act(f'link {name}', lambda: os.link(path, draft))
        self.sync(draft)
        self.keep(draft)

    def overlay(self, backing: str, size_bytes: int) -> str:
        """Make a layer without bytes of its own over another."""
        assert size_bytes >= self.header(backing).size_bytes
        with self.draft(qcow_layers.new_name('qcow2')) as path:
            self.qemu_img(
                'create', '-q', '-f', 'qcow2', '-u', '-b', backing,
                '-F', 'qcow2', '-o', f'cluster_size={self._cluster_bytes}',
                path, str(size_bytes),
            )
            self.sync(path)
            return self.keep(path)

    def release(self, name: str) -> None:
        """Remove a layer that has lost a name, if nothing needs it.

        To know that, all layers are read. In a large pool that is done once
        for many: what is left meanwhile, a hundredth of all layers at most,
        goes with the next sweep.
        """
        if self._may_wait > 0:
            self._may_wait -= 1
            return
        tree = self.tree()
        self._may_wait = len(tree.layers) // WAITING_PART
        self.free(tree, name)

    def free(self, tree: Tree, name: str | None) -> None:
        """Remove a layer that nothing needs, and then what it stood on."""
        while name in tree.layers and not tree.is_needed(name):
            backing = tree.backing(name)
            if not tree.is_certain() or self.is_used(name):
                return
            self.node.unlink(self.layer_path(name))
            tree.forget(name)
            name = backing

    def sweep(self) -> None:
        """Remove what a crash has left."""
        tree = self.tree()
        for name in list(tree.layers):
            self.free(tree, name)
        for path in self._act(f'sweep {self.name}', self._leftovers):
            self.node.unlink(path)

    def end_merges(self, names: Iterable[str]) -> None:
        """End background merges that have one of the layers open.

        A merge may be ended anywhere; it is made again another time.

        :raises Busy: it does not end
        """
        layers = tuple(names)
        paths = self.node.blocking(
            lambda: frozenset(map(self.layer_path, layers))
        )
        if self._act(
            'probe layers', lambda: any(map(qcow_layers.is_used, paths))
        ):
            # It waits, and looks at processes alone.
            self.node.act('end merges', lambda: _end_merges(paths))

    def insist(self, names: Iterable[str], deed: Callable[[], T]) -> T:
        """Do what no merge of these layers may be in the way of.

        A merge that was chosen before can still start, once, for the next
        one is chosen under the lock.
        """
        layers = tuple(names)
        for left in reversed(range(TRIES)):
            self.end_merges(layers)
            try:
                return deed()
            except errors.Busy:
                if not left:
                    raise
                # One that ends by itself has its locks for an instant more.
                time.sleep(0.01)
        raise AssertionError('not reached')

    def refuse_use(self, name: str, volume_id: str, verb: str) -> None:
        """:raises Busy: somebody uses the volume that writes to a layer"""

        def refuse() -> None:
            if self.is_mapped(volume_id) or self.is_used(name):
                raise errors.Busy(
                    f'cannot {verb} volume {volume_id} while it is in use: '
                    'detach it, or wait until it is read'
                )

        self.insist([name], refuse)

    def sync(self, path: str) -> None:
        """Make a file's bytes durable."""
        with self.node.open(path, 'rb+') as f:
            f.sync()

    def qemu_img(self, *words: str, **limits: Any) -> str:
        """Run qemu-img and say what its failure means."""
        try:
            return self.node.run('qemu-img', *words, **limits)
        except CommandFailed as failed:
            for said, kind in MEANING:
                if said in failed.stderr:
                    raise kind(str(failed)) from failed
            raise

    # Ours alone: plain reading, inside one act.

    def _act(self, what: str, effect: Callable[[], T]) -> T:
        def mapped() -> T:
            try:
                return effect()
            except OSError as failed:
                raise meaning(
                    failed, f'{what} in {self.directory}'
                ) from failed

        return self.node.act(what, lambda: self.node.blocking(mapped))

    def _target(self, pointer: str, text: str) -> str:
        match = TARGET.fullmatch(text)
        if match is None:
            raise errors.Corrupt(
                f'{self.path(pointer)} points to {text!r:.100}, which is no '
                'layer: put it right, or move it out of the pool'
            )
        return match[1]

    def _header(self, name: str) -> Header:
        path = self.layer_path(name)
        try:
            there = os.stat(path)
        except FileNotFoundError:
            raise errors.Corrupt(
                f'layer {name} of pool {self.name} is missing: bring '
                f'{path} back'
            ) from None
        state = there.st_ino, there.st_ctime_ns, there.st_size
        known = self._headers.get(name)
        if known and known[0] == state:
            return known[1]
        header = qcow_layers.read_header(path, qcow_layers.extension(name))
        # A file that changed just now may change again within a tick of the
        # clock, and look the same.
        if time.time_ns() - there.st_ctime_ns > SETTLED_NS:
            self._headers[name] = state, header
        return header

    def _chain(self, top: str) -> list[tuple[str, Header]]:
        found: list[tuple[str, Header]] = []
        name: str | None = top
        while name:
            header = self._header(name)
            if found and header.size_bytes > found[-1][1].size_bytes:
                raise errors.Corrupt(
                    f'layer {found[-1][0]} is smaller than {name}, on which '
                    'it stands: no layer of ours is'
                )
            found.append((name, header))
            if len(found) > DEPTH_MAX:
                raise errors.Corrupt(f'{top} stands on too many layers')
            name = header.backing
        return found

    def _tree(self) -> Tree:
        known, is_name = self._headers, qcow_layers.NAME.fullmatch
        layers = []
        with os.scandir(self.path('layers')) as entries:
            for entry in entries:
                name = entry.name
                if not is_name(name):
                    continue
                there = entry.stat(follow_symlinks=False)
                state, header = known.get(name, NOT_KNOWN)
                if state != (
                    there.st_ino, there.st_ctime_ns, there.st_size
                ):
                    header = self._header_or_none(name)
                layers.append(Layer(
                    name, header, there.st_blocks * 512, there.st_ino
                ))
        for name in known.keys() - {layer.name for layer in layers}:
            del known[name]
        return Tree(layers, self._pointers())

    def _header_or_none(self, name: str) -> Header | None:
        try:
            return self._header(name)
        except errors.Corrupt:
            return None

    def _pointers(self) -> Iterator[tuple[str, str]]:
        for kind in POINTERS:
            directory = self.path(kind)
            for name in os.listdir(directory):
                if not name.endswith('.new'):
                    pointer = f'{kind}/{name}'
                    text = os.readlink(f'{directory}/{name}')
                    yield pointer, self._target(pointer, text)

    def _leftovers(self) -> list[str]:
        """Return what calls that died have left beside the layers."""
        volumes = set(os.listdir(self.path('volumes')))
        layers = set(os.listdir(self.path('layers')))
        found = []
        for kind in DIRECTORIES:
            for name in os.listdir(self.path(kind)):
                path = self.path(kind, name)
                word = name.removesuffix('.json')
                if (
                    (name.endswith('.new') and kind != 'layers')
                    or (kind in ('notes', 'mapped') and ids.is_id(word)
                        and word not in volumes)
                    or (kind == 'merges' and name not in layers)
                    or (kind == 'drafts' and _is_abandoned(path))
                ):
                    found.append(path)
        return found


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_abandoned(path: str) -> bool:
    with open(path, 'rb') as f:
        return _flock(f.fileno())


def _end_merges(paths: frozenset[str]) -> None:
    deadline = time.monotonic() + MERGE_END_S
    while pids := [
        pid for pid in qcow_layers.openers(paths, 'qemu-img')
        if qcow_layers.words_of(pid)[1:3] in MERGES
    ]:
        if time.monotonic() > deadline:
            raise errors.Busy(
                f'qemu-img (process {pids[0]}) merges layers and does not '
                'end: end it by hand'
            )
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                _kill(pid, deadline)
        time.sleep(0.005)


def _kill(pid: int, deadline: float) -> None:
    """End a process, and wait until the kernel has closed its files.

    They go out of /proc before their locks do.
    """
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            selector.select(max(deadline - time.monotonic(), 0))
    finally:
        os.close(fd)
