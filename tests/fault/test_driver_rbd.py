# SPDX-License-Identifier: Apache-2.0
"""The rbd driver, spoilt at every call that its client object makes."""

from __future__ import annotations

import os
import unittest

from tests import rbd
from volume.drivers import base
from volume.drivers.rbd import names
from volume.drivers.rbd.keys import Keys
from volume.drivers.rbd.link import Link
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import repeat
from volume.testing import workbench

PROOF = bool(os.environ.get('VOLUME_PROOF'))
# Without it, those whose way through the cluster is the longest.
CHOSEN = (
    'test_adopt', 'test_clone_of_a_volume', 'test_create',
    'test_delete_of_a_clone_s_origin', 'test_delete_snapshot', 'test_revert',
    'test_revert_that_died_is_whole_or_says_that_it_is_not',
)


class RbdTest(repeat.DriverFaultSuite, rbd.Pools, unittest.TestCase):

    is_thorough = PROOF

    def setUp(self) -> None:
        self.state_dir = fixtures.state_dir(self)
        # The trash of the test before.
        workbench.tend(
            self.make_driver(self.make_node()), self.pool_names[0])
        super().setUp()

    def make_node(self) -> faults.FaultyNode:
        return faults.FaultyNode(self.state_dir)

    def make_driver(self, node: faults.FaultyNode) -> base.Driver:
        # A hundred connections a second would measure those.
        return self.rbd(node, connect=rbd.lasting)

    def leftovers(self) -> object:
        """Return what the pool holds beside images, and beside data.

        Data of snapshots goes when the cluster has time for it.
        """
        driver = self.rbd(self.make_node(), connect=rbd.lasting)
        link: Link = driver._parts().link
        pool = self.pool_names[0]
        objects = link.ask('objects', lambda wire: [
            each.key for each in wire.ioctx(pool).list_objects()
        ])
        return (
            sum(each.startswith('rbd_') and '.' in each
                and not each.startswith('rbd_data.') for each in objects),
            Keys(link, names.BEGUN).some(pool),
            Keys(link, names.FLATTEN).some(pool),
        )


if not PROOF:
    for _name in dir(RbdTest):
        if _name.startswith('test_') and _name not in CHOSEN:
            setattr(RbdTest, _name, None)
