# SPDX-License-Identifier: Apache-2.0
"""The host's side of NFS: the guest's client against the guest's server."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time

from tests.lab import case
from tests.lab import exports_case
from volume import errors
from volume import ids
from volume import model
from volume.connector.nfs import NfsConnector
from volume.remote.node import SshNode

DIRECTORY = '/srv/by-hand'
EXPORT = f'{case.PORTALS[0]}:{DIRECTORY}'
SIZE_BYTES = 1 << 20


class GuestNode(SshNode):
    """The guest; who may go first is settled on this machine."""

    locks = ''

    @property
    def lock_dir(self):
        return self.locks


class NfsConnectorTest(case.LabCase):

    disks = 0

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory(prefix='connector')
        cls.addClassCleanup(directory.cleanup)
        GuestNode.locks = directory.name
        cls.node = GuestNode(exports_case.target_of(cls.guest))
        cls.addClassCleanup(cls.node.close)
        cls.guest.run('mkdir', '-p', DIRECTORY)
        cls.guest.run('systemctl', 'start', 'nfs-server')
        cls.addClassCleanup(cls.guest.run, 'systemctl', 'stop', 'nfs-server')
        cls.serve()
        cls.addClassCleanup(cls.guest.run, 'exportfs', '-ua')

    @classmethod
    def serve(cls):
        cls.guest.run(
            'exportfs', '-o', 'rw,no_root_squash,insecure',
            f'{case.PORTALS[0]}:{DIRECTORY}',
        )

    def setUp(self):
        super().setUp()
        self.connector = NfsConnector(self.node)
        self.addCleanup(self.check_nothing_left)

    def check_nothing_left(self):
        self.assertEqual('', self.mounts())
        self.guest.run('find', DIRECTORY, '-type', 'f', '-delete')

    def mounts(self):
        return self.guest.run(
            'findmnt', '-nro', 'TARGET', '-t', 'nfs,nfs4', check=False
        ).strip()

    def volume(self, **more):
        name = f'volume-{ids.new()}'
        self.guest.run('truncate', '-s', str(SIZE_BYTES),
                       f'{DIRECTORY}/{name}')
        return model.Connection('nfs', {
            'export': EXPORT, 'name': name, 'options': '-o vers=4.2',
            'format': 'raw', **more,
        })

    def attach(self, connection):
        path = self.connector.attach(connection)
        self.addCleanup(self.connector.detach, connection)
        return path

    def test_what_is_written_is_in_the_file_and_the_mount_goes_last(self):
        one, two = self.volume(), self.volume()
        path = self.attach(one)
        self.assertEqual(path, self.connector.attach(one))
        other = self.attach(two)
        self.assertEqual(os.path.dirname(path), os.path.dirname(other))
        data = os.urandom(4096)
        self.guest.run('dd', f'of={path}', 'conv=notrunc', input_bytes=data)
        self.connector.detach(one)
        self.assertEqual('', self.connector.present(one))
        self.assertEqual(other, self.connector.present(two))
        self.assertEqual(data, self.guest.run_bytes(
            'head', '-c', '4096', f'{DIRECTORY}/{one.fields["name"]}'
        ))
        self.connector.detach(two)
        self.assertEqual('', self.mounts())

    def test_a_file_that_is_open_stays(self):
        connection = self.volume()
        path = self.attach(connection)
        holding = self.guest.start('sh', '-c', f'exec 3<{path}; echo; cat')
        holding.stdout.readline()
        try:
            with self.assertRaisesRegex(errors.Busy, 'cat'):
                self.connector.detach(connection)
        finally:
            holding.communicate()
        self.connector.detach(connection)

    def test_access_that_was_ended_is_only_cleaned_up(self):
        self.addCleanup(self.serve)
        one, two = self.volume(), self.volume()
        for connection in one, two:
            path = self.attach(connection)
            # What this host still keeps in its memory.
            self.guest.run(
                'dd', 'if=/dev/urandom', f'of={path}', 'bs=4096', 'count=4',
                'conv=notrunc', 'status=none',
            )
        holding = self.guest.start('sh', '-c', f'exec 3<>{path}; echo; cat')
        holding.stdout.readline()
        self.guest.run('exportfs', '-u', f'{case.PORTALS[0]}:{DIRECTORY}')
        try:
            self.connector.detach(one)
            self.assertNotEqual('', self.connector.present(two))
            self.connector.detach(two)
        finally:
            holding.communicate()
        for connection in one, two:
            self.assertEqual('', self.connector.present(connection))
        self.assertEqual('', self.mounts())

    def test_server_that_does_not_answer_is_told_of_in_time(self):
        connection = self.volume()
        path = self.attach(connection)
        self.guest.run('systemctl', 'stop', 'nfs-server')
        self.guest.run(
            'sh', '-c', 'echo 10 > /proc/fs/nfsd/nfsv4gracetime')
        try:
            with self.assertRaisesRegex(
                errors.Unavailable,
                f'{connection.fields["name"]} cannot be stored .*does not '
                'answer.*force-detach',
            ):
                self.connector.detach(connection)
            with self.assertRaisesRegex(errors.Unavailable, 'not answer'):
                self.connector.extend(connection)
            self.assertEqual(path, self.connector.present(connection))
        finally:
            self.guest.run('systemctl', 'start', 'nfs-server')
            self.serve()
        deadline = time.monotonic() + 240
        while self.mounts():
            self.assertLess(time.monotonic(), deadline)
            with contextlib.suppress(errors.Unavailable):
                self.connector.detach(connection)

    def test_what_is_not_there_or_too_small_leaves_no_mount(self):
        with self.assertRaises(errors.NotFound):
            self.connector.attach(self.volume(name='volume-of-nobody'))
        with self.assertRaises(errors.Conflict):
            self.connector.attach(self.volume(size_bytes=SIZE_BYTES + 1))
        # A link would lead to a file of this host.
        bad = self.volume(name='link')
        self.guest.run('ln', '-sf', '/etc/passwd', f'{DIRECTORY}/link')
        with self.assertRaises(errors.NotFound):
            self.connector.attach(bad)
        self.guest.run('rm', f'{DIRECTORY}/link')
        self.assertEqual('', self.mounts())
