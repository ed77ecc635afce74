# SPDX-License-Identifier: Apache-2.0
"""VDIs: made, destroyed, resized, split into snapshots and clones."""

from __future__ import annotations

import contextlib
import uuid as uuids
from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

from volume.sim.xapi.disk import cbt
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import NULL
from volume.sim.xapi.objects import storage
from volume.sim.xapi.objects import vdis
from volume.sim.xapi.objects.guests import guests
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.sm import sync
from volume.sim.xapi.sm.base import Unimplemented
from volume.sim.xapi.state.values import DateTime
from volume.sim.xapi.state.values import EPOCH

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.sm.base import Info
    from volume.sim.xapi.sm.base import Manager

# What a snapshot and a clone have of their origin.
COPIED = (
    'name_label', 'name_description', 'type', 'sharable', 'other_config',
    'xenstore_data', 'on_boot', 'tags', 'allow_caching',
)


@call('VDI.create')
def create(pool: Pool, ctx: Ctx, record: dict[str, Any]) -> str:
    """Make an empty VDI; it may be larger than asked for."""
    sr, rows = record['SR'], pool.rows
    rows.field('SR', sr, 'uuid')
    if record['type'] == vdis.CBT_METADATA:
        raise Failure('VDI_INCOMPATIBLE_TYPE', NULL, record['type'])
    storage.assert_feature(pool, sr, 'VDI_CREATE')
    storage.assert_plugged(pool, sr)
    name = record.get('name_label', '')
    description = record.get('name_description', '')
    storage.assert_legible(name, description)
    sm_config = record.get('sm_config', {})
    with (
        pool.operations.sr(ctx, sr, 'vdi_create'),
        pool.sm.serving(sr) as manager,
    ):
        info = manager.make(
            str(uuids.uuid4()), record['virtual_size'], sm_config, name)
        fields = {
            'name_label': name,
            'name_description': description,
            'type': record['type'],
            'sharable': record['sharable'],
            'read_only': record['read_only'],
            'other_config': record['other_config'],
            'xenstore_data': record.get('xenstore_data', {}),
            'tags': record.get('tags', []),
        }
        vdi = _put(pool, sr, info, sm_config, fields)
        manager.rename(info.uuid, name, description)
        sync.sizes(pool, sr, manager)
    return vdi


def _put(
    pool: Pool, sr: str, info: Info, sm_config: dict[str, str],
    fields: dict[str, Any],
) -> str:
    """Add a new VDI's row; a LUN that was claimed has one already."""
    kept = {
        key: value for key, value in sm_config.items()
        if key not in sync.DRIVERS_KEYS
    }
    info.sm_config = {**kept, **info.sm_config}
    found = pool.rows.find('VDI', uuid=info.uuid, SR=sr)
    if not found:
        return sync.add(pool, sr, info, **fields)
    sync.refresh(pool, found[0], info)
    pool.rows.update('VDI', found[0], **fields)
    return found[0]


@call('VDI.destroy')
def destroy(pool: Pool, ctx: Ctx, vdi: str) -> None:
    """Remove a VDI; the room of what only it needed comes back later."""
    with _doing(pool, ctx, vdi, 'destroy') as (row, manager):
        manager.remove(row['uuid'])
        cbt.logs(pool).delete(row['uuid'])
        sync.remove(pool, vdi)
        sync.sizes(pool, row['SR'], manager)
        may_collect = manager.family == 'lvm' or (
            'vhd-parent' in row['sm_config'])
    if may_collect:
        pool.sm.kick(row['SR'])


@call('VDI.resize')
def resize(pool: Pool, ctx: Ctx, vdi: str, size: int) -> None:
    """Grow a VDI that nobody uses."""
    with _doing(pool, ctx, vdi, 'resize') as (row, manager):
        info = manager.resize(row['uuid'], size)
        sync.refresh(pool, vdi, info)
        cbt.logs(pool).resize(row['uuid'], info.size_bytes)
        sync.sizes(pool, row['SR'], manager)


@call('VDI.resize_online')
def resize_online(pool: Pool, ctx: Ctx, vdi: str, size: int) -> None:
    """Refuse: no driver can."""
    row = pool.rows.get('VDI', vdi)
    storage.assert_plugged(pool, row['SR'])
    storage.assert_feature(pool, row['SR'], 'VDI_RESIZE_ONLINE')
    raise Failure('SR_OPERATION_NOT_SUPPORTED', row['SR'])


