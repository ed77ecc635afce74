# SPDX-License-Identifier: Apache-2.0
"""What tests of the lvm driver in the lab share: a group, and a node there.

The driver runs here, and reaches the guest by the agent of its node alone.
"""

import contextlib

from tests.lab import case
from tests.lab import exports_case
from tests.lab.case import LabCase
from volume import ids
from volume import model
from volume.drivers.lvm import driver
from volume.remote.node import SshNode
from volume.testing import fixtures

MIB = model.MIB
POOL_BYTES = 1 << 30
# An earlier owner's bytes, and a volume's own ones.
OLD, OWN, OTHER = 0xa5, 0x5a, 0x41
# Both go around the page cache. DEVICE BYTE COUNT SEEK, and DEVICE BYTE SKIP.
FILL = '''
import mmap, os, sys
byte, count, seek = map(int, sys.argv[2:])
f = os.open(sys.argv[1], os.O_WRONLY | os.O_DIRECT)
block = mmap.mmap(-1, 1 << 20)
block.write(bytes([byte]) * (1 << 20))
for at in range(seek, seek + count):
    assert os.pwrite(f, block, at << 20) == 1 << 20
os.fsync(f)
'''
COUNT = '''
import mmap, os, sys
byte, skip = map(int, sys.argv[2:])
f = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
block, found, at = mmap.mmap(-1, 1 << 20), 0, skip << 20
while done := os.preadv(f, [block], at):
    found += block[:done].count(bytes([byte]))
    at += done
print(found)
'''


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

    def let_go(self, name):
        """Deactivate a logical volume, after udev has had its look at it."""
        for _ in range(10):
            self.guest.run('udevadm', 'settle')
            if self.guest.succeeds('lvchange', '-an', f'{self.group}/{name}'):
                return
        self.fail(f'{name} is in use all the time')

    def lvs(self, *options):
        """Return the names of the group's logical volumes, as lvs has them.
        """
        return self.guest.run(
            'lvs', '--noheadings', '-o', 'lv_name', *options, self.group
        ).split()


class SmallCase(LvmCase):
    """A group on small parts of two disks; two further disks are free."""

    disks = 0
    disk_bytes = 36 * MIB

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.addClassCleanup(cls.remove_group)

    @classmethod
    def make_group(cls, count=2):
        for number in range(count):
            cls.lvm(
                'pvcreate', '--setphysicalvolumesize', f'{cls.disk_bytes}b',
                case.disk(number),
            )
        cls.lvm('vgcreate', '-s', '1m', cls.group,
                *(case.disk(number) for number in range(count)))

    @classmethod
    def remove_group(cls):
        cls.guest.run(
            'vgremove', '-ff', '-y', '-q', cls.group, check=False)
        for number in range(4):
            cls.guest.run(
                'wipefs', '-qaf', case.disk(number), check=False)

    @classmethod
    def make_driver(cls, **options):
        made = driver.LvmDriver(cls.settings(**options), cls.node)
        made.check()
        return made

    def wish(self, size_bytes):
        return model.Volume(ids.new(), self.group, size_bytes)

    def fill(self, device, byte, count_mib, seek_mib=0):
        self.guest.run(
            'python3', '-c', FILL, device, str(byte), str(count_mib),
            str(seek_mib),
        )

    def count(self, device, byte, skip_mib=0):
        """Return how many bytes of a device are this one."""
        return int(self.guest.run(
            'python3', '-c', COUNT, device, str(byte), str(skip_mib)))

    def map(self, made, volume):
        return made.map(volume, model.Access.WRITE).path

    @contextlib.contextmanager
    def held_open(self, device):
        """Have somebody in the guest use a device."""
        user = self.guest.start(
            'sh', '-c', f'exec 7<>{device}; echo ready; cat')
        try:
            self.assertEqual(b'ready\n', user.stdout.readline())
            yield
        finally:
            user.communicate(timeout=60)
