# SPDX-License-Identifier: Apache-2.0
"""The pool as a whole, and who its master is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool


@call('pool.designate_new_master')
def designate_new_master(pool: Pool, ctx: Ctx, host: str) -> None:
    """Have another host be the master; nothing is lost."""
    pool.rows.field('host', host, 'uuid')
    if not pool.is_up(host):
        raise Failure('HOST_OFFLINE', host)
    if host != pool.master:
        # The connection of this very call has to last for its answer.
        pool.set_master(host, cut=False)


@call('pool.emergency_transition_to_master', on_slave=True)
def emergency_transition_to_master(pool: Pool, ctx: Ctx) -> None:
    """Make the host that is asked the master, as the old one is lost."""
    if ctx.host != pool.master:
        pool.set_master(ctx.host)


@call('pool.emergency_reset_master', on_slave=True)
def emergency_reset_master(pool: Pool, ctx: Ctx, address: str) -> None:
    """Tell a host which one the master is; here each of them knows."""
    known = pool.rows.field('host', pool.master, 'address')
    if address != known:
        raise Failure('CANNOT_CONTACT_HOST', address)


@call('pool.recover_slaves')
def recover_slaves(pool: Pool, ctx: Ctx) -> list[str]:
    """Return the hosts that were told of the new master."""
    return [
        host for host in pool.hosts
        if host != pool.master and pool.is_up(host)
    ]


@call('pool.sync_database')
def sync_database(pool: Pool, ctx: Ctx) -> None:
    """Make durable what is known."""
    pool.rows.flush()


@call('pool.get_license_state')
def get_license_state(pool: Pool, ctx: Ctx, ref: str) -> dict[str, str]:
    """Return which edition the hosts have."""
    pool.rows.field('pool', ref, 'uuid')
    return {'edition': 'free', 'expiry': 'never'}


@call('pool.enable_tls_verification')
def enable_tls_verification(pool: Pool, ctx: Ctx) -> None:
    """Have hosts verify each other; a client sees the flag alone."""
    pool.rows.update('pool', pool.ref, tls_verification_enabled=True)
