# SPDX-License-Identifier: Apache-2.0
"""/snapshots: take, list, show, rename, delete."""

from __future__ import annotations

from volume import errors
from volume.api import paging
from volume.api import views
from volume.api.actions import Action
from volume.api.actions import dispatch
from volume.api.call import Call
from volume.api.call import Reply
from volume.api.fields import Fields
from volume.api.v3.volumes import changes
from volume.verbs import lookup
from volume.verbs import snapshots

FILTERS = ('name', 'display_name', 'status', 'volume_id', 'id',
           'project_id', 'user_id')
METADATA_SINCE = 22
SORT = ('created_at', 'updated_at', 'id', 'name', 'display_name', 'status',
        'size', 'volume_id')


def create(call: Call) -> Reply:
    fields = call.fields('snapshot').only((
        'volume_id', 'name', 'description', 'display_name',
        'display_description', 'force', 'metadata',
    ))
    volume_id = fields.id('volume_id')
    if volume_id is None:
        raise errors.Invalid('snapshot has no \'volume_id\'')
    row = snapshots.create(call.core, call.caller, snapshots.NewSnapshot(
        volume_id=volume_id,
        id=call.minted_id('X-Snapshot-Id', 'Idempotency-Key'),
        name=fields.raw('name', 'display_name'),
        description=fields.raw('description', 'display_description'),
        metadata=fields.raw('metadata'),
        force=fields.flag('force'),
    ))
    if row.deleted_at is not None:
        raise errors.Conflict(
            f'snapshot {row.id} was deleted; an id is not used again'
        )
    return Reply(202, {'snapshot': views.snapshot(call, row)})


def show(call: Call) -> Reply:
    row = lookup.snapshot(call.core, call.caller, call.id('snapshot_id'))
    return Reply(200, {'snapshot': views.snapshot(call, row)})


def index(call: Call) -> Reply:
    return _list(call, detail=False)


def detail(call: Call) -> Reply:
    return _list(call, detail=True)


def update(call: Call) -> Reply:
    row = snapshots.update(
        call.core, call.caller, call.id('snapshot_id'),
        **changes(call, call.fields('snapshot')),
    )
    return Reply(200, {'snapshot': views.snapshot(call, row)})


def delete(call: Call) -> Reply:
    snapshots.delete(call.core, call.caller, call.id('snapshot_id'))
    return Reply(202)


def act(call: Call) -> Reply:
    return dispatch(call, ACTIONS)


def _reset_status(call: Call, info: Fields) -> None:
    snapshots.reset_status(
        call.core, call.caller, call.id('snapshot_id'), info.text('status')
    )


def _force_delete(call: Call, info: Fields) -> None:
    snapshots.delete(
        call.core, call.caller, call.id('snapshot_id'), force=True
    )


def _list(call: Call, *, detail: bool) -> Reply:
    filters = (
        (*FILTERS, 'metadata') if call.minor >= METADATA_SINCE else FILTERS
    )
    found = lookup.snapshots(
        call.core, call.caller,
        paging.page(call, filters, SORT, lookup.SNAPSHOT_FILTERS),
    )
    return Reply(200, paging.listed(
        call, 'snapshots',
        [
            views.snapshot(call, row) if detail
            else views.snapshot_summary(row)
            for row in found.rows
        ],
        found, found.rows[-1].id if found.rows else '',
    ))


ACTIONS = {
    'os-reset_status': Action(_reset_status, 202, admin=True),
    'os-force_delete': Action(_force_delete, 202, admin=True),
}
