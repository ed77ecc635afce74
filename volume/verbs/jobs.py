# SPDX-License-Identifier: Apache-2.0
"""What a person can do about a job: look, cancel, try again."""

from __future__ import annotations

from sqlalchemy import update
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.verbs import rows

CANCELLABLE = frozenset({
    'create', 'create_filled', 'upload', 'flatten', 'snapshot', 'adopt',
    'attach', 'restore', 'delete', 'delete_snapshot',
})


def get(core: Core, caller: Caller, job_id: str) -> models.Job:
    """Return a job that the caller may see.

    :raises NotFound: there is none, or it is another project's
    """
    row = core.db.read(
        lambda s: s.get(models.Job, ids.check(job_id, 'job id'))
    )
    if row is None or not rows.sees(caller, row):
        raise errors.NotFound(f'job {job_id} could not be found')
    return row


def cancel(core: Core, caller: Caller, job_id: str) -> None:
    """Ask a job to stop and be undone; it stops at its next step or report.

    :raises Invalid: it has ended, or its kind cannot be stopped halfway
    """

    def accept(session: Session) -> models.Job:
        row = _open(session, caller, job_id)
        if row.kind not in CANCELLABLE:
            raise errors.Invalid(
                f'job {row.id} is {row.kind}, which cannot be cancelled; it '
                'ends by itself'
            )
        if row.direction == 'undo':
            raise errors.Invalid(
                f'job {row.id} is being undone already; wait for its end'
            )
        session.execute(
            update(models.Job)
            .where(models.Job.id == row.id, models.Job.state == 'open')
            .values(cancel=True, due_at=core.db.clock())
            .execution_options(synchronize_session=False)
        )
        return row

    wake(core, core.db.write(accept))


def retry(core: Core, caller: Caller, job_id: str) -> None:
    """Try a waiting job now, and give it its full time again.

    A job that has failed is over; ask for the same verb again.

    :raises Invalid: it has ended
    """

    def accept(session: Session) -> models.Job:
        row = _open(session, caller, job_id)
        now = core.db.clock()
        session.execute(
            update(models.Job)
            .where(models.Job.id == row.id, models.Job.state == 'open')
            .values(
                due_at=now, attempts=0,
                give_up_at=now + core.settings.job_retry_s,
            )
            .execution_options(synchronize_session=False)
        )
        return row

    wake(core, core.db.write(accept))


def wake(core: Core, row: models.Job) -> None:
    """Have a job looked for that is due; whoever runs it goes on.

    The row was read a moment ago: it may have been let go of or ended
    since, so that only a sweep may take it.
    """
    row.owner = None
    core.hint(row)


def _open(session: Session, caller: Caller, job_id: str) -> models.Job:
    row = session.get(models.Job, ids.check(job_id, 'job id'))
    if row is None or not rows.sees(caller, row):
        raise errors.NotFound(f'job {job_id} could not be found')
    if row.state != 'open':
        raise errors.Invalid(
            f'job {row.id} has ended: it is {row.state}; ask for the same '
            'thing again'
        )
    return row
