# SPDX-License-Identifier: Apache-2.0
"""The HTTP server under the application: cheroot, bounded in every way.

``Server.start`` returns when the socket is bound and listens, so that the
address is known; ``Server.stop`` ends new requests and waits for those that
are being answered.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import ssl
import stat
import threading
import time
from typing import Any

from cheroot import errors as cheroot_errors
from cheroot import makefile
from cheroot import server as http
from cheroot import wsgi
from cheroot.ssl import builtin

from volume import errors
from volume.api.app import App

LOG = logging.getLogger(__name__)

HEADER_BYTES_MAX = 32768
# Longer than the application's own limit, which answers in JSON.
BODY_BYTES_MAX = 1 << 20
BACKLOG = 512
KEEP_ALIVE_MAX = 256
HEAR_OUT_BYTES = 64 << 20
PIECE_BYTES = 1 << 16


class Server:
    """One listening socket and the threads that answer.

    ``listen`` is an address, or ``unix:PATH``; port 0 takes a free one.
    ``timeout_s`` bounds a silent client, ``request_s`` one that sends its
    request in drops, ``hear_out_s`` what is waited for the rest of what is
    refused, ``drain_s`` what ``stop`` waits for. With ``tls_client_ca`` only
    clients with a certificate get in.
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
        request_s: float = 20.0,
        hear_out_s: float = 2.0,
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
        self._server.request_s = request_s
        self._server.hear_out_s = hear_out_s
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


class _Paced(socket.SocketIO):
    """What a client sends; one that dribbles is as bad as a silent one."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock, 'rb')
        self._socket = sock
        self.deadline = math.inf

    def readinto(self, buffer: Any, /) -> int | None:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError('timed out')  # as the socket says it
        patience_s = self._socket.gettimeout()
        self._socket.settimeout(min(left_s, patience_s))
        try:
            return super().readinto(buffer)
        finally:
            self._socket.settimeout(patience_s)


class _Reader(makefile.StreamReader):
    def __init__(self, sock: Any, buffer_bytes: int) -> None:
        # Past cheroot's own, which makes a reader that waits for ever.
        super(makefile.StreamReader, self).__init__(
            _Paced(sock), buffer_bytes
        )
        self.bytes_read = 0


def _file(sock: Any, mode: str, buffer_bytes: int) -> Any:
    if mode == 'rb':
        return _Reader(sock, buffer_bytes)
    return makefile.StreamWriter(sock, mode, buffer_bytes)


class _Request(http.HTTPRequest):
    """A request whose end nobody else can see elsewhere."""

    def __init__(self, server: Any, conn: Any, *rest: Any) -> None:
        super().__init__(server, conn, *rest)
        conn.request = self

    @property
    def is_whole(self) -> bool:
        """Whether all that was announced has been read."""
        if isinstance(self.rfile, http.ChunkedRFile):
            return bool(self.rfile.closed)
        return (
            isinstance(self.rfile, http.KnownLengthRFile)
            and not self.rfile.remaining
        )

    def parse_request(self) -> None:
        try:
            super().parse_request()
        except ValueError:
            self.ready = False
            self._refuse('this is no request line')
            return
        length = self.inheaders.get(b'Content-Length', b'0')
        if self.ready and not length.isdigit():
            self._refuse('the header Content-Length is not valid')
        elif self.ready and self.chunked_read:
            # What is left of a body that was refused is no next request.
            self.close_connection = True
            if b'Content-Length' in self.inheaders:
                self._refuse('a body has a length or comes in chunks')

    def _refuse(self, why: str) -> None:
        self.ready = False
        self.close_connection = True
        self.simple_response('400 Bad Request', why)


class _Body:
    """A body as it arrives, whose every trouble is an OSError."""

    def __init__(self, request: http.HTTPRequest, stream: Any) -> None:
        self._request = request
        self._stream = stream

    def read(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read(size)
        except TimeoutError:
            self._request.close_connection = True
            raise
        except (OSError, ValueError, cheroot_errors.MaxSizeExceeded) as broken:
            self._request.close_connection = True
            raise ConnectionError(str(broken)) from None
        return data


class _Gateway(wsgi.Gateway_10):
    def get_environ(self) -> Any:
        environ: Any = super().get_environ()  # type: ignore[no-untyped-call]
        environ['wsgi.input'] = _Body(self.req, environ['wsgi.input'])
        return environ


class _Connection(http.HTTPConnection):
    """A connection whose TLS begins in its worker's time."""

    RequestHandlerClass = _Request
    request: _Request | None = None
    has_spoken = False
    is_begun = False

    def __init__(self, server: Any, sock: Any, *rest: Any) -> None:
        super().__init__(server, sock, _file)

    def communicate(self) -> Any:
        self.rfile.raw.deadline = time.monotonic() + self.server.request_s
        if not self.is_begun and isinstance(self.socket, ssl.SSLSocket):
            try:
                self.socket.do_handshake()
            except OSError as failed:
                LOG.info('no TLS with %s: %s', self.remote_addr, failed)
                return False
        self.is_begun = True
        if super().communicate():  # type: ignore[no-untyped-call]
            return True
        if self.request is not None and not self.request.is_whole:
            self._hear_out()
        return False

    def _hear_out(self) -> None:
        """Let a client that still sends read why it was refused.

        What is closed with something unread in it is reset, and a reset
        overtakes the answer (RFC 9112, section 9.6).
        """
        deadline = time.monotonic() + self.server.hear_out_s
        left_bytes = HEAR_OUT_BYTES
        tls = self.socket
        # Of TLS nothing is left to do: what comes is not deciphered.
        with contextlib.suppress(OSError), socket.fromfd(
            tls.fileno(), tls.family, socket.SOCK_STREAM
        ) as plain:
            plain.shutdown(socket.SHUT_WR)
            while left_bytes > 0 and (
                left_s := deadline - time.monotonic()
            ) > 0:
                plain.settimeout(left_s)
                piece = plain.recv(PIECE_BYTES)
                if not piece:
                    return
                left_bytes -= len(piece)
                time.sleep(0)  # who sends fast keeps no greenthread waiting


class _Cheroot(wsgi.Server):
    """Cheroot, with our log, and a unix socket that is ours alone."""

    ConnectionClass = _Connection
    socket_mode: int
    request_s: float
    hear_out_s: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gateway = _Gateway

    def process_conn(self, conn: Any) -> None:
        if conn.has_spoken:
            super().process_conn(conn)
            return
        # Whoever has said nothing yet waits with the idle, not in a thread.
        conn.has_spoken = True
        self.put_conn(conn)

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
