# SPDX-License-Identifier: Apache-2.0
"""VMs as far as disks are concerned: where they run, what they have open."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import NULL
from volume.sim.xapi.objects import devices
from volume.sim.xapi.objects import vbds
from volume.sim.xapi.objects.guests import guests

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

def assert_state(pool: Pool, vm: str, *expected: str) -> dict[str, Any]:
    """Return a VM's row if it is in one of these states.

    :raises Failure: VM_BAD_POWER_STATE, VM_IS_TEMPLATE
    """
    row = pool.rows.get('VM', vm)
    if row['is_a_template']:
        raise Failure('VM_IS_TEMPLATE', vm)
    if row['is_control_domain']:
        raise Failure('OPERATION_NOT_ALLOWED', 'This is a control domain')
    if row['power_state'] not in expected:
        raise Failure(
            'VM_BAD_POWER_STATE', vm,
            ', '.join(sorted(state.lower() for state in expected)),
            row['power_state'].lower(),
        )
    return row


def host_for(pool: Pool, vm: str) -> str:
    """Return a host that sees all of a VM's disks.

    :raises Failure: NO_HOSTS_AVAILABLE
    """
    row = pool.rows.get('VM', vm)
    needed = {
        pool.rows.field('VDI', pool.rows.field('VBD', vbd, 'VDI'), 'SR')
        for vbd in row['VBDs'] if not pool.rows.field('VBD', vbd, 'empty')
    }
    hosts = sorted(
        pool.rows.all('host'),
        key=lambda host: (host != row['affinity'], host != pool.master),
    )
    for host in hosts:
        if pool.is_up(host) and all(
            sees(pool, host, sr) for sr in needed
        ):
            return host
    raise Failure('NO_HOSTS_AVAILABLE')


def sees(pool: Pool, host: str, sr: str) -> bool:
    """Say if an SR is plugged on a host."""
    return any(
        pool.rows.field('PBD', pbd, 'currently_attached')
        for pbd in pool.rows.find('PBD', SR=sr, host=host)
    )


def start(pool: Pool, vm: str, host: str, state: str = 'Running') -> None:
    """Start a VM: all of its disks are opened, or none."""
    rows = pool.rows
    behaviour = guests(pool).behaviour(rows.field('VM', vm, 'uuid'))
    opened = []
    try:
        for vbd in rows.find('VBD', VM=vm):
            if rows.field('VBD', vbd, 'empty'):
                continue
            vbds.assert_valid(pool, vbd, 'attach')
            attach(pool, vbd, host)
            opened.append(vbd)
    except BaseException:
        for vbd in opened:
            detach(pool, vbd)
        raise
    metrics = rows.new(
        'VM_guest_metrics', live=True,
        PV_drivers_detected=behaviour.has_pv_drivers,
        PV_drivers_up_to_date=behaviour.has_pv_drivers,
        can_use_hotplug_vbd=behaviour.hotplug,
    )
    rows.update(
        'VM', vm, power_state=state, resident_on=host,
        domid=1 + max(rows.field('VM', each, 'domid')
                      for each in rows.all('VM')),
        guest_metrics=metrics,
    )
    set_allowed(pool, vm)


def halt(pool: Pool, vm: str) -> None:
    """Stop a VM; its disks are closed."""
    rows = pool.rows
    row = rows.get('VM', vm)
    for vbd in row['VBDs']:
        if rows.field('VBD', vbd, 'currently_attached'):
            detach(pool, vbd)
    rows.update(
        'VM', vm, power_state='Halted', resident_on=NULL, domid=-1,
        guest_metrics=NULL,
    )
    if row['guest_metrics'] != NULL:
        rows.delete('VM_guest_metrics', row['guest_metrics'])
    set_allowed(pool, vm)


def attach(pool: Pool, vbd: str, host: str) -> None:
    """Open a VBD's disk on a host.

    :raises Failure: the SR is not plugged there
    """
    rows = pool.rows
    row = rows.get('VBD', vbd)
    disk = rows.get('VDI', row['VDI'])
    sr = disk['SR']
    if not any(
        rows.field('PBD', pbd, 'currently_attached')
        for pbd in rows.find('PBD', SR=sr)
    ):
        raise Failure('SR_HAS_NO_PBDS', sr)
    if not sees(pool, host, sr):
        raise Failure('SR_NOT_ATTACHED', sr)
    name = devices.name(row['userdevice'])
    if rows.field('VM', row['VM'], 'is_control_domain'):
        name = f'sm/backend/{rows.field("SR", sr, "uuid")}/{disk["uuid"]}'
    guests(pool).attach(vbd)
    rows.update('VBD', vbd, currently_attached=True, device=name)


def detach(pool: Pool, vbd: str) -> None:
    """Close a VBD's disk."""
    guests(pool).detach(vbd)
    pool.rows.update('VBD', vbd, currently_attached=False)


def set_allowed(pool: Pool, vm: str) -> None:
    """Write down what may be done to a VM; that changes for its disks."""
    rows = pool.rows
    row = rows.get('VM', vm)
    allowed = {
        'Halted': ['start', 'start_on', 'destroy'],
        'Running': [
            'clean_shutdown', 'hard_shutdown', 'clean_reboot', 'hard_reboot',
            'pause',
        ],
        'Paused': ['unpause', 'hard_shutdown'],
    }.get(row['power_state'], [])
    if row['is_control_domain'] or row['is_a_template']:
        allowed = []
    rows.update('VM', vm, allowed_operations=allowed)
    for vbd in row['VBDs']:
        rows.touch('VBD', vbd)
