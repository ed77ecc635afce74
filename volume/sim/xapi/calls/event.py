# SPDX-License-Identifier: Apache-2.0
"""Events."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool


@call('event.from')
def from_(
    pool: Pool, ctx: Ctx, classes: list[str], token: str, timeout_s: float,
) -> dict[str, Any]:
    """Return what changed since a token, or wait for it."""
    pool.rows.flush()
    return pool.events.from_(ctx.session, classes, token, timeout_s)


@call('event.inject')
def inject(pool: Pool, ctx: Ctx, cls: str, ref: str) -> str:
    """Make an event of an object that has not changed."""
    return pool.events.inject(cls, ref)


@call('event.get_current_id')
def get_current_id(pool: Pool, ctx: Ctx) -> int:
    """Return the number of the latest change."""
    return pool.rows.generation


@call('event.register')
def register(pool: Pool, ctx: Ctx, classes: list[str]) -> None:
    """Have this session hear of classes from now on."""
    pool.events.register(ctx.session.ref, classes)


@call('event.unregister')
def unregister(pool: Pool, ctx: Ctx, classes: list[str]) -> None:
    """Have this session hear less."""
    pool.events.unregister(ctx.session.ref, classes)


@call('event.next')
def next_(pool: Pool, ctx: Ctx) -> list[dict[str, Any]]:
    """Wait for what this session registered."""
    return pool.events.next(ctx.session)
