# SPDX-License-Identifier: Apache-2.0
"""The driver ``rbd``: each call goes to the part that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers.rbd import names
from volume.drivers.rbd import options
from volume.drivers.rbd.copies import Copies
from volume.drivers.rbd.fence import Fence
from volume.drivers.rbd.images import Images
from volume.drivers.rbd.link import Connect
from volume.drivers.rbd.link import Link
from volume.drivers.rbd.pools import Pools
from volume.drivers.rbd.streams import Streams
from volume.drivers.rbd.tending import Tending
from volume.drivers.rbd.wire import Wire
from volume.node import Node


class RbdDriver(
    base.Driver, base.Adopt, base.BlockNode, base.Clone, base.Describe,
    base.Extents, base.Flatten, base.Limits, base.NativeAccess, base.Resize,
    base.Revert, base.Snapshots, base.Upkeep,
):
    """Images in pools of a Ceph cluster."""

    options = options.OPTIONS
    # The host's own client hears of a new size from the cluster.
    abilities = model.Abilities(auth=('cephx',), online_resize=True)

    def __init__(
        self, conf: Any, node: Node, connect: Connect = Wire
    ) -> None:
        self.conf = conf
        self.node = node
        self._connect = connect
        self._known: _Parts | None = None

    def check(self) -> None:
        self._parts().pools.check()

    def pools(self) -> list[model.Pool]:
        return self._parts().pools.pools(base.features(self))

    def create(self, volume: model.Volume) -> str:
        return self._of(volume).images.create(volume)

    def delete(self, volume: model.Volume) -> None:
        parts = self._of(volume)
        parts.tending.release(volume.pool, names.image(volume))
        parts.images.delete(volume)

    def inspect(self, volume: model.Volume) -> model.Found:
        return self._of(volume).images.inspect(volume)

    def scan(self, pool: str) -> Iterator[model.Found]:
        return self._in(pool).images.scan(pool)

    def reader(
        self, source: model.Volume | model.Snapshot
    ) -> AbstractContextManager[base.Reader]:
        return self._of(source).streams.reader(source)

    def writer(
        self, volume: model.Volume
    ) -> AbstractContextManager[base.Writer]:
        return self._of(volume).streams.writer(volume)

    # Adopt.

    def adopt(self, handle: str, volume: model.Volume) -> str:
        return self._of(volume).images.adopt(handle, volume)

    def disown(self, volume: model.Volume) -> None:
        parts = self._of(volume)
        parts.tending.release(volume.pool, names.image(volume))
        parts.images.disown(volume)

    # BlockNode.

    def blocknode(
        self, source: model.Volume | model.Snapshot
    ) -> Mapping[str, Any]:
        parts = self._of(source)
        volume, snapshot = source, {}
        if isinstance(source, model.Snapshot):
            volume = source.volume
            snapshot = {'snapshot': names.snapshot(source)}
        assert isinstance(volume, model.Volume)
        name = names.image(volume)
        with parts.link.image(
            volume.pool, name, snapshot=snapshot.get('snapshot')
        ):
            pass  # NotFound, unless it is there
        settings = parts.link.settings
        return {'driver': 'raw', 'file': {
            'driver': 'rbd', 'pool': volume.pool, 'image': name, **snapshot,
            'conf': settings.conf, 'user': settings.user,
            # What librbd's cache could not store it would tell nobody.
            'cache': {'direct': True},
        }}

    # Clone.

    def clone(
        self, source: model.Volume | model.Snapshot, volume: model.Volume
    ) -> str:
        return self._of(volume).copies.clone(source, volume)

    # Describe.

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        self._of(volume).images.describe(volume, sidecar)

    # Extents.

    def extents(
        self,
        source: model.Volume | model.Snapshot,
        since: model.Snapshot | None,
    ) -> Iterator[model.Extent]:
        return self._of(source).streams.extents(source, since)

    # Flatten.

    def flatten(
        self, volume: model.Volume, watch: Callable[[float], None]
    ) -> str:
        return self._of(volume).copies.flatten(volume, watch)

    # Limits.

    def limit(self, volume: model.Volume, limits: model.IoLimits) -> None:
        self._of(volume).images.limit(volume, limits)

    # NativeAccess.

    def grant(
        self, volume: model.Volume, host: model.Host, access: model.Access
    ) -> model.Connection:
        parts = self._of(volume)
        connection = parts.fence.grant(volume, host, access)
        parts.tending.release(volume.pool, names.image(volume))
        return connection

    def revoke(self, volume: model.Volume, host: model.Host) -> None:
        self._of(volume).fence.revoke(volume, host)

    # Resize.

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        self._of(volume).images.resize(volume, size_bytes)

    # Revert.

    def revert(self, snapshot: model.Snapshot) -> str:
        return self._of(snapshot).copies.revert(snapshot)

    # Snapshots.

    def snapshot(self, snapshot: model.Snapshot) -> str:
        return self._of(snapshot).copies.snapshot(snapshot)

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        self._of(snapshot).copies.delete_snapshot(snapshot)

    # Upkeep.

    def upkeep(self, pool: str) -> bool:
        return self._in(pool).tending.upkeep(pool)

    # Ours alone.

    def _of(self, thing: model.Volume | model.Snapshot) -> _Parts:
        volume = thing if isinstance(thing, model.Volume) else thing.volume
        return self._in(volume.pool)

    def _in(self, pool: str) -> _Parts:
        """Return the parts that work on a pool.

        :raises Invalid: the section does not name it
        """
        parts = self._parts()
        if pool not in parts.link.settings.pools:
            raise errors.Invalid(f'this backend has no pool {pool}')
        return parts

    def _parts(self) -> _Parts:
        """Return the parts; the section is read once it is right."""
        if self._known is None:
            self._known = _Parts(
                Link(options.read(self.conf), self.node, self._connect)
            )
        return self._known


class _Parts:
    """What one cluster is worked on with."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.tending = Tending(link)
        self.images = Images(link)
        self.copies = Copies(link, self.images, self.tending)
        self.streams = Streams(link, self.tending)
        self.fence = Fence(link, self.images)
        self.pools = Pools(link, self.tending)
