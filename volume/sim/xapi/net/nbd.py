# SPDX-License-Identifier: Apache-2.0
"""An NBD server for disks: fixed newstyle, simple replies, TLS if wanted.

Which disk an export name means is the caller's to say. With TLS nothing is
said to a client that does not ask for it. What the clients of one disk do
is done on one ``Disk`` or on several that know of each other, so that any
number of connections sees the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import struct
import threading
from collections.abc import Callable

from volume import errors
from volume.model import MIB
from volume.nbd import DISCONNECT
from volume.nbd import EXPORT_INFO
from volume.nbd import FIXED_NEWSTYLE
from volume.nbd import FLUSH
from volume.nbd import GREETING
from volume.nbd import HAS_FLAGS
from volume.nbd import INFO_EXPORT
from volume.nbd import NBD_MAGIC
from volume.nbd import NO_ZEROES
from volume.nbd import OPT_GO
from volume.nbd import OPTION
from volume.nbd import OPTION_MAGIC
from volume.nbd import OPTION_REPLY
from volume.nbd import OPTION_REPLY_MAGIC
from volume.nbd import READ
from volume.nbd import READ_ONLY
from volume.nbd import REP_ACK
from volume.nbd import REP_ERROR
from volume.nbd import REP_INFO
from volume.nbd import REP_UNKNOWN
from volume.nbd import REQUEST
from volume.nbd import REQUEST_MAGIC
from volume.nbd import SEND_FLUSH
from volume.nbd import SEND_WRITE_ZEROES
from volume.nbd import SIMPLE
from volume.nbd import SIMPLE_MAGIC
from volume.nbd import WRITE
from volume.nbd import WRITE_ZEROES
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.failure import Failure

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO = 1, 2, 3, 5, 6
REP_UNSUPPORTED, REP_POLICY, REP_INVALID, REP_TLS_NEEDED = (
    REP_ERROR + 1, REP_ERROR + 2, REP_ERROR + 3, REP_ERROR + 5)
INFO_BLOCK_SIZE = 3
SEND_FUA, SEND_TRIM, MULTI_CONNECTION = 8, 32, 256
TRIM = 4
FUA = 1
OPTION_BYTES_MAX = 8192
OPTIONS_MAX = 32
TRANSFER_BYTES_MAX = 32 * MIB
GRAIN_BYTES = 4096
CONNECTIONS_MAX = 16
IDLE_TIMEOUT_S = 3600.0
GREETING_TIMEOUT_S = 30.0

REFUSALS = (errors.VolumeError, Failure, UnicodeDecodeError)
Resolve = Callable[[str], Disk]


class _Gone(Exception):
    """The client has left, or does not speak NBD."""


class NbdServer:
    """Disks on an address; ``address`` has the port that was taken.

    ``resolve`` returns an open disk for an export name, which is closed in
    the end, or raises a VolumeError or a Failure: then there is none.
    """

    def __init__(
        self,
        resolve: Resolve,
        address: tuple[str, int] = ('127.0.0.1', 0),
        *,
        tls: ssl.SSLContext | None = None,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self._resolve = resolve
        self._tls = tls
        self._connections_max = connections_max
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._is_ending = False
        self._listener = socket.create_server(
            address, family=_family(address[0]))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(
            target=self._accept, name='nbd', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up on everybody; return when no thread is left."""
        self._is_ending = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        # Closed under its thread it would not wake every kind of thread.
        self._thread.join()
        self._listener.close()
        with self._lock:
            clients = dict(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in clients.values():
            thread.join()

    def connections(self) -> int:
        """Return how many clients are connected."""
        with self._lock:
            return len(self._clients)

    def _accept(self) -> None:
        while not self._is_ending:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if (
                    len(self._clients) >= self._connections_max
                    or self._is_ending
                ):
                    client.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(client,), name='nbd-client',
                    daemon=True,
                )
                self._clients[client] = thread
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(_Gone, OSError):
                _Session(client, self._resolve, self._tls).run()
        finally:
            client.close()
            with self._lock:
                del self._clients[client]


