# SPDX-License-Identifier: Apache-2.0
"""Delete a volume, and with cascade its snapshots: storage, then rows."""

from __future__ import annotations

from sqlalchemy.orm import Session

from volume import errors
from volume import journal
from volume.db import models
from volume.drivers import base
from volume.flows import rows
from volume.journal import Effect
from volume.journal import Job
from volume.verbs.volumes import usage

# What a volume says that no job and no host will lead on.
LASTING = frozenset({
    'available', 'error', 'error_extending', 'error_managing',
    'error_reverting', 'error_flattening', 'error_attaching',
    'error_detaching', 'maintenance',
})


def remove(job: Job) -> Effect:
    snapshots = [
        job.snapshot_row(each) for each in job.args.get('snapshots', ())
    ]
    if isinstance(job.backend.need(), base.Snapshots):
        for each in snapshots:
            job.backend.call('delete_snapshot', job.snapshot(each.id))
    if job.args.get('status') == 'error_managing':
        # It is somebody's, and was never quite ours: its bytes stay.
        job.backend.call('disown', job.volume())
    else:
        job.backend.call('delete', job.volume())
    row = job.volume_row()

    def effect(session: Session) -> None:
        for each in snapshots:
            rows.bury(job, session, each)
        rows.bury(job, session, row)

    return effect


def _failed(job: Job, error: errors.VolumeError) -> Effect:
    # A volume that is in use was not touched: it is what it was. Any other
    # failure may have left half of it, and only deleting it again makes
    # sense; so it does of snapshots that went before it.
    was = job.args.get('status', '')
    is_whole = error.kind == 'Busy' and was in LASTING
    status = was if is_whole or was == 'error_managing' else (
        'error_deleting'
    )

    def effect(session: Session) -> None:
        rows.change(
            job, session, models.Volume, job.row.volume_id or '',
            status=status, reason=str(error),
        )
        for each in job.args.get('snapshots', ()):
            rows.change(
                job, session, models.Snapshot, each,
                status='error_deleting', reason=str(error),
            )

    return effect


def _ended(job: Job) -> None:
    payload = usage(job.volume_row())
    if job.row.state == 'done':
        payload['status'] = 'deleted'
        job.notify('volume.delete.end', payload)
    else:
        payload['reason'] = job.row.error
        job.notify('volume.delete.error', payload)


FLOW = journal.Flow(
    'delete', (journal.Step(remove),), failed=_failed, ended=_ended
)
