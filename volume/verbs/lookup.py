# SPDX-License-Identifier: Apache-2.0
"""Read rows for a caller: one, or a page of many, in few statements.

A page goes on behind a marker by the values that it is sorted by, not by
counting: what is made or deleted meanwhile shifts nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy import and_
from sqlalchemy import cast
from sqlalchemy import ColumnElement
from sqlalchemy import func
from sqlalchemy import or_
from sqlalchemy import Select
from sqlalchemy import select
from sqlalchemy import Text
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.verbs import rows

T = TypeVar('T')
Column = InstrumentedAttribute[Any]

_v, _s, _a, _j = (
    models.Volume, models.Snapshot, models.Attachment, models.Job
)

# What each list may be filtered and sorted by. Sort columns are never null.
VOLUME_FILTERS: Mapping[str, Column] = {
    'id': _v.id, 'name': _v.name, 'description': _v.description,
    'status': _v.status, 'bootable': _v.bootable,
    'multiattach': _v.multiattach, 'project_id': _v.project_id,
    'user_id': _v.user_id, 'availability_zone': _v.availability_zone,
    'volume_type': _v.volume_type, 'snapshot_id': _v.snapshot_id,
    'source_volume_id': _v.source_volume_id, 'backend': _v.backend,
    'pool': _v.pool, 'size_bytes': _v.size_bytes, 'metadata': _v.meta,
}
VOLUME_SORT: Mapping[str, Column] = {
    'id': _v.id, 'name': _v.name, 'status': _v.status,
    'size_bytes': _v.size_bytes, 'created_at': _v.created_at,
    'updated_at': _v.updated_at, 'bootable': _v.bootable,
    'availability_zone': _v.availability_zone, 'backend': _v.backend,
}
SNAPSHOT_FILTERS: Mapping[str, Column] = {
    'id': _s.id, 'name': _s.name, 'description': _s.description,
    'status': _s.status, 'volume_id': _s.volume_id,
    'project_id': _s.project_id, 'user_id': _s.user_id,
    'size_bytes': _s.size_bytes, 'metadata': _s.meta,
}
SNAPSHOT_SORT: Mapping[str, Column] = {
    'id': _s.id, 'name': _s.name, 'status': _s.status,
    'size_bytes': _s.size_bytes, 'created_at': _s.created_at,
    'updated_at': _s.updated_at, 'volume_id': _s.volume_id,
}
ATTACHMENT_FILTERS: Mapping[str, Column] = {
    'id': _a.id, 'status': _a.status, 'volume_id': _a.volume_id,
    'instance_uuid': _a.instance_uuid, 'project_id': _a.project_id,
    'host': _a.host,
}
ATTACHMENT_SORT: Mapping[str, Column] = {
    'id': _a.id, 'status': _a.status, 'created_at': _a.created_at,
    'volume_id': _a.volume_id,
}
JOB_FILTERS: Mapping[str, Column] = {
    'id': _j.id, 'state': _j.state, 'kind': _j.kind,
    'volume_id': _j.volume_id, 'snapshot_id': _j.snapshot_id,
    'backend': _j.backend, 'project_id': _j.project_id,
}
JOB_SORT: Mapping[str, Column] = {
    'id': _j.id, 'created_at': _j.created_at, 'updated_at': _j.updated_at,
    'state': _j.state, 'kind': _j.kind,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Filter:
    """``like`` finds the text anywhere in the value."""

    key: str
    value: Any
    like: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Which rows of a list: ``sort`` is (key, descending) pairs."""

    limit: int = 1000
    marker: str | None = None
    offset: int = 0
    sort: tuple[tuple[str, bool], ...] = (('created_at', True),)
    count: bool = False
    filters: tuple[Filter, ...] = ()
    all_projects: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """A page; ``more`` says that others come after it."""

    rows: list[T]
    more: bool = False
    count: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class VolumeSeen:
    """A volume with what its view shows beside the row."""

    row: models.Volume
    attachments: Sequence[models.Attachment] = ()
    host: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class BackendSeen:
    """A backend with its pools."""

    row: models.Backend
    pools: Sequence[models.Pool]


