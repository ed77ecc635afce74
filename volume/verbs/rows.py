# SPDX-License-Identifier: Apache-2.0
"""Rows as verbs need them: found for a caller, taken, or a clear refusal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from sqlalchemy import select
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume.context import Caller
from volume.core import Core
from volume.core import LeaseTaken
from volume.db import jobs
from volume.db import leases
from volume.db import models


def volume(
    session: Session, caller: Caller, volume_id: str
) -> models.Volume:
    """Return a live volume that the caller may see.

    :raises NotFound: there is none, or it is another project's
    """
    row = session.get(models.Volume, ids.check(volume_id, 'volume id'))
    if row is None or row.deleted_at is not None or not sees(caller, row):
        raise errors.NotFound(f'volume {volume_id} could not be found')
    return row


def snapshot(
    session: Session, caller: Caller, snapshot_id: str
) -> models.Snapshot:
    """Return a live snapshot that the caller may see.

    :raises NotFound: there is none, or it is another project's
    """
    row = session.get(models.Snapshot, ids.check(snapshot_id, 'snapshot id'))
    if row is None or row.deleted_at is not None or not sees(caller, row):
        raise errors.NotFound(f'snapshot {snapshot_id} could not be found')
    return row


def attachment(
    session: Session, caller: Caller, attachment_id: str
) -> models.Attachment:
    """Return an attachment that the caller may see.

    :raises NotFound: there is none, or it is another project's
    """
    row = session.get(
        models.Attachment, ids.check(attachment_id, 'attachment id')
    )
    if row is None or not sees(caller, row):
        raise errors.NotFound(f'attachment {attachment_id} could not be found')
    return row


def sees(
    caller: Caller,
    row: models.Volume | models.Snapshot | models.Attachment | models.Job,
) -> bool:
    """Say whether the row is the caller's project's, or the caller admin."""
    return caller.is_admin or row.project_id == caller.project_id


def pool(
    session: Session, row: models.Volume | models.Snapshot
) -> models.Pool:
    """Return the pool that a volume or snapshot lies in."""
    found = session.get(models.Pool, (row.backend, row.pool))
    if found is None:
        raise errors.Unavailable(
            f'backend {row.backend or "?"} has no pool {row.pool or "?"} '
            'now; see "volume backends"'
        )
    return found


def need_feature(found: models.Pool, feature: str, verb: str) -> None:
    """Refuse what the pool cannot do, before there is a job.

    :raises Unsupported: the pool lacks the feature
    """
    if feature not in found.features:
        raise errors.Unsupported(
            f'pool {found.backend}#{found.name} cannot {verb}: '
            f'it has no {feature}'
        )


def need_ability(found: models.Pool, ability: str, verb: str) -> None:
    """Refuse what hosts' way to the pool's volumes cannot do.

    ``ability`` is a field of ``model.Abilities`` that is true or false.

    :raises Unsupported: the backend's exporter lacks it
    """
    if f'export:{ability}' not in found.features:
        raise errors.Unsupported(
            f'backend {found.backend} cannot {verb}; its exporter has no '
            f'{ability}'
        )


def need_still(
    session: Session,
    row: models.Volume,
    verb: str,
    into: tuple[str, str] | None = None,
) -> None:
    """Refuse what cannot be done to a volume while hosts write to it.

    An export of the storage daemon can be frozen for an instant; a path that
    was given away cannot, and a copy would mix several moments. ``into`` is
    the pool of a clone, which is a copy unless it is made by the pool.

    :raises Invalid: it is attached in a way that forbids it
    """
    if row.status != 'in-use':
        return
    features = pool(session, row).features
    if 'Snapshots' not in features:
        raise errors.Invalid(
            f'volume {row.id} cannot {verb} while it is attached: its pool '
            'has no snapshots; detach it first'
        )
    if into is not None and (
        into != (row.backend, row.pool) or 'Clone' not in features
    ):
        raise errors.Invalid(
            f'volume {row.id} cannot {verb} by a copy while it is '
            'attached: take a snapshot, and clone that'
        )
    for each in session.scalars(
        select(models.Attachment).where(models.Attachment.volume_id == row.id)
    ):
        if each.connection.get('driver_volume_type') == 'local':
            raise errors.Invalid(
                f'volume {row.id} cannot {verb} while it is attached by its '
                'path; detach it first'
            )


def need_force(row: models.Volume, force: bool, verb: str) -> None:
    """Refuse what is done to an attached volume only if that is asked for.

    :raises Invalid: it is attached, and ``force`` is not given
    """
    if row.status == 'in-use' and not force:
        raise errors.Invalid(
            f'volume {row.id} cannot {verb}: it is attached; detach it '
            'first, or have it done as of one moment, as after a power cut, '
            'with force (--force)'
        )


def home(session: Session, row: models.Volume) -> str:
    """Return the node that has the volume open for a host; empty if none.

    What is open somewhere is worked on there: only that node's storage
    daemon can be told of it. A volume is open on one node at a time.
    """
    if row.status == 'available':
        return ''
    return session.scalar(
        select(models.Attachment.node).where(
            models.Attachment.volume_id == row.id,
            models.Attachment.is_connected.is_(True),
        ).limit(1)
    ) or ''


def home_of(attachments: Iterable[models.Attachment]) -> str:
    """Return the same from the volume's attachments, read already."""
    return next((each.node for each in attachments if each.is_connected), '')


