# SPDX-License-Identifier: Apache-2.0
"""What clients ask about the service: limits, zones, services, pools."""

from __future__ import annotations

from typing import Any

from volume import errors
from volume.api import views
from volume.api.call import Call
from volume.api.call import Reply
from volume.api.fields import flag
from volume.verbs import lookup

UNLIMITED = -1
EXTENSIONS = {
    'OS-SCH-HNT': 'Scheduler hints',
    'os-admin-actions': 'Actions of administrators',
    'os-availability-zone': 'Availability zones',
    'os-extended-snapshot-attributes': 'Progress and project of snapshots',
    'os-quota-sets': 'Quotas',
    'os-services': 'Services',
    'os-used-limits': 'Used limits',
    'os-vol-host-attr': 'Host of volumes',
    'os-vol-mig-status-attr': 'Migration status of volumes',
    'os-vol-tenant-attr': 'Project of volumes',
    'os-volume-actions': 'Actions of volumes',
    'os-volume-backends': 'Backends with pools, state and reason (ours)',
    'os-volume-jobs': 'Jobs with progress, cancel and retry (ours)',
    'os-volume-manage': 'Adopt volumes',
    'scheduler-stats': 'Pools',
}


def limits(call: Call) -> Reply:
    project_id = call.caller.project_id
    if call.minor >= 39 and call.caller.is_admin:
        project_id = call.one('project_id') or project_id
    used = lookup.usage(call.core, project_id)
    return Reply(200, {'limits': {'rate': [], 'absolute': {
        'maxTotalVolumes': UNLIMITED,
        'maxTotalSnapshots': UNLIMITED,
        'maxTotalVolumeGigabytes': UNLIMITED,
        'maxTotalBackups': UNLIMITED,
        'maxTotalBackupGigabytes': UNLIMITED,
        'totalVolumesUsed': sum(used.volumes.values()),
        'totalSnapshotsUsed': sum(used.snapshots.values()),
        'totalGigabytesUsed': _gigabytes(used),
        'totalBackupsUsed': 0,
        'totalBackupGigabytesUsed': 0,
    }}})


def zones(call: Call) -> Reply:
    return Reply(200, {'availabilityZoneInfo': [{
        'zoneName': call.core.settings.availability_zone,
        'zoneState': {'available': True},
    }]})


def services(call: Call) -> Reply:
    heard_after = call.core.heard_after()
    zone = call.core.settings.availability_zone
    shown: list[dict[str, Any]] = [
        {
            'binary': 'cinder-scheduler',
            'host': row.host,
            'zone': zone,
            'status': 'enabled',
            'state': 'up' if row.heard_at >= heard_after else 'down',
            'updated_at': views.when(row.heard_at),
            'disabled_reason': None,
        }
        for row in lookup.services(call.core)
    ]
    shown += [
        {
            'binary': 'cinder-volume',
            'host': f'{seen.row.host}@{seen.row.name}',
            'zone': zone,
            'status': 'enabled' if seen.row.enabled else 'disabled',
            'state': 'up' if seen.row.is_up and (
                seen.row.updated_at >= heard_after
            ) else 'down',
            'updated_at': views.when(seen.row.updated_at),
            'disabled_reason': seen.row.reason or None,
        }
        for seen in lookup.backends(call.core, call.caller)
    ]
    host, binary = call.one('host'), call.one('binary')
    return Reply(200, {'services': [
        each for each in shown
        if (host is None or host == each['host'].partition('@')[0]
            or host == each['host'])
        and (binary is None or binary == each['binary'])
    ]})


def pools(call: Call) -> Reply:
    detail = flag(call.one('detail') or '0', 'detail')
    return Reply(200, {'pools': [
        views.scheduler_pool(seen.row, pool, detail)
        for seen in lookup.backends(call.core, call.caller)
        for pool in seen.pools
    ]})


def backends(call: Call) -> Reply:
    return Reply(200, {'backends': [
        views.backend(call, seen)
        for seen in lookup.backends(call.core, call.caller)
    ]})


def extensions(call: Call) -> Reply:
    return Reply(200, {'extensions': [
        _extension(alias) for alias in EXTENSIONS
    ]})


def extension(call: Call) -> Reply:
    alias = call.path['alias']
    if alias not in EXTENSIONS:
        raise errors.NotFound(f'extension {alias!r:.80} could not be found')
    return Reply(200, {'extension': _extension(alias)})


def quotas(call: Call) -> Reply:
    project_id = call.path['project_id']
    if project_id != call.caller.project_id and not call.caller.is_admin:
        raise errors.Denied('the quota of another project is not shown')
    limits = {
        key: UNLIMITED for key in (
            'volumes', 'snapshots', 'gigabytes', 'per_volume_gigabytes',
            'backups', 'backup_gigabytes', 'groups',
        )
    }
    body: dict[str, Any] = {'id': project_id, **limits}
    if flag(call.one('usage') or '0', 'usage'):
        used = lookup.usage(call.core, project_id)
        in_use = {
            'volumes': sum(used.volumes.values()),
            'snapshots': sum(used.snapshots.values()),
            'gigabytes': _gigabytes(used),
        }
        for key in limits:
            body[key] = {
                'limit': UNLIMITED, 'in_use': in_use.get(key, 0),
                'reserved': 0,
            }
    return Reply(200, {'quota_set': body})


def _gigabytes(used: lookup.Usage) -> int:
    return views.total_gib(used.volumes) + views.total_gib(used.snapshots)


def _extension(alias: str) -> dict[str, Any]:
    return {
        'alias': alias,
        'name': EXTENSIONS[alias],
        'description': EXTENSIONS[alias],
        'updated': '2018-11-29T00:00:00+00:00',
        'links': [],
    }
