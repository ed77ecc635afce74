# SPDX-License-Identifier: Apache-2.0
"""The xensm driver, spoilt at every call that it makes of the pool."""

from __future__ import annotations

import os
import unittest

from tests import xensm
from volume.drivers import base
from volume.drivers.xensm import vdis
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import repeat

PROOF = bool(os.environ.get('VOLUME_PROOF'))
LEAN = ('test_create',)


class Suite(repeat.DriverFaultSuite, xensm.SharedPool):
    """Every method, over one simulated pool."""

    is_thorough = False
    by_nbd = True
    # Nothing is merged behind its back: what is left is what it left.
    switches = {'gc_delay_s': 3600.0, 'detach_delay_s': 0.0}

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.addClassCleanup(xensm.end_tasks, cls.simulator)

    def setUp(self) -> None:
        self.state_dir = fixtures.state_dir(self)
        super().setUp()

    def make_node(self) -> faults.FaultyNode:
        return faults.FaultyNode(self.state_dir)

    def make_driver(self, node: faults.FaultyNode) -> base.Driver:
        return self.xensm(node)

    def leftovers(self) -> object:
        """Return what the server has that no list of volumes shows."""
        with xensm.session(self.simulator) as xenapi:
            found = [
                vdis.Vdi.of(ref, record) for ref, record
                in xenapi.VDI.get_all_records().items()
            ]
        return len([vdi for vdi in found if vdi.managed])


class NfsTest(Suite, unittest.TestCase):
    """Files; a few of its methods if this is no proof run."""


if not PROOF:
    for _name in dir(NfsTest):
        if _name.startswith('test_') and _name not in LEAN:
            setattr(NfsTest, _name, None)
