# SPDX-License-Identifier: Apache-2.0
"""PBDs: an SR as one host reaches it, plugged or not."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.objects import storage
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.sm import sync

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool


@call('PBD.create')
def create(pool: Pool, ctx: Ctx, record: dict[str, Any]) -> str:
    """Say how a host reaches an SR; other_config is not taken."""
    sr, host = record['SR'], record['host']
    pool.rows.field('SR', sr, 'uuid')
    pool.rows.field('host', host, 'uuid')
    storage.assert_device_config(record['device_config'])
    with pool.operations.sr(ctx, sr, 'pbd_create'):
        there = pool.rows.find('PBD', SR=sr, host=host)
        if there:
            raise Failure('PBD_EXISTS', sr, host, there[0])
        return storage.new_pbd(pool, sr, host, record['device_config'])


@call('PBD.destroy')
def destroy(pool: Pool, ctx: Ctx, pbd: str) -> None:
    """Remove a PBD that is not plugged, with its secrets."""
    sr = pool.rows.field('PBD', pbd, 'SR')
    with pool.operations.sr(ctx, sr, 'pbd_destroy'):
        if pool.rows.field('PBD', pbd, 'currently_attached'):
            raise Failure(
                'OPERATION_NOT_ALLOWED', 'PBD is currently attached')
        storage.destroy_pbd(pool, pbd)


@call('PBD.plug')
def plug(pool: Pool, ctx: Ctx, pbd: str) -> None:
    """Attach an SR on a host; done is done."""
    rows = pool.rows
    sr = rows.field('PBD', pbd, 'SR')
    with pool.operations.sr(ctx, sr, 'plug'):
        row = rows.get('PBD', pbd)
        if row['currently_attached']:
            return
        storage.assert_type(pool, rows.field('SR', sr, 'type'))
        if not rows.field('SR', sr, 'shared'):
            for other in rows.find('PBD', SR=sr):
                if rows.field('PBD', other, 'currently_attached'):
                    raise Failure(
                        'SR_NOT_SHARABLE', sr,
                        rows.field('PBD', other, 'host'))
        pool.sm.plug(pbd)
    _look(pool, ctx, sr, row['host'])


def _look(pool: Pool, ctx: Ctx, sr: str, host: str) -> None:
    """Scan what was just plugged where it is served. [I]"""
    hosts = pool.sm.hosts(sr)
    if not hosts or hosts[0] != host:
        return
    with pool.operations.sr(ctx, sr, 'scan'):
        try:
            with pool.sm.serving(sr) as manager:
                sync.replace_all(pool, sr, manager.scan())
                sync.sizes(pool, sr, manager)
        except Failure:
            return  # it is plugged; who asks for a scan will be told
    pool.sm.kick(sr)


@call('PBD.unplug')
def unplug(pool: Pool, ctx: Ctx, pbd: str) -> None:
    """Detach an SR on a host, unless something there uses it."""
    rows = pool.rows
    sr = rows.field('PBD', pbd, 'SR')
    with pool.operations.sr(ctx, sr, 'unplug'):
        if not rows.field('PBD', pbd, 'currently_attached'):
            return
        used = _used(pool, sr, rows.field('PBD', pbd, 'host'))
        if used:
            raise Failure('VDI_IN_USE', *used)
        pool.sm.unplug(pbd)


def _used(pool: Pool, sr: str, host: str) -> list[str]:
    """Return the VDIs that VMs on a host use now."""
    rows = pool.rows
    return [
        vdi for vdi in rows.find('VDI', SR=sr)
        if any(
            rows.field('VM', rows.field('VBD', vbd, 'VM'), 'resident_on')
            == host
            for vbd in storage.active_vbds(pool, vdi)
        )
    ]


@call('PBD.set_device_config')
def set_device_config(
    pool: Pool, ctx: Ctx, pbd: str, value: dict[str, str],
) -> None:
    """Refuse: only a driver may do it."""
    pool.rows.field('PBD', pbd, 'uuid')
    raise Failure('PERMISSION_DENIED', '')
