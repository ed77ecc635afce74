# SPDX-License-Identifier: Apache-2.0
"""The part of a storage that lets hosts in: ``grant`` and ``revoke``.

What they do stands in ``hosts``; here is what a storage must know for it:
where the VDI is, and who can let go of it so that another pool may have it.
"""

from __future__ import annotations

from volume import errors
from volume import model
from volume.drivers.xensm import hosts
from volume.drivers.xensm import vdis
from volume.drivers.xensm.peers import Peers
from volume.drivers.xensm.storage import Storage
from volume.drivers.xensm.vdis import Vdi
from volume.xenapi import srs


class Access(Storage):
    """Lets hosts of its own pool in, and of others if it can lend."""

    _peers: Peers | None = None

    def grant(
        self, volume: model.Volume, host: model.Host, access: model.Access
    ) -> model.Connection:
        vdi = self.need(volume)
        with self.locked(vdi.uuid):
            if vdis.FRESH in vdi.keys:
                # The host will write, and may be gone when it is filled.
                vdis.drop(self.link, vdi.ref, [vdis.FRESH])
            return hosts.grant(
                self.place(volume, vdi), self.peers(), host, access
            )

    def revoke(self, volume: model.Volume, host: model.Host) -> None:
        vdi = self.find(volume)
        if vdi is None:
            return
        with self.locked(vdi.uuid):
            hosts.revoke(self.place(volume, vdi), self.peers(), host)

    def peers(self) -> Peers:
        """Return the pools that something may be lent to."""
        if self._peers is None:
            self._peers = Peers(self.settings.peers, self.node)
        return self._peers

    def place(self, volume: model.Volume, vdi: Vdi) -> hosts.Place:
        """Return where a volume lies, and who can lend it."""
        return hosts.Place(
            self.link, self.sr(), vdi, volume.id, self.lender(vdi),
            self.why_not(),
        )

    def lender(self, vdi: Vdi) -> hosts.Lender | None:
        """Return who can lend it to another pool; here nobody."""
        return None

    def why_not(self) -> str:
        """Say why there is no lender."""
        return (
            f'SR {self.sr_uuid} has other volumes too, and an SR is used by '
            'one pool at a time; attach it in its own pool, or use a backend '
            'with sr_per_volume'
        )

    def need_home(self, volume: model.Volume) -> Vdi | None:
        """Return the VDI of a volume, if there is one.

        :raises Busy: another pool has it
        """
        found = self.find(volume)
        if found is not None:
            hosts.need_home(found, volume.id)
        return found

    def config_of_pbd(self) -> dict[str, str]:
        """Return the SR's keys as its hosts have them, secrets in clear.

        :raises Denied: the user may not read the pool's secrets
        """
        if self.settings.device_config:
            return dict(self.settings.device_config)
        there = srs.pbds(self.link, self.sr())
        if there:
            found = dict(there[0].device_config)
        else:
            raise errors.Unavailable(
                f'no host has a PBD of SR {self.sr_uuid}: give sr_type and '
                'device_config'
            )
        found.pop('SRmaster', None)
        for key in [k for k in found if k.endswith('_secret')]:
            uuid = found.pop(key)
            found[key.removesuffix('_secret')] = str(self.link.call(
                'secret.get_value',
                self.link.call('secret.get_by_uuid', uuid),
            ))
        return found
