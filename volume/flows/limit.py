# SPDX-License-Identifier: Apache-2.0
"""Bound how fast a volume may be used."""

from __future__ import annotations

from volume import errors
from volume import journal
from volume import model
from volume.flows import rows
from volume.journal import Effect
from volume.journal import Job


def limit(job: Job) -> Effect:
    iops, bytes_per_s = job.args['iops'], job.args['bytes_per_s']
    if job.args['native']:
        job.backend.call(
            'limit', job.volume(), model.IoLimits(iops, bytes_per_s)
        )
    return rows.volume(
        job, iops_limit=iops, bytes_per_s_limit=bytes_per_s, reason=''
    )


def _not_limited(job: Job, error: errors.VolumeError) -> Effect:
    reason = f'it was not limited: {error}'
    if job.args['native'] and isinstance(error, errors.Unknown):
        reason = (
            'which limits it has on its storage is not known, set them '
            f'again: {error}'
        )
    return rows.volume(job, reason=reason)


FLOW = journal.Flow('limit', (journal.Step(limit),), failed=_not_limited)
