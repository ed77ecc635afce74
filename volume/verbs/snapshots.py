# SPDX-License-Identifier: Apache-2.0
"""Accept what is asked of snapshots: create, delete, rename."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume import placement
from volume import sizes
from volume.context import Caller
from volume.core import Core
from volume.db import claims
from volume.db import models
from volume.verbs import checks
from volume.verbs import rows
from volume.verbs.volumes import SNAPSHOT_DELETABLE


@dataclasses.dataclass(frozen=True, slots=True)
class NewSnapshot:
    """What a caller wants to keep; ``force`` also of an attached volume."""

    volume_id: str
    id: str | None = None
    name: str | None = None
    description: str | None = None
    metadata: Mapping[str, Any] | None = None
    force: bool = False


def create(core: Core, caller: Caller, new: NewSnapshot) -> models.Snapshot:
    """Accept a snapshot and start the job that takes it.

    :raises Invalid: the volume's status forbids it
    :raises Unsupported: the pool has no snapshots
    :raises NoSpace: a thick pool cannot promise the volume's size again
    """
    snapshot_id = ids.check(new.id, 'snapshot id') if new.id else ids.new()
    name = checks.text(new.name, 'name')
    description = checks.text(new.description, 'description')
    metadata = checks.metadata(new.metadata)
    digest = rows.request_hash(
        volume_id=new.volume_id, name=name, description=description,
        metadata=metadata,
    )
    statuses = {'available', 'in-use'} if new.force else {'available'}

    def accept(
        session: Session,
    ) -> tuple[models.Job | None, models.Snapshot, models.Volume | None]:
        there = (
            session.get(models.Snapshot, snapshot_id) if new.id else None
        )
        if there is not None:
            return None, _same(caller, there, digest), None
        volume = rows.volume(session, caller, new.volume_id)
        pool = rows.pool(session, volume)
        rows.need_feature(pool, 'Snapshots', 'take a snapshot')
        rows.need_still(session, volume, 'be kept as a snapshot')
        rows.need_force(volume, new.force, 'be kept as a snapshot')
        job_id = ids.new()
        rows.take(
            session, volume, job_id, statuses, 'be kept as a snapshot'
        )
        claimed = 0 if pool.thin else volume.claimed_bytes
        candidate = placement.Candidate(
            backend=pool.backend, name=pool.name, device=pool.device
        )
        if not claims.claim(session, candidate, claimed):
            raise errors.NoSpace(
                f'pool {pool.backend}#{pool.name} cannot promise '
                f'{sizes.exact(claimed)} more, which the snapshot may need; '
                'delete something in it, or add storage'
            )
        now = core.db.clock()
        row = models.Snapshot(
            id=snapshot_id, volume_id=volume.id,
            project_id=volume.project_id, user_id=caller.user_id,
            name=name, description=description, meta=metadata,
            status='creating', reason='', backend=volume.backend,
            pool=volume.pool, handle='', size_bytes=volume.size_bytes,
            claimed_bytes=claimed, request_hash=digest, lease_job=job_id,
            lease_shared=0, created_at=now, updated_at=now,
        )
        session.add(row)
        job = rows.open_job(
            session, core, caller, 'snapshot', job_id, volume.backend,
            volume_id=volume.id, snapshot_id=row.id,
            exclusive=[f'volume-{volume.id}', f'snapshot-{row.id}'],
            node=rows.home(session, volume),
        )
        return job, row, volume

    job, row, volume = core.when_free(lambda: core.db.write(accept))
    if job is not None:
        core.notify('snapshot.create.start', usage(row))
        core.hint(job, row, volume)
    return row


def delete(
    core: Core, caller: Caller, snapshot_id: str, *, force: bool = False
) -> None:
    """Accept the end of a snapshot.

    :raises NotFound: there is no such snapshot
    :raises Invalid: its status forbids it
    :raises Busy: volumes are being made from it
    """
    statuses = (
        SNAPSHOT_DELETABLE | {'creating', 'deleting'}
        if force else SNAPSHOT_DELETABLE
    )

    def accept(
        session: Session,
    ) -> tuple[models.Job, models.Snapshot, models.Volume | None]:
        row = rows.snapshot(session, caller, snapshot_id)
        volume = session.get(models.Volume, row.volume_id)
        job_id = ids.new()
        rows.take(
            session, row, job_id, statuses, 'be deleted',
            status='deleting', reason='', updated_at=core.db.clock(),
        )
        job = rows.open_job(
            session, core, caller, 'delete_snapshot', job_id, row.backend,
            volume_id=row.volume_id, snapshot_id=row.id,
            exclusive=[f'snapshot-{row.id}'], args={'status': row.status},
        )
        return job, row, volume

    job, row, volume = core.when_free(lambda: core.db.write(accept))
    core.notify('snapshot.delete.start', usage(row))
    core.hint(job, row, volume)


def update(
    core: Core, caller: Caller, snapshot_id: str, **changes: Any
) -> models.Snapshot:
    """Change name, description or metadata."""
    values: dict[str, Any] = {
        key: checks.text(changes[key], key)
        for key in ('name', 'description') if key in changes
    }
    if 'metadata' in changes:
        values['meta'] = checks.metadata(changes['metadata'])

    def accept(session: Session) -> models.Snapshot:
        row = rows.snapshot(session, caller, snapshot_id)
        checks.renamed(row.name, values.get('name'))
        for key, value in values.items():
            setattr(row, key, value)
        row.updated_at = core.db.clock()
        return row

    return core.db.write(accept)


def reset_status(
    core: Core, caller: Caller, snapshot_id: str, status: str
) -> None:
    """Set a status by an administrator's hand; no job may hold the row."""
    allowed = {'creating', 'available', 'deleting', 'error', 'error_deleting'}
    if status not in allowed:
        raise errors.Invalid(
            f'status {status!r:.40} cannot be set by hand; one of '
            f'{", ".join(sorted(allowed))} can'
        )

    def accept(session: Session) -> None:
        row = rows.snapshot(session, caller, snapshot_id)
        job_id = ids.new()  # names no job: free again at once
        rows.take(session, row, job_id, {row.status}, 'be reset')
        row.status = status

    core.db.write(accept)


def usage(row: models.Snapshot) -> dict[str, Any]:
    """Return what a notification tells of a snapshot."""
    return {
        'tenant_id': row.project_id,
        'user_id': row.user_id,
        'snapshot_id': row.id,
        'volume_id': row.volume_id,
        'display_name': row.name,
        'created_at': row.created_at,
        'status': row.status,
        'volume_size': -(-row.size_bytes >> 30),
        'size_bytes': row.size_bytes,
    }


def _same(
    caller: Caller, there: models.Snapshot, digest: str
) -> models.Snapshot:
    if rows.sees(caller, there) and (
        there.deleted_at is not None or there.request_hash == digest
    ):
        return there
    raise errors.Conflict(
        f'snapshot {there.id} exists, and was asked for in another way; take '
        'another id, or ask for the very same again'
    )
