# SPDX-License-Identifier: Apache-2.0
"""What flows say of their rows: effects that only the lease's holder has."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from volume.db import claims
from volume.db import leases
from volume.db import models
from volume.journal import Effect
from volume.journal import Job
from volume.journal import LeaseLost

REASON_MAX = 1000


def volume(job: Job, **values: Any) -> Effect:
    """Return the effect that changes the job's volume."""
    volume_id = job.row.volume_id or ''

    def effect(session: Session) -> None:
        change(job, session, models.Volume, volume_id, **values)

    return effect


def snapshot(job: Job, **values: Any) -> Effect:
    """Return the effect that changes the job's snapshot."""
    snapshot_id = job.row.snapshot_id or ''

    def effect(session: Session) -> None:
        change(job, session, models.Snapshot, snapshot_id, **values)

    return effect


def change(
    job: Job,
    session: Session,
    table: leases.Leased,
    row_id: str,
    **values: Any,
) -> None:
    """Change a row that the job holds.

    :raises LeaseLost: the job does not hold it
    """
    if 'reason' in values:
        values['reason'] = values['reason'][:REASON_MAX]
    if not leases.change(
        session, table, row_id, job.row.id,
        updated_at=job.db.clock(), **values,
    ):
        raise LeaseLost(
            f'job {job.row.id} does not hold {table.__name__} {row_id}'
        )


def bury(
    job: Job,
    session: Session,
    row: models.Volume | models.Snapshot,
) -> None:
    """Make the row a tombstone, and give back what it claimed."""
    change(
        job, session, type(row), row.id, status='deleted', claimed_bytes=0,
        deleted_at=job.db.clock(), reason='',
    )
    claims.give_back(session, row.backend, row.pool, row.claimed_bytes)
