# SPDX-License-Identifier: Apache-2.0
"""What is going on, as the rows say: counts, and what needs a look.

All of it is read in one transaction, by counting in the database: the size
of the answer is bounded by ``limit``, whatever the number of rows. In each
list what is in trouble comes first. ``look`` says in words what a person
should look at, and why; where it is empty, all is well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import and_
from sqlalchemy import case
from sqlalchemy import ColumnElement
from sqlalchemy import Executable
from sqlalchemy import exists
from sqlalchemy import func
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy.orm import Session

from volume.db import models

Json = dict[str, Any]
Table = type[models.Volume] | type[models.Snapshot]
TABLES: tuple[Table, ...] = (models.Volume, models.Snapshot)

SLOW_S = 60.0
"""A job that nobody has taken for so long, or a status that no job leads on,
has been forgotten."""
NEARLY_FULL = 0.9
LONG_S = 10.0
"""A job that has run for so long is shown with its progress."""
HOSTS = frozenset({'attaching', 'detaching', 'reserved'})
"""Statuses that wait for a host's next call, and end by themselves."""


def read(
    session: Session,
    now: float,
    limit: int,
    *,
    silent_s: float,
    waits_for_host_s: float,
) -> Json:
    """Return what is going on; lists have at most ``limit`` items.

    A process that was not heard of for ``silent_s`` counts as down; what
    waits for a host ends by itself after ``waits_for_host_s``.
    """
    alive: dict[str, Json] = {
        row.host: row.backends or {}
        for row in session.scalars(select(models.Service))
        if not row.is_fenced and row.heard_at >= now - silent_s
    }
    view: Json = {
        'services': _services(session, now, limit, silent_s),
        'backends': _backends(session, now, limit, alive),
        'pools': _pools(session, now, limit),
        'jobs': _jobs(session, now, limit),
        'leases': _leases(session, now),
        'stuck': _stuck(session, now, limit, waits_for_host_s),
        'errors': _errors(session, limit),
        'counts': _counts(session),
    }
    view['look'] = [
        *_look_at_processes(view), *_look_at_pools(view),
        *_look_at_work(view),
    ]
    return view


def _services(
    session: Session, now: float, limit: int, silent_s: float
) -> Json:
    rows = [
        {
            'host': row.host,
            'state': 'fenced' if row.is_fenced else (
                'up' if row.heard_at >= now - silent_s else 'silent'
            ),
            'heard_s': round(max(now - row.heard_at, 0), 1),
            'up_s': round(max(row.heard_at - row.started_at, 0), 1),
            'roles': list(row.roles),
            'version': row.version,
            # What is wrong with its own of each backend; nothing if it is up.
            'backends': dict(row.backends or {}),
        }
        for row in session.scalars(
            select(models.Service).order_by(models.Service.host)
        )
    ]
    return _bounded(rows, limit, lambda row: row['state'] == 'up')


def _backends(
    session: Session, now: float, limit: int, alive: dict[str, Json]
) -> Json:
    served = {
        name for says in alive.values()
        for name, reason in says.items() if not reason
    }

    def state(row: models.Backend) -> str:
        if not row.enabled:
            return 'disabled'
        if not row.is_up:
            return 'down'
        # What it was like when its service was last heard of.
        return 'up' if row.host in alive or row.name in served else 'unserved'

    rows = [
        {
            'backend': row.name,
            'state': state(row),
            'host': row.host,
            'driver': row.driver,
            'exporter': row.exporter,
            'checked_s': round(max(now - row.updated_at, 0), 1),
            'reason': row.reason,
        }
        for row in session.scalars(
            select(models.Backend).order_by(models.Backend.name)
        )
    ]
    return _bounded(
        rows, limit, lambda row: row['state'] in ('up', 'disabled')
    )


