# SPDX-License-Identifier: Apache-2.0
"""Secrets: what a device_config must not say in the clear."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool


@call('secret.create')
def create(pool: Pool, ctx: Ctx, record: dict[str, Any]) -> str:
    """Keep a secret."""
    return pool.rows.new(
        'secret', value=record['value'],
        other_config=record.get('other_config', {}),
    )


@call('secret.destroy')
def destroy(pool: Pool, ctx: Ctx, ref: str) -> None:
    """Forget a secret."""
    pool.rows.delete('secret', ref)
