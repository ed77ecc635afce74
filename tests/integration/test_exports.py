# SPDX-License-Identifier: Apache-2.0
"""Exporters and connectors, with the tools that hosts use."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from typing import Any

from tests import ports
from volume import errors
from volume import ids
from volume import model
from volume.blockd import Blockd
from volume.connector.base import Connector
from volume.connector.local import LocalConnector
from volume.connector.nbd import NbdConnector
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.base import Source
from volume.exports.local import LocalExporter
from volume.exports.nbd import NbdExporter
from volume.nbd import NbdClient
from volume.node import Node

MIB = 1 << 20
SIZE = 4 * MIB
COMMAND_S = 30
NOBODY = 65534
HOST = model.Host('h1')
OTHER = model.Host('h2')
PROGRAMS = ('qemu-storage-daemon', 'qemu-img', 'qemu-io', 'nbdinfo')
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
WRITE, READ = model.Access.WRITE, model.Access.READ


def run(*argv: str) -> str:
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=COMMAND_S
    ).stdout


def mounted_device() -> str:
    """Return a block device that is mounted here; nothing if none is."""
    with open('/proc/self/mountinfo') as f:
        for line in f:
            major, _, minor = line.split(' ')[2].partition(':')
            name = os.path.realpath(f'/sys/dev/block/{major}:{minor}')
            path = f'/dev/{os.path.basename(name)}'
            if os.path.exists(name) and os.path.exists(path):
                return path
    return ''


@contextlib.contextmanager
def opened(path: str, *flags: str) -> Iterator[None]:
    """Have a QEMU of this user that has a raw file open."""
    with subprocess.Popen(
        ['qemu-io', '-f', 'raw', *flags, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as user:
        assert user.stdin and user.stdout
        user.stdin.write(b'length\n')
        user.stdin.flush()
        while b'MiB' not in user.stdout.readline():
            assert user.poll() is None, 'qemu-io has ended'
        try:
            yield
        finally:
            user.stdin.close()


def wanted(
    attachment_id: str, source: Source, host: model.Host,
    access: model.Access,
) -> Export:
    """Return what is exported, of a volume that has the attachment's id."""
    return Export(
        attachment_id, attachment_id, source, host, access, SIZE
    )


class ExportsCase(unittest.TestCase):
    def setUp(self) -> None:
        self.root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        self.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        self.node = self.fresh_node()
        self.addCleanup(self.node.blockd.stop)
        self.path = os.path.join(self.root, 'volume')
        with open(self.path, 'wb') as f:
            f.write(b'a volume')
            f.truncate(SIZE)
        self.own_id = ids.new()

    def fresh_node(self) -> Any:
        """Return what a restarted service would have."""
        node = Node(self.root)
        node.blockd = Blockd(node, os.path.join(self.root, 'blockd'))
        return node

    def qcow2(self, name: str, below: str | None = None) -> str:
        path = os.path.join(self.root, name)
        backing = ['-b', below, '-F', 'qcow2'] if below else []
        run('qemu-img', 'create', '-q', '-f', 'qcow2', *backing, path,
            str(SIZE))
        return path


