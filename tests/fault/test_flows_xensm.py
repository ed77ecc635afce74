# SPDX-License-Identifier: Apache-2.0
"""Every flow over the xensm driver, spoilt at each call of the pool."""

from __future__ import annotations

import os
import unittest

from tests import xapi
from tests import xensm
from tests.fault import scenarios
from tests.fault.test_flows import FlowFaults
from tests.fault.world import World
from volume import ids


@unittest.skipUnless(
    os.environ.get('VOLUME_PROOF'), 'VOLUME_PROOF is not set: a long run')
class XensmFaults(FlowFaults, xensm.SharedPool, unittest.TestCase):
    """Attached natively: the pool is its own exporter."""

    exporter = ''
    turn = 3
    # Each takes a second: faults that hardly differ are left out here, too.
    plays_all = False
    by_nbd = True
    switches = {'gc_delay_s': 3600.0, 'detach_delay_s': 0.0}

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.addClassCleanup(xensm.end_tasks, cls.simulator)
        with xensm.session(cls.simulator) as xenapi:
            host = xenapi.host.get_all()[0]
            # Whom a connector that knows nothing of pools is taken for.
            xenapi.host.set_name_label(host, scenarios.CONNECTOR['host'])

    def section(self) -> str:
        # An SR for each world: what one leaves is not the next one's fault.
        sr_uuid = xapi.nfs_sr(self.simulator, path=f'/{ids.new()}')
        return '\n'.join((
            'driver = xensm', f'addresses = {self.simulator.url()}',
            'password = secret', f'sr_uuid = {sr_uuid}',
        ))

    def world(self) -> World:
        return World(self, self.section())
