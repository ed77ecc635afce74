# SPDX-License-Identifier: Apache-2.0
"""A web server on loopback that misbehaves in the ways that servers do."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import re
import socket
import ssl
import struct
import threading
import unittest
from typing import Any

PIECE = 1 << 16


@dataclasses.dataclass
class Page:
    """One image on the server, and how it is served."""

    data: bytes = b''
    etag: str | None = '"1"'
    last_modified: str | None = None
    ranges: bool = True
    status: int = 0
    redirect: str = ''
    claims: int | None = None  # a Content-Length that is not the length
    has_length: bool = True
    chunked: bool = False
    encoding: str = ''
    body_headers: int = 0  # so many header lines more
    drops: list[int] = dataclasses.field(default_factory=list)
    resets: bool = False  # a drop loses what was sent last
    stalls_after: int | None = None
    ignores_if_range: bool = False
    before: Any = None  # called with the page and how often it was sent
    sent: int = 0  # not counting questions for one byte


class Web:
    """Pages by path; ``log`` has the headers of each request."""

    def __init__(self, case: unittest.TestCase, tls: str = '') -> None:
        self.pages: dict[str, Page] = {}
        self.log: list[tuple[str, dict[str, str]]] = []
        self.ended = threading.Event()
        web = self

        class Handler(_Handler):
            pass

        Handler.web = web
        self.server = http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), Handler
        )
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.base = f'http://127.0.0.1:{self.port}'
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True,
                do_handshake_on_connect=False,
            )
            self.base = f'https://127.0.0.1:{self.port}'
        thread = threading.Thread(
            target=self.server.serve_forever, args=(0.02,), daemon=True
        )
        thread.start()

        def end() -> None:
            self.ended.set()
            self.server.shutdown()
            self.server.server_close()
            thread.join()

        case.addCleanup(end)

    def put(self, path: str, data: bytes = b'', **ways: Any) -> str:
        """Have a page; return its URL."""
        self.pages[path] = Page(data, **ways)
        return self.base + path


class _Handler(http.server.BaseHTTPRequestHandler):
    web: Web
    protocol_version = 'HTTP/1.1'

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def do_GET(self) -> None:
        self.close_connection = True
        path = self.path.split('?')[0]
        self.web.log.append((self.path, dict(self.headers.items())))
        page = self.web.pages.get(path)
        is_question = self.headers.get('Range') == 'bytes=0-0'
        if page is not None and not is_question:
            if page.before is not None:
                page.before(page, page.sent)
            page.sent += 1
        if page is None:
            self.send_error(404)
        elif page.redirect:
            self._send(page, page.status or 302, b'', Location=page.redirect)
        elif page.status:
            self._send(page, page.status, b'')
        else:
            self._serve(page)

    def _serve(self, page: Page) -> None:
        found = re.fullmatch(
            r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')
        )
        condition = self.headers.get('If-Range')
        known = page.etag or page.last_modified
        changed = condition and condition != known
        if not found or not page.ranges or (
            changed and not page.ignores_if_range
        ):
            self._send(page, 200, page.data)
            return
        start, size = int(found[1]), len(page.data)
        end = min(int(found[2] or size - 1), size - 1)
        if start >= size:
            self._send(page, 416, b'', Content_Range=f'bytes */{size}')
            return
        self._send(
            page, 206, page.data[start:end + 1],
            Content_Range=f'bytes {start}-{end}/{size}',
        )

    def _send(
        self, page: Page, status: int, body: bytes, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        if page.etag:
            self.send_header('ETag', page.etag)
        if page.last_modified:
            self.send_header('Last-Modified', page.last_modified)
        if page.encoding:
            self.send_header('Content-Encoding', page.encoding)
        for number in range(page.body_headers):
            self.send_header(f'X-{number}', 'x' * 1000)
        if page.chunked:
            self.send_header('Transfer-Encoding', 'chunked')
        elif page.has_length:
            length = len(body) if page.claims is None else page.claims
            self.send_header('Content-Length', str(length))
        self.send_header('Connection', 'close')
        self.end_headers()
        # A question for one byte is not what breaks.
        if len(body) <= 1:
            self._body(page, body)
            return
        drop = page.drops.pop(0) if page.drops else None
        stop = drop if drop is not None else page.stalls_after
        if stop is None:
            self._body(page, body)
            return
        self._body(page, body[:stop], ends=False)
        if drop is None:
            self.web.ended.wait(30)
        elif page.resets:
            self._reset()

    def _body(self, page: Page, body: bytes, ends: bool = True) -> None:
        for at in range(0, len(body), PIECE):
            piece = body[at:at + PIECE]
            if page.chunked:
                piece = b'%x\r\n%s\r\n' % (len(piece), piece)
            self.wfile.write(piece)
        if page.chunked and ends:
            self.wfile.write(b'0\r\n\r\n')

    def _reset(self) -> None:
        """End as a broken line does, not as a server does."""
        self.wfile.flush()
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)
        )
        self.connection.close()
