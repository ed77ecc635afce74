# SPDX-License-Identifier: Apache-2.0
"""The web as a source, against a real server that misbehaves."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import unittest
from typing import Any

from tests.integration.source_case import DATA
from tests.integration.source_case import read
from tests.integration.source_case import read_all
from tests.integration.source_case import settings
from tests.webserver import Web
from volume import errors
from volume.node import Node
from volume.transfer import dial
from volume.transfer.http import HttpSource

OLD = 'Mon, 01 Jan 2024 00:00:00 GMT'


class Http(unittest.TestCase):
    def setUp(self) -> None:
        self.web = Web(self)

    def source(self, **changed: Any) -> HttpSource:
        return HttpSource(settings(**changed), Node('/nonexistent'))


class Downloads(Http):
    def test_an_image_is_read_whole_and_described(self) -> None:
        url = self.web.put('/i', DATA)
        stat = self.source().stat(url)
        self.assertEqual((len(DATA), '"1"', True),
                         (stat.size_bytes, stat.version, stat.can_resume))
        self.assertEqual(DATA, read(self.source(), url))

    def test_no_encoding_is_asked_for_and_none_is_taken(self) -> None:
        url = self.web.put('/i', DATA, encoding='gzip')
        with self.assertRaisesRegex(errors.Invalid, 'encoding'):
            self.source().stat(url)
        self.assertEqual('identity', self.web.log[0][1]['Accept-Encoding'])

    def test_a_broken_connection_is_taken_up_where_it_ended(self) -> None:
        url = self.web.put('/i', DATA, drops=[1_000_000, 1_500_000])
        self.assertEqual(DATA, read(self.source(), url))
        ranges = [h.get('Range') for _, h in self.web.log[2:]]
        self.assertEqual(['bytes=1000000-', 'bytes=2500000-'], ranges)
        self.assertEqual('"1"', self.web.log[-1][1]['If-Range'])

    def test_what_a_reset_has_swallowed_is_fetched_again(self) -> None:
        drops = [1_000_000, 700_000]
        url = self.web.put('/i', DATA, drops=drops, resets=True)
        source = self.source(image_http_attempts=9)
        self.assertEqual(DATA, read(source, url))

    def test_a_silent_server_is_left_and_asked_again(self) -> None:
        url = self.web.put('/i', DATA, stalls_after=1_000_000)

        source = self.source(image_http_timeout_s=1.0)
        stat = source.stat(url)
        with source.open(stat) as image:
            first = image.read(500_000)
            self.web.pages['/i'].stalls_after = None
            self.assertEqual(DATA, first + read_all(image))

    def test_a_server_that_stays_silent_is_given_up(self) -> None:
        url = self.web.put('/i', DATA, stalls_after=1000)
        source = self.source(image_http_timeout_s=1.0)
        with self.assertRaisesRegex(errors.Unavailable, '3 times.*nothing'):
            read(source, url)

    def test_a_server_without_an_answer_is_given_up(self) -> None:
        with socket.create_server(('127.0.0.1', 0)) as mute:
            port = mute.getsockname()[1]
            source = self.source(image_http_timeout_s=0.2)
            with self.assertRaisesRegex(errors.Unavailable, 'next to nothing'):
                source.stat(f'http://127.0.0.1:{port}/i')

    def test_a_server_that_dribbles_headers_is_given_up(self) -> None:
        stop = threading.Event()

        def dribble(server: socket.socket) -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b'HTTP/1.1 200 OK\r\n')
                while not stop.wait(0.02):
                    try:
                        peer.sendall(b'X: y\r\n')
                    except OSError:
                        return

        with socket.create_server(('127.0.0.1', 0)) as server:
            thread = threading.Thread(target=dribble, args=(server,))
            thread.start()
            port = server.getsockname()[1]
            source = self.source(image_http_timeout_s=0.3)
            with self.assertRaises(errors.Unavailable):
                source.stat(f'http://127.0.0.1:{port}/i')
            stop.set()
            thread.join()

    def test_connections_that_break_in_a_row_are_counted(self) -> None:
        url = self.web.put('/i', DATA, drops=[0] * 50)
        with self.assertRaisesRegex(errors.Unavailable, 'lost 3 times'):
            read(self.source(), url)
        self.assertEqual(1 + 3, len(self.web.log))

    def test_breaks_with_progress_between_them_are_forgiven(self) -> None:
        url = self.web.put('/i', DATA * 3, drops=[1_200_000] * 7)
        source = self.source(image_http_attempts=2)
        self.assertEqual(DATA * 3, read(source, url))

    def test_an_image_that_changed_in_a_break_is_a_conflict(self) -> None:
        def change(page: Any, sent: int) -> None:
            if sent:
                page.etag, page.data = '"2"', page.data[::-1]

        url = self.web.put('/i', DATA, drops=[1_000_000])
        source = self.source()
        stat = source.stat(url)
        self.web.pages['/i'].before = change
        with (
            source.open(stat) as image,
            self.assertRaisesRegex(errors.Conflict, 'changed'),
        ):
            read_all(image)

    def test_a_change_is_seen_though_the_server_ignores_if_range(self) -> None:
        def change(page: Any, sent: int) -> None:
            if sent:
                page.etag = '"2"'

        url = self.web.put(
            '/i', DATA, drops=[1_000_000], ignores_if_range=True
        )
        source = self.source()
        stat = source.stat(url)
        self.web.pages['/i'].before = change
        with source.open(stat) as image, self.assertRaises(errors.Conflict):
            read_all(image)

    def test_an_image_that_changed_before_is_a_conflict(self) -> None:
        source = self.source()
        url = self.web.put('/i', DATA)
        stat = source.stat(url)
        for change in ({'etag': '"2"'}, {'etag': None}):
            self.web.put('/i', DATA, **change)
            with self.subTest(change), self.assertRaises(errors.Conflict):
                with source.open(stat):
                    pass
        self.web.put('/i', DATA + b'x')
        with self.assertRaisesRegex(errors.Conflict, 'had 3000000 bytes'):
            with source.open(stat):
                pass

    def test_without_ranges_a_break_is_an_error_not_a_guess(self) -> None:
        source = self.source()
        url = self.web.put('/i', DATA, ranges=False)
        self.assertFalse(source.stat(url).can_resume)
        # The first question gets the body as well.
        self.web.put('/i', DATA, drops=[9, 1_000_000], ranges=False)
        with self.assertRaisesRegex(errors.Unavailable, 'cannot go on'):
            read(source, url)
        self.assertEqual(DATA, read(source, url))

    def test_only_a_strong_validator_lets_a_download_go_on(self) -> None:
        for ways, strong in (
            ({'etag': 'W/"1"'}, False),
            ({'etag': None}, False),
            ({'etag': None, 'last_modified': OLD}, True),
            ({'etag': None, 'last_modified': 'nonsense'}, False),
        ):
            with self.subTest(ways):
                url = self.web.put('/i', DATA, **ways)
                self.assertEqual(strong, self.source().stat(url).can_resume)
        url = self.web.put(
            '/i', DATA, etag=None, last_modified=OLD, drops=[1_000_000]
        )
        self.assertEqual(DATA, read(self.source(), url))

    def test_a_length_that_is_not_the_length_is_no_success(self) -> None:
        longer = self.web.put('/i', DATA, claims=len(DATA) + 1, ranges=False)
        with self.assertRaises(errors.Unavailable):
            read(self.source(), longer)
        # What is shorter is the image, for all that anybody can know.
        url = self.web.put('/i', DATA)
        source = self.source()
        stat = source.stat(url)
        self.web.put('/i', DATA, claims=len(DATA) - 1)
        with self.assertRaises(errors.Conflict), source.open(stat):
            pass

    def test_a_body_without_length_must_end_where_it_was_said(self) -> None:
        for ways in ({'chunked': True}, {'has_length': False}):
            with self.subTest(ways):
                url = self.web.put('/i', DATA, **ways)
                source = self.source()
                stat = source.stat(url)
                self.assertEqual(len(DATA), stat.size_bytes)
                self.assertEqual(DATA, read(source, url))
                self.web.put('/i', DATA + b'x', **ways)
                with (
                    source.open(stat) as image,
                    self.assertRaisesRegex(errors.Conflict, 'longer'),
                ):
                    read_all(image)

    def test_a_size_that_is_not_told_is_none(self) -> None:
        url = self.web.put('/i', DATA, ranges=False, chunked=True)
        stat = self.source().stat(url)
        self.assertIsNone(stat.size_bytes)
        with self.assertRaisesRegex(errors.Invalid, 'how large'):
            with self.source().open(stat):
                pass

    def test_an_image_over_the_limit_is_refused(self) -> None:
        url = self.web.put('/i', DATA)
        with self.assertRaisesRegex(errors.Invalid, 'image_size_bytes_max'):
            self.source(image_size_bytes_max=1000).stat(url)

    def test_headers_without_end_are_refused(self) -> None:
        url = self.web.put('/i', DATA, body_headers=500)
        with self.assertRaises(errors.Unavailable):
            self.source().stat(url)

    def test_what_a_status_means(self) -> None:
        for status, kind in (
            (401, errors.Denied), (403, errors.Denied),
            (404, errors.NotFound), (410, errors.NotFound),
            (400, errors.Invalid), (429, errors.Unavailable),
            (500, errors.Unavailable), (503, errors.Unavailable),
            (304, errors.Invalid), (204, errors.Invalid),
        ):
            url = self.web.put('/i', status=status)
            with self.subTest(status), self.assertRaises(kind) as e:
                self.source().stat(url)
            self.assertIs(kind, type(e.exception))

    def test_an_empty_image_has_no_bytes(self) -> None:
        url = self.web.put('/i', b'')
        self.assertEqual(0, self.source().stat(url).size_bytes)

    def test_a_wait_is_ended_from_another_thread(self) -> None:
        url = self.web.put('/i', DATA, stalls_after=1000)
        source = self.source()
        with source.open(source.stat(url)) as image:
            image.read(1000)
            timer = threading.Timer(0.1, image.abort)  # type: ignore[union-attr]
            timer.start()
            with self.assertRaisesRegex(errors.Unavailable, 'was ended'):
                image.read(1000)
            timer.join()

    def test_nothing_is_written_to_a_web_server(self) -> None:
        with self.assertRaises(errors.Unsupported):
            self.source().put(self.web.base + '/i')

    def test_proxies_of_the_environment_are_not_asked(self) -> None:
        proxy = Web(self)
        url = self.web.put('/i', DATA)
        for name in ('http_proxy', 'HTTP_PROXY', 'ALL_PROXY'):
            old = os.environ.get(name)
            os.environ[name] = proxy.base
            self.addCleanup(_restore, name, old)
        self.assertEqual(DATA, read(self.source(), url))
        self.assertEqual([], proxy.log)


class Redirects(Http):
    def test_redirects_are_followed_to_the_image(self) -> None:
        self.web.put('/i', DATA)
        self.web.put('/b', redirect='/i', status=307)
        url = self.web.put('/a', redirect=self.web.base + '/b')
        self.assertEqual(DATA, read(self.source(), url))

    def test_redirects_end(self) -> None:
        url = self.web.put('/a', redirect='/a')
        with self.assertRaisesRegex(errors.Invalid, 'over 3 times'):
            self.source().stat(url)
        self.assertEqual(4, len(self.web.log))

    def test_a_redirect_leads_nowhere_else(self) -> None:
        for target in (
            'file:///etc/passwd', 'ftp://127.0.0.1/i', 'gopher://127.0.0.1/',
            'nbd://127.0.0.1/', '//', 'http://', 'http://[::1', 'javascript:1',
        ):
            url = self.web.put('/a', redirect=target)
            with self.subTest(target), self.assertRaises(errors.Invalid):
                self.source().stat(url)

    def test_a_redirect_to_a_forbidden_address_is_refused(self) -> None:
        inner = Web(self)
        inner.put('/i', DATA)
        source = self.source(image_allowed_networks=['127.0.0.1/32'])
        for target in (
            f'http://127.0.0.2:{inner.port}/i', f'http://[::1]:{inner.port}/',
            'http://169.254.169.254/latest/meta-data', 'http://10.0.0.1/',
        ):
            url = self.web.put('/a', redirect=target)
            with (
                self.subTest(target),
                self.assertRaisesRegex(errors.Invalid, 'not at a public'),
            ):
                source.stat(url)
        self.assertEqual([], inner.log)

    def test_a_redirect_in_mid_download_is_checked_as_well(self) -> None:
        def turn(page: Any, sent: int) -> None:
            if sent:
                page.redirect = 'http://169.254.169.254/'

        url = self.web.put('/i', DATA, drops=[1_000_000])
        source = self.source()
        stat = source.stat(url)
        self.web.pages['/i'].before = turn
        with source.open(stat) as image, self.assertRaises(errors.Invalid):
            read_all(image)

    def test_a_login_goes_to_its_own_server_only(self) -> None:
        other = Web(self)
        other.put('/i', DATA)
        self.web.put('/a', redirect=other.base + '/i')
        url = self.web.base.replace('//', '//user:pa%20ss@') + '/a'
        self.assertEqual(DATA, read(self.source(), url))
        self.assertEqual(
            'Basic dXNlcjpwYSBzcw==', self.web.log[0][1]['Authorization']
        )
        self.assertNotIn('Authorization', other.log[0][1])


class Addresses(unittest.TestCase):
    def test_only_public_addresses_are_reached(self) -> None:
        for address in (
            '127.0.0.1', '127.9.9.9', '0.0.0.0', '10.1.2.3', '172.16.0.1',
            '192.168.1.1', '169.254.169.254', '100.64.0.1', '192.0.2.1',
            '198.18.0.1', '224.0.0.1', '240.0.0.1', '255.255.255.255',
            '::', '::1', 'fe80::1', 'fe80::1%eth0', 'fc00::1', 'fd00:ec2::254',
            'fec0::1', 'ff02::1', '::ffff:127.0.0.1', '::ffff:10.0.0.1',
            '64:ff9b::7f00:1', '2002:7f00:1::', '2001:db8::1', '::127.0.0.1',
        ):
            with self.subTest(address):
                self.assertFalse(dial.is_reachable(address, ()))
        for address in ('8.8.8.8', '1.1.1.1', '2606:4700:4700::1111',
                        '::ffff:8.8.8.8'):
            with self.subTest(address):
                self.assertTrue(dial.is_reachable(address, ()))

    def test_an_allowed_network_is_no_wider_than_it_says(self) -> None:
        allowed = dial.networks(['10.1.0.0/16', 'fd00::/64'])
        self.assertTrue(dial.is_reachable('10.1.255.1', allowed))
        self.assertTrue(dial.is_reachable('::ffff:10.1.0.1', allowed))
        self.assertTrue(dial.is_reachable('fd00::5', allowed))
        self.assertFalse(dial.is_reachable('10.2.0.1', allowed))
        self.assertFalse(dial.is_reachable('127.0.0.1', allowed))
        with self.assertRaises(errors.Invalid):
            dial.networks(['10.0.0.1/8'])

    def test_loopback_is_refused_by_default_in_all_its_spellings(self) -> None:
        with socket.create_server(('127.0.0.1', 0)) as server:
            server.settimeout(0)
            port = server.getsockname()[1]
            source = HttpSource(
                settings(image_allowed_networks=[]), Node('/nonexistent')
            )
            for host in ('127.0.0.1', 'localhost', '2130706433', '0x7f.1',
                         '127.1', '0', '[::1]', '[::ffff:127.0.0.1]'):
                # A resolver need not know them all, and none is dialled.
                with (
                    self.subTest(host),
                    self.assertRaises((errors.Invalid, errors.Unavailable)),
                ):
                    source.stat(f'http://{host}:{port}/i')
            with self.assertRaises(BlockingIOError):
                server.accept()

    def test_a_name_with_one_forbidden_address_is_not_dialled(self) -> None:
        def resolve(host: str, port: int, **_: Any) -> Any:
            stream = (socket.AF_INET, socket.SOCK_STREAM, 6, '')
            return [
                (*stream, ('8.8.8.8', port)), (*stream, ('127.0.0.1', port)),
            ]

        with self.assertRaisesRegex(errors.Invalid, 'not at a public'):
            dial.dial('two.example', 80, (), 1.0, resolve)

    def test_the_address_that_was_checked_is_the_one_dialled(self) -> None:
        web = Web(self)
        web.put('/i', DATA)
        asked: list[str] = []

        def resolve(host: str, port: int, **_: Any) -> Any:
            # A name that means another address each time it is asked for.
            asked.append(host)
            address = '127.0.0.1' if len(asked) % 2 else '10.0.0.1'
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, '',
                     (address, port))]

        source = HttpSource(settings(), Node('/nonexistent'))
        source.resolve = resolve
        url = f'http://rebind.example:{web.port}/i'
        stat = source.stat(url)
        self.assertEqual(['rebind.example'], asked)
        with self.assertRaises(errors.Invalid), source.open(stat):
            pass
        self.assertEqual(1, len(web.log))
        self.assertEqual(f'rebind.example:{web.port}', web.log[0][1]['Host'])


class Secrets(Http):
    def test_no_error_tells_a_login_or_a_query(self) -> None:
        host = f'user:hunter2@127.0.0.1:{self.web.port}'
        self.web.put('/loop', redirect='/loop?signature=hunter2')
        self.web.put('/cut', DATA, drops=[0] * 9)
        self.web.put('/big', DATA, ranges=False, chunked=True)
        self.web.put('/bad', redirect='http://x:hunter2@10.0.0.1/?a=hunter2')
        self.web.put('/gone', status=500)
        for path in ('/loop', '/cut', '/big', '/bad', '/gone', '/none',
                     '/a\nb', '/'):
            url = f'http://{host}{path}?signature=hunter2'
            with (
                self.subTest(path),
                self.assertRaises(errors.VolumeError) as e,
            ):
                read(self.source(), url)
            seen = e.exception
            while seen is not None:
                self.assertNotIn('hunter2', str(seen))
                seen = seen.__cause__  # type: ignore[assignment]

    def test_a_masked_url_keeps_what_helps(self) -> None:
        self.assertEqual(
            'https://***@h.example:1/a/b?***',
            dial.masked('https://u:p@h.example:1/a/b?c=d#e'),
        )
        self.assertEqual('http://h/a', dial.masked('http://h/a'))
        self.assertNotIn('p', dial.masked('http://u:p@[bad/p')[5:])


class Tls(unittest.TestCase):
    def setUp(self) -> None:
        if shutil.which('openssl') is None:
            self.skipTest('openssl is not installed: no certificate')
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)

    def certificate(self, name: str) -> str:
        key, path = (
            os.path.join(self.directory, part) for part in ('key', 'cert')
        )
        subprocess.run(
            ['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
             'ec_paramgen_curve:P-256', '-nodes', '-keyout', key, '-out',
             path, '-days', '2', '-subj', '/CN=test', '-addext',
             f'subjectAltName={name}'],
            check=True, capture_output=True, timeout=60,
        )
        both = os.path.join(self.directory, 'both')
        with open(both, 'wb') as f:
            for part in (key, path):
                with open(part, 'rb') as g:
                    f.write(g.read())
        return both

    def test_a_trusted_server_is_read_by_https(self) -> None:
        web = Web(self, self.certificate('IP:127.0.0.1'))
        url = web.put('/i', DATA, drops=[1_000_000])
        conf = settings(image_ca_file=os.path.join(self.directory, 'cert'))
        self.assertEqual(DATA, read(HttpSource(conf, Node('/x')), url))

    def test_an_unknown_certificate_or_name_is_refused(self) -> None:
        web = Web(self, self.certificate('DNS:other.example'))
        url = web.put('/i', DATA)
        cert = os.path.join(self.directory, 'cert')
        for ca_file in ('', cert):
            source = HttpSource(settings(image_ca_file=ca_file), Node('/x'))
            with (
                self.subTest(ca_file),
                self.assertRaisesRegex(errors.Invalid, 'not trusted'),
            ):
                source.stat(url)
        self.assertEqual([], web.log)

    def test_a_redirect_does_not_take_the_protection_away(self) -> None:
        plain = Web(self)
        plain.put('/i', DATA)
        web = Web(self, self.certificate('IP:127.0.0.1'))
        url = web.put('/a', redirect=plain.base + '/i')
        conf = settings(image_ca_file=os.path.join(self.directory, 'cert'))
        with self.assertRaisesRegex(errors.Invalid, 'from https'):
            HttpSource(conf, Node('/x')).stat(url)
        self.assertEqual([], plain.log)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