@call('VDI.snapshot')
def snapshot(
    pool: Pool, ctx: Ctx, vdi: str,
    driver_params: dict[str, str] | None = None,
) -> str:
    """Keep what a VDI holds now; whoever uses it goes on."""
    with _doing(pool, ctx, vdi, 'snapshot') as (row, manager):
        new = str(uuids.uuid4())
        logs = cbt.logs(pool)
        with guests(pool).quiet(row['uuid']):
            try:
                infos = manager.snapshot(row['uuid'], new)
            except Unimplemented:
                raise Failure(
                    'UNIMPLEMENTED_IN_SM_BACKEND', row['SR']) from None
            is_tracked = logs.snapshot(row['uuid'], new)
        return _split(
            pool, row, manager, infos, is_a_snapshot=True, snapshot_of=vdi,
            snapshot_time=pool.now(), cbt_enabled=is_tracked)


@call('VDI.clone')
def clone(
    pool: Pool, ctx: Ctx, vdi: str,
    driver_params: dict[str, str] | None = None,
) -> str:
    """Make a VDI with the same bytes: at once, or by a copy in silence."""
    with _doing(pool, ctx, vdi, 'clone') as (row, manager):
        try:
            infos = manager.clone(row['uuid'], str(uuids.uuid4()))
        except Unimplemented:
            infos = []
        if infos:
            return _split(
                pool, row, manager, infos, is_a_snapshot=False,
                snapshot_of=NULL, snapshot_time=DateTime(EPOCH))
    with _marked(pool, ctx, vdi, row, 'clone'):
        copied: str = pool.call(ctx, 'VDI.copy', vdi, row['SR'])
        return copied


def _split(
    pool: Pool, row: dict[str, Any], manager: Manager, infos: list[Info],
    **fields: Any,
) -> str:
    """Write down what a split made: the new disk, and who else changed."""
    sr, new = row['SR'], infos[0]
    copied = {name: row[name] for name in COPIED}
    vdi = sync.add(pool, sr, new, **{
        **copied, 'read_only': False, **fields})
    for info in infos[1:]:
        sync.put(pool, sr, info)
    manager.rename(new.uuid, row['name_label'], row['name_description'])
    sync.sizes(pool, sr, manager)
    return vdi


@contextlib.contextmanager
def _doing(
    pool: Pool, ctx: Ctx, vdi: str, operation: str,
) -> Iterator[tuple[dict[str, Any], Manager]]:
    """Mark a VDI and its SR while something is done; check it again then."""
    row = vdis.assert_valid(pool, vdi, operation)
    with _marked(pool, ctx, vdi, row, operation):
        row = vdis.assert_valid(pool, vdi, operation)
        with pool.sm.serving(row['SR']) as manager:
            yield row, manager


@contextlib.contextmanager
def _marked(
    pool: Pool, ctx: Ctx, vdi: str, row: dict[str, Any], operation: str,
) -> Iterator[None]:
    with pool.operations.sr(
        ctx, row['SR'], vdis.OF_THE_REPOSITORY[operation],
    ):
        with pool.operations.vdi(ctx, vdi, operation):
            yield


@call('VDI.revert')
def revert(pool: Pool, ctx: Ctx, snapshot: str) -> None:
    """Give a VDI back the bytes of its snapshot, which stays.

    [I] A driver without the ability is not helped out by the server.
    """
    row = vdis.assert_valid(pool, snapshot, 'revert_from')
    if not row['is_a_snapshot']:
        raise Failure(
            'OPERATION_NOT_ALLOWED', f'VDI is not a snapshot: {snapshot}')
    sr, vdi = row['SR'], row['snapshot_of']
    vdis.assert_valid(pool, vdi, 'revert_to')
    kind = pool.rows.field('SR', sr, 'type')
    if 'VDI_REVERT' not in storage.features(pool, kind):
        raise Failure('UNIMPLEMENTED_IN_SM_BACKEND', sr)
    with (
        pool.operations.sr(ctx, sr, 'vdi_revert'),
        pool.operations.vdi(ctx, snapshot, 'revert_from'),
        pool.operations.vdi(ctx, vdi, 'revert_to'),
    ):
        origin = vdis.assert_valid(pool, vdi, 'revert_to')
        with pool.sm.serving(sr) as manager:
            for info in manager.revert(origin['uuid'], row['uuid']):
                sync.put(pool, sr, info)
            cbt.logs(pool).disable(origin['uuid'])
            pool.rows.update('VDI', vdi, cbt_enabled=False)
            sync.sizes(pool, sr, manager)
    pool.sm.kick(sr)


