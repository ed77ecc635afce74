# SPDX-License-Identifier: Apache-2.0
"""/os-volume-manage: make what lies on the storage already a volume."""

from __future__ import annotations

from volume import errors
from volume.api import views
from volume.api.call import Call
from volume.api.call import Reply
from volume.verbs import lookup
from volume.verbs import manage

REFERENCES = ('source-name', 'source-id')


def adopt(call: Call) -> Reply:
    fields = call.fields('volume')
    backend, pool = _place(call, fields.text('host'))
    reference = fields.object('ref').only(REFERENCES)
    handle = reference.text(*REFERENCES)
    row = manage.adopt(
        call.core, call.caller, backend=backend, pool=pool, handle=handle,
        id=call.minted_id('X-Volume-Id', 'Idempotency-Key'),
        name=fields.raw('name'),
        description=fields.raw('description'),
        metadata=fields.raw('metadata'),
    )
    seen = lookup.VolumeSeen(row, (), call.core.owner_host)
    return Reply(202, {'volume': views.volume(call, seen)})


def _place(call: Call, host: str) -> tuple[str, str]:
    """Read ``[host@]backend[#pool]``; a backend's only pool needs no name.

    :raises Invalid: it names none, or one of several
    """
    backend, _, pool = host.rpartition('@')[2].partition('#')
    for seen in lookup.backends(call.core, call.caller):
        if seen.row.name != backend:
            continue
        if pool:
            return backend, pool
        if len(seen.pools) == 1:
            return backend, seen.pools[0].name
        raise errors.Invalid(
            f'backend {backend} has {len(seen.pools)} pools; name one, like '
            f'{backend}#pool'
        )
    raise errors.Invalid(
        f'host {host!r:.80} is not like backend#pool, or there is no such '
        'backend'
    )
