# SPDX-License-Identifier: Apache-2.0
"""The tgt exporter: a real tgtd on loopback, hosts by libiscsi."""

import os
import unittest

from tests import iscsi
from tests import tgt
from volume import ids
from volume import model
from volume.testing import exports
from volume.testing import fixtures


class TgtTest(exports.ExporterSuite, unittest.TestCase):
    """A daemon of the service's own, CHAP one way."""

    chap = 'one-way'

    def setUp(self):
        tgt.need(self)
        self.node = fixtures.make_node(self)
        self.portal = tgt.free_portal()
        super().setUp()

    def make_exporter(self):
        return tgt.make_exporter(
            self, self.node, [self.portal], chap=self.chap
        )

    def make_source(self, image):
        path = os.path.join(self.node.state_dir, f'{ids.new()}.raw')
        with open(path, 'wb') as f:
            f.write(image)
        return model.Device(path, is_block=False)

    def open_session(self, connection):
        hosts = {
            host.iqn for host in (self.host, self.other_host)
            if self._is_let_in(connection, host.iqn)
        }
        initiator = hosts.pop() if hosts else self.host.iqn
        return iscsi.Session(iscsi.Login.of(connection, initiator))

    def _is_let_in(self, connection, initiator):
        names = iscsi.discover(
            connection.fields['target_portal'], initiator
        )
        return connection.fields['target_iqn'] in names


class TgtMutualTest(TgtTest):
    """CHAP both ways."""

    chap = 'mutual'


class TgtOpenTest(TgtTest):
    """No CHAP: the host's name is enough."""

    chap = 'off'
