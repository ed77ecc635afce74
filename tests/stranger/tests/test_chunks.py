# SPDX-License-Identifier: Apache-2.0
"""The chunks driver keeps the contract, and survives every fault."""

import os
import unittest

from stranger import chunks

from volume.testing import conformance
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import repeat


class ChunksTest(conformance.DriverSuite, unittest.TestCase):

    def setUp(self):
        self.node = fixtures.make_node(self)
        super().setUp()

    def make_driver(self):
        root = os.path.join(self.node.state_dir, 'root')
        conf = fixtures.settings(chunks.ChunksDriver, root=root)
        return chunks.ChunksDriver(conf, self.node)


class ChunksFaultTest(repeat.DriverFaultSuite, unittest.TestCase):

    def setUp(self):
        self.state_dir = fixtures.state_dir(self)
        self.root = os.path.join(self.state_dir, 'root')
        super().setUp()

    def make_node(self):
        return faults.FaultyNode(self.state_dir)

    def make_driver(self, node):
        conf = fixtures.settings(chunks.ChunksDriver, root=self.root)
        return chunks.ChunksDriver(conf, node)

    def leftovers(self):
        return sorted(
            os.path.join(root, name)
            for root, folders, files in os.walk(self.root)
            for name in (*folders, *files)
        )
