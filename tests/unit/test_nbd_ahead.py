# SPDX-License-Identifier: Apache-2.0
"""Writes that nobody waits for: the last flush knows of every one."""

from __future__ import annotations

import unittest

from tests.unit.test_nbd_client import chunk
from tests.unit.test_nbd_client import DATA
from tests.unit.test_nbd_client import honest
from tests.unit.test_nbd_client import Request
from tests.unit.test_nbd_client import Server
from tests.unit.test_nbd_client import simple
from tests.unit.test_nbd_client import TIMEOUT_S
from volume import errors
from volume import nbd

STEP = 4096
WRITES = nbd.WRITES_AHEAD * 2


class WritesAheadTest(unittest.TestCase):

    def client(self, server: Server) -> nbd.NbdClient:
        client = nbd.NbdClient(server.uri, TIMEOUT_S)
        self.addCleanup(client.close)
        return client

    def write_all(self, client: nbd.NbdClient) -> None:
        for at in range(0, WRITES * STEP, STEP):
            client.pwrite_ahead(DATA[at:at + STEP], at)

    def test_every_write_arrives_in_order_before_the_flush(self) -> None:
        server = Server(self)
        client = self.client(server)
        buffer = bytearray(STEP)
        for at in range(0, WRITES * STEP, STEP):
            buffer[:] = bytes([at // STEP]) * STEP
            client.pwrite_ahead(buffer, at)  # it is used again at once
        client.flush()
        *writes, flush = server.requests
        self.assertEqual(nbd.FLUSH, flush.command)
        self.assertEqual(
            [(at * STEP, bytes([at]) * STEP) for at in range(WRITES)],
            [(each.offset, each.payload) for each in writes],
        )

    def test_replies_may_come_late_and_in_any_order(self) -> None:
        held: list[bytes] = []

        def reply(request: Request) -> bytes | None:
            if request.command != nbd.WRITE:
                return honest(request)
            held.insert(0, simple(request.cookie))
            if len(held) < nbd.WRITES_AHEAD:
                return None
            late, held[:] = b''.join(held), []
            return late

        client = self.client(Server(self, reply))
        self.write_all(client)
        client.flush()

    def test_a_write_that_failed_is_told_at_the_flush_at_the_latest(
        self,
    ) -> None:
        for structured in False, True:
            for number in range(1, WRITES + 1):
                with self.subTest(structured=structured, number=number):
                    self.check_failed_write(structured, number)

    def check_failed_write(self, structured: bool, number: int) -> None:
        full = b'\0\0\0\x1c\0\0'  # error 28, no words
        count = 0

        def reply(request: Request) -> bytes:
            nonlocal count
            if request.command != nbd.WRITE:
                return honest(request)
            count += 1
            if count != number:
                return simple(request.cookie)
            if structured:
                return chunk(request.cookie, nbd.CHUNK_ERROR + 1, full)
            return simple(request.cookie, 28)

        client = self.client(Server(self, reply, structured=structured))
        with self.assertRaises(errors.NoSpace):
            self.write_all(client)
            client.flush()
        # Nothing on this connection can be believed to be durable now.
        for again in client.flush, lambda: client.pwrite(b'x' * 512, 0):
            with self.assertRaises(errors.NoSpace):
                again()

    def test_a_read_sees_what_was_written_ahead(self) -> None:
        server = Server(self)
        client = self.client(server)
        self.write_all(client)
        client.pread_into(bytearray(STEP), 0)
        self.assertEqual(
            [nbd.WRITE] * WRITES + [nbd.READ],
            [request.command for request in server.requests],
        )

    def test_a_reply_that_nobody_waits_for_is_corrupt(self) -> None:
        def reply(request: Request) -> bytes:
            return simple(request.cookie + 100)

        client = self.client(Server(self, reply))
        client.pwrite_ahead(DATA[:STEP], 0)
        with self.assertRaises(errors.Corrupt):
            client.flush()
        with self.assertRaises(errors.Unknown):
            client.flush()

    def test_silence_is_unknown_at_the_flush(self) -> None:
        def reply(request: Request) -> bytes | None:
            return None if request.command == nbd.WRITE else honest(request)

        client = self.client(Server(self, reply))
        client.pwrite_ahead(DATA[:STEP], 0)
        client._timeout_s = 0.2
        with self.assertRaisesRegex(errors.Unknown, 'within|timed out'):
            client.flush()


if __name__ == '__main__':
    unittest.main()
