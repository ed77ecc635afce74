# SPDX-License-Identifier: Apache-2.0
"""The lvm driver, thick and thin: in the lab, and over LVM in miniature."""

import unittest

from tests import lvm
from tests.lab.lvm_case import LvmCase
from volume import model
from volume.drivers.lvm import driver
from volume.testing import conformance
from volume.testing import fixtures


class LabSuite(conformance.DriverSuite):
    """Over the guest's kernel, through its agent."""

    def make_driver(self):
        return driver.LvmDriver(self.settings(), self.node)

    def make_foreign(self, pool, image):
        kind = (
            ['-V', '4m', '--thinpool', 'pool'] if self.provisioning == 'thin'
            else ['-L', '4m', '-Wn', '-Zn']
        )
        self.lvm('lvcreate', '-n', 'somebody', *kind, pool)
        self.addCleanup(lambda: 'somebody' in self.lvs() and self.lvm(
            'lvremove', f'{pool}/somebody'))
        self.write(
            f'/dev/{pool}/somebody',
            image + bytes(4 * model.MIB - len(image)),
        )
        self.let_go('somebody')
        return 'somebody'


class LabThinTest(LabSuite, LvmCase):
    provisioning = 'thin'


class LabThickTest(LabSuite, LvmCase):
    provisioning = 'thick'


class SimSuite(conformance.DriverSuite):
    """The same over LVM in miniature, where the kernel has none."""

    provisioning = ''

    def setUp(self):
        directory = fixtures.directory(self)
        self.world = lvm.World(
            directory, 4096, has_pool=self.provisioning == 'thin')
        self.node = lvm.SimNode(fixtures.state_dir(self))
        self.node.world = self.world
        super().setUp()

    def make_driver(self):
        conf = fixtures.settings(
            driver.LvmDriver, volume_groups=[lvm.GROUP],
            provisioning=self.provisioning,
        )
        return driver.LvmDriver(conf, self.node)

    def make_foreign(self, pool, image):
        size = (
            ['-V', '1048576b', '--thinpool', 'pool']
            if self.provisioning == 'thin' else ['-l', '16']
        )
        name = f'{pool}/somebody'
        self.world.command(['lvcreate', '-n', 'somebody', *size, pool])
        self.addCleanup(lambda: 'somebody' in self.world.lvs and (
            self.world.command(['lvremove', name])))
        self.world.command(['lvchange', '-ay', name])
        with self.node.open('/dev/mapper/sim--vg-somebody', 'r+b') as f:
            f.pwrite(image + bytes(model.MIB - len(image)), 0)
        return 'somebody'


class SimThinTest(SimSuite, unittest.TestCase):
    provisioning = 'thin'


class SimThickTest(SimSuite, unittest.TestCase):
    provisioning = 'thick'
