# SPDX-License-Identifier: Apache-2.0
"""A small NBD client: one connection, one request at a time.

Fixed newstyle, ``NBD_OPT_GO``, structured replies and ``base:allocation``,
over a unix or TCP socket, with TLS if the caller says how. What the server
says is believed in nothing: lengths are bounded before a byte is received,
every byte of a read must have come exactly once, and after the first doubt
the connection is never used again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from volume import errors
from volume import model
from volume.nbdaddress import connect
from volume.nbdaddress import parse as parse

T = TypeVar('T')

NBD_MAGIC = 0x4E42444D41474943  # 'NBDMAGIC'
OPTION_MAGIC = 0x49484156454F5054  # 'IHAVEOPT'
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_STARTTLS, OPT_GO, OPT_STRUCTURED_REPLY = 5, 7, 8
OPT_SET_META_CONTEXT = 10
REP_ACK, REP_INFO, REP_META_CONTEXT, REP_ERROR = 1, 3, 4, 1 << 31
REP_UNKNOWN = REP_ERROR + 6
INFO_EXPORT = 0
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_WRITE_ZEROES = 1, 2, 4, 64
READ, WRITE, DISCONNECT, FLUSH, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 2, 3, 6, 7
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS = 0, 1, 2, 5
CHUNK_ERROR = 1 << 15
CHUNK_DONE = 1
STATE_ZERO = 2

GREETING = struct.Struct('>QQH')
OPTION = struct.Struct('>QII')
OPTION_REPLY = struct.Struct('>QIII')
EXPORT_INFO = struct.Struct('>HQH')
REQUEST = struct.Struct('>IHHQQI')
SIMPLE = struct.Struct('>IQ')  # error and cookie, after the magic
STRUCTURED = struct.Struct('>HHQI')  # flags, type, cookie, length
HOLE = struct.Struct('>QI')

OPTION_BYTES_MAX = 1 << 16
OPTION_REPLIES_MAX = 64
TRANSFER_BYTES_MAX = 1 << 22  # one read or write
ZERO_BYTES_MAX = 1 << 28
# Enough that server and client work at once; each may be a buffer there.
WRITES_AHEAD = 4
STATUS_BYTES_MAX = 1 << 30
EXTENTS_BYTES_MAX = 4 + 8 * (1 << 20)
ERROR_BYTES_MAX = 1 << 13
BASE_ALLOCATION = b'base:allocation'

# NBD's error numbers are fixed by the protocol, whatever the server runs on.
MEANING: dict[int, type[errors.VolumeError]] = {
    1: errors.Invalid,  # EPERM: the export is read only
    22: errors.Invalid,
    28: errors.NoSpace,
    95: errors.Unsupported,
}


class _Garbled(errors.Corrupt):
    """The server broke the protocol."""


@dataclasses.dataclass
class _Answer:
    """What the reply to one request has brought so far."""

    buffer: memoryview = dataclasses.field(
        default_factory=lambda: memoryview(b'')
    )
    offset: int = 0
    runs: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    extents: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    error: int = 0


class NbdClient:
    """One export of an NBD server."""

    def __init__(
        self,
        uri: str,
        timeout_s: float = 60.0,
        secure: Callable[[socket.socket], socket.socket] | None = None,
    ) -> None:
        """Connect and negotiate.

        ``secure`` puts TLS on the connection, and knows whom to trust;
        nothing of the export is said before.

        :raises Invalid: this is no NBD URI
        :raises Unavailable: the server does not answer
        :raises NotFound: there is no such export
        :raises Corrupt: what answers breaks the protocol
        """
        address, name = parse(uri)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._cookie = 0
        self._unanswered: set[int] = set()
        self._failed_write: errors.VolumeError | None = None
        self._structured = False
        self._context: int | None = None
        self._flags = 0
        self.size_bytes = 0
        self._sock: socket.socket | None = connect(address, timeout_s)
        try:
            self._negotiate(name, secure)
        except errors.Unknown as failed:
            self._drop()
            raise errors.Unavailable(
                f'the NBD server does not answer: {failed}'
            ) from failed
        except BaseException:
            self._drop()
            raise

    @property
    def is_read_only(self) -> bool:
        return bool(self._flags & READ_ONLY)

    @property
    def knows_extents(self) -> bool:
        """Whether the server tells what is zero."""
        return self._context is not None

    def pread_into(self, buffer: Any, offset_bytes: int) -> None:
        """Fill the whole buffer with the bytes at an offset.

        :raises Unknown: the connection or the storage failed
        """
        view = memoryview(buffer).cast('B')
        self._check('read', offset_bytes, len(view))
        for at in range(0, len(view), TRANSFER_BYTES_MAX):
            part = view[at:at + TRANSFER_BYTES_MAX]
            answer = _Answer(part, offset_bytes + at)
            self._request(
                READ, offset_bytes + at, len(part), answer=answer
            )

    def pwrite(self, data: Any, offset_bytes: int) -> None:
        """Write all of the data at an offset.

        :raises NoSpace: the storage is full
        :raises Unknown: it may or may not have been written
        """
        view = memoryview(data).cast('B')
        self._check('write', offset_bytes, len(view))
        for at in range(0, len(view), TRANSFER_BYTES_MAX):
            part = view[at:at + TRANSFER_BYTES_MAX]
            self._request(WRITE, offset_bytes + at, len(part), payload=part)

    def pwrite_ahead(self, data: Any, offset_bytes: int) -> None:
        """Send data for an offset, and do not wait until it is written.

        The caller may use the buffer again at once. Whatever is asked next,
        ``flush`` at the latest, waits for it; if it has failed, that and all
        that follows on this connection fails, so that no lost write is ever
        taken for a durable one.

        :raises NoSpace: the storage was full at this write, or an earlier
        :raises Unknown: this or an earlier one may or may not be written
        """
        view = memoryview(data).cast('B')
        self._check('write', offset_bytes, len(view))
        for at in range(0, len(view), TRANSFER_BYTES_MAX):
            part = view[at:at + TRANSFER_BYTES_MAX]
            with self._lock, self._dropping():
                deadline = time.monotonic() + self._timeout_s
                self._settle(WRITES_AHEAD - 1, deadline)
                self._ask(WRITE, offset_bytes + at, len(part), part, deadline)
                self._unanswered.add(self._cookie)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a run read as zeros.

        :raises NoSpace: the storage is full
        :raises Unknown: it may or may not have been done
        """
        self._check('zero', offset_bytes, length_bytes)
        if not self._flags & SEND_WRITE_ZEROES:
            zeros = memoryview(bytes(min(length_bytes, TRANSFER_BYTES_MAX)))
            for at in range(0, length_bytes, TRANSFER_BYTES_MAX):
                self.pwrite(zeros[:length_bytes - at], offset_bytes + at)
            return
        for at in range(0, length_bytes, ZERO_BYTES_MAX):
            count = min(length_bytes - at, ZERO_BYTES_MAX)
            self._request(WRITE_ZEROES, offset_bytes + at, count)

    def flush(self) -> None:
        """Make all that was written durable.

        :raises Unsupported: the server has no flush
        :raises Unknown: it may or may not be durable
        """
        if not self._flags & SEND_FLUSH:
            raise errors.Unsupported(
                'the NBD server has no flush: nothing can be proved durable'
            )
        self._request(FLUSH, 0, 0)

    def extents(self) -> Iterator[model.Extent]:
        """Yield runs in ascending order that cover the whole export."""
        start, offset, is_zero = 0, 0, False
        for length, zero in self._states():
            if zero != is_zero and offset > start:
                yield model.Extent(start, offset - start, is_zero)
                start = offset
            is_zero = zero
            offset += length
        if offset > start:
            yield model.Extent(start, offset - start, is_zero)

    def close(self) -> None:
        """Say good-bye and hang up."""
        with self._lock:
            if self._sock is None:
                return
            with contextlib.suppress(OSError):
                self._sock.settimeout(1.0)
                self._sock.sendall(
                    REQUEST.pack(REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0)
                )
            self._drop()

    # Negotiation.

    def _negotiate(
        self,
        name: bytes,
        secure: Callable[[socket.socket], socket.socket] | None,
    ) -> None:
        deadline = time.monotonic() + self._timeout_s
        greeting = self._receive(GREETING.size, deadline)
        magic, option_magic, flags = GREETING.unpack(greeting)
        if (magic, option_magic) != (NBD_MAGIC, OPTION_MAGIC):
            raise _Garbled('what answers is no NBD server')
        if not flags & FIXED_NEWSTYLE:
            raise errors.Unsupported('the NBD server is too old')
        ours = FIXED_NEWSTYLE | flags & NO_ZEROES
        self._send(struct.pack('>I', ours), deadline)
        if secure is not None:
            replies = self._option(OPT_STARTTLS, b'', deadline)
            if replies != [(REP_ACK, b'')]:
                raise errors.Unavailable('the NBD server has no TLS')
            self._io(functools.partial(self._wrap, secure), deadline)
        replies = self._option(OPT_STRUCTURED_REPLY, b'', deadline)
        self._structured = replies[-1][0] == REP_ACK
        if self._structured:
            self._ask_context(name, deadline)
        self._go(name, deadline)

    def _wrap(
        self,
        secure: Callable[[socket.socket], socket.socket],
        sock: socket.socket,
    ) -> None:
        self._sock = secure(sock)

    def _ask_context(self, name: bytes, deadline: float) -> None:
        query = struct.pack('>I', len(BASE_ALLOCATION)) + BASE_ALLOCATION
        data = (
            struct.pack('>I', len(name)) + name + struct.pack('>I', 1) + query
        )
        for kind, reply in self._option(OPT_SET_META_CONTEXT, data, deadline):
            if kind == REP_META_CONTEXT:
                if reply[4:] != BASE_ALLOCATION or len(reply) < 4:
                    raise _Garbled('a context that nobody asked for')
                self._context = int.from_bytes(reply[:4], 'big')

    def _go(self, name: bytes, deadline: float) -> None:
        data = struct.pack('>I', len(name)) + name + struct.pack('>H', 0)
        replies = self._option(OPT_GO, data, deadline)
        last, words = replies[-1]
        if last == REP_UNKNOWN:
            raise errors.NotFound(
                f'the NBD server has no export {name.decode()!r:.200}'
            )
        if last != REP_ACK:
            text = words.decode(errors='replace')
            raise errors.Unavailable(f'the NBD server refuses: {text!r:.200}')
        for kind, reply in replies:
            if kind != REP_INFO or reply[:2] != b'\0\0':
                continue
            if len(reply) != EXPORT_INFO.size:
                raise _Garbled('an export without a size')
            _, self.size_bytes, self._flags = EXPORT_INFO.unpack(reply)
        if not self._flags & HAS_FLAGS or self.size_bytes >= 1 << 63:
            raise _Garbled('an export without flags, or over 8 EiB')

    def _option(
        self, option: int, data: bytes, deadline: float
    ) -> list[tuple[int, bytes]]:
        """Ask for an option; return all replies, the last one ends it."""
        self._send(OPTION.pack(OPTION_MAGIC, option, len(data)), deadline)
        self._send(data, deadline)
        replies: list[tuple[int, bytes]] = []
        while len(replies) < OPTION_REPLIES_MAX:
            head = self._receive(OPTION_REPLY.size, deadline)
            magic, about, kind, length = OPTION_REPLY.unpack(head)
            if magic != OPTION_REPLY_MAGIC or about != option:
                raise _Garbled('a reply to another option')
            if length > OPTION_BYTES_MAX:
                raise _Garbled(f'an option reply of {length} bytes')
            replies.append((kind, self._receive(length, deadline)))
            if kind == REP_ACK or kind & REP_ERROR:
                return replies
        raise _Garbled(f'over {OPTION_REPLIES_MAX} replies to one option')

    # Requests.

    def _check(self, verb: str, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise errors.Invalid(
                f'cannot {verb} {length} bytes at {offset}: the export ends '
                f'at {self.size_bytes}'
            )
        if verb != 'read' and self.is_read_only:
            raise errors.Invalid(f'cannot {verb}: the export is read only')

    def _states(self) -> Iterator[tuple[int, bool]]:
        """Yield length and is-zero of runs that cover the export."""
        if self._context is None:
            yield self.size_bytes, False
            return
        offset = 0
        while offset < self.size_bytes:
            count = min(self.size_bytes - offset, STATUS_BYTES_MAX)
            answer = _Answer()
            self._request(BLOCK_STATUS, offset, count, answer=answer)
            if not answer.extents:
                raise _Garbled('a block status without extents')
            for length, state in answer.extents:
                length = min(length, self.size_bytes - offset)
                if length:
                    yield length, bool(state & STATE_ZERO)
                offset += length

    def _request(
        self,
        command: int,
        offset: int,
        length: int,
        payload: memoryview | None = None,
        answer: _Answer | None = None,
    ) -> None:
        answer = answer or _Answer()
        with self._lock, self._dropping():
            deadline = time.monotonic() + self._timeout_s
            self._settle(0, deadline)
            self._ask(command, offset, length, payload, deadline)
            while not self._take_reply(command, answer, deadline):
                pass
            if command == READ and not answer.error:
                _check_whole(answer)
        if answer.error:
            raise _refusal(
                answer.error, f'command {command} at {offset}'
            )

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Hang up if anything goes wrong: what comes next means nothing."""
        if self._failed_write is not None:
            raise self._failed_write
        if self._sock is None:
            raise errors.Unknown('the NBD connection was lost before')
        try:
            yield
        except BaseException:
            self._drop()
            raise

    def _ask(
        self,
        command: int,
        offset: int,
        length: int,
        payload: memoryview | None,
        deadline: float,
    ) -> None:
        self._cookie += 1
        head = REQUEST.pack(
            REQUEST_MAGIC, 0, command, self._cookie, offset, length
        )
        self._send(head, deadline)
        if payload is not None:
            self._send(payload, deadline)

    def _settle(self, left: int, deadline: float) -> None:
        """Take replies until no more writes than that are unanswered."""
        while len(self._unanswered) > left:
            error = self._take_write_reply(deadline)
            if error:
                self._failed_write = _refusal(error, 'an earlier write')
                raise self._failed_write

    def _take_write_reply(self, deadline: float) -> int:
        """Take a reply to a write that nobody waits for; return its error."""
        magic = int.from_bytes(self._receive(4, deadline), 'big')
        error, is_last = 0, True
        if magic == SIMPLE_MAGIC:
            error, cookie = SIMPLE.unpack(
                self._receive(SIMPLE.size, deadline)
            )
        elif magic == STRUCTURED_MAGIC and self._structured:
            flags, kind, cookie, length = STRUCTURED.unpack(
                self._receive(STRUCTURED.size, deadline)
            )
            is_last = bool(flags & CHUNK_DONE)
            answer = _Answer()
            self._take_chunk(WRITE, kind, length, answer, deadline)
            error = answer.error
        else:
            raise _Garbled(f'a reply that begins with {magic:#x}')
        if cookie not in self._unanswered:
            raise _Garbled('a reply to another request')
        if is_last:
            self._unanswered.discard(cookie)
        return error

    def _take_reply(
        self, command: int, answer: _Answer, deadline: float
    ) -> bool:
        """Take one reply or chunk; say whether it was the last."""
        magic = int.from_bytes(self._receive(4, deadline), 'big')
        if magic == SIMPLE_MAGIC:
            error, cookie = SIMPLE.unpack(
                self._receive(SIMPLE.size, deadline)
            )
            self._check_cookie(cookie)
            if command == BLOCK_STATUS or (
                command == READ and self._structured
            ):
                if not error:
                    raise _Garbled('a simple reply, where none may be')
            elif command == READ and not error:
                self._fill(answer, answer.offset, len(answer.buffer), deadline)
            answer.error = error
            return True
        if magic != STRUCTURED_MAGIC or not self._structured:
            raise _Garbled(f'a reply that begins with {magic:#x}')
        flags, kind, cookie, length = STRUCTURED.unpack(
            self._receive(STRUCTURED.size, deadline)
        )
        self._check_cookie(cookie)
        self._take_chunk(command, kind, length, answer, deadline)
        return bool(flags & CHUNK_DONE)

    def _check_cookie(self, cookie: int) -> None:
        if cookie != self._cookie:
            raise _Garbled('a reply to another request')

    def _take_chunk(
        self, command: int, kind: int, length: int, answer: _Answer,
        deadline: float,
    ) -> None:
        if kind == CHUNK_NONE and not length:
            return
        if kind == CHUNK_DATA and command == READ and length > 8:
            offset = int.from_bytes(self._receive(8, deadline), 'big')
            self._fill(answer, offset, length - 8, deadline)
        elif kind == CHUNK_HOLE and command == READ and length == HOLE.size:
            offset, count = HOLE.unpack(self._receive(length, deadline))
            part = _part(answer, offset, count)
            part[:] = bytes(len(part))
        elif kind == CHUNK_STATUS and command == BLOCK_STATUS:
            if length > EXTENTS_BYTES_MAX or length < 12 or length % 8 != 4:
                raise _Garbled(f'a block status of {length} bytes')
            data = self._receive(length, deadline)
            if answer.extents or data[:4] != struct.pack('>I', self._context):
                raise _Garbled('a block status that nobody asked for')
            answer.extents += struct.iter_unpack('>II', data[4:])
            if any(not count for count, _ in answer.extents):
                raise _Garbled('an empty extent')
        elif kind & CHUNK_ERROR and 6 <= length <= ERROR_BYTES_MAX:
            data = self._receive(length, deadline)
            # An error of zero would read as success.
            answer.error = int.from_bytes(data[:4], 'big') or 5
        else:
            raise _Garbled(f'a chunk of type {kind} and {length} bytes')

    def _fill(
        self, answer: _Answer, offset: int, length: int, deadline: float
    ) -> None:
        self._receive_into(_part(answer, offset, length), deadline)

    # The socket.

    def _send(self, data: bytes | memoryview, deadline: float) -> None:
        def send(sock: socket.socket) -> None:
            sock.sendall(data)

        self._io(send, deadline)

    def _receive(self, length: int, deadline: float) -> bytes:
        data = bytearray(length)
        self._receive_into(memoryview(data), deadline)
        return bytes(data)

    def _receive_into(self, view: memoryview, deadline: float) -> None:
        done = 0
        while done < len(view):
            left = view[done:]
            count = self._io(functools.partial(_recv_into, left), deadline)
            if not count:
                raise errors.Unknown('the NBD server hung up')
            done += count

    def _io(self, talk: Callable[[socket.socket], T], deadline: float) -> T:
        assert self._sock is not None
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise errors.Unknown(
                f'the NBD server did not answer within {self._timeout_s:g} s'
            )
        try:
            self._sock.settimeout(left_s)
            return talk(self._sock)
        except OSError as failed:
            raise errors.Unknown(f'NBD: {failed}') from failed

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _refusal(error: int, what: str) -> errors.VolumeError:
    kind = MEANING.get(error, errors.Unknown)
    # Its numbers are Linux's, whatever it runs on.
    return kind(
        f'the NBD server answers error {error} ({os.strerror(error)}) to '
        f'{what}'
    )


def _recv_into(view: memoryview, sock: socket.socket) -> int:
    return sock.recv_into(view)


def _part(answer: _Answer, offset: int, length: int) -> memoryview:
    """Return where a chunk belongs; remember that it came.

    :raises Corrupt: outside of what was asked for
    """
    start = offset - answer.offset
    if start < 0 or not length or start + length > len(answer.buffer):
        raise _Garbled(f'{length} bytes at {offset}, which nobody asked for')
    answer.runs.append((start, start + length))
    return answer.buffer[start:start + length]


def _check_whole(answer: _Answer) -> None:
    at = 0
    for start, end in sorted(answer.runs):
        if start != at:
            raise _Garbled('a read that misses bytes, or has some twice')
        at = end
    if at != len(answer.buffer):
        raise _Garbled('a read that misses bytes')
