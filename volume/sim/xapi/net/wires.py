# SPDX-License-Identifier: Apache-2.0
"""The two directions of a connection that carries a disk.

Whoever waits for the other side looks now and then whether the task was
cancelled. A planned accident ends the transfer after so many bytes, as a
broken network does.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from volume import errors

POLL_S = 0.25

Look = Callable[[int], None]


class Cut(Exception):
    """The connection is gone, or is to be: nobody can be told anything."""


class Body:
    """What a client sends, up to its Content-Length."""

    def __init__(
        self,
        request: BaseHTTPRequestHandler,
        length: int,
        look: Look,
        idle_s: float,
        cut_after: int | None = None,
    ) -> None:
        """``look`` is told how much has come, and may raise."""
        self._socket = request.connection
        self._left = length
        self._look = look
        self._idle_s = idle_s
        self._cut_after = cut_after
        self._come = 0
        self._ahead = memoryview(_buffered(request))
        self._socket.settimeout(POLL_S)

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[:self._left]
        if self._cut_after is not None:
            view = view[:max(0, self._cut_after - self._come)]
            if not view and self._left:
                raise Cut
        if not view:
            return 0
        count = self._receive(view)
        self._left -= count
        self._come += count
        self._look(self._come)
        return count

    def _receive(self, view: memoryview) -> int:
        if self._ahead:
            count = min(len(view), len(self._ahead))
            view[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
            return count
        deadline = time.monotonic() + self._idle_s
        while True:
            try:
                got: int = self._socket.recv_into(view)
                return got
            except (TimeoutError, ssl.SSLWantReadError):
                self._look(self._come)
                if time.monotonic() > deadline:
                    raise errors.Invalid('the stream stands still') from None
            except OSError as failed:
                raise errors.Invalid(f'the stream broke: {failed}') from None


class Drain:
    """Where a client reads."""

    def __init__(
        self,
        request: BaseHTTPRequestHandler,
        look: Look,
        idle_s: float,
        cut_after: int | None = None,
    ) -> None:
        """``look`` is told how much has gone, and may raise."""
        self._socket = request.connection
        self._look = look
        self._idle_s = idle_s
        self._cut_after = cut_after
        self._gone = 0
        self._socket.settimeout(POLL_S)

    def send(self, data: memoryview) -> None:
        """Send all of it.

        :raises Cut: the client is gone
        """
        if self._cut_after is not None:
            data = data[:max(0, self._cut_after - self._gone)]
            if not data:
                raise Cut
        deadline = time.monotonic() + self._idle_s
        while data:
            try:
                count = self._socket.send(data)
            except (TimeoutError, ssl.SSLWantWriteError):
                self._look(self._gone)
                if time.monotonic() > deadline:
                    raise Cut from None
                continue
            except OSError as failed:
                raise Cut from failed
            data = data[count:]
            self._gone += count
            deadline = time.monotonic() + self._idle_s
        self._look(self._gone)


def _buffered(request: BaseHTTPRequestHandler) -> bytes:
    """Return what of the body was read together with the head."""
    request.connection.setblocking(False)
    try:
        with contextlib.suppress(ssl.SSLWantReadError, BlockingIOError):
            count = len(request.rfile.peek())  # type: ignore[attr-defined]
            return request.rfile.read(count) if count else b''
        return b''
    finally:
        # A time limit alone does not make eventlet's TLS wait again.
        request.connection.setblocking(True)
