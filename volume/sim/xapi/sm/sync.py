# SPDX-License-Identifier: Apache-2.0
"""What a driver told, written into the rows of SR and VDI."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TYPE_CHECKING

from volume.sim.xapi.disk import cbt
from volume.sim.xapi.failure import NULL

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.sm.base import Info
    from volume.sim.xapi.sm.base import Manager

# What a driver says of a VDI; other keys of sm_config are the client's.
DRIVERS_KEYS = frozenset({'vhd-parent', 'vdi_type', 'image-format'})


def add(pool: Pool, sr: str, info: Info, **fields: Any) -> str:
    """Add a VDI's row: what the driver says, and what the caller says."""
    rows = pool.rows
    row: dict[str, Any] = {
        'name_label': info.name,
        'name_description': info.description,
        'type': 'user',
        'sharable': False,
        'read_only': info.read_only,
        'other_config': {},
        'is_a_snapshot': info.is_a_snapshot,
        'snapshot_of': _ref(pool, info.snapshot_of),
        **fields,
    }
    return rows.new(
        'VDI', uuid=info.uuid, SR=sr, location=info.location,
        virtual_size=info.size_bytes, physical_utilisation=info.used_bytes,
        sm_config=dict(info.sm_config), managed=info.managed,
        missing=False, storage_lock=False, parent=NULL, **row,
    )


def refresh(pool: Pool, vdi: str, info: Info) -> None:
    """Bring a row to what the driver says; names and marks stay."""
    old = pool.rows.field('VDI', vdi, 'sm_config')
    kept = {k: v for k, v in old.items() if k not in DRIVERS_KEYS}
    pool.rows.update(
        'VDI', vdi, virtual_size=info.size_bytes,
        physical_utilisation=info.used_bytes, managed=info.managed,
        location=info.location, missing=False,
        sm_config={**kept, **info.sm_config},
    )


def put(pool: Pool, sr: str, info: Info) -> str:
    """Add a VDI's row or bring it to what the driver says."""
    found = pool.rows.find('VDI', uuid=info.uuid, SR=sr)
    if not found:
        return add(pool, sr, info)
    refresh(pool, found[0], info)
    return found[0]


def replace_all(pool: Pool, sr: str, infos: Iterable[Info]) -> None:
    """Make the rows of an SR what a scan found: by location."""
    rows = pool.rows
    there = {info.location: info for info in infos}
    for vdi in rows.find('VDI', SR=sr):
        info = there.pop(rows.field('VDI', vdi, 'location'), None)
        if info is not None:
            refresh(pool, vdi, info)
        elif rows.field('VDI', vdi, 'type') != 'cbt_metadata':
            # Of that the data was destroyed, and what changed was kept.
            cbt.logs(pool).delete(rows.field('VDI', vdi, 'uuid'))
            remove(pool, vdi)
    for info in there.values():
        add(pool, sr, info)


def remove(pool: Pool, vdi: str) -> None:
    """Remove a VDI's row and the VBDs that are not plugged."""
    for vbd in pool.rows.find('VBD', VDI=vdi):
        if not pool.rows.field('VBD', vbd, 'currently_attached'):
            pool.rows.delete('VBD', vbd)
    pool.rows.delete('VDI', vdi)


def sizes(pool: Pool, sr: str, manager: Manager) -> None:
    """Bring an SR's three sizes to what the driver says."""
    found = manager.sizes()
    pool.rows.update(
        'SR', sr, physical_size=found.physical_size,
        physical_utilisation=found.physical_utilisation,
        virtual_allocation=found.virtual_allocation,
    )


def _ref(pool: Pool, uuid: str) -> str:
    found = pool.rows.find('VDI', uuid=uuid) if uuid else []
    return found[0] if found else NULL
