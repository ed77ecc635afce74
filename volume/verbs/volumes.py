# SPDX-License-Identifier: Apache-2.0
"""Accept what is asked of volumes: create, delete, extend, revert, flatten."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume import placement
from volume import sizes
from volume.context import Caller
from volume.core import Core
from volume.db import claims
from volume.db import leases
from volume.db import models
from volume.verbs import checks
from volume.verbs import place
from volume.verbs import rows
from volume.verbs.place import NewVolume as NewVolume

DELETABLE = frozenset({
    'available', 'error', 'error_extending', 'error_managing',
    'error_reverting', 'error_flattening',
})
REVERTABLE = frozenset({'available', 'error_reverting'})
FORCE_DELETABLE = DELETABLE | {
    'error_deleting', 'creating', 'downloading', 'deleting', 'extending',
    'reverting', 'managing', 'attaching', 'detaching', 'reserved',
    'error_attaching', 'error_detaching', 'uploading', 'maintenance',
}


def create(
    core: Core, caller: Caller, new: NewVolume, *, refuse: bool = True
) -> models.Volume:
    """Accept a new volume and start the job that makes it.

    The same request with the same id again is the same volume. If no pool
    fits, it is refused with no row left, or (``refuse=False``, for a cast
    that nobody waits for) there is a row in ``error`` with the reason.

    :raises Invalid: the request can never work
    :raises NotFound: there is no such source
    :raises Conflict: the id was used for another request
    :raises NoSpace: no pool fits; the message says what each filter took
    """
    new = _checked(core, new)
    digest = _digest(new)
    volume_id = new.id or ids.new()

    def accept(
        session: Session,
    ) -> tuple[models.Volume, models.Job | None]:
        if new.id:
            there = session.get(models.Volume, volume_id)
            if there is not None:
                return _same(caller, there, digest), None
        source = place.source(session, caller, new)
        size_bytes = place.size(core, new, source)
        row = _row(core, caller, new, volume_id, size_bytes, digest)
        wish = place.wish(caller, new, source, size_bytes)
        try:
            chosen = place.claim(session, core, wish)
        except errors.NoSpace as none:
            if refuse:
                raise
            row.status, row.reason = 'error', str(none)
            session.add(row)
            return row, None
        row.backend, row.pool = chosen.backend, chosen.name
        row.size_bytes = placement.claim_bytes(chosen, wish)
        row.claimed_bytes = row.size_bytes
        shared = []
        if source:
            if isinstance(source, models.Volume):
                into = chosen.backend, chosen.name
                rows.need_still(session, source, 'be cloned', into)
            rows.share(session, source, _SOURCE_STATUSES, 'be a source')
            shared = [f'{type(source).__name__.lower()}-{source.id}']
        row.lease_job = job_id = ids.new()
        session.add(row)
        job = rows.open_job(
            session, core, caller,
            'create_filled' if source or new.image else 'create',
            job_id, chosen.backend,
            volume_id=volume_id, snapshot_id=new.snapshot_id,
            exclusive=[f'volume-{volume_id}'], shared=shared,
            args={'native': place.is_native(chosen, source)},
            node=rows.home(session, source) if isinstance(
                source, models.Volume) else '',
        )
        return row, job

    row, job = core.when_free(lambda: core.db.write(accept))
    if job is not None:
        core.notify('volume.create.start', usage(row))
        core.hint(job, row)
    return row


def delete(
    core: Core,
    caller: Caller,
    volume_id: str,
    *,
    force: bool = False,
    cascade: bool = False,
) -> None:
    """Accept the end of a volume; with ``cascade`` of its snapshots too.

    :raises NotFound: there is no such volume
    :raises Invalid: it is attached, has snapshots, or its status forbids it
    """

    def accept(session: Session) -> tuple[models.Volume, models.Job | None]:
        row = rows.volume(session, caller, volume_id)
        statuses = FORCE_DELETABLE if force else DELETABLE
        if row.status == 'in-use' or _attachments(session, row.id):
            raise errors.Invalid(
                f'volume {row.id} is attached; detach it first'
            )
        snapshots = list(session.scalars(
            select(models.Snapshot).where(
                models.Snapshot.volume_id == row.id,
                models.Snapshot.deleted_at.is_(None),
            )
        )) if cascade else []
        if not cascade and (count := _snapshot_count(session, row.id)):
            raise errors.Invalid(
                f'volume {row.id} has {count} snapshots; delete them first, '
                'or with it (--cascade)'
            )
        job_id, now = ids.new(), core.db.clock()
        if not row.backend:
            rows.take(
                session, row, job_id, statuses, 'be deleted',
                status='deleted', deleted_at=now, updated_at=now,
            )
            return row, None
        rows.take(
            session, row, job_id, statuses, 'be deleted',
            status='deleting', reason='', updated_at=now,
        )
        for snapshot in snapshots:
            rows.take(
                session, snapshot, job_id, SNAPSHOT_DELETABLE, 'be deleted',
                status='deleting', updated_at=now,
            )
        was, row.status = row.status, 'deleting'
        job = rows.open_job(
            session, core, caller, 'delete', job_id, row.backend,
            volume_id=row.id,
            exclusive=[
                f'volume-{row.id}',
                *(f'snapshot-{snapshot.id}' for snapshot in snapshots),
            ],
            args={
                'snapshots': [snapshot.id for snapshot in snapshots],
                'status': was,
            },
        )
        session.expunge(row)
        return row, job

    row, job = core.when_free(lambda: core.db.write(accept))
    core.notify('volume.delete.start', usage(row))
    if job is not None:
        core.hint(job, row)
    else:
        core.notify('volume.delete.end', usage(row))


def bury(core: Core, caller: Caller, volume_id: str) -> None:
    """Leave a tombstone for an id that is not known.

    A cast to delete may overtake the cast to create; a create that finds a
    tombstone does nothing.
    """
    volume_id = ids.check(volume_id, 'volume id')

    def accept(session: Session) -> None:
        if session.get(models.Volume, volume_id) is not None:
            return
        now = core.db.clock()
        session.add(models.Volume(
            id=volume_id, project_id=caller.project_id,
            user_id=caller.user_id, status='deleted', size_bytes=0,
            created_at=now, updated_at=now, deleted_at=now,
        ))

    core.db.write(accept)


def extend(
    core: Core, caller: Caller, volume_id: str, size_bytes: int,
    *, online: bool = True,
) -> None:
    """Accept that a volume grows; with ``online`` also an attached one.

    :raises Invalid: it is attached, or the size is not larger
    :raises NoSpace: the pool cannot promise the difference
    :raises Unsupported: the pool's volumes cannot grow
    """
    checks.size(size_bytes, core.settings.size_bytes_max)

    def accept(session: Session) -> tuple[models.Job, models.Volume]:
        row = rows.volume(session, caller, volume_id)
        if size_bytes <= row.size_bytes:
            raise errors.Invalid(
                f'volume {row.id} has {sizes.exact(row.size_bytes)} '
                f'already; the new size, {sizes.exact(size_bytes)}, must be '
                'larger'
            )
        pool = rows.pool(session, row)
        rows.need_feature(pool, 'Resize', 'extend a volume')
        wish = placement.Wish(
            size_bytes=size_bytes, backend=row.backend, pool=row.pool
        )
        found = [
            each for each in claims.candidates(session)
            if (each.backend, each.name) == (row.backend, row.pool)
        ]
        whole_bytes = placement.claim_bytes(found[0], wish)
        more_bytes = whole_bytes - row.claimed_bytes
        if whole_bytes > pool.max_volume_bytes:
            raise errors.Invalid(
                f'size {sizes.exact(whole_bytes)} is over the pool\'s limit '
                f'of {sizes.exact(pool.max_volume_bytes)}; ask for less, or '
                'make a larger volume in another pool and copy it there'
            )
        if not claims.claim(session, found[0], more_bytes):
            raise errors.NoSpace(
                f'pool {row.backend}#{row.pool} cannot promise '
                f'{sizes.exact(more_bytes)} more; delete something in it, '
                'add storage, or raise its oversubscription'
            )
        if online and row.status == 'in-use':
            rows.need_ability(pool, 'online_resize', (
                f'extend volume {row.id} while it is attached: detach it'
            ))
        job_id = ids.new()
        rows.take(
            session, row, job_id,
            {'available', 'in-use'} if online else {'available'},
            'be extended',
            status='extending', reason='', updated_at=core.db.clock(),
            claimed_bytes=row.claimed_bytes + more_bytes,
        )
        return rows.open_job(
            session, core, caller, 'extend', job_id, row.backend,
            volume_id=row.id, exclusive=[f'volume-{row.id}'],
            args={
                'size_bytes': whole_bytes, 'claim_bytes': more_bytes,
                'asked_bytes': size_bytes,
            },
            node=rows.home(session, row),
        ), row

    core.hint(*core.when_free(lambda: core.db.write(accept)))


def revert(
    core: Core, caller: Caller, volume_id: str, snapshot_id: str
) -> None:
    """Accept that a detached volume goes back to one of its snapshots.

    One whose last revert broke off does so again, or to another.

    :raises Invalid: it is attached, or the snapshot is another volume's
    """

    def accept(
        session: Session,
    ) -> tuple[models.Job, models.Volume, models.Snapshot]:
        row = rows.volume(session, caller, volume_id)
        snapshot = rows.snapshot(session, caller, snapshot_id)
        if snapshot.volume_id != row.id:
            raise errors.Invalid(
                f'snapshot {snapshot.id} is of volume {snapshot.volume_id}, '
                f'not of {row.id}'
            )
        if row.status not in REVERTABLE:
            rows.refuse(row, REVERTABLE, 'be reverted')
        job_id, status = ids.new(), row.status
        # Exactly this one, for it comes back if the revert never begins.
        rows.take(
            session, row, job_id, {status}, 'be reverted',
            status='reverting', reason='', updated_at=core.db.clock(),
        )
        rows.share(session, snapshot, {'available'}, 'be reverted to')
        return rows.open_job(
            session, core, caller, 'revert', job_id, row.backend,
            volume_id=row.id, snapshot_id=snapshot.id,
            exclusive=[f'volume-{row.id}'],
            shared=[f'snapshot-{snapshot.id}'],
            args={
                'native': 'Revert' in rows.pool(session, row).features,
                'status': status,
                'looks_first': True,
            },
        ), row, snapshot

    core.hint(*core.when_free(lambda: core.db.write(accept)))


def flatten(core: Core, caller: Caller, volume_id: str) -> None:
    """Accept that a detached volume is freed of the layers it shares.

    :raises Unsupported: the pool has no layers
    """

    def accept(session: Session) -> tuple[models.Job, models.Volume]:
        row = rows.volume(session, caller, volume_id)
        rows.need_feature(rows.pool(session, row), 'Flatten', 'flatten')
        if count := _snapshot_count(session, row.id):
            raise errors.Invalid(
                f'volume {row.id} has {count} snapshots; delete them first'
            )
        job_id = ids.new()
        rows.take(
            session, row, job_id, {'available'}, 'be flattened',
            status='flattening', reason='', updated_at=core.db.clock(),
        )
        return rows.open_job(
            session, core, caller, 'flatten', job_id, row.backend,
            volume_id=row.id, exclusive=[f'volume-{row.id}'],
        ), row

    core.hint(*core.when_free(lambda: core.db.write(accept)))


def update(
    core: Core, caller: Caller, volume_id: str, **changes: Any
) -> models.Volume:
    """Change name, description, metadata, bootable, readonly or image.

    Whether hosts may write is settled when they are let in, so only before.

    :raises NotFound: there is no such volume
    :raises Invalid: ``readonly`` changes while it is attached
    """
    values: dict[str, Any] = {}
    for key in ('name', 'description'):
        if key in changes:
            values[key] = checks.text(changes[key], key)
    if 'metadata' in changes:
        values['meta'] = checks.metadata(changes['metadata'])
    for key in ('bootable', 'readonly'):
        if key in changes:
            values[key] = bool(changes[key])

    def accept(session: Session) -> models.Volume:
        row = rows.volume(session, caller, volume_id)
        checks.renamed(row.name, values.get('name'))
        readonly = values.get('readonly', row.readonly)
        if readonly != row.readonly and not leases.move(
            session, models.Volume, row.id, {'available'}, readonly=readonly
        ):
            rows.refuse(row, {'available'}, 'change whether it is read-only')
        for key, value in values.items():
            setattr(row, key, value)
        row.updated_at = core.db.clock()
        return row

    return core.when_free(lambda: core.db.write(accept))


def reset_status(
    core: Core, caller: Caller, volume_id: str, status: str
) -> None:
    """Set a status by an administrator's hand; no job may hold the volume.

    :raises Invalid: the status is not one that a person may set
    :raises Busy: a job works on the volume, and will set its status
    """
    allowed = {
        'creating', 'available', 'deleting', 'error', 'error_deleting',
        'attaching', 'in-use', 'detaching', 'maintenance',
    }
    if status not in allowed:
        raise errors.Invalid(
            f'status {status!r:.40} cannot be set by hand; one of '
            f'{", ".join(sorted(allowed))} can'
        )

    def accept(session: Session) -> None:
        row = rows.volume(session, caller, volume_id)
        if not leases.move(
            session, models.Volume, row.id, {row.status}, status=status,
            updated_at=core.db.clock(),
        ):
            raise errors.Busy(
                f'volume {row.id} is held by job {row.lease_job}; cancel '
                'that instead'
            )

    core.db.write(accept)


def usage(row: models.Volume) -> dict[str, Any]:
    """Return what a notification tells of a volume (nova-volume's fields)."""
    return {
        'tenant_id': row.project_id,
        'user_id': row.user_id,
        'volume_id': row.id,
        'volume_type': row.volume_type or None,
        'display_name': row.name,
        'launched_at': row.launched_at,
        'created_at': row.created_at,
        'status': row.status,
        'snapshot_id': row.snapshot_id,
        'size': -(-row.size_bytes >> 30),
        'size_bytes': row.size_bytes,
    }


SNAPSHOT_DELETABLE = frozenset({'available', 'error', 'error_deleting'})
_SOURCE_STATUSES = frozenset({'available', 'in-use'})


def _checked(core: Core, new: NewVolume) -> NewVolume:
    given = [
        name for name in ('snapshot_id', 'source_volume_id', 'image')
        if getattr(new, name)
    ]
    if len(given) > 1:
        raise errors.Invalid(
            f'{" and ".join(given)} are given; a volume has one source: leave '
            'out the others'
        )
    if new.size_bytes is not None:
        checks.size(new.size_bytes, core.settings.size_bytes_max)
    elif not new.snapshot_id and not new.source_volume_id:
        raise errors.Invalid(
            'the size is missing; only a copy of a snapshot or volume has one '
            'without being told'
        )
    image = dict(new.image) if new.image else None
    if image:
        image['url'] = _image_url(core, image.get('url'))
    return dataclasses.replace(
        new,
        id=ids.check(new.id, 'volume id') if new.id else None,
        snapshot_id=(
            ids.check(new.snapshot_id, 'snapshot id')
            if new.snapshot_id else None
        ),
        source_volume_id=(
            ids.check(new.source_volume_id, 'volume id')
            if new.source_volume_id else None
        ),
        name=checks.text(new.name, 'name'),
        description=checks.text(new.description, 'description'),
        metadata=checks.metadata(new.metadata),
        image=image,
    )


def _image_url(core: Core, url: object) -> str:
    text = checks.text(url, 'image URL', 4096)
    if ids.is_id(text) and core.settings.image_url_template:
        return core.settings.image_url_template.replace('{id}', text)
    if '://' not in text:
        raise errors.Invalid(
            f'image {text!r:.80} is not a URL (file:///… or https://…)'
        )
    return text


def _digest(new: NewVolume) -> str:
    request = dataclasses.asdict(dataclasses.replace(new, id=None))
    request['tags'] = sorted(new.tags)
    return rows.request_hash(**request)


def _same(
    caller: Caller, there: models.Volume, digest: str
) -> models.Volume:
    if rows.sees(caller, there) and (
        there.deleted_at is not None or there.request_hash == digest
    ):
        return there
    raise errors.Conflict(
        f'volume {there.id} exists, and was asked for in another way; take '
        'another id, or ask for the very same again'
    )


def _row(
    core: Core,
    caller: Caller,
    new: NewVolume,
    volume_id: str,
    size_bytes: int,
    digest: str,
) -> models.Volume:
    now = core.db.clock()
    return models.Volume(
        id=volume_id,
        project_id=caller.project_id,
        user_id=caller.user_id,
        name=new.name or '',
        description=new.description or '',
        meta=dict(new.metadata or {}),
        status='creating',
        reason='',
        backend='',
        pool='',
        handle='',
        size_bytes=size_bytes,
        claimed_bytes=0,
        availability_zone=(
            new.availability_zone or core.settings.availability_zone
        ),
        volume_type=new.volume_type or '',
        bootable=bool(new.image),
        multiattach=new.multiattach,
        readonly=False,
        snapshot_id=new.snapshot_id,
        source_volume_id=new.source_volume_id,
        image=dict(new.image or {}),
        wish={
            'tags': sorted(new.tags), 'cluster': new.cluster,
            'role': new.role, 'backend': new.backend, 'pool': new.pool,
        },
        request_hash=digest,
        lease_shared=0,
        created_at=now,
        updated_at=now,
    )


def _attachments(session: Session, volume_id: str) -> int:
    return session.scalar(
        select(func.count()).where(models.Attachment.volume_id == volume_id)
    ) or 0


def _snapshot_count(session: Session, volume_id: str) -> int:
    return session.scalar(
        select(func.count()).where(
            models.Snapshot.volume_id == volume_id,
            models.Snapshot.deleted_at.is_(None),
        )
    ) or 0