def volume(core: Core, caller: Caller, volume_id: str) -> VolumeSeen:
    """Return a volume with its attachments, by one statement.

    :raises NotFound: there is none, or it is another project's
    """

    def look(session: Session) -> VolumeSeen:
        found = session.execute(
            select(models.Volume, models.Attachment, models.Backend.host)
            .outerjoin(
                models.Attachment,
                models.Attachment.volume_id == models.Volume.id,
            )
            .outerjoin(
                models.Backend, models.Backend.name == models.Volume.backend
            )
            .where(
                models.Volume.id == ids.check(volume_id, 'volume id'),
                models.Volume.deleted_at.is_(None),
            )
        ).all()
        if not found or not rows.sees(caller, found[0][0]):
            raise errors.NotFound(f'volume {volume_id} could not be found')
        return VolumeSeen(
            found[0][0],
            [each for _, each, _ in found if each is not None],
            found[0][2] or '',
        )

    return core.db.read(look)


def volumes(
    core: Core, caller: Caller, page: Page, *, detail: bool = True
) -> Found[VolumeSeen]:
    """Return a page of volumes, with their attachments in ``detail``."""

    def look(session: Session) -> Found[VolumeSeen]:
        found = _page(
            session, caller, models.Volume, page, VOLUME_FILTERS, VOLUME_SORT
        )
        if not detail:
            return Found(
                [VolumeSeen(row) for row in found.rows],
                found.more, found.count,
            )
        beside: dict[str, list[models.Attachment]] = {}
        if found.rows:
            for each in session.scalars(
                select(models.Attachment).where(
                    models.Attachment.volume_id.in_(
                        [row.id for row in found.rows]
                    )
                )
            ):
                beside.setdefault(each.volume_id, []).append(each)
        hosts = {
            each.name: each.host for each in session.execute(
                select(models.Backend.name, models.Backend.host)
            )
        }
        return Found(
            [
                VolumeSeen(
                    row, beside.get(row.id, ()), hosts.get(row.backend, '')
                )
                for row in found.rows
            ],
            found.more, found.count,
        )

    return core.db.read(look)


def snapshot(
    core: Core, caller: Caller, snapshot_id: str
) -> models.Snapshot:
    """Return a snapshot.

    :raises NotFound: there is none, or it is another project's
    """
    return core.db.read(
        lambda session: rows.snapshot(session, caller, snapshot_id)
    )


def snapshots(
    core: Core, caller: Caller, page: Page
) -> Found[models.Snapshot]:
    """Return a page of snapshots."""
    return core.db.read(lambda session: _page(
        session, caller, models.Snapshot, page,
        SNAPSHOT_FILTERS, SNAPSHOT_SORT,
    ))


def attachment(
    core: Core, caller: Caller, attachment_id: str
) -> models.Attachment:
    """Return an attachment.

    :raises NotFound: there is none, or it is another project's
    """
    return core.db.read(
        lambda session: rows.attachment(session, caller, attachment_id)
    )


def attachments(
    core: Core, caller: Caller, page: Page
) -> Found[models.Attachment]:
    """Return a page of attachments."""
    return core.db.read(lambda session: _page(
        session, caller, models.Attachment, page,
        ATTACHMENT_FILTERS, ATTACHMENT_SORT,
    ))


def jobs(core: Core, caller: Caller, page: Page) -> Found[models.Job]:
    """Return a page of jobs."""
    return core.db.read(lambda session: _page(
        session, caller, models.Job, page, JOB_FILTERS, JOB_SORT
    ))


def backends(core: Core, caller: Caller) -> list[BackendSeen]:
    """Return the backends that the caller's volumes may lie on."""

    def look(session: Session) -> list[BackendSeen]:
        pools: dict[str, list[models.Pool]] = {}
        for pool in session.scalars(
            select(models.Pool).order_by(models.Pool.name)
        ):
            pools.setdefault(pool.backend, []).append(pool)
        return [
            BackendSeen(row, pools.get(row.name, ()))
            for row in session.scalars(
                select(models.Backend).order_by(models.Backend.name)
            )
            if caller.is_admin or not row.projects
            or caller.project_id in row.projects
        ]

    return core.db.read(look)


