# SPDX-License-Identifier: Apache-2.0
"""What is done is on the disk: no page of it would be lost with the power.

``tests/dirty.py`` asks the kernel, right after the work says that it is done.
"""

from __future__ import annotations

import os
import unittest

from tests import dirty
from tests.integration.fill_case import SIZE
from tests.integration.fill_case import SPARE
from tests.integration.test_fill_qcow import Qcow
from volume import ids
from volume import model
from volume.drivers.qcow import QcowDriver
from volume.flows import fill

FORMATS = ('qcow2', 'raw', 'vhd', 'vmdk')


class Durable(Qcow):
    """One pool of the file driver, and one of the qcow driver."""

    def setUp(self) -> None:
        super().setUp()
        self.file_driver, self.file_pool = self.driver, self.pool
        dirty.need(self.pool)

    def use_file(self) -> None:
        self.driver, self.pool = self.file_driver, self.file_pool

    def assert_clean(self, *directories: str) -> None:
        found = {
            os.path.relpath(path, self.node.state_dir): pages
            for directory in directories or (self.pool,)
            for where, _, names in os.walk(directory)
            for name in names
            if os.path.isfile(path := os.path.join(where, name))
            and (pages := dirty.pages(path))
        }
        self.assertEqual({}, found, 'pages in memory alone, by file')

    def each_way(self) -> list[str]:
        return ['file', *FORMATS]

    def use_one(self, name: str) -> None:
        if name == 'file':
            self.use_file()
        else:
            self.use(name)

    def test_a_volume_filled_from_an_image(self) -> None:
        for way in self.each_way():
            self.use_one(way)
            for kind in ('raw', 'qcow2'):
                for source, url in self.both(self.image(kind)):
                    for dirt in (b'', b'\xee'):
                        with self.subTest(way, kind=kind, url=url, dirt=dirt):
                            volume = self.volume(dirt=dirt)
                            self.fill(volume, source, url, fresh=not dirt)
                            self.assert_clean()
                            self.driver.delete(volume)

    def test_a_volume_copied_from_another(self) -> None:
        for way in self.each_way():
            with self.subTest(way):
                self.use_one(way)
                source = self.volume(SIZE)
                self.write(source, self.data)
                self.assert_clean()
                target = self.volume(SIZE + SPARE)
                fill.copy_volume(
                    self.driver, source, self.driver, target, node=self.node)
                self.assert_clean()

    def test_layers_that_were_kept_merged_and_copied(self) -> None:
        self.use('qcow2')
        assert isinstance(self.driver, QcowDriver)
        volume = self.volume(SIZE)
        for number in range(3):
            self.write(volume, bytes([number]) * SIZE)
            snapshot = model.Snapshot(ids.new(), volume, SIZE)
            self.driver.snapshot(snapshot)
            self.assert_clean()
        clone = model.Volume(ids.new(), 'pool', SIZE)
        self.driver.clone(snapshot, clone)
        self.driver.flatten(clone, lambda percent: None)
        self.assert_clean()
        self.driver.resize(clone, SIZE + SPARE)
        self.assert_clean()
        self.driver.revert(snapshot)
        self.assert_clean()
        self.driver.delete_snapshot(snapshot)
        while self.driver.upkeep(os.path.basename(self.pool)):
            self.assert_clean()
        self.assert_clean()

    def test_an_image_that_was_uploaded(self) -> None:
        for way in self.each_way():
            self.use_one(way)
            volume = self.volume(SIZE)
            self.write(volume, self.data)
            for kind in FORMATS:
                with self.subTest(way, kind=kind):
                    self.upload(volume, f'{way}.{kind}', kind)
                    self.assert_clean(self.images)

    def test_what_the_test_looks_at_is_seen(self) -> None:
        path = os.path.join(self.pool, 'somebody')
        with open(path, 'wb') as f:
            f.write(bytes(1 << 20))
        with self.assertRaises(AssertionError):
            self.assert_clean()


# The cases of the class above are its own tests, not ours.
for _name in [name for name in vars(Qcow) if name.startswith('test_')]:
    setattr(Durable, _name, None)
del Qcow


if __name__ == '__main__':
    unittest.main()
