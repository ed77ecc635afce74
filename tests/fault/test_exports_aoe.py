# SPDX-License-Identifier: Apache-2.0
"""The aoe exporter over real vblades, spoilt at every act of every method."""

import os
import unittest

from tests import aoe
from volume import ids
from volume import model
from volume.exports.aoe import AoeExporter
from volume.exports.aoe import MARK
from volume.node import Node
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import repeat_exports

MAC, OTHER_MAC = '02:00:00:00:00:01', '02:00:00:00:00:02'


class AoeTest(repeat_exports.ExporterFaultSuite, unittest.TestCase):

    size_bytes = 64 << 10
    host = model.Host('one', properties={'aoe_mac': MAC})
    is_thorough = bool(os.environ.get('VOLUME_PROOF'))

    def setUp(self):
        aoe.need(self)
        # Each act is a look at all processes of the machine.
        most = 'test_export', 'test_unexport'
        if not self.is_thorough and self._testMethodName not in most:
            self.skipTest('the long form: VOLUME_PROOF is not set')
        self.interfaces = aoe.make_pair(self)
        self.state_dir = fixtures.state_dir(self)
        super().setUp()

    def make_node(self):
        return faults.FaultyNode(self.state_dir)

    def make_exporter(self, node):
        return AoeExporter(fixtures.settings(
            AoeExporter, aoe_interface=self.interfaces[0],
            aoe_trusted_network=True,
        ), node)

    def make_source(self, image):
        path = os.path.join(self.state_dir, f'{ids.new()}.raw')
        with open(path, 'wb') as f:
            f.write(image)
        return model.Device(path, is_block=False)

    def read(self, connection):
        return self.enter(connection, MAC, aoe.ANSWER_S)

    def return_to(self, connection):
        return self.enter(connection, MAC, aoe.SHUT_S)

    def intrude(self, connection):
        return self.enter(connection, OTHER_MAC, aoe.SHUT_S)

    def enter(self, connection, mac, answer_s):
        with aoe.session(
            self.interfaces[1], mac, connection.fields, answer_s=answer_s
        ) as session:
            return session.read(0, self.size_bytes)

    def leftovers(self):
        exporter = AoeExporter(None, Node(self.state_dir))
        ours = [
            path for path in exporter._running()
            if path.startswith(self.state_dir)
        ]
        return len(ours), sorted(
            name for name in os.listdir(f'{self.state_dir}/aoe')
            if not name.endswith(MARK)
        )