def take(
    session: Session,
    row: models.Volume | models.Snapshot,
    job_id: str,
    statuses: Collection[str],
    verb: str,
    **values: Any,
) -> None:
    """Take the row for a job alone, or say why not.

    :raises Invalid: its status is another
    :raises LeaseTaken: another job works on it
    """
    if not leases.take(
        session, type(row), row.id, job_id, statuses, **values
    ):
        refuse(row, statuses, verb)


def share(
    session: Session,
    row: models.Volume | models.Snapshot,
    statuses: Collection[str],
    verb: str,
) -> None:
    """Take the row for reading, or say why not."""
    if not leases.share(session, type(row), row.id, statuses):
        refuse(row, statuses, verb)


def refuse(
    row: models.Volume | models.Snapshot,
    statuses: Collection[str],
    verb: str,
) -> NoReturn:
    """Say why a row could not be taken.

    :raises Invalid: its status forbids it
    :raises LeaseTaken: another job holds it
    """
    what = type(row).__name__.lower()
    if row.status not in statuses:
        raise errors.Invalid(
            f'{what} {row.id} cannot {verb}: its status is {row.status}, '
            f'and must be {" or ".join(sorted(statuses))}'
        )
    raise LeaseTaken(
        f'{what} {row.id} is in use by job {row.lease_job or "(reading)"}; '
        'try again when that has ended'
    )


def open_job(
    session: Session,
    core: Core,
    caller: Caller,
    kind: str,
    job_id: str,
    backend: str,
    *,
    volume_id: str | None = None,
    snapshot_id: str | None = None,
    exclusive: Collection[str] = (),
    shared: Collection[str] = (),
    args: dict[str, Any] | None = None,
    node: str = '',
) -> models.Job:
    """Insert the job that a verb has accepted.

    ``exclusive`` and ``shared`` name rows as ``volume-ID`` and
    ``snapshot-ID``; the caller has taken their leases already. ``node`` is
    the ``home`` of a volume that is open. A job whose runner is its acceptor
    is born leased.
    """
    now = core.db.clock()
    ours = core.runs(backend) and node in ('', core.owner_host)
    job = models.Job(
        id=job_id,
        kind=kind,
        volume_id=volume_id,
        snapshot_id=snapshot_id,
        backend=backend,
        args=args or {},
        exclusive=sorted(exclusive),
        shared=sorted(shared),
        project_id=caller.project_id,
        request_id=caller.request_id,
        owner=core.owner if ours else None,
        owner_host=core.owner_host if ours else '',
        node=jobs.node_of(kind, node, core.owner_host) if ours else node,
        token=1 if ours else 0,
        expires_at=now + core.settings.lease_s if ours else 0.0,
        due_at=now,
        give_up_at=now + core.settings.job_retry_s,
        created_at=now,
        updated_at=now,
    )
    session.add(job)
    return job


def request_hash(**request: Any) -> str:
    """Return what makes two requests for one id the same request."""
    text = json.dumps(request, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
