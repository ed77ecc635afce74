# SPDX-License-Identifier: Apache-2.0
"""Take and give back capacity: one conditional UPDATE each.

A claim is bytes promised, not bytes stored, and is a column of the row that
it belongs to; a pool's ``claimed_bytes`` is always the sum over its rows.
No burst over-commits, whatever the age of the statistics.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.orm import Session

from volume import placement
from volume.db import models


def candidates(session: Session) -> list[placement.Candidate]:
    """Return every pool, ready to choose from."""
    rows = session.execute(
        select(models.Pool, models.Backend).join(
            models.Backend, models.Backend.name == models.Pool.backend
        )
    )
    return [
        placement.Candidate(
            backend=pool.backend,
            name=pool.name,
            is_up=pool.is_up and backend.is_up,
            enabled=backend.enabled,
            tags=frozenset(backend.tags),
            features=frozenset(pool.features),
            projects=frozenset(backend.projects),
            cluster=backend.cluster,
            role=backend.role,
            cost=backend.cost,
            unclaimed_bytes=(
                pool.limit_bytes - pool.claimed_bytes - pool.hidden_bytes
            ),
            free_bytes=pool.free_bytes,
            max_volume_bytes=pool.max_volume_bytes,
            granularity_bytes=pool.granularity_bytes,
            thin=pool.thin,
            device=pool.device,
        )
        for pool, backend in rows
    ]


def claim(
    session: Session, pool: placement.Candidate, size_bytes: int
) -> bool:
    """Promise bytes of a pool; say whether there were enough."""
    pools, devices = models.Pool, models.Device
    if not size_bytes:
        return True
    taken = session.execute(
        update(pools)
        .where(
            pools.backend == pool.backend,
            pools.name == pool.name,
            pools.claimed_bytes + pools.hidden_bytes + size_bytes
            <= pools.limit_bytes,
        )
        .values(claimed_bytes=pools.claimed_bytes + size_bytes)
        .execution_options(synchronize_session=False)
    )
    if not taken.rowcount:  # type: ignore[attr-defined]
        return False
    if not pool.device:
        return True
    taken = session.execute(
        update(devices)
        .where(
            devices.name == pool.device,
            devices.claimed_bytes + size_bytes <= devices.limit_bytes,
        )
        .values(claimed_bytes=devices.claimed_bytes + size_bytes)
        .execution_options(synchronize_session=False)
    )
    if taken.rowcount:  # type: ignore[attr-defined]
        return True
    session.execute(
        update(pools)
        .where(pools.backend == pool.backend, pools.name == pool.name)
        .values(claimed_bytes=pools.claimed_bytes - size_bytes)
        .execution_options(synchronize_session=False)
    )
    return False


def give_back(
    session: Session, backend: str, pool: str, size_bytes: int
) -> None:
    """Take back a promise, in the transaction that clears the row's claim."""
    pools, devices = models.Pool, models.Device
    if not size_bytes:
        return
    session.execute(
        update(pools)
        .where(pools.backend == backend, pools.name == pool)
        .values(claimed_bytes=pools.claimed_bytes - size_bytes)
        .execution_options(synchronize_session=False)
    )
    device = (
        select(pools.device)
        .where(pools.backend == backend, pools.name == pool)
        .scalar_subquery()
    )
    session.execute(
        update(devices)
        .where(devices.name == device)
        .values(claimed_bytes=devices.claimed_bytes - size_bytes)
        .execution_options(synchronize_session=False)
    )
