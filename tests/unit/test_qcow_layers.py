# SPDX-License-Identifier: Apache-2.0
"""Headers of layers are believed only if they are as we make them."""

import os
import struct
import subprocess
import tempfile
import unittest

from volume import errors
from volume import ids
from volume.drivers import qcow_layers
from volume.drivers.qcow_pool import Layer
from volume.drivers.qcow_tree import Tree

MIB = 1 << 20
QEMU = {'qcow2': 'qcow2', 'raw': 'raw', 'vhd': 'vpc', 'vmdk': 'vmdk'}


class HeaderCase(unittest.TestCase):

    def setUp(self):
        super().setUp()
        self.root = self.enterContext(tempfile.TemporaryDirectory())

    def make(self, extension, *options, size_bytes=MIB):
        path = os.path.join(self.root, qcow_layers.new_name(extension))
        self.qemu('qemu-img', 'create', '-q', '-f', QEMU[extension],
                  *qcow_layers.FORMATS[extension].create, *options, path,
                  str(size_bytes))
        return path

    def qemu(self, *argv):
        subprocess.run(argv, check=True, capture_output=True, timeout=60)

    def read(self, path):
        return qcow_layers.read_header(path, qcow_layers.extension(path))

    def poke(self, path, offset, data):
        with open(path, 'rb+') as f:
            f.seek(offset)
            f.write(data)

    def assert_refused(self, path, words):
        with self.assertRaisesRegex(errors.Corrupt, words):
            self.read(path)


class Qcow2Test(HeaderCase):

    def test_size_and_backing_are_those_of_qemu(self):
        base = self.make('qcow2', size_bytes=MIB + 512)
        name = os.path.basename(base)
        over = self.make('qcow2', '-b', name, '-F', 'qcow2', '-u',
                         size_bytes=2 * MIB)
        self.assertEqual(MIB + 512, self.read(base).size_bytes)
        self.assertIsNone(self.read(base).backing)
        self.assertEqual(2 * MIB, self.read(over).size_bytes)
        self.assertEqual(name, self.read(over).backing)

    def test_all_kinds_that_qemu_makes_for_us_are_read(self):
        for options in (
            'cluster_size=4096', 'cluster_size=2M', 'preallocation=metadata',
            'lazy_refcounts=on', 'compression_type=zstd',
        ):
            self.assertEqual(
                MIB, self.read(self.make('qcow2', '-o', options)).size_bytes
            )

    def test_layer_is_empty_until_it_is_written(self):
        path = self.make('qcow2', size_bytes=1 << 40)
        self.assertTrue(qcow_layers.is_empty(path, self.read(path)))
        self.qemu('qemu-io', '-f', 'qcow2', '-c',
                  f'write -P 1 {(1 << 40) - 512} 512', path)
        self.assertFalse(qcow_layers.is_empty(path, self.read(path)))

    def test_zeros_over_a_backing_are_something(self):
        base = self.make('qcow2')
        path = self.make('qcow2', '-u', '-b', os.path.basename(base), '-F',
                         'qcow2')
        self.qemu('qemu-io', '-f', 'qcow2', '-c', 'write -z 0 64k', path)
        self.assertFalse(qcow_layers.is_empty(path, self.read(path)))

    def test_everything_unexpected_is_refused(self):
        other = self.make('qcow2')
        for words, offset, data in (
            ('version 3', 0, b'RFI'),
            ('version 3', 4, struct.pack('>I', 2)),
            ('encrypted', 32, struct.pack('>I', 1)),
            ('internal snapshots', 60, struct.pack('>I', 1)),
            ('corrupt', 72, struct.pack('>Q', 2)),
            ('features 0x4', 72, struct.pack('>Q', 4)),
            ('features 0x10', 72, struct.pack('>Q', 16)),
            ('features', 72, struct.pack('>Q', 1 << 40)),
            ('multiple', 24, struct.pack('>Q', MIB + 1)),
            ('multiple', 24, struct.pack('>Q', 0)),
            ('no sense', 20, struct.pack('>I', 40)),
            ('no sense', 100, struct.pack('>I', 1 << 30)),
            ('no sense', 40, struct.pack('>Q', 77)),
            ('no sense', 36, struct.pack('>I', 1 << 31)),
            ('extension', 112, struct.pack('>II', 0x44415441, 8)),
            ('extension', 112, struct.pack('>II', 0x6803F857, 1 << 31)),
        ):
            path = self.make('qcow2')
            self.poke(path, offset, data)
            self.assert_refused(path, words)
        self.read(other)

    def test_backing_that_is_no_layer_is_refused(self):
        for name in (
            '/etc/passwd', '../secret.qcow2', f'../{ids.new()}.qcow2',
            'json:{"driver":"file"}', 'nbd://host/x', f'{ids.new()}.raw',
            f'{ids.new()}.qcow2/x', f'{ids.new()}.qcow2\n',
        ):
            path = self.make('qcow2', '-u', '-b', name, '-F', 'qcow2')
            self.assert_refused(path, 'backing file')

    def test_backing_without_or_of_another_format_is_refused(self):
        path = self.make('qcow2', '-u', '-b', f'{ids.new()}.qcow2', '-F',
                         'raw')
        self.assert_refused(path, 'does not say')

    def test_cut_and_random_headers_are_refused(self):
        path = self.make('qcow2')
        for length in 0, 3, 50, 103:
            os.truncate(path, length)
            self.assert_refused(path, 'too short')
        for _ in range(50):
            with open(path, 'wb') as f:
                f.write(b'QFI\xfb\0\0\0\3' + os.urandom(4096))
            self.assert_refused(path, 'is no qcow2')


