# SPDX-License-Identifier: Apache-2.0
"""What the NBD client believes of a server, and what it does not."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import tempfile
import threading
import unittest
from collections.abc import Callable

from volume import errors
from volume import model
from volume import nbd

SIZE = 1 << 20
DATA = bytes(range(256)) * (SIZE // 256)
TIMEOUT_S = 5.0
ALL_FLAGS = (
    nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_WRITE_ZEROES
)


def chunk(
    cookie: int, kind: int, data: bytes = b'', done: bool = True
) -> bytes:
    head = struct.pack(
        '>IHHQI', nbd.STRUCTURED_MAGIC, int(done), kind, cookie, len(data)
    )
    return head + data


def data_chunk(
    cookie: int, start: int, end: int, done: bool = True
) -> bytes:
    body = struct.pack('>Q', start) + DATA[start:end]
    return chunk(cookie, nbd.CHUNK_DATA, body, done)


def simple(cookie: int, error: int = 0, data: bytes = b'') -> bytes:
    return struct.pack('>IIQ', nbd.SIMPLE_MAGIC, error, cookie) + data


def status(cookie: int, *extents: tuple[int, int], context: int = 7) -> bytes:
    body = struct.pack('>I', context)
    body += b''.join(struct.pack('>II', *extent) for extent in extents)
    return chunk(cookie, nbd.CHUNK_STATUS, body)


class Request:
    def __init__(self, head: bytes, payload: bytes) -> None:
        _, _, self.command, self.cookie, self.offset, self.length = (
            nbd.REQUEST.unpack(head)
        )
        self.payload = payload


Reply = Callable[[Request], bytes | None]


def honest(request: Request) -> bytes:
    """Answer as a good server would."""
    if request.command == nbd.READ:
        return data_chunk(
            request.cookie, request.offset, request.offset + request.length
        )
    if request.command == nbd.BLOCK_STATUS:
        return status(request.cookie, (request.length, 0))
    return simple(request.cookie)


class Server:
    """A server of one export, as good or bad as a test wants it."""

    def __init__(
        self,
        test: unittest.TestCase,
        reply: Reply = honest,
        *,
        flags: int = ALL_FLAGS,
        size: int = SIZE,
        structured: bool = True,
        greeting: bytes | None = None,
        options: Callable[[int], bytes] | None = None,
    ) -> None:
        directory = tempfile.TemporaryDirectory(prefix='vt', dir='/tmp')
        test.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, 's')
        self.reply, self.flags, self.size = reply, flags, size
        self.structured, self.options = structured, options
        self.greeting = greeting if greeting is not None else (
            nbd.GREETING.pack(nbd.NBD_MAGIC, nbd.OPTION_MAGIC, 3)
        )
        self.requests: list[Request] = []
        self.uri = f'nbd+unix:///x?socket={self.path}'
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        thread = threading.Thread(target=self._serve, daemon=True)
        thread.start()
        test.addCleanup(thread.join, 10)
        test.addCleanup(self._listener.close)
        test.addCleanup(self._wake)

    def _wake(self) -> None:
        """End the thread, if no client has."""
        with contextlib.suppress(OSError):
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(self.path)

    def _serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            sock, _ = self._listener.accept()
            with sock, sock.makefile('rb') as stream:
                sock.sendall(self.greeting)
                self._negotiate(sock, lambda n: _exactly(stream.read(n), n))

    def _negotiate(
        self, sock: socket.socket, take: Callable[[int], bytes]
    ) -> None:
        take(4)
        while True:
            _, option, length = nbd.OPTION.unpack(take(nbd.OPTION.size))
            take(length)
            sock.sendall(
                self.options(option) if self.options else self._answer(option)
            )
            if option == nbd.OPT_GO:
                break
        while True:
            head = take(nbd.REQUEST.size)
            request = Request(head, b'')
            if request.command == nbd.WRITE:
                request.payload = take(request.length)
            if request.command == nbd.DISCONNECT:
                return
            self.requests.append(request)
            answer = self.reply(request)
            if answer is None:
                continue  # it keeps silent
            sock.sendall(answer)
            if not answer:
                return

    def _answer(self, option: int) -> bytes:
        if option == nbd.OPT_STRUCTURED_REPLY and not self.structured:
            return option_reply(option, nbd.REP_ERROR + 1)
        if option == nbd.OPT_SET_META_CONTEXT:
            context = struct.pack('>I', 7) + nbd.BASE_ALLOCATION
            return option_reply(
                option, nbd.REP_META_CONTEXT, context
            ) + option_reply(option, nbd.REP_ACK)
        if option == nbd.OPT_GO:
            info = nbd.EXPORT_INFO.pack(0, self.size, self.flags)
            return option_reply(
                option, nbd.REP_INFO, info
            ) + option_reply(option, nbd.REP_ACK)
        return option_reply(option, nbd.REP_ACK)


def option_reply(option: int, kind: int, data: bytes = b'') -> bytes:
    head = nbd.OPTION_REPLY.pack(
        nbd.OPTION_REPLY_MAGIC, option, kind, len(data)
    )
    return head + data


def _exactly(data: bytes, count: int) -> bytes:
    if len(data) != count:
        raise EOFError
    return data


class NbdClientTest(unittest.TestCase):
    def client(self, server: Server, timeout_s: float = TIMEOUT_S) -> (
        nbd.NbdClient
    ):
        # The limit is one of a request, and not of the greetings as well.
        client = nbd.NbdClient(server.uri, TIMEOUT_S)
        client._timeout_s = timeout_s
        self.addCleanup(client.close)
        return client

    def read(self, reply: Reply, offset: int = 0, length: int = 8192) -> (
        bytes
    ):
        buffer = bytearray(length)
        self.client(Server(self, reply)).pread_into(buffer, offset)
        return bytes(buffer)

    # What works.

    def test_read_is_what_the_server_has(self) -> None:
        self.assertEqual(DATA[100:8292], self.read(honest, 100))

    def test_read_in_chunks_of_any_order_is_whole(self) -> None:
        def reply(r: Request) -> bytes:
            hole = struct.pack('>QI', r.offset, 100)
            return (
                data_chunk(r.cookie, r.offset + 4000, r.offset + 8192, False)
                + chunk(r.cookie, nbd.CHUNK_HOLE, hole, False)
                + data_chunk(r.cookie, r.offset + 100, r.offset + 4000, False)
                + chunk(r.cookie, nbd.CHUNK_NONE)
            )

        self.assertEqual(bytes(100) + DATA[100:8192], self.read(reply))

    def test_hole_overwrites_what_the_buffer_held(self) -> None:
        def reply(r: Request) -> bytes:
            return chunk(
                r.cookie, nbd.CHUNK_HOLE, struct.pack('>QI', 0, r.length)
            )

        buffer = bytearray(b'x' * 512)
        self.client(Server(self, reply)).pread_into(buffer, 0)
        self.assertEqual(bytes(512), buffer)

    def test_server_without_structured_replies_is_read(self) -> None:
        def reply(r: Request) -> bytes:
            part = DATA[r.offset:r.offset + r.length]
            return simple(r.cookie, 0, part)

        client = self.client(Server(self, reply, structured=False))
        buffer = bytearray(5000)
        client.pread_into(buffer, 7)
        self.assertEqual(DATA[7:5007], buffer)
        self.assertEqual(
            [model.Extent(0, SIZE, False)], list(client.extents())
        )

    def test_large_write_arrives_whole_in_bounded_requests(self) -> None:
        size = nbd.TRANSFER_BYTES_MAX * 2 + 5
        server = Server(self, size=size)
        data = os.urandom(size)
        self.client(server).pwrite(data, 0)
        self.assertEqual(
            data, b''.join(r.payload for r in server.requests)
        )
        at = 0
        for request in server.requests:
            self.assertEqual(at, request.offset)
            self.assertLessEqual(request.length, nbd.TRANSFER_BYTES_MAX)
            at += request.length

    def test_zero_without_the_servers_help_writes_zeros(self) -> None:
        server = Server(self, flags=nbd.HAS_FLAGS | nbd.SEND_FLUSH)
        self.client(server).zero(10, 5000)
        (request,) = server.requests
        self.assertEqual(
            (nbd.WRITE, 10, bytes(5000)),
            (request.command, request.offset, request.payload),
        )

    def test_extents_cover_the_export_and_neighbours_are_one(self) -> None:
        def reply(r: Request) -> bytes:
            if r.offset:
                return status(r.cookie, (SIZE * 4, nbd.STATE_ZERO | 1))
            return status(r.cookie, (4096, 0), (4096, 1), (8192, 3))

        client = self.client(Server(self, reply))
        self.assertEqual(
            [
                model.Extent(0, 8192, False),
                model.Extent(8192, SIZE - 8192, True),
            ],
            list(client.extents()),
        )

    def test_a_hole_is_not_zero_unless_the_server_says_so(self) -> None:
        client = self.client(
            Server(self, lambda r: status(r.cookie, (SIZE, 1)))
        )
        self.assertEqual(
            [model.Extent(0, SIZE, False)], list(client.extents())
        )

    # What the server may say no to.

    def test_unknown_export_is_not_found(self) -> None:
        def options(option: int) -> bytes:
            kind = nbd.REP_UNKNOWN if option == nbd.OPT_GO else nbd.REP_ACK
            return option_reply(option, kind)

        with self.assertRaises(errors.NotFound):
            self.client(Server(self, options=options))

    def test_nobody_listens_is_unavailable(self) -> None:
        with self.assertRaises(errors.Unavailable):
            nbd.NbdClient('nbd+unix:///x?socket=/nonexistent/s')

    def test_full_storage_is_no_space_and_the_connection_goes_on(
        self
    ) -> None:
        def reply(r: Request) -> bytes:
            error = 28 if r.command == nbd.WRITE else 0
            return simple(r.cookie, error) if error else honest(r)

        client = self.client(Server(self, reply))
        with self.assertRaises(errors.NoSpace):
            client.pwrite(b'x', 0)
        buffer = bytearray(10)
        client.pread_into(buffer, 0)
        self.assertEqual(DATA[:10], buffer)

    def test_error_in_the_middle_of_a_read_is_an_error(self) -> None:
        def reply(r: Request) -> bytes:
            return data_chunk(r.cookie, 0, 100, False) + chunk(
                r.cookie, nbd.CHUNK_ERROR + 1, struct.pack('>IH', 5, 0)
            )

        with self.assertRaises(errors.Unknown):
            self.read(reply)

    def test_error_of_number_zero_is_still_an_error(self) -> None:
        def reply(r: Request) -> bytes:
            return chunk(
                r.cookie, nbd.CHUNK_ERROR + 1, struct.pack('>IH', 0, 0)
            )

        with self.assertRaises(errors.Unknown):
            self.read(reply)

    def test_flush_without_a_flush_is_unsupported(self) -> None:
        client = self.client(Server(self, flags=nbd.HAS_FLAGS))
        with self.assertRaises(errors.Unsupported):
            client.flush()

    def test_read_only_export_is_not_written_to(self) -> None:
        server = Server(self, flags=ALL_FLAGS | nbd.READ_ONLY)
        client = self.client(server)
        with self.assertRaises(errors.Invalid):
            client.pwrite(b'x', 0)
        with self.assertRaises(errors.Invalid):
            client.zero(0, 10)
        self.assertEqual([], server.requests)

    def test_nothing_beyond_the_end_is_asked_for(self) -> None:
        server = Server(self)
        client = self.client(server)
        for call in (
            lambda: client.pread_into(bytearray(2), SIZE - 1),
            lambda: client.pwrite(b'xx', SIZE - 1),
            lambda: client.zero(SIZE, 1),
            lambda: client.pread_into(bytearray(2), -1),
        ):
            with self.assertRaises(errors.Invalid):
                call()
        self.assertEqual([], server.requests)

    # What is not believed.

    def test_wrong_replies_to_a_read_are_corrupt(self) -> None:
        def hole(r: Request, start: int, count: int) -> bytes:
            body = struct.pack('>QI', start, count)
            return chunk(r.cookie, nbd.CHUNK_HOLE, body)

        replies: dict[str, Reply] = {
            'misses the end': lambda r: data_chunk(r.cookie, 0, 8000),
            'misses the beginning': lambda r: data_chunk(r.cookie, 9, 8192),
            'nothing came': lambda r: chunk(r.cookie, nbd.CHUNK_NONE),
            'some bytes twice': lambda r: (
                data_chunk(r.cookie, 0, 5000, False)
                + data_chunk(r.cookie, 4000, 8192)
            ),
            'too much': lambda r: data_chunk(r.cookie, 0, 8193),
            'of another place': lambda r: data_chunk(r.cookie, 1, 8193),
            'a hole too long': lambda r: hole(r, 0, 1 << 31),
            'an empty hole': lambda r: hole(r, 0, 0),
            'of another request': lambda r: data_chunk(
                r.cookie + 1, 0, 8192
            ),
            'simple': lambda r: simple(r.cookie, 0, DATA[:8192]),
            'a block status': lambda r: status(r.cookie, (8192, 0)),
            'an unknown chunk': lambda r: chunk(r.cookie, 99),
            'a huge error': lambda r: struct.pack(
                '>IHHQI', nbd.STRUCTURED_MAGIC, 1, nbd.CHUNK_ERROR + 1,
                r.cookie, 0xFFFFFFFF,
            ),
            'no reply at all': lambda r: b'HTTP/1.1 400 Bad Request\r\n',
        }
        for name, reply in replies.items():
            with self.subTest(name), self.assertRaises(errors.Corrupt):
                self.read(reply)

    def test_wrong_block_states_are_corrupt(self) -> None:
        replies: dict[str, Reply] = {
            'no extents': lambda r: status(r.cookie),
            'an empty extent': lambda r: status(r.cookie, (0, 0)),
            'another context': lambda r: status(
                r.cookie, (SIZE, 3), context=8
            ),
            'no chunk': lambda r: chunk(r.cookie, nbd.CHUNK_NONE),
            'half an extent': lambda r: chunk(
                r.cookie, nbd.CHUNK_STATUS, bytes(13)
            ),
            'simple': lambda r: simple(r.cookie),
        }
        for name, reply in replies.items():
            with self.subTest(name), self.assertRaises(errors.Corrupt):
                list(self.client(Server(self, reply)).extents())

    def test_wrong_negotiations_are_corrupt(self) -> None:
        huge = nbd.OPTION_REPLY.pack(
            nbd.OPTION_REPLY_MAGIC, nbd.OPT_STRUCTURED_REPLY, 1, 0xFFFFFFFF
        )
        endless = option_reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_INFO)
        bad: dict[str, Callable[[int], bytes]] = {
            'another option': lambda option: option_reply(99, nbd.REP_ACK),
            'huge': lambda option: huge,
            'endless': lambda option: endless * 1000,
            'no size': lambda option: option_reply(option, nbd.REP_ACK),
        }
        for name, options in bad.items():
            with self.subTest(name), self.assertRaises(errors.Corrupt):
                self.client(Server(self, options=options))
        with self.subTest('size'), self.assertRaises(errors.Corrupt):
            self.client(Server(self, size=1 << 63))
        with self.subTest('greeting'), self.assertRaises(errors.Corrupt):
            self.client(Server(self, greeting=b'220 smtp.example ESMTP\r\n'))

    def test_hang_up_in_the_middle_is_unknown_and_stays_so(self) -> None:
        client = self.client(Server(self, lambda r: b''))
        for _ in range(2):
            with self.assertRaises(errors.Unknown):
                client.pwrite(b'x', 0)

    def test_silence_is_unknown_when_the_time_is_over(self) -> None:
        def reply(r: Request) -> bytes:
            return struct.pack('>I', nbd.SIMPLE_MAGIC)

        client = self.client(Server(self, reply), timeout_s=0.2)
        with self.assertRaises(errors.Unknown):
            client.flush()

    def test_after_a_doubt_the_connection_is_not_used_again(self) -> None:
        server = Server(self, lambda r: data_chunk(r.cookie + 1, 0, 10))
        client = self.client(server)
        with self.assertRaises(errors.Corrupt):
            client.pread_into(bytearray(10), 0)
        with self.assertRaises(errors.Unknown):
            client.pread_into(bytearray(10), 0)
        self.assertEqual(1, len(server.requests))

    def test_noise_is_an_error_of_ours_whatever_it_is(self) -> None:
        for seed in range(100):
            noise = random.Random(seed).randbytes(300)

            def reply(r: Request, noise: bytes = noise) -> bytes:
                good = honest(r)
                at = noise[0] % 20
                return good[:at] + noise[1:1 + noise[0]] + good[at:]

            with self.subTest(seed=seed):
                client = self.client(Server(self, reply), timeout_s=0.5)
                buffer = bytearray(100)
                try:
                    client.pread_into(buffer, 0)
                except errors.VolumeError:
                    continue
                # Noise after a whole reply is not seen, and does no harm.
                self.assertEqual(DATA[:100], buffer)


class TlsTest(unittest.TestCase):
    def test_server_without_tls_is_told_nothing(self) -> None:
        asked: list[int] = []

        def options(option: int) -> bytes:
            asked.append(option)
            return option_reply(option, nbd.REP_ERROR + 1)

        def secure(sock: socket.socket) -> socket.socket:
            raise AssertionError('TLS, where there is none')

        with self.assertRaises(errors.Unavailable):
            nbd.NbdClient(
                Server(self, options=options).uri, TIMEOUT_S, secure)
        self.assertEqual([nbd.OPT_STARTTLS], asked)

    def test_bytes_before_tls_are_not_believed(self) -> None:
        def options(option: int) -> bytes:
            return option_reply(option, nbd.REP_INFO, b'x') + option_reply(
                option, nbd.REP_ACK)

        with self.assertRaises(errors.Unavailable):
            nbd.NbdClient(
                Server(self, options=options).uri, TIMEOUT_S,
                lambda sock: sock,
            )


class UriTest(unittest.TestCase):
    def test_uris_name_address_and_export(self) -> None:
        self.assertEqual(
            ('/a b/s', b'n-1'), nbd.parse('nbd+unix:///n-1?socket=/a%20b/s')
        )
        self.assertEqual(
            (('127.0.0.1', 10810), b'n'), nbd.parse('nbd://127.0.0.1:10810/n')
        )
        self.assertEqual((('::1', 10809), b''), nbd.parse('nbd://[::1]'))

    def test_what_is_no_uri_of_ours_is_refused(self) -> None:
        for uri in (
            '', 'http://x/', 'nbd+unix:///n', 'nbd+unix://h/n?socket=/s',
            'nbd+unix:///n?socket=/s&tls=1', 'nbds://x/n', 'nbd:///n',
            'nbd://x:99999/n', 'nbd://x/' + 'n' * 5000,
        ):
            with self.subTest(uri[:40]), self.assertRaises(errors.Invalid):
                nbd.parse(uri)


if __name__ == '__main__':
    unittest.main()
