# SPDX-License-Identifier: Apache-2.0
"""Hold rows, storage and exports against each other; say what differs.

Three-way: what was promised (rows), what is stored (``scan``), and what
hosts reach (``exported``). Things that an open job works on are in flux and
are left alone. A finding names the thing, what is wrong, and what ``mend``
would do; nothing is changed before a person has asked for it, and bytes are
never removed by it unless ``delete_orphans`` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.orm import Session

from volume import ids
from volume import model
from volume.backends import Backend
from volume.db import leases
from volume.db import models
from volume.db.engine import Database
from volume.drivers import base
from volume.verbs import access

WAITS_FOR_HOST = frozenset({'attaching', 'detaching', 'reserved'})
STORED = frozenset({
    'available', 'in-use', 'attaching', 'detaching', 'reserved', 'uploading',
    'error_detaching', 'error_attaching', 'error_extending', 'maintenance',
})


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One difference; ``remedy`` is what mending does, '' if nothing can."""

    kind: str
    what: str
    detail: str
    remedy: str = ''
    backend: str = ''
    pool: str = ''
    found: model.Found | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """The rows, of one moment; ``flux`` are ids that open jobs work on."""

    volumes: Mapping[str, models.Volume]
    snapshots: Mapping[str, models.Snapshot]
    attachments: Mapping[str, models.Attachment]
    flux: frozenset[str]
    shared: Mapping[str, int]


def view(db: Database) -> View:
    """Read everything that is live, in one transaction."""

    def read(session: Session) -> View:
        jobs = session.scalars(
            select(models.Job).where(models.Job.state == 'open')
        ).all()
        flux: set[str] = set()
        shared: dict[str, int] = {}
        for job in jobs:
            for name in (*job.exclusive, *job.shared):
                flux.add(name.partition('-')[2])
            flux.add(job.args.get('attachment_id', ''))
            for each in job.args.get('attachments', ()):
                flux.add(each[0])
            for name in job.shared:
                row_id = name.partition('-')[2]
                shared[row_id] = shared.get(row_id, 0) + 1
        return View(
            volumes={row.id: row for row in session.scalars(
                select(models.Volume)
                .where(models.Volume.deleted_at.is_(None))
            )},
            snapshots={row.id: row for row in session.scalars(
                select(models.Snapshot)
                .where(models.Snapshot.deleted_at.is_(None))
            )},
            attachments={row.id: row for row in session.scalars(
                select(models.Attachment)
            )},
            flux=frozenset(flux),
            shared=shared,
        )

    return db.read(read)


def look(
    db: Database, backends: Mapping[str, Backend], host: str
) -> list[Finding]:
    """Return every difference that lasts; of exports, those of this node.

    Rows are read before and after the storage is looked at: what has changed
    between is in flux, and no finding.
    """
    before = view(db)
    stored: dict[tuple[str, str], list[model.Found]] = {}
    exported: dict[str, set[str]] = {}
    findings: list[Finding] = []
    for name, backend in backends.items():
        if not backend.is_up:
            findings.append(Finding(
                'down', f'backend {name}', backend.reason, backend=name,
            ))
            continue
        for pool in backend.pools:
            with backend.guard('scan'):
                stored[name, pool] = list(backend.need().scan(pool))
        # What hosts reach by themselves is exported by nobody.
        if backend.exporter is not None and not isinstance(
            backend.driver, base.NativeAccess
        ):
            with backend.guard('exported'):
                exported[name] = backend.exporter.exported()
    after = view(db)
    for (name, pool), found in stored.items():
        findings += _storage(name, pool, found, before, after)
    findings += _exports(exported, before, after, host)
    findings += _statuses(before, after)
    findings += _claims(db)
    return findings


