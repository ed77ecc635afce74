# SPDX-License-Identifier: Apache-2.0
"""Messages: what the pool, or a client, tells its administrators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.state.values import DateTime

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.state.rows import Row

# What a message may be about: the name of its class, and of the objects'.
CLASSES = {'VM': 'VM', 'Host': 'host', 'SR': 'SR', 'Pool': 'pool',
           'VDI': 'VDI'}


@call('message.create')
def create(
    pool: Pool, ctx: Ctx, name: str, priority: int, cls: str, uuid: str,
    body: str,
) -> str:
    """Tell something about an object."""
    if cls in CLASSES and not pool.rows.find(CLASSES[cls], uuid=uuid):
        raise Failure('UUID_INVALID', cls, uuid)
    return pool.rows.new(
        'message', name=name, priority=priority, cls=cls, obj_uuid=uuid,
        timestamp=pool.now(), body=body,
    )


@call('message.destroy')
def destroy(pool: Pool, ctx: Ctx, ref: str) -> None:
    """Forget a message."""
    pool.rows.delete('message', ref)


@call('message.destroy_many')
def destroy_many(pool: Pool, ctx: Ctx, refs: list[str]) -> None:
    """Forget several messages."""
    for ref in refs:
        pool.rows.delete('message', ref)


@call('message.get_since')
def get_since(pool: Pool, ctx: Ctx, since: DateTime) -> dict[str, Row]:
    """Return the messages of a time and later."""
    return {
        ref: row for ref, row in _records(pool).items()
        if row['timestamp'] >= since
    }


@call('message.get')
def get(
    pool: Pool, ctx: Ctx, cls: str, uuid: str, since: DateTime,
) -> dict[str, Row]:
    """Return the messages about an object."""
    return {
        ref: row for ref, row in get_since(pool, ctx, since).items()
        if row['cls'] == cls and row['obj_uuid'] == uuid
    }


def _records(pool: Pool) -> dict[str, Row]:
    with pool.rows.lock:
        return {
            ref: pool.rows.get('message', ref)
            for ref in pool.rows.all('message')
        }
