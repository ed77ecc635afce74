# SPDX-License-Identifier: Apache-2.0
"""The rbd driver on a real cluster, with two pools."""

from __future__ import annotations

import unittest

from tests import rbd
from volume.drivers import base
from volume.testing import conformance
from volume.testing import fixtures


class RbdTest(conformance.DriverSuite, rbd.Pools, unittest.TestCase):

    def setUp(self) -> None:
        self.node = fixtures.make_node(self)
        super().setUp()

    def make_driver(self) -> base.Driver:
        return self.rbd(self.node, connect=rbd.lasting)

    def make_foreign(self, pool: str, image: bytes) -> str | None:
        self.cluster.run(
            'rbd', 'import', '-', f'{pool}/somebody', input_bytes=image)
        self.addCleanup(self._remove_foreign, pool)
        return 'somebody'

    def _remove_foreign(self, pool: str) -> None:
        if 'somebody' in self.cluster.run('rbd', 'ls', pool).split():
            self.cluster.run('rbd', 'rm', '--no-progress', f'{pool}/somebody')

    def test_pool_has_every_feature_of_the_driver(self) -> None:
        self.assertEqual(base.features(self.driver), self.pool.features)
