# SPDX-License-Identifier: Apache-2.0
"""Create a volume: look, provision, fill, publish.

What is filled (from an image, a snapshot or another volume) has a step for
it, so that a crash in a long copy goes on from there.
If the pool turns out to be full, the volume is placed anew in another one.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from volume import errors
from volume import journal
from volume import model
from volume import placement
from volume.db import claims
from volume.db import models
from volume.flows import fill
from volume.flows import rows
from volume.flows import sidecar
from volume.journal import Effect
from volume.journal import Job
from volume.verbs.volumes import usage


def look_first(job: Job) -> None:
    """Make sure that nothing is stored under the volume's name yet.

    If something is, its row was lost: a driver would take it for ours, and
    undoing this job would delete it.
    """
    try:
        found = job.backend.call('inspect', job.volume())
    except errors.NotFound:
        return
    raise errors.Conflict(
        f'backend {job.backend.name} has a volume {job.row.volume_id} '
        f'already, of {found.size_bytes} bytes, whose row was lost; '
        '"volume-manage reconcile --adopt" gives it one again'
    )


def create_empty(job: Job) -> Effect:
    handle = job.backend.call('create', sidecar.unborn(job))
    sidecar.write(job)
    return _publish(job, handle)


def provision(job: Job) -> Effect:
    source = _source(job)
    volume = job.volume()
    if source is not None and job.args['native']:
        handle = job.backend.call('clone', source, volume)
    else:
        handle = job.backend.call(
            'create', sidecar.unborn(job, is_filled=False)
        )
    sidecar.write(job, is_filled=False)
    job.known[volume.id].handle = handle
    is_image = bool(job.volume_row().image)
    return rows.volume(
        job, handle=handle, status='downloading' if is_image else 'creating'
    )


def fill_volume(job: Job) -> Effect:
    row = job.volume_row()
    handle = row.handle
    source = None if job.args['native'] else _source(job)
    if row.image or source is not None:
        if not _is_fresh(job):
            handle = _begin_anew(job)
        if row.image:
            _fill_from_image(job)
        else:
            _copy(job, source)
    sidecar.write(job)
    return _publish(job, handle)


def _begin_anew(job: Job) -> str:
    """Throw away what an earlier try has written, and return the handle.

    It was not flushed, and the machine may have lost power since: not even
    the layer's own tables can be believed.
    """
    unprovision(job)
    handle: str = job.backend.call(
        'create', sidecar.unborn(job, is_filled=False)
    )
    job.volume_row().handle = handle
    sidecar.write(job, is_filled=False)
    return handle


def _fill_from_image(job: Job) -> None:
    row = job.volume_row()
    with job.backend.guard('fill'):
        job.backend.refresh()
        pool = job.backend.pools.get(row.pool)
        fill.fill_from_image(
            job.backend.need(), job.volume(),
            job.source_for(row.image['url']), row.image['url'],
            declared_format=row.image.get('format'),
            checksum=row.image.get('checksum'),
            spool_directory=job.spool_directory,
            token=f'{job.row.id}-{job.row.token}',
            node=job.node,
            watch=job.watch,
            rate_bytes_per_s=job.rate_bytes_per_s,
            fresh=True,
            free_bytes=pool.free_bytes if pool else None,
        )


def _copy(job: Job, source: model.Volume | model.Snapshot | None) -> None:
    assert source is not None
    origin = job.backend_of(_source_row(job).backend)
    with job.backend.guard('copy'):
        fill.copy_volume(
            origin.need(), source, job.backend.need(), job.volume(),
            node=job.node, watch=job.watch,
            rate_bytes_per_s=job.rate_bytes_per_s, fresh=True,
        )


def _is_fresh(job: Job) -> bool:
    """Say whether nobody has written to the volume before this step."""
    return job.row.token == 1 and job.row.attempts == 0


def unprovision(job: Job) -> None:
    job.backend.call('delete', job.volume())


def _publish(job: Job, handle: str) -> Effect:
    return rows.volume(
        job, status='available', handle=handle, reason='',
        launched_at=job.db.clock(),
    )


def _failed(job: Job, error: errors.VolumeError) -> Effect:
    row = job.volume_row()
    # Where nothing of ours was ever stored, deleting the row must not touch
    # the storage: what has the name there is somebody else's.
    is_untouched = journal.failed_step(job) == 0
    if not job.undone and not is_untouched:
        return rows.volume(job, status='error', reason=str(error))
    place = {'backend': '', 'pool': ''} if is_untouched else {}

    def effect(session: Session) -> None:
        rows.change(
            job, session, models.Volume, row.id, status='error',
            reason=str(error), claimed_bytes=0, handle='', **place,
        )
        claims.give_back(session, row.backend, row.pool, row.claimed_bytes)

    return effect


def _again(job: Job, error: errors.VolumeError, session: Session) -> bool:
    """Place the volume in a pool that was not tried, if there is one."""
    row = job.volume_row()
    if error.kind != 'NoSpace' or row.snapshot_id or row.source_volume_id:
        return False
    tried = [*job.args.get('tried', []), [row.backend, row.pool]]
    wish = placement.Wish(
        size_bytes=row.size_bytes,
        tags=frozenset(row.wish['tags']),
        project_id=row.project_id,
        cluster=row.wish['cluster'],
        role=row.wish['role'],
        backend=row.wish['backend'] or row.volume_type,
        pool=row.wish['pool'],
    )
    pools = [
        pool for pool in claims.candidates(
            session, job.db.clock() - job.settings.service_down_s
        ) if [pool.backend, pool.name] not in tried
    ]
    while pools:
        try:
            chosen = placement.choose(pools, wish)
        except errors.NoSpace:
            return False
        size_bytes = placement.claim_bytes(chosen, wish)
        if claims.claim(session, chosen, size_bytes):
            break
        pools.remove(chosen)
    else:
        return False
    claims.give_back(session, row.backend, row.pool, row.claimed_bytes)
    rows.change(
        job, session, models.Volume, row.id, status='creating', handle='',
        backend=chosen.backend, pool=chosen.name, claimed_bytes=size_bytes,
        size_bytes=size_bytes,
    )
    job.row.backend = chosen.backend
    job.row.args = {**job.args, 'tried': tried}
    return True


def _ended(job: Job) -> None:
    volume = job.volume_row()
    payload = usage(volume)
    if job.row.state == 'done':
        payload['status'] = 'available'
        payload['launched_at'] = job.row.ended_at
        job.notify('volume.create.end', payload)
    else:
        payload['status'] = 'error'
        payload['reason'] = job.row.error
        job.notify('volume.create.error', payload)


def _source_row(job: Job) -> models.Volume | models.Snapshot:
    row = job.volume_row()
    if row.snapshot_id:
        return job.snapshot_row(row.snapshot_id)
    return job.volume_row(row.source_volume_id)


def _source(job: Job) -> model.Volume | model.Snapshot | None:
    row = job.volume_row()
    if row.snapshot_id:
        return job.snapshot(row.snapshot_id)
    if row.source_volume_id:
        return job.volume(row.source_volume_id)
    return None


EMPTY = journal.Flow(
    'create',
    (
        journal.Step(look_first),
        journal.Step(create_empty, undo=unprovision),
    ),
    failed=_failed, again=_again, ended=_ended,
)

FILLED = journal.Flow(
    'create_filled',
    (
        journal.Step(look_first),
        journal.Step(provision, undo=unprovision),
        journal.Step(fill_volume),  # unprovision throws the bytes away
    ),
    failed=_failed, again=_again, ended=_ended,
)
