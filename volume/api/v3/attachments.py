# SPDX-License-Identifier: Apache-2.0
"""/attachments: a host's right to a volume, as newer clients ask for it."""

from __future__ import annotations

from collections.abc import Iterable

from volume import errors
from volume.api import paging
from volume.api import views
from volume.api.actions import Action
from volume.api.actions import dispatch
from volume.api.call import Call
from volume.api.call import Reply
from volume.api.fields import Fields
from volume.db import models
from volume.verbs import attachments
from volume.verbs import credentials
from volume.verbs import lookup

MODE_SINCE = 54
FILTERS = (
    'id', 'status', 'volume_id', 'instance_id', 'instance_uuid',
    'project_id', 'attached_host',
)
SORT = ('created_at', 'id', 'status', 'volume_id')


def create(call: Call) -> Reply:
    keys = ['volume_uuid', 'instance_uuid', 'connector']
    if call.minor >= MODE_SINCE:
        keys.append('mode')
    fields = call.fields('attachment').only(keys)
    volume_id = fields.id('volume_uuid')
    if volume_id is None:
        raise errors.Invalid('attachment has no \'volume_uuid\'')
    connector = fields.raw('connector')
    mode = fields.text('mode')
    if not mode and isinstance(connector, dict):
        mode = str(connector.get('mode') or '')
    row = attachments.create(
        call.core, call.caller, volume_id, fields.id('instance_uuid'),
        connector, mode or 'rw',
    )
    return _connected(call, row)


def show(call: Call) -> Reply:
    row = lookup.attachment(
        call.core, call.caller, call.id('attachment_id')
    )
    if call.is_trusted:
        return _connected(call, row)
    return Reply(200, {'attachment': _view(call, row)})


def index(call: Call) -> Reply:
    return _list(call, detail=False)


def detail(call: Call) -> Reply:
    return _list(call, detail=True)


def update(call: Call) -> Reply:
    fields = call.fields('attachment').only(('connector',))
    connector = fields.object('connector').values
    attachment_id = call.id('attachment_id')
    if not call.is_trusted:
        need_service(call, [
            lookup.attachment(call.core, call.caller, attachment_id)
        ])
    row = attachments.update(
        call.core, call.caller, attachment_id, connector
    )
    return _connected(call, row)


def delete(call: Call) -> Reply:
    attachment_id = call.id('attachment_id')
    if not call.is_trusted:
        need_service(call, [
            lookup.attachment(call.core, call.caller, attachment_id)
        ])
    left = attachments.delete(call.core, call.caller, attachment_id)
    return Reply(200, {
        'attachments': [views.attachment_summary(row) for row in left]
    })


def act(call: Call) -> Reply:
    return dispatch(call, ACTIONS)


def need_service(call: Call, asked: Iterable[models.Attachment]) -> None:
    """Leave to the compute service what an instance may use.

    An instance whose disk is taken from under it goes on writing to
    whatever is there next (CVE-2023-2088); and what its host proves itself
    with is not for its owner.

    :raises Conflict: an instance has it, and its owner asks, not a service
    """
    for row in asked:
        if row.instance_uuid and row.is_connected:
            raise errors.Conflict(
                f'attachment {row.id} is used by instance '
                f'{row.instance_uuid}; detach it there'
            )


def _connected(call: Call, row: models.Attachment) -> Reply:
    """Answer who connects, or a service: with the host's credentials."""
    return Reply(200, {'attachment': views.attachment(
        row, credentials.of(call.core, row), is_trusted=call.is_trusted
    )})


def _view(call: Call, row: models.Attachment) -> views.JSON:
    return views.attachment(row, is_trusted=call.is_trusted)


def _complete(call: Call, info: Fields) -> None:
    attachments.complete(call.core, call.caller, call.id('attachment_id'))


def _list(call: Call, *, detail: bool) -> Reply:
    found = lookup.attachments(
        call.core, call.caller,
        paging.page(call, FILTERS, SORT, lookup.ATTACHMENT_FILTERS),
    )
    shown = [
        _view(call, row) if detail else views.attachment_summary(row)
        for row in found.rows
    ]
    return Reply(200, paging.listed(
        call, 'attachments', shown, found,
        found.rows[-1].id if found.rows else '',
    ))


ACTIONS = {'os-complete': Action(_complete, 204, since=44)}
