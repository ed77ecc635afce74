# SPDX-License-Identifier: Apache-2.0
"""``netapp``: LUNs in FlexVols of an aggregate; modelled on its guide."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm import arraybox
from volume.sim.xapi.sm import arraysr
from volume.sim.xapi.sm.arraysr import ArraySr
from volume.sim.xapi.sm.arraysr import elements
from volume.sim.xapi.world import Array

if TYPE_CHECKING:
    from volume.sim.xapi.world import World


class NetappSr(ArraySr):
    """``netapp``: FlexVols of an aggregate, LUNs in FlexVols."""

    pool_key = 'aggregate'
    pool_missing = 123
    FLEXVOLS = 8
    FLEXVOLS_MAX = 32
    LUNS_MAX = 200
    SNAPSHOTS_MAX = 255

    @staticmethod
    def enter(world: World, device_config: dict[str, str]) -> Array:
        """Log in to a filer.

        :raises Failure: 120 to 126 and 130 to 132
        """
        arraysr.want(device_config, (
            ('target', 120), ('username', 121), ('password', 122),
        ))
        array = world.array('netapp', device_config['target'])
        if array is None or array.is_down:
            raise fault(124)
        if not arraysr.knows(array, device_config):
            raise fault(125)
        facts = array.facts
        if not facts.get('privileged', True):
            raise fault(126)
        if list(facts.get('version', [7, 0])) < [7, 0]:
            raise fault(130)
        if not facts.get('iscsi', True):
            raise fault(132)
        if not facts.get('iqn', 'iqn.1992-08.com.netapp:sn.1'):
            raise fault(131)
        return array

    def check_new(self, array: Array, name: str) -> None:
        if name not in array.pools:
            raise fault(123, f'no aggregate {name}',
                        self.describe_pools(array))
        count = self._flexvols
        box = arraybox.Box(self.world, array)
        taken = sum(
            repository['flexvols']
            for repository in box.look().repositories.values()
        )
        if taken + count > int(array.facts.get('flexvols_max', 200)):
            raise fault(127)
        if self.device_config.get('asis') == 'true':
            if not array.facts.get('asis_licence', True) or (
                self.device_config.get('allocation') != 'thin'
            ):
                raise fault(133)
            if not array.pools[name].get('asis_dedup', True):
                raise fault(134)

    def facts(self) -> dict[str, Any]:
        return {
            'flexvols': self._flexvols,
            'names': [
                f'XenStorage_{self.sr_uuid}_FV{number}'
                for number in range(self._flexvols)
            ],
        }

    def describe_pools(self, array: Array) -> str:
        return elements('Aggrlist', 'Aggr', [
            {
                'Name': name,
                'size': facts['size'],
                'disks': facts.get('disks', 4),
                'raidtype': facts.get('raidtype', 'raid_dp'),
                'asis_dedup': str(facts.get('asis_dedup', True)).lower(),
            }
            for name, facts in array.pools.items()
        ])

    def new_lun(
        self, state: arraybox.State, uuid: str, size_bytes: int,
        sm_config: dict[str, str],
    ) -> arraybox.Lun:
        repository = self.repository(state)
        return arraybox.Lun(
            uuid=uuid, sr_uuid=self.sr_uuid, pool=repository['pool'],
            size_bytes=size_bytes, is_thick=self.is_thick(sm_config),
            container=self._flexvol(state, sm_config.get('vmhint', '')),
            sm_config=dict(sm_config),
        )

    def check_copy(
        self, state: arraybox.State, lun: arraybox.Lun, is_snapshot: bool,
    ) -> None:
        """Refuse what needs one more snapshot of a full FlexVol.

        A clone is a LUN on a snapshot of its FlexVol as well.
        """
        beside = [
            one for one in state.of(self.sr_uuid)
            if one.container == lun.container
        ]
        facts = self.box().array.facts
        limit = int(facts.get('snapshots_max', self.SNAPSHOTS_MAX))
        if sum(one.is_snapshot for one in beside) >= limit:
            raise fault(128)
        if len(beside) >= int(facts.get('luns_max', self.LUNS_MAX)):
            raise fault(128)
        if self.room(self.box(), state, lun.pool) <= 0:
            raise fault(129)

    def assert_free(self, uuid: str) -> None:
        if self.world.owner(f'array/{uuid}') not in ('', self.pool.uuid):
            raise fault(135)

    @property
    def _flexvols(self) -> int:
        text = self.device_config.get('FlexVols') or str(self.FLEXVOLS)
        if not text.isdigit() or not 1 <= int(text) <= self.FLEXVOLS_MAX:
            raise fault(
                1, f'FlexVols must be between 1 and {self.FLEXVOLS_MAX}'
            )
        return int(text)

    def _flexvol(self, state: arraybox.State, hint: str) -> int:
        """Choose a FlexVol: by number, beside its VM, or the emptiest."""
        count = int(self.repository(state)['flexvols'])
        luns = state.of(self.sr_uuid)
        held = [0] * count
        for lun in luns:
            held[lun.container] += 1
        limit = int(self.box().array.facts.get('luns_max', self.LUNS_MAX))
        wanted = [int(hint)] if hint.isdigit() and int(hint) < count else [
            lun.container for lun in luns
            if hint and lun.sm_config.get('vmhint') == hint
        ]
        for number in wanted[:1] + sorted(range(count), key=held.__getitem__):
            if held[number] < limit:
                return number
        raise fault(44)