def services(core: Core) -> list[models.Service]:
    """Return the processes that serve."""
    return core.db.read(lambda session: list(session.scalars(
        select(models.Service).order_by(models.Service.host)
    )))


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """How many things of which size a project has: size in bytes to count."""

    volumes: Mapping[int, int]
    snapshots: Mapping[int, int]


def usage(core: Core, project_id: str | None) -> Usage:
    """Return what a project uses; ``None`` is all of them together."""

    def sizes(
        session: Session,
        table: type[models.Volume] | type[models.Snapshot],
    ) -> dict[int, int]:
        query = (
            select(table.size_bytes, func.count().label('number'))
            .where(table.deleted_at.is_(None))
            .group_by(table.size_bytes)
        )
        if project_id is not None:
            query = query.where(table.project_id == project_id)
        return {row.size_bytes: row.number for row in session.execute(query)}

    return core.db.read(lambda session: Usage(
        sizes(session, models.Volume), sizes(session, models.Snapshot)
    ))


def metadata_values(
    core: Core, project_id: str | None
) -> dict[str, list[str]]:
    """Return every metadata key of volumes with its distinct values."""

    def look(session: Session) -> dict[str, list[str]]:
        # As text, for most volumes have the same few; each is read once.
        query = select(cast(models.Volume.meta, Text)).distinct().where(
            models.Volume.deleted_at.is_(None)
        )
        if project_id is not None:
            query = query.where(models.Volume.project_id == project_id)
        result: dict[str, set[str]] = {}
        for text in session.scalars(query):
            for key, value in json.loads(text).items():
                result.setdefault(key, set()).add(value)
        return {key: sorted(values) for key, values in result.items()}

    return core.db.read(look)


def _page(
    session: Session,
    caller: Caller,
    table: Any,
    page: Page,
    filters: Mapping[str, Column],
    sortable: Mapping[str, Column],
) -> Found[Any]:
    query = select(table)
    if hasattr(table, 'deleted_at'):
        query = query.where(table.deleted_at.is_(None))
    if not (caller.is_admin and page.all_projects):
        query = query.where(table.project_id == caller.project_id)
    for each in page.filters:
        query = query.where(_condition(filters, each))
    count = session.scalar(
        select(func.count()).select_from(query.subquery())
    ) if page.count else None
    order = _order(page, sortable)
    if page.marker is not None:
        query = _behind(session, caller, table, page.marker, query, order)
    query = query.order_by(
        *(col.desc() if down else col.asc() for col, down in order)
    ).offset(page.offset).limit(page.limit + 1)
    found = list(session.scalars(query))
    more = len(found) > page.limit
    return Found(found[:page.limit], more and page.limit > 0, count)


def _condition(
    filters: Mapping[str, Column], wanted: Filter
) -> ColumnElement[bool]:
    column = filters[wanted.key]
    if isinstance(wanted.value, Mapping):
        return and_(*(
            column[key].as_string() == value
            for key, value in wanted.value.items()
        ))
    if wanted.like:
        return column.contains(wanted.value, autoescape=True)
    equal: ColumnElement[bool] = column == wanted.value
    return equal


def _order(
    page: Page, sortable: Mapping[str, Column]
) -> list[tuple[Column, bool]]:
    order = [(sortable[key], down) for key, down in page.sort]
    if all(key != 'id' for key, _ in page.sort):
        # An order without ties, or a page could skip or repeat a row.
        order.append((sortable['id'], order[-1][1] if order else True))
    return order


def _behind(
    session: Session,
    caller: Caller,
    table: Any,
    marker: str,
    query: Select[Any],
    order: list[tuple[Column, bool]],
) -> Select[Any]:
    """Go on behind a row; it may have been deleted since it was seen."""
    row = session.get(table, marker)
    if row is None or not rows.sees(caller, row):
        raise errors.NotFound(
            f'marker {marker:.80} could not be found; begin the list again'
        )
    ahead: list[ColumnElement[bool]] = []
    equal: list[ColumnElement[bool]] = []
    for column, down in order:
        value = getattr(row, column.key)
        ahead.append(and_(
            *equal, column < value if down else column > value
        ))
        equal.append(column == value)
    return query.where(or_(*ahead))
