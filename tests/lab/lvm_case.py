# SPDX-License-Identifier: Apache-2.0
"""What tests of the lvm driver in the lab share: a group, and a node there.

The driver runs here, and reaches the guest by the agent of its node alone.
"""

from tests.lab import exports_case
from tests.lab.case import LabCase
from volume.drivers.lvm import driver
from volume.remote.node import SshNode
from volume.testing import fixtures

POOL_BYTES = 1 << 30


class LvmCase(LabCase):
    """A volume group on two disks of the guest, and a node there."""

    disks = 2
    provisioning = ''

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.node = SshNode(exports_case.target_of(cls.guest))
        cls.addClassCleanup(cls.node.close)
        if cls.provisioning == 'thin' and cls.disks:
            cls.lvm('lvcreate', '-T', '-L', f'{POOL_BYTES}b',
                    '--errorwhenfull', 'y', f'{cls.group}/pool')

    @classmethod
    def lvm(cls, command, *argv):
        """Run a command as a person in the guest would."""
        return cls.guest.run(command, '--yes', '-q', *argv)

    @classmethod
    def settings(cls, **options):
        return fixtures.settings(driver.LvmDriver, **{
            'volume_groups': [cls.group], 'provisioning': cls.provisioning,
            **options,
        })

    def write(self, path, image, at=0):
        with self.node.open(path, 'rb+') as f:
            f.pwrite(image, at)
            f.sync()

    def lvs(self, *options):
        """Return the names of the group's logical volumes, as lvs has them.
        """
        return self.guest.run(
            'lvs', '--noheadings', '-o', 'lv_name', *options, self.group
        ).split()
