# SPDX-License-Identifier: Apache-2.0
"""One HTTP request whose answer comes before its body has gone.

``import_raw_vdi`` says 200 or 302 first and takes the bytes then; what became
of them only its task tells. So the head of the answer is read before the
first byte is sent, and nothing of the standard library does that.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from typing import Any

from volume import errors

HEAD_BYTES_MAX = 1 << 16


class Exchange:
    """A connection with one request on it."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        self._sock = sock
        self._host = host
        self._rest = bytearray()  # of the body, read with the head
        self._left: int | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    def ask(
        self, method: str, target: str, length_bytes: int | None = None
    ) -> None:
        """Send the head of a request, and read the head of its answer.

        :raises Unknown: the server hung up, or took too long
        """
        lines = [
            f'{method} {target} HTTP/1.1', f'Host: {self._host}',
            'User-Agent: volume-service', 'Connection: close',
        ]
        if length_bytes is not None:
            lines.append(f'Content-Length: {length_bytes}')
        self.send(memoryview('\r\n'.join([*lines, '', '']).encode()))
        self._read_head()

    def send(self, view: memoryview) -> None:
        """Send bytes of the body.

        :raises Unknown: the server hung up, or took too long
        """
        try:
            self._sock.sendall(view)
        except OSError as failed:
            raise self._lost(failed) from failed

    def readinto(self, buffer: Any, /) -> int:
        """Read some of the answer's body; nothing at its end.

        :raises Unknown: the server hung up early, or took too long
        """
        view = memoryview(buffer).cast('B')
        if self._left is not None:
            view = view[:self._left]
        if not view:
            return 0
        if self._rest:
            count = min(len(view), len(self._rest))
            view[:count] = self._rest[:count]
            del self._rest[:count]
        else:
            count = self._receive_into(view)
        if self._left is not None:
            if not count:
                raise self._lost(
                    f'it hung up {self._left} bytes before the end')
            self._left -= count
        return count

    def wait_end(self) -> None:
        """Wait until the server hangs up; what else it says is not read."""
        buffer = bytearray(HEAD_BYTES_MAX)
        with contextlib.suppress(errors.Unknown):
            while self.readinto(buffer):
                pass

    def abort(self) -> None:
        """End it at once, from whatever thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _read_head(self) -> None:
        data = bytearray()
        while (end := data.find(b'\r\n\r\n')) < 0:
            piece = bytearray(4096)
            count = self._receive_into(memoryview(piece))
            if not count or len(data) > HEAD_BYTES_MAX:
                raise self._lost('its answer has no head')
            data += piece[:count]
        self._rest = data[end + 4:]
        first, *lines = data[:end].decode('latin-1').split('\r\n')
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith('HTTP/1.') or (
            not words[1].isdigit()
        ):
            raise self._lost('its answer is no HTTP')
        self.status = int(words[1])
        pairs = (line.partition(':') for line in lines)
        self.headers = {
            key.strip().lower(): value.strip() for key, _, value in pairs
        }
        self._left = _length(self.headers)

    def _receive_into(self, view: memoryview) -> int:
        try:
            return self._sock.recv_into(view)
        except OSError as failed:
            raise self._lost(failed) from failed

    def _lost(self, why: object) -> errors.Unknown:
        return errors.Unknown(
            f'the connection to {self._host} was lost: {why}')


def _length(headers: Mapping[str, str]) -> int | None:
    text = headers.get('content-length', '')
    return int(text) if text.isdigit() and len(text) < 20 else None