def _pools(session: Session, now: float, limit: int) -> Json:
    devices = {
        row.name: row for row in session.scalars(select(models.Device))
    }
    rows: list[Json] = []
    for row in session.scalars(select(models.Pool).order_by(
        models.Pool.backend, models.Pool.name
    )):
        promised = row.claimed_bytes + row.hidden_bytes
        room = row.limit_bytes - promised
        if device := devices.get(row.device):
            # Pools that lie on one store share what it may promise.
            room = min(room, device.limit_bytes - device.claimed_bytes)
        rows.append({
            'pool': f'{row.backend}#{row.name}',
            'state': 'up' if row.is_up else 'down',
            'total_bytes': row.total_bytes,
            'free_bytes': row.free_bytes,
            'promised_bytes': promised,
            'limit_bytes': row.limit_bytes,
            'room_bytes': max(room, 0),
            # More than 100 where the pool may promise more than it has.
            'limit_percent': _percent(row.limit_bytes, row.total_bytes),
            'promised_percent': _percent(promised, row.limit_bytes),
            'free_percent': min(
                _percent(row.free_bytes, row.total_bytes), 100
            ),
            'alarm': _alarm(row, promised, room),
        })
    rows.sort(key=lambda row: -row['promised_percent'])
    return _bounded(
        rows, limit, lambda row: row['state'] == 'up' and not row['alarm']
    )


def _alarm(row: models.Pool, promised: int, room: int) -> str:
    """Say what will go wrong with a pool, and what helps."""
    words = []
    if promised > row.total_bytes:
        words.append(
            'more is promised than it holds: watch its free space, which '
            'will not do for all'
        )
    if promised > row.limit_bytes:
        words.append('more is promised than its limit: it takes no more')
    elif promised > NEARLY_FULL * row.limit_bytes:
        words.append('nearly all is promised: add storage, or delete')
    elif room < (1 - NEARLY_FULL) * row.limit_bytes:
        words.append(
            'other pools on the same storage have nearly all: add storage, '
            'or delete there'
        )
    if row.free_bytes < (1 - NEARLY_FULL) * row.total_bytes:
        words.append('its storage is nearly full: add storage, or delete')
    return '; '.join(words)


def _jobs(session: Session, now: float, limit: int) -> Json:
    job = models.Job
    state = _job_state(now)
    counts = [
        {'kind': kind, 'state': word, 'count': count}
        for kind, word, count in session.execute(
            select(job.kind, state, func.count())
            .where(job.state == 'open').group_by(job.kind, state)
            .order_by(job.kind, state)
        )
    ]
    oldest = session.scalar(
        select(func.min(job.created_at)).where(job.state == 'open')
    )
    late = and_(
        job.owner.is_(None), job.due_at < now - SLOW_S, job.attempts == 0
    )
    troubled = or_(
        job.attempts > 0, job.direction == 'undo', _is_expired(now), late
    )
    shown = session.execute(
        select(job, state).where(
            job.state == 'open',
            or_(troubled, job.created_at < now - LONG_S),
        ).order_by(troubled.desc(), job.created_at).limit(limit)
    ).all()
    late_count = session.scalar(
        select(func.count()).where(job.state == 'open', late)
    )
    return {
        'open': sum(each['count'] for each in counts),
        'by_kind': counts,
        'oldest_s': round(now - oldest, 1) if oldest is not None else None,
        'late': late_count or 0,
        'rows': [_job(row, word, now) for row, word in shown],
    }


def _job(row: models.Job, state: str, now: float) -> Json:
    return {
        'job': row.id, 'kind': row.kind, 'state': state,
        'backend': row.backend, 'volume_id': row.volume_id,
        'request_id': row.request_id,
        'age_s': round(now - row.created_at, 1),
        'step': row.step, 'attempts': row.attempts,
        'next_s': round(max(row.due_at - now, 0), 1)
        if row.owner is None else None,
        'gives_up_s': round(row.give_up_at - now, 1)
        if row.give_up_at is not None else None,
        'done_bytes': row.done_bytes, 'total_bytes': row.total_bytes,
        'rate_bytes_per_s': row.rate_bytes_per_s,
        'held_by': row.owner_host if row.expires_at > now else '',
        'error': row.error,
    }


