# SPDX-License-Identifier: Apache-2.0
"""Accept the end of what may never have begun, as a cast may ask for it.

Casts are repeated and overtake each other. The end of an unknown id leaves a
tombstone, so that the cast to make it, when it comes, makes nothing; the end
of what is ending already is nothing new.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.verbs import rows
from volume.verbs import snapshots
from volume.verbs import volumes


def delete_volume(
    core: Core,
    caller: Caller,
    volume_id: str,
    *,
    force: bool = False,
    cascade: bool = False,
) -> None:
    """Accept a volume's end, also if it is unknown or ending already."""
    if _is_ending(core, caller, models.Volume, volume_id, force):
        return
    try:
        volumes.delete(
            core, caller, volume_id, force=force, cascade=cascade
        )
    except errors.Invalid:
        # Another may have begun to end it since we looked.
        if not _is_ending(core, caller, models.Volume, volume_id, force):
            raise
    except errors.NotFound:
        volumes.bury(core, caller, volume_id)
        # The create may have come between the look and the tombstone.
        if _is_alive(core, caller, models.Volume, volume_id):
            volumes.delete(
                core, caller, volume_id, force=force, cascade=cascade
            )


def delete_snapshot(
    core: Core, caller: Caller, snapshot_id: str, *, force: bool = False
) -> None:
    """Accept a snapshot's end, also if it is unknown or ending already."""
    if _is_ending(core, caller, models.Snapshot, snapshot_id, force):
        return
    try:
        snapshots.delete(core, caller, snapshot_id, force=force)
    except errors.Invalid:
        # Another may have begun to end it since we looked.
        if not _is_ending(core, caller, models.Snapshot, snapshot_id, force):
            raise
    except errors.NotFound:
        _bury_snapshot(core, caller, snapshot_id)
        if _is_alive(core, caller, models.Snapshot, snapshot_id):
            snapshots.delete(core, caller, snapshot_id, force=force)


def _bury_snapshot(core: Core, caller: Caller, snapshot_id: str) -> None:
    snapshot_id = ids.check(snapshot_id, 'snapshot id')

    def accept(session: Session) -> None:
        if session.get(models.Snapshot, snapshot_id) is not None:
            return
        now = core.db.clock()
        session.add(models.Snapshot(
            id=snapshot_id, volume_id='', project_id=caller.project_id,
            user_id=caller.user_id, status='deleted', size_bytes=0,
            created_at=now, updated_at=now, deleted_at=now,
        ))

    core.db.write(accept)


def _is_ending(
    core: Core,
    caller: Caller,
    table: type[models.Volume | models.Snapshot],
    row_id: str,
    force: bool,
) -> bool:
    if force:
        return False  # a person may have to push what hangs
    checked = _check(table, row_id)

    def look(session: Session) -> bool:
        # Of one moment: between two the job may have ended.
        row = _find(session, caller, table, checked)
        if row is None or row.deleted_at is not None:
            return row is not None
        job = session.get(models.Job, row.lease_job or '')
        return row.status == 'deleting' and job is not None and (
            job.state == 'open'
        )

    return core.db.read(look)


def _is_alive(
    core: Core,
    caller: Caller,
    table: type[models.Volume | models.Snapshot],
    row_id: str,
) -> bool:
    checked = _check(table, row_id)
    row = core.db.read(lambda s: _find(s, caller, table, checked))
    return row is not None and row.deleted_at is None


def _check(
    table: type[models.Volume | models.Snapshot], row_id: str
) -> str:
    return ids.check(row_id, f'{table.__name__.lower()} id')


def _find(
    session: Session,
    caller: Caller,
    table: type[models.Volume | models.Snapshot],
    row_id: str,
) -> models.Volume | models.Snapshot | None:
    row: Any = session.get(table, row_id)
    if row is None or not rows.sees(caller, row):
        return None
    found: models.Volume | models.Snapshot = row
    return found
