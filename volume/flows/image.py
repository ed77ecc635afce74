# SPDX-License-Identifier: Apache-2.0
"""Upload a volume to an image file; it is the same volume afterwards.

What is attached is kept as a snapshot for as long as the upload takes, so
that the image holds one moment. The snapshot has the job's id and no row.
"""

from __future__ import annotations

from volume import errors
from volume import journal
from volume import model
from volume.flows import fill
from volume.flows import rows
from volume.journal import Effect
from volume.journal import Job


def freeze(job: Job) -> None:
    if _is_attached(job):
        job.backend.call('snapshot', _moment(job))


def thaw(job: Job) -> None:
    if _is_attached(job):
        job.backend.call('delete_snapshot', _moment(job))


def upload(job: Job) -> None:
    url = job.args['url']
    source = _moment(job) if _is_attached(job) else job.volume()
    with job.backend.guard('upload'):
        job.answer['image'] = fill.upload(
            job.backend.need(), source, job.source_for(url), url,
            format=job.args['format'], node=job.node, watch=job.watch,
            spool_directory=job.spool_directory,
            token=f'{job.row.id}-{job.row.token}',
            rate_bytes_per_s=job.rate_bytes_per_s,
        )


def finish(job: Job) -> Effect:
    thaw(job)
    return rows.volume(job, status=job.args['status'], reason='')


def _failed(job: Job, error: errors.VolumeError) -> Effect:
    return rows.volume(
        job, status=job.args['status'],
        reason=f'it was not uploaded: {error}',
    )


def _is_attached(job: Job) -> bool:
    return bool(job.args['status'] == 'in-use')


def _moment(job: Job) -> model.Snapshot:
    volume = job.volume()
    return model.Snapshot(job.row.id, volume, volume.size_bytes)


UPLOAD = journal.Flow(
    'upload',
    (
        journal.Step(freeze, undo=thaw),
        journal.Step(upload),
        journal.Step(finish, is_late=True),  # the image is published
    ),
    failed=_failed,
)
