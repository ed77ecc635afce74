# SPDX-License-Identifier: Apache-2.0
"""Make a volume ours that is on the storage already; let go of one."""

from __future__ import annotations

from sqlalchemy.orm import Session

from volume import errors
from volume import journal
from volume import model
from volume import placement
from volume.db import claims
from volume.db import models
from volume.flows import rows
from volume.flows import sidecar
from volume.journal import Effect
from volume.journal import Job


def measure(job: Job) -> Effect:
    """Look how large the foreign thing is, and claim that much."""
    row = job.volume_row()
    found = _find(job, job.args['handle'])
    candidate = placement.Candidate(
        backend=row.backend, name=row.pool,
        device=job.args.get('device', ''),
        granularity_bytes=job.args.get('granularity_bytes', 512),
    )
    wish = placement.Wish(size_bytes=found.size_bytes)
    claimed = placement.claim_bytes(candidate, wish)

    def effect(session: Session) -> None:
        if row.claimed_bytes:
            return
        if not claims.claim(session, candidate, claimed):
            raise errors.NoSpace(
                f'pool {row.backend}#{row.pool} cannot promise {claimed} '
                'bytes for it; delete something in it, or add storage'
            )
        rows.change(
            job, session, models.Volume, row.id, claimed_bytes=claimed,
            size_bytes=found.size_bytes,
        )
        job.known.pop(row.id, None)  # the row has changed

    return effect


def take(job: Job) -> Effect:
    handle = job.backend.call('adopt', job.args['handle'], job.volume())
    sidecar.write(job)
    return rows.volume(
        job, status='available', handle=handle, reason='',
        launched_at=job.db.clock(),
    )


def let_go(job: Job) -> None:
    """Undo an adoption: the bytes stay, under a foreign name."""
    job.backend.call('disown', job.volume())


def _not_adopted(job: Job, error: errors.VolumeError) -> Effect:
    row = job.volume_row()

    def effect(session: Session) -> None:
        rows.change(
            job, session, models.Volume, row.id, status='error_managing',
            reason=str(error), claimed_bytes=0,
        )
        claims.give_back(session, row.backend, row.pool, row.claimed_bytes)

    return effect


def disown(job: Job) -> Effect:
    job.backend.call('disown', job.volume())
    row = job.volume_row()
    return lambda session: rows.bury(job, session, row)


def _not_disowned(job: Job, error: errors.VolumeError) -> Effect:
    return rows.volume(
        job, status='available', reason=f'it was not let go of: {error}'
    )


def _find(job: Job, handle: str) -> model.Found:
    row = job.volume_row()
    with job.backend.guard('scan'):
        for found in job.backend.need().scan(row.pool):
            if found.id == row.id and found.snapshot_of is None:
                return found  # taken before a crash
            if found.handle == handle and found.id is None:
                return found
    raise errors.NotFound(
        f'pool {row.backend}#{row.pool} has nothing foreign named {handle!r}'
    )


ADOPT = journal.Flow(
    'adopt',
    (journal.Step(measure), journal.Step(take, undo=let_go)),
    failed=_not_adopted,
)
DISOWN = journal.Flow(
    'disown', (journal.Step(disown),), failed=_not_disowned
)
