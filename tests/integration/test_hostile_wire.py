# SPDX-License-Identifier: Apache-2.0
"""Bytes that are hardly HTTP, over real sockets to the real server.

The server answers with a fault or hangs up, stores nothing, logs no
traceback, and answers the next client as if nothing had been.
"""

import contextlib
import json
import logging
import random
import re
import socket
import threading
import unittest

import requests

from tests.integration import hostile_case
from tests.integration import serving
from volume.api import server

TIMEOUT_S = 20
HEAD = b'Host: localhost\r\nContent-Type: application/json\r\n'
POST = b'POST /v3/volumes HTTP/1.1\r\n' + HEAD
GOOD = b'{"volume": {"size_bytes": 512}}'
THREADS = 4


class Wire(unittest.TestCase):
    """One server for all tests; each leaves it as it was."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()

        class Adds:
            addCleanup = staticmethod(cls.addClassCleanup)

        cls.world = serving.World(Adds)
        cls.server = server.Server(
            cls.world.app, port=0, drain_s=10, threads=THREADS, timeout_s=2,
            request_s=0.5,
        )
        cls.server.start()
        cls.addClassCleanup(cls.server.stop)
        host, port = cls.server.url.removeprefix('http://').split(':')
        cls.address = host, int(port)

    def setUp(self):
        self.before = hostile_case.kept(self.world.core)
        logged = self.assertNoLogs('volume', logging.ERROR)
        logged.__enter__()
        self.addCleanup(logged.__exit__, None, None, None)
        # First of the clean-ups to run: then nothing more is sent.
        self.addCleanup(self.is_as_it_was)

    def is_as_it_was(self):
        self.assertEqual(self.before, hostile_case.kept(self.world.core))
        self.is_served()

    def is_served(self):
        """Ask as an honest client does."""
        asked = requests.get(
            f'{self.server.url}/v3/volumes', timeout=TIMEOUT_S
        )
        self.assertEqual(200, asked.status_code)

    def connect(self):
        sock = socket.create_connection(self.address, TIMEOUT_S)
        self.addCleanup(sock.close)
        return sock

    def raw(self, data, ends=True):
        """Send bytes; return all that comes back."""
        with socket.create_connection(self.address, TIMEOUT_S) as sock:
            pieces = []
            with contextlib.suppress(OSError):
                # It may have hung up before all is sent.
                sock.sendall(data)
                if ends:
                    sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while piece := sock.recv(1 << 16):
                    pieces.append(piece)
            return b''.join(pieces)

    def statuses(self, answer):
        return [
            int(found) for found in re.findall(rb'HTTP/1\.\d (\d{3}) ', answer)
        ]

    def refused(self, data, *allowed, ends=True):
        found = self.statuses(self.raw(data, ends))
        self.assertLessEqual(len(found), 1, data[:200])
        for status in found:
            self.assertIn(status, allowed or range(400, 500), data[:200])

    def test_depth_and_length_without_end_are_refused(self):
        for body in (
            b'[' * 50000 + b']' * 50000,
            b'{"a":' * 15000 + b'1' + b'}' * 15000,
            b'[' * 100000, b'9' * 100000, b'"' + b'\\u0041' * 15000,
        ):
            self.refused(
                POST + b'Content-Length: %d\r\n\r\n' % len(body) + body, 400)
        self.refused(
            POST + b'Content-Length: 300000\r\n\r\n' + b' ' * 300000, 413)
        self.refused(POST + b'Content-Length: 9%s\r\n\r\n' % (b'9' * 5000))

    def test_heads_without_end_are_refused(self):
        for head in (
            b'GET /' + b'a' * 100_000 + b' HTTP/1.1\r\nHost: x\r\n\r\n',
            b'GET /v3 HTTP/1.1\r\nHost: x\r\nA: ' + b'a' * 100_000,
            b'GET /v3 HTTP/1.1\r\n' + b'A: b\r\n' * 50_000 + b'\r\n',
            b'GET /v3 HTTP/1.1\r\nA:\r\n' + b' more\r\n' * 50_000,
        ):
            self.refused(head)

    def test_what_is_no_http_is_refused(self):
        for data in (
            b'\x00' * 1000, b'\xff' * 1000, b'\r\n' * 1000, b'GET\r\n\r\n',
            b'GET /\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n', b'\x16\x03\x01\x02',
            b'GET / HTTP/1.1 x\r\n\r\n', b'G\x00T / HTTP/1.1\r\n\r\n',
            b'GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n',
            b'GET //x/ HTTP/1.1\r\nHost: x\r\n\r\n',
            b'CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n',
            b'GET * HTTP/1.1\r\nHost: x\r\n\r\n',
            b'GET /v3/volumes HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n',
            b'GET /v3/volumes HTTP/1.1\r\nHost : x\r\n\r\n',
            b'GET /v3/volumes HTTP/1.1\nHost: x\n\n',
            b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
        ):
            with self.subTest(data[:40]):
                self.refused(data, *range(400, 500), 505)

    def test_random_bytes_are_survived(self):
        chance = random.Random(hostile_case.seed(self.id()))
        good = POST + b'Content-Length: 3\r\n\r\n{"a'
        for _ in range(60):
            data = bytearray(chance.choice((good, chance.randbytes(300))))
            for _ in range(chance.randrange(1, 9)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            found = self.statuses(self.raw(bytes(data)))
            self.assertFalse(
                [status for status in found if status in (500, 502)], data)

    def test_nonsense_in_chunks_is_refused(self):
        chunked = POST + b'Transfer-Encoding: chunked\r\n\r\n'
        for body in (
            b'x\r\n', b'-1\r\n{}\r\n0\r\n\r\n', b'\r\n\r\n', b'0x5\r\nhello',
            b'FFFFFFFFFFFFFFFFFF\r\n{}', b'7FFFFFFF\r\n{}\r\n',
            b'2;' + b'x' * 100_000 + b'\r\n{}\r\n0\r\n\r\n', b'5\r\n{}',
            b'2\r\n{}XX0\r\n\r\n', b'1\r\n{\r\n' * 60_000, b'2\r\n{}\r\n',
            b'0\r\n' + b'A: b\r\n' * 20_000, b'2\r\n{}\r\n0\r\nX\r\n\r\n',
        ):
            with self.subTest(body[:30]):
                self.refused(chunked + body)
        self.refused(POST + b'Transfer-Encoding: gzip\r\n\r\n{}',
                     *range(400, 500), 501)

    def test_a_body_of_two_lengths_hides_no_second_request(self):
        body = b'%x\r\n%s\r\n0\r\n\r\n' % (len(GOOD), GOOD)
        hidden = b'DELETE /v3/volumes/x HTTP/1.1\r\n' + HEAD + b'\r\n'
        for lengths in (
            b'Content-Length: 31\r\nTransfer-Encoding: chunked\r\n',
            b'Transfer-Encoding: chunked\r\nContent-Length: 31\r\n',
            b'Content-Length: 4\r\nContent-Length: 400\r\n',
            b'Content-Length: 4, 400\r\n', b'Content-Length: +4\r\n',
            b'Content-Length: 0x4\r\n', b'Content-Length: 4_0\r\n',
            b'Content-Length: -1\r\n',
        ):
            with self.subTest(lengths):
                found = self.statuses(self.raw(
                    POST + lengths + b'\r\n' + body + hidden))
                self.assertEqual([400], found)

    def test_a_pipeline_is_answered_in_order_up_to_its_first_wrong_word(self):
        one = b'GET /v3/volumes?limit=%d HTTP/1.1\r\nHost: localhost\r\n\r\n'
        answer = self.raw(b''.join(one % (n or 1) for n in range(40)))
        self.assertEqual([200] * 40, self.statuses(answer))
        wrong = one % 1 + b'nonsense\r\n\r\n' + one % 1
        self.assertEqual([200, 400], self.statuses(self.raw(wrong)))
        bodies = b''.join(
            POST + b'Content-Length: %d\r\n\r\n' % len(body) + body
            for body in (b'{', b'{"volume": {"size": 0}}', b'[]')
        )
        self.assertEqual([400] * 3, self.statuses(self.raw(bodies)))

    def test_who_hangs_up_leaves_nothing_half_done(self):
        body = json.dumps({'volume': {'size_bytes': 512}}).encode()
        for data in (
            POST + b'Content-Length: %d\r\n\r\n' % (len(body) + 1) + body,
            POST[:40], POST, POST + b'Transfer-Encoding: chunked\r\n\r\n'
            b'1f\r\n' + body,
        ):
            with self.subTest(data[-30:]):
                self.refused(data)
                sock = self.connect()
                sock.sendall(data)
                sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
                sock.close()

    def test_clients_that_dribble_keep_no_other_out(self):
        """As many as there are threads, and each never quite silent."""
        stop = threading.Event()
        heads = POST, POST + b'Content-Length: 1000\r\n\r\n{'
        socks = [self.connect() for _ in range(2 * THREADS)]

        for number, sock in enumerate(socks):
            sock.sendall(heads[number % 2])

        def dribble():
            while not stop.wait(0.05):
                for sock in socks:
                    with contextlib.suppress(OSError):
                        sock.sendall(b'a')

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            # It comes to its turn, though they never stop.
            self.is_served()
        finally:
            stop.set()
            thread.join()

    def test_silent_clients_keep_no_other_out(self):
        # It would wait for each of them till long after this test.
        patient = server.Server(
            self.world.app, port=0, drain_s=10, threads=2, timeout_s=600,
            request_s=600,
        )
        patient.start()
        self.addCleanup(patient.stop)
        host, port = patient.url.removeprefix('http://').split(':')
        with contextlib.ExitStack() as silent:
            for _ in range(50):
                silent.enter_context(
                    socket.create_connection((host, int(port)), TIMEOUT_S))
            asked = requests.get(
                f'{patient.url}/v3/volumes', timeout=TIMEOUT_S)
            self.assertEqual(200, asked.status_code)
