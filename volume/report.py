# SPDX-License-Identifier: Apache-2.0
"""Report what backends and pools are like now; pools' claims are kept.

A backend may have several managers. Each says in its service's row which
backends it has; one whose own is up writes the rows of the backend and its
pools, and the others leave them alone for as long as that one does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy.orm import Session

from volume import model
from volume.backends import Backend
from volume.db import models
from volume.drivers import base


def report(
    session: Session,
    backends: list[Backend],
    host: str,
    now: float,
    down_s: float = 60.0,
    machine: str = '',
) -> None:
    """Write the state of this manager's backends and their pools.

    ``machine`` is what services that run side by side have in common.
    """
    mine = session.get(models.Service, host)
    if mine is not None:
        mine.backends = {each.name: each.reason for each in backends}
    # Long before placement would miss it, another writes the row.
    heard_after = now - down_s / 2
    others = _up_elsewhere(session, host, heard_after)
    for backend in backends:
        row = session.get(models.Backend, backend.name)
        elsewhere = others.get(backend.name, set())
        if elsewhere and not backend.is_up:
            continue
        if row is None:
            row = models.Backend(name=backend.name, enabled=True)
            session.add(row)
        elif row.host in elsewhere and row.updated_at >= heard_after:
            continue
        row.host = host
        row.is_up = backend.is_up
        row.reason = backend.reason
        row.updated_at = now
        _settings(row, backend.conf)
        if backend.conf and not backend.hindrance:
            row.exporter = backend.conf.exporter
        _pools(session, backend, machine or host, now)
    _retire(session, {backend.name for backend in backends}, host, others)
    _devices(session)


def hinder(session: Session, backends: Iterable[Backend]) -> None:
    """Note what keeps backends down whatever their storage says.

    Hosts that another exporter has let in, or is letting in: this one would
    not find their access when it ends, and would call it ended. They are
    looked for only where the exporter is not the one that was reported.
    """
    rows = {row.name: row.exporter for row in session.execute(
        select(models.Backend.name, models.Backend.exporter)
    )}
    for backend in backends:
        backend.hindrance = backend.former_exporter = ''
        former, now = rows.get(backend.name, ''), _exporter(backend)
        if former in ('', now) or not now:
            continue
        if count := _let_in(session, backend.name, now):
            backend.former_exporter = former
            backend.hindrance = (
                f'{count} attachments were made by exporter {former}, which '
                f'{now} cannot end: set exporter = {former} again, end them, '
                'and change it then'
            )


def _exporter(backend: Backend) -> str:
    """Return the exporter's name; nothing if hosts need none, or it is bad."""
    if backend.conf is None or isinstance(backend.driver, base.NativeAccess):
        return ''
    return str(backend.conf.exporter)


def _let_in(session: Session, name: str, now: str) -> int:
    """Count what other exporters have let in, or are letting in."""
    table, jobs = models.Attachment, models.Job
    made = session.scalar(select(func.count()).where(
        table.backend == name, table.is_connected.is_(True),
        table.exporter != now,
    )) or 0
    coming = session.scalar(select(func.count()).where(
        jobs.backend == name, jobs.state == 'open', jobs.kind == 'attach',
    )) or 0
    return made + coming


def _up_elsewhere(
    session: Session, host: str, heard_after: float
) -> dict[str, set[str]]:
    """Return for each backend the other services whose own of it is up."""
    found: dict[str, set[str]] = {}
    for row in session.scalars(
        select(models.Service).where(
            models.Service.host != host,
            models.Service.heard_at >= heard_after,
            models.Service.is_fenced.is_(False),
        )
    ):
        for name, reason in (row.backends or {}).items():
            if not reason:
                found.setdefault(name, set()).add(row.host)
    return found


def _retire(
    session: Session, names: set[str], host: str, others: dict[str, set[str]]
) -> None:
    """Take down the backends that this manager no longer has."""
    for row in session.scalars(
        select(models.Backend).where(models.Backend.host == host)
    ):
        if row.name not in names and row.name not in others:
            row.is_up = False
            row.reason = f'it is not enabled on {host}'


def _settings(row: models.Backend, conf: Any) -> None:
    row.driver = conf.driver if conf else ''
    row.tags = list(conf.tags) if conf else []
    row.projects = list(conf.projects) if conf else []
    row.cluster = conf.cluster if conf else ''
    row.role = conf.role if conf else ''
    row.cost = conf.cost if conf else 0


def _pools(
    session: Session, backend: Backend, machine: str, now: float
) -> None:
    rows = {
        row.name: row for row in session.scalars(
            select(models.Pool).where(models.Pool.backend == backend.name)
        )
    }
    for name, row in rows.items():
        if name not in backend.pools or not backend.is_up:
            row.is_up = False
    if not backend.is_up:
        return
    for name, pool in backend.pools.items():
        if name not in rows:
            rows[name] = models.Pool(
                backend=backend.name, name=name, claimed_bytes=0
            )
            session.add(rows[name])
        _fill(rows[name], pool, backend, machine, now)


def _fill(
    row: models.Pool, pool: model.Pool, backend: Backend, machine: str,
    now: float,
) -> None:
    conf: Any = backend.conf
    total, free = pool.total_bytes, pool.free_bytes
    if conf.capacity_gib is not None:
        total = min(total, int(conf.capacity_gib * model.GIB))
    reserved = total * conf.reserved_percent // 100
    times = conf.oversubscription if pool.thin else 1.0
    row.is_up = True
    row.total_bytes = total
    row.limit_bytes = int(total * times) - reserved
    row.free_bytes = max(free - reserved, 0)
    row.hidden_bytes = pool.hidden_bytes
    row.granularity_bytes = pool.granularity_bytes
    row.max_volume_bytes = min(pool.max_volume_bytes, 1 << 62)
    row.thin = pool.thin
    row.features = sorted(pool.features | backend.abilities().names())
    row.device = f'{machine}/{pool.device}' if pool.device else ''
    row.updated_at = now


def _devices(session: Session) -> None:
    """Give each physical store the largest budget that a pool of it has.

    What is promised of it is the sum of its pools' claims: a pool that has
    moved to another store takes them along.
    """
    session.flush()
    devices = {
        row.name: row for row in session.scalars(select(models.Device))
    }
    budgets = {name: (0, 0, 0) for name in devices}
    for pool in session.scalars(select(models.Pool)):
        if pool.device:
            limit, claimed, hidden = budgets.get(pool.device, (0, 0, 0))
            budgets[pool.device] = (
                max(limit, pool.limit_bytes), claimed + pool.claimed_bytes,
                hidden + pool.hidden_bytes,
            )
    for name, (limit, claimed, hidden) in budgets.items():
        if name not in devices:
            devices[name] = models.Device(name=name)
            session.add(devices[name])
        devices[name].limit_bytes = limit - hidden
        devices[name].claimed_bytes = claimed