class _Session:
    """One connection."""

    def __init__(
        self,
        client: socket.socket,
        resolve: Resolve,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._client = client
        self._resolve = resolve
        self._tls = tls
        self._is_secure = False
        self._buffer = memoryview(bytearray(MIB))

    def run(self) -> None:
        self._client.settimeout(GREETING_TIMEOUT_S)
        self._client.sendall(GREETING.pack(
            NBD_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES))
        flags = int.from_bytes(self._receive(4), 'big')
        if not flags & FIXED_NEWSTYLE:
            raise _Gone
        try:
            disk = self._negotiate(bool(flags & NO_ZEROES))
            if disk is not None:
                with disk:
                    self._client.settimeout(IDLE_TIMEOUT_S)
                    while self._answer(disk):
                        pass
        finally:
            if self._is_secure:
                # The plain socket is the server's to close.
                self._client.close()

    # What a client may ask before it has a disk.

    def _negotiate(self, no_zeroes: bool) -> Disk | None:
        """Return the disk that the client wants, if it comes to that."""
        for _ in range(OPTIONS_MAX):
            magic, option, length = OPTION.unpack(self._receive(OPTION.size))
            if magic != OPTION_MAGIC or length > OPTION_BYTES_MAX:
                raise _Gone
            data = self._receive(length)
            if option == OPT_ABORT:
                self._reply(option, REP_ACK)
                return None
            if option == OPT_STARTTLS:
                self._start_tls(option, data)
            elif self._tls is not None and not self._is_secure:
                if option == OPT_EXPORT_NAME:
                    raise _Gone
                self._reply(option, REP_TLS_NEEDED)
            elif option == OPT_EXPORT_NAME:
                return self._export_name(data, no_zeroes)
            elif option in (OPT_GO, OPT_INFO):
                disk = self._go(option, data)
                if disk is not None:
                    return disk
            elif option == OPT_LIST:
                self._reply(option, REP_POLICY)
            else:
                self._reply(option, REP_UNSUPPORTED)
        raise _Gone

    def _start_tls(self, option: int, data: bytes) -> None:
        if self._tls is None or self._is_secure:
            self._reply(option, REP_POLICY)
        elif data:
            self._reply(option, REP_INVALID)
        else:
            self._reply(option, REP_ACK)
            plain = self._client
            # A copy of the descriptor: the server shuts its own down.
            self._client = self._tls.wrap_socket(
                plain.dup(), server_side=True)
            self._client.settimeout(GREETING_TIMEOUT_S)
            self._is_secure = True

    def _export_name(self, data: bytes, no_zeroes: bool) -> Disk:
        try:
            disk = self._resolve(data.decode())
        except REFUSALS:
            # There is no way to say so.
            raise _Gone from None
        self._client.sendall(
            struct.pack('>QH', disk.size_bytes, _flags(disk))
            + (b'' if no_zeroes else bytes(124))
        )
        return disk

    def _go(self, option: int, data: bytes) -> Disk | None:
        length = int.from_bytes(data[:4], 'big')
        if len(data) < 6 or length > len(data) - 6:
            self._reply(option, REP_INVALID)
            return None
        try:
            disk = self._resolve(data[4:4 + length].decode())
        except REFUSALS:
            self._reply(option, REP_UNKNOWN)
            return None
        try:
            self._reply(option, REP_INFO, EXPORT_INFO.pack(
                INFO_EXPORT, disk.size_bytes, _flags(disk)))
            self._reply(option, REP_INFO, struct.pack(
                '>HIII', INFO_BLOCK_SIZE, 1, GRAIN_BYTES,
                TRANSFER_BYTES_MAX))
            self._reply(option, REP_ACK)
        except BaseException:
            disk.close()
            raise
        if option == OPT_INFO:
            disk.close()
            return None
        return disk

    def _reply(self, option: int, kind: int, data: bytes = b'') -> None:
        self._client.sendall(OPTION_REPLY.pack(
            OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    # What it may ask then.

    def _answer(self, disk: Disk) -> bool:
        """Take one request; say whether there may be more."""
        magic, flags, command, cookie, offset, length = REQUEST.unpack(
            self._receive(REQUEST.size))
        if magic != REQUEST_MAGIC:
            raise _Gone
        if command == DISCONNECT:
            return False
        data = memoryview(b'')
        if command in (READ, WRITE):
            if length > TRANSFER_BYTES_MAX:
                raise _Gone
            data = self._room(length)
            if command == WRITE:
                self._receive_into(data)
        error = _do(disk, flags, command, offset, length, data)
        head = SIMPLE_MAGIC.to_bytes(4, 'big') + SIMPLE.pack(error, cookie)
        if command == READ and not error:
            self._send(head, data)
        else:
            self._client.sendall(head)
        return True

    def _room(self, length: int) -> memoryview:
        if length > len(self._buffer):
            self._buffer = memoryview(bytearray(length))
        return self._buffer[:length]

    # The socket.

    def _send(self, head: bytes, data: memoryview) -> None:
        if self._is_secure:
            self._client.sendall(head)
        else:
            # Not to be sent as a packet of its own.
            done = self._client.sendmsg([head, data])
            if done < len(head):
                self._client.sendall(head[done:])
            data = data[max(0, done - len(head)):]
        self._client.sendall(data)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        self._receive_into(memoryview(data))
        return bytes(data)

    def _receive_into(self, view: memoryview) -> None:
        while view:
            count = self._client.recv_into(view)
            if not count:
                raise _Gone
            view = view[count:]


def _do(
    disk: Disk,
    flags: int,
    command: int,
    offset: int,
    length: int,
    data: memoryview,
) -> int:
    """Do what a client asks; return the error's number, or 0."""
    try:
        if command == READ:
            disk.pread_into(data, offset)
        elif command == FLUSH:
            disk.flush()
        elif not disk.is_writable:
            return errno.EPERM
        elif command == WRITE:
            disk.pwrite(offset, data)
        elif command in (TRIM, WRITE_ZEROES):
            disk.zero(offset, length)
        else:
            return errno.EINVAL
        if flags & FUA and disk.is_writable:
            disk.flush()
        return 0
    except errors.Invalid:
        is_late = command in (WRITE, WRITE_ZEROES)
        return errno.ENOSPC if is_late else errno.EINVAL
    except errors.NoSpace:
        return errno.ENOSPC
    except OSError as failed:
        return errno.ENOSPC if failed.errno == errno.ENOSPC else errno.EIO
    except (errors.VolumeError, Failure):
        return errno.EIO


def _flags(disk: Disk) -> int:
    flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | MULTI_CONNECTION
    if disk.is_writable:
        return flags | SEND_TRIM | SEND_WRITE_ZEROES
    return flags | READ_ONLY


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ':' in host else socket.AF_INET
