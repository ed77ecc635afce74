# SPDX-License-Identifier: Apache-2.0
"""Change a volume in place: extend, revert to a snapshot, flatten."""

from __future__ import annotations

import contextlib

from sqlalchemy import case
from sqlalchemy.orm import Session

from volume import errors
from volume import journal
from volume.db import claims
from volume.db import models
from volume.flows import attach
from volume.flows import fill
from volume.flows import rows
from volume.flows import sidecar
from volume.journal import Effect
from volume.journal import Job
from volume.verbs import access


def resize(job: Job) -> Effect:
    size_bytes = job.args['size_bytes']
    job.backend.call('resize', job.volume(), size_bytes)
    sidecar.write(job, size_bytes)
    attach.grow(job, size_bytes)
    return rows.volume(
        job, status=access.settled(), size_bytes=size_bytes, reason=''
    )


def _not_extended(job: Job, error: errors.VolumeError) -> Effect:
    """Believe the storage: it has grown, or not, or cannot be asked."""
    size_bytes, more_bytes = job.args['size_bytes'], job.args['claim_bytes']
    row = job.volume_row()
    try:
        found_bytes = job.backend.call('inspect', job.volume()).size_bytes
    except errors.VolumeError:
        # One that hosts use stays in use: it can still be detached.
        return rows.volume(
            job, reason=str(error), status=case(
                (access.settled() == 'available', 'error_extending'),
                else_=access.settled(),
            ),
        )
    if found_bytes >= size_bytes:
        # It has; at worst its hosts see that when they attach it anew.
        return rows.volume(
            job, status=access.settled(), size_bytes=size_bytes, reason=''
        )

    def effect(session: Session) -> None:
        rows.change(
            job, session, models.Volume, row.id, status=access.settled(),
            reason=f'it was not extended: {error}',
            claimed_bytes=models.Volume.claimed_bytes - more_bytes,
        )
        claims.give_back(session, row.backend, row.pool, more_bytes)

    return effect


def before_revert(job: Job) -> None:
    """Refuse, or fail, before a byte is written."""
    if not job.args['native']:
        job.backend.call('before_overwrite', job.volume())


def revert(job: Job) -> Effect:
    snapshot = job.snapshot()
    handle = job.volume_row().handle
    if job.args['native']:
        handle = job.backend.call('revert', snapshot)
    else:
        driver = job.backend.need()
        with job.backend.guard('copy'):
            fill.copy_volume(
                driver, snapshot, driver, job.volume(), node=job.node,
                watch=job.watch, rate_bytes_per_s=job.rate_bytes_per_s,
            )
    return rows.volume(job, status='available', handle=handle, reason='')


def _not_reverted(job: Job, error: errors.VolumeError) -> Effect:
    """Believe the storage: only it knows whether the volume is a mixture.

    A copy that failed leaves one, and a native revert may. So a volume is
    not to be used before it is reverted, unless the storage says that it is
    whole. What was a mixture before a revert that never began stays one,
    and what was none stays whole.
    """
    status = 'error_reverting'
    # A job of an earlier release has no such step: there it is the copy.
    if journal.failed_step(job) == 0 and job.args.get('looks_first'):
        status = job.args.get('status', 'available')
    elif job.args['native']:
        with contextlib.suppress(errors.VolumeError):
            found = job.backend.call('inspect', job.volume())
            if not found.is_torn:
                status = job.args.get('status', 'available')
    return rows.volume(
        job, status=status, reason=f'it was not reverted: {error}'
    )


def flatten(job: Job) -> Effect:
    size_bytes = job.volume_row().size_bytes

    def watch(percent: float) -> None:
        job.watch(int(size_bytes * percent / 100), size_bytes)

    handle = job.backend.call('flatten', job.volume(), watch)
    return rows.volume(job, status='available', handle=handle, reason='')


def _not_flattened(job: Job, error: errors.VolumeError) -> Effect:
    return rows.volume(
        job, status='available', reason=f'it was not flattened: {error}'
    )


EXTEND = journal.Flow('extend', (journal.Step(resize),), failed=_not_extended)
REVERT = journal.Flow(
    'revert', (journal.Step(before_revert), journal.Step(revert)),
    failed=_not_reverted,
)
FLATTEN = journal.Flow(
    'flatten', (journal.Step(flatten),), failed=_not_flattened
)
