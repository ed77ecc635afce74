# SPDX-License-Identifier: Apache-2.0
"""An open volume of an array: its snapshots are charged with what changes."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

from volume.sim.xapi.disk.raw_disk import Raw
from volume.sim.xapi.sm import owned

if TYPE_CHECKING:
    from volume.sim.xapi.sm.arraybox import Box
    from volume.sim.xapi.world import World


class ArrayDisk(owned.Disk):
    """A volume that is open for writing."""

    def __init__(
        self, box: Box, uuid: str, world: World, pool_uuid: str,
    ) -> None:
        super().__init__(
            Raw().open(str(box.file(uuid)), True), world, f'array/{uuid}',
            pool_uuid,
        )
        self._box = box
        self._uuid = uuid

    def pwrite(self, offset: int, data: Any) -> None:
        self._box.written(self._uuid, offset, len(data))
        super().pwrite(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._box.written(self._uuid, offset, length)
        super().zero(offset, length)
