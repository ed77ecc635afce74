# SPDX-License-Identifier: Apache-2.0
"""How a host finds LUNs: iSCSI portals, host bus adapters, who uses what.

``LUN-per-VDI`` types, LVM over a LUN, and the probes of both look here.
"""

import dataclasses
import hashlib
from typing import TYPE_CHECKING

from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.world import Lun
from volume.sim.xapi.world import Target

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.world import World

DEFAULT_PORT = 3260
MAX_PORT = 65535

# What drives an adapter: `type` of `hba` is matched with it. A kind that
# stands in the guides (FC) matches too. [I]
DRIVERS = {
    'FC': ('qla2xxx', 'QLogic Fibre Channel HBA Driver'),
    'fcoe': ('fcoe', 'Open-FCoE.org'),
    'SAS': ('mptsas', 'Fusion MPT SAS Host driver'),
    'iSCSI': ('qla4xxx', 'QLogic iSCSI HBA Driver'),
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A host bus adapter, as sysfs shows it."""

    number: int
    kind: str

    @property
    def host(self) -> str:
        return f'host{self.number}'

    @property
    def driver(self) -> str:
        return DRIVERS.get(self.kind, (self.kind.lower(), ''))[0]

    @property
    def manufacturer(self) -> str:
        return DRIVERS.get(self.kind, ('', 'Unknown'))[1]

    def matches(self, wanted: str) -> bool:
        """Whether a device_config's ``type`` means this adapter."""
        return (
            wanted in ('', 'any')
            or wanted.lower() == self.kind.lower()
            or self.driver.startswith(wanted)
        )


def vdi_uuid(scsi_id: str) -> str:
    """Return the uuid of the VDI for a LUN: a hash, so always the same."""
    digest = hashlib.md5(scsi_id.encode(), usedforsecurity=False).hexdigest()
    return '-'.join((
        digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:],
    ))


# -- adapters --------------------------------------------------------------


def adapters(world: 'World', pool_uuid: str, kind: str) -> list[Adapter]:
    """Return the adapters that a host has: those with a LUN behind them."""
    kinds = sorted({
        lun.adapter for lun in world.luns(pool_uuid) if lun.adapter
    })
    return [
        adapter
        for number, name in enumerate(kinds)
        if (adapter := Adapter(number, name)).matches(kind)
    ]


def bus(
    world: 'World', pool_uuid: str, kind: str = 'any',
) -> list[tuple[Adapter, Lun]]:
    """Return every LUN on the bus: also those that other SRs use."""
    return [
        (adapter, lun)
        for adapter in adapters(world, pool_uuid, kind)
        for lun in world.luns(pool_uuid, adapter=adapter.kind)
    ]


def is_in_use(pool: 'Pool', scsi_id: str, but_sr: str = '') -> bool:
    """Whether an SR of this pool has the LUN, by its PBDs or sm_config."""
    for ref in pool.rows.all('SR'):
        sr = pool.rows.get('SR', ref)
        if sr['uuid'] == but_sr:
            continue
        if (
            sr['sm_config'].get('SCSIid') == scsi_id
            or f'scsi-{scsi_id}' in sr['sm_config']
        ):
            return True
        for pbd in pool.rows.find('PBD', SR=ref):
            config = pool.rows.field('PBD', pbd, 'device_config')
            if config.get('SCSIid') == scsi_id:
                return True
    return False


# -- iSCSI -----------------------------------------------------------------


def portal(device_config: dict[str, str]) -> tuple[str, int]:
    """Return address and port of a target.

    :raises Failure: 95 without an address, 142 with a port that is none
    """
    address = device_config.get('target', '').split(',')[0]
    if not address:
        raise fault(95)
    try:
        port = int(device_config.get('port') or DEFAULT_PORT)
    except ValueError:
        raise fault(142) from None
    if not 1 <= port <= MAX_PORT:
        raise fault(142)
    return address, port


def initiator(pool: 'Pool', host_ref: str) -> str:
    """Return the IQN of a host.

    :raises Failure: 97 when the host has none
    """
    host = pool.rows.get('host', host_ref)
    iqn = host.get('iscsi_iqn') or host['other_config'].get('iscsi_iqn', '')
    if not iqn:
        raise fault(97)
    return str(iqn)


def discover(world: 'World', device_config: dict[str, str]) -> list[Target]:
    """Ask a portal for its targets.

    :raises Failure: 141 when nobody answers there
    """
    address, port = portal(device_config)
    found = [
        target for target in world.targets(address)
        if target.port == port and not target.is_down
    ]
    if not found:
        raise fault(141)
    return found


def login(world: 'World', device_config: dict[str, str]) -> list[Target]:
    """Log in to the wanted target, or to all of them (``*``).

    :raises Failure: 83 for a name that the portal does not know, 68 for
        wrong credentials
    """
    wanted = device_config.get('targetIQN', '')
    found = [
        target for target in discover(world, device_config)
        if wanted in ('*', target.iqn)
    ]
    if not found:
        raise fault(83, 'check target settings')
    for target in found:
        _authenticate(target, device_config)
    return found


def behind(
    world: 'World', pool_uuid: str, targets: list[Target],
) -> list[Lun]:
    """Return the LUNs of targets, in the order of their numbers."""
    names = {target.iqn for target in targets}
    return sorted(
        (lun for lun in world.luns(pool_uuid) if lun.iqn in names),
        key=lambda lun: (lun.lun_id, lun.scsi_id),
    )


def visible(
    pool: 'Pool', host_ref: str, kind: str, device_config: dict[str, str],
) -> list[Lun]:
    """Return the LUNs that an LVM type on a LUN can reach on a host.

    :raises Failure: what the login says
    """
    if kind == 'lvmoiscsi':
        initiator(pool, host_ref)
        return behind(
            pool.world, pool.uuid, login(pool.world, device_config)
        )
    wanted = 'fcoe' if kind == 'lvmofcoe' else 'any'
    return [lun for _, lun in bus(pool.world, pool.uuid, wanted)]


def named(luns: list[Lun], scsi_id: str) -> Lun:
    """Return the LUN of a SCSIid.

    :raises Failure: 19 when it is not among them
    """
    for lun in luns:
        if lun.scsi_id == scsi_id:
            return lun
    raise fault(19, f'no LUN with SCSIid {scsi_id} is seen by this host')


def _authenticate(target: Target, device_config: dict[str, str]) -> None:
    """Check CHAP in both directions, where the target wants it."""
    wanted = (
        ('chapuser', target.chap_user),
        ('chappassword', target.chap_password),
        ('incoming_chapuser', target.incoming_user),
        ('incoming_chappassword', target.incoming_password),
    )
    if any(
        value and device_config.get(key, '') != value
        for key, value in wanted
    ):
        raise fault(68, 'code is 24')
