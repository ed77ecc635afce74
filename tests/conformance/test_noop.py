# SPDX-License-Identifier: Apache-2.0
"""The driver that stores nothing: names and sizes as by the contract.

The suite looks at bytes, and here are none: this is what is left of it.
"""

import unittest

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base
from volume.testing import fixtures
from volume.testing import noop

GIB = 1 << 30
HOST = model.Host('host')


class NoopTest(unittest.TestCase):

    def setUp(self):
        self.driver = noop.NoopDriver(
            fixtures.settings(noop.NoopDriver),
            fixtures.make_node(self),
        )
        self.driver.check()
        self.pool, = self.driver.pools()

    def volume(self, size_bytes=GIB):
        return model.Volume(ids.new(), self.pool.name, size_bytes)

    def test_every_call_may_be_repeated(self):
        volume = self.volume()
        self.assertEqual(
            self.driver.create(volume), self.driver.create(volume)
        )
        self.assertEqual(GIB, self.driver.inspect(volume).size_bytes)
        snapshot = model.Snapshot(ids.new(), volume, GIB)
        for _ in range(2):
            self.driver.snapshot(snapshot)
            self.driver.resize(volume, 2 * GIB)
            self.driver.revert(snapshot)
            self.driver.grant(volume, HOST, model.Access.WRITE)
        self.assertEqual(
            {(volume.id, 2 * GIB, None), (snapshot.id, GIB, volume.id)},
            {(found.id, found.size_bytes, found.snapshot_of)
             for found in self.driver.scan(self.pool.name)},
        )
        for _ in range(2):
            self.driver.revoke(volume, HOST)
            self.driver.delete_snapshot(snapshot)
        for _ in range(2):
            self.driver.delete(volume)
        self.assertEqual([], list(self.driver.scan(self.pool.name)))

    def test_what_cannot_be_is_refused(self):
        volume = self.volume()
        with self.assertRaises(errors.NotFound):
            self.driver.inspect(volume)
        self.driver.create(volume)
        with self.assertRaises(errors.Conflict):
            self.driver.create(
                model.Volume(volume.id, volume.pool, 2 * GIB)
            )
        with self.assertRaises(errors.Invalid):
            self.driver.resize(volume, 1)
        with self.assertRaises(errors.Invalid):
            self.driver.clone(volume, self.volume(1))
        self.driver.snapshot(model.Snapshot(ids.new(), volume, GIB))
        with self.assertRaises(errors.Busy):
            self.driver.delete(volume)

    def test_it_does_not_pretend_to_have_bytes(self):
        volume = self.volume()
        self.driver.create(volume)
        for way in self.driver.reader, self.driver.writer:
            with self.assertRaises(errors.Unsupported):
                way(volume)

    def test_its_pool_can_do_what_its_class_declares(self):
        self.assertEqual(base.features(self.driver), self.pool.features)


if __name__ == '__main__':
    unittest.main()
