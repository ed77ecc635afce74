# SPDX-License-Identifier: Apache-2.0
"""Whether something may be done to a VBD now, and with which error not.

The order of the checks is the server's: of several reasons it names the one
that it meets first.
"""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

from volume.sim.xapi import registry
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import NULL

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

OPERATIONS = (
    'attach', 'eject', 'unplug', 'unplug_force', 'insert', 'plug', 'pause',
    'unpause',
)
PLUGS = ('plug', 'unplug', 'unplug_force')
USES = ('attach', 'plug', 'insert')
OF_VM = (
    'power_state', 'current_operations', 'domain_type', 'HVM_boot_policy',
    'guest_metrics',
)
ENDING = frozenset({'clean_shutdown', 'hard_shutdown', 'suspend', 'pause'})

Refusals = dict[str, Failure]


def assert_valid(
    pool: Pool, vbd: str, operation: str, own: str = ''
) -> None:
    """Refuse an operation with the server's reason.

    ``own`` is the mark of who asks, who is not in the own way.

    :raises Failure: why not
    """
    refused = refusals(pool, vbd, own).get(operation)
    if refused is not None:
        raise refused


def refusals(pool: Pool, vbd: str, own: str = '') -> Refusals:
    """Return what is refused, and why."""
    rows = pool.rows
    row = rows.get('VBD', vbd)
    row['current_operations'].pop(own, None)
    vm = rows.get('VM', row['VM'])
    found: Refusals = {}
    _by_state(found, vbd, row, row['VM'], vm)
    _by_guest(found, pool, row, row['VM'], vm)
    if not row['empty']:
        _by_disk(found, pool, vbd, row, vm)
    return found


def is_hvm(vm: dict[str, Any]) -> bool:
    """Say if a VM's disks are plugged by drivers that it may not have."""
    if vm['domain_type'] == 'unspecified':
        return bool(vm['HVM_boot_policy'])
    return bool(vm['domain_type'] == 'hvm')


@registry.computed('VBD', 'allowed_operations')
def allowed(pool: Pool, vbd: str, stored: dict[str, Any]) -> list[str]:
    """Return what is allowed now, but for who else uses the disk."""
    if pool.operations.current('VBD', vbd):
        return []
    rows = pool.rows
    row = {**stored, 'current_operations': {}}
    vm = {
        name: rows.field('VM', row['VM'], name) for name in OF_VM
    } if rows.exists('VM', row['VM']) else {}
    found: Refusals = {}
    if vm:
        _by_state(found, vbd, row, row['VM'], vm)
        _by_guest(found, pool, row, row['VM'], vm)
    return [op for op in OPERATIONS if op not in found]


def _refuse(found: Refusals, operations: Any, code: str, *params: str) -> None:
    for operation in operations:
        found.setdefault(operation, Failure(code, *params))


def _by_state(
    found: Refusals, vbd: str, row: dict[str, Any], vm_ref: str,
    vm: dict[str, Any],
) -> None:
    running = sorted({*row['current_operations'].values()})
    if running:
        _refuse(found, OPERATIONS, 'OTHER_OPERATION_IN_PROGRESS', 'VBD', vbd,
                running[0], next(iter(row['current_operations'])))
    if not row['unpluggable']:
        _refuse(found, ('unplug', 'unplug_force'), 'VBD_NOT_UNPLUGGABLE', vbd)
    if row['type'] != 'CD':
        _refuse(found, ('insert', 'eject'), 'VBD_NOT_REMOVABLE_MEDIA', vbd)
    if row['empty']:
        _refuse(found, ('eject',), 'VBD_IS_EMPTY', vbd)
    else:
        _refuse(found, ('insert',), 'VBD_NOT_EMPTY', vbd)
    state = vm['power_state']
    if state == 'Running':
        if row['currently_attached']:
            _refuse(found, ('plug',), 'DEVICE_ALREADY_ATTACHED', vbd)
        else:
            _refuse(found, ('unplug', 'unplug_force'),
                    'DEVICE_ALREADY_DETACHED', vbd)
    else:
        bad = PLUGS if state == 'Paused' else (*PLUGS, 'pause', 'unpause')
        _refuse(found, bad, 'VM_BAD_POWER_STATE', vm_ref, 'running',
                state.lower())
    for operation in vm['current_operations'].values():
        if operation in ENDING:
            _refuse(
                found, ('plug', 'unplug'), 'OPERATION_NOT_ALLOWED',
                f'Current operation on VM:{vm_ref} is {operation}',
            )


def _by_guest(
    found: Refusals, pool: Pool, row: dict[str, Any], vm_ref: str,
    vm: dict[str, Any],
) -> None:
    if vm['power_state'] != 'Running' or not is_hvm(vm):
        return
    metrics = vm['guest_metrics']
    known = pool.rows.get('VM_guest_metrics', metrics) if (
        metrics != NULL) else {}
    hotplug = known.get('can_use_hotplug_vbd', 'unspecified')
    if hotplug == 'no':
        _refuse(found, PLUGS, 'OPERATION_NOT_ALLOWED',
                'VM states it does not support VBD hotplug.')
    elif hotplug == 'unspecified' and not known.get('PV_drivers_detected'):
        _refuse(found, PLUGS, 'VM_MISSING_PV_DRIVERS', vm_ref)
    if row['type'] == 'CD':
        _refuse(
            found, PLUGS, 'OPERATION_NOT_ALLOWED',
            'HVM CDROMs cannot be hotplugged/unplugged, only inserted or '
            'ejected',
        )


def _by_disk(
    found: Refusals, pool: Pool, vbd: str, row: dict[str, Any],
    vm: dict[str, Any],
) -> None:
    disk = pool.rows.get('VDI', row['VDI'])
    if not disk['managed']:
        _refuse(found, OPERATIONS, 'VDI_NOT_MANAGED', vbd)
    for task, operation in disk['current_operations'].items():
        if operation not in ('copy', 'mirror'):
            _refuse(found, USES, 'OTHER_OPERATION_IN_PROGRESS', 'VDI',
                    row['VDI'], operation, task)
    if row['currently_attached']:
        return
    needs_write = row['mode'] == 'RW'
    if not disk['sharable'] and not vm['is_control_domain']:
        modes = _others(pool, vbd, row['VDI'])
        if 'RW' in modes or (needs_write and modes):
            _refuse(found, USES, 'VDI_IN_USE', row['VDI'])
    if needs_write and disk['read_only']:
        _refuse(found, USES, 'VDI_READONLY', row['VDI'])
    if (
        row['type'] == 'Disk' and not needs_write and is_hvm(vm)
        and not vm['is_control_domain']
    ):
        _refuse(
            found, USES, 'DISK_VBD_MUST_BE_READWRITE_FOR_HVM', vbd)


def _others(pool: Pool, vbd: str, vdi: str) -> set[str]:
    """Return how a disk is used elsewhere; dom0 and who sleeps is exempt."""
    modes = set()
    for other in pool.rows.find('VBD', VDI=vdi):
        if other == vbd:
            continue
        row = pool.rows.get('VBD', other)
        vm = pool.rows.get('VM', row['VM'])
        if vm['power_state'] == 'Suspended' or vm['is_control_domain']:
            continue
        if row['currently_attached'] or row['current_operations']:
            modes.add(row['mode'])
    return modes
