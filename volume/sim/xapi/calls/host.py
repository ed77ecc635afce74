# SPDX-License-Identifier: Apache-2.0
"""Hosts: what they tell, and switching them off and on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.state.values import DateTime

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool


@call('host.list_methods')
def list_methods(pool: Pool, ctx: Ctx) -> list[str]:
    """Return the names of all calls."""
    return pool.methods()


@call('host.get_servertime')
def get_servertime(pool: Pool, ctx: Ctx, host: str) -> DateTime:
    """Return the time on a host."""
    pool.rows.field('host', host, 'uuid')
    return pool.now()


@call('host.get_server_localtime')
def get_server_localtime(pool: Pool, ctx: Ctx, host: str) -> DateTime:
    """Return the time on a host, as its own zone has it: UTC."""
    return get_servertime(pool, ctx, host)


@call('host.get_server_certificate')
def get_server_certificate(pool: Pool, ctx: Ctx, host: str) -> str:
    """Return a host's certificate; made if it has not been needed yet."""
    pool.rows.field('host', host, 'uuid')
    return pool.servers.certificate(host).certificate.read_text()


@call('host.get_management_interface')
def get_management_interface(pool: Pool, ctx: Ctx, host: str) -> str:
    """Return the interface that a host is managed by."""
    return pool.rows.find('PIF', host=host, management=True)[0]


@call('host.compute_free_memory')
def compute_free_memory(pool: Pool, ctx: Ctx, host: str) -> int:
    """Return how much memory a host has left."""
    metrics = pool.rows.field('host', host, 'metrics')
    return int(pool.rows.field('host_metrics', metrics, 'memory_free'))


@call('host.enable')
def enable(pool: Pool, ctx: Ctx, host: str) -> None:
    """Let VMs be started on a host."""
    _live(pool, host)
    pool.rows.update('host', host, enabled=True)


@call('host.disable')
def disable(
    pool: Pool, ctx: Ctx, host: str, auto_enable: bool = True,
) -> None:
    """Let no VM be started on a host."""
    _live(pool, host)
    pool.rows.update('host', host, enabled=False)


@call('host.declare_dead')
def declare_dead(pool: Pool, ctx: Ctx, host: str) -> None:
    """Say that a host is down for certain: what was its is free."""
    if pool.is_up(host):
        raise Failure('HOST_IS_LIVE', host)
    pool.tasks.orphan(host)
    for pbd in pool.rows.find('PBD', host=host):
        pool.rows.update('PBD', pbd, currently_attached=False)


@call('host.set_multipathing')
def set_multipathing(pool: Pool, ctx: Ctx, host: str, value: bool) -> None:
    """Have a host use several paths to its storage."""
    pool.rows.update('host', host, multipathing=value)


@call('host.set_iscsi_iqn')
def set_iscsi_iqn(pool: Pool, ctx: Ctx, host: str, value: str) -> None:
    """Name a host as an initiator."""
    if not value or any(part.isspace() for part in value):
        raise Failure('INVALID_VALUE', 'value', value)
    with pool.rows.change('host', host, 'other_config') as config:
        config['iscsi_iqn'] = value
    pool.rows.update('host', host, iscsi_iqn=value)


@call('host.restart_agent')
def restart_agent(pool: Pool, ctx: Ctx, host: str) -> None:
    """Restart the server process of a host: its connections are cut."""
    _live(pool, host)
    pool.tasks.orphan(host)
    pool.servers.hang_up(host)


def _live(pool: Pool, host: str) -> None:
    pool.rows.field('host', host, 'uuid')
    if not pool.is_up(host):
        raise Failure('HOST_OFFLINE', host)
