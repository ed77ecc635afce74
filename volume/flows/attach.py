# SPDX-License-Identifier: Apache-2.0
"""Let a host reach a volume, and end that; restore it after a restart.

There is one export per attachment. A host that the storage admits itself
(``NativeAccess``) needs no exporter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete as sql_delete
from sqlalchemy import select
from sqlalchemy import update as sql_update
from sqlalchemy.orm import Session

from volume import errors
from volume import journal
from volume import model
from volume import vault
from volume.db import models
from volume.drivers import base
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.base import Source
from volume.flows import rows
from volume.journal import Effect
from volume.journal import Job
from volume.verbs import access
from volume.verbs import checks
from volume.verbs.credentials import SECRET_KEYS

LOG = logging.getLogger(__name__)


def export(job: Job) -> Effect:
    attachment_id = job.args['attachment_id']
    connector: Mapping[str, Any] = job.args['connector']
    mode = job.args['mode']
    if job.backend.hindrance:
        job.answer['is_untouched'] = (
            job.row.token == 1 and job.row.attempts == 0
            and not _made_by(job, attachment_id)
        )
        raise _hindered(job)
    _need_own(job, attachment_id)
    secrets = _make_secrets(job)
    connection = _export(job, connector, mode, secrets)
    info = _info(connection, job.volume_row(), attachment_id, mode)
    sealed = _seal(job, attachment_id, secrets, connection)
    job.answer['connection'] = info
    job.answer['credentials'] = dict(connection.credentials)
    # In memory alone: what is stored below never has them.
    job.answer['secrets'] = dict(connection.secrets)
    row, node = job.volume_row(), _node(job)
    table, exporter = models.Attachment, job.backend.conf.exporter

    def effect(session: Session) -> None:
        if job.args['is_new']:
            session.add(table(
                id=attachment_id, volume_id=row.id,
                project_id=row.project_id, backend=row.backend,
                status='attaching', host=connector['host'],
                connector=dict(connector), connection=info, node=node,
                is_connected=True, mode=mode, credentials=sealed,
                exporter=exporter, created_at=job.db.clock(),
            ))
            return
        session.execute(
            sql_update(table).where(table.id == attachment_id)
            .values(
                host=connector['host'], connector=dict(connector),
                connection=info, is_connected=True, mode=mode, node=node,
                credentials=sealed, exporter=exporter,
            )
            .execution_options(synchronize_session=False)
        )
        session.execute(
            sql_update(table)
            .where(
                table.id == attachment_id,
                table.status.in_(('reserved', 'error_attaching')),
            )
            .values(status='attaching')
            .execution_options(synchronize_session=False)
        )
        session.execute(
            sql_update(models.Volume)
            .where(
                models.Volume.id == row.id,
                models.Volume.status == 'reserved',
            )
            .values(status='attaching')
            .execution_options(synchronize_session=False)
        )

    return effect


def unexport(job: Job) -> None:
    if job.args.get('is_connected'):
        return  # a host works on it
    if job.answer.get('is_untouched'):
        return
    if job.backend.hindrance:
        raise _hindered(job)
    _unexport(job, job.args['attachment_id'], job.args['connector'])


def _hindered(job: Job) -> errors.Conflict:
    return errors.Conflict(
        f'backend {job.backend.name} is down: {job.backend.hindrance}'
    )


def _not_attached(job: Job, error: errors.VolumeError) -> Effect:
    # The caller is told; it ends its reservation, or tries again. Where
    # there was none, the volume is again what its attachments say.
    if not job.undone and not job.args.get('is_connected'):
        return _half_attached(job, error)
    if job.args.get('was') != 'available':
        return lambda session: None
    return rows.volume(job, status=access.settled())


def _half_attached(job: Job, error: errors.VolumeError) -> Effect:
    """Note that the host may reach the volume, so that it can be detached."""
    row, connector, node = job.volume_row(), job.args['connector'], _node(job)
    attachment_id, now = job.args['attachment_id'], job.db.clock()
    volume = rows.volume(
        job, status=access.settled(),
        reason=f'an attachment could not be undone: {error}',
    )

    def effect(session: Session) -> None:
        made = session.get(models.Attachment, attachment_id)
        if made is None:  # it is new, or was given up meanwhile
            made = models.Attachment(
                id=attachment_id, volume_id=row.id,
                project_id=row.project_id, backend=row.backend,
                mode=job.args.get('mode', 'rw'), created_at=now,
            )
            session.add(made)
        made.status = 'error_attaching'
        made.host, made.connector = connector['host'], dict(connector)
        made.connection, made.is_connected, made.node = {}, True, node
        made.exporter = (
            _made_by(job, attachment_id) or job.backend.former_exporter
            or job.backend.conf.exporter
        )
        session.flush()
        volume(session)

    return effect


def disconnect(job: Job) -> Effect:
    for attachment_id, connector in job.args['attachments']:
        _unexport(job, attachment_id, connector)
    _unmap(job)
    volume_id = job.row.volume_id or ''
    remove = set(job.args['remove'])
    keep = [
        each for each, _ in job.args['attachments'] if each not in remove
    ]
    table = models.Attachment

    def effect(session: Session) -> None:
        if keep:
            session.execute(
                sql_update(table).where(table.id.in_(keep))
                .values(
                    connection={}, is_connected=False, credentials=None,
                    exporter='',
                )
                .execution_options(synchronize_session=False)
            )
        if remove:
            session.execute(
                sql_delete(table).where(table.id.in_(remove))
                .execution_options(synchronize_session=False)
            )
            access.settle(session, volume_id, job.db.clock())

    return effect


def _unmap(job: Job) -> None:
    """Take the volume's path away, if that was made for the export.

    While another attachment is there it stays, and while a reader has it
    open; that it stays harms nobody, so nothing fails for it.
    """
    driver, exporter = job.backend.need(), job.backend.exporter
    if exporter is None or not isinstance(driver, base.LocalDevice) or (
        exporter.accepts_blocknode or _hosts_left(job)
    ):
        return
    try:
        job.backend.call('unmap', job.volume())
    except errors.VolumeError as failed:
        LOG.info('volume %s keeps its path: %s', job.volume().id, failed)


def _not_detached(job: Job, error: errors.VolumeError) -> Effect:
    return rows.volume(
        job, status='error_detaching',
        reason=f'an attachment could not be ended: {error}',
    )


def restore(job: Job) -> Effect:
    """Export again what was exported before a restart, as it was.

    Of many volumes at once; those that cannot be do not stop the others.
    """
    wanted = _wanted(job)
    renewed, failures = _export_many(job, wanted)
    if failures and not renewed:
        raise next(iter(failures.values()))
    table, node = models.Attachment, _node(job)

    def effect(session: Session) -> None:
        for attachment_id, info, known in session.execute(
            select(table.id, table.connection, table.node)
            .where(table.id.in_(list(renewed)))
        ).all():
            if (info, known) != (renewed[attachment_id], node):
                session.execute(
                    sql_update(table).where(table.id == attachment_id)
                    .values(connection=renewed[attachment_id], node=node)
                    .execution_options(synchronize_session=False)
                )
        for volume_id, failed in failures.items():
            _say_not_restored(job, session, volume_id, failed)

    return effect


def _not_restored(job: Job, error: errors.VolumeError) -> Effect:
    volume_ids = dict.fromkeys(volume_id for *_, volume_id in _wanted(job))

    def effect(session: Session) -> None:
        for volume_id in volume_ids:
            _say_not_restored(job, session, volume_id, error)

    return effect


def _say_not_restored(
    job: Job, session: Session, volume_id: str, error: errors.VolumeError
) -> None:
    rows.change(
        job, session, models.Volume, volume_id,
        reason=f'its export could not be restored: {error}',
    )


Wanted = tuple[str, Mapping[str, Any], str, str]


def _wanted(job: Job) -> list[Wanted]:
    """Return attachment, connector, mode and volume of what is restored.

    A job of an earlier release is about one volume, and does not repeat it.
    """
    alone = job.row.volume_id or ''
    return [
        (attachment_id, connector, mode, rest[0] if rest else alone)
        for attachment_id, connector, mode, *rest in job.args['attachments']
    ]


def _export_many(
    job: Job, wanted: list[Wanted]
) -> tuple[dict[str, dict[str, Any]], dict[str, errors.VolumeError]]:
    """Return connections by attachment, and errors by volume."""
    driver, exporter = job.backend.need(), _exporter(job)
    exports = []
    volume_of = {each[0]: each[3] for each in wanted}
    modes = {each[0]: each[2] for each in wanted}
    failures: dict[str, errors.VolumeError] = {}
    troubles: dict[str, errors.VolumeError] = {}
    known = _known_secrets(job, exporter, list(volume_of))
    with job.backend.guard('export'):
        for attachment_id, connector, mode, volume_id in wanted:
            host, access = checks.host_of(connector), model.Access(mode)
            volume = job.volume(volume_id)
            try:
                _need_own(job, attachment_id)
                if volume.pool in troubles:
                    raise troubles[volume.pool]
                secrets = known.get(attachment_id, {})
                if isinstance(secrets, errors.VolumeError):
                    raise secrets
                source = _device(job, driver, exporter, access, volume)
            except errors.VolumeError as failed:
                failures[volume_id] = failed
                if isinstance(failed, errors.Unavailable | errors.Unknown):
                    # It would be the pool's next volume's as well.
                    troubles[volume.pool] = failed
            else:
                exports.append(Export(
                    attachment_id, volume_id, source, host, access,
                    volume.size_bytes, secrets,
                ))
        found = exporter.export_many(exports) if exports else {}
    renewed = {}
    for attachment_id, connection in found.items():
        volume_id = volume_of[attachment_id]
        if isinstance(connection, errors.VolumeError):
            failures[volume_id] = connection
        else:
            renewed[attachment_id] = _info(
                connection, job.volume_row(volume_id), attachment_id,
                modes[attachment_id],
            )
    return renewed, failures


def grow(job: Job, size_bytes: int) -> None:
    """Let the volume's hosts see that it has grown, if it has any."""
    driver, exporter = job.backend.need(), job.backend.exporter
    if job.volume_row().status == 'available' or exporter is None:
        return  # or the storage tells its hosts itself
    table, volume = models.Attachment, job.volume()
    there = job.db.read(lambda s: list(s.scalars(select(table).where(
        table.volume_id == volume.id, table.is_connected.is_(True)
    ))))
    known = _known_secrets(job, exporter, [each.id for each in there])
    with job.backend.guard('export'):
        for row in there:
            secrets = known.get(row.id, {})
            if isinstance(secrets, errors.VolumeError):
                raise secrets
            _refuse_strange(job, row.id, row.exporter)
            access = model.Access(row.mode)
            exporter.grow(Export(
                row.id, volume.id,
                _device(job, driver, exporter, access, volume),
                checks.host_of(row.connector), access, size_bytes, secrets,
            ))


