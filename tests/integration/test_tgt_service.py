# SPDX-License-Identifier: Apache-2.0
"""The whole service with tgtd: from a request to a host's bytes, and back."""

import contextlib
import dataclasses
import os
import pathlib
import threading
import time
import unittest

from tests import iscsi
from tests import tgt
from tests.integration import serving
from volume import concurrency
from volume import errors
from volume import ids
from volume import model
from volume.exports.tgt_wire import Tgtd
from volume.node import Node
from volume.testing import fixtures

HOST = {'host': 'h1', 'initiator': 'iqn.2024-01.example:one'}
OTHER = {'host': 'h2', 'initiator': 'iqn.2024-01.example:two'}
COUNT = 1000 if os.environ.get('VOLUME_PROOF') else 40


class Case(unittest.TestCase):
    chap = 'mutual'
    settings = ''

    def setUp(self):
        tgt.need(self)
        self.portal = tgt.free_portal()
        pool = fixtures.plain_directory(self)
        self.world = serving.World(
            self, names='san', settings=self.settings, sections=(
                f'[san]\ndriver = file\ndirectories = {pool}\n'
                'oversubscription = 1000\n'
                f'exporter = tgt\niscsi_portals = {self.portal}\n'
                f'chap = {self.chap}\n'
            ),
        )
        self.ask = self.world.ask
        self.state = Node(os.path.join(self.world.directory, 'state'))
        self.addCleanup(tgt.end, self.state)
        self.tgtd = Tgtd(self.state, f'{self.state.state_dir}/tgtd/socket.0')

    def make(self):
        return self.world.make(size=None, size_bytes=model.MIB)['id']

    def attach(self, volume_id, connector=None, mode='rw'):
        """Return the attachment and how its host connects."""
        made = self.ask('POST', '/v3/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': ids.new(),
            'connector': connector or HOST, 'mode': mode,
        }})
        self.assertEqual(200, made.status, made.text)
        row = made.json['attachment']
        self.ask('POST', f'/v3/attachments/{row["id"]}/action', {
            'os-complete': None,
        })
        return row['id'], row['connection_info']

    def detach(self, attachment_id):
        answer = self.ask('DELETE', f'/v3/attachments/{attachment_id}')
        self.assertEqual(200, answer.status, answer.text)

    def login(self, info, **changes):
        told = {
            key: value for key, value in info.items()
            if key.startswith('auth_')
        }
        made = iscsi.Login.of(
            model.Connection('iscsi', info, credentials=told),
            HOST['initiator'],
        )
        return dataclasses.replace(made, **changes)

    def enter(self, info, **changes):
        return contextlib.closing(iscsi.Session(self.login(info, **changes)))

    def assert_refused(self, info, **changes):
        with self.assertRaises(iscsi.Refused):
            with self.enter(info, **changes) as session:
                session.read(0, 512)

    def kill(self):
        """End the daemon as a crash does."""
        tgt.end(self.state)


class WayTest(Case):

    def test_host_is_let_in_by_what_it_was_told_and_by_nothing_else(self):
        attachment_id, info = self.attach(self.make())
        for what, changes in {
            'no CHAP': {'username': '', 'mutual_username': ''},
            'wrong password': {'password': 'x' * 16},
            'wrong initiator': {'initiator': OTHER['initiator']},
            'wrong target': {'mutual_password': 'x' * 16},
        }.items():
            with self.subTest(what):
                self.assert_refused(info, **changes)
        with self.enter(info) as session:
            session.write(0, b'\xff' * 512)
            session.flush()
        with self.enter(info) as session:
            self.assertEqual(b'\xff' * 512, session.read(0, 512))
            self.detach(attachment_id)
            with self.assertRaises(iscsi.Refused):
                session.read(0, 512)
        self.assert_refused(info)

    def test_next_host_gets_the_bytes_and_the_former_one_nothing(self):
        volume_id = self.make()
        attachment_id, first = self.attach(volume_id)
        with self.enter(first) as session:
            session.write(0, b'\xff' * 512)
        self.detach(attachment_id)
        _, second = self.attach(volume_id, OTHER)
        self.assert_refused(first)
        self.assert_refused(second)  # as the first host
        with self.enter(second, initiator=OTHER['initiator']) as session:
            self.assertEqual(b'\xff' * 512, session.read(0, 512))
            self.assertEqual(volume_id, session.serial)

    def test_read_only_attachment_cannot_be_written_through(self):
        _, info = self.attach(self.make(), mode='ro')
        with self.enter(info) as session:
            self.assertEqual(bytes(512), session.read(0, 512))
            with self.assertRaises(iscsi.Refused):
                session.write(0, b'\xff' * 512)

    def test_host_without_initiator_is_refused_and_nothing_is_left(self):
        volume_id = self.make()
        made = self.ask('POST', '/v3/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': ids.new(),
            'connector': {'host': 'h3'},
        }})
        self.assertEqual(400, made.status, made.text)
        self.assertIn('initiator', made.message)
        self.assertEqual('', self.tgtd.listing())


