# SPDX-License-Identifier: Apache-2.0
"""What a manager does by itself, again and again; each a plain function.

None of it is needed for a request to be right; it keeps statistics fresh,
exports alive, reservations short and tables small.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sqlalchemy import and_
from sqlalchemy import delete as sql_delete
from sqlalchemy import exists
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume import lockdomain
from volume import report
from volume.backends import Backend
from volume.backends import check_all
from volume.backends import each_alone
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
T = TypeVar('T')
CHECK_S = 30.0
BATCH = 500  # ids in one statement
RESTORED_AT_ONCE = 64  # volumes that one job holds, for less than a second
RESTORES_AT_ONCE = 1  # jobs that wait while another one runs
ASKED_AT_ONCE = 500  # ids in one statement
LOOKED_THROUGH = 10_000  # ended jobs, for whose export it was
SYSTEM = Caller(project_id='system', user_id='system', is_admin=True)
ANY_STATUS = frozenset({
    'available', 'in-use', 'attaching', 'detaching', 'error', 'reserved',
    'uploading', 'error_attaching', 'error_detaching', 'error_extending',
    'maintenance',
})


def refresh(
    core: Core,
    backends: Iterable[Backend],
    host: str,
    wait_s: float = CHECK_S,
    machine: str = '',
) -> None:
    """Check all backends, side by side, and report how they are now.

    One that hangs is reported as it was, and keeps the others from nothing.
    """
    listed = list(backends)
    core.db.read(lambda s: report.hinder(s, listed))
    check_all(listed, wait_s)
    now = core.db.clock()
    down_s = core.settings.service_down_s
    core.db.write(lambda s: report.report(
        s, listed, host, now, down_s, machine
    ))


def restore_exports(core: Core, backends: Mapping[str, Backend]) -> int:
    """Start jobs for the volumes whose export is gone; return how many.

    A daemon that died, or a node that was booted, has forgotten them; the
    attachments' rows have not. What is open on another node is that node's,
    until an operator has fenced it.
    """
    wanted, leads = core.db.read(lambda s: _exportable(
        s, core.owner_host, [
            name for name, backend in backends.items()
            if not isinstance(backend.driver, base.NativeAccess)
        ],
    ))
    if not wanted:
        return 0
    missing: dict[str, dict[str, list[str]]] = {}
    present = {
        name: _exported(backends[name])
        for name in {row.backend for row in wanted}
    }
    homeless = []
    for row in wanted:
        there = present[row.backend]
        if there is not None and row.id not in there:
            if row.node or row.backend in leads:
                gone = missing.setdefault(row.backend, {})
                gone.setdefault(row.volume_id, []).append(row.id)
        elif there is not None and not row.node and not (
            _is_elsewhere(backends[row.backend])
        ):
            homeless.append(row.id)
    if homeless:
        core.db.write(lambda s: _take_in(s, core.owner_host, homeless))
    return _restore_all(core, missing)


def end_orphan_exports(
    core: Core, backends: Mapping[str, Backend], strangers: set[str]
) -> list[str]:
    """End exports whose attachment is over, by what an ended job says.

    Or that has moved to another node, while this one was fenced.

    What the database does not know at all is left alone, named once and
    kept in ``strangers``: it may be the database that is wrong (lost,
    restored, another one), and hosts work on behind these exports.
    """
    ended = []
    seen: set[str] = set()
    for backend in backends.values():
        present = _exported(backend)
        if not present or backend.exporter is None:
            continue
        # Exporters of one kind may tell of the same exports.
        present -= seen
        seen |= present
        nobodys = present - _known(
            core, present, backend.exporter.is_shared, _is_elsewhere(backend)
        )
        over = _over(core, nobodys) if nobodys - strangers else set()
        for export_id in sorted(nobodys - strangers):
            if export_id not in over:
                strangers.add(export_id)
                LOG.error(
                    'export %s belongs to nobody that this database knows; '
                    '"volume-manage reconcile" ends it', export_id,
                )
                continue
            LOG.warning('export %s was left over; it ends', export_id)
            try:
                with backend.guard('unexport'):
                    backend.exporter.unexport(export_id)
            except errors.VolumeError as failed:
                LOG.error('export %s does not end: %s', export_id, failed)
                continue
            ended.append(export_id)
    return ended


def end_left_exports(node: Node) -> None:
    """End private exports of ours whose end had failed.

    A volume with one is in use by the storage daemon, and Busy for others.
    """
    try:
        if node.blockd is not None:
            node.blockd.end_left()
    except errors.VolumeError as failed:
        LOG.warning('the storage daemon: %s', failed)


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
    is_stale = and_(
        volumes.status.in_(('attaching', 'detaching')),
        volumes.updated_at < before,
        volumes.deleted_at.is_(None),
    )
    # As a rule there is none: nobody waits while we look.
    found = core.db.read(lambda s: list(s.scalars(
        select(volumes.id).where(is_stale)
    )))

    def end(some: list[str], session: Session) -> int:
        count = 0
        for row in session.scalars(
            select(volumes).where(volumes.id.in_(some), is_stale)
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

    count = sum(
        core.db.write(functools.partial(end, some))
        for some in _parts(found, ASKED_AT_ONCE)
    )
    if count:
        LOG.warning('%d reservations had run out', count)
    return count


def upkeep(
    backends: Iterable[Backend],
    rate_bytes_per_s: int = 0,
    wait_s: float = CHECK_S,
) -> None:
    """Let each driver do one bounded piece of its background work.

    What it writes is written no faster than the rate. Side by side, for one
    may merge for hours, or hang: meanwhile others have snapshots that fill
    up.
    """
    each_alone(
        lambda backend: backend.tend(rate_bytes_per_s), backends, wait_s
    )


def sweep_spool(node: Node, directory: str) -> None:
    """Remove what an earlier process was downloading.

    A job that goes on begins its download again, under a new token.
    """
    for name in node.list(directory):
        node.unlink(os.path.join(directory, name))


def sweep_locks(core: Core, node: Node) -> int:
    """Remove lock files of what is gone; return how many.

    Who ends a volume removes its lock file, unless it dies in between.
    """
    found = (
        (what, name.partition('-')[2]) for name in node.list(node.lock_dir)
        if (what := name.partition('-')[0]) in ('volume', 'snapshot')
    )
    count = 0
    while batch := list(itertools.islice(found, BATCH)):
        over = core.db.read(functools.partial(
            leases.gone, ids=[row_id for _, row_id in batch]
        ))
        names = [f'{what}-{row_id}' for what, row_id in batch
                 if row_id in over]
        node.forget_locks(names)
        count += len(names)
    return count


def forget(core: Core, retention_s: float) -> int:
    """Remove ended jobs and tombstones that are older than the retention.

    In small batches, so that whoever waits for the database has his turn.
    """
    before, count = core.db.clock() - retention_s, 0
    while gone := core.db.write(lambda s: jobs.forget(s, before)):
        count += gone
    if count:
        LOG.info('%d rows of history were removed', count)
    return count


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


def _is_elsewhere(backend: Backend) -> bool:
    """Say whether its exports are on a machine that others reach as well."""
    return backend.exporter is not None and backend.exporter.node.is_remote


def _exportable(
    session: Session, host: str, backends: list[str]
) -> tuple[list[Any], set[str]]:
    """Return what this node has to export, and backends that it reports.

    Of each attachment its id, volume, backend and node, no more.
    Attachments of an earlier release do not say where they are open; if
    nobody exports one now, who reports its backend does it.
    """
    attachments = models.Attachment
    wanted = list(session.execute(
        select(
            attachments.id, attachments.volume_id, attachments.backend,
            attachments.node,
        )
        .where(
            attachments.is_connected.is_(True),
            attachments.status != 'error_attaching',
            attachments.backend.in_(backends),
            or_(
                attachments.node.in_(('', host)),
                jobs.is_fenced(attachments.node),
            ),
        )
    ))
    if all(row.node for row in wanted):
        return wanted, set()
    return wanted, set(session.scalars(
        select(models.Backend.name).where(models.Backend.host == host)
    ))


def _take_in(session: Session, host: str, homeless: list[str]) -> None:
    """Say of attachments of an earlier release that they are open here."""
    session.execute(
        update(models.Attachment)
        .where(
            models.Attachment.id.in_(homeless), models.Attachment.node == ''
        )
        .values(node=host)
        .execution_options(synchronize_session=False)
    )


def _restore_all(
    core: Core, missing: Mapping[str, Mapping[str, list[str]]]
) -> int:
    """Start jobs for lost exports, few at once; return for how many volumes.

    The storage daemon does one thing at a time. What waits for it would
    keep workers from other jobs, and volumes from who asks for them.
    """
    count = 0
    running: list[models.Job] = []
    for backend, gone in missing.items():
        for some in _parts(gone.items(), RESTORED_AT_ONCE):
            if not core.runs(backend):
                break  # the service is stopping
            opened = core.db.write(functools.partial(
                _open_restore, core, backend, dict(some)
            ))
            if opened is None:
                continue
            job, volumes = opened
            if not count:
                LOG.warning(
                    'exports of %d volumes are being restored',
                    sum(map(len, missing.values())),
                )
            core.hint(job, *volumes)
            count += len(volumes)
            running.append(job)
            if len(running) > RESTORES_AT_ONCE:
                _await(core, running.pop(0))
    return count


def _await(core: Core, job: models.Job) -> None:
    """Wait for a job, while this process runs any; how it ends is its own."""
    deadline = time.monotonic() + core.settings.call_timeout_s
    while core.runs(job.backend) and time.monotonic() < deadline:
        with contextlib.suppress(errors.Unknown):
            core.wait(job.id, 1.0)
            return


def _open_restore(
    core: Core,
    backend: str,
    gone: Mapping[str, list[str]],
    session: Session,
) -> tuple[models.Job, list[models.Volume]] | None:
    attachments, job_id = models.Attachment, ids.new()
    leases.take_many(session, models.Volume, gone, job_id, ANY_STATUS)
    volumes = list(session.scalars(select(models.Volume).where(
        models.Volume.id.in_(gone), models.Volume.lease_job == job_id,
    )))
    taken = {row.id for row in volumes}
    still = [
        row for row in session.scalars(select(attachments).where(
            attachments.volume_id.in_(taken),
            attachments.is_connected.is_(True),
            attachments.status != 'error_attaching',
            # Of a fenced node another may have been faster than we.
            or_(
                attachments.node.in_(('', core.owner_host)),
                jobs.is_fenced(attachments.node),
            ),
        )) if row.id in gone[row.volume_id]
    ]
    if not still:
        return None
    job = rows.open_job(
        session, core, SYSTEM, 'restore', job_id, backend,
        volume_id=volumes[0].id if len(volumes) == 1 else None,
        exclusive=[f'volume-{volume_id}' for volume_id in taken],
        args={
            'attachments': [
                [row.id, row.connector, row.mode, row.volume_id]
                for row in still
            ],
            'exporters': {row.id: row.exporter for row in still},
        },
        node=core.owner_host,
    )
    # We come again by ourselves; meanwhile the volumes are free for others.
    job.give_up_at = job.created_at
    return job, volumes


def _known(
    core: Core, export_ids: set[str], is_shared: bool, is_elsewhere: bool
) -> set[str]:
    """Return those ids that an attachment or an open job names.

    What ``is_shared`` may also be the work of another service of its kernel,
    whether that one runs, was stopped or has left: then it is that one's.
    """

    def ask(session: Session) -> set[str]:
        home = models.Attachment.node
        ours = home.in_(('', core.owner_host))
        if is_shared and is_elsewhere:
            ours = home.is_not(None)  # which kernel that is, nobody says
        elif is_shared:
            ours = home.not_in(_strangers_to(session, core.owner_host))
        known: set[str] = set()
        for some in _parts(export_ids, ASKED_AT_ONCE):
            known.update(session.scalars(
                select(models.Attachment.id).where(
                    models.Attachment.id.in_(some), ours,
                )
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


def _strangers_to(session: Session, host: str) -> list[str]:
    """Return the services that run under another kernel than ours.

    One that was stopped in good order says nothing of itself any more, and
    is not among them.
    """
    domains = {
        name: lockdomain.kernel(domain) for name, domain in session.execute(
            select(models.Service.host, models.Service.domain)
        )
    }
    kernel = domains.get(host, '')
    return [
        name for name, each in domains.items()
        if kernel and each and each != kernel
    ]


def _over(core: Core, export_ids: set[str]) -> set[str]:
    """Return the attachments that ended jobs were about, the newest first.

    And those of the given that are open on another node.
    """

    def ask(session: Session) -> set[str]:
        over: set[str] = set()
        for some in _parts(export_ids, ASKED_AT_ONCE):
            over.update(session.scalars(
                select(models.Attachment.id).where(
                    models.Attachment.id.in_(some),
                    models.Attachment.node.not_in(('', core.owner_host)),
                )
            ))
        # What has just been left over was ended just now, as a rule.
        for offset in range(0, LOOKED_THROUGH, ASKED_AT_ONCE):
            found = list(session.scalars(
                select(models.Job.args)
                .where(
                    models.Job.state != 'open',
                    models.Job.kind.in_(('attach', 'detach')),
                )
                .order_by(models.Job.created_at.desc())
                .offset(offset).limit(ASKED_AT_ONCE)
            ))
            for args in found:
                over.add(args.get('attachment_id', ''))
                over.update(each[0] for each in args.get('attachments', ()))
            if len(found) < ASKED_AT_ONCE or export_ids <= over:
                break
        return over & export_ids

    return core.db.read(ask)


def _parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while part := list(itertools.islice(left, size)):
        yield part


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
