# SPDX-License-Identifier: Apache-2.0
"""The note beside a volume from which a lost database is rebuilt."""

from __future__ import annotations

import dataclasses

from volume import model
from volume.drivers import base
from volume.journal import Job


def unborn(job: Job, is_filled: bool = True) -> model.Volume:
    """Return the job's volume with the note that will be written to it."""
    return dataclasses.replace(job.volume(), note=_note(job, 0, is_filled))


def write(
    job: Job, size_bytes: int | None = None, is_filled: bool = True
) -> None:
    """Describe the job's volume where its driver can keep a note.

    Names, sizes and owners: nothing in it is a secret. A volume that is
    being filled says so: it must never be taken for a whole one.
    """
    if not isinstance(job.backend.driver, base.Describe):
        return
    job.backend.call(
        'describe', job.volume(), _note(job, size_bytes or 0, is_filled)
    )


def _note(job: Job, size_bytes: int, is_filled: bool) -> dict[str, str]:
    row = job.volume_row()
    return {
        'id': row.id,
        'name': row.name,
        'size_bytes': str(size_bytes or row.size_bytes),
        'project_id': row.project_id,
        'user_id': row.user_id,
        'created_at': f'{row.created_at:.3f}',
        'filled': 'yes' if is_filled else 'no',
        'parent': row.snapshot_id or row.source_volume_id or '',
    }
