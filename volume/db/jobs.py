# SPDX-License-Identifier: Apache-2.0
"""Jobs as managers see them: due ones, take-over, renewal, retention."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import delete
from sqlalchemy import exists
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.orm import Session

from volume.db import models

BATCH = 500


def due(
    session: Session, backends: Collection[str], host: str, now: float
) -> list[models.Job]:
    """Return jobs that nobody runs and whose time has come, oldest first.

    A job whose lease has run out on another node is not among them unless
    an operator has fenced that node: its storage lock cannot be proved from
    here.
    """
    jobs, services = models.Job, models.Service
    return list(session.scalars(
        select(jobs)
        .where(
            jobs.state == 'open',
            jobs.due_at <= now,
            jobs.expires_at < now,
            jobs.backend.in_(backends),
            or_(
                jobs.owner.is_(None),
                jobs.owner_host == host,
                exists().where(
                    services.host == jobs.owner_host,
                    services.is_fenced.is_(True),
                ),
            ),
        )
        .order_by(jobs.due_at)
        .limit(BATCH)
    ))


def take(
    session: Session,
    job: models.Job,
    owner: str,
    host: str,
    now: float,
    lease_s: float,
) -> bool:
    """Take a due job over; say whether nobody was faster."""
    done = session.execute(
        update(models.Job)
        .where(
            models.Job.id == job.id,
            models.Job.token == job.token,
            models.Job.state == 'open',
            models.Job.expires_at < now,
        )
        .values(
            owner=owner, owner_host=host, token=job.token + 1,
            expires_at=now + lease_s, updated_at=now,
        )
        .execution_options(synchronize_session=False)
    )
    return bool(done.rowcount)  # type: ignore[attr-defined]


def renew(
    session: Session, owner: str, job_ids: Sequence[str], until: float
) -> None:
    """Keep those of these jobs that this owner holds."""
    for start in range(0, len(job_ids), BATCH):
        session.execute(
            update(models.Job)
            .where(
                models.Job.id.in_(job_ids[start:start + BATCH]),
                models.Job.owner == owner,
                models.Job.state == 'open',
            )
            .values(expires_at=until)
            .execution_options(synchronize_session=False)
        )


def release(session: Session, owner: str) -> None:
    """Give every job back that this owner still holds."""
    session.execute(
        update(models.Job)
        .where(models.Job.owner == owner, models.Job.state == 'open')
        .values(owner=None, expires_at=0.0)
        .execution_options(synchronize_session=False)
    )


def void_earlier(session: Session, owner: str, host: str) -> None:
    """Void the leases of this node's earlier incarnations, at once.

    The caller holds the state directory's lock, so none of them lives.
    """
    session.execute(
        update(models.Job)
        .where(
            models.Job.owner_host == host,
            models.Job.owner != owner,
            models.Job.state == 'open',
        )
        .values(expires_at=0.0)
        .execution_options(synchronize_session=False)
    )


def forget(session: Session, before: float) -> int:
    """Remove ended jobs and tombstones that are older than the retention."""
    count = 0
    for table, column in (
        (models.Job, models.Job.ended_at),
        (models.Snapshot, models.Snapshot.deleted_at),
        (models.Volume, models.Volume.deleted_at),
    ):
        done = session.execute(
            delete(table).where(column.is_not(None), column < before)
            .execution_options(synchronize_session=False)
        )
        count += done.rowcount  # type: ignore[attr-defined]
    return count


def put_off(
    session: Session, job: models.Job, owner: str, due_at: float
) -> None:
    """Give a job back that could not be run, to be tried later."""
    session.execute(
        update(models.Job)
        .where(
            models.Job.id == job.id,
            models.Job.owner == owner,
            models.Job.state == 'open',
        )
        .values(owner=None, expires_at=0.0, due_at=due_at)
        .execution_options(synchronize_session=False)
    )