class Claims(abc.ABC):
    """What holds for every exporter; a mixin of the two cases below."""

    id: str
    path: str

    @abc.abstractmethod
    def exporter(self) -> Exporter:
        """Return the one that is tried."""

    @abc.abstractmethod
    def connector(self) -> Connector:
        """Return the host's side of it."""

    def source(self) -> Source:
        return model.Device(self.path, False, 'raw')

    def test_check_may_be_repeated(self: Any) -> None:
        exporter = self.exporter()
        exporter.check()
        exporter.check()

    def test_what_was_exported_is_attached_and_read_by_qemu(
        self: Any
    ) -> None:
        connection = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, WRITE
        ))
        found = self.connector().attach(connection)
        self.assertEqual(found, self.connector().attach(connection))
        size = json.loads(run(
            'qemu-img', 'info', '-f', 'raw', '--output', 'json', found
        ))['virtual-size']
        self.assertEqual(SIZE, size)
        run('qemu-io', '-f', 'raw', '-c', 'write -P 7 1M 64k', found)
        with open(self.path, 'rb') as f:
            f.seek(MIB)
            self.assertEqual(b'\7' * 65536, f.read(65536))
        self.connector().detach(connection)

    def test_export_again_is_the_same_connection(self: Any) -> None:
        first = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, WRITE
        ))
        again = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, WRITE
        ))
        self.assertEqual(first, again)
        self.assertEqual({self.own_id}, self.exporter().exported())

    def test_export_of_another_source_is_a_conflict(self: Any) -> None:
        other = os.path.join(self.root, 'other')
        shutil.copy(self.path, other)
        exporter = self.exporter()
        exporter.export(wanted(self.own_id, self.source(), HOST, WRITE))
        for source, access in (
            (model.Device(other, False, 'raw'), WRITE),
            (self.source(), READ),
        ):
            with self.assertRaises(errors.Conflict):
                exporter.export(wanted(self.own_id, source, HOST, access))
        self.assertEqual({self.own_id}, exporter.exported())

    def test_connection_is_plain_json(self: Any) -> None:
        connection = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, READ
        ))
        self.assertEqual(self.connector().protocol, connection.protocol)
        self.assertEqual(
            connection.fields, json.loads(json.dumps(connection.fields))
        )
        self.assertEqual('ro', connection.fields['access'])

    def test_exports_outlive_the_service(self: Any) -> None:
        connection = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, WRITE
        ))
        self.node = self.fresh_node()
        exporter = self.exporter()
        exporter.check()
        self.assertEqual({self.own_id}, exporter.exported())
        self.connector().attach(connection)
        exporter.unexport(self.own_id)
        self.assertEqual(set(), exporter.exported())

    def test_unexport_of_what_is_gone_succeeds(self: Any) -> None:
        exporter = self.exporter()
        exporter.unexport(self.own_id)
        exporter.export(wanted(self.own_id, self.source(), HOST, WRITE))
        exporter.unexport(self.own_id)
        exporter.unexport(self.own_id)
        self.assertEqual(set(), exporter.exported())

    def test_one_hosts_export_ends_alone(self: Any) -> None:
        exporter, other = self.exporter(), ids.new()
        exporter.export(wanted(self.own_id, self.source(), HOST, WRITE))
        left = exporter.export(wanted(other, self.source(), OTHER, WRITE))
        exporter.unexport(self.own_id)
        self.assertEqual({other}, exporter.exported())
        found = self.connector().attach(left)
        run('qemu-io', '-f', 'raw', '-c', 'read -P 0 1M 64k', found)

    def test_attachment_that_is_no_id_is_refused(self: Any) -> None:
        for name in '', '../x', 'p-x', 'x' * 36:
            with self.subTest(name), self.assertRaises(errors.Invalid):
                self.exporter().export(wanted(
                    name, self.source(), HOST, WRITE
                ))
            with self.subTest(name), self.assertRaises(errors.Invalid):
                self.exporter().unexport(name)

    def test_absent_file_is_not_found(self: Any) -> None:
        source = model.Device(os.path.join(self.root, 'none'), False)
        with self.assertRaises(errors.NotFound):
            self.exporter().export(wanted(self.own_id, source, HOST, WRITE))
        self.assertEqual(set(), self.exporter().exported())

    def test_connection_of_another_protocol_is_refused(self: Any) -> None:
        for connection in (
            model.Connection('iscsi', {'uri': 'x', 'path': '/x'}),
            model.Connection(self.connector().protocol, {}),
        ):
            with self.assertRaises(errors.Invalid):
                self.connector().attach(connection)
            with self.assertRaises(errors.Invalid):
                self.connector().detach(connection)

    def test_host_has_a_name(self: Any) -> None:
        self.assertTrue(self.connector().host().name)