class SecretsTest(Case):

    def test_no_password_stands_in_arguments_logs_or_the_database(self):
        # A greenthread that never waits would let nobody else go on.
        threads = concurrency.native()
        seen, is_over = set(), threads.Event()

        def sample():
            while not is_over.is_set():
                for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
                    with contextlib.suppress(OSError):
                        seen.add(path.read_bytes())

        volume_id = self.make()
        passwords = set()
        sampler = threads.Thread(target=sample)
        with self.assertLogs(level='DEBUG') as logs:
            sampler.start()
            try:
                for _ in range(100):
                    attachment_id, info = self.attach(volume_id)
                    passwords |= {
                        info['auth_password'], info['auth_mutual_password']
                    }
                    self.detach(attachment_id)
            finally:
                is_over.set()
                sampler.join()
        self.assertEqual(200, len(passwords))
        ours = pathlib.Path('/proc/self/cmdline').read_bytes()
        self.assertIn(ours, seen, 'nothing was looked at')
        text = b'\n'.join(seen) + '\n'.join(logs.output).encode()
        for path in pathlib.Path(self.world.directory).rglob('*'):
            if path.is_file() and path.suffix != '.raw':
                text += path.read_bytes()
        self.assertEqual([], [
            each for each in passwords if each.encode() in text
        ])


class RestartTest(Case):
    settings = 'stats_interval_s = 1\n'
    chap = 'one-way'

    def test_all_exports_come_back_though_the_daemon_dies_again(self):
        there = dict(self.attach(self.make()) for _ in range(COUNT))
        exporter = self.world.service.runner.backends['san'].exporter
        before = exporter.exported()
        self.assertEqual(set(there), before)
        started = threading.Event()

        def kill_again():
            # In the midst of what comes back, if it can be met there.
            deadline = time.monotonic() + 60
            self.kill()
            while time.monotonic() < deadline:
                with contextlib.suppress(errors.VolumeError):
                    count = self.tgtd.listing().count('Target ')
                    if count:
                        self.kill()
                        break
            started.set()

        killer = threading.Thread(target=kill_again)
        killer.start()
        killer.join()
        self.assertTrue(started.is_set())

        def exported():
            try:
                return exporter.exported()
            except errors.VolumeError as failed:
                return failed

        serving.until(exported, lambda found: found == set(there))
        for info in list(there.values())[:5]:
            with self.enter(info) as session:
                self.assertEqual(bytes(512), session.read(0, 512))
            self.assert_refused(info, password='x' * 16)

    def test_restarted_service_finds_its_exports_and_a_host_goes_on(self):
        attachment_id, info = self.attach(self.make())
        with self.enter(info) as session:
            self.world.stop()
            self.assertEqual(bytes(512), session.read(0, 512))
            self.world.start()
            self.assertEqual(bytes(512), session.read(0, 512))
            exporter = self.world.service.runner.backends['san'].exporter
            self.assertEqual({attachment_id}, exporter.exported())
