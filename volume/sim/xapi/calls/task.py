# SPDX-License-Identifier: Apache-2.0
"""Tasks: a client's own, and those of calls it does not wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.pool import check_role
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.state.tasks import FINISHED

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

ANY_ROLE = 'pool-operator'


@call('task.create')
def create(pool: Pool, ctx: Ctx, label: str, description: str) -> str:
    """Make a task that an HTTP transfer reports to, or the client itself."""
    task = pool.tasks.create(
        label, description, ctx.host, cancellable=True,
        owner=ctx.session.user,
    )
    return task.ref


@call('task.destroy')
def destroy(pool: Pool, ctx: Ctx, ref: str) -> None:
    """Forget a task. What runs for it goes on."""
    _own(pool, ctx, ref, 'task.destroy')
    pool.tasks.abandon(ref)
    pool.tasks.forget(ref)


@call('task.cancel')
def cancel(pool: Pool, ctx: Ctx, ref: str) -> None:
    """Ask what runs for a task to end."""
    _own(pool, ctx, ref, 'task.cancel')
    pool.tasks.cancel(ref)


@call('task.set_status')
def set_status(pool: Pool, ctx: Ctx, ref: str, status: str) -> None:
    """Say how a client's own task is."""
    _set(pool, ctx, ref, 'status', status)
    if status in FINISHED:
        pool.rows.update('task', ref, finished=pool.now())
        pool.tasks.abandon(ref)


@call('task.set_progress')
def set_progress(pool: Pool, ctx: Ctx, ref: str, fraction: float) -> None:
    """Say how far a client's own task is."""
    _set(pool, ctx, ref, 'progress', fraction)


@call('task.set_result')
def set_result(pool: Pool, ctx: Ctx, ref: str, result: str) -> None:
    """Say what came of a client's own task."""
    _set(pool, ctx, ref, 'result', result)


@call('task.set_error_info')
def set_error_info(
    pool: Pool, ctx: Ctx, ref: str, error: list[str],
) -> None:
    """Say what went wrong with a client's own task."""
    _set(pool, ctx, ref, 'error_info', error)


def _set(pool: Pool, ctx: Ctx, ref: str, name: str, value: object) -> None:
    _own(pool, ctx, ref, f'task.set_{name}')
    if pool.rows.field('task', ref, 'status') in FINISHED:
        raise Failure('OPERATION_NOT_ALLOWED', 'Task is already finished')
    pool.rows.update('task', ref, **{name: value})


def _own(pool: Pool, ctx: Ctx, ref: str, permission: str) -> None:
    """Refuse another user's task, unless the role is high enough."""
    pool.rows.field('task', ref, 'uuid')
    if pool.tasks.owner(ref) not in ('', ctx.session.user):
        check_role(ctx.session, permission, ANY_ROLE)
