# SPDX-License-Identifier: Apache-2.0
"""Accept how fast a volume may be used.

Storage that can bound it is told by a job. Every host is told when it
connects, by ``qos_specs`` in its connection, whose names are those that
compute services hand on to QEMU.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from volume import errors
from volume import ids
from volume import model
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.verbs import rows

LIMIT_MAX = 1 << 53  # what every client's JSON can carry
STATUSES = frozenset({'available', 'in-use'})


def limit(
    core: Core, caller: Caller, volume_id: str, limits: model.IoLimits
) -> None:
    """Accept new limits; those that are ``None`` are lifted.

    :raises Invalid: a limit is no positive number, or the status forbids it
    """
    for name, value in (
        ('iops', limits.iops), ('bytes_per_s', limits.bytes_per_s),
    ):
        if value is not None and not 0 < value <= LIMIT_MAX:
            raise errors.Invalid(
                f'{name} {value!s:.40} must be greater than 0, and at most '
                f'{LIMIT_MAX}'
            )

    def accept(session: Session) -> tuple[models.Job, models.Volume]:
        row = rows.volume(session, caller, volume_id)
        native = 'Limits' in rows.pool(session, row).features
        job_id = ids.new()
        rows.take(session, row, job_id, STATUSES, 'be limited')
        return rows.open_job(
            session, core, caller, 'limit', job_id, row.backend,
            volume_id=row.id, exclusive=[f'volume-{row.id}'],
            args={
                'iops': limits.iops, 'bytes_per_s': limits.bytes_per_s,
                'native': native, 'status': row.status,
            },
        ), row

    core.hint(*core.when_free(lambda: core.db.write(accept)))
