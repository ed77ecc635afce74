# SPDX-License-Identifier: Apache-2.0
"""Let a host reach a volume, and end that; restore it after a restart.

There is one export per attachment. A host that the storage admits itself
(``NativeAccess``) needs no exporter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete as sql_delete
from sqlalchemy import update as sql_update
from sqlalchemy.orm import Session

from volume import errors
from volume import journal
from volume import model
from volume.db import models
from volume.drivers import base
from volume.exports.base import Exporter
from volume.exports.base import Source
from volume.flows import rows
from volume.journal import Effect
from volume.journal import Job
from volume.verbs import access
from volume.verbs import checks


def export(job: Job) -> Effect:
    attachment_id = job.args['attachment_id']
    connector: Mapping[str, Any] = job.args['connector']
    mode = job.args['mode']
    info = _export(job, attachment_id, connector, mode)
    job.answer['connection'] = info
    row = job.volume_row()
    table = models.Attachment

    def effect(session: Session) -> None:
        if job.args['is_new']:
            session.add(table(
                id=attachment_id, volume_id=row.id,
                project_id=row.project_id, backend=row.backend,
                status='attaching', host=connector['host'],
                connector=dict(connector), connection=info,
                is_connected=True, mode=mode, created_at=job.db.clock(),
            ))
            return
        session.execute(
            sql_update(table).where(table.id == attachment_id)
            .values(
                host=connector['host'], connector=dict(connector),
                connection=info, is_connected=True, mode=mode,
            )
            .execution_options(synchronize_session=False)
        )
        session.execute(
            sql_update(table)
            .where(table.id == attachment_id, table.status == 'reserved')
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
    _unexport(job, job.args['attachment_id'], job.args['connector'])


def _not_attached(job: Job, error: errors.VolumeError) -> Effect:
    # The caller is told; it ends its reservation, or tries again. Where
    # there was none, the volume is again what its attachments say.
    if job.args.get('was') != 'available':
        return lambda session: None
    if not job.undone:
        return rows.volume(
            job, status='error_attaching',
            reason=f'an attachment could not be undone: {error}',
        )
    return rows.volume(job, status=access.settled())


def disconnect(job: Job) -> Effect:
    for attachment_id, connector in job.args['attachments']:
        _unexport(job, attachment_id, connector)
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
                .values(connection={}, is_connected=False)
                .execution_options(synchronize_session=False)
            )
        if remove:
            session.execute(
                sql_delete(table).where(table.id.in_(remove))
                .execution_options(synchronize_session=False)
            )
            access.settle(session, volume_id, job.db.clock())

    return effect


def _not_detached(job: Job, error: errors.VolumeError) -> Effect:
    return rows.volume(
        job, status='error_detaching',
        reason=f'an attachment could not be ended: {error}',
    )


def restore(job: Job) -> Effect:
    """Export again what was exported before a restart, as it was."""
    renewed = {}
    for attachment_id, connector, mode in job.args['attachments']:
        renewed[attachment_id] = _export(job, attachment_id, connector, mode)
    table = models.Attachment

    def effect(session: Session) -> None:
        for attachment_id, info in renewed.items():
            session.execute(
                sql_update(table)
                .where(table.id == attachment_id, table.connection != info)
                .values(connection=info)
                .execution_options(synchronize_session=False)
            )

    return effect


def _not_restored(job: Job, error: errors.VolumeError) -> Effect:
    return rows.volume(
        job, reason=f'its export could not be restored: {error}'
    )


def _export(
    job: Job, attachment_id: str, connector: Mapping[str, Any], mode: str
) -> dict[str, Any]:
    driver = job.backend.need()
    volume, host = job.volume(), checks.host_of(connector)
    access = model.Access(mode)
    with job.backend.guard('export'):
        if isinstance(driver, base.NativeAccess):
            connection = driver.grant(volume, host, access)
        else:
            exporter = _exporter(job)
            connection = exporter.export(
                attachment_id, _device(job, driver, exporter, access), host,
                access,
            )
    return {
        'driver_volume_type': connection.protocol,
        'data': {
            **connection.fields,
            'volume_id': volume.id,
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
            driver.revoke(job.volume(), checks.host_of(connector))
        else:
            _exporter(job).unexport(attachment_id)


def _device(
    job: Job, driver: base.Driver, exporter: Exporter, access: model.Access
) -> Source:
    if exporter.accepts_blocknode and isinstance(driver, base.BlockNode):
        return driver.blocknode(job.volume())
    if isinstance(driver, base.LocalDevice):
        return driver.map(job.volume(), access)
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
