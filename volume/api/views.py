# SPDX-License-Identifier: Apache-2.0
"""Rows to JSON, as Cinder's clients read it; the only place that says GiB.

Keys that Cinder does not have (``size_bytes``, ``reason``, ``backend``,
``pool``) stand beside its own; its clients pass over what they do not know.
"""

from __future__ import annotations

import datetime
import urllib.parse
import uuid
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume import model
from volume.api.call import Call
from volume.db import models
from volume.verbs import lookup

DEFAULT_TYPE = '__DEFAULT__'
# What names a type or a backend's process by a UUID that never changes.
NAMESPACE = uuid.UUID('6f1d2e0a-5c0b-4a3e-9d53-2f6b7a6c1e11')
SHOWN_STATUS = {
    'managing': 'creating',
    'error_managing': 'error',
    'error_managing_deleting': 'deleting',
}
JSON = dict[str, Any]


def gib(size_bytes: int) -> int:
    """Return whole GiB, rounded up: a volume never looks too small."""
    return -(-size_bytes // model.GIB)


def from_gib(size: int) -> int:
    """Return bytes.

    :raises Invalid: no volume can be so large
    """
    if size > 1 << 30:
        raise errors.Invalid(f'size {size} GiB is over every limit')
    return size * model.GIB


def about_gib(size_bytes: int) -> float:
    """Return GiB for a person to read."""
    return round(size_bytes / model.GIB, 2)


def when(seconds: float | None) -> str | None:
    """Return a time as Cinder writes it: UTC, microseconds, no zone."""
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).replace(
        tzinfo=None
    ).isoformat(timespec='microseconds')


def links(call: Call, noun: str, row_id: str) -> list[JSON]:
    """Return where a thing is found."""
    path = f'{call.project_path}/{noun}/{row_id}'
    return [
        {'rel': 'self', 'href': f'{call.base_url}/v3{path}'},
        {'rel': 'bookmark', 'href': f'{call.base_url}{path}'},
    ]


def volume_summary(call: Call, seen: lookup.VolumeSeen) -> JSON:
    """Return what a list without details shows."""
    return {
        'id': seen.row.id,
        'name': seen.row.name,
        'links': links(call, 'volumes', seen.row.id),
    }


def volume(call: Call, seen: lookup.VolumeSeen) -> JSON:
    """Return everything about a volume that its caller may know."""
    row = seen.row
    shown: JSON = {
        'id': row.id,
        'status': SHOWN_STATUS.get(row.status, row.status),
        'size': gib(row.size_bytes),
        'availability_zone': row.availability_zone,
        'created_at': when(row.created_at),
        'updated_at': when(row.updated_at),
        'name': row.name,
        'description': row.description,
        'volume_type': row.volume_type or DEFAULT_TYPE,
        'snapshot_id': row.snapshot_id,
        'source_volid': row.source_volume_id,
        'metadata': dict(row.meta, readonly='True') if row.readonly
        else row.meta,
        'links': links(call, 'volumes', row.id),
        'user_id': row.user_id,
        'bootable': 'true' if row.bootable else 'false',
        'encrypted': False,
        'replication_status': None,
        'consistencygroup_id': None,
        'multiattach': row.multiattach,
        'attachments': [
            _attached(call, each) for each in seen.attachments
            if each.status == 'attached'
        ],
        'os-vol-tenant-attr:tenant_id': row.project_id,
        'size_bytes': row.size_bytes,
        'limits': {
            'iops': row.iops_limit, 'bytes_per_s': row.bytes_per_s_limit,
        },
        'reason': row.reason,
        'backend': row.backend,
        'pool': row.pool,
    }
    if about := image(row.image or {}):
        shown['volume_image_metadata'] = about
    if call.caller.is_admin:
        shown |= {
            'os-vol-host-attr:host': place(seen.host, row.backend, row.pool),
            'os-vol-mig-status-attr:migstat': None,
            'os-vol-mig-status-attr:name_id': None,
            'migration_status': None,
        }
    if call.minor >= 13:
        shown['group_id'] = None
    if call.minor >= 21 and call.caller.is_admin:
        shown['provider_id'] = row.handle or None
    if call.minor >= 48:
        # Each attachment has an export of its own.
        shown['shared_targets'] = False
        shown['service_uuid'] = (
            stable_id(f'service {row.backend}') if row.backend else None
        )
    return shown


