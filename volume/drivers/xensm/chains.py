# SPDX-License-Identifier: Apache-2.0
"""How long the way to a VDI's bytes is, and what can shorten it.

A VDI that shares bytes with others lies on a chain of hidden VDIs, each the
``vhd-parent`` of the next. The server refuses a snapshot or clone where it
would be longer than thirty. A hidden VDI with one child alone is merged by
the server sooner or later; one with several is needed as it is. Snapshots of
others (backup tools) are on the chain like ours.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from volume.drivers.xensm.vdis import Vdi

PARENT = 'vhd-parent'
LIMIT = 30


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """What lies below a VDI; ``depth`` counts itself."""

    depth: int
    mergeable: int
    foreign: int
    """Snapshots on it that are not ours."""

    @property
    def can_shorten(self) -> bool:
        """Whether the server will shorten it by itself."""
        return self.mergeable > 0

    def __str__(self) -> str:
        text = f'{self.depth} of {LIMIT} layers'
        if self.mergeable:
            text += f', {self.mergeable} of them to be merged by the server'
        if self.foreign:
            text += f', {self.foreign} snapshots made by others'
        return text


def of(vdi: Vdi, all_vdis: Iterable[Vdi]) -> Chain:
    """Return the chain of a VDI among those of its SR."""
    by_uuid = {each.uuid: each for each in all_vdis}
    children: dict[str, list[Vdi]] = collections.defaultdict(list)
    for each in by_uuid.values():
        children[each.sm_config.get(PARENT, '')].append(each)
    depth, mergeable, foreign = 1, 0, 0
    seen = {vdi.uuid}
    at = by_uuid.get(vdi.sm_config.get(PARENT, ''))
    while at is not None and at.uuid not in seen:
        seen.add(at.uuid)
        depth += 1
        below = children[at.uuid]
        mergeable += len(below) == 1
        foreign += sum(
            each.managed and each.is_snapshot and each.id is None
            for each in below
        )
        at = by_uuid.get(at.sm_config.get(PARENT, ''))
    return Chain(depth, mergeable, foreign)
