# SPDX-License-Identifier: Apache-2.0
"""The contract over LVM: each pool is a volume group.

See ``names`` for what a volume is, ``thick`` and ``thin`` for what is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers.lvm import options
from volume.drivers.lvm import thick
from volume.drivers.lvm import thin
from volume.drivers.lvm.groups import Group
from volume.drivers.lvm.store import Store
from volume.node import Node


class LvmDriver(
    base.Driver, base.Adopt, base.BlockNode, base.Clone, base.Describe,
    base.Extents, base.LocalDevice, base.Resize, base.Revert,
    base.Snapshots, base.Upkeep,
):
    """Logical volumes in volume groups of this node, thick or thin."""

    options = options.OPTIONS
    forms = frozenset({model.Form.BLOCK})
    may_be_remote = True

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        self._made: dict[str, Store] = {}

    def check(self) -> None:
        failures = []
        for store in self._stores().values():
            try:
                store.check(self.may_format)
            except errors.VolumeError as failed:
                store.note(str(failed))
                failures.append(failed)
        # One group that is not well is no reason not to use the others.
        if len(failures) == len(self._stores()):
            raise failures[0]

    def pools(self) -> list[model.Pool]:
        found, failures = [], []
        for store in self._stores().values():
            try:
                found.append(store.pool(base.features(self)))
            except errors.VolumeError as failed:
                store.note(str(failed))
                failures.append(failed)
        if not found:
            raise failures[0]
        return found

    def create(self, volume: model.Volume) -> str:
        return self._store(volume.pool).create(volume)

    def delete(self, volume: model.Volume) -> None:
        self._store(volume.pool).delete(volume)

    def inspect(self, volume: model.Volume) -> model.Found:
        return self._store(volume.pool).inspect(volume)

    def scan(self, pool: str) -> Iterator[model.Found]:
        return self._store(pool).scan()

    def reader(
        self, source: model.Volume | model.Snapshot
    ) -> AbstractContextManager[base.Reader]:
        return self._of(source).reader(source)

    def writer(
        self, volume: model.Volume
    ) -> AbstractContextManager[base.Writer]:
        return self._store(volume.pool).writer(volume)

    # Adopt.

    def adopt(self, handle: str, volume: model.Volume) -> str:
        return self._store(volume.pool).adopt(handle, volume)

    def disown(self, volume: model.Volume) -> None:
        self._store(volume.pool).disown(volume)

    # BlockNode.

    def blocknode(
        self, source: model.Volume | model.Snapshot
    ) -> Mapping[str, Any]:
        path = self._of(source).open(source)
        return {
            'driver': 'raw',
            'file': {'driver': 'host_device', 'filename': path},
        }

    # Clone.

    def clone(
        self, source: model.Volume | model.Snapshot, volume: model.Volume
    ) -> str:
        return self._thin(volume.pool, 'Clone').clone(source, volume)

    # Describe.

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        self._store(volume.pool).describe(volume, sidecar)

    # Extents.

    def extents(
        self,
        source: model.Volume | model.Snapshot,
        since: model.Snapshot | None,
    ) -> Iterator[model.Extent]:
        pool = _volume(source).pool
        return self._thin(pool, 'Extents').changed(source, since)

    # LocalDevice.

    def map(
        self, volume: model.Volume, access: model.Access
    ) -> model.Device:
        path = self._store(volume.pool).open(volume)
        return model.Device(path, is_block=True)

    def unmap(self, volume: model.Volume) -> None:
        self._store(volume.pool).unmap(volume)

    # Resize.

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        self._store(volume.pool).resize(volume, size_bytes)

    # Revert.

    def revert(self, snapshot: model.Snapshot) -> str:
        return self._thin(snapshot.volume.pool, 'Revert').revert(snapshot)

    # Snapshots.

    def snapshot(self, snapshot: model.Snapshot) -> str:
        return self._of(snapshot).snapshot(snapshot)

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        self._of(snapshot).delete_snapshot(snapshot)

    def before_overwrite(self, volume: model.Volume) -> None:
        self._store(volume.pool).before_overwrite(volume)

    # Upkeep.

    def upkeep(self, pool: str) -> bool:
        return self._store(pool).upkeep()

    # Ours alone.

    def _stores(self) -> dict[str, Store]:
        if not self._made:
            settings = options.read(self.conf)
            kind = thin.Thin if settings.is_thin else thick.Thick
            self._made = {
                name: kind(Group(name, settings, self.node))
                for name in settings.groups
            }
        return self._made

    def _store(self, pool: str) -> Store:
        found = self._stores().get(pool)
        if found is None:
            raise errors.Invalid(
                f'no volume group of this backend is called {pool}'
            )
        return found

    def _of(self, source: model.Volume | model.Snapshot) -> Store:
        return self._store(_volume(source).pool)

    def _thin(self, pool: str, feature: str) -> thin.Thin:
        found = self._store(pool)
        if not isinstance(found, thin.Thin):
            raise errors.Unsupported(
                f'pool {pool} is thick, and has no {feature}'
            )
        return found


def _volume(source: model.Volume | model.Snapshot) -> model.Volume:
    return source if isinstance(source, model.Volume) else source.volume