def _node(job: Job) -> str:
    """Return the service that alone can end the export.

    None, if nothing exports it, or any service reaches what does.
    """
    if isinstance(job.backend.need(), base.NativeAccess):
        return ''
    return '' if _exporter(job).node.is_remote else job.row.owner_host


def _export(
    job: Job, connector: Mapping[str, Any], mode: str,
    secrets: Mapping[str, str],
) -> model.Connection:
    driver = job.backend.need()
    volume, host = job.volume(), checks.host_of(connector)
    access = model.Access(mode)
    with job.backend.guard('export'):
        if isinstance(driver, base.NativeAccess):
            return driver.grant(volume, host, access)
        exporter = _exporter(job)
        return exporter.export(Export(
            job.args['attachment_id'], volume.id,
            _device(job, driver, exporter, access, volume), host, access,
            volume.size_bytes, secrets,
        ))


def _make_secrets(job: Job) -> dict[str, str]:
    """Return new secrets for an attachment, if its exporter wants any.

    A step that is repeated makes others: nobody was told the first ones.
    """
    wants = job.backend.exporter.wants if job.backend.exporter else ()
    if wants:
        # Before anything was done; and waiting would not bring a key.
        try:
            _vault(job).check()
        except errors.Unavailable as missing:
            raise errors.Unsupported(
                f'backend {job.backend.name} cannot let hosts in: {missing}'
            ) from missing
    return {name: vault.new_secret() for name in wants}


