# SPDX-License-Identifier: Apache-2.0
"""The lvm driver, spoilt at every act of every method.

Over LVM in miniature: of the real one a run takes seconds, and there are
thousands. What a command leaves that the kernel killed in the middle, LVM
sees to itself: its own metadata are written whole or not at all.
"""

import os
import unittest

from tests import lvm
from volume.drivers.lvm import driver
from volume.testing import fixtures
from volume.testing import repeat


class Suite(repeat.DriverFaultSuite):

    provisioning = ''
    size_bytes = lvm.EXTENT
    is_thorough = bool(os.environ.get('VOLUME_PROOF'))

    def setUp(self):
        self.state_dir = fixtures.state_dir(self)
        self.world = lvm.World(
            fixtures.directory(self), 64,
            has_pool=self.provisioning == 'thin',
        )
        super().setUp()

    def make_node(self):
        node = lvm.FaultySimNode(self.state_dir)
        node.world = self.world
        return node

    def make_driver(self, node):
        conf = fixtures.settings(
            driver.LvmDriver, volume_groups=[lvm.GROUP],
            provisioning=self.provisioning,
        )
        return driver.LvmDriver(conf, node)

    def leftovers(self):
        """Return what there is of logical volumes, whatever they are."""
        return (
            sorted(lv.name for lv in self.world.lvs.values()),
            len(self.world.free), self.world.held,
        )


class ThinTest(Suite, unittest.TestCase):
    provisioning = 'thin'


class ThickTest(Suite, unittest.TestCase):
    provisioning = 'thick'
