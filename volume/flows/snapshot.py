# SPDX-License-Identifier: Apache-2.0
"""Take a snapshot of a volume, and delete one."""

from __future__ import annotations

from sqlalchemy.orm import Session

from volume import errors
from volume import journal
from volume.db import claims
from volume.db import models
from volume.flows import rows
from volume.journal import Effect
from volume.journal import Job
from volume.verbs.snapshots import usage


def take(job: Job) -> Effect:
    handle = job.backend.call('snapshot', job.snapshot())
    return rows.snapshot(job, status='available', handle=handle, reason='')


def drop(job: Job) -> None:
    job.backend.call('delete_snapshot', job.snapshot())


def _not_taken(job: Job, error: errors.VolumeError) -> Effect:
    row = job.snapshot_row()
    if not job.undone:
        return rows.snapshot(job, status='error', reason=str(error))

    def effect(session: Session) -> None:
        rows.change(
            job, session, models.Snapshot, row.id, status='error',
            reason=str(error), claimed_bytes=0,
        )
        claims.give_back(session, row.backend, row.pool, row.claimed_bytes)

    return effect


def remove(job: Job) -> Effect:
    drop(job)
    row = job.snapshot_row()
    return lambda session: rows.bury(job, session, row)


def _not_removed(job: Job, error: errors.VolumeError) -> Effect:
    was = job.args.get('status')
    is_whole = error.kind == 'Busy' and was in ('available', 'error')
    status = was if is_whole else 'error_deleting'
    return rows.snapshot(job, status=status, reason=str(error))


def _tell(event: str, status: str) -> journal.Ended:
    def ended(job: Job) -> None:
        payload = usage(job.snapshot_row())
        if job.row.state == 'done':
            payload['status'] = status
            job.notify(f'{event}.end', payload)
        else:
            payload['reason'] = job.row.error
            job.notify(f'{event}.error', payload)

    return ended


CREATE = journal.Flow(
    'snapshot', (journal.Step(take, undo=drop),), failed=_not_taken,
    ended=_tell('snapshot.create', 'available'),
)
DELETE = journal.Flow(
    'delete_snapshot', (journal.Step(remove),), failed=_not_removed,
    ended=_tell('snapshot.delete', 'deleted'),
)