def _attached(call: Call, row: models.Attachment) -> JSON:
    trusted = call.is_trusted
    return {
        'id': row.volume_id,
        'attachment_id': row.id,
        'volume_id': row.volume_id,
        'server_id': row.instance_uuid,
        'host_name': (row.host or None) if trusted else None,
        'device': row.mountpoint,
        'attached_at': when(row.attached_at),
    }


def image(about: Mapping[str, Any]) -> JSON:
    """Return what a volume was made from, without what a URL may hide.

    A URL can carry a password, or a signature in its query. What clients
    have said about it later stands above it.
    """
    shown = {'container_format': 'bare'} if set(about) - {'metadata'} else {}
    if url := str(about.get('url') or ''):
        parts = urllib.parse.urlsplit(url)
        host = parts.netloc.rpartition('@')[2]
        shown['image_url'] = urllib.parse.urlunsplit(
            (parts.scheme, host, parts.path, '', '')
        )
        shown['image_name'] = parts.path.rpartition('/')[2]
    for ours, theirs in ('format', 'disk_format'), ('checksum', 'checksum'):
        if about.get(ours):
            shown[theirs] = str(about[ours])
    shown.update(about.get('metadata', {}))
    return {key: said for key, said in shown.items() if said is not None}


def place(host: str, backend: str, pool: str) -> str | None:
    """Return where something lies, in Cinder's words: host@backend#pool."""
    return f'{host or "volume"}@{backend}#{pool}' if backend else None


def stable_id(name: str) -> str:
    """Return an id that a name always has."""
    return str(uuid.uuid5(NAMESPACE, name))


def snapshot(call: Call, row: models.Snapshot) -> JSON:
    """Return everything about a snapshot."""
    shown = {
        **snapshot_summary(row),
        'os-extended-snapshot-attributes:progress': (
            '100%' if row.status == 'available' else '0%'
        ),
        'os-extended-snapshot-attributes:project_id': row.project_id,
        'reason': row.reason,
    }
    if call.minor >= 14:
        shown['group_snapshot_id'] = None
    if call.minor >= 41:
        shown['user_id'] = row.user_id
    return shown


def snapshot_summary(row: models.Snapshot) -> JSON:
    """Return what a list without details shows."""
    return {
        'id': row.id,
        'created_at': when(row.created_at),
        'updated_at': when(row.updated_at),
        'name': row.name,
        'description': row.description,
        'volume_id': row.volume_id,
        'status': row.status,
        'size': gib(row.size_bytes),
        'size_bytes': row.size_bytes,
        'metadata': row.meta,
    }


def attachment_summary(row: models.Attachment) -> JSON:
    """Return what a list without details shows."""
    return {
        'id': row.id,
        'status': row.status,
        'instance': row.instance_uuid,
        'volume_id': row.volume_id,
    }


def attachment(
    row: models.Attachment,
    credentials: Mapping[str, str] | None = None,
    *,
    is_trusted: bool = False,
) -> JSON:
    """Return everything about an attachment; the connection is flat.

    ``credentials`` are for its host and for services alone. Which machine
    that host is, is for whom a volume tells it too.
    """
    info: JSON = {}
    if row.is_connected:
        info = {
            **dict(row.connection.get('data') or {}),
            **(credentials or {}),
            'driver_volume_type': row.connection.get('driver_volume_type'),
            'attachment_id': row.id,
            'access_mode': row.mode,
            'enforce_multipath': bool(
                row.connector.get('enforce_multipath', False)
            ),
        }
    return {
        **attachment_summary(row),
        'attached_at': when(row.attached_at) or '',
        'detached_at': '',
        'attach_mode': row.mode,
        'host': (row.host or None) if is_trusted else None,
        'connection_info': info,
    }


def job(row: models.Job) -> JSON:
    """Return how far a workflow is."""
    return {
        'id': row.id,
        'kind': row.kind,
        'state': row.state,
        'direction': row.direction,
        'step': row.step,
        'volume_id': row.volume_id,
        'snapshot_id': row.snapshot_id,
        'backend': row.backend,
        'project_id': row.project_id,
        'request_id': row.request_id,
        'attempts': row.attempts,
        'cancelling': row.cancel and row.state == 'open',
        'done_bytes': row.done_bytes,
        'total_bytes': row.total_bytes,
        'rate_bytes_per_s': row.rate_bytes_per_s,
        'error_kind': row.error_kind,
        'error': row.error,
        'created_at': when(row.created_at),
        'updated_at': when(row.updated_at),
        'ended_at': when(row.ended_at),
    }


