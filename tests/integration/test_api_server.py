# SPDX-License-Identifier: Apache-2.0
"""The HTTP server: sockets, TLS, limits, and how it stops."""

import contextlib
import http.client
import json
import os
import select
import socket
import ssl
import stat
import subprocess
import threading
import unittest

import requests

from volume import core as cores
from volume import errors
from volume.api import app
from volume.api import auth
from volume.api import server
from volume.testing import fixtures

TIMEOUT_S = 20


def application(environ, start_response):
    """Discovery is all that the sockets need."""
    made = app.make_app(
        cores.Core(db=None, hint=None, wait=None), auth.NoAuth()
    )
    return made(environ, start_response)


class Server(unittest.TestCase):

    def serve(self, wsgi=application, **options):
        made = server.Server(wsgi, **{
            'port': 0, 'drain_s': 10, 'hear_out_s': TIMEOUT_S, **options,
        })
        made.start()
        self.addCleanup(made.stop)
        return made

    def raw(self, made, data):
        """Send bytes and return all that comes back."""
        host, port = made.url.removeprefix('http://').split(':')
        with socket.create_connection((host, port), TIMEOUT_S) as sock:
            # A server that refuses early has hung up before all is sent.
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            return b''.join(iter(lambda: sock.recv(65536), b''))

    def test_it_listens_where_it_says(self):
        made = self.serve()
        self.assertRegex(made.url, r'^http://127\.0\.0\.1:\d+$')
        asked = requests.get(made.url, timeout=TIMEOUT_S)
        self.assertEqual(300, asked.status_code)
        self.assertEqual(
            f'{made.url}/v3/',
            asked.json()['versions'][0]['links'][0]['href'],
        )

    def test_an_address_that_is_taken_is_named(self):
        port = int(self.serve().url.rpartition(':')[2])
        with self.assertRaisesRegex(
            errors.Unavailable, f'127.0.0.1:{port}'
        ):
            server.Server(application, port=port).start()

    def test_many_requests_go_over_one_connection(self):
        made = self.serve()
        connection = http.client.HTTPConnection(
            made.url.removeprefix('http://'), timeout=TIMEOUT_S
        )
        self.addCleanup(connection.close)
        for _ in range(3):
            connection.request('GET', '/v3')
            sock = connection.sock
            answer = connection.getresponse()
            answer.read()
            self.assertEqual(200, answer.status)
            self.assertIs(sock, connection.sock)

    def test_a_unix_socket_is_for_its_owner_alone(self):
        path = os.path.join(fixtures.state_dir(self), 'api.sock')
        made = self.serve(listen=f'unix:{path}')
        self.assertEqual(f'unix:{path}', made.url)
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect(path)
            sock.sendall(b'GET /v3 HTTP/1.0\r\n\r\n')
            answer = b''.join(iter(lambda: sock.recv(65536), b''))
        self.assertIn(b'200 OK', answer)
        made.stop()
        self.assertFalse(os.path.exists(path))

    def test_a_file_that_is_no_socket_is_left_alone(self):
        path = os.path.join(fixtures.state_dir(self), 'precious')
        with open(path, 'w') as f:
            f.write('x')
        made = server.Server(application, listen=f'unix:{path}')
        self.addCleanup(made.stop)
        with self.assertRaisesRegex(errors.Unavailable, 'no socket'):
            made.start()
        with open(path) as f:
            self.assertEqual('x', f.read())

    def test_a_socket_is_taken_over_only_from_the_dead(self):
        path = os.path.join(fixtures.state_dir(self), 'api.sock')
        first = self.serve(listen=f'unix:{path}')
        second = server.Server(application, listen=f'unix:{path}')
        self.addCleanup(second.stop)
        with self.assertRaisesRegex(errors.Unavailable, 'somebody listens'):
            second.start()
        first.stop()
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(path)
        self.serve(listen=f'unix:{path}')

    def test_what_is_longer_than_it_may_be_is_refused(self):
        made = self.serve()
        for request, status in (
            (b'GET /v3 HTTP/1.1\r\nHost: x\r\nA: ' + b'a' * 70000
             + b'\r\n\r\n', b'413'),
            (b'POST /v3/volumes HTTP/1.1\r\nHost: localhost\r\n'
             b'Content-Type: application/json\r\n'
             b'Content-Length: 99999999\r\n\r\n', b'413'),
            (b'POST /v3/volumes HTTP/1.1\r\nHost: localhost\r\n'
             b'Content-Type: application/json\r\n'
             b'Content-Length: 200000\r\n\r\n' + b' ' * 200000, b'413'),
        ):
            self.assertEqual(
                status, self.raw(made, request)[9:12], request[:60]
            )

    def test_who_is_refused_in_mid_sentence_hears_why(self):
        made = self.serve()
        for path, headers, words in (
            ('volumes', 'Content-Length: 4000000', b'exceeds the maximum'),
            ('volumes', 'Content-Length: 1000000', b'body is larger than'),
            ('nothing', 'Content-Length: 1000000', b'could not be found'),
            ('volumes', 'Content-Length: x', b'Malformed'),
            ('volumes', 'Transfer-Encoding: chunked\r\nContent-Length: 3',
             b'or comes in chunks'),
        ):
            with self.subTest(path=path, headers=headers):
                self.assertIn(words, self.told(made, (
                    f'POST /v3/{path} HTTP/1.1\r\nHost: localhost\r\n'
                    'Content-Type: application/json\r\n'
                    f'Connection: close\r\n{headers}\r\n\r\n'
                ).encode() + b' ' * 4_000_000))

    def test_who_is_refused_and_never_ends_is_not_heard_for_ever(self):
        made = self.serve()
        address = made.url.removeprefix('http://').split(':')
        sent_bytes, piece = 0, bytes(1 << 20)
        with socket.create_connection(address, TIMEOUT_S) as sock:
            sock.sendall(
                b'POST /v3/volumes HTTP/1.1\r\nHost: localhost\r\n'
                b'Content-Length: 99999999999\r\n\r\n'
            )
            with self.assertRaises(ConnectionError):
                while sent_bytes < 1 << 40:
                    sent_bytes += sock.send(piece)
        # And what the kernel takes without anybody who reads.
        self.assertLess(sent_bytes, server.HEAR_OUT_BYTES + (32 << 20))

    def told(self, made, data):
        """Say all, however long it is, and only then listen."""
        address = made.url.removeprefix('http://').split(':')
        with socket.create_connection(address, TIMEOUT_S) as sock:
            sock.sendall(data)
            return b''.join(iter(lambda: sock.recv(65536), b''))

    def test_a_body_in_chunks_is_read_to_its_end(self):
        got = []

        def echo(environ, start_response):
            got.append(environ['wsgi.input'].read(1000))
            start_response('204 No Content', [])
            return []

        made = self.serve(echo)
        self.raw(
            made, b'POST / HTTP/1.1\r\nHost: x\r\n'
            b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n2\r\n1}\r\n'
            b'0\r\n\r\n',
        )
        self.assertEqual([{'a': 1}], [json.loads(each) for each in got])

    def test_stop_waits_for_what_is_being_answered(self):
        begun, go_on = threading.Event(), threading.Event()

        def slow(environ, start_response):
            begun.set()
            go_on.wait(TIMEOUT_S)
            start_response('200 OK', [('Content-Type', 'text/plain')])
            return [b'whole']

        made = self.serve(slow)
        answers = []
        asking = threading.Thread(target=lambda: answers.append(
            requests.get(made.url, timeout=TIMEOUT_S).text
        ))
        asking.start()
        self.assertTrue(begun.wait(TIMEOUT_S))
        stopping = threading.Thread(target=made.stop)
        stopping.start()
        go_on.set()
        stopping.join(TIMEOUT_S)
        asking.join(TIMEOUT_S)
        self.assertEqual(['whole'], answers)
        with self.assertRaises(requests.ConnectionError):
            requests.get(made.url, timeout=TIMEOUT_S)