class OtherFormatTest(HeaderCase):

    def test_sizes_are_those_that_were_asked_for(self):
        for extension in 'raw', 'vhd', 'vmdk':
            for size_bytes in MIB, MIB + 512, 77 * 512:
                path = self.make(extension, size_bytes=size_bytes)
                header = self.read(path)
                self.assertEqual(size_bytes, header.size_bytes, extension)

    def test_fixed_vhd_is_read_from_its_end(self):
        path = self.make('vhd', '-o', 'subformat=fixed,force_size=on')
        self.assertEqual(MIB, self.read(path).size_bytes)

    def test_vhd_whose_size_qemu_would_guess_is_refused(self):
        path = self.make('vhd')
        self.poke(path, 28, b'vbox')
        self.assert_refused(path, 'uncertain')

    def test_vhd_that_needs_another_is_refused(self):
        path = self.make('vhd')
        self.poke(path, 60, struct.pack('>I', 4))
        self.assert_refused(path, 'type 4')

    def test_vmdk_of_several_files_is_refused(self):
        path = self.make('vmdk', '-o', 'subformat=twoGbMaxExtentSparse')
        self.assert_refused(path, 'no header')

    def test_vmdk_with_a_parent_is_refused(self):
        path = self.make('vmdk')
        with open(path, 'rb') as f:
            at = f.read(4096).index(b'parentCID=')
        self.poke(path, at, b'parentCID=12345678')
        self.assert_refused(path, 'a parent')

    def test_vmdk_that_is_only_a_description_is_refused(self):
        # QEMU would follow the names of files in it.
        path = self.make('vmdk')
        self.poke(path, 12, bytes(8))
        self.assert_refused(path, 'no description')

    def test_part_of_a_sector_is_refused(self):
        path = self.make('raw')
        os.truncate(path, MIB + 1)
        self.assert_refused(path, 'multiple')


class LockTest(HeaderCase):

    def test_open_image_is_seen_and_a_closed_one_is_kept_closed(self):
        path = self.make('qcow2')
        for words, is_written in ([], True), (['-r'], False):
            with subprocess.Popen(
                ['qemu-io', *words, '-f', 'qcow2', path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ) as process:
                process.stdin.write(b'length\n')
                process.stdin.flush()
                while b'MiB' not in process.stdout.readline():
                    pass
                self.assertTrue(qcow_layers.is_used(path))
                self.assertEqual(is_written, qcow_layers.is_written(path))
                with self.assertRaises(errors.Busy):
                    with qcow_layers.keep_closed(path):
                        pass
                self.assertEqual(
                    [process.pid],
                    qcow_layers.openers(frozenset([path]), 'qemu-io'),
                )
                process.communicate(b'quit\n', timeout=60)
        self.assertFalse(qcow_layers.is_used(path))
        with qcow_layers.keep_closed(path):
            for words in [], ['-r']:
                done = subprocess.run(
                    ['qemu-io', *words, '-f', 'qcow2', '-c', 'length', path],
                    capture_output=True, timeout=60,
                )
                self.assertIn(b'Failed to get', done.stderr)
        self.qemu('qemu-img', 'check', '-f', 'qcow2', path)


class TreeTest(unittest.TestCase):

    def layer(self, name, backing=None):
        header = qcow_layers.Header(MIB, backing)
        return Layer(name, header, 4096, 1)

    def test_layer_is_needed_by_its_names_and_by_what_stands_on_it(self):
        tree = Tree(
            [self.layer('base'), self.layer('top', 'base'),
             self.layer('lost')],
            [('volumes/v', 'top')],
        )
        self.assertEqual(
            [True, True, False],
            [tree.is_needed(name) for name in ('base', 'top', 'lost')],
        )
        self.assertEqual(['base', 'lost'], tree.hidden())
        self.assertEqual(['top', 'base'], tree.chain('top'))
        tree.forget('top')
        self.assertFalse(tree.is_needed('base'))

    def test_tree_is_certain_unless_something_needed_is_broken(self):
        broken = Layer('broken', None, 0, 2)
        self.assertTrue(Tree([broken], []).is_certain())
        named = [('volumes/v', 'broken')]
        self.assertFalse(Tree([broken], named).is_certain())
        self.assertFalse(
            Tree([broken, self.layer('top', 'broken')], []).is_certain()
        )

    def test_loop_of_layers_has_an_end(self):
        tree = Tree([self.layer('a', 'b'), self.layer('b', 'a')], [])
        self.assertEqual(['a', 'b'], tree.chain('a'))
