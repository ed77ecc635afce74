# SPDX-License-Identifier: Apache-2.0
"""Targets in the guest that were made by hand, and what leads to them."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests import lab
from tests.lab import case
from volume import ids
from volume import model

SCRIPT = '/run/targets.sh'
SIZE_BYTES = 64 * model.MIB
PASSWORD = 'by-hand-0123456789'


@dataclasses.dataclass(frozen=True)
class Target:
    """One export of a volume; ``connection`` is what its host is given."""

    volume_id: str
    attachment_id: str
    name: str
    device: str
    connection: model.Connection


class Targets:
    """Makes targets, and removes them all in the end."""

    def __init__(self, guest: lab.Guest) -> None:
        self.guest = guest
        guest.run(
            'tee', SCRIPT,
            input_bytes=(case.HERE / 'guest' / 'targets.sh').read_bytes(),
        )

    def close(self) -> None:
        self._do('end')

    def disk(self, volume_id: str, size_bytes: int = SIZE_BYTES) -> str:
        """Return the device that holds a volume; it may grow."""
        return self._do('disk', volume_id, str(size_bytes)).strip()

    def iscsi(
        self,
        initiator: str,
        portals: tuple[str, ...] = case.PORTALS[:1],
        *,
        volume_id: str = '',
        serial: str = '',
    ) -> Target:
        """Return a new target of a volume, of a new one if none is named."""
        volume_id, attachment_id = volume_id or ids.new(), ids.new()
        name = f'iqn.2010-10.org.openstack:volume-{volume_id}.{attachment_id}'
        device = self.disk(volume_id)
        self._do(
            'iscsi', volume_id, device, serial or volume_id, name,
            initiator, PASSWORD, *portals,
        )
        at = [f'{portal}:3260' for portal in portals]
        fields: dict[str, Any] = {
            'target_discovered': False, 'target_portal': at[0],
            'target_iqn': name, 'target_lun': 0, 'target_portals': at,
            'target_iqns': [name] * len(at), 'target_luns': [0] * len(at),
            'volume_id': volume_id, 'access_mode': 'rw',
        }
        return Target(
            volume_id, attachment_id, name, device,
            model.Connection('iscsi', fields, credentials={
                'auth_method': 'CHAP', 'auth_username': 'user',
                'auth_password': PASSWORD,
            }),
        )

    def nvme(
        self,
        host_nqn: str,
        portals: tuple[str, ...] = case.PORTALS[:1],
        *,
        uuid: str = '',
    ) -> Target:
        """Return a new subsystem of a new volume."""
        volume_id, attachment_id = ids.new(), ids.new()
        name = f'nqn.2010-10.org.openstack:volume-{volume_id}.{attachment_id}'
        device = self.disk(volume_id)
        self._do('nvme', device, uuid or volume_id, name, host_nqn, *portals)
        return Target(
            volume_id, attachment_id, name, device,
            model.Connection('nvmeof', {
                'target_nqn': name, 'volume_id': volume_id,
                'portals': [[portal, '4420', 'tcp'] for portal in portals],
            }),
        )

    def end(self, target: Target) -> None:
        """Remove a target, as a service does that forbids it."""
        self._do(
            'nvme-end' if target.name.startswith('nqn') else 'iscsi-end',
            target.name,
        )

    def _do(self, *argv: str) -> str:
        return self.guest.run('bash', SCRIPT, *argv)
