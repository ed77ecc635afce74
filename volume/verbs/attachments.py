# SPDX-License-Identifier: Apache-2.0
"""Accept what hosts ask: reserve, connect, attach, detach, disconnect.

The six historical verbs and the attachments of the newer API are two views
of one row an attachment. Each transition is one conditional UPDATE; a verb
that has nothing to do on the storage is no job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy import delete as sql_delete
from sqlalchemy import exists
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy import update as sql_update
from sqlalchemy.orm import aliased
from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume.context import Caller
from volume.core import Core
from volume.core import Ended
from volume.db import leases
from volume.db import models
from volume.verbs import access
from volume.verbs import checks
from volume.verbs import credentials
from volume.verbs import jobs
from volume.verbs import rows

CONNECTABLE = frozenset({'available', 'reserved', 'attaching', 'in-use'})
CONNECTED = CONNECTABLE | {
    'detaching', 'error', 'error_attaching', 'error_detaching',
    'error_extending', 'extending', 'maintenance', 'uploading',
}
LETS_IN = frozenset({'attach', 'restore'})  # kinds of jobs
# What the rows of hosts say of a volume; nothing else may have to be undone.
DETACHABLE = frozenset({
    'available', 'reserved', 'attaching', 'in-use', 'detaching',
    'error_attaching', 'error_detaching', 'error_extending',
})


def reserve(core: Core, caller: Caller, volume_id: str) -> None:
    """``available`` becomes ``attaching``; of two at once one succeeds.

    :raises Invalid: its status is another
    """
    access.move(
        core, caller, volume_id, {'available'}, 'attaching', 'be reserved'
    )


def unreserve(core: Core, caller: Caller, volume_id: str) -> None:
    """``attaching`` becomes what it was; any other status is left alone."""


    def accept(session: Session) -> models.Job | None:
        row = rows.volume(session, caller, volume_id)
        if row.status != 'attaching' or leases.move(
            session, models.Volume, row.id, {'attaching'},
            status=access.settled(), updated_at=core.db.clock(),
        ):
            return None
        # A job that lets a host in is still open: the volume must not be
        # available first and reachable a moment later.
        coming = _cancel_attach(session, core, row)
        return coming or rows.refuse(row, {'attaching'}, 'be unreserved')

    _until_ended(core, accept)


def begin_detaching(core: Core, caller: Caller, volume_id: str) -> None:
    """``in-use`` becomes ``detaching``.

    :raises Invalid: its status is another
    """
    access.move(
        core, caller, volume_id, {'in-use'}, 'detaching', 'be detached'
    )


def roll_detaching(core: Core, caller: Caller, volume_id: str) -> None:
    """``detaching`` becomes ``in-use`` again; the host could not let go."""
    access.move(
        core, caller, volume_id, {'detaching'}, 'in-use', 'be rolled back'
    )


def connect(
    core: Core,
    caller: Caller,
    volume_id: str,
    connector: object,
    *,
    attachment_id: str | None = None,
    mode: str = 'rw',
    with_secrets: bool = False,
) -> dict[str, Any]:
    """Let a host in, and return its connection_info when that is done.

    Repeated for the same host, it is the same answer, with the credentials
    of this attachment. Secrets of the storage are not stored: who is to
    have them gets them from it each time.

    :raises Invalid: the volume's status forbids it, or another host has it
    :raises Conflict: the attachment is another host's, or may write and
        should not
    :raises Unavailable: the storage does not answer
    """
    properties = checks.connector(connector)
    host = properties['host']
    _check_mode(mode)

    def accept(
        session: Session,
    ) -> tuple[models.Job | None, models.Volume, models.Attachment | None]:
        row, there = access.with_attachments(session, caller, volume_id)
        mine = access.mine(there, host, attachment_id)
        if mine is not None:
            access.need_same(mine, host, mode)
        if mine is not None and access.is_in(mine) and not (
            with_secrets and credentials.secret_keys(mine.connection)
        ):
            return None, row, mine
        access.need_room(row, there, mine, host)
        way = access.way(session, row, there, mine, mode, host)
        job_id = ids.new()
        # What a host can reach is not available to anybody else's verb.
        status = 'attaching' if row.status == 'available' else row.status
        rows.take(
            session, row, job_id, CONNECTABLE, 'be attached', status=status
        )
        job = rows.open_job(
            session, core, caller, 'attach', job_id, row.backend,
            volume_id=row.id, exclusive=[f'volume-{row.id}'],
            args={
                'attachment_id': mine.id if mine else ids.new(),
                'is_new': mine is None,
                # Asked again for its secrets: nothing to undo, whatever.
                'is_connected': mine is not None and access.is_in(mine),
                'connector': properties,
                'mode': way,
                'was': row.status,
                'exporters': _exporters([mine] if mine else []),
            },
            node=rows.home_of(there),
        )
        return job, row, mine

    job, row, mine = core.when_free(lambda: core.db.write(accept))
    if job is None:
        assert mine is not None
        return credentials.told(mine.connection, credentials.of(core, mine))
    core.hint(job, row, mine)
    ended = _wait(core, job)
    answer = _answer(core, job, ended)
    return credentials.secret(answer, ended) if with_secrets else answer


def _answer(core: Core, job: models.Job, ended: Ended) -> dict[str, Any]:
    answer: dict[str, Any] | None = ended.answer.get('connection')
    if answer is not None:
        return credentials.told(answer, ended.answer.get('credentials', {}))
    made = core.db.read(lambda session: session.get(  # another process's job
        models.Attachment, job.args['attachment_id']
    ))
    if made is None:
        return {}
    return credentials.told(made.connection, credentials.of(core, made))


def disconnect(
    core: Core,
    caller: Caller,
    volume_id: str,
    connector: object,
    *,
    force: bool = False,
) -> None:
    """End a host's access, and return when that is proved.

    Another host's access is left alone; a host that has none is no error.
    """
    host = (
        checks.connector(connector)['host']
        if connector or not force else None
    )

    def accept(
        session: Session,
    ) -> tuple[models.Job, models.Volume | None] | None:
        row, there = access.with_attachments(session, caller, volume_id)
        mine = [
            each for each in there
            if (host is None or each.host == host) and each.is_connected
        ]
        if not mine:
            coming = _cancel_attach(session, core, row, host=host)
            return None if coming is None else (coming, None)
        return _open_detach(
            session, core, caller, row, mine,
            remove=[
                each.id for each in mine
                if force or each.status in ('attaching', 'error_attaching')
            ],
        ), row

    while accepted := core.when_free(lambda: core.db.write(accept)):
        job, row = accepted
        if row is not None:
            core.hint(job, row)
            _wait(core, job)
            return
        # However that ends, there is then something to end, or nothing.
        _until(core, job)


def attach(
    core: Core,
    caller: Caller,
    volume_id: str,
    instance_uuid: str | None,
    mountpoint: str | None,
    *,
    host_name: str | None = None,
    mode: str = 'rw',
) -> None:
    """Record that a host uses the volume: it is ``in-use``.

    :raises Invalid: its status forbids it, or the instance is no UUID
    """
    _check_mode(mode)
    if instance_uuid is not None:
        instance_uuid = ids.check(instance_uuid, 'instance UUID')
    mountpoint = checks.text(mountpoint, 'mountpoint') or None
    volume_id = ids.check(volume_id, 'volume id')
    now = core.db.clock()
    attachments = models.Attachment

    def accept(session: Session) -> None:
        moved = access.try_move(
            session, core, caller, volume_id,
            {'available', 'attaching', 'reserved', 'in-use'}, 'in-use',
        )
        if not moved:
            row = rows.volume(session, caller, volume_id)
            rows.refuse(row, CONNECTABLE, 'be attached')
        values = {
            'status': 'attached', 'instance_uuid': instance_uuid,
            'mountpoint': mountpoint, 'attached_at': now,
        }
        where: list[ColumnElement[bool]] = [
            attachments.volume_id == volume_id,
            attachments.status != 'attached',
        ]
        if host_name:
            where.append(or_(
                attachments.host.in_((host_name, '')),
                exists().where(
                    models.Volume.id == volume_id,
                    models.Volume.multiattach.is_(False),
                ),
            ))
        changed = session.execute(
            sql_update(attachments).where(*where).values(**values)
            .execution_options(synchronize_session=False)
        ).rowcount  # type: ignore[attr-defined]
        if changed > 1:
            raise errors.Invalid(
                f'{changed} hosts attach volume {volume_id}; name the host'
            )
        if changed:
            return
        row, there = access.with_attachments(session, caller, volume_id)
        for each in there:
            if each.instance_uuid == instance_uuid:
                return
        if there and not row.multiattach:
            raise errors.Invalid(f'volume {row.id} is attached: detach it')
        session.add(attachments(
            id=ids.new(), volume_id=row.id, project_id=row.project_id,
            backend=row.backend, host=host_name or '', connector={},
            connection={}, is_connected=False, mode=mode, created_at=now,
            **values,
        ))

    core.when_free(lambda: core.db.write(accept))


def detach(
    core: Core,
    caller: Caller,
    volume_id: str,
    attachment_id: str | None = None,
    *,
    force: bool = False,
) -> None:
    """Record that a host has let go; end its access if that still stands.

    :raises Invalid: it is not attached, or to several hosts and none named
    """
    volume_id = ids.check(volume_id, 'volume id')

    def accept(
        session: Session,
    ) -> tuple[models.Job, models.Volume] | None:
        if not force and _detach_simply(
            session, core, caller, volume_id, attachment_id
        ):
            return None
        row, there = access.with_attachments(session, caller, volume_id)
        if attachment_id:
            there = [each for each in there if each.id == attachment_id]
        if not there:
            if not force or not leases.move(
                session, models.Volume, row.id, DETACHABLE,
                status=access.settled(), updated_at=core.db.clock(),
            ):
                raise errors.Invalid(f'volume {row.id} is not attached')
            return None
        if len(there) > 1 and not force:
            raise errors.Invalid(
                f'volume {row.id} is attached {len(there)} times; name the '
                'attachment'
            )
        return _open_detach(
            session, core, caller, row, there,
            remove=[each.id for each in there],
        ), row

    def stop(session: Session) -> models.Job | None:
        row = rows.volume(session, caller, volume_id)
        return _cancel_attach(
            session, core, row, attachment_id=attachment_id
        )

    if force:
        _until_ended(core, stop)
    accepted = core.when_free(lambda: core.db.write(accept))
    if accepted is not None:
        core.hint(*accepted)
        _wait(core, accepted[0])


def _detach_simply(
    session: Session,
    core: Core,
    caller: Caller,
    volume_id: str,
    attachment_id: str | None,
) -> bool:
    """Detach in two statements who has no access left, if it is clear who.

    A volume that a job holds may be reachable a moment later: not that.
    """
    attachments, volumes = models.Attachment, models.Volume
    where = [
        attachments.volume_id == volume_id,
        attachments.is_connected.is_(False),
        exists().where(
            volumes.id == volume_id,
            volumes.status == 'detaching',
            leases.free(volumes),
            *access.owned(caller, volumes),
        ),
    ]
    if attachment_id:
        where.append(attachments.id == attachment_id)
    else:
        other = aliased(attachments)
        where.append(~exists().where(
            other.volume_id == volume_id, other.id != attachments.id
        ).correlate(attachments))
    gone = session.execute(
        sql_delete(attachments).where(*where)
        .execution_options(synchronize_session=False)
    ).rowcount  # type: ignore[attr-defined]
    if gone:
        access.settle(session, volume_id, core.db.clock())
    return bool(gone)


def create(
    core: Core,
    caller: Caller,
    volume_id: str,
    instance_uuid: str | None,
    connector: object = None,
    mode: str = 'rw',
) -> models.Attachment:
    """Make an attachment: reserved, or with a connector connected.

    :raises Invalid: the volume's status forbids it, or another has it
    """
    _check_mode(mode)
    if instance_uuid is not None:
        instance_uuid = ids.check(instance_uuid, 'instance UUID')
    properties = checks.connector(connector) if connector else {}

    def accept(session: Session) -> models.Attachment:
        row, there = access.with_attachments(session, caller, volume_id)
        access.need_room(row, there, None, properties.get('host', ''))
        status = 'attaching' if properties else 'reserved'
        moved = access.try_move(
            session, core, caller, volume_id, {'available', 'in-use'},
            row.status if row.status == 'in-use' else status,
        )
        if not moved:
            rows.refuse(row, {'available'}, 'be attached')
        attachment = models.Attachment(
            id=ids.new(), volume_id=row.id, project_id=row.project_id,
            backend=row.backend, status=status,
            host=properties.get('host', ''), connector=properties,
            connection={}, is_connected=False,
            instance_uuid=instance_uuid,
            mode='ro' if row.readonly else mode,
            created_at=core.db.clock(),
        )
        session.add(attachment)
        return attachment

    attachment = core.when_free(lambda: core.db.write(accept))
    if not properties:
        return attachment
    try:
        return update(core, caller, attachment.id, properties)
    except errors.VolumeError:
        delete(core, caller, attachment.id)
        raise


def update(
    core: Core, caller: Caller, attachment_id: str, connector: object
) -> models.Attachment:
    """Connect an attachment that was reserved."""
    row = core.db.read(
        lambda session: rows.attachment(session, caller, attachment_id)
    )
    connect(
        core, caller, row.volume_id, connector,
        attachment_id=row.id, mode=row.mode,
    )
    return core.db.read(
        lambda session: rows.attachment(session, caller, attachment_id)
    )


def complete(core: Core, caller: Caller, attachment_id: str) -> None:
    """Record that the host uses the volume: it is ``in-use``.

    :raises Invalid: the attachment has no connection yet
    """

    def accept(session: Session) -> None:
        row = rows.attachment(session, caller, attachment_id)
        if not row.is_connected:
            raise errors.Invalid(
                f'attachment {row.id} is {row.status}: give it a connector '
                'first'
            )
        if not access.try_move(
            session, core, caller, row.volume_id,
            {'attaching', 'in-use', 'reserved', 'available'}, 'in-use',
        ):
            volume = rows.volume(session, caller, row.volume_id)
            rows.refuse(volume, CONNECTABLE, 'be attached')
        row.status = 'attached'
        row.attached_at = core.db.clock()

    core.when_free(lambda: core.db.write(accept))


def delete(
    core: Core, caller: Caller, attachment_id: str
) -> list[models.Attachment]:
    """End an attachment and its access; return what the volume has left."""

    def stop(session: Session) -> models.Job | None:
        row = rows.attachment(session, caller, attachment_id)
        volume = rows.volume(session, caller, row.volume_id)
        return _cancel_attach(session, core, volume, attachment_id=row.id)

    def accept(session: Session) -> tuple[models.Job, models.Volume]:
        row = rows.attachment(session, caller, attachment_id)
        volume = rows.volume(session, caller, row.volume_id)
        return _open_detach(
            session, core, caller, volume, [row], remove=[row.id]
        ), volume

    _until_ended(core, stop)
    job, volume = core.when_free(lambda: core.db.write(accept))
    core.hint(job, volume)
    _wait(core, job)
    return core.db.read(lambda session: list(session.scalars(
        select(models.Attachment)
        .where(models.Attachment.volume_id == volume.id)
    )))


def _cancel_attach(
    session: Session,
    core: Core,
    row: models.Volume,
    *,
    host: str | None = None,
    attachment_id: str | None = None,
) -> models.Job | None:
    """Return the open job that would let hosts in later on, told to stop.

    Of a host or an attachment that is named, only what lets that one in. Its
    caller may have given up waiting: what it has asked for must not
    come about behind the back of whoever ends the host's access now.
    """
    if row.lease_job is None:
        return None
    job = session.get(models.Job, row.lease_job)
    if job is None or job.state != 'open' or job.kind not in LETS_IN:
        return None
    if not any(
        host in (None, each_host) and attachment_id in (None, each_id)
        for each_id, each_host in access.coming(job, row.id)
    ):
        return None
    session.execute(
        sql_update(models.Job)
        .where(models.Job.id == job.id, models.Job.state == 'open')
        .values(cancel=True, due_at=core.db.clock())
        .execution_options(synchronize_session=False)
    )
    return job


def _until_ended(
    core: Core, stop: Callable[[Session], models.Job | None]
) -> None:
    """Ask ``stop`` for a job that it has told to stop, until there is none."""
    while job := core.when_free(lambda: core.db.write(stop)):
        _until(core, job)


def _until(core: Core, job: models.Job) -> None:
    jobs.wake(core, job)
    core.wait(job.id, core.settings.call_timeout_s)


def _open_detach(
    session: Session,
    core: Core,
    caller: Caller,
    volume: models.Volume,
    ending: list[models.Attachment],
    remove: list[str],
) -> models.Job:
    job_id = ids.new()
    rows.take(session, volume, job_id, CONNECTED, 'be detached')
    return rows.open_job(
        session, core, caller, 'detach', job_id, volume.backend,
        volume_id=volume.id, exclusive=[f'volume-{volume.id}'],
        args={
            'attachments': [
                [each.id, each.connector or {'host': each.host}]
                for each in ending
            ],
            'remove': remove,
            'exporters': _exporters(ending),
        },
        node=rows.home_of(ending),
    )


def _exporters(some: Iterable[models.Attachment]) -> dict[str, str]:
    """Return who has made those that are connected."""
    return {each.id: each.exporter for each in some if each.is_connected}


def _check_mode(mode: object) -> None:
    if mode not in ('rw', 'ro'):
        raise errors.Invalid(f'mode {mode!r:.40} is neither rw nor ro')


def _wait(core: Core, job: models.Job) -> Ended:
    """Return the job when it has ended well; raise what it failed with."""
    ended = core.wait(job.id, core.settings.call_timeout_s)
    if ended.state != 'done':
        raise errors.rebuild(ended.error_kind, ended.error)
    return ended
