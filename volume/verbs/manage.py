# SPDX-License-Identifier: Apache-2.0
"""Accept that a volume becomes ours that is there already, or ceases to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.verbs import checks
from volume.verbs import rows


def adopt(
    core: Core,
    caller: Caller,
    *,
    backend: str,
    pool: str,
    handle: str,
    id: str | None = None,
    name: str | None = None,
    description: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> models.Volume:
    """Start to make a foreign thing on the storage a volume.

    :raises NotFound: there is no such pool
    :raises Unsupported: the pool cannot adopt
    """
    volume_id = ids.check(id, 'volume id') if id else ids.new()
    name = checks.text(name, 'name')
    description = checks.text(description, 'description')
    meta = checks.metadata(metadata)
    handle = checks.text(handle, 'handle')
    if not handle:
        raise errors.Invalid('the handle of what to adopt is missing')

    def accept(session: Session) -> tuple[models.Job, models.Volume]:
        there = session.get(models.Pool, (backend, pool))
        if there is None:
            raise errors.NotFound(
                f'there is no pool {backend}#{pool}; see "volume pools"'
            )
        rows.need_feature(there, 'Adopt', 'adopt a volume')
        if session.get(models.Volume, volume_id) is not None:
            raise errors.Conflict(f'volume {volume_id} exists already')
        now = core.db.clock()
        job_id = ids.new()
        row = models.Volume(
            id=volume_id, project_id=caller.project_id,
            user_id=caller.user_id, name=name, description=description,
            meta=meta, status='managing', reason='', backend=backend,
            pool=pool, handle='', size_bytes=0, claimed_bytes=0,
            availability_zone=core.settings.availability_zone,
            volume_type='', image={}, wish={}, request_hash='',
            lease_job=job_id, lease_shared=0, created_at=now,
            updated_at=now,
        )
        session.add(row)
        return rows.open_job(
            session, core, caller, 'adopt', job_id, backend,
            volume_id=volume_id, exclusive=[f'volume-{volume_id}'],
            args={
                'handle': handle, 'device': there.device,
                'granularity_bytes': there.granularity_bytes,
            },
        ), row

    job, row = core.db.write(accept)
    core.hint(job, row)
    return row


def disown(core: Core, caller: Caller, volume_id: str) -> None:
    """Start to let go of a volume; its bytes stay on the storage.

    :raises Invalid: it is attached, or has snapshots
    """

    def accept(session: Session) -> tuple[models.Job, models.Volume]:
        row = rows.volume(session, caller, volume_id)
        rows.need_feature(rows.pool(session, row), 'Adopt', 'let go of it')
        for table, what in (
            (models.Attachment, 'attachments'), (models.Snapshot, 'snapshots')
        ):
            query = select(func.count()).where(table.volume_id == row.id)
            if table is models.Snapshot:
                query = query.where(models.Snapshot.deleted_at.is_(None))
            if count := session.scalar(query):
                raise errors.Invalid(
                    f'volume {row.id} has {count} {what}; end them first'
                )
        job_id = ids.new()
        rows.take(
            session, row, job_id, {'available'}, 'be let go of',
            status='unmanaging', updated_at=core.db.clock(),
        )
        return rows.open_job(
            session, core, caller, 'disown', job_id, row.backend,
            volume_id=row.id, exclusive=[f'volume-{row.id}'],
        ), row

    core.hint(*core.when_free(lambda: core.db.write(accept)))
