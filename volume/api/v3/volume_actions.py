# SPDX-License-Identifier: Apache-2.0
"""/volumes/ID/action: the verbs that are not create, show or delete."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume import model
from volume.api import views
from volume.api.actions import Action
from volume.api.actions import dispatch
from volume.api.call import Call
from volume.api.call import Reply
from volume.api.fields import Fields
from volume.api.v3.attachments import need_service
from volume.verbs import attachments
from volume.verbs import images
from volume.verbs import limits
from volume.verbs import lookup
from volume.verbs import manage
from volume.verbs import metadata
from volume.verbs import volumes

CONTAINER = 'bare'

ONLINE_EXTEND_SINCE = 42


def act(call: Call) -> Reply:
    return dispatch(call, ACTIONS)


def _extend(call: Call, info: Fields) -> None:
    exact = info.whole('new_size_bytes')
    if exact is None:
        exact = views.from_gib(
            info.whole('new_size') or info.need('new_size')
        )
    # As older clients know it, only a detached volume can be extended.
    volumes.extend(
        call.core, call.caller, call.id('volume_id'), exact,
        online=call.minor >= ONLINE_EXTEND_SINCE,
    )


def _reserve(call: Call, info: Fields) -> None:
    attachments.reserve(call.core, call.caller, call.id('volume_id'))


def _unreserve(call: Call, info: Fields) -> None:
    attachments.unreserve(call.core, call.caller, call.id('volume_id'))


def _begin_detaching(call: Call, info: Fields) -> None:
    attachments.begin_detaching(call.core, call.caller, call.id('volume_id'))


def _roll_detaching(call: Call, info: Fields) -> None:
    attachments.roll_detaching(call.core, call.caller, call.id('volume_id'))


def _attach(call: Call, info: Fields) -> None:
    instance_uuid = info.id('instance_uuid')
    host_name = info.text('host_name')
    if bool(instance_uuid) == bool(host_name):
        raise errors.Invalid(
            'either instance_uuid or host_name must be given, and not both'
        )
    attachments.attach(
        call.core, call.caller, call.id('volume_id'), instance_uuid,
        info.text('mountpoint') or None, host_name=host_name or None,
        mode=info.text('mode') or 'rw',
    )


def _detach(call: Call, info: Fields) -> None:
    volume_id = call.id('volume_id')
    attachment_id = info.id('attachment_id')
    if not call.is_trusted:
        need_service(call, [
            each for each in
            lookup.volume(call.core, call.caller, volume_id).attachments
            if attachment_id in (None, each.id)
        ])
    attachments.detach(call.core, call.caller, volume_id, attachment_id)


def _force_detach(call: Call, info: Fields) -> None:
    """End the access of one attachment, of one host, or of everybody."""
    volume_id = call.id('volume_id')
    attachment_id = info.id('attachment_id')
    connector = info.raw('connector')
    if connector and attachment_id is None:
        attachments.disconnect(
            call.core, call.caller, volume_id, connector, force=True
        )
        return
    attachments.detach(
        call.core, call.caller, volume_id, attachment_id, force=True
    )


def _initialize_connection(call: Call, info: Fields) -> dict[str, Any]:
    volume_id = call.id('volume_id')
    connector = info.object('connector').values
    _need_own_host(call, volume_id, connector)
    connection = attachments.connect(
        call.core, call.caller, volume_id, connector,
        mode=str(connector.get('mode') or 'rw'),
    )
    return {'connection_info': connection}


def _terminate_connection(call: Call, info: Fields) -> None:
    volume_id = call.id('volume_id')
    connector = info.object('connector').values
    _need_own_host(call, volume_id, connector)
    attachments.disconnect(call.core, call.caller, volume_id, connector)


def _need_own_host(
    call: Call, volume_id: str, connector: Mapping[str, Any]
) -> None:
    if not call.is_trusted:
        need_service(call, [
            each for each in
            lookup.volume(call.core, call.caller, volume_id).attachments
            if each.host == connector.get('host')
        ])


def _set_bootable(call: Call, info: Fields) -> None:
    info.need('bootable')
    volumes.update(
        call.core, call.caller, call.id('volume_id'),
        bootable=info.flag('bootable'),
    )


def _update_readonly(call: Call, info: Fields) -> None:
    info.need('readonly')
    volumes.update(
        call.core, call.caller, call.id('volume_id'),
        readonly=info.flag('readonly'),
    )


def _revert(call: Call, info: Fields) -> None:
    snapshot_id = info.id('snapshot_id')
    if snapshot_id is None:
        raise errors.Invalid('revert has no \'snapshot_id\'')
    volumes.revert(call.core, call.caller, call.id('volume_id'), snapshot_id)


def _upload(call: Call, info: Fields) -> dict[str, Any]:
    volume_id = call.id('volume_id')
    name = info.text('image_name')
    format = info.text('disk_format') or 'raw'
    if info.text('container_format') not in ('', CONTAINER):
        raise errors.Invalid(f'container_format must be {CONTAINER}')
    if info.flag('protected'):
        raise errors.Invalid('an image cannot be protected here')
    url = _upload_url(call, name)
    seen = lookup.volume(call.core, call.caller, volume_id)
    job = images.upload(
        call.core, call.caller, volume_id, url, format=format,
        force=info.flag('force'),
    )
    row = seen.row
    return {'os-volume_upload_image': {
        'id': row.id,
        'updated_at': views.when(row.updated_at),
        'status': 'uploading',
        'display_description': row.description,
        'size': views.gib(row.size_bytes),
        'volume_type': row.volume_type or views.DEFAULT_TYPE,
        'image_id': job.id,
        'image_name': name,
        'disk_format': format,
        'container_format': CONTAINER,
        'job_id': job.id,
    }}


def _upload_url(call: Call, name: str) -> str:
    """Return where an image goes: a URL, or a name where we keep them."""
    if '://' in name:
        return name
    if not name or name.startswith('.') or '/' in name:
        raise errors.Invalid(
            f'image_name {name!r:.80} is neither a plain name nor a URL'
        )
    if not call.upload_url:
        raise errors.Invalid(
            'image_name must be a URL (file:///…): the service has no '
            'directory of its own for images'
        )
    return f'{call.upload_url.rstrip("/")}/{urllib.parse.quote(name)}'


def _show_image_metadata(call: Call, info: Fields) -> dict[str, Any]:
    seen = lookup.volume(call.core, call.caller, call.id('volume_id'))
    return {'metadata': views.image(seen.row.image or {})}


def _set_image_metadata(call: Call, info: Fields) -> dict[str, Any]:
    items = info.only(('metadata',)).object('metadata').values
    for key, value in items.items():
        if not isinstance(value, str):
            raise errors.Invalid(
                f'metadata {key!r:.80} is not text: os-unset_image_metadata '
                'takes a key away'
            )
    row = metadata.describe_image(
        call.core, call.caller, call.id('volume_id'), items
    )
    return {'metadata': views.image(row.image)}


def _unset_image_metadata(call: Call, info: Fields) -> None:
    key = info.only(('key',)).text('key')
    volume_id = call.id('volume_id')
    seen = lookup.volume(call.core, call.caller, volume_id)
    if key not in views.image(seen.row.image or {}):
        raise errors.NotFound(
            f'the image of volume {volume_id} has no metadata {key!r:.80}'
        )
    metadata.describe_image(call.core, call.caller, volume_id, {key: None})


def _reset_status(call: Call, info: Fields) -> None:
    for key in 'attach_status', 'migration_status':
        if key in info:
            raise errors.Invalid(
                f'{key} cannot be set: it follows from the attachments; see '
                'os-force_detach'
            )
    volumes.reset_status(
        call.core, call.caller, call.id('volume_id'), info.text('status')
    )


def _force_delete(call: Call, info: Fields) -> None:
    volumes.delete(call.core, call.caller, call.id('volume_id'), force=True)


def _unmanage(call: Call, info: Fields) -> None:
    manage.disown(call.core, call.caller, call.id('volume_id'))


def _limit(call: Call, info: Fields) -> None:
    limits.limit(
        call.core, call.caller, call.id('volume_id'), model.IoLimits(
            iops=info.whole('iops'), bytes_per_s=info.whole('bytes_per_s'),
        ),
    )


def _flatten(call: Call, info: Fields) -> None:
    volumes.flatten(call.core, call.caller, call.id('volume_id'))


ACTIONS = {
    'os-extend': Action(_extend, 202),
    'os-reserve': Action(_reserve, 202),
    'os-unreserve': Action(_unreserve, 202),
    'os-begin_detaching': Action(_begin_detaching, 202),
    'os-roll_detaching': Action(_roll_detaching, 202),
    'os-attach': Action(_attach, 202),
    'os-detach': Action(_detach, 202),
    'os-initialize_connection': Action(_initialize_connection, 200),
    'os-terminate_connection': Action(_terminate_connection, 202),
    'os-set_bootable': Action(_set_bootable, 200),
    'os-update_readonly_flag': Action(_update_readonly, 202),
    'os-volume_upload_image': Action(_upload, 202),
    'os-show_image_metadata': Action(_show_image_metadata, 200),
    'os-set_image_metadata': Action(_set_image_metadata, 200),
    'os-unset_image_metadata': Action(_unset_image_metadata, 200),
    'os-flatten': Action(_flatten, 202),
    'os-limit': Action(_limit, 202),
    'revert': Action(_revert, 202, since=40),
    'os-reset_status': Action(_reset_status, 202, admin=True),
    'os-force_delete': Action(_force_delete, 202, admin=True),
    'os-force_detach': Action(_force_detach, 202, admin=True),
    'os-unmanage': Action(_unmanage, 202, admin=True),
}
