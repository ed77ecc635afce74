# SPDX-License-Identifier: Apache-2.0
"""Take and release the right to touch a volume or snapshot.

A lease and the status it goes with change in one conditional UPDATE: of two
requests at once exactly one finds the row as it must be. An exclusive lease
needs the row for itself; a shared one may be held by several jobs.

An exclusive lease lives as long as the job that it names is open: to end the
job is to release it, with no statement of its own, and no crash can leave
one behind. (PostgreSQL must run at REPEATABLE READ for this: at READ
COMMITTED a blocked UPDATE would look for the job in its old snapshot; and
MariaDB with innodb_snapshot_isolation, see ``dialects.py``.)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy import func
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.orm import Session

from volume.db import models

Leased = type[models.Volume] | type[models.Snapshot]


def take(
    session: Session,
    table: Leased,
    row_id: str,
    job_id: str,
    statuses: Collection[str],
    **values: Any,
) -> bool:
    """Take the row for one job alone, if its status is one of these."""
    done = session.execute(
        update(table)
        .where(
            table.id == row_id,
            table.status.in_(statuses),
            table.deleted_at.is_(None),
            free(table),
            table.lease_shared == 0,
        )
        .values(lease_job=job_id, **values)
        .execution_options(synchronize_session=False)
    )
    return bool(done.rowcount)  # type: ignore[attr-defined]


def take_many(
    session: Session,
    table: Leased,
    row_ids: Collection[str],
    job_id: str,
    statuses: Collection[str],
) -> None:
    """Take those rows for one job alone that can be taken as by ``take``.

    Which they are, their ``lease_job`` says.
    """
    session.execute(
        update(table)
        .where(
            table.id.in_(row_ids),
            table.status.in_(statuses),
            table.deleted_at.is_(None),
            free(table),
            table.lease_shared == 0,
        )
        .values(lease_job=job_id)
        .execution_options(synchronize_session=False)
    )


def share(
    session: Session, table: Leased, row_id: str, statuses: Collection[str]
) -> bool:
    """Take the row for reading, if its status is one of these."""
    done = session.execute(
        update(table)
        .where(
            table.id == row_id,
            table.status.in_(statuses),
            table.deleted_at.is_(None),
            free(table),
        )
        .values(lease_shared=table.lease_shared + 1)
        .execution_options(synchronize_session=False)
    )
    return bool(done.rowcount)  # type: ignore[attr-defined]


def move(
    session: Session,
    table: Leased,
    row_id: str,
    statuses: Collection[str],
    **values: Any,
) -> bool:
    """Change a row that no job holds; no lease is left behind."""
    done = session.execute(
        update(table)
        .where(
            table.id == row_id,
            table.status.in_(statuses),
            table.deleted_at.is_(None),
            free(table),
        )
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    return bool(done.rowcount)  # type: ignore[attr-defined]


def change(
    session: Session, table: Leased, row_id: str, job_id: str, **values: Any
) -> bool:
    """Change a row that this job holds; say whether it still did."""
    done = session.execute(
        update(table)
        .where(table.id == row_id, table.lease_job == job_id)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    return bool(done.rowcount)  # type: ignore[attr-defined]


def unshare(session: Session, table: Leased, row_id: str) -> None:
    """Give back one shared lease."""
    session.execute(
        update(table)
        .where(table.id == row_id, table.lease_shared > 0)
        .values(lease_shared=table.lease_shared - 1)
        .execution_options(synchronize_session=False)
    )


def free(table: Leased) -> ColumnElement[bool]:
    """Return the condition that no open job holds the row.

    The job is looked up by its id alone: MariaDB tells a transaction that a
    row has changed since it read it only where it comes to that row itself,
    not where an index of states has no entry for it any more.
    """
    state = (
        select(models.Job.state).where(models.Job.id == table.lease_job)
        .scalar_subquery()
    )
    return or_(table.lease_job.is_(None), func.coalesce(state, '') != 'open')


def gone(session: Session, ids: Collection[str]) -> set[str]:
    """Return those ids of volumes, snapshots and uploads that are over.

    What this database does not know at all is none of them: it may be
    another's.
    """
    over: set[str] = set()
    for table in models.Volume, models.Snapshot:
        over.update(session.scalars(select(table.id).where(
            table.id.in_(ids), table.deleted_at.is_not(None)
        )))
    # The moment that an upload keeps has the id of its job.
    over.update(session.scalars(select(models.Job.id).where(
        models.Job.id.in_(ids), models.Job.kind == 'upload',
        models.Job.state != 'open',
    )))
    return over