class Tls(unittest.TestCase):
    """With a certificate that this test signs itself."""

    def setUp(self):
        directory = fixtures.state_dir(self)
        self.certificate = os.path.join(directory, 'cert.pem')
        self.key = os.path.join(directory, 'key.pem')
        try:
            subprocess.run(
                ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes',
                 '-keyout', self.key, '-out', self.certificate, '-days', '2',
                 '-subj', '/CN=localhost', '-addext',
                 'subjectAltName=DNS:localhost,IP:127.0.0.1'],
                check=True, capture_output=True, timeout=TIMEOUT_S,
            )
        except FileNotFoundError:
            self.skipTest('no openssl')
        self.made = server.Server(
            application, port=0, drain_s=10, timeout_s=TIMEOUT_S,
            hear_out_s=TIMEOUT_S,
            tls_certificate=self.certificate, tls_key=self.key,
        )
        self.made.start()
        self.addCleanup(self.made.stop)

    def test_what_is_asked_and_answered_is_encrypted(self):
        asked = requests.get(
            self.made.url, verify=self.certificate, timeout=TIMEOUT_S
        )
        self.assertEqual(300, asked.status_code)
        self.assertEqual(
            f'{self.made.url}/v3/',
            asked.json()['versions'][0]['links'][0]['href'],
        )
        with self.assertRaises(requests.exceptions.SSLError):
            requests.get(self.made.url, timeout=TIMEOUT_S)

    def test_a_client_that_says_nothing_keeps_no_other_waiting(self):
        port = int(self.made.url.rpartition(':')[2])
        silent = socket.create_connection(('127.0.0.1', port), TIMEOUT_S)
        self.addCleanup(silent.close)
        asked = requests.get(
            self.made.url, verify=self.certificate, timeout=TIMEOUT_S / 4
        )
        self.assertEqual(300, asked.status_code)

    def test_who_is_refused_in_mid_sentence_hears_why(self):
        context = ssl.create_default_context(cafile=self.certificate)
        # It ends as TCP does, after a whole answer.
        context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
        port = int(self.made.url.rpartition(':')[2])
        with socket.create_connection(
            ('127.0.0.1', port), TIMEOUT_S
        ) as sock, context.wrap_socket(
            sock, server_hostname='localhost'
        ) as tls:
            tls.sendall(
                b'POST /v3/volumes HTTP/1.1\r\nHost: localhost\r\n'
                b'Content-Length: 8000000\r\n\r\n'
            )
            # Once the server has answered, and waits for what still comes:
            # more than is on its way without anybody who reads.
            select.select([tls], [], [], TIMEOUT_S)
            tls.sendall(b' ' * 8_000_000)
            said = b''.join(iter(lambda: tls.recv(65536), b''))
        self.assertIn(b'exceeds the maximum', said)

    def test_old_versions_of_tls_are_refused(self):
        context = ssl.create_default_context(cafile=self.certificate)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers('ALL:@SECLEVEL=0')
        port = int(self.made.url.rpartition(':')[2])
        with socket.create_connection(('127.0.0.1', port), TIMEOUT_S) as sock:
            with self.assertRaises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(sock, server_hostname='localhost')
