# SPDX-License-Identifier: Apache-2.0
"""The nfs exporter: the guest's kernel serves, and mounts as two hosts.

A host is told from another by its address. One that mounts from an address
of its own machine comes from that same address; so the two hosts are the
guest's two addresses, each of which mounts from itself.
"""

from __future__ import annotations

import shlex
import subprocess
import unittest

from tests import lab
from tests.lab import case
from tests.lab import exports_case
from volume import errors
from volume import ids
from volume import model
from volume.exports.nfs import NfsExporter
from volume.testing import exports
from volume.testing import fixtures

POOL = '/srv/nfs'
MOUNTS = '/run/nfs-hosts'
OPTIONS = (
    'vers=4.2,soft,timeo=30,retrans=1,retry=0,nosharecache,'
    'lookupcache=none,noac'
)
# Holds the file open, and asks the server each time. Commands by line, as
# in the conformance suite: read OFFSET LENGTH, write OFFSET HEX.
CODE = (
    'import os, sys\n'
    'path = sys.argv[1]\n'
    'try: fd = os.open(path, os.O_RDWR | os.O_DIRECT)\n'
    'except OSError: fd = os.open(path, os.O_RDONLY | os.O_DIRECT)\n'
    'print("open", flush=True)\n'
    'for line in sys.stdin:\n'
    '    verb, offset, what = line.split()\n'
    '    if verb == "read":\n'
    '        print(os.pread(fd, int(what), int(offset)).hex(), flush=True)\n'
    '    else:\n'
    '        os.pwrite(fd, bytes.fromhex(what), int(offset))\n'
    '        os.fsync(fd)\n'
    '        print("done", flush=True)\n'
)