def _seal(
    job: Job, attachment_id: str, secrets: Mapping[str, str],
    connection: model.Connection,
) -> str | None:
    """Return what is stored: what the exporter and the host were told."""
    if not secrets and not connection.credentials:
        return None
    return _vault(job).seal(attachment_id, {
        **{f'exporter:{name}': text for name, text in secrets.items()},
        **connection.credentials,
    })


def _known_secrets(
    job: Job, exporter: Exporter, attachment_ids: list[str]
) -> dict[str, dict[str, str] | errors.VolumeError]:
    """Return the secrets that attachments have, or why they cannot be had."""
    found: dict[str, dict[str, str] | errors.VolumeError] = {}
    if not exporter.wants:
        return found
    table = models.Attachment
    sealed = job.db.read(lambda s: s.execute(
        select(table.id, table.credentials)
        .where(table.id.in_(attachment_ids))
    ).all())
    for attachment_id, text in sealed:
        try:
            # None were wanted when it was made.
            opened = _vault(job).open(attachment_id, text) if text else {}
        except errors.VolumeError as failed:
            found[attachment_id] = failed
        else:
            found[attachment_id] = {
                name: opened[f'exporter:{name}'] for name in exporter.wants
                if f'exporter:{name}' in opened
            }
    return found


def _vault(job: Job) -> vault.Vault:
    return vault.Vault(job.settings.secrets_key_file)


