# SPDX-License-Identifier: Apache-2.0
"""A web server for images, on loopback; it can be made slow.

It knows ranges and strong validators, as any server of images does.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import threading
import time
from typing import BinaryIO

RANGE = re.compile(r'bytes=(\d{1,18})-(\d{0,18})')
CHUNK_BYTES = 1 << 18


class ImageServer:
    """Serves the files of one directory while the context lasts."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.slow_s = 0.0  # how long a whole image takes at least
        self._server = _Server(('127.0.0.1', 0), _Handler)
        self._server.images = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    def __enter__(self) -> ImageServer:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path: str) -> str:
        """Return the URL of a file of the directory."""
        port = self._server.server_address[1]
        return f'http://127.0.0.1:{port}/{os.path.basename(path)}'


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    images: ImageServer


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: _Server

    def do_GET(self) -> None:
        images = self.server.images
        path = os.path.join(images.directory, os.path.basename(self.path))
        try:
            file = open(path, 'rb')
        except OSError:
            self.send_error(404)
            return
        with file, contextlib.suppress(ConnectionError):
            self._send(file)

    def log_message(self, format: str, *words: object) -> None:
        """Say nothing: the lines of the demo are its own."""

    def _send(self, file: BinaryIO) -> None:
        found = os.fstat(file.fileno())
        etag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        start, end = 0, found.st_size
        wanted = RANGE.fullmatch(self.headers.get('Range', ''))
        if wanted and self.headers.get('If-Range', etag) == etag:
            start = int(wanted[1])
            end = min(int(wanted[2] or end) + 1, end)
            if start >= end:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header(
                'Content-Range', f'bytes {start}-{end - 1}/{found.st_size}'
            )
        else:
            self.send_response(200)
        self.send_header('Accept-Ranges', 'bytes')
        self.send_header('Content-Length', str(end - start))
        self.send_header('ETag', etag)
        self.end_headers()
        self.wfile.flush()
        self._copy(file, start, end, found.st_size)

    def _copy(
        self, file: BinaryIO, start: int, end: int, size_bytes: int
    ) -> None:
        began_at = time.monotonic()
        for at in range(start, end, CHUNK_BYTES):
            self.connection.sendfile(file, at, min(CHUNK_BYTES, end - at))
            due_s = self.server.images.slow_s * (at - start) / size_bytes
            early_s = began_at + due_s - time.monotonic()
            if early_s > 0:
                time.sleep(early_s)
