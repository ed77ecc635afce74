# SPDX-License-Identifier: Apache-2.0
"""/volumes: make, list, show, rename, delete."""

from __future__ import annotations

from typing import Any

from volume import errors
from volume import ids
from volume.api import paging
from volume.api import views
from volume.api.call import Call
from volume.api.call import Reply
from volume.api.fields import Fields
from volume.api.fields import flag
from volume.verbs import lookup
from volume.verbs import volumes

HINTS_KEY = 'OS-SCH-HNT:scheduler_hints'
HINTS = frozenset({
    'tags', 'backend', 'pool', 'cluster', 'role', 'multiattach',
    'image_format', 'image_checksum', 'volume_id',
})
STRICT_SINCE = 53
KEYS = frozenset({
    'size', 'size_bytes', 'name', 'description', 'display_name',
    'display_description', 'availability_zone', 'volume_type', 'metadata',
    'snapshot_id', 'source_volid', 'imageRef', 'image_id',
    'consistencygroup_id', 'group_id', 'backup_id', 'multiattach',
    HINTS_KEY,
})
# What Cinder makes volumes from or puts them into, and we do not have.
ABSENT = ('consistencygroup_id', 'group_id', 'backup_id')
FILTERS = (
    'name', 'display_name', 'status', 'metadata', 'bootable',
    'availability_zone', 'id', 'multiattach', 'project_id', 'user_id',
    'volume_type', 'snapshot_id', 'source_volid', 'backend', 'pool',
)
SORT = (
    'created_at', 'updated_at', 'id', 'name', 'display_name', 'status',
    'size', 'availability_zone', 'bootable', 'host',
)


def create(call: Call) -> Reply:
    new = _wanted(call)
    try:
        row = volumes.create(call.core, call.caller, new)
    except errors.NoSpace:
        if new.volume_type and not any(
            seen.row.name == new.volume_type
            for seen in lookup.backends(call.core, call.caller)
        ):
            raise errors.NotFound(
                f'volume type {new.volume_type:.80} could not be found'
            ) from None
        raise
    if row.deleted_at is not None:
        raise errors.Conflict(
            f'volume {row.id} was deleted; an id is not used again'
        )
    seen = lookup.VolumeSeen(row, (), call.core.owner_host)
    return Reply(202, {'volume': views.volume(call, seen)})


def show(call: Call) -> Reply:
    seen = lookup.volume(call.core, call.caller, call.id('volume_id'))
    return Reply(200, {'volume': views.volume(call, seen)})


def index(call: Call) -> Reply:
    return _list(call, detail=False)


def detail(call: Call) -> Reply:
    return _list(call, detail=True)


def update(call: Call) -> Reply:
    volume_id = call.id('volume_id')
    fields = call.fields('volume')
    volumes.update(
        call.core, call.caller, volume_id,
        **changes(call, fields, STRICT_SINCE),
    )
    return show(call)


def delete(call: Call) -> Reply:
    force = call.one('force')
    if force is not None and call.minor < 23:
        raise errors.Invalid('force needs API version 3.23')
    forced = flag(force or '0', 'force')
    if forced and not call.caller.is_admin:
        raise errors.Denied('only an administrator may delete by force')
    volumes.delete(
        call.core, call.caller, call.id('volume_id'),
        force=forced,
        cascade=flag(call.one('cascade') or '0', 'cascade'),
    )
    return Reply(202)


def summary(call: Call) -> Reply:
    everyone = call.caller.is_admin and paging.all_tenants(call)
    project_id = None if everyone else call.caller.project_id
    used = lookup.usage(call.core, project_id).volumes
    body: dict[str, Any] = {
        'total_count': sum(used.values()),
        'total_size': views.total_gib(used),
    }
    if call.minor >= 36:
        body['metadata'] = lookup.metadata_values(call.core, project_id)
    return Reply(200, {'volume-summary': body})


def encryption(call: Call) -> Reply:
    lookup.volume(call.core, call.caller, call.id('volume_id'))
    return Reply(200, {'encryption_key_id': None})


def encryption_key(call: Call) -> Reply:
    encryption(call)
    if call.path['key'] != 'encryption_key_id':
        raise errors.NotFound('the volume is not encrypted')
    return Reply(200, {'encryption_key_id': None})


def changes(
    call: Call, fields: Fields, strict_since: int = 0
) -> dict[str, Any]:
    """Return the new name, description and metadata that a PUT carries."""
    if call.minor >= strict_since:
        fields.only((
            'name', 'description', 'display_name', 'display_description',
            'metadata',
        ))
    wanted: dict[str, Any] = {}
    for key in 'name', 'description':
        for given in key, f'display_{key}':
            if given in fields.values:
                wanted[key] = fields.values[given]
                break
    if 'metadata' in fields:
        wanted['metadata'] = fields.raw('metadata')
    if not wanted:
        raise errors.Invalid('neither name, description nor metadata is given')
    return wanted