def _info(
    connection: model.Connection, row: models.Volume, attachment_id: str,
    mode: str,
) -> dict[str, Any]:
    """Return what the host is told, but for the secrets: their names."""
    named = (
        {SECRET_KEYS: sorted(connection.secrets)} if connection.secrets
        else {}
    )
    # As compute services hand them on to QEMU.
    limits = {
        name: value for name, value in (
            ('total_iops_sec', row.iops_limit),
            ('total_bytes_sec', row.bytes_per_s_limit),
        ) if value
    }
    return {
        'driver_volume_type': connection.protocol,
        'data': {
            **connection.fields,
            **named,
            **({'qos_specs': limits} if limits else {}),
            'volume_id': row.id,
            'attachment_id': attachment_id,
            'access_mode': mode,
        },
    }


def _unexport(
    job: Job, attachment_id: str, connector: Mapping[str, Any]
) -> None:
    driver = job.backend.need()
    with job.backend.guard('unexport'):
        if isinstance(driver, base.NativeAccess):
            host = checks.host_of(connector)
            # The storage knows hosts and no attachments: it would end both.
            if host.name not in _hosts_left(job, attachment_id):
                driver.revoke(job.volume(), host)
        else:
            _need_own(job, attachment_id)
            _exporter(job).unexport(attachment_id)


def _need_own(job: Job, attachment_id: str) -> None:
    """Refuse to end, or to renew, what another exporter has made.

    This one would not find it, and call that its end.

    :raises Conflict: another exporter has made it
    """
    _refuse_strange(job, attachment_id, _made_by(job, attachment_id))


def _made_by(job: Job, attachment_id: str) -> str | None:
    """Return the exporter of what was connected; none if nothing was."""
    made_by: str | None = job.args.get('exporters', {}).get(attachment_id)
    return made_by


def _refuse_strange(
    job: Job, attachment_id: str, made_by: str | None
) -> None:
    if made_by is None:
        return
    driver, now = job.backend.need(), job.backend.conf.exporter
    made_by = made_by or job.backend.former_exporter
    if made_by not in ('', now) and not isinstance(driver, base.NativeAccess):
        raise errors.Conflict(
            f'attachment {attachment_id} was made by exporter {made_by}, and '
            f'backend {job.backend.name} has {now} now, which cannot end it: '
            f'set exporter = {made_by} again, and reload the service'
        )


def _hosts_left(job: Job, *ending: str) -> set[str]:
    """Return which hosts have the volume by attachments that do not end."""
    row, table = job.volume_row(), models.Attachment
    if not row.multiattach:
        return set()
    all_ending = {
        *ending, *(each for each, _ in job.args.get('attachments', ()))
    }
    return set(job.db.read(lambda s: s.scalars(
        select(table.host).where(
            table.volume_id == row.id, table.is_connected,
            table.id.not_in(all_ending),
        )
    ).all()))


def _device(
    job: Job, driver: base.Driver, exporter: Exporter, access: model.Access,
    volume: model.Volume,
) -> Source:
    if exporter.accepts_blocknode and isinstance(driver, base.BlockNode):
        return driver.blocknode(volume)
    if isinstance(driver, base.LocalDevice):
        return driver.map(volume, access)
    raise errors.Unsupported(
        f'volumes of backend {job.backend.name} cannot be attached by '
        f'{type(exporter).__name__}: its driver gives no device'
    )


def _exporter(job: Job) -> Exporter:
    if job.backend.exporter is None:
        raise errors.Unavailable(
            f'backend {job.backend.name} is down: {job.backend.reason}'
        )
    return job.backend.exporter


ATTACH = journal.Flow(
    'attach', (journal.Step(export, undo=unexport),), failed=_not_attached
)
DETACH = journal.Flow(
    'detach', (journal.Step(disconnect),), failed=_not_detached
)
RESTORE = journal.Flow(
    'restore', (journal.Step(restore),), failed=_not_restored
)
