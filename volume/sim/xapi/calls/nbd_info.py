# SPDX-License-Identifier: Apache-2.0
"""Disks over NBD: where they are, and the servers of each host.

A host serves with TLS or without, by the purpose of its network. A real one
does it on port 10809; here each takes a port that is free, and the answer
names it, as it does there.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from typing import Any, TYPE_CHECKING
from urllib.parse import parse_qs

from volume.sim.xapi import pool as pools
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.disks import Passed
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.net.nbd import NbdServer
from volume.sim.xapi.objects import vms
from volume.sim.xapi.objects.guests import guests
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.registry import daemon
from volume.sim.xapi.registry import Stop

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

PURPOSES = ('nbd', 'insecure_nbd')
ROLE = 'vm-admin'


class Exports:
    """The NBD servers of a pool, each started when it is first named."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._servers: dict[tuple[str, str, bool], NbdServer] = {}

    def port(self, host: str, address: str, is_secure: bool) -> int:
        """Return the port on which a host serves."""
        with self._lock:
            key = host, address, is_secure
            server = self._servers.get(key)
            if server is None:
                server = self._servers[key] = NbdServer(
                    lambda name: self._resolve(host, name), (address, 0),
                    tls=self._context(host) if is_secure else None,
                )
            return server.address[1]

    def stop(self) -> None:
        """Hang up on everybody."""
        with self._lock:
            servers = list(self._servers.values())
            self._servers.clear()
        for server in servers:
            server.close()

    def _context(self, host: str) -> ssl.SSLContext:
        pair = self._pool.servers.certificate(host)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        return context

    def _resolve(self, host: str, name: str) -> Disk:
        """Open the VDI that an export name means, plugged into dom0.

        :raises Failure: there is none, or its session is over
        """
        uuid, _, query = name.lstrip('/').partition('?')
        ref = parse_qs(query).get('session_id', [''])[0]
        session = self._pool.sessions.get(ref)
        pools.check_role(session, 'vdi.get_nbd_info', ROLE)
        vdi = self._pool.rows.by_uuid('VDI', uuid)
        row = self._pool.rows.get('VDI', vdi)
        if row['type'] == 'cbt_metadata' or not self._pool.is_up(host):
            raise Failure('VDI_INCOMPATIBLE_TYPE', vdi, row['type'])
        if not vms.sees(self._pool, host, row['SR']):
            raise Failure('SR_HAS_NO_PBDS', row['SR'])
        with contextlib.ExitStack() as stack:
            disk = stack.enter_context(
                guests(self._pool).in_dom0(vdi, 'RO', host))
            return _Lent(disk, stack.pop_all())


class _Lent(Passed):
    """A disk that leaves dom0 when its client does."""

    def __init__(self, disk: Disk, stack: contextlib.ExitStack) -> None:
        super().__init__(disk)
        self._stack = stack

    def close(self) -> None:
        self._stack.close()


@daemon
def serve(pool: Pool) -> Stop:
    """End the servers with the pool."""
    return pool.part(Exports).stop


@call('VDI.get_nbd_info')
def get_nbd_info(pool: Pool, ctx: Ctx, vdi: str) -> list[dict[str, Any]]:
    """Return how a VDI can be read, by each address of each host."""
    rows = pool.rows
    row = rows.get('VDI', vdi)
    if row['type'] == 'cbt_metadata':
        raise Failure('VDI_INCOMPATIBLE_TYPE', vdi, row['type'])
    found = []
    for host in pool.hosts:
        if not vms.sees(pool, host, row['SR']):
            continue
        for pif in rows.find('PIF', host=host):
            address = rows.field('PIF', pif, 'IP')
            network = rows.field('PIF', pif, 'network')
            purpose = {*PURPOSES} & {
                *rows.field('network', network, 'purpose')}
            if not purpose or not address or not rows.field(
                'PIF', pif, 'currently_attached'
            ):
                continue
            pair = pool.servers.certificate(host)
            found.append({
                'exportname': f'/{row["uuid"]}?session_id={ctx.session.ref}',
                'address': address,
                'port': pool.part(Exports).port(
                    host, address, 'nbd' in purpose),
                'cert': pair.certificate.read_text(),
                'subject': rows.field('host', host, 'uuid'),
            })
    return found