def _list(call: Call, *, detail: bool) -> Reply:
    found = lookup.volumes(
        call.core, call.caller,
        paging.page(call, FILTERS, SORT, lookup.VOLUME_FILTERS),
        detail=detail,
    )
    view = views.volume if detail else views.volume_summary
    return Reply(200, paging.listed(
        call, 'volumes', [view(call, seen) for seen in found.rows], found,
        found.rows[-1].row.id if found.rows else '',
    ))


def _wanted(call: Call) -> volumes.NewVolume:
    fields = call.fields('volume')
    if call.minor >= STRICT_SINCE:
        fields.only(KEYS)
    hints = _hints(call, fields)
    for key in ABSENT:
        if fields.raw(key):
            raise errors.Unsupported(f'{key} is not supported')
    if fields.flag('multiattach'):
        raise errors.Invalid(
            'multiattach is no parameter of a volume; use the scheduler '
            'hint multiattach'
        )
    zone = fields.text('availability_zone')
    if zone and zone != call.core.settings.availability_zone:
        raise errors.Invalid(
            f'availability zone {zone!r:.80} is not known; it is '
            f'{call.core.settings.availability_zone}'
        )
    return volumes.NewVolume(
        size_bytes=_size_bytes(fields),
        id=hints.id('volume_id') or call.minted_id(
            'X-Volume-Id', 'Idempotency-Key'
        ),
        name=fields.raw('name', 'display_name'),
        description=fields.raw('description', 'display_description'),
        metadata=fields.raw('metadata'),
        snapshot_id=fields.id('snapshot_id'),
        source_volume_id=fields.id('source_volid'),
        image=_image(fields, hints),
        volume_type=_type(call, fields.text('volume_type')) or None,
        availability_zone=zone or None,
        multiattach=hints.flag('multiattach'),
        tags=_tags(hints.raw('tags')),
        backend=hints.text('backend'),
        pool=hints.text('pool'),
        cluster=hints.text('cluster'),
        role=hints.text('role'),
    )


def _hints(call: Call, fields: Fields) -> Fields:
    """Return the scheduler hints: beside the volume, or inside of it.

    A hint that is not obeyed is refused: a volume that lies elsewhere than
    its owner believes is worse than none.
    """
    body = Fields(call.body, 'the body')
    if call.minor >= STRICT_SINCE:
        body.only(('volume', HINTS_KEY))
    for place in body, fields:
        if place.raw(HINTS_KEY):
            return place.object(HINTS_KEY).only(HINTS)
    return Fields({}, HINTS_KEY)


def _size_bytes(fields: Fields) -> int | None:
    size, exact = fields.whole('size'), fields.whole('size_bytes')
    if exact is None:
        return None if size is None else views.from_gib(size)
    if size is not None and size != views.gib(exact):
        raise errors.Invalid(
            f'size {size} GiB and size_bytes {exact} disagree; give one'
        )
    return exact


def _image(fields: Fields, hints: Fields) -> dict[str, Any] | None:
    url = fields.text('imageRef', 'image_id')
    about = {
        ours: hints.text(hint)
        for ours, hint in (
            ('format', 'image_format'), ('checksum', 'image_checksum'),
        )
        if hint in hints
    }
    if url:
        return {'url': url, **about}
    if about:
        raise errors.Invalid(
            'hints about an image are given, but no imageRef'
        )
    return None


def _tags(value: Any) -> frozenset[str]:
    if isinstance(value, str):
        value = [tag.strip() for tag in value.split(',') if tag.strip()]
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(
        isinstance(tag, str) and 0 < len(tag) <= 64 for tag in value
    ) or len(value) > 64:
        raise errors.Invalid('the hint tags is not a list of short texts')
    return frozenset(value)


def _type(call: Call, wanted: str) -> str:
    """Return the name of a type; the default one is no wish at all."""
    default = views.DEFAULT_TYPE
    if wanted in ('', default, views.stable_id(f'type {default}')):
        return ''
    if not ids.is_id(wanted):
        if len(wanted) > 64:
            raise errors.NotFound(
                f'volume type {wanted:.80} could not be found'
            )
        return wanted
    for seen in lookup.backends(call.core, call.caller):
        if views.stable_id(f'type {seen.row.name}') == wanted:
            return seen.row.name
    raise errors.NotFound(f'volume type {wanted} could not be found')
