# SPDX-License-Identifier: Apache-2.0
"""A disk that its pool owns for as long as it is open for writing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

from volume.sim.xapi import disks

if TYPE_CHECKING:
    from volume.model import Extent
    from volume.sim.xapi.world import World


class Disk(disks.Disk):
    """Says in the world who writes; a second pool is a violation."""

    def __init__(
        self, disk: disks.Disk, world: World, what: str, pool_uuid: str,
    ) -> None:
        self._disk = disk
        self._world = world
        self._what = what
        self._pool_uuid = pool_uuid
        self.path = disk.path
        self.size_bytes = disk.size_bytes
        self.is_writable = disk.is_writable
        world.take(what, pool_uuid)

    def pread_into(self, buffer: Any, offset: int) -> None:
        self._disk.pread_into(buffer, offset)

    def pwrite(self, offset: int, data: Any) -> None:
        self._disk.pwrite(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._disk.zero(offset, length)

    def flush(self) -> None:
        self._disk.flush()

    def extents(self) -> Iterator[Extent]:
        return self._disk.extents()

    def allocated(self) -> Iterator[Extent]:
        return self._disk.allocated()

    def close(self) -> None:
        self._disk.close()
        self._world.give_back(self._what, self._pool_uuid)
