# SPDX-License-Identifier: Apache-2.0
"""Query parameters of lists: limit, marker, sort, filters; and the link on.

What is not understood is refused: a filter that is silently ignored shows a
caller more than was asked for, and what is then deleted is too much.
"""

from __future__ import annotations

import ast
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from volume import errors
from volume import ids
from volume.api import fields
from volume.api.call import Call
from volume.verbs import lookup

CONTROL = frozenset({
    'limit', 'marker', 'offset', 'sort', 'sort_key', 'sort_dir',
    'all_tenants', 'with_count',
})
FLAGS = frozenset({'bootable', 'multiattach'})
LITERAL = FLAGS | {'metadata'}
LITERAL_MAX = 2048
SORT_KEYS_MAX = 8
LIKE_SINCE = 34
COUNT_SINCE = 45

# The names of the API that differ from ours.
NAMES: Mapping[str, str] = {
    'display_name': 'name',
    'display_description': 'description',
    'source_volid': 'source_volume_id',
    'instance_id': 'instance_uuid',
    'size': 'size_bytes',
    'host': 'backend',
    'attached_host': 'host',
}


def page(
    call: Call,
    filters: Sequence[str],
    sortable: Sequence[str],
    known: Mapping[str, Any],
) -> lookup.Page:
    """Return the page that a list request asks for.

    ``filters`` and ``sortable`` are the API's names; ``known`` are ours,
    which the CLI uses, and which are allowed too.

    :raises Invalid: a parameter is unknown, or its value makes no sense
    """
    chosen = []
    for key in call.query:
        if key in CONTROL:
            continue
        like = key.endswith('~') and call.minor >= LIKE_SINCE
        name = key[:-1] if like else key
        ours = NAMES.get(name, name)
        if name not in filters or ours not in known:
            raise errors.Invalid(f'there is no filter {key!r:.80} here')
        if like and ours in LITERAL:
            raise errors.Invalid(f'the filter {name} must be met exactly')
        chosen.append(lookup.Filter(ours, _value(call, key, ours), like))
    limit, marker = call.one('limit'), call.one('marker')
    most = call.limits.page_items_max
    return lookup.Page(
        limit=most if limit is None else min(
            fields.whole(limit, 'limit', 0), most
        ),
        marker=ids.check(marker, 'marker') if marker else None,
        offset=fields.whole(call.one('offset') or '0', 'offset', 0),
        sort=_sort(call, sortable),
        count=(
            call.minor >= COUNT_SINCE
            and fields.flag(call.one('with_count') or '0', 'with_count')
        ),
        filters=tuple(chosen),
        all_projects=all_tenants(call),
    )


def all_tenants(call: Call) -> bool:
    """Say whether a list shall show every project's things."""
    return fields.flag(call.one('all_tenants') or '0', 'all_tenants')


def listed(
    call: Call,
    key: str,
    shown: list[dict[str, Any]],
    found: lookup.Found[Any],
    last_id: str,
) -> dict[str, Any]:
    """Return the body of a list, with the link to what comes after it."""
    body: dict[str, Any] = {key: shown}
    if found.count is not None:
        body['count'] = found.count
    if found.more:
        query = [
            (name, value)
            for name, values in call.query.items()
            if name not in ('marker', 'offset')
            for value in values
        ]
        query.append(('marker', last_id))
        body[f'{key}_links'] = [{
            'rel': 'next',
            'href': (
                f'{call.prefix}{call.route_path}?'
                f'{urllib.parse.urlencode(query)}'
            ),
        }]
    return body


def _value(call: Call, key: str, ours: str) -> Any:
    text = call.one(key) or ''
    if ours in FLAGS:
        return fields.flag(text, key)
    if ours == 'metadata':
        return _pairs(text)
    return text


def _pairs(text: str) -> Mapping[str, str]:
    """Return metadata, sent as JSON or as python-cinderclient prints it."""
    value: Any = None
    if len(text) <= LITERAL_MAX:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError,
                    TypeError):
                value = None
    if not isinstance(value, dict) or not value or not all(
        isinstance(key, str) and isinstance(item, str)
        and not set(key) & set('"\\\0') and key
        for key, item in value.items()
    ):
        raise errors.Invalid(
            'the filter metadata is not a set of keys and texts'
        )
    for each in (*value, *value.values()):
        fields.check_text(each, 'the filter metadata')
    return value


def _sort(
    call: Call, sortable: Sequence[str]
) -> tuple[tuple[str, bool], ...]:
    if 'sort' in call.query:
        if 'sort_key' in call.query or 'sort_dir' in call.query:
            raise errors.Invalid(
                'sort cannot be used together with sort_key and sort_dir'
            )
        pairs = [
            (key.strip(), direction.strip() or 'desc')
            for key, _, direction in (
                item.partition(':')
                for item in (call.one('sort') or '').split(',')
            )
        ]
    else:
        pairs = [(
            call.one('sort_key') or 'created_at',
            call.one('sort_dir') or 'desc',
        )]
    if len(pairs) > SORT_KEYS_MAX:
        raise errors.Invalid(f'sort has more than {SORT_KEYS_MAX} keys')
    for key, direction in pairs:
        if key not in sortable:
            raise errors.Invalid(f'sort key {key!r:.80} is not known here')
        if direction not in ('asc', 'desc'):
            raise errors.Invalid(
                f'sort direction {direction!r:.80} is neither asc nor desc'
            )
    return tuple(
        (NAMES.get(key, key), direction == 'desc')
        for key, direction in pairs
    )
