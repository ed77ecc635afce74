# SPDX-License-Identifier: Apache-2.0
"""What the rows say of hosts' access to volumes, and how that changes.

Each transition is one conditional UPDATE. A volume's status follows from its
attachments: while a host can reach it, it is never ``available``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import case
from sqlalchemy import ColumnElement
from sqlalchemy import exists
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy import update as sql_update
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.verbs import rows


def with_attachments(
    session: Session, caller: Caller, volume_id: str
) -> tuple[models.Volume, list[models.Attachment]]:
    """Return a volume and its attachments, in one statement."""
    volumes, attachments = models.Volume, models.Attachment
    found = session.execute(
        select(volumes, attachments)
        .outerjoin(attachments, attachments.volume_id == volumes.id)
        .where(volumes.id == ids.check(volume_id, 'volume id'))
    ).all()
    if (
        not found
        or found[0][0].deleted_at is not None
        or not rows.sees(caller, found[0][0])
    ):
        raise errors.NotFound(f'volume {volume_id} could not be found')
    return found[0][0], [each for _, each in found if each is not None]


def mine(
    there: list[models.Attachment], host: str, attachment_id: str | None
) -> models.Attachment | None:
    """Return the attachment that is named, or else the host's own.

    :raises NotFound: the volume has none of that name
    """
    for each in there:
        if each.id == attachment_id:
            return each
        if attachment_id is None and each.host == host:
            return each
    if attachment_id:
        raise errors.NotFound(f'attachment {attachment_id} could not be found')
    return None


def is_in(mine: models.Attachment) -> bool:
    """Say whether the host was let in, and not only may have been."""
    return mine.is_connected and mine.status != 'error_attaching'


def need_room(
    row: models.Volume,
    there: list[models.Attachment],
    mine: models.Attachment | None,
    host: str,
) -> None:
    """Refuse a second attachment, unless the volume is for several.

    :raises Invalid: it has another one
    """
    if row.multiattach:
        return
    for other in there:
        if other is not mine:
            raise errors.Invalid(
                f'volume {row.id} is {_taken(other, host)} by attachment '
                f'{other.id}, and is not multi-attach'
            )


def _taken(other: models.Attachment, host: str) -> str:
    # Which host another one is, is not for everybody.
    if other.instance_uuid:
        return f'attached to {other.instance_uuid}'
    if not other.host:
        return 'reserved'
    if other.host == host:
        return f'attached to this same host, {host},'
    return 'attached to another host'


def need_same(mine: models.Attachment, host: str, mode: str) -> None:
    """Refuse to say again, of another access, that it is what is asked for.

    :raises Conflict: it is another host's, or may write and should not
    """
    if not mine.is_connected:
        return
    if mine.host != host:
        raise errors.Conflict(
            f'attachment {mine.id} is connected to another host than {host}; '
            'end it first'
        )
    if (mode, mine.mode) == ('ro', 'rw'):
        raise errors.Conflict(
            f'host {host} has attachment {mine.id} for writing; end it '
            'first, then attach read-only'
        )


def coming(job: models.Job, volume_id: str) -> list[tuple[str, str]]:
    """Return which attachments, of which hosts, a job lets in."""
    if job.kind == 'attach':
        return [(job.args['attachment_id'], job.args['connector']['host'])]
    return [
        (attachment_id, connector.get('host', ''))
        for attachment_id, connector, _, *volume in job.args['attachments']
        if volume in ([volume_id], [])  # [] of an earlier release
    ]


def way(
    session: Session,
    row: models.Volume,
    there: list[models.Attachment],
    mine: models.Attachment | None,
    mode: str,
    host: str,
) -> str:
    """Return how the host may use the volume: ``ro`` or ``rw``.

    :raises Unsupported: the backend's way to its hosts cannot serve
        several of them, or one of them twice, or not refuse writes
    """
    mode = 'ro' if row.readonly else mode
    others = [each for each in there if each is not mine]
    wanted = [
        (ability, verb) for ability, verb, is_wanted in (
            ('read_only', 'attach a volume read-only', mode == 'ro'),
            ('multi_attach', 'serve several hosts', bool(others)),
            (
                'twice_per_host', f'serve host {host} twice',
                any(each.host == host for each in others),
            ),
        ) if is_wanted
    ]
    # What an earlier release reported, the exporter will say.
    pool = rows.pool(session, row) if wanted else None
    if pool and any(name.startswith('export:') for name in pool.features):
        for ability, verb in wanted:
            rows.need_ability(pool, ability, verb)
    return mode


def settled() -> ColumnElement[str]:
    """Return the status that the attachments left over give a volume."""
    attachments, volumes = models.Attachment, models.Volume
    return case(
        (
            exists().where(
                attachments.volume_id == volumes.id,
                attachments.status == 'attached',
            ),
            'in-use',
        ),
        (
            # Nobody knows whether its host can reach the volume.
            exists().where(
                attachments.volume_id == volumes.id,
                attachments.status == 'error_attaching',
            ),
            'error_attaching',
        ),
        (
            exists().where(
                attachments.volume_id == volumes.id,
                attachments.status == 'attaching',
                or_(
                    attachments.instance_uuid.is_not(None),
                    attachments.is_connected.is_(True),
                ),
            ),
            'attaching',
        ),
        (
            exists().where(
                attachments.volume_id == volumes.id,
                attachments.status == 'reserved',
            ),
            'reserved',
        ),
        else_='available',
    )


def settle(session: Session, volume_id: str, now: float) -> None:
    """Give a volume the status that its attachments say."""
    volumes = models.Volume
    session.execute(
        sql_update(volumes).where(volumes.id == volume_id)
        .values(status=settled(), updated_at=now)
        .execution_options(synchronize_session=False)
    )


def owned(caller: Caller, table: type[models.Volume]) -> list[Any]:
    """Return the conditions that a live row is one that the caller sees."""
    owned: list[Any] = [table.deleted_at.is_(None)]
    if not caller.is_admin:
        owned.append(table.project_id == caller.project_id)
    return owned


def try_move(
    session: Session,
    core: Core,
    caller: Caller,
    volume_id: str,
    statuses: Collection[str],
    status: str,
) -> bool:
    """Change a volume's status if it is one of these; say whether it was."""
    volumes = models.Volume
    moved = session.execute(
        sql_update(volumes)
        .where(
            volumes.id == ids.check(volume_id, 'volume id'),
            volumes.status.in_(statuses),
            *owned(caller, volumes),
        )
        .values(status=status, updated_at=core.db.clock())
        .execution_options(synchronize_session=False)
    )
    return bool(moved.rowcount)  # type: ignore[attr-defined]


def move(
    core: Core,
    caller: Caller,
    volume_id: str,
    statuses: Collection[str],
    status: str,
    verb: str,
) -> None:
    """Change a volume's status.

    :raises Invalid: it is none of these
    """

    def accept(session: Session) -> None:
        if not try_move(
            session, core, caller, volume_id, statuses, status
        ):
            row = rows.volume(session, caller, volume_id)
            rows.refuse(row, statuses, verb)

    core.db.write(accept)
