# SPDX-License-Identifier: Apache-2.0
"""VMs: made, started and stopped, for the disks that they use."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import NULL
from volume.sim.xapi.objects import devices
from volume.sim.xapi.objects import vms
from volume.sim.xapi.published import datamodel
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

LIVE = ('Running', 'Paused')


@call('VM.create')
def create(pool: Pool, ctx: Ctx, record: dict[str, Any]) -> str:
    """Make a VM; it is halted whatever the record says."""
    known = datamodel.load().constructors['VM']
    fields = {
        name: value for name, value in record.items()
        if name in (*known['required'], *known['optional'])
        and name not in ('power_state', 'suspend_VDI')
    }
    vm = pool.rows.new(
        'VM', **fields, power_state='Halted', resident_on=NULL, domid=-1,
    )
    vms.set_allowed(pool, vm)
    return vm


@call('VM.destroy')
def destroy(pool: Pool, ctx: Ctx, vm: str) -> None:
    """Remove a halted VM and its VBDs; the disks stay."""
    row = pool.rows.get('VM', vm)
    if not row['is_a_template']:
        vms.assert_state(pool, vm, 'Halted')
    for vbd in row['VBDs']:
        pool.rows.delete('VBD', vbd)
    pool.rows.delete('VM', vm)


@call('VM.start')
def start(
    pool: Pool, ctx: Ctx, vm: str, start_paused: bool, force: bool
) -> None:
    """Start a VM where its disks can be seen."""
    vms.assert_state(pool, vm, 'Halted')
    _start(pool, vm, vms.host_for(pool, vm), start_paused)


@call('VM.start_on')
def start_on(
    pool: Pool, ctx: Ctx, vm: str, host: str, start_paused: bool, force: bool
) -> None:
    """Start a VM on a host."""
    vms.assert_state(pool, vm, 'Halted')
    pool.rows.get('host', host)
    for vbd in pool.rows.find('VBD', VM=vm):
        if not pool.rows.field('VBD', vbd, 'empty'):
            vdi = pool.rows.field('VBD', vbd, 'VDI')
            sr = pool.rows.field('VDI', vdi, 'SR')
            if not vms.sees(pool, host, sr):
                raise Failure('VM_REQUIRES_SR', vm, sr)
    _start(pool, vm, host, start_paused)


@call('VM.pause')
def pause(pool: Pool, ctx: Ctx, vm: str) -> None:
    """Let a VM stand still."""
    vms.assert_state(pool, vm, 'Running')
    pool.rows.update('VM', vm, power_state='Paused')
    vms.set_allowed(pool, vm)


@call('VM.unpause')
def unpause(pool: Pool, ctx: Ctx, vm: str) -> None:
    """Let it go on."""
    vms.assert_state(pool, vm, 'Paused')
    pool.rows.update('VM', vm, power_state='Running')
    vms.set_allowed(pool, vm)


@call('VM.clean_shutdown')
def clean_shutdown(pool: Pool, ctx: Ctx, vm: str) -> None:
    """Ask a guest to end."""
    vms.assert_state(pool, vm, 'Running')
    vms.halt(pool, vm)


@call('VM.hard_shutdown')
def hard_shutdown(pool: Pool, ctx: Ctx, vm: str) -> None:
    """End a VM, whatever it does."""
    vms.assert_state(pool, vm, *LIVE)
    vms.halt(pool, vm)


@call('VM.shutdown')
def shutdown(pool: Pool, ctx: Ctx, vm: str) -> None:
    """Ask a guest to end, and end it if need be."""
    vms.assert_state(pool, vm, *LIVE)
    vms.halt(pool, vm)


@call('VM.clean_reboot')
def clean_reboot(pool: Pool, ctx: Ctx, vm: str) -> None:
    """Start a guest again, on the host where it is."""
    vms.assert_state(pool, vm, 'Running')
    _reboot(pool, vm)


@call('VM.hard_reboot')
def hard_reboot(pool: Pool, ctx: Ctx, vm: str) -> None:
    """Start a VM again, whatever its guest does."""
    vms.assert_state(pool, vm, *LIVE)
    _reboot(pool, vm)


@call('VM.power_state_reset')
def power_state_reset(pool: Pool, ctx: Ctx, vm: str) -> None:
    """Write down that a VM is halted, wherever it was."""
    vms.assert_state(pool, vm, *LIVE, 'Halted')
    vms.halt(pool, vm)


@call('VM.pool_migrate')
def pool_migrate(
    pool: Pool, ctx: Ctx, vm: str, host: str, options: dict[str, str]
) -> None:
    """Move a running VM to another host that sees its disks."""
    vms.assert_state(pool, vm, 'Running')
    pool.rows.get('host', host)
    plugged = [
        vbd for vbd in pool.rows.find('VBD', VM=vm)
        if pool.rows.field('VBD', vbd, 'currently_attached')
    ]
    for vbd in plugged:
        vdi = pool.rows.field('VBD', vbd, 'VDI')
        sr = pool.rows.field('VDI', vdi, 'SR')
        if not vms.sees(pool, host, sr):
            raise Failure('VM_REQUIRES_SR', vm, sr)
    for vbd in plugged:
        vms.detach(pool, vbd)
        vms.attach(pool, vbd, host)
    pool.rows.update('VM', vm, resident_on=host)


@call('VM.get_allowed_VBD_devices')
def get_allowed_vbd_devices(pool: Pool, ctx: Ctx, vm: str) -> list[str]:
    """Return the numbers that a new VBD may have."""
    return devices.free(
        pool.rows.field('VBD', vbd, 'userdevice')
        for vbd in pool.rows.get('VM', vm)['VBDs']
    )


def _start(pool: Pool, vm: str, host: str, is_paused: bool) -> None:
    vms.start(pool, vm, host, 'Paused' if is_paused else 'Running')


def _reboot(pool: Pool, vm: str) -> None:
    host = pool.rows.field('VM', vm, 'resident_on')
    vms.halt(pool, vm)
    vms.start(pool, vm, host)


def _map(field: str) -> None:
    """Answer the calls that change one of a VM's maps.

    They are no generated ones, since the server checks some of their keys.
    """
    def set_(
        pool: Pool, ctx: Ctx, vm: str, value: dict[str, str]
    ) -> None:
        pool.rows.update('VM', vm, **{field: value})

    def add(pool: Pool, ctx: Ctx, vm: str, key: str, value: str) -> None:
        with pool.rows.change('VM', vm, field) as stored:
            if key in stored:
                raise Failure('MAP_DUPLICATE_KEY', 'VM', field, vm, key)
            stored[key] = value

    def remove(pool: Pool, ctx: Ctx, vm: str, key: str) -> None:
        with pool.rows.change('VM', vm, field) as stored:
            stored.pop(key, None)

    call(f'VM.set_{field}')(set_)
    call(f'VM.add_to_{field}')(add)
    call(f'VM.remove_from_{field}')(remove)


_map('other_config')
_map('platform')