def mend(
    db: Database,
    backends: Mapping[str, Backend],
    findings: list[Finding],
    *,
    adopt: bool = False,
    delete_orphans: bool = False,
) -> list[Finding]:
    """Do what the findings' remedies say; return those that were mended.

    ``adopt`` makes a row again for each stored volume or snapshot whose row
    was lost; ``delete_orphans`` removes such things instead.
    """
    mended = []
    # A snapshot's row needs its volume's; its bytes go before them.
    for finding in sorted(findings, key=lambda f: bool(
        f.found and f.found.snapshot_of
    ) == adopt):
        if finding.kind == 'orphan' and not (adopt or delete_orphans):
            continue
        if _mend_one(db, backends, finding, adopt):
            mended.append(finding)
    if any(finding.kind == 'claims' for finding in findings) or mended:
        db.write(recount)
    return mended


def recount(session: Session) -> None:
    """Set each pool's and device's claim to the sum over its rows."""
    sums = _sums(session)
    devices: dict[str, int] = {}
    for pool in session.scalars(select(models.Pool)):
        pool.claimed_bytes = sums.get((pool.backend, pool.name), 0)
        if pool.device:
            devices.setdefault(pool.device, 0)
            devices[pool.device] += pool.claimed_bytes
    for device in session.scalars(select(models.Device)):
        device.claimed_bytes = devices.get(device.name, 0)


def _storage(
    backend: str,
    pool: str,
    found: list[model.Found],
    before: View,
    after: View,
) -> Iterator[Finding]:
    there = {each.id: each for each in found if each.id is not None}
    rows: dict[str, models.Volume | models.Snapshot] = {
        **before.volumes, **before.snapshots,
    }
    still: dict[str, models.Volume | models.Snapshot] = {
        **after.volumes, **after.snapshots,
    }
    flux = before.flux | after.flux
    for row_id, row in rows.items():
        if (row.backend, row.pool) != (backend, pool) or row_id in flux:
            continue
        now = still.get(row_id)
        if now is None or now.updated_at != row.updated_at:
            continue
        what = f'{type(row).__name__.lower()} {row_id}'
        if row_id not in there:
            if row.status in STORED:
                yield Finding(
                    'missing', what,
                    f'is {row.status}, and {backend}#{pool} has no such thing',
                    'its status becomes error', backend, pool,
                )
        elif (
            isinstance(row, models.Volume)
            and row.status in STORED
            and there[row_id].size_bytes < row.size_bytes
        ):
            yield Finding(
                'size', what,
                f'has {row.size_bytes} bytes by its row, and '
                f'{there[row_id].size_bytes} on {backend}#{pool}',
                '', backend, pool,
            )
        if row_id in there:
            yield from _hosts(backend, pool, there[row_id], before, after)
    for thing_id, each in there.items():
        if thing_id in rows or thing_id in still or thing_id in flux:
            continue
        what = 'snapshot' if each.snapshot_of else 'volume'
        yield Finding(
            'orphan', f'{what} {thing_id}',
            f'is on {backend}#{pool} as {each.handle}, and has no row',
            'with --adopt it gets a row, with --delete-orphans it goes',
            backend, pool, each,
        )


def _hosts(
    backend: str, pool: str, found: model.Found, before: View, after: View
) -> Iterator[Finding]:
    """Yield hosts that the storage lets in, and no attachment names."""
    known = {
        row.host for rows in (before, after)
        for row in rows.attachments.values() if row.volume_id == found.id
    }
    for host in found.hosts:
        if host.name not in known:
            yield Finding(
                'access', f'volume {found.id}',
                f'is open to host {host.name}, which has no attachment',
                'the host is cut off', backend, pool,
                dataclasses.replace(found, hosts=(host,)),
            )


