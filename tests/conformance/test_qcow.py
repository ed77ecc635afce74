# SPDX-License-Identifier: Apache-2.0
"""The qcow driver, in each of its formats."""

import os
import subprocess
import unittest

from volume.drivers import qcow
from volume.testing import conformance
from volume.testing import fixtures

# What qemu-img calls the formats, and what it must be told to keep a size.
FORMATS = {
    'qcow2': ['-O', 'qcow2'],
    'raw': ['-O', 'raw'],
    'vhd': ['-O', 'vpc', '-o', 'force_size=on'],
    'vmdk': ['-O', 'vmdk'],
}


class Suite(conformance.DriverSuite):

    image_format = ''

    def setUp(self):
        self.node = fixtures.make_node(self)
        fixtures.serve_blocks(self, self.node)
        self.directory = fixtures.directory(self)
        super().setUp()

    def make_driver(self):
        conf = fixtures.settings(
            qcow.QcowDriver, directories=[self.directory],
            format=self.image_format,
        )
        return qcow.QcowDriver(conf, self.node)

    def make_foreign(self, pool, image):
        raw = os.path.join(self.node.state_dir, 'foreign')
        path = os.path.join(self.directory, 'somebody.img')
        with open(raw, 'wb') as f:
            f.write(image)
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'raw',
             *FORMATS[self.image_format], raw, path],
            check=True, timeout=60,
        )
        self.addCleanup(lambda: os.path.exists(path) and os.unlink(path))
        return 'somebody.img'


class Qcow2Test(Suite, unittest.TestCase):
    image_format = 'qcow2'

    def test_pool_has_every_feature_of_the_driver(self):
        self.assertLessEqual(
            {'Clone', 'Flatten', 'Resize', 'Revert', 'Snapshots', 'Upkeep'},
            self.pool.features,
        )


class RawTest(Suite, unittest.TestCase):
    image_format = 'raw'


class VhdTest(Suite, unittest.TestCase):
    image_format = 'vhd'


class VmdkTest(Suite, unittest.TestCase):
    image_format = 'vmdk'
