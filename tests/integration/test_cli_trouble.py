# SPDX-License-Identifier: Apache-2.0
"""``volume`` when something is wrong: the wait, the way, or the words."""

import contextlib
import http.client
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import unittest

from tests.integration import commands
from tests.integration import serving
from volume import ids
from volume.api import server
from volume.testing import fixtures

MIB = 1 << 20
SLOW = MIB  # bytes a second of an image copy

INTERRUPTIBLE = """
import signal, sys
from volume.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main.main())
"""


class Waiting(commands.Cli):

    settings = f'image_rate_bytes_per_s = {SLOW}'

    def image(self, seconds):
        """Return words that make a volume for so long."""
        path = os.path.join(self.world.images, self.name())
        with open(path, 'wb') as f:
            f.write(os.urandom(seconds * SLOW))
        return (
            'create', '--name', self.name(), '--backend', 'fast', '--size',
            f'{seconds}M', '--image', f'file://{path}', '--image-format',
            'raw',
        )

    def job(self):
        (job,) = self.json('jobs', '--volume', self.name())
        return job

    def test_without_wait_it_is_only_accepted(self):
        made = self.json(*self.image(30), '--no-wait')
        self.assertIn(made['status'], ('creating', 'downloading'))
        self.assertEqual('open', self.job()['state'])
        self.volume('jobs', 'cancel', self.job()['id'])

    def test_when_the_time_is_over_the_work_goes_on_and_can_be_ended(self):
        words = self.refused(*self.image(30), '--timeout', '0.5s', code=4)
        job = self.job()
        self.assertIn(f'volume jobs cancel {job["id"]}', words)
        self.assertEqual('open', job['state'])
        self.volume('jobs', 'cancel', job['id'])
        self.assertEqual('cancelled', self.job()['state'])

    def test_who_waits_for_a_cancelled_job_is_told(self):
        waiting = subprocess.Popen(
            [sys.executable, '-m', 'volume.cli.main', *self.image(30)],
            env=commands.environment(self.url), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        self.addCleanup(waiting.communicate)
        self.addCleanup(waiting.kill)
        serving.until(
            lambda: self.json('list', '--name', self.name()), bool
        )
        self.volume('jobs', 'cancel', self.job()['id'])
        out, err = waiting.communicate(timeout=commands.COMMAND_S)
        self.assertEqual((1, ''), (waiting.returncode, out))
        self.assertIn('was cancelled', err)
        self.assertNotIn('Traceback', err)

    def test_who_presses_control_c_is_told_how_to_end_it(self):
        relay = commands.Relay(self, self.url, lambda method, path, body: body)
        # Who runs the tests in the background has it ignored, and so have
        # all that descend from there.
        waiting = subprocess.Popen(
            [sys.executable, '-c', INTERRUPTIBLE, *self.image(30)],
            env=commands.environment(relay.url), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        self.addCleanup(waiting.communicate)
        self.addCleanup(waiting.kill)
        # It looks at a job of which it knows the id: so it waits.
        serving.until(
            lambda: any('/os-volume-jobs/' in path for _, path in relay.seen),
            bool,
        )
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=commands.COMMAND_S)
        self.assertEqual((130, ''), (waiting.returncode, out))
        self.assertNotIn('Traceback', err)
        job = self.job()
        self.assertIn(f'look with "volume jobs show {job["id"]}"', err)
        self.assertEqual('open', job['state'])
        self.volume('jobs', 'cancel', job['id'])

    def test_a_terminal_shows_a_bar_and_a_pipe_gets_the_result_alone(self):
        mine, theirs = pty.openpty()
        self.addCleanup(os.close, mine)
        shown = bytearray()
        done = subprocess.Popen(
            [sys.executable, '-m', 'volume.cli.main', '--format', 'json',
             *self.image(4)],
            env=commands.environment(self.url, TERM='xterm'),
            stdout=subprocess.PIPE, stderr=theirs,
        )
        self.addCleanup(done.wait)
        self.addCleanup(done.kill)
        os.close(theirs)
        with contextlib.suppress(OSError):  # the other end is closed
            while more := os.read(mine, 4096):
                shown += more
        out, _ = done.communicate(timeout=commands.COMMAND_S)
        self.assertEqual(0, done.returncode, shown)
        self.assertEqual('available', json.loads(out)['status'])
        self.assertIn(b'of 4 MiB', shown)
        self.assertIn('━'.encode(), shown)

    def test_one_that_fails_says_why_and_stays_to_be_deleted(self):
        name = self.name()
        words = self.refused(
            'create', '--name', name, '--size', '1M', '--backend', 'fast',
            '--image', f'file://{self.world.images}/nothing',
        )
        self.assertIn('No such file', words)
        there = self.json('show', name)
        self.assertEqual('error', there['status'])
        self.assertIn(f'volume delete {there["id"]}', words)
        self.volume('delete', name)


class TheWay(commands.Cli):

    def test_a_lost_answer_to_a_create_makes_no_second_volume(self):
        lost = []

        def lose_first(method, path, body):
            if method == 'POST' and not lost:
                lost.append(body)
                return None
            return body

        relay = commands.Relay(self, self.url, lose_first)
        name = self.name()
        made = self.json('create', '--name', name, '--size', '1M',
                         url=relay.url)
        self.assertEqual('available', made['status'])
        self.assertEqual(1, len(lost))
        self.assertEqual(1, len(self.json('list', '--name', name)))

    def test_a_lost_answer_to_a_delete_is_told_and_not_asked_again(self):
        name = self.name()
        self.volume('create', '--name', name, '--size', '1M')
        relay = commands.Relay(
            self, self.url,
            lambda method, path, body: None if method == 'DELETE' else body,
        )
        words = self.refused('delete', name, url=relay.url, code=5)
        self.assertIn('it may have happened', words)
        self.assertEqual(
            ['GET', 'DELETE'], [method for method, _ in relay.seen]
        )

    def test_who_waits_outlives_a_service_that_is_away_for_a_while(self):
        looks = []

        def away(method, path, body):
            if 'os-volume-jobs' in path:
                looks.append(path)
                if len(looks) <= 7:
                    return None
            return body

        relay = commands.Relay(self, self.url, away)
        made = self.json('create', '--size', '1M', url=relay.url)
        self.assertEqual('available', made['status'])
        self.assertGreater(len(looks), 7)

    def test_where_nobody_listens_it_says_what_to_do(self):
        with socket.create_server(('127.0.0.1', 0)) as taken:
            port = taken.getsockname()[1]
        for url in f'http://127.0.0.1:{port}', 'unix:/nonexistent/socket':
            words = self.refused('list', url=url, code=5)
            self.assertIn(url, words)
            self.assertIn('VOLUME_URL', words)

    def test_what_is_no_volume_service_is_not_believed(self):
        for answer in (
            b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi',
            b'HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n',
            b'HTTP/1.1 302 Found\r\nLocation: http://x/\r\n\r\n',
            b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]',
            b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}',
        ):
            with self.subTest(answer=answer):
                url = answers(self, answer)
                for words in (
                    ('list',), ('show', ids.new()),
                    ('jobs', 'retry', ids.new(), '--no-wait'),
                ):
                    self.assertRegex(
                        self.refused(*words, url=url),
                        'no volume service|no list|refuses with status',
                    )
        self.refused('list', url=answers(self, b'SSH-2.0-x\r\n'), code=5)

    def test_an_answer_that_breaks_off_is_no_answer(self):
        head = (
            b'HTTP/1.1 200 OK\r\nX-Openstack-Request-Id: req-x\r\n'
            b'Content-Length: 20\r\n\r\n'
        )
        for sent in b'', b'{}', b'{"volume": {':
            with self.subTest(sent=sent):
                url = answers(self, head + sent)
                for words in (
                    ('list',), ('show', ids.new()), ('delete', ids.new()),
                ):
                    self.assertIn(
                        'no answer came', self.refused(*words, url=url, code=5)
                    )

    def test_a_certificate_must_be_trusted(self):
        directory = fixtures.state_dir(self)
        certificate, key = (
            os.path.join(directory, name) for name in ('cert.pem', 'key.pem')
        )
        try:
            subprocess.run(
                ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes',
                 '-keyout', key, '-out', certificate, '-days', '2',
                 '-subj', '/CN=localhost', '-addext',
                 'subjectAltName=IP:127.0.0.1'],
                check=True, capture_output=True, timeout=commands.COMMAND_S,
            )
        except FileNotFoundError:
            self.skipTest('no openssl')
        web = server.Server(
            self.world.app, port=0, tls_certificate=certificate, tls_key=key
        )
        url = web.start()
        self.addCleanup(web.stop)
        self.assertIn('--ca-file', self.refused('list', url=url, code=5))
        self.volume('list', '--ca-file', certificate, url=url)
        self.volume('list', url=url, env={'VOLUME_CA_FILE': certificate})
        self.refused('list', url=url.replace('https', 'http'), code=5)
        self.assertIn('TLS', self.refused(
            'list', url=self.url.replace('http', 'https'), code=5
        ))

    def test_a_reader_that_has_seen_enough_is_no_trouble(self):
        done = subprocess.Popen(
            [sys.executable, '-m', 'volume.cli.main', 'jobs'],
            env=commands.environment(self.url), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        done.stdout.close()
        err = done.stderr.read()
        done.stderr.close()
        self.assertEqual((b'', 0), (err, done.wait(commands.COMMAND_S)))


class Tokens(commands.Cli):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.world.with_tokens([
            serving.token('boss', 'main', 'admin'),
            serving.token('jo', 'shop', 'member'),
        ])
        path = os.path.join(cls.world.directory, 'api.sock')
        web = server.Server(cls.world.app, listen=f'unix:{path}')
        cls.url = web.start()
        cls.addClassCleanup(web.stop)

    def test_a_token_comes_from_the_environment_or_a_file(self):
        path = os.path.join(fixtures.state_dir(self), 'token')
        with open(path, 'w') as f:
            f.write('jo\n')
        for words, settings in (
            ((), {'env': {'VOLUME_TOKEN': 'jo'}}),
            ((), {'env': {'VOLUME_TOKEN_FILE': path}}),
            (('--token-file', path), {'env': {'VOLUME_TOKEN': 'wrong'}}),
            (('--token-file', '-'), {'stdin': 'jo\n'}),
        ):
            with self.subTest(words=words, settings=settings):
                self.volume(*words, 'list', **settings)

    def test_who_has_no_known_token_is_told_how_to_give_one(self):
        for env in {}, {'VOLUME_TOKEN': 'wrong'}:
            words = self.refused('list', env=env)
            self.assertIn('--token-file', words)
            self.assertNotIn('wrong', words)

    def test_a_project_sees_its_own_and_an_administrator_all(self):
        jo, boss = {'VOLUME_TOKEN': 'jo'}, {'VOLUME_TOKEN': 'boss'}
        name = self.name()
        made = self.json('create', '--name', name, '--size', '1M', env=jo)
        self.assertEqual('shop', made['project_id'])
        self.refused('show', name, code=3, env=boss)
        for words in (
            ('list', '--all-projects'), ('--project', 'shop', 'list'),
        ):
            self.assertEqual(
                [made], self.json(*words, '--name', name, env=boss)
            )
        self.assertEqual(
            [made], self.json('list', '--name', name,
                              env={**boss, 'VOLUME_PROJECT': 'shop'}),
        )
        # It is not told what backends are made of, and is well served.
        self.assertIsNone(self.json('backends', env=jo)[0]['driver'])
        self.volume('pools', env=jo)
        self.assertIn('broken is down', self.volume(
            'status', env=jo, code=1
        ).stderr)
        self.volume('list', '--all-projects', env=jo)
        self.volume('jobs', env=jo)
        self.refused('force-detach', name, env=jo)
        self.refused('delete', name, '--force', env=jo)
        self.volume('delete', name, env=jo)


class Words(unittest.TestCase):

    def test_a_token_that_would_be_two_headers_is_refused(self):
        for token in 'a\nb: c', 'é':
            done = commands.run('list', env={'VOLUME_TOKEN': token})
            self.assertEqual(2, done.returncode)
            self.assertNotIn('Traceback', done.stderr)


def answers(test, answer):
    """Return the URL of a server that answers all with these bytes."""
    listening = socket.create_server(('127.0.0.1', 0))
    address = listening.getsockname()
    ended = threading.Event()

    def serve():
        while True:
            peer, _ = listening.accept()
            with peer:
                if ended.is_set():
                    return
                hear(peer)
                peer.sendall(answer)

    def end():
        # A greenthread that accepts is woken by a connection alone.
        ended.set()
        socket.create_connection(address).close()
        thread.join()
        listening.close()

    thread = threading.Thread(target=serve)
    thread.start()
    test.addCleanup(end)
    return f'http://127.0.0.1:{address[1]}/v3'


def hear(peer):
    """Read a whole request: who hangs up on a part of it sends a reset,
    which may overtake the answer.
    """
    with peer.makefile('rb') as stream:
        stream.readline()
        length = http.client.parse_headers(stream)['Content-Length']
        stream.read(int(length or 0))


if __name__ == '__main__':
    unittest.main()
