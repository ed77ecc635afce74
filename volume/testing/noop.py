# SPDX-License-Identifier: Apache-2.0
"""A driver that stores nothing, to measure everything else.

With ``driver = noop`` a volume costs the service its own work alone: doors,
database, journal, messages. There are no bytes: what would read or fill a
volume is refused, so that nobody takes it for storage. What it knows is
forgotten with the process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from oslo_config import cfg

from volume import errors
from volume import model
from volume.drivers import base
from volume.node import Node

TOTAL_BYTES = 1 << 60


class NoopDriver(
    base.Driver, base.Clone, base.NativeAccess, base.Resize, base.Revert,
    base.Snapshots,
):
    """Names and sizes in memory."""

    options = (
        cfg.ListOpt('pools', default=['noop'], help='Names of its pools.'),
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        self._guard = threading.Lock()
        self._volumes: dict[str, model.Volume] = {}
        self._snapshots: dict[str, model.Snapshot] = {}

    def check(self) -> None:
        if not self.conf.pools:
            raise errors.Invalid('option pools names no pool: give one')

    def pools(self) -> list[model.Pool]:
        return [
            model.Pool(
                name, TOTAL_BYTES, TOTAL_BYTES, thin=True,
                features=base.features(self), device=f'noop-{name}',
            )
            for name in self.conf.pools
        ]

    def create(self, volume: model.Volume) -> str:
        with self._guard:
            there = self._volumes.setdefault(volume.id, volume)
        if there.size_bytes != volume.size_bytes:
            raise errors.Conflict(
                f'volume {volume.id} has {there.size_bytes} bytes, not '
                f'{volume.size_bytes}'
            )
        return volume.id

    def delete(self, volume: model.Volume) -> None:
        with self._guard:
            if any(
                each.volume.id == volume.id
                for each in self._snapshots.values()
            ):
                raise errors.Busy(
                    f'volume {volume.id} has snapshots: delete them first'
                )
            self._volumes.pop(volume.id, None)

    def inspect(self, volume: model.Volume) -> model.Found:
        return self._found(self._known(volume))

    def scan(self, pool: str) -> Iterator[model.Found]:
        with self._guard:
            volumes = list(self._volumes.values())
            snapshots = list(self._snapshots.values())
        for volume in volumes:
            if volume.pool == pool:
                yield self._found(volume)
        for snapshot in snapshots:
            if snapshot.volume.pool == pool:
                yield model.Found(
                    snapshot.id, snapshot.size_bytes, snapshot.id,
                    snapshot.volume.id,
                )

    def reader(
        self, source: model.Volume | model.Snapshot
    ) -> contextlib.AbstractContextManager[base.Reader]:
        raise errors.Unsupported('the noop driver stores nothing to be read')

    def writer(
        self, volume: model.Volume
    ) -> contextlib.AbstractContextManager[base.Writer]:
        raise errors.Unsupported('the noop driver stores nothing')

    # Features.

    def grant(
        self, volume: model.Volume, host: model.Host, access: model.Access
    ) -> model.Connection:
        return model.Connection(
            'noop', {'volume': volume.id, 'access': access.value}
        )

    def revoke(self, volume: model.Volume, host: model.Host) -> None:
        """Return: there is nothing that a host could reach."""

    def snapshot(self, snapshot: model.Snapshot) -> str:
        self._known(snapshot.volume)
        with self._guard:
            self._snapshots.setdefault(snapshot.id, snapshot)
        return snapshot.id

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        with self._guard:
            self._snapshots.pop(snapshot.id, None)

    def clone(
        self, source: model.Volume | model.Snapshot, volume: model.Volume
    ) -> str:
        if volume.size_bytes < source.size_bytes:
            raise errors.Invalid(
                f'volume {volume.id} is smaller than its source {source.id}'
            )
        return self.create(volume)

    def revert(self, snapshot: model.Snapshot) -> str:
        return self._known(snapshot.volume).id

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        there = self._known(volume)
        if there.size_bytes > size_bytes:
            raise errors.Invalid(
                f'volume {volume.id} has {there.size_bytes} bytes and cannot '
                'become smaller'
            )
        with self._guard:
            self._volumes[volume.id] = model.Volume(
                volume.id, there.pool, size_bytes, there.handle
            )

    # Ours alone.

    def _known(self, volume: model.Volume) -> model.Volume:
        with self._guard:
            there = self._volumes.get(volume.id)
        if there is None:
            raise errors.NotFound(f'there is no volume {volume.id}')
        return there

    def _found(self, volume: model.Volume) -> model.Found:
        return model.Found(volume.id, volume.size_bytes, volume.id)
