# SPDX-License-Identifier: Apache-2.0
"""Whether rows, storage, claims, leases and exports of a service agree."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from volume.db import models
from volume.service import Service

LASTING = {
    'available', 'in-use', 'error', 'attaching', 'reserved', 'detaching',
}


def disagreements(service: Service) -> list[str]:
    """Return what is wrong once no job runs; nothing, if all is well."""
    wrong: list[str] = []

    def every(table: Any) -> list[Any]:
        return service.db.read(lambda s: list(s.scalars(select(table))))

    rows = [*every(models.Volume), *every(models.Snapshot)]
    live = [row for row in rows if row.deleted_at is None]
    for row in live:
        if row.status not in LASTING:
            wrong.append(f'{row.id} stays {row.status}: {row.reason}')
        if row.lease_shared:
            wrong.append(f'{row.id} stays shared {row.lease_shared}')
    wrong += [
        f'job {row.id} {row.kind} stays open: {row.error}'
        for row in every(models.Job) if row.state == 'open'
    ]
    for pool in every(models.Pool):
        claimed = sum(
            row.claimed_bytes for row in rows
            if (row.backend, row.pool) == (pool.backend, pool.name)
        )
        if pool.claimed_bytes != claimed:
            wrong.append(f'{pool.name}: {pool.claimed_bytes} != {claimed}')
    for device in every(models.Device):
        claimed = sum(
            pool.claimed_bytes for pool in every(models.Pool)
            if pool.device == device.name
        )
        if device.claimed_bytes != claimed:
            wrong.append(f'{device.name}: {device.claimed_bytes}')
    for backend in service.runner.backends.values():
        stored = {
            found.id: found.size_bytes for pool in backend.pools
            for found in backend.need().scan(pool) if found.id
        }
        held = {
            row.id for row in live
            if row.backend == backend.name and row.status != 'error'
        }
        if stored.keys() != held:
            wrong.append(
                f'{backend.name}: {stored.keys() ^ held} on one side only')
        # A host sees all that is stored, and copies have all of the row's.
        wrong += [
            f'{row.id} has {row.size_bytes} bytes, stored {stored[row.id]}'
            for row in live if isinstance(row, models.Volume)
            and row.id in held & stored.keys()
            and row.size_bytes != stored[row.id]
        ]
        connected = {
            row.id for row in every(models.Attachment)
            if row.is_connected and row.backend == backend.name
        }
        if backend.exporter and backend.exporter.exported() != connected:
            wrong.append(f'{backend.name}: exports differ from attachments')
    return wrong
