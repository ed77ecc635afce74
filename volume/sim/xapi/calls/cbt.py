# SPDX-License-Identifier: Apache-2.0
"""Changed-block tracking, as clients turn it on and ask for it."""

from __future__ import annotations

import time
from typing import Any, TYPE_CHECKING

from volume.sim.xapi.disk import cbt
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.objects.guests import guests
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

FEATURE = 'VDI_CONFIG_CBT'
POLL_S = 0.02


@call('VDI.enable_cbt')
def enable(pool: Pool, ctx: Ctx, vdi: str) -> None:
    """Track what is written to a VDI from now on; twice is fine."""
    row = _assert_can(pool, vdi)
    licence = pool.rows.field('host', pool.master, 'license_params')
    if licence.get('restrict_cbt') == 'true':
        raise Failure('LICENSE_RESTRICTION', 'CBT')
    with pool.operations.vdi(ctx, vdi, 'enable_cbt'):
        if row['cbt_enabled']:
            return
        if _is_raw(row):
            raise Failure(
                'SR_BACKEND_FAILURE_66', '',
                'Invalid VDI type [opterr=raw VDIs have no CBT]', '')
        with guests(pool).quiet(row['uuid']):
            cbt.logs(pool).enable(
                row['uuid'], row['virtual_size'],
                guests(pool).is_written(row['uuid']),
            )
        pool.rows.update('VDI', vdi, cbt_enabled=True)


@call('VDI.disable_cbt')
def disable(pool: Pool, ctx: Ctx, vdi: str) -> None:
    """Track a VDI no more; what was noted is lost."""
    row = _assert_can(pool, vdi)
    with pool.operations.vdi(ctx, vdi, 'disable_cbt'):
        if row['cbt_enabled']:
            cbt.logs(pool).disable(row['uuid'])
            pool.rows.update('VDI', vdi, cbt_enabled=False)


@call('VDI.data_destroy')
def data_destroy(pool: Pool, ctx: Ctx, vdi: str) -> None:
    """Remove a snapshot's data, and keep what changed up to it.

    :raises Failure: VDI_IN_USE, unless its VBDs go within four seconds
    """
    row = pool.rows.get('VDI', vdi)
    _assert_feature(pool, row['SR'], FEATURE)
    if not row['is_a_snapshot']:
        raise Failure(
            'OPERATION_NOT_ALLOWED', f'VDI is not a snapshot: {vdi}')
    if not row['cbt_enabled']:
        raise Failure('VDI_NO_CBT_METADATA', vdi)
    if row['type'] == 'cbt_metadata':
        return
    _wait_for_vbds(pool, ctx, vdi)
    with (
        pool.operations.sr(ctx, row['SR'], 'vdi_data_destroy'),
        pool.operations.vdi(ctx, vdi, 'data_destroy'),
    ):
        for vbd in pool.rows.find('VBD', VDI=vdi):
            pool.rows.delete('VBD', vbd)
        with pool.sm.serving(row['SR']) as manager:
            manager.remove(row['uuid'])
        pool.rows.update(
            'VDI', vdi, type='cbt_metadata', physical_utilisation=0,
            sm_config={
                key: value for key, value in row['sm_config'].items()
                if key != 'vhd-parent'
            },
        )
    pool.sm.kick(row['SR'])


@call('VDI.list_changed_blocks')
def list_changed_blocks(
    pool: Pool, ctx: Ctx, vdi_from: str, vdi_to: str
) -> str:
    """Return a bitmap in base64 of what differs: 64 KiB a bit."""
    source = pool.rows.get('VDI', vdi_from)
    target = pool.rows.get('VDI', vdi_to)
    _assert_feature(pool, target['SR'], FEATURE)
    if any(
        pool.rows.field('VBD', vbd, 'currently_attached')
        for vbd in target['VBDs']
    ):
        raise Failure('VDI_IN_USE', vdi_to, 'list_changed_blocks')
    if source['SR'] != target['SR']:
        raise Failure(
            'INTERNAL_ERROR', 'Storage_interface.Vdis_on_different_srs'
            f'({vdi_from}, {vdi_to})')
    pool.sm.manager(target['SR'])
    with pool.operations.vdi(ctx, vdi_to, 'list_changed_blocks'):
        return cbt.logs(pool).changed(source['uuid'], target['uuid'])


def _wait_for_vbds(pool: Pool, ctx: Ctx, vdi: str) -> None:
    """Give who is letting go of a VDI the time for it."""
    deadline = time.monotonic() + float(pool.switch('data_destroy_wait_s'))
    while any(
        pool.rows.field('VBD', vbd, 'currently_attached')
        for vbd in pool.rows.find('VBD', VDI=vdi)
    ):
        ctx.check_cancelled()
        if time.monotonic() > deadline:
            raise Failure('VDI_IN_USE', vdi, 'data_destroy')
        pool.stopping.wait(POLL_S)


def _assert_can(pool: Pool, vdi: str) -> dict[str, Any]:
    row = pool.rows.get('VDI', vdi)
    _assert_feature(pool, row['SR'], FEATURE)
    if row['type'] == 'cbt_metadata':
        raise Failure('VDI_INCOMPATIBLE_TYPE', vdi, row['type'])
    if row['is_a_snapshot']:
        raise Failure('OPERATION_NOT_ALLOWED', f'VDI is a snapshot: {vdi}')
    if row['type'] not in ('user', 'system'):
        raise Failure('VDI_INCOMPATIBLE_TYPE', vdi, row['type'])
    if row['on_boot'] == 'reset':
        raise Failure('VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION')
    pool.sm.manager(row['SR'])
    return row


def _assert_feature(pool: Pool, sr: str, feature: str) -> None:
    kind = pool.rows.field('SR', sr, 'type')
    if feature not in pool.profile.sm[kind].features:
        raise Failure('SR_OPERATION_NOT_SUPPORTED', sr)


def _is_raw(row: dict[str, Any]) -> bool:
    config = row['sm_config']
    return 'raw' in (config.get('type'), config.get('image-format')) or (
        bool(config.get('vdi_type') == 'aio'))
