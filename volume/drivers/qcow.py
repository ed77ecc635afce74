# SPDX-License-Identifier: Apache-2.0
"""Trees of qcow2 layers in directories of this node.

A volume is a pointer to a layer, a snapshot is a pointer to a layer that
nobody writes to any more, and a layer's bytes are its own and those of the
layers that it stands on. To take a snapshot is to put a new layer on top and
to move the volume's pointer; to clone is to put a second one there. Names
can be deleted in any order, for layers go only when nothing needs them.

What lies where, and who may touch it, stands in ``qcow_pool``; how layers
are put on each other, in ``qcow_chain``; what is done in the background, in
``qcow_merge``; how a file of somebody else becomes a volume, in
``qcow_adopt``; what is read of a file, in ``qcow_layers``. There is no state
beside the directory.

A daemon that has a layer open is never deceived: layers keep their names for
ever, the pointer is moved first, and the daemon follows. If it could not be
told, its guest writes on to the layer below, under an empty one: nothing is
wrong, and the next call for the volume tells it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from oslo_config import cfg

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base
from volume.drivers import generic
from volume.drivers import qcow_adopt
from volume.drivers import qcow_chain
from volume.drivers import qcow_layers
from volume.drivers import qcow_merge
from volume.drivers.qcow_layers import FORMATS
from volume.drivers.qcow_pool import PoolDirectory
from volume.node import Node

T = TypeVar('T')
Source = model.Volume | model.Snapshot

COPY_MAX_S = 24 * 3600.0
TRIES = 3
SNAPSHOT = re.compile(r'snapshots/([0-9a-f-]{36})@([0-9a-f-]{36})')


class QcowDriver(
    base.Driver, base.Adopt, base.BlockNode, base.Clone, base.Describe,
    base.Flatten, base.LocalDevice, base.Resize, base.Revert, base.Snapshots,
    base.Upkeep,
):
    """Trees of qcow2 layers, or single raw, VHD or VMDK files."""

    options = (
        cfg.ListOpt(
            'directories', required=True,
            help='Directories, each one a pool named by its last part.\n\n'
            'Absolute paths; the service must be able to write there.',
        ),
        cfg.StrOpt(
            'format', default='qcow2', choices=list(FORMATS),
            help='Format of new volumes.\n\n'
            'Only qcow2 has snapshots and clones; vhd and vmdk cannot grow '
            'either. Where one is lacking the service copies or refuses.',
        ),
        cfg.IntOpt(
            'max_depth', default=30, min=2, max=200,
            help='How many layers a volume may stand on.\n\n'
            'Each snapshot adds one; beyond it they are refused until the '
            'volume is flattened.',
        ),
        cfg.IntOpt(
            'cluster_size', default=1 << 16, min=1 << 12, max=1 << 21,
            help='Bytes of a qcow2 cluster, a power of two.',
        ),
        cfg.StrOpt(
            'preallocation', default='off', choices=['off', 'metadata'],
            help='Whether the tables of a new qcow2 volume are written.\n\n'
            'With metadata, first writes are a little faster and creation '
            'is slower.',
        ),
        cfg.IntOpt(
            'merge_bytes_per_s', default=100 << 20, min=0,
            help='How fast layers are merged in the background; 0: no limit.',
        ),
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        self.forms = qcow_layers.forms(conf.format)
        self._pools = {
            pool.name: pool for pool in (
                PoolDirectory(
                    node, path, conf.cluster_size, conf.preallocation
                ) for path in self._directories()
            )
        }

    def check(self) -> None:
        paths = self._directories()
        if not paths:
            raise errors.Invalid(
                'the option directories is empty: name at least one'
            )
        if self.conf.cluster_size & (self.conf.cluster_size - 1):
            raise errors.Invalid(
                f'cluster_size {self.conf.cluster_size} is no power of two'
            )
        names = [os.path.basename(path) for path in paths]
        for path, name in zip(paths, names, strict=True):
            if not os.path.isabs(path):
                raise errors.Invalid(
                    f'directory {path!r} is relative: give it from the root'
                )
            if names.count(name) > 1:
                raise errors.Invalid(
                    f'two directories are called {name!r}, which names the '
                    'pool: rename one'
                )
            self._pools[name].prepare()
        self.node.run('qemu-img', '--version')

    def pools(self) -> list[model.Pool]:
        return [self._describe_pool(pool) for pool in self._pools.values()]

    def create(self, volume: model.Volume) -> str:
        self._check_size(volume)
        pool, pointer = self._pool(volume), _pointer(volume)
        name = qcow_layers.new_name(self.conf.format)
        with contextlib.ExitStack() as stack:
            with pool.lock():
                if self._has(pool, volume):
                    return pointer
                path = stack.enter_context(pool.draft(name))
            pool.make(path, volume.size_bytes)
            with pool.lock():
                pool.keep(path)
                pool.point(pointer, name)
        return pointer

    def delete(self, volume: model.Volume) -> None:
        pool, pointer = self._pool(volume), _pointer(volume)
        with pool.lock():
            active = pool.target(pointer)
            if active is None:
                pool.sweep()  # what an earlier call has left
                return
            self._refuse_snapshots(pool, volume)
            pool.refuse_use(active, volume.id, 'delete')
            # The pointer goes last: while anything is left, scan shows it.
            pool.node.unlink(_note(pool, volume))
            pool.node.unlink(pool.path(pointer))
            pool.release(active)

    def inspect(self, volume: model.Volume) -> model.Found:
        pool = self._pool(volume)
        with pool.lock():
            header = pool.header(self._layer(pool, volume))
        return model.Found(
            _pointer(volume), header.size_bytes, volume.id,
            sidecar=_sidecar(pool, volume),
        )

    def scan(self, pool: str) -> Iterator[model.Found]:
        directory = self._named(pool)
        with directory.lock():
            tree = directory.tree()
            foreign = qcow_adopt.foreign(
                directory, tree, self.conf.format
            )
        for name in sorted(tree.names):
            for pointer in sorted(tree.names[name]):
                yield self._found(directory, pointer, tree.size_bytes(name))
        yield from foreign

    @contextlib.contextmanager
    def reader(self, source: Source) -> Iterator[base.Reader]:
        pool = self._pool(source)
        with contextlib.ExitStack() as stack:
            yield self._insist(lambda: stack.enter_context(
                self._reader(pool, self._opened(pool, source))
            ))

    @contextlib.contextmanager
    def writer(self, volume: model.Volume) -> Iterator[base.Writer]:
        pool = self._pool(volume)
        with contextlib.ExitStack() as stack:
            yield self._insist(lambda: stack.enter_context(
                self._writer(pool, self._opened(pool, volume, 'fill'))
            ))

    # Adopt.

    def adopt(self, handle: str, volume: model.Volume) -> str:
        pool, pointer = self._pool(volume), _pointer(volume)
        qcow_adopt.take(pool, handle, pointer, self.conf.format)
        return pointer

    def disown(self, volume: model.Volume) -> None:
        pool, pointer = self._pool(volume), _pointer(volume)
        foreign = f'disowned/{volume.id}'
        with pool.lock():
            active = pool.target(pointer)
            if active is None:
                return
            self._refuse_snapshots(pool, volume)
            pool.refuse_use(active, volume.id, 'let go of')
            if pool.target(foreign):
                raise errors.Conflict(
                    f'{pool.path(foreign)} is in the way: adopt or remove '
                    'it first'
                )
            self.node.unlink(_note(pool, volume))
            self.node.rename(pool.path(pointer), pool.path(foreign))

    # BlockNode.

    def blocknode(self, source: Source) -> Mapping[str, Any]:
        pool = self._pool(source)
        return qcow_chain.blocknode(
            pool, self._opened(pool, source),
            isinstance(source, model.Volume),
        )

    # Clone.

    def clone(self, source: Source, volume: model.Volume) -> str:
        self._check_size(volume)
        pool, pointer = self._pool(volume), _pointer(volume)
        if self._pool(source) is not pool:
            raise errors.Unsupported(
                f'the source of volume {volume.id} is in another pool: copy '
                'it'
            )
        with pool.lock():
            if self._has(pool, volume):
                return pointer
            below = self._layer(pool, source)
            self._need_chains(below, 'clone')
            size_bytes = pool.header(below).size_bytes
            if volume.size_bytes < size_bytes:
                raise errors.Invalid(
                    f'volume {volume.id} has {volume.size_bytes} bytes, '
                    f'fewer than its source with {size_bytes}'
                )
            self._check_depth(pool, below, volume)
            if isinstance(source, model.Volume):
                below = qcow_chain.freeze(
                    pool, _pointer(source), self.conf.max_depth
                )
            pool.point(pointer, pool.overlay(below, volume.size_bytes))
        return pointer

    # Describe.

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        pool = self._pool(volume)
        text = json.dumps(dict(sidecar), indent=1, sort_keys=True)
        with pool.lock():
            self._layer(pool, volume)
            self.node.write(_note(pool, volume), f'{text}\n'.encode())

    # Flatten.

    def flatten(
        self, volume: model.Volume, watch: Callable[[float], None]
    ) -> str:
        pool, pointer = self._pool(volume), _pointer(volume)
        with contextlib.ExitStack() as stack:
            with pool.lock():
                active = self._layer(pool, volume)
                self._refuse_snapshots(pool, volume)
                pool.refuse_use(active, volume.id, 'flatten')
                chain = qcow_chain.opened(pool, active, True)
                if len(chain) == 1:
                    return pointer
                name = qcow_layers.new_name('qcow2')
                path = stack.enter_context(pool.draft(name))
            self._copy(pool, chain, path, watch)
            with pool.lock():
                if pool.target(pointer) != active:
                    raise errors.Busy(f'volume {volume.id} was merged: again')
                pool.refuse_use(active, volume.id, 'flatten')
                pool.keep(path)
                pool.point(pointer, name)
                pool.release(active)
        return pointer

    # LocalDevice. Who has the path may open it at any time: until ``unmap``
    # nothing below it is moved or merged.

    def map(
        self, volume: model.Volume, access: model.Access
    ) -> model.Device:
        pool = self._pool(volume)
        with pool.lock():
            active = self._layer(pool, volume)
            qcow_chain.opened(pool, active, True)
            if access is model.Access.WRITE and pool.is_served(active):
                raise errors.Busy(
                    f'volume {volume.id} is exported: detach it first'
                )
            path = pool.mapped_path(volume.id)
            self.node.write(path, access.value.encode())
        driver = FORMATS[qcow_layers.extension(active)].driver
        return model.Device(
            pool.layer_path(active), is_block=False, format=driver
        )

    def unmap(self, volume: model.Volume) -> None:
        pool = self._pool(volume)
        with pool.lock():
            active = pool.target(_pointer(volume))
            if active and pool.is_used(active):
                raise errors.Busy(
                    f'volume {volume.id} is open: close it first'
                )
            self.node.unlink(pool.mapped_path(volume.id))

    # Resize.

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        pool = self._pool(volume)
        with pool.lock():
            active = self._layer(pool, volume)
            extension = qcow_layers.extension(active)
            if 'Resize' in FORMATS[extension].lacks:
                raise errors.Unsupported(
                    f'volume {volume.id} is a {extension} file, which '
                    'cannot grow: copy it to a larger volume'
                )
            old_bytes = pool.header(active).size_bytes
            if size_bytes < old_bytes:
                raise errors.Invalid(
                    f'volume {volume.id} has {old_bytes} bytes: it cannot '
                    f'shrink to {size_bytes}'
                )
            if size_bytes == old_bytes:
                return
            self._check_size(volume, size_bytes)
            pool.refuse_use(active, volume.id, 'grow')
            path = pool.layer_path(active)
            chain = qcow_chain.opened(pool, active, True)
            pool.insist((name for name, _ in chain), lambda: pool.qemu_img(
                'resize', '-q', '-f', FORMATS[extension].driver, path,
                str(size_bytes),
            ))
            pool.sync(path)

    # Revert.

    def revert(self, snapshot: model.Snapshot) -> str:
        volume = snapshot.volume
        pool, pointer = self._pool(volume), _pointer(volume)
        with pool.lock():
            active = self._layer(pool, volume)
            below = self._layer(pool, snapshot)
            pool.refuse_use(active, volume.id, 'revert')
            header = pool.header(active)
            if header.backing == below and pool.is_empty(active, header):
                return pointer
            self._check_depth(pool, below, volume)
            pool.point(pointer, pool.overlay(below, header.size_bytes))
            pool.release(active)
        return pointer

    # Snapshots.

    def snapshot(self, snapshot: model.Snapshot) -> str:
        pool, pointer = self._pool(snapshot), _pointer(snapshot)
        with pool.lock():
            if pool.target(pointer) is None:
                active = self._layer(pool, snapshot.volume)
                self._need_chains(active, 'take a snapshot')
                # It has a name only when nobody writes to its layer.
                pool.point(pointer, qcow_chain.freeze(
                    pool, _pointer(snapshot.volume), self.conf.max_depth,
                    keeps_size=True,
                ))
        return pointer

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        pool, pointer = self._pool(snapshot), _pointer(snapshot)
        with pool.lock():
            layer = pool.target(pointer)
            if layer is None:
                pool.sweep()
                return
            if qcow_chain.is_top(pool, layer):
                raise errors.Busy(
                    f'snapshot {snapshot.id} is being read: try again later'
                )
            self.node.unlink(pool.path(pointer))
            pool.release(layer)

    # Upkeep.

    def upkeep(self, pool: str) -> bool:
        return qcow_merge.tend(
            self._named(pool), self.conf.merge_bytes_per_s
        )

    # Ours alone: questions.

    def _directories(self) -> list[str]:
        return [path.rstrip('/') for path in self.conf.directories or ()]

    def _named(self, pool: str) -> PoolDirectory:
        if pool not in self._pools:
            raise errors.Invalid(
                f'no directory of this backend is called {pool}'
            )
        return self._pools[pool]

    def _pool(self, source: Source) -> PoolDirectory:
        if isinstance(source, model.Snapshot):
            return self._named(source.volume.pool)
        return self._named(source.pool)

    def _layer(self, pool: PoolDirectory, source: Source) -> str:
        layer = pool.target(_pointer(source))
        if layer is None:
            kind = type(source).__name__.lower()
            raise errors.NotFound(
                f'pool {pool.name} has no {kind} {source.id}'
            )
        return layer

    def _opened(
        self, pool: PoolDirectory, source: Source, verb: str = '',
    ) -> qcow_chain.Chain:
        """Return the layers of what is going to be opened.

        With a verb, it must not be in use.
        """
        with pool.lock():
            layer = self._layer(pool, source)
            if verb:
                pool.refuse_use(layer, source.id, verb)
            return qcow_chain.opened(
                pool, layer, isinstance(source, model.Volume)
            )

    def _insist(self, deed: Callable[[], T]) -> T:
        """Open again what was merged just when it was to be opened."""
        for left in reversed(range(TRIES)):
            try:
                return deed()
            except (errors.Busy, errors.NotFound):
                if not left:
                    raise
        raise AssertionError('not reached')

    def _copy(
        self, pool: PoolDirectory, chain: qcow_chain.Chain, path: str,
        watch: Callable[[float], None],
    ) -> None:
        """Copy all bytes of a chain into one durable file."""
        try:
            pool.insist((name for name, _ in chain), lambda: pool.qemu_img(
                'convert', '-p', '-W', '-f', 'qcow2', '-O', 'qcow2',
                '-o', f'cluster_size={self.conf.cluster_size}',
                pool.layer_path(chain[0][0]), path,
                timeout_s=COPY_MAX_S, watch=watch,
            ))
        except errors.NotFound as gone:
            raise errors.Busy(f'{chain[0][0]} was merged: again') from gone
        pool.sync(path)

    def _reader(
        self, pool: PoolDirectory, chain: qcow_chain.Chain
    ) -> AbstractContextManager[base.Reader]:
        if chain[0][0].endswith('.raw'):
            path = pool.layer_path(chain[0][0])
            return generic.file_reader(self.node, path)
        return generic.nbd_reader(
            self.node, qcow_chain.blocknode(pool, chain, False)
        )

    def _writer(
        self, pool: PoolDirectory, chain: qcow_chain.Chain
    ) -> AbstractContextManager[base.Writer]:
        name, header = chain[0]
        if name.endswith('.raw'):
            return generic.file_writer(
                self.node, pool.layer_path(name), header.size_bytes
            )
        return generic.nbd_writer(
            self.node, qcow_chain.blocknode(pool, chain, True),
            pool.layer_path(name),
        )

    def _check_depth(
        self, pool: PoolDirectory, below: str, volume: model.Volume
    ) -> None:
        qcow_chain.check_depth(
            pool, below, self.conf.max_depth, volume.id
        )

    def _has(self, pool: PoolDirectory, volume: model.Volume) -> bool:
        """Say whether it is there already, with the size asked for."""
        layer = pool.target(_pointer(volume))
        if layer is None:
            return False
        size_bytes = pool.header(layer).size_bytes
        if size_bytes != volume.size_bytes:
            raise errors.Conflict(
                f'volume {volume.id} exists with {size_bytes} bytes, not '
                f'{volume.size_bytes}'
            )
        return True

    def _check_size(
        self, volume: model.Volume, size_bytes: int | None = None
    ) -> None:
        size_bytes = size_bytes or volume.size_bytes
        max_bytes = FORMATS[self.conf.format].max_bytes
        if size_bytes <= 0 or size_bytes % model.SECTOR_BYTES or (
            size_bytes > max_bytes
        ):
            raise errors.Invalid(
                f'volume {volume.id} has {size_bytes} bytes: a volume has a '
                f'positive multiple of {model.SECTOR_BYTES}, up to '
                f'{max_bytes}'
            )

    def _need_chains(self, layer: str, verb: str) -> None:
        for extension in qcow_layers.extension(layer), self.conf.format:
            if extension != 'qcow2':
                raise errors.Unsupported(
                    f'cannot {verb} without a copy: {extension} files do '
                    'not stand on each other'
                )

    def _refuse_snapshots(
        self, pool: PoolDirectory, volume: model.Volume
    ) -> None:
        names = self.node.list(pool.path('snapshots'))
        if any(name.startswith(f'{volume.id}@') for name in names):
            raise errors.Busy(
                f'volume {volume.id} has snapshots: delete them first'
            )

    def _describe_pool(self, pool: PoolDirectory) -> model.Pool:
        with pool.lock():
            hidden_bytes = pool.hidden_bytes()
        space = self.node.space(pool.directory)
        format_ = FORMATS[self.conf.format]
        return model.Pool(
            pool.name, space.total_bytes, space.free_bytes, thin=True,
            features=base.features(self) - format_.lacks,
            max_volume_bytes=format_.max_bytes,
            hidden_bytes=hidden_bytes,
            device=space.device,
        )

    def _found(
        self, pool: PoolDirectory, pointer: str, size_bytes: int
    ) -> model.Found:
        kind, _, name = pointer.partition('/')
        if match := SNAPSHOT.fullmatch(pointer):
            return model.Found(pointer, size_bytes, match[2], match[1])
        if kind == 'volumes' and ids.is_id(name):
            volume = model.Volume(name, pool.name, size_bytes)
            return model.Found(
                pointer, size_bytes, name, sidecar=_sidecar(pool, volume)
            )
        return model.Found(pointer, size_bytes)


def _pointer(source: Source) -> str:
    if isinstance(source, model.Volume):
        return f'volumes/{ids.check(source.id)}'
    return f'snapshots/{ids.check(source.volume.id)}@{ids.check(source.id)}'


def _note(pool: PoolDirectory, volume: model.Volume) -> str:
    return pool.path('notes', f'{ids.check(volume.id)}.json')


def _sidecar(pool: PoolDirectory, volume: model.Volume) -> dict[str, str]:
    """Return the note; a broken one is none, for it is only a note."""
    try:
        note = json.loads(pool.node.read(_note(pool, volume)))
    except (errors.NotFound, errors.Invalid, ValueError, RecursionError):
        return {}
    if not isinstance(note, dict):
        return {}
    return {str(name): str(value) for name, value in note.items()}
