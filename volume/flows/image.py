# SPDX-License-Identifier: Apache-2.0
"""Upload a volume to an image file; it is the same volume afterwards."""

from __future__ import annotations

from volume import errors
from volume import journal
from volume.flows import fill
from volume.flows import rows
from volume.journal import Effect
from volume.journal import Job


def upload(job: Job) -> Effect:
    url = job.args['url']
    with job.backend.guard('upload'):
        job.answer['image'] = fill.upload(
            job.backend.need(), job.volume(), job.source_for(url), url,
            format=job.args['format'], node=job.node, watch=job.watch,
            spool_directory=job.spool_directory,
            token=f'{job.row.id}-{job.row.token}',
            rate_bytes_per_s=job.rate_bytes_per_s,
        )
    return rows.volume(job, status=job.args['status'], reason='')


def _failed(job: Job, error: errors.VolumeError) -> Effect:
    return rows.volume(
        job, status=job.args['status'],
        reason=f'it was not uploaded: {error}',
    )


UPLOAD = journal.Flow('upload', (journal.Step(upload),), failed=_failed)
