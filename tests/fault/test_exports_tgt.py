# SPDX-License-Identifier: Apache-2.0
"""The tgt exporter over a real tgtd, spoilt at every act of every method."""

import dataclasses
import os
import unittest

from tests import iscsi
from tests import tgt
from volume import ids
from volume import model
from volume.exports.tgt import TgtExporter
from volume.exports.tgt_wire import Tgtd
from volume.node import Node
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import repeat_exports


class TgtTest(repeat_exports.ExporterFaultSuite, unittest.TestCase):

    is_thorough = bool(os.environ.get('VOLUME_PROOF'))
    is_restored = False

    def setUp(self):
        tgt.need(self)
        self.state_dir = fixtures.state_dir(self)
        self.portal = tgt.free_portal()
        self.addCleanup(tgt.end, Node(self.state_dir))
        super().setUp()

    def make_node(self):
        return faults.FaultyNode(self.state_dir)

    def make_exporter(self, node):
        return TgtExporter(
            tgt.settings([self.portal], chap='mutual'), node
        )

    def make_source(self, image):
        path = os.path.join(self.state_dir, f'{ids.new()}.raw')
        with open(path, 'wb') as f:
            f.write(image)
        return model.Device(path, is_block=False)

    def read(self, connection):
        return self.enter(iscsi.Login.of(connection, self.host.iqn))

    def intrude(self, connection):
        return self.enter(dataclasses.replace(
            iscsi.Login.of(connection, self.host.iqn), username='',
            mutual_username='',
        ))

    def enter(self, login):
        session = iscsi.Session(login)
        try:
            return session.read(0, self.size_bytes)
        finally:
            session.close()

    def leftovers(self):
        tgtd = Tgtd(
            Node(self.state_dir), f'{self.state_dir}/tgtd/socket.0'
        )
        return tgtd.listing().count('Target '), sorted(tgtd.accounts())

    def test_start_of_the_daemon(self):
        def end(exporter):
            tgt.end(Node(self.state_dir))

        def begin(exporter):
            exporter.check()
            self.export_all(exporter)
            self.take(exporter.export(self.bystander), self.bystander)

        self.is_restored = True
        self.spoil(end, begin)

    def clear(self, words):
        if self.is_restored:
            # As the service does it, with all that it knows of.
            self.take(self.start().export(self.bystander), self.bystander)
        super().clear(words)
