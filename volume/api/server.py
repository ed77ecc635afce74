# SPDX-License-Identifier: Apache-2.0
"""The HTTP server under the application: cheroot, bounded in every way.

``Server.start`` returns when the socket is bound and listens, so that the
address is known; ``Server.stop`` ends new requests and waits for those that
are being answered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import stat
import threading
from typing import Any

from cheroot import server as http
from cheroot import wsgi
from cheroot.ssl import builtin

from volume import errors
from volume.api.app import App

LOG = logging.getLogger(__name__)

HEADER_BYTES_MAX = 32768
# Longer than the application's own limit, which answers in JSON.
BODY_BYTES_MAX = 1 << 20
BACKLOG = 128
KEEP_ALIVE_MAX = 256


class Server:
    """One listening socket and the threads that answer.

    ``listen`` is an address, or ``unix:PATH``; port 0 takes a free one.
    ``timeout_s`` bounds a silent client, ``drain_s`` what ``stop`` waits
    for. With ``tls_client_ca`` only clients with a certificate get in.
    """

    def __init__(
        self,
        application: App,
        *,
        listen: str = '127.0.0.1',
        port: int = 8776,
        threads: int = 16,
        tls_certificate: str | None = None,
        tls_key: str | None = None,
        tls_client_ca: str | None = None,
        timeout_s: int = 10,
        drain_s: int = 60,
        socket_mode: int = 0o600,
    ) -> None:
        self._socket_path = (
            listen.removeprefix('unix:')
            if listen.startswith(('unix:', '/')) else ''
        )
        self._where = self._socket_path or f'{listen}:{port}'
        self._drain_s = drain_s
        self._server = _Cheroot(
            self._socket_path or (listen, port), application,
            numthreads=threads,
            server_name='volume',
            request_queue_size=BACKLOG,
            timeout=timeout_s,
            shutdown_timeout=drain_s,
        )
        self._server.socket_mode = socket_mode
        self._server.max_request_header_size = HEADER_BYTES_MAX
        self._server.max_request_body_size = BODY_BYTES_MAX
        self._server.keep_alive_conn_limit = KEEP_ALIVE_MAX
        if tls_certificate or tls_key:
            self._server.ssl_adapter = _tls(
                tls_certificate or '', tls_key, tls_client_ca
            )
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Listen, and return the URL.

        :raises Unavailable: the address cannot be had
        """
        try:
            if self._socket_path:
                _free_socket(self._socket_path)
            self._server.prepare()
        except OSError as failed:
            raise errors.Unavailable(
                f'cannot listen on {self._where}: {failed}'
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve, name='http', daemon=True
        )
        self._thread.start()
        return self.url

    @property
    def url(self) -> str:
        """Where clients reach it; the port is the one that was bound."""
        if self._socket_path:
            return f'unix:{self._socket_path}'
        scheme = 'https' if self._server.ssl_adapter else 'http'
        host, port = self._server.bind_addr[:2]
        return f'{scheme}://[{host}]:{port}' if ':' in host else (
            f'{scheme}://{host}:{port}'
        )

    def stop(self) -> None:
        """Answer what is being asked, and listen no more."""
        if self._thread is None:
            return
        self._server.stop()
        self._thread.join(self._drain_s)
        self._thread = None
        if self._socket_path:
            with contextlib.suppress(OSError):
                os.unlink(self._socket_path)


class _Connection(http.HTTPConnection):
    """A connection whose TLS begins in its worker's time."""

    is_begun = False

    def communicate(self) -> Any:
        if not self.is_begun and isinstance(self.socket, ssl.SSLSocket):
            try:
                self.socket.do_handshake()
            except OSError as failed:
                LOG.info('no TLS with %s: %s', self.remote_addr, failed)
                return False
        self.is_begun = True
        return super().communicate()  # type: ignore[no-untyped-call]


class _Cheroot(wsgi.Server):
    """Cheroot, with our log, and a unix socket that is ours alone."""

    ConnectionClass = _Connection
    socket_mode = 0o600

    def bind_socket(  # type: ignore[override]
        self, socket_: Any, bind_addr: Any
    ) -> Any:
        if isinstance(bind_addr, str):
            # Cheroot has just let everybody in; a socket file is born with
            # the mode of its socket.
            os.fchmod(socket_.fileno(), self.socket_mode)
        socket_.bind(bind_addr)
        if isinstance(bind_addr, str):
            os.chmod(bind_addr, self.socket_mode)  # whatever the umask took
        return socket_

    def error_log(
        self, msg: str = '', level: int = 20, traceback: bool = False
    ) -> None:
        LOG.log(level, '%.2000s', msg, exc_info=traceback)


class _Tls(builtin.BuiltinSSLAdapter):
    """TLS whose handshake is the worker's: a silent client blocks no other."""

    def wrap(self, sock: Any) -> tuple[Any, dict[str, str]]:
        wrapped = self.context.wrap_socket(
            sock, do_handshake_on_connect=False, server_side=True
        )
        return wrapped, {'wsgi.url_scheme': 'https', 'HTTPS': 'on'}


def _tls(
    certificate: str, key: str | None, client_ca: str | None
) -> _Tls:
    try:
        adapter = _Tls(certificate, key)
        adapter.context.minimum_version = ssl.TLSVersion.TLSv1_2
        if client_ca:
            adapter.context.load_verify_locations(client_ca)
            adapter.context.verify_mode = ssl.CERT_REQUIRED
    except OSError as failed:
        raise errors.Invalid(
            f'TLS cannot be used: certificate {certificate}, key {key}: '
            f'{failed}'
        ) from None
    return adapter


def _free_socket(path: str) -> None:
    """Remove an earlier incarnation's socket, and nothing else.

    :raises FileExistsError: it is no socket, or somebody listens there
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError('there is a file that is no socket')
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise FileExistsError('somebody listens there already')
