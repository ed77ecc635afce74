# SPDX-License-Identifier: Apache-2.0
"""Full copies of VDIs, and moves to another SR under a VM."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TYPE_CHECKING

from volume import errors
from volume.model import Extent
from volume.sim.xapi.disk import deltas
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import NULL
from volume.sim.xapi.net import receiving
from volume.sim.xapi.net.handlers import keeps_old_bytes
from volume.sim.xapi.objects import vms
from volume.sim.xapi.objects.guests import guests
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

MIGRATION = ('VDI_SNAPSHOT', 'VDI_MIRROR', 'VDI_MIRROR_IN')
COPIED = (
    'name_label', 'name_description', 'type', 'sharable', 'other_config',
    'xenstore_data', 'tags',
)


@call('VDI.copy', cancellable=True)
def copy(
    pool: Pool, ctx: Ctx, vdi: str, sr: str = NULL, base_vdi: str = NULL,
    into_vdi: str = NULL,
) -> str:
    """Copy all bytes into a new VDI, or into one that is there.

    With ``base_vdi`` only what has changed since then is copied: the target
    is to have what the base has.
    """
    rows = pool.rows
    source = rows.get('VDI', vdi)
    _assert_can_copy(pool, vdi, source)
    is_new = not rows.exists('VDI', into_vdi)
    base = base_vdi if rows.exists('VDI', base_vdi) else ''
    if is_new:
        rows.get('SR', sr)
    with pool.operations.vdi(ctx, vdi, 'copy'):
        target = _make(pool, ctx, source, sr) if is_new else into_vdi
        try:
            _assert_fits(pool, source, target)
            _copy_bytes(pool, ctx, vdi, target, base)
        except BaseException:
            # Of a host that has died nothing cleans up.
            if is_new and pool.is_up(ctx.host):
                _discard(pool, ctx, target)
            raise
    return target


@call('VDI.pool_migrate', cancellable=True)
def pool_migrate(
    pool: Pool, ctx: Ctx, vdi: str, sr: str, options: dict[str, str]
) -> str:
    """Move a VDI that a VM uses to another SR; return the new one."""
    rows = pool.rows
    source = rows.get('VDI', vdi)
    rows.get('SR', sr)
    users = [
        vbd for vbd in source['VBDs']
        if not rows.field(
            'VM', rows.field('VBD', vbd, 'VM'), 'is_control_domain')
    ]
    if not users:
        raise Failure('VDI_NEEDS_VM_FOR_MIGRATE', vdi)
    if source['cbt_enabled']:
        raise Failure('VDI_CBT_ENABLED', vdi)
    if source['is_a_snapshot']:
        raise Failure('VDI_IS_A_SNAPSHOT', vdi)
    _assert_can_migrate(pool, source['SR'], MIGRATION[:2])
    _assert_can_migrate(pool, sr, ('VDI_SNAPSHOT', 'VDI_MIRROR'))
    sm_config = _wanted(pool, vdi, sr, options)
    with pool.operations.vdi(ctx, vdi, 'mirror'):
        new = _make(pool, ctx, source, sr, sm_config)
        try:
            _mirror(pool, ctx, vdi, new, users)
        except BaseException:
            if pool.is_up(ctx.host):
                _discard(pool, ctx, new)
            raise
    guests(pool).wait_left(vdi, 10.0)
    pool.call(ctx, 'VDI.destroy', vdi)
    return new


def _mirror(
    pool: Pool, ctx: Ctx, vdi: str, new: str, users: list[str]
) -> None:
    """Copy while the guest goes on, then let it go on with the copy."""
    rows = pool.rows
    uuid = rows.field('VDI', vdi, 'uuid')
    with guests(pool).quiet(uuid):
        _copy_bytes(pool, ctx, vdi, new, '')
        plugged = [
            vbd for vbd in users
            if rows.field('VBD', vbd, 'currently_attached')
        ]
        for vbd in users:
            host = rows.field(
                'VM', rows.field('VBD', vbd, 'VM'), 'resident_on')
            if vbd in plugged:
                vms.detach(pool, vbd)
            rows.update('VBD', vbd, VDI=new)
            if vbd in plugged:
                vms.attach(pool, vbd, host)


def _wanted(
    pool: Pool, vdi: str, sr: str, options: dict[str, str]
) -> dict[str, str]:
    """Return what the format that is asked for is in a VDI's sm_config."""
    format = options.get('dest-img-format', '')
    if not format:
        return {}
    kind = pool.rows.field('SR', sr, 'type')
    known = pool.profile.sm[kind].image_formats or ('vhd',)
    if format not in known:
        raise Failure(
            'VDI_INCOMPATIBLE_TYPE', vdi,
            f'Image format {format} is not supported by {kind}')
    return {'image-format': format}


