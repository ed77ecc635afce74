# SPDX-License-Identifier: Apache-2.0
"""Every flow over the rbd driver, spoilt at each call of the cluster."""

from __future__ import annotations

import os
import unittest

from tests import rbd
from tests.fault.test_flows import FlowFaults
from tests.fault.world import World


@unittest.skipUnless(
    os.environ.get('VOLUME_PROOF'), 'VOLUME_PROOF is not set: a long run')
class RbdFaults(FlowFaults, rbd.Pools, unittest.TestCase):
    """Attached natively: the cluster is its own exporter."""

    kind = 'flows'
    exporter = ''
    turn = 2
    plays_all = False

    def section(self) -> str:
        # What one world leaves is not the next one's fault.
        self.clear(self.pool_names[0])
        return '\n'.join((
            'driver = rbd', f'pools = {self.pool_names[0]}',
            f'ceph_conf = {self.cluster.conf}', f'ceph_user = {rbd.user()}',
        ))

    def world(self) -> World:
        return World(self, self.section())
