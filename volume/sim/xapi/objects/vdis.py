# SPDX-License-Identifier: Apache-2.0
"""Whether something may be done to a VDI now, and with which error not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

from volume.sim.xapi import registry
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.objects import storage

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

CBT_METADATA = 'cbt_metadata'
# Operation to what the type of the SR must be able to do.
FEATURES = {
    'snapshot': 'VDI_SNAPSHOT',
    'clone': 'VDI_CLONE',
    'destroy': 'VDI_DELETE',
    'resize': 'VDI_RESIZE',
    'update': 'VDI_UPDATE',
    'generate_config': 'VDI_GENERATE_CONFIG',
    'set_on_boot': 'VDI_RESET_ON_BOOT',
    'enable_cbt': 'VDI_CONFIG_CBT',
    'disable_cbt': 'VDI_CONFIG_CBT',
    'data_destroy': 'VDI_CONFIG_CBT',
    'list_changed_blocks': 'VDI_CONFIG_CBT',
    'mirror': 'VDI_MIRROR',
    'revert_to': '',
    'revert_from': '',
    'copy': '',
    'forget': '',
}
# These need the disk for themselves.
ALONE = ('destroy', 'resize', 'set_on_boot', 'forget', 'revert_to')
OF_DATA = (
    'snapshot', 'clone', 'copy', 'resize', 'mirror', 'set_on_boot',
    'revert_to', 'revert_from',
)
# Newer operations are left out of what is allowed, on purpose.
UNTOLD = ('mirror', 'revert_to', 'revert_from')
OF_THE_REPOSITORY = {  # what is marked on the SR meanwhile
    name: f'vdi_{name}' for name in (
        'snapshot', 'clone', 'destroy', 'resize', 'set_on_boot')
}


def assert_valid(pool: Pool, vdi: str, operation: str) -> dict[str, Any]:
    """Return a VDI's row if something may be done to it.

    :raises Failure: why it may not
    """
    row = pool.rows.get('VDI', vdi)
    for failure in refusals(Around(pool, vdi, row), vdi, row, operation):
        raise failure
    return row


class Around:
    """What stands around a VDI, looked up once for all operations."""

    def __init__(self, pool: Pool, vdi: str, row: dict[str, Any]) -> None:
        self.is_plugged = bool(pool.sm.hosts(row['SR']))
        self.is_used = bool(storage.active_vbds(pool, vdi))
        self.kind = str(pool.rows.field('SR', row['SR'], 'type'))
        self.features = storage.features(pool, self.kind)
        self.is_copied = 'copy' in pool.operations.current('VDI', vdi)


def refusals(
    around: Around, vdi: str, row: dict[str, Any], operation: str,
) -> Iterator[Failure]:
    """Yield what is against it, in the order that the server looks."""
    if not row['managed']:
        yield Failure('VDI_NOT_MANAGED', vdi)
    if row['type'] == CBT_METADATA and operation in OF_DATA:
        yield Failure('VDI_INCOMPATIBLE_TYPE', vdi, row['type'])
    if operation == 'forget':
        if row['type'] == 'rrd':
            yield Failure('VDI_HAS_RRDS', vdi)
    elif not around.is_plugged:
        yield Failure('SR_HAS_NO_PBDS', row['SR'])
    if operation in ALONE and around.is_used:
        yield Failure('VDI_IN_USE', vdi, operation)
    feature = FEATURES[operation]
    if feature and feature not in around.features:
        yield Failure('SR_OPERATION_NOT_SUPPORTED', row['SR'])
    if operation in ('mirror', 'set_on_boot') and row['cbt_enabled']:
        yield Failure('VDI_CBT_ENABLED', vdi)
    if operation == 'destroy' and around.kind == 'udev':
        yield Failure('VDI_IS_A_PHYSICAL_DEVICE', vdi)
    if operation == 'snapshot':
        yield from _of_snapshot(around, vdi, row)


def _of_snapshot(
    around: Around, vdi: str, row: dict[str, Any],
) -> Iterator[Failure]:
    if row['sharable']:
        yield Failure('VDI_IS_SHARABLE', vdi)
    if row['on_boot'] == 'reset':
        yield Failure('VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION')
    if around.is_copied:
        yield Failure(
            'OPERATION_NOT_ALLOWED',
            'Snapshot operation not allowed during copy.')


@registry.computed('VDI', 'allowed_operations')
def allowed(pool: Pool, vdi: str, stored: dict[str, Any]) -> list[str]:
    """Return what would not be refused now."""
    if pool.operations.current('VDI', vdi):
        return []
    around = Around(pool, vdi, stored)
    return [
        operation for operation in FEATURES
        if operation not in UNTOLD
        and next(refusals(around, vdi, stored, operation), None) is None
    ]


@registry.computed('SR', 'allowed_operations')
def allowed_on_sr(pool: Pool, sr: str, stored: dict[str, Any]) -> list[str]:
    """Return what an SR could begin now."""
    if pool.operations.current('SR', sr):
        return []
    found = ['forget', 'destroy', 'plug', 'unplug', 'pbd_create',
             'pbd_destroy', 'scan']
    known = storage.features(pool, stored['type'])
    names = {
        'VDI_CREATE': 'vdi_create', 'VDI_DELETE': 'vdi_destroy',
        'VDI_RESIZE': 'vdi_resize', 'VDI_CLONE': 'vdi_clone',
        'VDI_SNAPSHOT': 'vdi_snapshot', 'VDI_INTRODUCE': 'vdi_introduce',
        'VDI_MIRROR': 'vdi_mirror', 'SR_UPDATE': 'update',
        'VDI_CONFIG_CBT': 'vdi_enable_cbt',
    }
    return found + [name for key, name in names.items() if key in known]