def _assert_can_copy(pool: Pool, vdi: str, row: dict[str, Any]) -> None:
    if not row['managed']:
        raise Failure('VDI_NOT_MANAGED', vdi)
    if row['type'] == 'cbt_metadata':
        raise Failure('VDI_INCOMPATIBLE_TYPE', vdi, row['type'])
    if row['type'] in ('ha_statefile', 'redo_log'):
        raise Failure(
            'OPERATION_NOT_ALLOWED',
            'VDI containing HA statefile or redo log cannot be copied '
            "(check the VDI's allowed operations).",
        )
    for vbd in row['VBDs']:
        used = pool.rows.get('VBD', vbd)
        if used['currently_attached'] and used['mode'] == 'RW':
            raise Failure('VDI_IN_USE', vdi, 'copy')


def _assert_can_migrate(
    pool: Pool, sr: str, wanted: Iterable[str]
) -> None:
    kind = pool.rows.field('SR', sr, 'type')
    missing = {*wanted} - {*pool.profile.sm[kind].features}
    if missing:
        raise Failure(
            'SR_DOES_NOT_SUPPORT_MIGRATION', sr, ', '.join(sorted(missing)))


def _make(
    pool: Pool, ctx: Ctx, source: dict[str, Any], sr: str,
    sm_config: dict[str, str] | None = None,
) -> str:
    """Make a VDI to copy into: all of a VDI's properties but its locks."""
    new: str = pool.call(ctx, 'VDI.create', {
        **{name: source[name] for name in COPIED},
        'SR': sr, 'virtual_size': source['virtual_size'],
        'read_only': False, 'sm_config': sm_config or {},
    })
    if source['on_boot'] == 'reset':
        pool.rows.update('VDI', new, on_boot='reset')
    return new


def _assert_fits(pool: Pool, source: dict[str, Any], target: str) -> None:
    row = pool.rows.get('VDI', target)
    if row['read_only']:
        raise Failure('VDI_READONLY', target)
    if row['virtual_size'] < source['virtual_size']:
        raise Failure(
            'VDI_TOO_SMALL', target, str(source['virtual_size']))


def _discard(pool: Pool, ctx: Ctx, vdi: str) -> None:
    """Destroy what a copy that failed had made."""
    guests(pool).wait_left(vdi, 10.0)
    with contextlib.suppress(Failure):
        pool.call(ctx, 'VDI.destroy', vdi)


def _copy_bytes(
    pool: Pool, ctx: Ctx, vdi: str, target: str, base: str
) -> None:
    host = _host(pool, vdi, target)
    with (
        guests(pool).in_dom0(vdi, 'RO', host, ctx.id) as source,
        guests(pool).in_dom0(target, 'RW', host, ctx.id) as disk,
    ):
        extents = _extents(pool, vdi, base, source)
        # A delta leaves what it does not speak of, and writes its zeros.
        is_dirty = bool(base) or keeps_old_bytes(pool, target)
        try:
            receiving.copy(
                source, disk, extents, is_dirty,
                _told(ctx, source.size_bytes),
            )
        except (errors.VolumeError, OSError) as failed:
            raise Failure('VDI_IO_ERROR', 'Device I/O errors') from failed


def _extents(
    pool: Pool, vdi: str, base: str, source: Disk
) -> Iterator[Extent]:
    if not base:
        return source.extents()
    return iter(deltas.between(
        guests(pool).manager(vdi), pool.rows.field('VDI', base, 'uuid'),
        pool.rows.field('VDI', vdi, 'uuid'), vdi,
    ))


def _told(ctx: Ctx, total: int) -> Callable[[int], None]:
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        ctx.check_cancelled()
        ctx.progress(done / total)
    return told


def _host(pool: Pool, *vdis: str) -> str:
    """Return a host that sees the SRs of both.

    :raises Failure: SR_HAS_NO_PBDS; NO_HOSTS_AVAILABLE
    """
    srs = [pool.rows.field('VDI', vdi, 'SR') for vdi in vdis]
    for sr in srs:
        pool.sm.manager(sr)
    for host in sorted(pool.hosts, key=lambda each: each != pool.master):
        if pool.is_up(host) and all(vms.sees(pool, host, sr) for sr in srs):
            return host
    raise Failure('NO_HOSTS_AVAILABLE')