@call('VDI.introduce')
def introduce(
    pool: Pool, ctx: Ctx, uuid: str, name_label: str, name_description: str,
    sr: str, kind: str, sharable: bool, read_only: bool,
    other_config: dict[str, str], location: str,
    xenstore_data: dict[str, str] | None = None,
    sm_config: dict[str, str] | None = None, managed: bool = True,
    virtual_size: int = 0, physical_utilisation: int = 0,
    metadata_of_pool: str = NULL, is_a_snapshot: bool = False,
    snapshot_time: DateTime = EPOCH, snapshot_of: str = NULL,
) -> str:
    """Add the row of a VDI that the storage has; few drivers can."""
    rows = pool.rows
    rows.field('SR', sr, 'uuid')
    storage.assert_feature(pool, sr, 'VDI_INTRODUCE')
    storage.assert_plugged(pool, sr)
    storage.assert_legible(name_label, name_description)
    with pool.operations.sr(ctx, sr, 'vdi_introduce'):
        _assert_new(pool, sr, uuid, location)
        with pool.sm.serving(sr) as manager:
            info = manager.introduce(uuid, location, sm_config or {})
            _assert_new(pool, sr, info.uuid, info.location)
            vdi = _put(pool, sr, info, sm_config or {}, {
                'name_label': name_label,
                'name_description': name_description,
                'type': kind,
                'sharable': sharable,
                'read_only': read_only,
                'other_config': other_config,
                'xenstore_data': xenstore_data or {},
                'metadata_of_pool': metadata_of_pool,
                'is_a_snapshot': is_a_snapshot,
                'snapshot_time': snapshot_time,
                'snapshot_of': snapshot_of,
            })
            sync.sizes(pool, sr, manager)
    return vdi


def _assert_new(pool: Pool, sr: str, uuid: str, location: str) -> None:
    """Refuse a location that another VDI of the SR has."""
    for vdi in pool.rows.find('VDI', SR=sr, location=location):
        if pool.rows.field('VDI', vdi, 'uuid') != uuid:
            raise Failure('LOCATION_NOT_UNIQUE', sr, location)


@call('VDI.forget')
def forget(pool: Pool, ctx: Ctx, vdi: str) -> None:
    """Remove a VDI's row; the next scan finds it again."""
    vdis.assert_valid(pool, vdi, 'forget')
    with pool.operations.vdi(ctx, vdi, 'forget'):
        sync.remove(pool, vdi)


@call('VDI.update')
def update(pool: Pool, ctx: Ctx, vdi: str) -> None:
    """Ask the driver what a VDI is now."""
    row = vdis.assert_valid(pool, vdi, 'update')
    with (
        pool.operations.vdi(ctx, vdi, 'update'),
        pool.sm.serving(row['SR']) as manager,
    ):
        info = manager.inspect(row['uuid'])
        if info is not None:
            sync.refresh(pool, vdi, info)


@call('VDI.set_name_label')
def set_name_label(pool: Pool, ctx: Ctx, vdi: str, value: str) -> None:
    """Rename a VDI, which goes through its driver."""
    _rename(pool, vdi, name_label=value)


@call('VDI.set_name_description')
def set_name_description(pool: Pool, ctx: Ctx, vdi: str, value: str) -> None:
    """Describe a VDI, which goes through its driver."""
    _rename(pool, vdi, name_description=value)


def _rename(pool: Pool, vdi: str, **value: str) -> None:
    row = pool.rows.get('VDI', vdi)
    storage.assert_plugged(pool, row['SR'])
    storage.assert_legible(*value.values())
    names = {**row, **value}
    with pool.sm.serving(row['SR']) as manager:
        manager.rename(
            row['uuid'], names['name_label'], names['name_description'])
        pool.rows.update('VDI', vdi, **value)


@call('VDI.set_sharable')
def set_sharable(pool: Pool, ctx: Ctx, vdi: str, value: bool) -> None:
    """Say whether several may write to a VDI."""
    pool.rows.update('VDI', vdi, sharable=value)


@call('VDI.set_read_only')
def set_read_only(pool: Pool, ctx: Ctx, vdi: str, value: bool) -> None:
    """Refuse: only a driver may do it."""
    pool.rows.field('VDI', vdi, 'uuid')
    raise Failure('PERMISSION_DENIED', '')


@call('VDI.set_on_boot')
def set_on_boot(pool: Pool, ctx: Ctx, vdi: str, value: str) -> None:
    """Say whether a VDI forgets what was written when its VM starts."""
    vdis.assert_valid(pool, vdi, 'set_on_boot')
    pool.rows.update('VDI', vdi, on_boot=value)


@call('VDI.set_allow_caching')
def set_allow_caching(pool: Pool, ctx: Ctx, vdi: str, value: bool) -> None:
    """Say whether a VDI may be cached on its host."""
    pool.rows.update('VDI', vdi, allow_caching=value)
