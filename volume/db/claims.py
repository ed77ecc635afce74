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


def candidates(
    session: Session, heard_after: float = 0.0
) -> list[placement.Candidate]:
    """Return every pool, ready to choose from.

    One whose backend nobody has reported since ``heard_after`` is silent.
    """
    pools, backends = models.Pool, models.Backend
    # Columns, not rows: it is asked of every pool for every new volume.
    found = session.execute(
        select(
            pools.backend, pools.name, pools.is_up & backends.is_up,
            backends.updated_at >= heard_after, backends.enabled,
            backends.tags, pools.features, backends.projects,
            backends.cluster, backends.role, backends.cost,
            pools.limit_bytes - pools.claimed_bytes - pools.hidden_bytes,
            pools.free_bytes, pools.max_volume_bytes,
            pools.granularity_bytes, pools.thin, pools.device,
        ).join(backends, backends.name == pools.backend)
    )
    return [
        placement.Candidate(
            backend=backend, name=name, is_up=is_up, is_heard=is_heard,
            enabled=enabled, tags=frozenset(tags),
            features=frozenset(features), projects=frozenset(projects),
            cluster=cluster, role=role, cost=cost,
            unclaimed_bytes=unclaimed_bytes, free_bytes=free_bytes,
            max_volume_bytes=max_volume_bytes,
            granularity_bytes=granularity_bytes, thin=thin, device=device,
        )
        for (
            backend, name, is_up, is_heard, enabled, tags, features,
            projects, cluster, role, cost, unclaimed_bytes, free_bytes,
            max_volume_bytes, granularity_bytes, thin, device,
        ) in found
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
