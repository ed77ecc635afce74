# SPDX-License-Identifier: Apache-2.0
"""The reference driver: a volume is a sparse raw file in a directory.

Read this first; the others have the same order. The one idea: the name of a
file says all that there is to know, and a file gets its name only when it is
whole. So there is no state beside the directory, and after a crash there is
nothing to repair: a draft that was left over is overwritten or removed by
the next call for the same volume.

=============================  ============================================
``<volume>.raw``               a volume
``<volume>@<snapshot>.raw``    a snapshot of it
``<volume>.json``              its sidecar
``.volume-pool``               what the pool is known by, see ``marker``
``.<name>.new``                a draft, nobody's yet
any other plain file           foreign: shown by ``scan``, never touched
=============================  ============================================
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from oslo_config import cfg

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base
from volume.drivers import generic
from volume.drivers import marker
from volume.node import Node

_ID = r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}'
VOLUME = re.compile(rf'({_ID})\.raw')
SNAPSHOT = re.compile(rf'({_ID})@({_ID})\.raw')
NOTE = re.compile(rf'{_ID}\.json(\.new)?')
PROBE = re.compile(rf'\.probe(\.{_ID})?(-clone)?')
PROBE_OLD_S = 60  # a probe takes milliseconds

# What a file system without reflink cannot do at less than a copy's cost.
NEED_REFLINK = frozenset({'Clone', 'Revert', 'Snapshots'})


class FileDriver(
    base.Driver, base.Adopt, base.BlockNode, base.Clone, base.Describe,
    base.LocalDevice, base.Resize, base.Revert, base.Snapshots,
):
    """Sparse raw files in directories of this node."""

    may_be_remote = True
    forms = frozenset({model.Form.FILE})
    options = (
        cfg.ListOpt(
            'directories', required=True,
            help='Directories, each one a pool named by its last part.\n\n'
            'Absolute paths. On XFS and btrfs clones and snapshots are '
            'instant; elsewhere the pool has none, and clones are copies.',
        ),
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        # Pools that have reflink, and each pool's file system at the start.
        self._reflinks: set[str] = set()
        self._devices: dict[str, str] = {}

    def check(self) -> None:
        paths = self._directories()
        if not paths:
            raise errors.Invalid(
                'the option directories is empty: name at least one'
            )
        failures = []
        for path in paths:
            try:
                self._check_directory(path)
            except errors.VolumeError as failed:
                failures.append(failed)
        if failures:
            raise failures[0]

    def pools(self) -> list[model.Pool]:
        return [self._pool(path) for path in self._directories()]

    def create(self, volume: model.Volume) -> str:
        _check_size(volume.size_bytes, f'volume {volume.id}')
        path = self._path(volume)
        if not self._has(path, volume):
            with self.node.open(_draft(path), 'wb') as f:
                f.truncate(volume.size_bytes)
                f.sync()
            self.node.rename(_draft(path), path)
        return os.path.basename(path)

    def delete(self, volume: model.Volume) -> None:
        path = self._path(volume)
        self._refuse_snapshots(volume)
        self._refuse_open(path, 'delete')
        note = self._note(volume)
        # The volume goes last: while anything is left, scan shows it.
        for name in _draft(path), f'{note}.new', note, path:
            if self.node.exists(name):
                self.node.unlink(name)

    def inspect(self, volume: model.Volume) -> model.Found:
        path = self._path(volume)
        return model.Found(
            os.path.basename(path), self._size(volume), volume.id,
            sidecar=self._sidecar(volume),
        )

    def scan(self, pool: str) -> Iterator[model.Found]:
        directory = self._directory(pool)
        for name in self.node.list(directory):
            path = os.path.join(directory, name)
            if not _is_thing(name) or not self.node.is_file(path):
                continue
            try:
                yield self._found(pool, name, self.node.size(path))
            except errors.NotFound:
                continue  # deleted since we listed it

    def reader(
        self, source: model.Volume | model.Snapshot
    ) -> AbstractContextManager[base.Reader]:
        self._size(source)
        return generic.file_reader(self.node, self._path(source))

    def writer(
        self, volume: model.Volume
    ) -> AbstractContextManager[base.Writer]:
        size_bytes = self._size(volume)
        path = self._path(volume)
        self._refuse_open(path, 'fill')
        return generic.file_writer(self.node, path, size_bytes)

    # Adopt.

    def adopt(self, handle: str, volume: model.Volume) -> str:
        path = self._path(volume)
        foreign = os.path.join(os.path.dirname(path), handle)
        if os.path.basename(handle) != handle or not _is_thing(handle):
            raise errors.Invalid(
                f'{handle!r:.200} is not the plain name of a file in the pool'
            )
        if handle == os.path.basename(path) or not self.node.exists(foreign):
            self._size(volume)  # NotFound, unless this is a repeated call
            return os.path.basename(path)
        self._check_foreign(handle, foreign)
        if self.node.exists(path):
            raise errors.Conflict(
                f'volume {volume.id} exists: {handle} cannot become it'
            )
        self.node.rename(foreign, path)
        return os.path.basename(path)

    def disown(self, volume: model.Volume) -> None:
        path = self._path(volume)
        foreign = path.removesuffix('.raw') + '.disowned.raw'
        if not self.node.exists(path):
            return
        self._refuse_snapshots(volume)
        self._refuse_open(path, 'let go of')
        if self.node.exists(foreign):
            raise errors.Conflict(
                f'{foreign} is in the way: adopt or remove it first'
            )
        self.node.unlink(self._note(volume))
        self.node.rename(path, foreign)

    # BlockNode.

    def blocknode(
        self, source: model.Volume | model.Snapshot
    ) -> Mapping[str, Any]:
        self._size(source)
        file = {'driver': 'file', 'filename': self._path(source)}
        return {'driver': 'raw', 'file': file}

    # Clone.

    def clone(
        self, source: model.Volume | model.Snapshot, volume: model.Volume
    ) -> str:
        _check_size(volume.size_bytes, f'volume {volume.id}')
        path = self._path(volume)
        if self._has(path, volume):
            return os.path.basename(path)
        source_bytes = self._size(source)
        if volume.size_bytes < source_bytes:
            raise errors.Invalid(
                f'volume {volume.id} has {volume.size_bytes} bytes, fewer '
                f'than its source with {source_bytes}'
            )
        self._copy(self._path(source), path, volume.size_bytes)
        return os.path.basename(path)

    # Describe.

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        self._size(volume)
        text = json.dumps(dict(sidecar), indent=1, sort_keys=True)
        self.node.write(self._note(volume), f'{text}\n'.encode())

    # LocalDevice. The path is the file itself: it neither comes nor goes.

    def map(
        self, volume: model.Volume, access: model.Access
    ) -> model.Device:
        self._size(volume)
        return model.Device(self._path(volume), is_block=False)

    def unmap(self, volume: model.Volume) -> None:
        self._refuse_open(self._path(volume), 'unmap')

    # Resize.

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        _check_size(size_bytes, f'volume {volume.id}')
        path, old_bytes = self._path(volume), self._size(volume)
        if size_bytes < old_bytes:
            raise errors.Invalid(
                f'volume {volume.id} has {old_bytes} bytes: it cannot shrink '
                f'to {size_bytes}'
            )
        if size_bytes > old_bytes:
            self._refuse_open(path, 'grow')
            with self.node.open(path, 'r+b') as f:
                f.truncate(size_bytes)
                f.sync()

    # Revert.

    def revert(self, snapshot: model.Snapshot) -> str:
        path = self._path(snapshot.volume)
        size_bytes = self._size(snapshot.volume)
        self._size(snapshot)
        self._refuse_open(path, 'revert')
        self._copy(self._path(snapshot), path, size_bytes)
        return os.path.basename(path)

    # Snapshots.

    def snapshot(self, snapshot: model.Snapshot) -> str:
        path = self._path(snapshot)
        if not self.node.exists(path):
            size_bytes = self._size(snapshot.volume)
            self._copy(self._path(snapshot.volume), path, size_bytes)
        return os.path.basename(path)

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        path = self._path(snapshot)
        self._refuse_open(path, 'delete')
        for name in _draft(path), path:
            if self.node.exists(name):
                self.node.unlink(name)

    # Ours alone: names.

    def _directories(self) -> list[str]:
        return [path.rstrip('/') for path in self.conf.directories or ()]

    def _directory(self, pool: str) -> str:
        for path in self._directories():
            if os.path.basename(path) == pool:
                self._check_mounted(pool, path)
                return path
        raise errors.Invalid(f'no directory of this backend is called {pool}')

    def _check_directory(self, path: str) -> None:
        if not os.path.isabs(path):
            raise errors.Invalid(
                f'directory {path!r} is relative: give it from the root'
            )
        name = os.path.basename(path)
        names = [os.path.basename(each) for each in self._directories()]
        if names.count(name) > 1:
            raise errors.Invalid(
                f'two directories are called {name!r}, which names the '
                'pool: rename one'
            )
        try:
            marker.check(self.node, path)
            has_reflink = self._probe(path, name in self._reflinks)
            marker.keep(self.node, path)
            device = self.node.space(path).device
        except errors.VolumeError:
            self._devices.pop(name, None)
            raise
        if has_reflink:
            self._reflinks.add(name)
        self._devices[name] = device

    def _check_mounted(self, pool: str, path: str) -> None:
        """An empty mount point must not pass for a pool without volumes."""
        try:
            device = self.node.space(path).device
            if pool not in self._devices:
                # The last check failed, and a job is being run all the same.
                marker.check(self.node, path)
        except errors.NotFound as gone:
            raise errors.Unavailable(f'directory {path} is gone') from gone
        except errors.Invalid as other:
            raise errors.Unavailable(str(other)) from other
        if self._devices.get(pool, device) != device:
            raise errors.Unavailable(
                f'directory {path} is on another file system than when the '
                'backend started: mount the right one, or reload the service'
            )

    def _path(self, thing: model.Volume | model.Snapshot) -> str:
        if isinstance(thing, model.Volume):
            return os.path.join(self._directory(thing.pool), f'{thing.id}.raw')
        return os.path.join(
            self._directory(thing.volume.pool),
            f'{thing.volume.id}@{thing.id}.raw',
        )

    def _note(self, volume: model.Volume) -> str:
        return os.path.join(self._directory(volume.pool), f'{volume.id}.json')

    # Ours alone: questions.

    def _probe(self, path: str, known: bool) -> bool:
        """Say whether the directory has reflink; raise if it is unusable.

        A full one is usable: much can be done there but to store more. It
        has reflink if it was ``known`` to.
        """
        source = os.path.join(path, f'.probe.{ids.new()}')
        clone = f'{source}-clone'
        try:
            f = self.node.open(source, 'xb')
        except errors.NoSpace:
            return known
        except (errors.Invalid, errors.NotFound) as failed:
            # Without the probe's name: who asks again is told the same, so
            # that it is logged once.
            why = str(failed).replace(source, path)
            raise errors.Invalid(
                f'cannot write to directory {path} ({why}): make it, '
                'mount it, or give it to the user of this service'
            ) from failed
        try:
            with f:
                self._sweep_probes(path, source)
                f.write(bytes(4096))
            self.node.clone_file(source, clone)
        except errors.Unsupported:
            return False
        except errors.NoSpace:
            return known
        finally:
            for name in clone, source:
                if self.node.exists(name):
                    self.node.unlink(name)
        return True

    def _sweep_probes(self, path: str, own: str) -> None:
        """Remove what checks that died have left.

        Old is what our own probe, which was just made, is a minute younger
        than: no two clocks are compared, and nobody's probe is taken away.
        """
        left = list(filter(PROBE.fullmatch, self.node.list(path)))
        for name in self.node.older(own, PROBE_OLD_S, left):
            self.node.unlink(os.path.join(path, name))

    def _pool(self, path: str) -> model.Pool:
        name = os.path.basename(path)
        self._check_mounted(name, path)
        space = self.node.space(path)
        features = base.features(self)
        if name not in self._reflinks:
            features -= NEED_REFLINK
        return model.Pool(
            name, space.total_bytes, space.free_bytes, thin=True,
            features=features, device=space.device,
        )

    def _size(self, thing: model.Volume | model.Snapshot) -> int:
        try:
            return self.node.size(self._path(thing))
        except errors.NotFound as gone:
            kind = type(thing).__name__.lower()
            raise errors.NotFound(f'no file holds {kind} {thing.id}') from gone

    def _has(self, path: str, volume: model.Volume) -> bool:
        """Say whether it is there already, with the size asked for."""
        if not self.node.exists(path):
            return False
        if (size_bytes := self.node.size(path)) != volume.size_bytes:
            raise errors.Conflict(
                f'volume {volume.id} exists with {size_bytes} bytes, not '
                f'{volume.size_bytes}'
            )
        return True

    def _found(self, pool: str, name: str, size_bytes: int) -> model.Found:
        if match := SNAPSHOT.fullmatch(name):
            return model.Found(name, size_bytes, match[2], match[1])
        if match := VOLUME.fullmatch(name):
            volume = model.Volume(match[1], pool, size_bytes)
            return model.Found(
                name, size_bytes, volume.id, sidecar=self._sidecar(volume)
            )
        return model.Found(name, size_bytes)

    def _sidecar(self, volume: model.Volume) -> dict[str, str]:
        """Return the note; a broken one is none, for it is only a note."""
        try:
            note = json.loads(self.node.read(self._note(volume)))
        except (
            errors.NotFound, errors.Invalid, ValueError, RecursionError
        ):
            return {}
        if not isinstance(note, dict):
            return {}
        return {str(name): str(value) for name, value in note.items()}

    def _check_foreign(self, handle: str, path: str) -> None:
        if VOLUME.fullmatch(handle) or SNAPSHOT.fullmatch(handle):
            raise errors.Conflict(f'{handle} is ours already')
        if not self.node.is_file(path):
            raise errors.Invalid(f'{handle} is no plain file')
        _check_size(self.node.size(path), f'file {handle}')
        self._refuse_open(path, 'adopt')

    def _refuse_open(self, path: str, verb: str) -> None:
        """What a daemon or QEMU has open is never replaced or cut."""
        name = os.path.basename(path)
        # The kernel is quicker to ask than the daemon, which has QEMU's
        # locks on all that is open; and who was told the path may run as
        # any user.
        if not self.node.is_open_in_qemu(path):
            return
        if self.node.blockd and self.node.blockd.is_open(path):
            raise errors.Busy(
                f'cannot {verb} {name} while it is attached: detach it first'
            )
        raise errors.Busy(
            f'cannot {verb} {name} while a process of QEMU has it open: end '
            'that first'
        )

    def _refuse_snapshots(self, volume: model.Volume) -> None:
        names = self.node.list(self._directory(volume.pool))
        if any(name.startswith(f'{volume.id}@') for name in names):
            raise errors.Busy(
                f'volume {volume.id} has snapshots: delete them first'
            )

    # Ours alone: deeds.

    def _copy(self, source: str, target: str, size_bytes: int) -> None:
        """Share the source's bytes under a new name, with zeros behind."""
        self.node.clone_file(source, _draft(target))
        with self.node.open(_draft(target), 'r+b') as f:
            f.truncate(size_bytes)
            f.sync()
        self.node.rename(_draft(target), target)


def _draft(path: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, f'.{name}.new')


def _is_thing(name: str) -> bool:
    """Say whether a name may be a volume's, ours or not."""
    return not name.startswith('.') and not NOTE.fullmatch(name)


def _check_size(size_bytes: int, what: str) -> None:
    if size_bytes % model.SECTOR_BYTES or not 0 < size_bytes < 1 << 63:
        raise errors.Invalid(
            f'{what} has {size_bytes} bytes: a volume has a positive '
            f'multiple of {model.SECTOR_BYTES}, below 8 EiB'
        )