@unittest.skipIf(MISSING, f'not installed: {", ".join(MISSING)}')
class NbdExporterTest(Claims, ExportsCase):
    def exporter(self) -> NbdExporter:
        return NbdExporter(None, self.node)

    def connector(self) -> NbdConnector:
        return NbdConnector(self.node)

    def test_old_url_no_longer_reads_after_unexport(self) -> None:
        exporter = self.exporter()
        connection = exporter.export(wanted(
            self.own_id, self.source(), HOST, WRITE
        ))
        uri = self.connector().attach(connection)
        with contextlib.closing(NbdClient(uri)) as session:
            buffer = bytearray(8)
            session.pread_into(buffer, 0)
            self.assertEqual(b'a volume', buffer)
            exporter.unexport(self.own_id)
            with self.assertRaises(errors.Unknown):
                session.pread_into(buffer, 0)
        with self.assertRaises(subprocess.CalledProcessError):
            run('nbdinfo', uri)
        with self.assertRaises(errors.NotFound):
            self.connector().attach(connection)

    def test_fields_say_where_the_export_is(self) -> None:
        fields = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, WRITE
        )).fields
        directory = os.path.join(self.root, 'blockd')
        self.assertEqual(
            {
                'uri': f'nbd+unix:///{self.own_id}?socket={directory}/nbd',
                'export': self.own_id, 'socket': f'{directory}/nbd',
                'access': 'rw',
            },
            fields,
        )

    def test_fields_of_a_tcp_server_are_host_and_port(self) -> None:
        port = ports.free()
        self.node.blockd = Blockd(
            self.node, os.path.join(self.root, 't'), tcp=f'127.0.0.1:{port}'
        )
        self.addCleanup(self.node.blockd.stop)
        connection = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, READ
        ))
        self.assertEqual('127.0.0.1', connection.fields['host'])
        self.assertEqual(port, connection.fields['port'])
        self.assertTrue(
            json.loads(run(
                'nbdinfo', '--json', self.connector().attach(connection)
            ))['exports'][0]['is_read_only']
        )

    def test_chain_is_exported_whole(self) -> None:
        base = self.qcow2('base')
        run('qemu-io', '-f', 'qcow2', '-c', 'write -P 9 0 64k', base)
        top = self.qcow2('top', below=base)
        node: dict[str, Any] = {
            'driver': 'qcow2', 'file': {'driver': 'file', 'filename': top},
            'backing': {
                'driver': 'qcow2', 'backing': None,
                'file': {'driver': 'file', 'filename': base},
            },
        }
        connection = self.exporter().export(wanted(
            self.own_id, node, HOST, WRITE
        ))
        uri = self.connector().attach(connection)
        out = run('qemu-io', '-f', 'raw', '-c', 'read -P 9 0 64k', uri)
        self.assertNotIn('verification failed', out)

    def test_qcow2_device_is_served_by_its_format(self) -> None:
        device = model.Device(self.qcow2('q'), False, 'qcow2')
        connection = self.exporter().export(wanted(
            self.own_id, device, HOST, WRITE
        ))
        size = json.loads(run(
            'nbdinfo', '--json', str(connection.fields['uri'])
        ))['exports'][0]['export-size']
        self.assertEqual(SIZE, size)

    def test_qcow2_device_that_hides_a_backing_file_is_refused(self) -> None:
        top = self.qcow2('top', below=self.qcow2('base'))
        device = model.Device(top, False, 'qcow2')
        with self.assertRaises(errors.Corrupt):
            self.exporter().export(wanted(self.own_id, device, HOST, WRITE))

    def test_private_exports_are_not_attachments(self) -> None:
        node = {
            'driver': 'raw', 'file': {'driver': 'file', 'filename': self.path}
        }
        with self.node.blockd.private('p-1', node, False):
            self.assertEqual(set(), self.exporter().exported())

    def test_check_takes_no_news_from_whoever_restores(self) -> None:
        self.exporter().check()
        self.assertTrue(self.node.blockd.ensure())

    def test_promise_of_writing_is_proved(self) -> None:
        connection = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, READ
        ))
        lie = model.Connection('nbd', {**connection.fields, 'access': 'rw'})
        with self.assertRaises(errors.Invalid):
            self.connector().attach(lie)

    def test_dead_server_is_unavailable_to_a_host(self) -> None:
        connection = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, READ
        ))
        self.node.blockd.stop()
        with self.assertRaises(errors.Unavailable):
            self.connector().attach(connection)
        self.exporter().unexport(self.own_id)

    def test_node_without_a_daemon_is_unavailable(self) -> None:
        self.node.blockd = None
        with self.assertRaises(errors.Unavailable):
            self.exporter().check()


