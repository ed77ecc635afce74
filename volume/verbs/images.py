# SPDX-License-Identifier: Apache-2.0
"""Accept that a volume is uploaded to an image."""

from __future__ import annotations

from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.verbs import checks
from volume.verbs import rows

FORMATS = ('raw', 'qcow2', 'vhd', 'vmdk')


def upload(
    core: Core,
    caller: Caller,
    volume_id: str,
    url: object,
    *,
    format: str = 'raw',
    force: bool = False,
) -> models.Job:
    """Start to write the volume's bytes to a new image at a URL.

    With ``force`` also of an attached volume, as of one moment.

    :raises Invalid: the format or the URL is none, or the status forbids it
    """
    if format not in FORMATS:
        raise errors.Invalid(
            f'image format {format!r:.40} is none of {", ".join(FORMATS)}'
        )
    text = checks.text(url, 'image URL', 4096)
    if '://' not in text:
        raise errors.Invalid(f'image {text!r:.80} is not a URL (file:///…)')
    statuses = {'available', 'in-use'} if force else {'available'}

    def accept(session: Session) -> tuple[models.Job, models.Volume]:
        row = rows.volume(session, caller, volume_id)
        rows.need_still(session, row, 'be uploaded')
        rows.need_force(row, force, 'be uploaded')
        job_id = ids.new()
        rows.take(
            session, row, job_id, statuses, 'be uploaded',
            status='uploading', updated_at=core.db.clock(),
        )
        return rows.open_job(
            session, core, caller, 'upload', job_id, row.backend,
            volume_id=row.id,
            # The snapshot of the moment, of an attached volume.
            exclusive=[f'volume-{row.id}', f'snapshot-{job_id}'],
            args={'url': text, 'format': format, 'status': row.status},
            node=rows.home(session, row),
        ), row

    job, row = core.when_free(lambda: core.db.write(accept))
    core.hint(job, row)
    return job