class NfsSession:
    """A host that has mounted the export, and has the file open."""

    def __init__(self, guest, address, connection):
        self.guest = guest
        self.point = f'{MOUNTS}/{ids.new()}'
        fields = connection.fields
        directory = fields['export'].partition(':')[2]
        guest.run('mkdir', '-p', self.point)
        try:
            guest.run('timeout', '60', 'mount', '-t', 'nfs', '-o', OPTIONS,
                      f'{address}:{directory}', self.point)
        except AssertionError:
            guest.run('rmdir', self.point)
            raise
        command = shlex.join(
            ['python3', '-c', CODE, f'{self.point}/{fields["name"]}']
        )
        self.child = subprocess.Popen(
            [*guest.ssh(), command], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        if self.child.stdout.readline() != 'open\n':
            self.close()
            raise OSError('the host cannot open the file')

    def read(self, offset_bytes, length_bytes):
        found = bytearray()
        while len(found) < length_bytes:
            size = min(256 << 10, length_bytes - len(found))
            found += bytes.fromhex(
                self.ask(f'read {offset_bytes + len(found)} {size}')
            )
        return bytes(found)

    def write(self, offset_bytes, data):
        self.ask(f'write {offset_bytes} {data.hex()}')

    def ask(self, line):
        self.child.stdin.write(f'{line}\n')
        self.child.stdin.flush()
        if not (answer := self.child.stdout.readline()):
            raise OSError(f'the host failed to {line:.40}')
        return answer.strip()

    def close(self):
        with self.child:
            self.child.stdin.close()
        self.guest.run('umount', '-f', '-l', self.point)
        self.guest.run('rmdir', self.point)


class NfsCase(exports_case.DeviceCase):
    """An exporter in front of the guest's NFS server, and two hosts of it."""

    size_bytes = 256 << 10
    host = model.Host('one', case.PORTALS[:1])
    other_host = model.Host('two', case.PORTALS[1:])

    @classmethod
    def setUpClass(cls):
        if not lab.FULL:
            raise unittest.SkipTest('the long form: VOLUME_LAB is not full')
        super().setUpClass()
        device = cls.spare[0]
        # Else nothing is opened for a minute and a half after each start.
        cls.guest.run('sh', '-c', (
            'systemctl stop nfs-kernel-server; modprobe nfsd; '
            'systemctl start proc-fs-nfsd.mount; '
            'cd /proc/fs/nfsd && echo 10 >nfsv4gracetime && '
            'echo 10 >nfsv4leasetime && systemctl start nfs-kernel-server'
        ))
        cls.guest.run('mkfs.ext4', '-q', '-F', device)
        cls.guest.run('mkdir', '-p', POOL)
        cls.guest.run('mount', device, POOL)
        cls.addClassCleanup(cls._unmount)

    @classmethod
    def _unmount(cls):
        cls.guest.run('systemctl', 'stop', 'nfs-kernel-server')
        cls.guest.run('umount', POOL)

    def setUp(self):
        self.addresses = {}
        super().setUp()

    def make_exporter(self, node=None):
        return NfsExporter(fixtures.settings(
            NfsExporter, nfs_address=case.PORTALS[0]
        ), node or self.node)

    def make_source(self, image):
        path = f'{POOL}/{ids.new()}.raw'
        self.write(path, 'x+b', image)
        self.addCleanup(self.node.unlink, path)
        return model.Device(path, is_block=False)

    def export(self, attachment_id, source=None, access=model.Access.WRITE,
               host=None):
        connection = super().export(attachment_id, source, access, host)
        self.addresses[connection.fields['export']] = (
            (host or self.host).addresses[0]
        )
        return connection

    def open_session(self, connection):
        address = self.addresses[connection.fields['export']]
        return NfsSession(self.guest, address, connection)


class NfsTest(exports.ExporterSuite, NfsCase):

    def test_another_host_cannot_mount_it(self):
        connection = self.export(self.attachment())
        with self.assertRaises(AssertionError):
            NfsSession(self.guest, case.PORTALS[1], connection)

    def test_host_makes_no_files_of_its_own(self):
        connection = self.export(self.attachment())
        with self.session(connection) as session:
            with self.assertRaises(AssertionError):
                self.guest.run('touch', f'{session.point}/mine')
            with self.assertRaises(AssertionError):
                self.guest.run(
                    'rm', '-f', f'{session.point}/{connection.fields["name"]}'
                )

    def test_host_without_an_address_is_refused(self):
        with self.assertRaises(errors.Invalid):
            self.exporter.export(self.wanted(
                self.attachment(), host=model.Host('nameless')
            ))

    def test_block_device_is_refused(self):
        source = model.Device('/dev/null', is_block=True)
        with self.assertRaises(errors.Unsupported):
            self.exporter.export(self.wanted(self.attachment(), source))

    def test_what_the_tools_have_forgotten_and_the_server_not_is_ended(self):
        attachment_id = self.attachment()
        with self.session(self.export(attachment_id)) as session:
            session.read(0, 4096)
            # As a tool leaves it that was ended between its two deeds.
            self.guest.run(
                'sed', '-i', f'/{attachment_id}/d', '/var/lib/nfs/etab')
            self.assertNotIn(attachment_id, self.exporter.exported())
            session.read(0, 4096)
            self.exporter.unexport(attachment_id)
            with self.assertRaises(OSError):
                session.read(0, 4096)

    def test_server_that_has_forgotten_often_forgets_at_once(self):
        # Each time counts as a second, so that it is minutes ahead of the
        # clock: until then it shows what it has forgotten.
        self.guest.run('bash', '-c', (
            'for each in {1..300}; do for table in export fh; do '
            'echo 1 > /proc/net/rpc/nfsd.$table/flush; done; done'
        ))
        attachment_id = self.attachment()
        with self.session(self.export(attachment_id)) as session:
            session.read(0, 4096)
            self.exporter.unexport(attachment_id)
            with self.assertRaises(OSError):
                session.read(0, 4096)

    def test_nothing_of_an_attachment_is_left(self):
        before = self.guest.run('find', POOL, '-name', 'volume-*')
        attachment_id = self.attachment()
        with self.session(self.export(attachment_id)):
            self.exporter.unexport(attachment_id)
        self.assertEqual(
            before, self.guest.run('find', POOL, '-name', 'volume-*')
        )
