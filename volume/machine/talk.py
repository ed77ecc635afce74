# SPDX-License-Identifier: Apache-2.0
"""One exchange with a daemon through its unix socket."""

from __future__ import annotations

import dataclasses
import socket
import sys
import time

from volume import errors


@dataclasses.dataclass(frozen=True, slots=True)
class ReplyLength:
    """Where a reply says how long it is, in all.

    An integer of this machine's byte order; ``extra_bytes`` is what it does
    not count (its header, say).
    """

    offset_bytes: int
    size_bytes: int
    extra_bytes: int = 0

    def of(self, reply: bytes) -> int | None:
        """Return the length of a reply that has begun, once it is known."""
        field = reply[self.offset_bytes:self.offset_bytes + self.size_bytes]
        if len(field) < self.size_bytes:
            return None
        return int.from_bytes(field, sys.byteorder) + self.extra_bytes


def exchange(
    path: str,
    request: bytes,
    timeout_s: float,
    reply_bytes_max: int,
    length: ReplyLength | None,
) -> bytes:
    """Send a request and return the reply, up to its length or its end.

    :raises Unavailable: nobody listens there; nothing happened
    :raises Unknown: it was sent, and the reply is not whole
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(max(timeout_s, 0.001))
        try:
            link.connect(path)
        except OSError as failed:
            raise errors.Unavailable(
                f'nobody answers at {path}: {failed.strerror or failed}'
            ) from failed
        try:
            link.sendall(request)
            return _receive(link, path, deadline, reply_bytes_max, length)
        except TimeoutError as late:
            raise errors.Unknown(
                f'{path} did not answer within {timeout_s:g} s'
            ) from late
        except OSError as failed:
            raise errors.Unknown(
                f'{path} hung up: {failed.strerror or failed}'
            ) from failed


def _receive(
    link: socket.socket,
    path: str,
    deadline: float,
    reply_bytes_max: int,
    length: ReplyLength | None,
) -> bytes:
    reply = b''
    while True:
        whole = length.of(reply) if length else None
        if whole is not None and len(reply) >= whole:
            return reply[:whole]
        if max(whole or 0, len(reply)) > reply_bytes_max:
            raise errors.Unknown(
                f'{path} answers with over {reply_bytes_max} bytes'
            )
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        link.settimeout(left_s)
        piece = link.recv(1 << 16)
        if not piece:
            if length is None:
                return reply
            raise errors.Unknown(
                f'{path} hung up after {len(reply)} bytes of its answer'
            )
        reply += piece
