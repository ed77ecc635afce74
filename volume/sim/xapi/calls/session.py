# SPDX-License-Identifier: Apache-2.0
"""Logging in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TYPE_CHECKING

from volume.sim.xapi import registry
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool


@call('session.login_with_password')
def login_with_password(
    pool: Pool, ctx: Ctx, user: str, password: str, version: str = '',
    originator: str = '',
) -> str:
    """Log in on the master; another host names it."""
    if ctx.host != pool.master:
        raise pool.slave()
    pool.sessions.collect()
    return pool.sessions.login(ctx.host, user, password, originator)


@call('session.slave_local_login_with_password', on_slave=True)
def slave_local_login_with_password(
    pool: Pool, ctx: Ctx, user: str, password: str,
) -> str:
    """Log in on one host, whatever it is, for emergencies."""
    return pool.sessions.local_login(user, password)


@call('session.logout')
def logout(pool: Pool, ctx: Ctx) -> None:
    """End the session of the call."""
    pool.sessions.logout(ctx.session.ref)


@call('session.local_logout', on_slave=True)
def local_logout(pool: Pool, ctx: Ctx) -> None:
    """End a session of one host."""
    pool.sessions.logout(ctx.session.ref)


@registry.computed('session', 'rbac_permissions')
def _permissions(
    pool: Pool, ref: str, row: Mapping[str, Any]
) -> list[str]:
    """Return what the user may call; nothing of root, who may all."""
    if row['is_local_superuser']:
        return []
    return pool.model.permissions(pool.sessions.role(row))


@call('session.get_all_subject_identifiers')
def get_all_subject_identifiers(pool: Pool, ctx: Ctx) -> list[str]:
    """Return who is logged in and not root."""
    rows = pool.rows
    return sorted({
        sid for ref in rows.all('session')
        if (sid := str(rows.field('session', ref, 'auth_user_sid')))
    })


@call('session.logout_subject_identifier')
def logout_subject_identifier(pool: Pool, ctx: Ctx, sid: str) -> None:
    """End the sessions of somebody who is not root."""
    rows = pool.rows
    for ref in rows.find('session', auth_user_sid=sid):
        if sid and ref != ctx.session.ref:
            pool.sessions.logout(ref)
