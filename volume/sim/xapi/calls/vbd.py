# SPDX-License-Identifier: Apache-2.0
"""VBDs: a VDI as a device of a VM."""

from __future__ import annotations

import threading
from typing import Any, TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import NULL
from volume.sim.xapi.objects import devices
from volume.sim.xapi.objects import vbds
from volume.sim.xapi.objects import vms
from volume.sim.xapi.objects.guests import guests
from volume.sim.xapi.published import datamodel
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

TYPES = (
    'system', 'user', 'ephemeral', 'suspend', 'crashdump', 'metadata', 'rrd',
    'pvs_cache',
)
MIGRATIONS = ('migrate_send', 'pool_migrate')
# Two that ask for any device at a time do not get the same one.
_NUMBERING = threading.Lock()


@call('VBD.create')
def create(pool: Pool, ctx: Ctx, record: dict[str, Any]) -> str:
    """Let a VM have a VDI; whether it may use it is seen at the plug."""
    rows = pool.rows
    vm, vdi, kind = record['VM'], record['VDI'], record['type']
    machine = rows.get('VM', vm)
    if not record['empty']:
        what = rows.field('VDI', vdi, 'type')
        if what not in TYPES:
            raise Failure('VDI_INCOMPATIBLE_TYPE', vdi, what)
    if kind == 'CD' and record['mode'] != 'RO':
        raise Failure('VBD_CDS_MUST_BE_READONLY')
    if kind != 'CD' and record['empty']:
        raise Failure('VBD_NOT_REMOVABLE_MEDIA', 'in constructor')
    if record['mode'] == 'RW' and rows.field('VDI', vdi, 'read_only'):
        raise Failure('VDI_READONLY', vdi)
    for operation in machine['current_operations'].values():
        if operation in MIGRATIONS:
            raise Failure(
                'OTHER_OPERATION_IN_PROGRESS', 'VM', vm, operation,
                next(iter(machine['current_operations'])),
            )
    known = datamodel.load().constructors['VBD']
    fields = {
        name: value for name, value in record.items()
        if name in (*known['required'], *known['optional'])
    }
    if record['empty']:
        fields['VDI'] = NULL
    device = record['userdevice']
    with _NUMBERING:
        used = [
            rows.field('VBD', vbd, 'userdevice') for vbd in machine['VBDs']
        ]
        spare = devices.free(used)
        if not devices.is_valid(device, kind) or (
            device == devices.AUTODETECT and not spare
        ):
            raise Failure('INVALID_DEVICE', device)
        if device == devices.AUTODETECT:
            device = spare[0]
        if devices.is_taken(device, used):
            raise Failure('DEVICE_ALREADY_EXISTS', device)
        fields.update(userdevice=device, currently_attached=False, device='')
        return rows.new('VBD', **fields)


@call('VBD.plug')
def plug(pool: Pool, ctx: Ctx, vbd: str) -> None:
    """Give a running VM its disk."""
    row = pool.rows.get('VBD', vbd)
    with pool.operations.mark(ctx, 'VBD', vbd, 'plug'):
        if row['VDI'] != NULL:
            pool.operations.wait(ctx, 'VDI', row['VDI'], 'plug')
        vbds.assert_valid(pool, vbd, 'plug', ctx.id)
        host = pool.rows.field('VM', row['VM'], 'resident_on')
        vms.attach(pool, vbd, host)


@call('VBD.unplug')
def unplug(pool: Pool, ctx: Ctx, vbd: str) -> None:
    """Take the disk away, if the guest lets go of it."""
    _unplug(pool, ctx, vbd, 'unplug')


@call('VBD.unplug_force')
def unplug_force(pool: Pool, ctx: Ctx, vbd: str) -> None:
    """Take the disk away whatever the guest says."""
    _unplug(pool, ctx, vbd, 'unplug_force')


def _unplug(pool: Pool, ctx: Ctx, vbd: str, operation: str) -> None:
    row = pool.rows.get('VBD', vbd)
    with pool.operations.mark(ctx, 'VBD', vbd, operation):
        vbds.assert_valid(pool, vbd, operation, ctx.id)
        if operation == 'unplug':
            _ask_guest(pool, vbd, row['VM'])
        vms.detach(pool, vbd)


def _ask_guest(pool: Pool, vbd: str, vm: str) -> None:
    behaviour = guests(pool).behaviour(pool.rows.field('VM', vm, 'uuid'))
    if behaviour.refuses_detach:
        raise Failure(
            'DEVICE_DETACH_REJECTED', 'VBD', vbd, 'Device is in use')
    if behaviour.hangs_at_detach:
        guests(pool).stopping.wait(guests(pool).detach_timeout_s)
        raise Failure('DEVICE_DETACH_TIMEOUT', 'VBD', vbd)


@call('VBD.destroy')
def destroy(pool: Pool, ctx: Ctx, vbd: str) -> None:
    """Forget a VBD that is not plugged."""
    row = pool.rows.get('VBD', vbd)
    if row['currently_attached']:
        vm = pool.rows.field('VM', row['VM'], 'uuid')
        raise Failure(
            'OPERATION_NOT_ALLOWED',
            f"VBD '{row['uuid']}' still attached to '{vm}'",
        )
    pool.rows.delete('VBD', vbd)


@call('VBD.assert_attachable')
def assert_attachable(pool: Pool, ctx: Ctx, vbd: str) -> None:
    """Say why a VM could not start with this disk."""
    if not pool.rows.field('VBD', vbd, 'currently_attached'):
        vbds.assert_valid(pool, vbd, 'attach')


@call('VBD.set_mode')
def set_mode(pool: Pool, ctx: Ctx, vbd: str, value: str) -> None:
    """Change how a halted VM will use its disk."""
    vm = pool.rows.field('VBD', vbd, 'VM')
    state = pool.rows.field('VM', vm, 'power_state')
    if state != 'Halted':
        raise Failure('VM_BAD_POWER_STATE', vm, 'halted', state.lower())
    pool.rows.update('VBD', vbd, mode=value)
