# SPDX-License-Identifier: Apache-2.0
"""The hosts' HTTP servers: one for each, on an address of its own."""

from __future__ import annotations

import contextlib
import http.server
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, TYPE_CHECKING
from urllib.parse import parse_qsl
from urllib.parse import urlsplit

from volume.sim.xapi import registry
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import Fault
from volume.sim.xapi.failure import Hangup
from volume.sim.xapi.net import certificate
from volume.sim.xapi.net import wire
from volume.sim.xapi.objects import bootstrap

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

LOG = logging.getLogger(__name__)
_RPC: Final = {
    '/': wire.XML, '/RPC2': wire.XML, '/json': wire.JSON,
    '/jsonrpc': wire.JSON,
}


class Servers:
    """The servers of a pool: started, stopped and cut off one by one."""

    def __init__(self, pool: Pool, *, tls: bool, ports: Sequence[int]) -> None:
        self._pool = pool
        self._tls = tls
        self._bare = bool(pool.switch('bare_addresses'))
        self._ports = list(ports)
        self._running: dict[str, _Server] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._certificates: dict[str, certificate.Pair] = {}

    @property
    def tls(self) -> bool:
        """Say if the hosts speak TLS."""
        return self._tls

    def url(self, host: str) -> str:
        """Return where a host listens, or listened last."""
        address, port = self._places[host]
        return f'http{"s" if self._tls else ""}://{address}:{port}'

    def certificate(self, host: str) -> certificate.Pair:
        """Return the files of a host's certificate, made when needed."""
        if host not in self._certificates:
            name = str(self._pool.rows.field('host', host, 'uuid'))
            address = self._places.get(host, ('127.0.0.1', 0))[0]
            self._certificates[host] = certificate.make(
                self._pool.directory / 'certificates', name, address,
            )
        return self._certificates[host]

    def start(self) -> None:
        """Bind all that are not down, and listen.

        With bare addresses the hosts differ by address and share a port, as
        real ones do; otherwise they differ by port, and an address names it.
        """
        for at, host in enumerate(self._pool.hosts):
            address = f'127.0.0.{at + 1}' if self._bare else '127.0.0.1'
            self._places[host] = address, self._wish(at, host)
            if self._pool.is_up(host):
                self.start_host(host)

    def _wish(self, at: int, host: str) -> int:
        if at < len(self._ports):
            return self._ports[at]
        if self._bare and at:
            return self._places[self._pool.hosts[0]][1]
        # Where a client of the last run looks for it.
        last = str(self._pool.rows.field('host', host, 'address'))
        port = last.rpartition(':')[2]
        return int(port) if ':' in last and port.isdigit() else 0

    def start_host(self, host: str) -> None:
        """Listen for one host."""
        address, port = self._places[host]
        given = port in self._ports
        try:
            server = _Server((address, port), self._pool, host)
        except OSError:
            if given or not port or self._bare:
                raise
            # Somebody else has the port of the last run.
            server = _Server((address, 0), self._pool, host)
        if self._tls:
            pair = self.certificate(host)
            server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            server.context.load_cert_chain(pair.certificate, pair.key)
        bound = server.socket.getsockname()[1]
        self._places[host] = address, bound
        bootstrap.readdress(
            self._pool, host,
            address if self._bare else f'{address}:{bound}', address,
        )
        self._running[host] = server
        server.begin()

    def stop_host(self, host: str) -> None:
        """Stop listening for one host, and cut its connections."""
        server = self._running.pop(host, None)
        if server is not None:
            server.end()

    def hang_up(self, host: str) -> None:
        """Cut the connections of a host that goes on listening."""
        if host in self._running:
            self._running[host].hang_up()

    def stop(self) -> None:
        """Stop listening altogether."""
        for host in list(self._running):
            self.stop_host(host)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], pool: Pool, host: str,
    ) -> None:
        self.pool = pool
        self.host = host
        self.context: ssl.SSLContext | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.02,), name='xapi-listen',
            daemon=True,
        )
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The inherited one looks the name of the address up.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        name, port = self.socket.getsockname()
        self.server_address = name, port
        self.server_name, self.server_port = name, port

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        self.hang_up()
        self._thread.join()

    def hang_up(self) -> None:
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request_thread(
        self, request: Any, client_address: Any,
    ) -> None:
        with self._lock:
            self._open.add(request)
        try:
            if self.context is not None:
                # Here, so that a slow client holds up nobody else.
                request.settimeout(self.pool.limits.connection_s)
                wrapped = self.context.wrap_socket(request, server_side=True)
            else:
                wrapped = request
            with self._lock:
                self._open.discard(request)
                self._open.add(wrapped)
            super().process_request_thread(wrapped, client_address)
        except OSError as error:
            LOG.debug('connection of %s: %s', client_address, error)
            request.close()
        finally:
            with self._lock:
                self._open -= {request}
                self._open = {s for s in self._open if s.fileno() >= 0}

    def handle_error(self, request: Any, client_address: Any) -> None:
        LOG.debug('connection of %s ended', client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = 'HTTP/1.1'
    server_version = 'xapi-sim'
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.pool.limits.connection_s)

    def log_message(self, format: str, *args: Any) -> None:
        # Never the path: a session is in its query.
        LOG.debug('%s %s', self.client_address[0], args[1:])

    def do_POST(self) -> None:
        self._serve('POST')

    def do_GET(self) -> None:
        self._serve('GET')

    def do_PUT(self) -> None:
        self._serve('PUT')

    def do_HEAD(self) -> None:
        self._serve('HEAD')

    def do_OPTIONS(self) -> None:
        self._serve('OPTIONS')

    def _serve(self, method: str) -> None:
        parts = urlsplit(self.path)
        try:
            route = registry.ROUTES.get((method, parts.path))
            if method == 'POST' and parts.path in _RPC:
                self._rpc(_RPC[parts.path])
            elif route is not None:
                query = dict(parse_qsl(parts.query, keep_blank_values=True))
                route(self.server.pool, self.server.host, self, query)
            else:
                self.close_connection = True
                self._answer(404, 'text/plain', b'')
        except Hangup:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            LOG.debug('connection of %s: %s', self.client_address, error)
            self.close_connection = True

    def _rpc(self, kind: str) -> None:
        body = self._body()
        if body is None:
            return
        answer: Callable[[bytes], bytes]
        answer = self._xml if kind == wire.XML else self._json
        self._answer(200, kind, answer(body))

    def _body(self) -> bytes | None:
        """Return what was posted, None if it was refused."""
        length = self.headers.get('Content-Length', '')
        if not length.isdigit():
            self.close_connection = True
            self._answer(411, 'text/plain', b'')
            return None
        if int(length) > self.server.pool.limits.body_bytes:
            self.close_connection = True
            self._answer(413, 'text/plain', b'')
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Hangup
        return body

    def _xml(self, body: bytes) -> bytes:
        try:
            request = wire.read_xml(body)
            return wire.write_xml(self._invoke(request))
        except Failure as failure:
            return wire.write_xml_failure(failure)
        except Fault as fault:
            return wire.write_xml_fault(fault)

    def _json(self, body: bytes) -> bytes:
        request = None
        try:
            request = wire.read_json(body)
            return wire.write_json(
                request, self._invoke(request),
                int_strings=bool(self.server.pool.switch('json_int_strings')),
            )
        except Failure as failure:
            assert request is not None
            return wire.write_json_failure(request, failure)
        except Fault as fault:
            return wire.write_json_fault(request, fault)

    def _invoke(self, request: wire.Request) -> Any:
        return self.server.pool.invoke(
            self.server.host, request.method, request.args,
        )

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        if self.close_connection:
            self.send_header('Connection', 'close')
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
