# SPDX-License-Identifier: Apache-2.0
"""A qcow pool of many volumes: what a call reads of it."""

import os
import unittest

from tests.scale import scale_case
from tools import fill
from volume import conf as options
from volume import model
from volume.drivers import qcow_layers
from volume.drivers.qcow import QcowDriver
from volume.testing import fixtures

COUNT = 400
GIB = 1 << 30


class LargePool(unittest.TestCase):
    def setUp(self):
        directory = fixtures.state_dir(self)
        path = fill.configure(directory, 1, 'qcow', 'local')
        fill.fill(path, fill.Size(
            volumes=COUNT, snapshots=COUNT // 5, attachments=0, pools=1,
            history=0,
        ), files='all')
        conf = options.load([], [path])
        conf.register_opts(options.BACKEND, group='b0')
        conf.register_opts(QcowDriver.options, group='b0')
        self.node = scale_case.CountingNode(
            os.path.join(directory, 'state')
        )
        self.driver = QcowDriver(conf.b0, self.node)
        self.driver.check()
        (self.pool,) = self.driver._pools.values()
        snapshots = os.listdir(self.pool.path('snapshots'))
        self.snapped = {name.partition('@')[0] for name in snapshots}
        self.alone = sorted(
            set(os.listdir(self.pool.path('volumes'))) - self.snapped
        )

    def volume(self, volume_id):
        return model.Volume(volume_id, self.pool.name, GIB)

    def layers(self):
        return set(os.listdir(self.pool.path('layers')))

    def trees(self):
        """Return how often all layers were read."""
        return sum(
            what.startswith('read tree') for what in self.node.seen
        )

    def test_all_layers_are_read_once_for_many_deletes(self):
        before = self.layers()
        self.assertEqual(COUNT + COUNT // 5, len(before))
        for volume_id in self.alone[:10]:
            self.driver.delete(self.volume(volume_id))
        self.assertEqual(2, self.trees())
        left = self.layers()
        # What was deleted is no volume any more, whatever is left of it.
        names = set(os.listdir(self.pool.path('volumes')))
        self.assertFalse(names & set(self.alone[:10]))
        self.assertEqual(2, len(before - left))
        # The sweep removes the rest, and nothing that anybody needs.
        with self.pool.lock():
            self.pool.sweep()
            tree = self.pool.tree()
        self.assertEqual(len(before) - 10, len(self.layers()))
        for name in tree.layers:
            self.assertTrue(tree.is_needed(name))

    def test_what_is_left_for_a_sweep_counts_as_hidden(self):
        (pool,) = self.driver.pools()
        self.assertEqual(0, pool.hidden_bytes)
        for volume_id in self.alone[:3]:
            self.driver.delete(self.volume(volume_id))
        (pool,) = self.driver.pools()
        with self.pool.lock():
            tree = self.pool.tree()
            hidden = sum(map(tree.allocated_bytes, tree.hidden()))
        self.assertGreater(hidden, 0)
        self.assertEqual(hidden, pool.hidden_bytes)

    def test_a_report_reads_no_header(self):
        read = []
        reader = qcow_layers.read_header
        self.addCleanup(setattr, qcow_layers, 'read_header', reader)
        qcow_layers.read_header = lambda *args: (
            read.append(args) or reader(*args)
        )
        self.driver.pools()
        self.assertEqual([], read)
        self.assertEqual(0, self.trees())

    def test_create_clone_and_open_read_a_chain_and_no_more(self):
        new = self.volume('11111111-1111-4111-8111-111111111111')
        source = self.volume(self.alone[0])
        clone = self.volume('22222222-2222-4222-8222-222222222222')
        self.driver.create(new)
        self.driver.clone(source, clone)
        self.driver.blocknode(clone)
        self.assertEqual(0, self.trees())


if __name__ == '__main__':
    unittest.main()