def _job_state(now: float) -> ColumnElement[str]:
    job = models.Job
    return case(
        (_is_expired(now), 'expired'),
        (job.direction == 'undo', 'undoing'),
        (job.attempts > 0, 'retrying'),
        (job.owner.is_not(None), 'running'),
        else_='waiting',
    )


def _is_expired(now: float) -> ColumnElement[bool]:
    """Return the condition that a job's holder has not renewed its lease."""
    return and_(models.Job.owner.is_not(None), models.Job.expires_at <= now)


def _leases(session: Session, now: float) -> list[Json]:
    job = models.Job
    return [
        {'host': host, 'held': int(held or 0), 'expired': int(expired or 0)}
        for host, held, expired in session.execute(
            select(
                job.owner_host,
                func.sum(case((_is_expired(now), 0), else_=1)),
                func.sum(case((_is_expired(now), 1), else_=0)),
            )
            .where(job.state == 'open', job.owner.is_not(None))
            .group_by(job.owner_host).order_by(job.owner_host)
        )
    ]


def _stuck(
    session: Session, now: float, limit: int, waits_for_host_s: float
) -> Json:
    """Return rows that are under way, with nothing that leads them on."""
    rows: list[Json] = []
    count = 0
    for table in TABLES:
        is_led = or_(
            exists().where(
                models.Job.id == table.lease_job, models.Job.state == 'open'
            ),
            table.lease_shared > 0,
        )
        found = and_(
            table.deleted_at.is_(None), ~is_led,
            or_(
                and_(
                    table.status.in_(models.TRANSITIONAL - HOSTS),
                    table.updated_at < now - SLOW_S,
                ),
                and_(
                    table.status.in_(HOSTS - {'reserved'}),
                    table.updated_at < now - waits_for_host_s - SLOW_S,
                ),
            ),
        )
        count += session.scalar(
            select(func.count()).select_from(table).where(found)
        ) or 0
        rows += [
            {
                'what': f'{table.__name__.lower()} {row_id}',
                'status': status,
                'since_s': round(now - updated_at, 1),
            }
            for row_id, status, updated_at in session.execute(
                select(table.id, table.status, table.updated_at)
                .where(found).order_by(table.updated_at).limit(limit)
            )
        ]
    return {'count': count, 'rows': rows[:limit]}


def _errors(session: Session, limit: int) -> Json:
    """Return what is in error.

    What failed while it was made is its owner's to delete; what was good
    before, or is stuck halfway, is an operator's.
    """
    rows: list[Json] = []
    counts: dict[str, int] = {}
    grave = 0
    for table in TABLES:
        live = and_(table.deleted_at.is_(None), table.status.like('error%'))
        is_grave: ColumnElement[bool] = table.status != 'error'
        if table is models.Volume:
            is_grave = or_(is_grave, models.Volume.launched_at.is_not(None))
        for status, bad, count in session.execute(
            select(
                table.status, func.sum(case((is_grave, 1), else_=0)),
                func.count(),
            ).where(live).group_by(table.status)
        ):
            counts[status] = counts.get(status, 0) + count
            grave += int(bad or 0)
        rows += [
            {
                'what': f'{table.__name__.lower()} {row.id}',
                'status': row.status, 'is_grave': bool(bad),
                'reason': row.reason,
            }
            for row, bad in session.execute(
                select(table, case((is_grave, 1), else_=0)).where(live)
                .order_by(
                    case((is_grave, 0), else_=1), table.updated_at.desc()
                ).limit(limit)
            )
        ]
    rows.sort(key=lambda row: not row['is_grave'])
    return {'counts': counts, 'grave': grave, 'rows': rows[:limit]}


