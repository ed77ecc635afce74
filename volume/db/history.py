# SPDX-License-Identifier: Apache-2.0
"""Make a copy of the database safe to go back to.

A copy remembers jobs that have gone on since. Were they run again from an
old step, they would fill, revert or delete what hosts have used meanwhile.
So a backup holds no open job: its rows say what was under way, and a person
decides.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.orm import Session

from volume.db import models

REASON = 'a job was open when this backup of the database was made'
AFTER = {
    'creating': 'error', 'downloading': 'error', 'managing': 'error_managing',
    'deleting': 'error_deleting', 'extending': 'error_extending',
    'reverting': 'error_reverting', 'unmanaging': 'error',
    'flattening': 'available', 'uploading': 'error',
}


def end_open_jobs(session: Session, now: float) -> int:
    """End every open job as failed, its rows as in error; return how many.

    No claim is given back: deleting the volume does that.
    """
    jobs = session.scalars(
        select(models.Job).where(models.Job.state == 'open')
    ).all()
    for job in jobs:
        job.state, job.ended_at = 'failed', now
        job.owner, job.expires_at = None, 0.0
        job.error_kind, job.error = 'Unknown', REASON
        if job.kind == 'upload':
            _set(session, job, 'uploading', job.args['status'])
    for table in models.Volume, models.Snapshot:
        for before, after in AFTER.items():
            session.execute(
                update(table)
                .where(table.status == before, table.deleted_at.is_(None))
                .values(status=after, reason=REASON)
                .execution_options(synchronize_session=False)
            )
        session.execute(
            update(table).where(table.lease_shared > 0)
            .values(lease_shared=0)
            .execution_options(synchronize_session=False)
        )
    return len(jobs)


def _set(
    session: Session, job: models.Job, before: str, after: str
) -> None:
    session.execute(
        update(models.Volume)
        .where(
            models.Volume.id == job.volume_id, models.Volume.status == before
        )
        .values(status=after)
        .execution_options(synchronize_session=False)
    )
