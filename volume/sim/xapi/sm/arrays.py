# SPDX-License-Identifier: Apache-2.0
"""The types whose VDIs are volumes of an array."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volume.sim.xapi.sm import arraybox
from volume.sim.xapi.sm.arraysr import ArraySr
from volume.sim.xapi.sm.equal import EqualSr
from volume.sim.xapi.sm.netapp import NetappSr

if TYPE_CHECKING:
    from volume.sim.xapi.world import World

MANAGERS: dict[str, type[ArraySr]] = {'netapp': NetappSr, 'equal': EqualSr}


def repositories(
    world: World, kind: str, device_config: dict[str, str],
) -> list[str]:
    """Return the SRs that an array holds volumes of.

    :raises Failure: what the login says
    """
    array = MANAGERS[kind].enter(world, device_config)
    return sorted(arraybox.Box(world, array).look().repositories)
