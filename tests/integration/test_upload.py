# SPDX-License-Identifier: Apache-2.0
"""Images from volumes, with real tools."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from typing import Any

from tests import images
from tests.integration import fill_case
from tests.integration.fill_case import Case
from tests.integration.fill_case import Remote
from volume import errors
from volume.drivers.file import FileDriver
from volume.testing import fixtures
from volume.transfer import formats

SIZE = images.VIRTUAL


setUpModule = fill_case.setUpModule


class Uploading(Case):
    def setUp(self) -> None:
        super().setUp()
        self.source = self.volume(SIZE)
        with open(self.path(self.source), 'r+b') as f:
            f.write(self.data)

    def assert_image(self, name: str, image_format: str, made: Any) -> None:
        path = os.path.join(self.images, name)
        with open(path, 'rb') as f:
            self.assertEqual(
                hashlib.file_digest(f, 'sha256').hexdigest(), made['sha256'])
        self.assertEqual(os.path.getsize(path), made['size_bytes'])
        info = formats.inspect(path, image_format)
        self.assertEqual(SIZE, info.virtual_size_bytes)
        volume = self.volume(SIZE)
        self.fill(volume, self.file, f'file://{path}')
        self.assert_filled(volume)
        self.assertEqual(
            [], [n for n in os.listdir(self.images) if 'draft' in n])

    def test_each_format_holds_the_volume_and_comes_back(self) -> None:
        for image_format in formats.FORMATS:
            for kind in (FileDriver, Remote):
                driver = self.make_driver(self.node, kind)
                name = f'{kind.__name__}.{image_format}'
                with self.subTest(name):
                    made = self.upload(
                        self.source, name, image_format, driver=driver)
                    self.assert_image(name, image_format, made)

    def test_a_vmdk_names_itself(self) -> None:
        self.upload(self.source, 'my.vmdk', 'vmdk')
        with open(f'{self.images}/my.vmdk', 'rb') as f:
            self.assertIn(b'RW 16384 SPARSE "my.vmdk"\n', f.read(4096))

    def test_an_upload_repeated_is_the_same_image(self) -> None:
        for image_format in formats.FORMATS:
            made = self.upload(self.source, f'i.{image_format}', image_format)
            again = self.upload(self.source, f'i.{image_format}', image_format)
            self.assertEqual(made, again)

    def test_another_image_is_never_replaced(self) -> None:
        for image_format in formats.FORMATS:
            name = f'i.{image_format}'
            images.make(image_format, f'{self.images}/{name}',
                        self.data[:-1] + b'\0')
            with open(f'{self.images}/{name}', 'rb') as f:
                before = f.read()
            with self.subTest(name), self.assertRaises(errors.Conflict):
                self.upload(self.source, name, image_format)
            with open(f'{self.images}/{name}', 'rb') as f:
                self.assertEqual(before, f.read())

    def test_an_image_is_never_called_like_a_draft(self) -> None:
        self.upload(self.source, 'i', 'raw')
        for name in ('.i.draft', '.i', '..i.draft.draft', '%2ei.draft'):
            for image_format in formats.FORMATS:
                with self.subTest(name, image_format=image_format):
                    with self.assertRaisesRegex(errors.Invalid, 'dot'):
                        self.upload(self.source, name, image_format)
            self.assertEqual(['i'], os.listdir(self.images))

    def test_a_guest_s_header_is_uploaded_as_bytes(self) -> None:
        head = images.qcow2(backing=images.PASSWD)
        with open(self.path(self.source), 'r+b') as f:
            f.write(head)
        self.data = head + self.data[len(head):]
        for image_format in ('raw', 'qcow2'):
            name = f'g.{image_format}'
            self.upload(self.source, name, image_format)
            out = subprocess.run(
                ['qemu-img', 'compare', '-f', image_format, '-F', 'raw',
                 f'{self.images}/{name}', self.path(self.source)],
                stdout=subprocess.DEVNULL, timeout=60)
            self.assertEqual(0, out.returncode)

    def test_a_cancelled_upload_leaves_no_image(self) -> None:
        def watch(done: int, total: int) -> None:
            raise errors.Cancelled('enough')

        for image_format in formats.FORMATS:
            for kind in (FileDriver, Remote):
                driver = self.make_driver(self.node, kind)
                with self.assertRaises(errors.Cancelled):
                    self.upload(self.source, 'i', image_format, watch=watch,
                                driver=driver)
                self.assertEqual([], os.listdir(self.images))

    def test_a_vhd_of_what_qemu_cannot_open_is_made_in_one_go(self) -> None:
        told = []
        self.upload(
            self.source, 'i', 'vhd',
            driver=self.make_driver(self.node, Remote),
            watch=lambda done, total: told.append((done, total)),
        )
        self.assertFalse(os.path.exists(self.spool))
        size = os.path.getsize(f'{self.images}/i')
        self.assertEqual((size, size), told[-1])

    def test_an_attached_volume_is_uploaded_as_its_host_sees_it(self) -> None:
        if shutil.which('qemu-storage-daemon') is None:
            self.skipTest('qemu-storage-daemon is not installed')
        fixtures.serve_blocks(self, self.node)
        blockd = self.node.blockd
        assert blockd is not None
        blockd.ensure()
        driver = self.make_driver(self.node)
        assert isinstance(driver, FileDriver)
        uri = blockd.export('host', driver.blocknode(self.source), True)
        subprocess.run(
            ['qemu-io', '-f', 'raw', '-c', 'write -P 0x5a 1M 64k', uri],
            check=True, stdout=subprocess.DEVNULL, timeout=60)
        self.data = (self.data[:images.MIB] + b'\x5a' * 65536
                     + self.data[images.MIB + 65536:])
        for image_format in formats.FORMATS:
            name = f'a.{image_format}'
            with self.subTest(name):
                made = self.upload(
                    self.source, name, image_format, driver=driver)
                self.assert_image(name, image_format, made)
        self.assertEqual({'host'}, set(blockd.exports()))