def _counts(session: Session) -> Json:
    """Return how many rows there are, live ones and history."""

    def live(table: Table) -> Json:
        return _by_first(
            session, select(table.status, func.count())
            .where(table.deleted_at.is_(None))
            .group_by(table.status).order_by(table.status)
        )

    def history(table: Table) -> int:
        return session.scalar(
            select(func.count()).select_from(table)
            .where(table.deleted_at.is_not(None))
        ) or 0

    ended = _by_first(
        session, select(models.Job.state, func.count())
        .where(models.Job.state != 'open').group_by(models.Job.state)
    )
    return {
        'volumes': live(models.Volume),
        'snapshots': live(models.Snapshot),
        'attachments': _by_first(
            session, select(models.Attachment.status, func.count())
            .group_by(models.Attachment.status)
        ),
        'history': {
            'ended_jobs': sum(ended.values()),
            'deleted_volumes': history(models.Volume),
            'deleted_snapshots': history(models.Snapshot),
        },
    }


def _look_at_processes(view: Json) -> Iterable[str]:
    services = view['services']
    down = {
        row['backend'] for row in view['backends']['rows']
        if row['state'] == 'down'
    }
    if not any(row['state'] == 'up' for row in services['rows']):
        yield 'no service is up: start volume-service, or see its log'
    for row in services['rows']:
        if row['state'] == 'silent':
            yield (
                f'service {row["host"]} was last heard of '
                f'{row["heard_s"]:.0f} s ago: see whether it runs, and its '
                'log; if its node is gone for good, volume-manage node fence '
                f'{row["host"]}'
            )
        elif row['state'] == 'fenced':
            yield (
                f'service {row["host"]} is fenced: others take over its '
                'jobs; start it again, or leave it dead'
            )
        for name, reason in row['backends'].items():
            # Where no other has it up, the backend itself is down.
            if reason and row['state'] == 'up' and name not in down:
                yield f'backend {name} is down on {row["host"]}: {reason}'
    for row in view['backends']['rows']:
        if row['state'] == 'down':
            yield (
                f'backend {row["backend"]} is down: '
                f'{row["reason"] or "it was not checked yet"}'
            )
        elif row['state'] == 'unserved':
            yield (
                f'backend {row["backend"]} is served by {row["host"]}, which '
                'is not up'
            )


def _look_at_pools(view: Json) -> Iterable[str]:
    down = {
        row['backend'] for row in view['backends']['rows']
        if row['state'] == 'down'
    }
    for row in view['pools']['rows']:
        if row['alarm']:
            yield f'pool {row["pool"]}: {row["alarm"]}'
        if row['state'] == 'down' and (
            row['pool'].partition('#')[0] not in down
        ):
            yield (
                f'pool {row["pool"]} is gone from its backend: is its '
                'directory still configured?'
            )


def _look_at_work(view: Json) -> Iterable[str]:
    jobs = view['jobs']
    by_state: dict[str, int] = {}
    for each in jobs['by_kind']:
        by_state[each['state']] = (
            by_state.get(each['state'], 0) + each['count']
        )
    if count := by_state.get('retrying'):
        yield (
            f'{count} jobs are tried again: see their errors below; volume '
            'jobs cancel or retry'
        )
    if count := by_state.get('undoing'):
        yield f'{count} jobs have failed and are being undone'
    if count := by_state.get('expired'):
        yield (
            f'{count} jobs have lost their holder: its node takes them up '
            'again, or another after volume-manage node fence'
        )
    if jobs['late']:
        yield (
            f'{jobs["late"]} jobs wait for over {SLOW_S:.0f} s, and nobody '
            'takes them: is the service of their backend up?'
        )
    if count := view['stuck']['count']:
        yield (
            f'{count} volumes or snapshots are stuck in a status that '
            'nothing leads on: volume-manage reconcile'
        )
    if count := view['errors']['grave']:
        yield (
            f'{count} volumes or snapshots that were good are in error: '
            'volume show has the reason'
        )


def _bounded(rows: list[Json], limit: int, is_well: Any) -> Json:
    return {
        'count': len(rows), 'rows': sorted(rows, key=is_well)[:limit],
    }


def _by_first(session: Session, query: Executable) -> Json:
    return {row[0]: row[1] for row in session.execute(query)}


def _percent(part: int, whole: int) -> int:
    return round(100 * part / whole) if whole > 0 else 0
