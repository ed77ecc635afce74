# SPDX-License-Identifier: Apache-2.0
"""Make a volume group, and a thin pool in it, where a person asked for it.

Only ever from devices that carry nothing: any signature that ``wipefs``
knows is a reason to refuse, and nothing is ever wiped away.
"""

from __future__ import annotations

import json

from volume import errors
from volume.drivers.lvm.groups import Group
from volume.drivers.lvm.groups import run
from volume.node import CommandFailed

METADATA_BYTES_MAX = 15 << 30  # the kernel uses no more than 15.81 GiB
VG_METADATA = '64m'  # LVM's default is enough for about a thousand volumes
POOL_PERCENT = 90  # what is left serves the growth of its metadata


def form_group(group: Group) -> None:
    """Make the group if there is none.

    :raises Invalid: a device carries something
    """
    if group.exists():
        return
    devices = group.settings.devices
    if not devices:
        raise errors.Invalid(
            f'there is no volume group {group.name}, and create is set '
            'without devices to make it from'
        )
    for path in devices:
        _refuse_used(group, path)
    # Without the filter of the group: it has no disks yet.
    run(
        group.node, group.settings.timeout_s, 'vgcreate', '--yes', '-qq',
        '--metadatasize', VG_METADATA, group.name, *devices,
    )


def form(group: Group) -> None:
    """Make the group and its thin pool, whichever is missing."""
    form_group(group)
    group.find()
    name = group.settings.thin_pool
    vg = group.look(f'lv_name="{name}"')
    if vg.named(name) is not None:
        return
    group.change(
        'lvcreate', '-T', '-l', f'{POOL_PERCENT}%FREE',
        '--errorwhenfull', 'y', '--zero', 'y', f'{group.name}/{name}',
    )


def _refuse_used(group: Group, path: str) -> None:
    """Refuse a device that is not known to be empty."""
    if not group.node.is_block(path):
        raise errors.Invalid(f'devices: {path} is no block device')
    try:
        text = group.node.run('wipefs', '--no-act', '--json', path)
        found = json.loads(text or '{}').get('signatures', [])
        kinds = sorted({str(each.get('type')) for each in found})
    except CommandFailed as failed:
        raise errors.Unavailable(
            f'devices: {path} cannot be looked at: {failed}'
        ) from failed
    except (ValueError, AttributeError) as broken:
        raise errors.Unknown(
            f'devices: wipefs says nothing that is known of {path}'
        ) from broken
    if kinds:
        raise errors.Invalid(
            f'devices: {path} carries {", ".join(kinds)}: nothing is made '
            'of a device that is in use; wipe it yourself if you are sure '
            '(wipefs --all)'
        )
    # A guest may have it raw.
    if users := group.node.users(path):
        raise errors.Invalid(
            f'devices: {path} is in use by {", ".join(users):.300}: nothing '
            'is made of it'
        )
