# SPDX-License-Identifier: Apache-2.0
"""Jobs as managers see them: due ones, take-over, renewal, retention."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import and_
from sqlalchemy import ColumnElement
from sqlalchemy import delete
from sqlalchemy import exists
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.orm import Session

from volume.db import models

BATCH = 500
ENDED = ('done', 'failed', 'cancelled')
OPENS = frozenset({'attach', 'restore'})
"""Kinds of jobs that open a volume on a node, and leave it open there."""


def due(
    session: Session, backends: Collection[str], host: str, now: float
) -> list[models.Job]:
    """Return jobs that nobody runs and whose time has come, oldest first.

    A job whose lease has run out on another node is not among them unless
    an operator has fenced that node: its storage lock cannot be proved from
    here. (What has ended on this machine was released before, see
    ``takeover``.) Nor is a job of a volume that is open on another node.
    """
    jobs = models.Job
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
                is_fenced(jobs.owner_host),
            ),
            or_(jobs.node.in_(('', host)), is_fenced(jobs.node)),
        )
        .order_by(jobs.due_at)
        .limit(BATCH)
    ))


def is_fenced(host: InstrumentedAttribute[str]) -> ColumnElement[bool]:
    """Return the condition that an operator has fenced a node."""
    services = models.Service
    return exists().where(
        services.host == host, services.is_fenced.is_(True)
    )


def take(
    session: Session,
    job: models.Job,
    owner: str,
    host: str,
    now: float,
    lease_s: float,
) -> bool:
    """Take a due job over; say whether nobody was faster.

    What opens a volume for a host stays on the node that has begun it.
    """
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
            node=node_of(job.kind, job.node, host),
            expires_at=now + lease_s, updated_at=now,
        )
        .execution_options(synchronize_session=False)
    )
    return bool(done.rowcount)  # type: ignore[attr-defined]


def is_held(session: Session, job_id: str, owner: str, token: int) -> bool:
    """Say whether an owner has the job under this token; waits for others."""
    return session.scalar(
        select(models.Job.token)
        .where(models.Job.id == job_id, models.Job.owner == owner)
        .with_for_update()
    ) == token


def node_of(kind: str, node: str, host: str) -> str:
    """Return where a job must run from now on that ``host`` takes."""
    return host if node or kind in OPENS else ''


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


def release(session: Session, owner: str) -> int:
    """Give every job back that this owner still holds; return how many.

    ``owner_host`` stays: if the owner has died, whoever takes such a job
    ends its helpers first.
    """
    done = session.execute(
        update(models.Job)
        .where(models.Job.owner == owner, models.Job.state == 'open')
        .values(owner=None, expires_at=0.0)
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount)  # type: ignore[attr-defined]


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


def forget(session: Session, before: float, limit: int = BATCH) -> int:
    """Remove some of what is older than the retention; return how many.

    Ended jobs and tombstones, at most ``limit``: nobody waits long for the
    database meanwhile. Zero says that nothing is left to remove.
    """
    for table, is_old in (
        (models.Job, and_(
            models.Job.state.in_(ENDED), models.Job.ended_at < before
        )),
        (models.Snapshot, models.Snapshot.deleted_at < before),
        (models.Volume, models.Volume.deleted_at < before),
    ):
        key: Any = table.id
        old = session.scalars(select(key).where(is_old).limit(limit)).all()
        if old:
            done = session.execute(
                delete(table).where(key.in_(old))
                .execution_options(synchronize_session=False)
            )
            return int(done.rowcount)  # type: ignore[attr-defined]
    return 0


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
