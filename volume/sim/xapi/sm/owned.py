# SPDX-License-Identifier: Apache-2.0
"""A disk that its pool owns for as long as it is open for writing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volume.sim.xapi.disk import disks

if TYPE_CHECKING:
    from volume.sim.xapi.world import World


class Disk(disks.Passed):
    """Says in the world who writes; a second pool is a violation."""

    def __init__(
        self, disk: disks.Disk, world: World, what: str, pool_uuid: str,
    ) -> None:
        super().__init__(disk)
        self._world = world
        self._what = what
        self._pool_uuid = pool_uuid
        world.take(what, pool_uuid)

    def close(self) -> None:
        super().close()
        self._world.give_back(self._what, self._pool_uuid)
