# SPDX-License-Identifier: Apache-2.0
"""What a manager does by itself, again and again; each a plain function.

None of it is needed for a request to be right; it keeps statistics fresh,
exports alive, reservations short and tables small.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import delete as sql_delete
from sqlalchemy import exists
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume import report
from volume.backends import Backend
from volume.backends import check_all
from volume.context import Caller
from volume.core import Core
from volume.db import jobs
from volume.db import leases
from volume.db import models
from volume.drivers import base
from volume.node import Node
from volume.verbs import access
from volume.verbs import rows

LOG = logging.getLogger(__name__)
CHECK_S = 30.0
SYSTEM = Caller(project_id='system', user_id='system', is_admin=True)
ANY_STATUS = frozenset({
    'available', 'in-use', 'attaching', 'detaching', 'error', 'reserved',
    'uploading', 'error_attaching', 'error_detaching', 'maintenance',
})


def refresh(
    core: Core,
    backends: Iterable[Backend],
    host: str,
    wait_s: float = CHECK_S,
) -> None:
    """Check all backends, side by side, and report how they are now.

    One that hangs is reported as it was, and keeps the others from nothing.
    """
    listed = list(backends)
    check_all(listed, wait_s)
    now = core.db.clock()
    core.db.write(lambda s: report.report(s, listed, host, now))


def restore_exports(core: Core, backends: Mapping[str, Backend]) -> int:
    """Start a job for each volume whose export is gone; return how many.

    A daemon that died, or a node that was booted, has forgotten them; the
    attachments' rows have not.
    """
    wanted = core.db.read(lambda s: list(s.scalars(
        select(models.Attachment).where(
            models.Attachment.is_connected.is_(True),
            models.Attachment.backend.in_(list(backends)),
        )
    )))
    if not wanted:
        return 0
    missing: dict[str, list[models.Attachment]] = {}
    present = {
        name: _exported(backends[name])
        for name in {row.backend for row in wanted}
    }
    for row in wanted:
        there = present[row.backend]
        if there is not None and row.id not in there:
            missing.setdefault(row.volume_id, []).append(row)
    count = 0
    for volume_id, gone in missing.items():
        job = core.db.write(
            functools.partial(_open_restore, core, volume_id, gone)
        )
        if job is not None:
            core.hint(job)
            count += 1
    if count:
        LOG.warning('exports of %d volumes are being restored', count)
    return count


def end_orphan_exports(
    core: Core, backends: Mapping[str, Backend], strangers: set[str]
) -> list[str]:
    """End exports whose attachment is over, by what an ended job says.

    What the database does not know at all is left alone, named once and
    kept in ``strangers``: it may be the database that is wrong (lost,
    restored, another one), and hosts work on behind these exports.
    """
    ended = []
    for backend in backends.values():
        present = _exported(backend)
        if not present or backend.exporter is None:
            continue
        nobodys = present - _known(core, present)
        over = _over(core) if nobodys - strangers else set()
        for export_id in sorted(nobodys - strangers):
            if export_id not in over:
                strangers.add(export_id)
                LOG.error(
                    'export %s belongs to nobody that this database knows; '
                    '"volume-manage reconcile" ends it', export_id,
                )
                continue
            LOG.warning('export %s was left over; it ends', export_id)
            with backend.guard('unexport'):
                backend.exporter.unexport(export_id)
            ended.append(export_id)
    return ended


def end_private_exports(node: Node) -> None:
    """End what an earlier process had opened to read or fill volumes."""
    try:
        if node.blockd is not None:
            node.blockd.end_private()
    except errors.VolumeError as failed:
        LOG.warning('the storage daemon: %s', failed)


def end_stale_reservations(core: Core, timeout_s: float) -> int:
    """Let reservations go whose host has not come back.

    Only a status that no job will lead on is touched, and no access that
    stands is ended.
    """
    now = core.db.clock()
    before = now - timeout_s
    volumes, attachments = models.Volume, models.Attachment

    def end(session: Session) -> int:
        count = 0
        for row in session.scalars(
            select(volumes).where(
                volumes.status.in_(('attaching', 'detaching')),
                volumes.updated_at < before,
                volumes.deleted_at.is_(None),
            )
        ).all():
            if row.status == 'attaching' and _has_attachments(
                session, row.id
            ):
                continue
            # First the lease: behind it nothing is being connected.
            if not leases.move(
                session, volumes, row.id, {row.status}, updated_at=now
            ):
                continue
            session.execute(
                sql_delete(attachments).where(
                    attachments.volume_id == row.id,
                    attachments.status == 'attaching',
                    attachments.is_connected.is_(False),
                    attachments.created_at < before,
                ).execution_options(synchronize_session=False)
            )
            access.settle(session, row.id, now)
            count += 1
        return count

    count = core.db.write(end)
    if count:
        LOG.warning('%d reservations had run out', count)
    return count


def upkeep(backends: Iterable[Backend]) -> None:
    """Let each driver do one bounded piece of its background work."""
    for backend in backends:
        if not backend.is_up or not isinstance(backend.driver, base.Upkeep):
            continue
        for pool in list(backend.pools):
            if not backend.feature(pool, 'Upkeep'):
                continue
            try:
                backend.call('upkeep', pool)
            except errors.VolumeError as failed:
                LOG.warning(
                    'upkeep of %s#%s: %s', backend.name, pool, failed
                )


def sweep_spool(node: Node, directory: str) -> None:
    """Remove what an earlier process was downloading.

    A job that goes on begins its download again, under a new token.
    """
    for name in node.list(directory):
        node.unlink(os.path.join(directory, name))


def forget(core: Core, retention_s: float) -> None:
    """Remove ended jobs and tombstones that are older than the retention."""
    before = core.db.clock() - retention_s
    count = core.db.write(lambda s: jobs.forget(s, before))
    if count:
        LOG.info('%d rows of history were removed', count)


def _exported(backend: Backend) -> set[str] | None:
    """Return what a backend exports now; ``None`` if it cannot be asked."""
    if backend.exporter is None or not backend.is_up:
        return None
    try:
        with backend.guard('exported'):
            return backend.exporter.exported()
    except errors.VolumeError as failed:
        LOG.warning('exports of %s: %s', backend.name, failed)
        return None


def _open_restore(
    core: Core,
    volume_id: str,
    gone: list[models.Attachment],
    session: Session,
) -> models.Job | None:
    row = session.get(models.Volume, volume_id)
    if row is None:
        return None
    job_id = ids.new()
    if not leases.take(
        session, models.Volume, volume_id, job_id, ANY_STATUS
    ):
        return None
    still = set(session.scalars(
        select(models.Attachment.id).where(
            models.Attachment.volume_id == volume_id,
            models.Attachment.is_connected.is_(True),
        )
    ))
    args: dict[str, Any] = {'attachments': [
        [each.id, each.connector, each.mode]
        for each in gone if each.id in still
    ]}
    job = rows.open_job(
        session, core, SYSTEM, 'restore', job_id, row.backend,
        volume_id=volume_id, exclusive=[f'volume-{volume_id}'], args=args,
    )
    # We come again by ourselves; meanwhile the volume is free for others.
    job.give_up_at = job.created_at
    return job


def _known(core: Core, export_ids: set[str]) -> set[str]:
    """Return those ids that an attachment or an open job names."""

    def ask(session: Session) -> set[str]:
        known = set(session.scalars(
            select(models.Attachment.id)
            .where(models.Attachment.id.in_(export_ids))
        ))
        for args in session.scalars(
            select(models.Job.args).where(
                models.Job.state == 'open',
                models.Job.kind.in_(('attach', 'detach', 'restore')),
            )
        ):
            known.add(args.get('attachment_id', ''))
            known.update(each[0] for each in args.get('attachments', ()))
        return known

    return core.db.read(ask)


def _over(core: Core) -> set[str]:
    """Return the attachments that ended jobs were about, the newest first."""

    def ask(session: Session) -> set[str]:
        over: set[str] = set()
        for args in session.scalars(
            select(models.Job.args)
            .where(
                models.Job.state != 'open',
                models.Job.kind.in_(('attach', 'detach')),
            )
            .order_by(models.Job.created_at.desc()).limit(10_000)
        ):
            over.add(args.get('attachment_id', ''))
            over.update(each[0] for each in args.get('attachments', ()))
        return over

    return core.db.read(ask)


def _has_attachments(session: Session, volume_id: str) -> bool:
    return bool(session.scalar(select(
        exists().where(
            models.Attachment.volume_id == volume_id,
            or_(
                models.Attachment.is_connected.is_(True),
                models.Attachment.status == 'attached',
            ),
        )
    )))