@unittest.skipIf(MISSING, f'not installed: {", ".join(MISSING)}')
class LocalExporterTest(Claims, ExportsCase):
    def exporter(self) -> LocalExporter:
        return LocalExporter(None, self.node)

    def connector(self) -> LocalConnector:
        return LocalConnector(self.node)

    def test_fields_are_path_format_and_access(self) -> None:
        device = model.Device(self.qcow2('q'), False, 'qcow2')
        self.assertEqual(
            {
                'path': os.path.join(self.root, 'q'), 'format': 'qcow2',
                'access': 'rw',
            },
            self.exporter().export(wanted(
                self.own_id, device, HOST, WRITE
            )).fields,
        )

    def test_pointer_is_told_as_what_it_means_now(self) -> None:
        pointer = os.path.join(self.root, 'pointer')
        os.symlink(self.path, pointer)
        connection = self.exporter().export(wanted(
            self.own_id, model.Device(pointer, False), HOST, WRITE
        ))
        self.assertEqual(self.path, connection.fields['path'])

    def test_device_keeps_the_name_that_its_storage_gave_it(self) -> None:
        device = mounted_device()
        if not device:
            self.skipTest('no device is mounted here that has a name')
        name = os.path.join(self.root, 'vg-volume')
        os.symlink(device, name)
        for source in (
            model.Device(name, True),
            {'driver': 'raw', 'file': {
                'driver': 'host_device', 'filename': name,
            }},
        ):
            with self.subTest(source):
                connection = self.exporter().export(wanted(
                    self.own_id, source, HOST, READ
                ))
                self.assertEqual(name, connection.fields['path'])
        # After a start of the machine its number is another's, perhaps.
        os.unlink(name)
        os.symlink('/dev/null', name)
        self.assertEqual(name, self.exporter().export(wanted(
            self.own_id, model.Device(name, True), HOST, READ
        )).fields['path'])

    def test_device_that_went_with_the_machine_s_start_is_made_again(
        self
    ) -> None:
        self.exporter().export(wanted(
            self.own_id, model.Device('/dev/null', True), HOST, WRITE
        ))
        self.assertEqual({self.own_id}, self.exporter().exported())
        self.rewrite(path='/dev/mapper/no-such-volume')
        self.assertEqual(set(), self.exporter().exported())

    def test_record_by_an_older_name_of_the_same_file_is_renewed(
        self
    ) -> None:
        pointer = os.path.join(self.root, 'pointer')
        os.symlink(self.path, pointer)
        self.exporter().export(wanted(
            self.own_id, self.source(), HOST, WRITE
        ))
        self.rewrite(path=pointer)
        for _ in range(2):
            self.exporter().export(wanted(
                self.own_id, self.source(), HOST, WRITE
            ))
        with open(self.record()) as f:
            self.assertEqual(self.path, json.load(f)['path'])

    def test_device_that_is_mounted_is_not_taken_away(self) -> None:
        device = mounted_device()
        if not device or os.getuid():
            self.skipTest('not root, or no device is mounted here')
        self.exporter().export(wanted(
            self.own_id, model.Device(device, True), HOST, WRITE
        ))
        with self.assertRaisesRegex(errors.Busy, 'mounted on'):
            self.exporter().unexport(self.own_id)
        self.assertEqual({self.own_id}, self.exporter().exported())

    def record(self) -> str:
        return os.path.join(self.root, 'local', f'{self.own_id}.json')

    def rewrite(self, **fields: str) -> None:
        with open(self.record()) as f:
            there = json.load(f)
        with open(self.record(), 'w') as f:
            json.dump({**there, **fields}, f)

    def test_block_node_of_one_file_is_a_path(self) -> None:
        node = {
            'driver': 'raw', 'file': {'driver': 'file', 'filename': self.path}
        }
        fields = self.exporter().export(wanted(
            self.own_id, node, HOST, WRITE
        )).fields
        self.assertEqual((self.path, 'raw'),
                         (fields['path'], fields['format']))

    def test_block_node_of_more_than_one_file_is_unsupported(self) -> None:
        leaf = {'driver': 'file', 'filename': self.path}
        base = {'driver': 'qcow2', 'file': leaf, 'backing': None}
        for node in (
            {'driver': 'qcow2', 'file': leaf, 'backing': base},
            {'driver': 'raw', 'file': leaf, 'offset': 512},
            {'driver': 'raw', 'file': {'driver': 'rbd', 'pool': 'p'}},
        ):
            with self.assertRaisesRegex(errors.Unsupported, 'nbd'):
                self.exporter().export(wanted(self.own_id, node, HOST, WRITE))
        self.assertEqual(set(), self.exporter().exported())

    def test_path_that_a_process_has_open_is_not_taken_away(self) -> None:
        exporter = self.exporter()
        exporter.export(wanted(self.own_id, self.source(), HOST, WRITE))
        with open(self.path, 'rb') as f:
            user = subprocess.Popen(
                ['sleep', '60'], stdin=f, stdout=subprocess.DEVNULL
            )
        try:
            with self.assertRaisesRegex(errors.Busy, str(user.pid)):
                exporter.unexport(self.own_id)
            self.assertEqual({self.own_id}, exporter.exported())
        finally:
            user.kill()
            user.wait()
        exporter.unexport(self.own_id)
        self.assertEqual(set(), exporter.exported())

    def test_path_that_another_user_s_qemu_has_open_is_kept(self) -> None:
        if os.getuid():
            self.skipTest('not root: there are no two users')
        os.chmod(self.root, 0o777)
        os.chmod(self.path, 0o666)
        self.exporter().check()
        for access, flag in ((WRITE, ()), (READ, ('-r',))):
            own_id = ids.new()
            self.exporter().export(wanted(own_id, self.source(), HOST, access))
            for top, _, names in os.walk(os.path.join(self.root, 'local')):
                for path in top, *(os.path.join(top, n) for n in names):
                    os.chown(path, NOBODY, NOBODY)
            with opened(self.path, *flag), self.subTest(access):
                self.assertRegex(
                    self.unexport_as_nobody(own_id), 'Busy.*in use')
                self.assertEqual({own_id}, self.exporter().exported())
            self.assertEqual('', self.unexport_as_nobody(own_id))
            self.assertEqual(set(), self.exporter().exported())

    def unexport_as_nobody(self, attachment_id: str) -> str:
        """Return the error of the same call by another user."""
        code = (
            'import os, sys\n'
            'from volume import errors\n'
            'from volume.exports.local import LocalExporter\n'
            'from volume.node import Node\n'
            # Not before: this user may have no way to the checkout.
            f'os.setgroups([])\nos.setgid({NOBODY})\nos.setuid({NOBODY})\n'
            'try:\n'
            '    exporter = LocalExporter(None, Node(sys.argv[1]))\n'
            '    exporter.unexport(sys.argv[2])\n'
            'except errors.VolumeError as failed:\n'
            '    print(repr(failed))\n'
        )
        return subprocess.run(
            [sys.executable, '-c', code, self.root, attachment_id],
            cwd=os.getcwd(), check=True, capture_output=True, text=True,
            timeout=COMMAND_S,
        ).stdout

    def test_path_that_the_other_attachment_uses_is_let_go_of(self) -> None:
        exporter, other = self.exporter(), ids.new()
        exporter.export(wanted(self.own_id, self.source(), HOST, WRITE))
        exporter.export(wanted(other, self.source(), OTHER, WRITE))
        with open(self.path, 'rb') as f:
            user = subprocess.Popen(['sleep', '60'], stdin=f)
        try:
            exporter.unexport(self.own_id)
            with self.assertRaises(errors.Busy):
                exporter.unexport(other)
        finally:
            user.kill()
            user.wait()

    def test_broken_record_is_corrupt_and_kept(self) -> None:
        exporter = self.exporter()
        exporter.export(wanted(self.own_id, self.source(), HOST, WRITE))
        with open(self.record(), 'w') as f:
            f.write('{')
        self.assertEqual({self.own_id}, exporter.exported())
        with self.assertRaises(errors.Corrupt):
            exporter.unexport(self.own_id)
        self.assertTrue(os.path.exists(self.record()))

    def test_path_that_is_gone_is_not_found_by_the_host(self) -> None:
        connection = self.exporter().export(wanted(
            self.own_id, self.source(), HOST, WRITE
        ))
        os.unlink(self.path)
        with self.assertRaises(errors.NotFound):
            self.connector().attach(connection)

    def test_relative_path_is_refused_by_the_host(self) -> None:
        fields = {'path': 'volume', 'format': 'raw', 'access': 'rw'}
        with self.assertRaises(errors.Invalid):
            self.connector().attach(model.Connection('local', fields))


if __name__ == '__main__':
    unittest.main()
