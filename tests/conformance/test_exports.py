# SPDX-License-Identifier: Apache-2.0
"""The exporters: a path of this node, and NBD."""

import os
import subprocess
import sys
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.exports import local
from volume.exports import nbd
from volume.nbd import NbdClient
from volume.testing import exports
from volume.testing import fixtures


class RawFiles:
    """Sources that are raw files."""

    def setUp(self):
        self.node = fixtures.make_node(self)
        super().setUp()

    def make_source(self, image):
        path = os.path.join(self.node.state_dir, f'{ids.new()}.raw')
        with open(path, 'wb') as f:
            f.write(image)
        return model.Device(path, is_block=False)


class NbdSession:
    """A host that reads and writes over NBD."""

    def __init__(self, connection):
        self.client = NbdClient(connection.fields['uri'])
        self.close = self.client.close

    def read(self, offset_bytes, length_bytes):
        buffer = bytearray(length_bytes)
        self.client.pread_into(buffer, offset_bytes)
        return bytes(buffer)

    def write(self, offset_bytes, data):
        self.client.pwrite(data, offset_bytes)
        self.client.flush()


class NbdTest(RawFiles, exports.ExporterSuite, unittest.TestCase):

    def setUp(self):
        super().setUp()
        self.assertFalse(self.exporter.options)

    def make_exporter(self):
        if self.node.blockd is None:
            fixtures.serve_blocks(self, self.node)
        return nbd.NbdExporter(None, self.node)

    def open_session(self, connection):
        return NbdSession(connection)


class NbdOfBlockNodesTest(NbdTest):
    """The same, from what a driver with BlockNode gives."""

    def make_source(self, image):
        device = super().make_source(image)
        file = {'driver': 'file', 'filename': device.path}
        return {'driver': 'raw', 'file': file}


class PathSession:
    """Another process of this node that has the path open."""

    # Commands by line: read OFFSET LENGTH, write OFFSET HEX.
    CODE = (
        'import os, sys\n'
        'path, access = sys.argv[1:]\n'
        'fd = os.open(path, os.O_RDWR if access == "rw" else os.O_RDONLY)\n'
        'print("open", flush=True)\n'
        'for line in sys.stdin:\n'
        '    verb, offset, what = line.split()\n'
        '    if verb == "read":\n'
        '        print(os.pread(fd, int(what), int(offset)).hex(),'
        ' flush=True)\n'
        '    else:\n'
        '        os.pwrite(fd, bytes.fromhex(what), int(offset))\n'
        '        print("done", flush=True)\n'
    )

    def __init__(self, connection):
        fields = connection.fields
        assert fields['format'] == 'raw'
        self.child = subprocess.Popen(
            [sys.executable, '-c', self.CODE, fields['path'],
             fields['access']],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )
        if self.child.stdout.readline() != 'open\n':
            self.close()
            raise OSError('the host cannot open the path')

    def read(self, offset_bytes, length_bytes):
        return bytes.fromhex(self.ask(f'read {offset_bytes} {length_bytes}'))

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


class LocalTest(RawFiles, exports.ExporterSuite, unittest.TestCase):

    def make_exporter(self):
        return local.LocalExporter(None, self.node)

    def open_session(self, connection):
        return PathSession(connection)

    def test_session_of_another_attachment_keeps_nothing_busy(self):
        one, two = self.attachment(), self.attachment()
        self.export(one)
        with self.session(self.export(two)):
            self.exporter.unexport(one)
            with self.assertRaises(errors.Busy):
                self.exporter.unexport(two)

    def test_chain_of_layers_is_no_path(self):
        chain = {
            'driver': 'qcow2',
            'file': {'driver': 'file', 'filename': self.source.path},
            'backing': {
                'driver': 'raw',
                'file': {'driver': 'file', 'filename': self.source.path},
            },
        }
        with self.assertRaises(errors.Unsupported):
            self.export(self.attachment(), chain)
