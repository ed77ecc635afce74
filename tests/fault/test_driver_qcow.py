# SPDX-License-Identifier: Apache-2.0
"""The qcow driver, spoilt at every act of every method."""

import os
import unittest

from volume.blockd import Blockd
from volume.drivers import qcow
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import repeat


class Suite(repeat.DriverFaultSuite):

    image_format = ''
    is_thorough = bool(os.environ.get('VOLUME_PROOF'))

    def setUp(self):
        self.state_dir = fixtures.state_dir(self)
        self.directory = fixtures.directory(self)
        self.addCleanup(lambda: self.make_node().blockd.stop())
        super().setUp()

    def make_node(self):
        node = faults.FaultyNode(self.state_dir)
        # One daemon for all: it outlives what happens to the service, which
        # ends what its predecessor left in it when it starts.
        node.blockd = Blockd(node, os.path.join(self.state_dir, 'blockd'))
        node.blockd.end_private()
        return node

    def make_driver(self, node):
        conf = fixtures.settings(
            qcow.QcowDriver, directories=[self.directory],
            format=self.image_format, merge_bytes_per_s=0,
        )
        return qcow.QcowDriver(conf, node)

    def leftovers(self):
        # Layers have new names each time: what counts is how many. The
        # locks of the pool itself stay.
        return sorted(
            (
                os.path.relpath(root, self.directory),
                len([name for name in files if not name.startswith('.')]),
            )
            for root, _, files in os.walk(self.directory)
        )


class Qcow2Test(Suite, unittest.TestCase):
    image_format = 'qcow2'


class RawTest(Suite, unittest.TestCase):
    image_format = 'raw'