def _exports(
    exported: Mapping[str, set[str]], before: View, after: View, host: str
) -> Iterator[Finding]:
    flux = before.flux | after.flux
    there = set().union(*exported.values()) if exported else set()
    for row_id, row in after.attachments.items():
        if row_id in flux or row.volume_id in flux:
            continue
        if row.node not in ('', host):
            continue
        if (
            row.is_connected and row.backend in exported
            and row_id not in there and row_id in before.attachments
        ):
            yield Finding(
                'unexported', f'attachment {row_id}',
                f'of volume {row.volume_id} has no export',
                'the running service exports it again', row.backend,
            )
    known = set(before.attachments) | set(after.attachments) | flux
    seen: set[str] = set()
    for backend, export_ids in exported.items():
        for export_id in sorted(export_ids - known - seen):
            seen.add(export_id)
            yield Finding(
                'export', f'export {export_id}', 'belongs to no attachment',
                'it ends', backend,
            )


def _statuses(before: View, after: View) -> Iterator[Finding]:
    flux = before.flux | after.flux
    rows: dict[str, models.Volume | models.Snapshot] = {
        **after.volumes, **after.snapshots,
    }
    for row_id, row in rows.items():
        if row_id in flux:
            continue
        what = f'{type(row).__name__.lower()} {row_id}'
        if row.status in models.TRANSITIONAL - WAITS_FOR_HOST:
            yield Finding(
                'status', what, f'is {row.status}, and no job leads it on',
                'its status becomes error', row.backend, row.pool,
            )
        if row.lease_shared != after.shared.get(row_id, 0):
            yield Finding(
                'lease', what,
                f'is read by {row.lease_shared} jobs by its row, and by '
                f'{after.shared.get(row_id, 0)} in truth',
                'the count is set right', row.backend, row.pool,
            )


def _claims(db: Database) -> Iterator[Finding]:
    def read(session: Session) -> list[Finding]:
        sums = _sums(session)
        devices: dict[str, int] = {}
        wrong = []
        for pool in session.scalars(select(models.Pool)):
            truth = sums.get((pool.backend, pool.name), 0)
            if pool.device:
                devices[pool.device] = devices.get(pool.device, 0) + truth
            if pool.claimed_bytes != truth:
                wrong.append(Finding(
                    'claims', f'pool {pool.backend}#{pool.name}',
                    f'has {pool.claimed_bytes} bytes claimed; its rows sum '
                    f'to {truth}', 'the sum is set right', pool.backend,
                    pool.name,
                ))
        for device in session.scalars(select(models.Device)):
            truth = devices.get(device.name, 0)
            if device.claimed_bytes != truth:
                wrong.append(Finding(
                    'claims', f'device {device.name}',
                    f'has {device.claimed_bytes} bytes claimed; its pools '
                    f'sum to {truth}', 'the sum is set right',
                ))
        return wrong

    yield from db.read(read)


def _sums(session: Session) -> dict[tuple[str, str], int]:
    sums: dict[tuple[str, str], int] = {}
    for table in models.Volume, models.Snapshot:
        for backend, pool, claimed in session.execute(
            select(
                table.backend, table.pool, func.sum(table.claimed_bytes)
            ).group_by(table.backend, table.pool)
        ):
            key = backend, pool
            sums[key] = sums.get(key, 0) + int(claimed or 0)
    return sums


def _mend_one(
    db: Database,
    backends: Mapping[str, Backend],
    finding: Finding,
    adopt: bool,
) -> bool:
    row_id = finding.what.partition(' ')[2]
    if finding.kind in ('missing', 'status'):
        return _set_error(db, finding, row_id)
    if finding.kind == 'lease':
        return _set_shared(db, finding, row_id)
    if finding.kind == 'export':
        exporter = backends[finding.backend].exporter
        if exporter is None:
            return False
        exporter.unexport(row_id)
        return True
    if finding.kind == 'access' and finding.found is not None:
        return _cut_off(backends[finding.backend], finding)
    if finding.kind == 'orphan' and finding.found is not None:
        if adopt:
            return _adopt(db, backends, finding)
        return _delete(backends[finding.backend], finding)
    return finding.kind == 'claims'


