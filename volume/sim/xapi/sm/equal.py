# SPDX-License-Identifier: Apache-2.0
"""``equal``: volumes of an EqualLogic group; modelled on its guide."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from collections.abc import Iterator
from typing import ClassVar, TYPE_CHECKING

from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm import arraybox
from volume.sim.xapi.sm import arraysr
from volume.sim.xapi.sm.arraysr import ArraySr
from volume.sim.xapi.sm.arraysr import elements
from volume.sim.xapi.world import Array

if TYPE_CHECKING:
    from volume.sim.xapi.world import World

MIB = 1 << 20


class EqualSr(ArraySr):
    """``equal``: volumes of a storage pool of an EqualLogic group."""

    pool_key = 'storagepool'
    pool_missing = 163
    management_bytes = 30 * MIB
    SESSIONS_MAX = 7
    DEPLETIONS = ('delete-oldest', 'volume-offline')

    _lock = threading.Lock()
    _sessions: ClassVar[dict[str, int]] = {}

    @staticmethod
    def enter(world: World, device_config: dict[str, str]) -> Array:
        """Log in to a group.

        :raises Failure: 160 to 162, 169 to 171, 173
        """
        arraysr.want(device_config, (
            ('target', 160), ('username', 161), ('password', 162),
        ))
        try:
            ipaddress.ip_address(device_config['target'])
        except ValueError:
            raise fault(173) from None
        array = world.array('equal', device_config['target'])
        if array is None or array.is_down:
            raise fault(171)
        if not arraysr.knows(array, device_config):
            raise fault(169)
        if list(array.facts.get('version', [4, 0])) < [4, 0]:
            raise fault(170)
        return array

    def check_new(self, array: Array, name: str) -> None:
        if name not in array.pools:
            raise fault(172)

    def describe_pools(self, array: Array) -> str:
        box = arraybox.Box(self.world, array)
        state = box.look()
        return elements('StoragePools', 'StoragePool', [
            {
                'name': name,
                'default': str(name == 'default').lower(),
                'members': facts.get('members', 1),
                'volumes': sum(
                    lun.pool == name and not lun.is_snapshot
                    for lun in state.luns.values()
                ),
                'capacity': box.size_bytes(name),
                'freespace': box.free_bytes(state, name),
            }
            for name, facts in array.pools.items()
        ])

    @contextlib.contextmanager
    def session(self) -> Iterator[arraybox.Box]:
        """Hold one of the few sessions of the array's command line."""
        array = self.login()
        limit = self.SESSIONS_MAX - int(array.facts.get('sessions_busy', 0))
        key = f'{self.world.directory}:{array.address}'
        with self._lock:
            busy = self._sessions.get(key, 0)
            if busy >= limit:
                raise fault(164)
            self._sessions[key] = busy + 1
        try:
            yield arraybox.Box(self.world, array)
        finally:
            with self._lock:
                self._sessions[key] -= 1

    def new_lun(
        self, state: arraybox.State, uuid: str, size_bytes: int,
        sm_config: dict[str, str],
    ) -> arraybox.Lun:
        reserve = sm_config.get('snap-reserve-percentage', '100')
        if not reserve.isdigit():
            raise fault(165)
        depletion = sm_config.get('snap-depletion', self.DEPLETIONS[0])
        if depletion not in self.DEPLETIONS:
            raise fault(166)
        return arraybox.Lun(
            uuid=uuid, sr_uuid=self.sr_uuid,
            pool=self.repository(state)['pool'], size_bytes=size_bytes,
            is_thick=self.is_thick(sm_config), reserve_percent=int(reserve),
            depletion=depletion, sm_config=dict(sm_config),
        )

    def check_copy(
        self, state: arraybox.State, lun: arraybox.Lun, is_snapshot: bool,
    ) -> None:
        if is_snapshot and lun.is_snapshot:
            raise fault(168)
        if is_snapshot and not lun.reserve_percent:
            raise fault(167)
        if lun.is_offline:
            raise fault(167)
