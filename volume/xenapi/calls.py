# SPDX-License-Identifier: Apache-2.0
"""Every call that this driver makes, and the least role that may make it.

The table is the driver's claim: its tests compare it with the published
datamodel and with what was really called, the docs show it, and an answer
of ``RBAC_PERMISSION_DENIED`` is explained by it.
"""

from __future__ import annotations

READ = 'read-only'
OPERATOR = 'vm-operator'
ADMIN = 'vm-admin'
POWER = 'vm-power-admin'
POOL = 'pool-operator'

ROLES: dict[str, tuple[str, ...]] = {
    READ: (
        'session.login_with_password', 'session.logout',
        'session.get_is_local_superuser', 'session.get_rbac_permissions',
        'event.from', 'task.get_record', 'task.get_all_records',
        'task.create', 'task.cancel', 'task.destroy',
        'pool.get_all_records', 'host.get_all_records',
        'SM.get_all_records',
        'SR.get_all_records', 'SR.get_by_name_label', 'SR.get_by_uuid',
        'SR.get_record', 'PBD.get_record', 'PBD.get_all_records',
        'VDI.get_all_records', 'VDI.get_by_name_label', 'VDI.get_by_uuid',
        'VDI.get_record',
        'VBD.get_record', 'VM.get_by_uuid', 'VM.get_record',
        'host.get_record',
    ),
    OPERATOR: ('VDI.add_tags', 'VDI.remove_tags', 'VDI.list_changed_blocks'),
    ADMIN: (
        'VDI.create', 'VDI.destroy', 'VDI.resize', 'VDI.snapshot',
        'VDI.clone', 'VDI.copy',
        'VDI.add_to_other_config', 'VDI.remove_from_other_config',
        'VDI.set_name_label', 'VDI.set_name_description',
        'VDI.set_other_config', 'VDI.enable_cbt', 'VDI.get_nbd_info',
        'VBD.create', 'VBD.plug', 'VBD.unplug', 'VBD.unplug_force',
        'VBD.destroy',
    ),
    POWER: ('SR.scan', 'VDI.revert'),
    POOL: (
        'SR.create', 'SR.introduce', 'SR.probe', 'SR.probe_ext',
        'SR.forget', 'SR.destroy',
        'SR.add_to_other_config', 'SR.remove_from_other_config',
        'PBD.create', 'PBD.plug', 'PBD.unplug', 'PBD.destroy',
        'pool.add_to_other_config', 'pool.remove_from_other_config',
        'secret.get_by_uuid', 'secret.get_value',
    ),
}

ROLE = {call: role for role, calls in ROLES.items() for call in calls}

# What only newer servers have, since this release; tried there, and done
# otherwise where it is unknown.
NEWER = {'VDI.revert': '26.16.0'}

# What may be asked again when its reply was lost.
_AGAIN = ('event.from', 'SR.probe', 'SR.probe_ext')


def role(method: str) -> str:
    """Return the least role that may make a call."""
    return ROLE.get(method.removeprefix('Async.'), 'pool-admin')


def is_read(method: str) -> bool:
    """Say whether a call changes nothing, and may simply be repeated."""
    name = method.removeprefix('Async.')
    return name in _AGAIN or name.split('.')[-1].startswith('get_')
