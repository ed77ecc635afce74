# SPDX-License-Identifier: Apache-2.0
"""The same for volumes that QEMU has to open, in each of their formats."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from tests import images
from tests.integration.fill_case import Case
from volume import errors
from volume import ids
from volume import model
from volume.drivers.qcow import QcowDriver
from volume.flows import fill
from volume.testing import fixtures

SIZE = images.VIRTUAL
SPARE = 3 * images.MIB


class Qcow(Case):
    def setUp(self) -> None:
        super().setUp()
        if shutil.which('qemu-storage-daemon') is None:
            self.skipTest('qemu-storage-daemon is not installed')
        fixtures.serve_blocks(self, self.node)

    def use(self, volume_format: str) -> None:
        self.pool = fixtures.directory(self)
        self.driver = QcowDriver(
            fixtures.settings(
                QcowDriver, directories=[self.pool], format=volume_format,
            ),
            self.node,
        )
        self.driver.check()

    def volume(
        self, size: int = SIZE + SPARE, dirt: bytes = b''
    ) -> model.Volume:
        volume = model.Volume(ids.new(), 'pool', size)
        self.driver.create(volume)
        if dirt:
            self.write(volume, dirt * size)
        return volume

    def write(self, volume: model.Volume, data: bytes) -> None:
        with self.driver.writer(volume) as writer:
            writer.write(data)
            writer.commit()

    def bytes_of(self, volume: model.Volume | model.Snapshot) -> bytes:
        with self.driver.reader(volume) as reader:
            return reader.read()

    def test_every_format_fills_volumes_of_every_format(self) -> None:
        for volume_format in ('qcow2', 'raw', 'vhd', 'vmdk'):
            self.use(volume_format)
            for kind in ('raw', 'qcow2', 'vhd', 'vmdk-stream'):
                for source, url in self.both(self.image(kind)):
                    for dirt in (b'', b'\xee'):
                        volume = self.volume(dirt=dirt)
                        with self.subTest(
                            volume_format, kind=kind, url=url, dirt=dirt,
                        ):
                            self.fill(volume, source, url, fresh=not dirt)
                            self.assert_filled(volume)
                        self.driver.delete(volume)

    def test_a_checksum_on_the_way_changes_nothing(self) -> None:
        self.use('qcow2')
        digest = hashlib.sha256(self.data).hexdigest()
        for source, url in self.both(self.image('raw')):
            volume = self.volume(dirt=b'\xee')
            self.fill(volume, source, url, checksum=digest)
            self.assert_filled(volume)

    def test_a_volume_on_other_layers_is_filled_over_them(self) -> None:
        self.use('qcow2')
        origin = self.volume(dirt=b'\xaa')
        assert isinstance(self.driver, QcowDriver)
        clone = model.Volume(ids.new(), 'pool', origin.size_bytes)
        self.driver.clone(origin, clone)
        for source, url in self.both(self.image('qcow2')):
            self.fill(clone, source, url)
            self.assert_filled(clone)
        self.assertTrue(
            self.bytes_of(origin) == b'\xaa' * origin.size_bytes)

    def test_a_snapshot_is_copied_to_another_backend(self) -> None:
        file_driver = self.driver
        self.use('qcow2')
        assert isinstance(self.driver, QcowDriver)
        source = self.volume(SIZE)
        self.write(source, self.data)
        snapshot = model.Snapshot(ids.new(), source, SIZE)
        self.driver.snapshot(snapshot)
        self.write(source, b'\x11' * SIZE)
        target = model.Volume(ids.new(), 'pool', SIZE + SPARE)
        file_driver.create(target)
        fill.copy_volume(
            self.driver, snapshot, file_driver, target, node=self.node)
        with file_driver.reader(target) as reader:
            self.assertTrue(reader.read() == self.data + bytes(SPARE))
        # And the other way, into a volume that was used.
        back = self.volume(SIZE + SPARE, dirt=b'\xee')
        fill.copy_volume(
            file_driver, target, self.driver, back, node=self.node)
        self.assert_filled(back)

    def test_a_volume_is_copied_many_times_at_once(self) -> None:
        for volume_format in ('qcow2', 'raw', 'vhd', 'vmdk'):
            with self.subTest(volume_format):
                self.use(volume_format)
                source = self.volume(SIZE)
                self.write(source, self.data)
                self.copy_within_a_copy(source)

    def test_a_file_volume_is_copied_many_times_at_once(self) -> None:
        source = model.Volume(ids.new(), 'pool', SIZE)
        self.driver.create(source)
        self.write(source, self.data)
        self.copy_within_a_copy(source)

    def test_a_volume_is_cloned_and_kept_while_it_is_copied(self) -> None:
        self.use('qcow2')
        driver = self.driver
        assert isinstance(driver, QcowDriver)
        source = self.volume(SIZE)
        self.write(source, self.data)
        clone = model.Volume(ids.new(), 'pool', SIZE)
        snapshot = model.Snapshot(ids.new(), source, SIZE)

        def both() -> None:
            driver.clone(source, clone)
            driver.snapshot(snapshot)

        self.copy_within_a_copy(source, both)
        self.assertTrue(self.bytes_of(clone) == self.data)
        self.assertTrue(self.bytes_of(snapshot) == self.data)

    def copy_within_a_copy(
        self, source: model.Volume, also: Callable[[], None] | None = None
    ) -> None:
        """Copy a volume while another copy of it is under way."""
        outer, inner = self.volume(SIZE), self.volume(SIZE)
        is_open, done = threading.Event(), threading.Event()
        ended: list[BaseException | None] = []

        def stay(done_bytes: int, _: int) -> None:
            if done_bytes:
                is_open.set()
            if done.is_set():
                raise errors.Cancelled('the other one has ended')

        def slowly() -> None:
            try:
                self.copy(
                    source, outer, watch=stay, rate_bytes_per_s=SIZE // 64
                )
                ended.append(None)
            except BaseException as error:
                ended.append(error)
            finally:
                is_open.set()

        thread = threading.Thread(target=slowly)
        thread.start()
        try:
            is_open.wait(60)
            self.assertEqual([], ended)
            self.copy(source, inner)
            if also:
                also()
        finally:
            done.set()
            thread.join()
        self.assertIsInstance(ended[0], errors.Cancelled)
        self.assertTrue(self.bytes_of(inner) == self.data)

    def copy(
        self, source: model.Volume, target: model.Volume, **more: Any
    ) -> None:
        fill.copy_volume(
            self.driver, source, self.driver, target, node=self.node, **more
        )

    def test_an_attached_volume_with_layers_is_uploaded_whole(self) -> None:
        self.use('qcow2')
        assert isinstance(self.driver, QcowDriver)
        blockd: Any = self.node.blockd
        source = self.volume(SIZE)
        self.write(source, self.data)
        blockd.ensure()
        uri = blockd.export('host', self.driver.blocknode(source), True)
        snapshot = model.Snapshot(ids.new(), source, SIZE)
        self.driver.snapshot(snapshot)
        subprocess.run(
            ['qemu-io', '-f', 'raw', '-c', 'write -P 0x5a 1M 64k', uri],
            check=True, stdout=subprocess.DEVNULL, timeout=60)
        before = self.data
        after = (before[:images.MIB] + b'\x5a' * 65536
                 + before[images.MIB + 65536:])
        for thing, data, name in (
            (source, after, 'volume'), (snapshot, before, 'snapshot'),
        ):
            for image_format in ('raw', 'qcow2', 'vhd', 'vmdk'):
                with self.subTest(name, image_format=image_format):
                    self.upload(
                        thing, f'{name}.{image_format}', image_format)
                    volume = self.volume(SIZE)
                    self.fill(
                        volume, self.file,
                        f'file://{self.images}/{name}.{image_format}')
                    self.assertTrue(self.bytes_of(volume) == data)
        self.assertEqual({'host'}, set(blockd.exports()))
        self.assertTrue(self.bytes_of(source) == after)
        self.assertEqual(8, len(os.listdir(self.images)))