def _set_error(db: Database, finding: Finding, row_id: str) -> bool:
    table = (
        models.Volume if finding.what.startswith('volume')
        else models.Snapshot
    )

    def change(session: Session) -> bool:
        row: Any = session.get(table, row_id)
        # What has gone on since it was looked at, or what a job of another
        # node holds by now, is left alone.
        return (
            row is not None
            and finding.detail.startswith(f'is {row.status}, ')
            and leases.move(
                session, table, row_id, {row.status}, status='error',
                reason=f'reconcile: {finding.detail}', updated_at=db.clock(),
            )
        )

    return db.write(change)


def _set_shared(db: Database, finding: Finding, row_id: str) -> bool:
    def change(session: Session) -> bool:
        count = 0
        for job in session.scalars(
            select(models.Job).where(models.Job.state == 'open')
        ):
            count += sum(name.endswith(row_id) for name in job.shared)
        for table in models.Volume, models.Snapshot:
            session.execute(
                update(table).where(table.id == row_id)
                .values(lease_shared=count)
                .execution_options(synchronize_session=False)
            )
        return True

    return db.write(change)


def _cut_off(backend: Backend, finding: Finding) -> bool:
    found = finding.found
    assert found is not None and found.id is not None
    driver = backend.need()
    if not isinstance(driver, base.NativeAccess):
        return False
    volume = model.Volume(
        found.id, finding.pool, found.size_bytes, found.handle
    )
    with backend.guard('revoke'):
        for host in found.hosts:
            driver.revoke(volume, host)
    return True


def _delete(backend: Backend, finding: Finding) -> bool:
    found = finding.found
    assert found is not None and found.id is not None
    driver = backend.need()
    with backend.guard('delete'):
        if not found.snapshot_of:
            driver.delete(model.Volume(
                found.id, finding.pool, found.size_bytes, found.handle
            ))
        elif isinstance(driver, base.Snapshots):
            volume = model.Volume(
                found.snapshot_of, finding.pool, found.size_bytes
            )
            driver.delete_snapshot(model.Snapshot(
                found.id, volume, found.size_bytes, found.handle
            ))
    return True


def _adopt(
    db: Database, backends: Mapping[str, Backend], finding: Finding
) -> bool:
    """Make a row again from what the storage and the sidecar say."""
    found = finding.found
    assert found is not None and found.id is not None
    note = found.sidecar
    pool = backends[finding.backend].pools[finding.pool]
    now = db.clock()
    common = {
        'id': ids.check(found.id),
        'project_id': note.get('project_id') or 'adopted',
        'user_id': note.get('user_id') or 'adopted',
        'name': note.get('name', '')[:255],
        'status': 'available',
        'backend': finding.backend,
        'pool': finding.pool,
        'handle': found.handle,
        'size_bytes': found.size_bytes,
        'created_at': now,
        'updated_at': now,
    }

    def make(session: Session) -> bool:
        if found.snapshot_of:
            origin = session.get(models.Volume, found.snapshot_of)
            if origin is None:
                return False  # its volume is not stored any more
            common['project_id'] = origin.project_id
            common['user_id'] = origin.user_id
            session.merge(models.Snapshot(
                **common, volume_id=found.snapshot_of, lease_shared=0,
                claimed_bytes=0 if pool.thin else found.size_bytes,
                deleted_at=None,
            ))
            return True
        if note.get('filled') == 'no':
            common['status'] = 'error'
            common['reason'] = 'it was being filled when its row was lost'
        elif found.is_torn:
            common['status'] = 'error_reverting'
            common['reason'] = 'it was being reverted when its row was lost'
        session.merge(models.Volume(
            **common, claimed_bytes=found.size_bytes, lease_shared=0,
            launched_at=now, deleted_at=None,
        ))
        if common['status'] == 'available':
            session.flush()  # the row is there for what comes next
            access.settle(session, found.id or '', now)
        return True

    return db.write(make)
