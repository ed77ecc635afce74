# SPDX-License-Identifier: Apache-2.0
"""Which manager serves a type of SR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.sm import arrays
from volume.sim.xapi.sm import filesr
from volume.sim.xapi.sm import lunsr
from volume.sim.xapi.sm import lvmsr

if TYPE_CHECKING:
    from volume.sim.xapi.sm.base import Manager

MANAGERS: Mapping[str, Callable[..., Manager]] = {
    **filesr.MANAGERS, **lvmsr.MANAGERS, **lunsr.MANAGERS, **arrays.MANAGERS,
}


def manager_for(kind: str) -> Callable[..., Manager]:
    """Return the manager's class of a type.

    :raises Failure: the type has a record, but nothing of it is simulated
    """
    if kind not in MANAGERS:
        raise Failure('NOT_IMPLEMENTED', f'an SR of type {kind}')
    return MANAGERS[kind]
