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
        _tell_storage(job, model.IoLimits(iops, bytes_per_s))
    return rows.volume(
        job, iops_limit=iops, bytes_per_s_limit=bytes_per_s, reason=''
    )


def _tell_storage(job: Job, limits: model.IoLimits) -> None:
    """Set them, and remember from before the first call that they may be set.

    Nothing else tells of them later, for storage is never asked for its
    limits; and a call may be the last thing that a process does, or be
    followed by others that fail otherwise. So only a first call that says
    that nothing happened is proof of it.
    """
    is_first = not job.args.get('may_be_set')
    _remember(job, True)
    try:
        job.backend.call('limit', job.volume(), limits)
    except errors.Unknown:
        raise
    except errors.VolumeError:
        if is_first:
            _remember(job, False)
        raise


def _remember(job: Job, may_be_set: bool) -> None:
    args = {**job.args, 'may_be_set': may_be_set}
    job.db.write(lambda session: job.fenced(session, args=args))


def _not_limited(job: Job, error: errors.VolumeError) -> Effect:
    asked = ', '.join(
        f'{name} {job.args[name] or "unlimited"}'
        for name in ('iops', 'bytes_per_s')
    )
    if job.args.get('may_be_set'):
        reason = (
            f'its storage may or may not keep to its new limits ({asked}): '
            f'set them again: {error}'
        )
    else:
        reason = f'its new limits ({asked}) were not set: {error}'
    return rows.volume(job, reason=reason)


FLOW = journal.Flow('limit', (journal.Step(limit),), failed=_not_limited)
