# SPDX-License-Identifier: Apache-2.0
"""What images are, and which are refused, by their bytes alone."""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import tempfile
import unittest

from tests import images
from volume import errors
from volume.transfer import formats


def setUpModule() -> None:
    inspectors = logging.getLogger('oslo_utils.imageutils.format_inspector')
    unittest.addModuleCleanup(inspectors.setLevel, inspectors.level)
    inspectors.setLevel(logging.CRITICAL)  # it tells of each refusal


class GoodImages(unittest.TestCase):
    def setUp(self) -> None:
        if shutil.which('qemu-img') is None:
            self.skipTest('qemu-img is not installed')
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)

    def test_each_format_is_told_with_its_size(self) -> None:
        data = images.disk(images.VIRTUAL)
        for kind in images.GOOD:
            with self.subTest(kind):
                path = os.path.join(self.directory, kind)
                images.make(kind, path, data)
                name = kind.split('-')[0]
                expected = formats.ImageInfo(name, images.VIRTUAL)
                self.assertEqual(expected, formats.inspect(path))
                self.assertEqual(expected, formats.inspect(path, name))

    def test_a_good_image_under_another_name_is_refused(self) -> None:
        data = images.disk(images.VIRTUAL)
        for kind in images.GOOD:
            path = os.path.join(self.directory, kind)
            images.make(kind, path, data)
            for declared in formats.FORMATS:
                if declared != kind.split('-')[0]:
                    with (
                        self.subTest(kind, declared=declared),
                        self.assertRaises(errors.Invalid),
                    ):
                        formats.inspect(path, declared)

    def test_a_vhd_that_was_cut_off_is_refused(self) -> None:
        data = images.disk(images.VIRTUAL)
        path = os.path.join(self.directory, 'vhd')
        images.make('vhd', path, data)
        os.truncate(path, os.path.getsize(path) - 70_000)
        with self.assertRaisesRegex(errors.Invalid, 'cut off'):
            formats.inspect(path, 'vhd')


class HostileImages(unittest.TestCase):
    def test_each_is_refused_and_told_why(self) -> None:
        for name, (declared, make, words) in images.HOSTILE.items():
            with self.subTest(name):
                with self.assertRaises(errors.Invalid) as e:
                    formats.inspect(io.BytesIO(make()), declared, 'image X')
                self.assertIn(words, str(e.exception))
                self.assertTrue(str(e.exception).startswith('image X '))

    def test_the_innocent_twin_of_each_is_let_pass(self) -> None:
        for name, data in {
            'qcow2': images.qcow2(),
            'qcow2 of version 2': images.qcow2(version=2),
            'vhd': images.vhd(),
            'fixed vhd': images.vhd_fixed(bytes(images.VIRTUAL)),
            'vmdk': images.vmdk(),
            'vmdk with footer': images.vmdk(
                footer_sectors=images.VIRTUAL // 512),
        }.items():
            with self.subTest(name):
                info = formats.inspect(io.BytesIO(data))
                self.assertEqual(images.VIRTUAL, info.virtual_size_bytes)

    def test_a_vhd_has_its_current_size_not_its_first(self) -> None:
        data = images.vhd(original=images.SECTOR)
        info = formats.inspect(io.BytesIO(data), 'vhd')
        self.assertEqual(images.VIRTUAL, info.virtual_size_bytes)

    def test_an_unknown_declaration_names_the_known(self) -> None:
        with self.assertRaisesRegex(errors.Invalid, 'raw, qcow2, vhd, vmdk'):
            formats.inspect(io.BytesIO(bytes(512)), 'vpc')

    def test_chance_bytes_never_break_the_inspection(self) -> None:
        chance = random.Random(7)
        seeds = [
            images.qcow2(extension=(0x1234, b'x' * 40)), images.vhd(),
            images.vmdk(), images.vmdk(footer_sectors=16384),
            images.vmdk_descriptor() + bytes(4096),
            images.vhd_fixed(bytes(8192)), images.with_magic(b'vhdxfile'),
        ]
        for round_ in range(700):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.randrange(1, 6)):
                at = chance.randrange(min(len(data), 1200))
                data[at] = chance.choice((0, 1, 0x7F, 0xFF, data[-1]))
            if chance.random() < 0.2:
                del data[chance.randrange(1, len(data)):]
            with self.subTest(round=round_):
                try:
                    info = formats.inspect(io.BytesIO(bytes(data)))
                except errors.Invalid:
                    continue
                self.assertIn(info.format, formats.FORMATS)
                self.assertGreater(info.virtual_size_bytes, 0)


class RawImages(unittest.TestCase):
    def test_what_a_guest_may_write_on_a_disk_is_raw(self) -> None:
        mbr = bytearray(images.MIB)
        mbr[446:462] = bytes.fromhex('80000200830000000100000009000000')
        mbr[510:512] = b'\x55\xaa'
        iso = images.with_magic(b'\x01CD001', 32768)
        text = b'plain text, line by line\n' * 100 + b'\xff\xfe' * 4000
        for name, data in {
            'zeros': bytes(4096), 'mbr': bytes(mbr), 'iso': iso,
            'text before bytes': text, 'one byte': b'x',
        }.items():
            with self.subTest(name):
                info = formats.inspect(io.BytesIO(data), 'raw')
                self.assertEqual(
                    formats.ImageInfo('raw', -(-len(data) // 512) * 512),
                    info,
                )
                self.assertEqual(info, formats.inspect(io.BytesIO(data)))

    def test_a_luks_disk_is_raw_only_if_declared(self) -> None:
        data = images.with_magic(b'LUKS\xba\xbe\0\1')
        self.assertEqual(
            'raw', formats.inspect(io.BytesIO(data), 'raw').format
        )

    def test_without_the_end_the_answer_is_provisional(self) -> None:
        fixed = images.vhd_fixed(bytes(images.VIRTUAL))
        head, size = fixed[:formats.HEAD_BYTES], len(fixed)
        self.assertEqual(
            formats.ImageInfo('raw', size),
            formats.inspect_parts(head, None, size),
        )
        self.assertEqual(
            formats.ImageInfo('vhd', images.VIRTUAL),
            formats.inspect_parts(head, None, size, 'vhd'),
        )
        self.assertTrue(formats.has_vhd_footer(fixed[-512:], size))
        self.assertFalse(formats.has_vhd_footer(head[-512:], size))
