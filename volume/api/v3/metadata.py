# SPDX-License-Identifier: Apache-2.0
"""/volumes/ID/metadata and /snapshots/ID/metadata, whole and key by key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume.api.call import Call
from volume.api.call import Reply
from volume.api.faults import Refused
from volume.verbs import metadata
from volume.verbs import rows

ETAG_SINCE = 15


def show(call: Call) -> Reply:
    meta = _read(call)
    headers = {'ETag': f'"{_etag(meta)}"'} if call.minor >= ETAG_SINCE else {}
    return Reply(200, {'metadata': meta}, headers)


def merge(call: Call) -> Reply:
    meta = metadata.merge(
        call.core, call.caller, *_where(call), call.fields('metadata').values
    )
    return Reply(200, {'metadata': meta})


def replace(call: Call) -> Reply:
    meta = metadata.replace(
        call.core, call.caller, *_where(call),
        call.fields('metadata').values, _guard(call),
    )
    return Reply(200, {'metadata': meta})


def show_item(call: Call) -> Reply:
    meta, key = _read(call), call.path['key']
    if key not in meta:
        raise errors.NotFound(f'there is no metadata {key!r:.80}')
    return Reply(200, {'meta': {key: meta[key]}})


def set_item(call: Call) -> Reply:
    key, meta = call.path['key'], call.fields('meta').values
    if set(meta) != {key}:
        raise errors.Invalid(
            f'the body must have one key, the URL\'s: {key!r:.80}'
        )
    metadata.merge(call.core, call.caller, *_where(call), meta)
    return Reply(200, {'meta': dict(meta)})


def remove_item(call: Call) -> Reply:
    metadata.remove(
        call.core, call.caller, *_where(call), call.path['key']
    )
    return Reply(200)


def _where(call: Call) -> tuple[metadata.Find, str]:
    """Return how to find the row, and its id."""
    if 'snapshot_id' in call.path:
        return rows.snapshot, call.id('snapshot_id')
    return rows.volume, call.id('volume_id')


def _read(call: Call) -> dict[str, str]:
    find, row_id = _where(call)
    return dict(call.core.db.read(
        lambda session: find(session, call.caller, row_id)
    ).meta)


def _etag(meta: Mapping[str, Any]) -> str:
    text = json.dumps(meta, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _guard(call: Call) -> metadata.Guard | None:
    """Refuse to replace other metadata than the caller has seen."""
    wanted = call.headers.get('If-Match')
    if call.minor < ETAG_SINCE or not wanted:
        return None
    allowed = {each.strip().strip('"') for each in wanted.split(',')}

    def check(old: Mapping[str, str]) -> None:
        if not allowed & {'*', _etag(old)}:
            raise Refused(412, 'the metadata has changed since it was read')

    return check