def backend(call: Call, seen: lookup.BackendSeen) -> JSON:
    """Return a backend; what it is made of only to an administrator."""
    row = seen.row
    shown: JSON = {
        'name': row.name,
        'state': 'up' if row.is_up else 'down',
        'enabled': row.enabled,
        'tags': sorted(row.tags),
        'cluster': row.cluster,
        'role': row.role,
    }
    if not call.caller.is_admin:
        shown['pools'] = [
            {'name': pool.name, 'state': 'up' if pool.is_up else 'down',
             'features': sorted(pool.features)}
            for pool in seen.pools
        ]
        return shown
    return shown | {
        'reason': row.reason,
        'host': row.host,
        'driver': row.driver,
        'exporter': row.exporter,
        'projects': sorted(row.projects),
        'cost': row.cost,
        'updated_at': when(row.updated_at),
        'pools': [_pool(pool) for pool in seen.pools],
    }


def _pool(pool: models.Pool) -> JSON:
    return {
        'name': pool.name,
        'state': 'up' if pool.is_up else 'down',
        'features': sorted(pool.features),
        'thin': pool.thin,
        'total_bytes': pool.total_bytes,
        'limit_bytes': pool.limit_bytes,
        'free_bytes': pool.free_bytes,
        'claimed_bytes': pool.claimed_bytes,
        'hidden_bytes': pool.hidden_bytes,
        'granularity_bytes': pool.granularity_bytes,
        'max_volume_bytes': pool.max_volume_bytes,
        'device': pool.device,
        'updated_at': when(pool.updated_at),
    }


def scheduler_pool(
    row: models.Backend, pool: models.Pool, detail: bool
) -> JSON:
    """Return a pool as Cinder's scheduler shows it."""
    shown: JSON = {'name': place(row.host, row.name, pool.name)}
    if not detail:
        return shown
    left_bytes = max(
        min(
            pool.limit_bytes - pool.claimed_bytes - pool.hidden_bytes,
            pool.free_bytes,
        ), 0,
    )
    shown['capabilities'] = {
        'volume_backend_name': row.name,
        'pool_name': pool.name,
        'backend_state': 'up' if row.is_up and pool.is_up else 'down',
        'vendor_name': 'volume-service',
        'driver': row.driver,
        'storage_protocol': row.exporter,
        'total_capacity_gb': about_gib(pool.total_bytes),
        'free_capacity_gb': about_gib(left_bytes),
        'allocated_capacity_gb': about_gib(pool.claimed_bytes),
        'provisioned_capacity_gb': about_gib(
            pool.claimed_bytes + pool.hidden_bytes
        ),
        'reserved_percentage': 0,
        'max_over_subscription_ratio': str(round(
            pool.limit_bytes / pool.total_bytes, 2
        )) if pool.total_bytes else '1.0',
        'thin_provisioning_support': pool.thin,
        'thick_provisioning_support': not pool.thin,
        'multiattach': True,
        'QoS_support': False,
        'timestamp': when(pool.updated_at),
    }
    return shown


def volume_type(call: Call, row: models.Backend | None) -> JSON:
    """Return a type: each backend is one, and one leaves the choice to us."""
    name = row.name if row else DEFAULT_TYPE
    public = not (row and row.projects)
    shown: JSON = {
        'id': stable_id(f'type {name}'),
        'name': name,
        'description': (
            f'Volumes on the backend {name}' if row
            else 'Volumes on whichever backend fits'
        ),
        'is_public': public,
        'os-volume-type-access:is_public': public,
        'extra_specs': {'volume_backend_name': row.name} if row else {},
    }
    if call.caller.is_admin:
        shown['qos_specs_id'] = None
    return shown


def total_gib(sizes: Mapping[int, int]) -> int:
    """Return the GiB of many things: size in bytes to how many of it."""
    return sum(gib(size) * count for size, count in sizes.items())
