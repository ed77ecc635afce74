# SPDX-License-Identifier: Apache-2.0
"""``hba``, ``iscsi`` and ``rawhba``: one LUN is one VDI.

Nothing is ever allocated. A scan introduces what the host sees; VDI.create
of ``hba`` claims the smallest LUN that is free and large enough; VDI.destroy
gives it back with its data in it, and the next scan brings it again, under
the same uuid, for that is a hash of the LUN's SCSIid.

What was claimed stands nowhere but in the pool's database: these managers
are the only ones that look into rows.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.raw_disk import Raw
from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm import fabric
from volume.sim.xapi.sm import owned
from volume.sim.xapi.sm import probes
from volume.sim.xapi.sm.base import Info
from volume.sim.xapi.sm.base import Manager
from volume.sim.xapi.sm.base import Sizes
from volume.sim.xapi.world import Lun


class LunSr(Manager):
    """What the three types share."""

    family = 'lun'

    # -- the repository ---------------------------------------------------

    def delete(self) -> None:
        """Remove nothing: the LUNs are not ours."""

    def attach(self, host_ref: str) -> None:
        self.assert_online()
        self.attached.add(host_ref)

    def detach(self, host_ref: str) -> None:
        self.attached.discard(host_ref)

    def scan(self) -> list[Info]:
        self.assert_online()
        return [self._info(lun) for lun in self.luns()]

    def sizes(self) -> Sizes:
        """Return the sizes as these drivers count them.

        What is claimed is added to the size of all: a double count, so
        that nothing is ever free.
        """
        luns = self.luns()
        size = sum(lun.size_bytes for lun in luns)
        taken = size + sum(
            lun.size_bytes for lun in luns if self._is_managed(lun)
        )
        return Sizes(size, taken, taken)

    # -- its disks --------------------------------------------------------

    def make(
        self, uuid: str, size_bytes: int, sm_config: dict[str, str],
        name: str = '',
    ) -> Info:
        """Claim the smallest LUN that fits and that nobody has claimed."""
        self.assert_online()
        seen = {fabric.vdi_uuid(lun.scsi_id): lun for lun in self.luns()}
        free = [
            seen[row['uuid']] for row in self._rows()
            if not row['managed'] and row['uuid'] in seen
            and row['virtual_size'] >= size_bytes
        ]
        if not free:
            raise fault(44)
        info = self._info(min(free, key=lambda lun: lun.size_bytes))
        info.managed = True
        return info

    def remove(self, uuid: str) -> None:
        """Give a LUN back; the bytes stay in it."""
        ref = self._ref(uuid)
        if ref:
            self.pool.rows.update('VDI', ref, managed=False)

    def introduce(
        self, uuid: str, location: str, sm_config: dict[str, str],
    ) -> Info:
        raise fault(46)

    def inspect(self, uuid: str) -> Info | None:
        lun = self._lun(uuid)
        return None if lun is None else self._info(lun)

    def open_disk(self, uuid: str, writable: bool) -> Disk:
        lun = self._lun(uuid)
        if lun is None:
            raise fault(46)
        disk = Raw().open(
            str(self.world.lun_file(lun.scsi_id)), writable
        )
        if not writable:
            return disk
        return owned.Disk(
            disk, self.world, f'luns/{lun.scsi_id}', self.pool.uuid
        )

    # -- what the types differ in -----------------------------------------

    @abc.abstractmethod
    def luns(self) -> list[Lun]:
        """Return the LUNs that this repository is made of."""

    def is_born_managed(self) -> bool:
        """Whether a scan takes a new LUN for one that is in use."""
        return False

    # -- smaller parts ----------------------------------------------------

    def _lun(self, uuid: str) -> Lun | None:
        return next((
            lun for lun in self.luns()
            if fabric.vdi_uuid(lun.scsi_id) == uuid
        ), None)

    def _info(self, lun: Lun) -> Info:
        uuid = fabric.vdi_uuid(lun.scsi_id)
        return Info(
            uuid=uuid,
            location=uuid,
            size_bytes=lun.size_bytes,
            used_bytes=lun.size_bytes,
            sm_config=self._sm_config(lun),
            managed=self._is_managed(lun),
        )

    def _sm_config(self, lun: Lun) -> dict[str, str]:
        return {
            'LUNid': str(lun.lun_id),
            'SCSIid': lun.scsi_id,
            'backend-kind': 'vbd',
        }

    def _is_managed(self, lun: Lun) -> bool:
        row = self._row(fabric.vdi_uuid(lun.scsi_id))
        return self.is_born_managed() if row is None else row['managed']

    def _sr_ref(self) -> str:
        return self.pool.rows.by_uuid('SR', self.sr_uuid)

    def _rows(self) -> list[dict[str, Any]]:
        """Return the VDIs of this SR."""
        return [
            self.pool.rows.get('VDI', ref)
            for ref in self.pool.rows.find('VDI', SR=self._sr_ref())
        ]

    def _row(self, uuid: str) -> dict[str, Any] | None:
        ref = self._ref(uuid)
        return self.pool.rows.get('VDI', ref) if ref else None

    def _ref(self, uuid: str) -> str:
        """Return the reference of a VDI of this SR, or ''."""
        found = self.pool.rows.find('VDI', uuid=uuid, SR=self._sr_ref())
        return found[0] if found else ''


class HbaSr(LunSr):
    """``hba``: every LUN on the bus, of all adapters or of one kind."""

    @property
    def bus_kind(self) -> str:
        return self.device_config.get('type') or 'any'

    def create(self) -> None:
        """Claim the bus: one SR for each kind of adapter in a pool."""
        self._assert_alone()
        if not fabric.adapters(self.world, self.pool.uuid, self.bus_kind):
            raise fault(
                19, f'No such HBA Device detected [{self.bus_kind}]'
            )
        self._write_sm_config()

    def scan(self) -> list[Info]:
        if not fabric.adapters(self.world, self.pool.uuid, self.bus_kind):
            raise fault(47)
        return super().scan()

    def luns(self) -> list[Lun]:
        return unique(
            lun for _, lun in fabric.bus(
                self.world, self.pool.uuid, self.bus_kind)
        )

    def _assert_alone(self) -> None:
        for ref in self.pool.rows.all('SR'):
            sr = self.pool.rows.get('SR', ref)
            if (
                sr['uuid'] != self.sr_uuid
                and sr['sm_config'].get('datatype') == 'HBA'
                and sr['sm_config'].get('hbatype') == self.bus_kind
            ):
                raise fault(16)

    def _write_sm_config(self) -> None:
        self.sm_config.update(
            disktype='Raw', datatype='HBA', hbatype=self.bus_kind,
            multipathable='true',
        )


class RawHbaSr(HbaSr):
    """``rawhba``: as ``hba``, but a LUN is taken by seeing it.

    A scan reserves each LUN that no other SR has, by a key of sm_config, and
    gives each VDI the SCSIid for its name, also one that a client named.
    """

    def create(self) -> None:
        self._assert_alone()
        self._write_sm_config()

    def scan(self) -> list[Info]:
        """Return the LUNs; those that are gone stay in the list."""
        self.assert_online()
        luns = self.luns()
        rows = self.pool.rows
        ref = self._sr_ref()
        sm_config = dict(rows.field('SR', ref, 'sm_config'))
        sm_config.update({
            f'scsi-{lun.scsi_id}': fabric.vdi_uuid(lun.scsi_id)
            for lun in luns
        })
        rows.update('SR', ref, sm_config=sm_config)
        self.sm_config.update(sm_config)
        found = [self._info(lun) for lun in luns]
        for info in found:
            info.name = info.sm_config['SCSIid']
            if vdi := self._ref(info.uuid):
                rows.update('VDI', vdi, name_label=info.name)
        seen = {info.uuid for info in found}
        return found + [
            Info(
                uuid=row['uuid'], location=row['location'],
                size_bytes=row['virtual_size'],
                used_bytes=row['physical_utilisation'],
                sm_config=row['sm_config'], managed=row['managed'],
                name=row['name_label'],
            )
            for row in self._rows() if row['uuid'] not in seen
        ]

    def sizes(self) -> Sizes:
        """Return as used what is attached."""
        luns = self.luns()
        used = sum(
            lun.size_bytes for lun in luns if self._is_attached(lun)
        )
        return Sizes(sum(lun.size_bytes for lun in luns), used, used)

    def remove(self, uuid: str) -> None:
        """Let go of a LUN: other SRs may have it now."""
        row = self._row(uuid)
        if row is None:
            return
        ref = self._sr_ref()
        sm_config = dict(self.pool.rows.field('SR', ref, 'sm_config'))
        key = f'scsi-{row["sm_config"].get("SCSIid", "")}'
        sm_config.pop(key, None)
        self.sm_config.pop(key, None)
        self.pool.rows.update('SR', ref, sm_config=sm_config)

    def luns(self) -> list[Lun]:
        return [
            lun for lun in super().luns()
            if not fabric.is_in_use(self.pool, lun.scsi_id, self.sr_uuid)
        ]

    def is_born_managed(self) -> bool:
        return True

    def _sm_config(self, lun: Lun) -> dict[str, str]:
        return {'LUNid': str(lun.lun_id), 'SCSIid': lun.scsi_id}

    def _is_attached(self, lun: Lun) -> bool:
        vdi = self._ref(fabric.vdi_uuid(lun.scsi_id))
        return vdi != '' and any(
            self.pool.rows.field('VBD', vbd, 'currently_attached')
            for vbd in self.pool.rows.find('VBD', VDI=vdi)
        )


class IscsiSr(LunSr):
    """``iscsi``: the LUNs of one target."""

    def create(self) -> None:
        self._check()
        for ref in self.pool.rows.all('SR'):
            sr = self.pool.rows.get('SR', ref)
            if (
                sr['uuid'] != self.sr_uuid
                and sr['sm_config'].get('targetIQN') == self._iqn
            ):
                raise fault(16)
        fabric.login(self.world, self.device_config)
        self.sm_config.update(
            disktype='Raw', datatype='ISCSI',
            target=self.device_config['target'].split(',')[0],
            targetIQN=self._iqn, multipathable='true', LUNperVDI='true',
        )

    def attach(self, host_ref: str) -> None:
        """Log in on a host."""
        self.assert_online()
        self._check()
        fabric.login(self.world, self.device_config)
        self.attached.add(host_ref)

    def introduce(
        self, uuid: str, location: str, sm_config: dict[str, str],
    ) -> Info:
        """Find a LUN by its number on the target."""
        self.assert_online()
        try:
            number = int(sm_config['LUNid'])
        except (KeyError, ValueError):
            raise fault(46) from None
        for lun in self.luns():
            if lun.lun_id == number:
                info = self._info(lun)
                info.managed = True
                return info
        raise fault(46)

    def luns(self) -> list[Lun]:
        return fabric.behind(
            self.world, self.pool.uuid,
            fabric.login(self.world, self.device_config),
        )

    def is_born_managed(self) -> bool:
        return not self.pool.switch('iscsi_claims')

    @property
    def _iqn(self) -> str:
        return self.device_config['targetIQN']

    def _check(self) -> None:
        probes.check(
            self.pool, self.kind, self.host_ref, self.device_config
        )


def unique(luns: Iterable[Lun]) -> list[Lun]:
    """Return LUNs in order, each once, whatever paths lead to it."""
    return list({lun.scsi_id: lun for lun in luns}.values())


MANAGERS: dict[str, type[LunSr]] = {
    'hba': HbaSr,
    'rawhba': RawHbaSr,
    'iscsi': IscsiSr,
}
