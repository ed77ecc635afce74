# SPDX-License-Identifier: Apache-2.0
"""Disks of a volume group: missing, slow, moved away from, two as one."""

import contextlib
import threading
import unittest

from tests.lab import case
from tests.lab import exports_case
from tests.lab.lvm_case import MIB
from tests.lab.lvm_case import OTHER
from tests.lab.lvm_case import OWN
from tests.lab.lvm_case import SmallCase
from volume import errors
from volume import ids
from volume import model
from volume.drivers.lvm import driver
from volume.remote.node import SshNode

VIRTIO = '/sys/bus/virtio/drivers/virtio_blk'


@contextlib.contextmanager
def taken_away(guest, number):
    """Have the guest without one of its disks; yield its old name."""
    name = guest.run('readlink', '-f', case.disk(number)).strip()
    slot = guest.run(
        'readlink', '-f', f'/sys/block/{name[5:]}/device'
    ).strip().rsplit('/', 1)[1]
    guest.run('sh', '-c', f'echo {slot} > {VIRTIO}/unbind')
    try:
        yield name
    finally:
        guest.run('sh', '-c', f'echo {slot} > {VIRTIO}/bind')
        guest.run('udevadm', 'settle')


class SlowDisk:
    """A part of a disk of the guest whose writes can be late."""

    path = '/dev/mapper/slow'
    # From its second half on: LVM takes no two devices for one disk.
    start, sectors = 1 << 21, 1 << 16

    def __init__(self, test, number):
        self.test, self.disk = test, case.disk(number)
        test.guest.run('modprobe', 'dm-delay')
        self._dmsetup('create', 0)
        test.guest.run('wipefs', '-qaf', self.path)

    def delay(self, delay_ms):
        self._dmsetup('reload', delay_ms)
        self.test.guest.run('dmsetup', 'resume', 'slow')

    def is_written_to(self):
        """Say whether something is late."""
        said = self.test.guest.run('dmsetup', 'status', 'slow').split()
        return int(said[4]) > 0

    def remove(self):
        self.delay(0)
        self.test.guest.run('dmsetup', 'remove', '--retry', 'slow')

    def _dmsetup(self, command, delay_ms):
        part = f'{self.disk} {self.start}'
        self.test.guest.run('dmsetup', command, 'slow', '--table', (
            f'0 {self.sectors} delay {part} 0 {part} {delay_ms}'
        ))


class DisksTest(SmallCase, unittest.TestCase):
    """Disks that come and go, and that are taken only when empty."""

    provisioning = 'thick'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.make_group()

    def test_missing_disk_is_named_and_the_others_go_on(self):
        made = self.make_driver()
        here, there = self.wish(24 * MIB), self.wish(24 * MIB)
        for volume in here, there:
            made.create(volume)
            self.addCleanup(made.delete, volume)
        self.fill(self.map(made, here), OWN, 1)
        made.unmap(there)
        with taken_away(self.guest, 1) as name:
            with self.assertRaisesRegex(
                errors.Unavailable, f'misses .*last seen as {name}'
            ):
                made.create(self.wish(MIB))
            self.assertEqual(0, made.pools()[0].free_bytes)
            with self.assertRaises(errors.VolumeError) as refused:
                made.delete(there)
            self.assertNotIsInstance(refused.exception, errors.NotFound)
            self.assertEqual(MIB, self.count(self.map(made, here), OWN))
            self.assertEqual(
                24 * MIB, made.inspect(there).size_bytes)
        made.check()
        self.assertEqual(
            24 * MIB, self.count(self.map(made, there), 0))

    def test_group_that_a_person_extends_is_used_at_once(self):
        made = self.make_driver()
        volume = self.wish(100 * MIB)
        with self.assertRaises(errors.NoSpace):
            made.create(volume)
        self.lvm('vgextend', self.group, case.disk(2))
        try:
            made.create(volume)
            made.delete(volume)
        finally:
            self.lvm('vgreduce', self.group, case.disk(2))
            self.lvm('pvremove', case.disk(2))

    def test_volume_is_used_while_a_person_moves_it_to_another_disk(self):
        made = self.make_driver()
        volume = self.wish(8 * MIB)
        made.create(volume)
        self.addCleanup(made.delete, volume)
        path, name = self.map(made, volume), f'volume-{volume.id}'
        self.fill(path, OWN, 8)
        old, = self.disks_of(name)
        slow = SlowDisk(self, 2)
        self.addCleanup(slow.remove)
        # Without metadata, which would be written late as well.
        self.lvm('pvcreate', '--pvmetadatacopies', '0', slow.path)
        self.lvm('vgextend', self.group, slow.path)
        slow.delay(600_000)
        self.lvm('pvmove', '-b', '-i', '1', '-n', name, old, slow.path)
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        for deed in (
            lambda: made.disown(volume),
            lambda: made.snapshot(snapshot),
        ):
            with self.assertRaisesRegex(errors.Busy, 'locked'):
                deed()
        self.assertEqual(8 * MIB, self.count(path, OWN))
        slow.delay(0)
        self.fill(path, OTHER, 2, 3)
        while self.disks_of(name) != {slow.path}:
            pass
        self.assertEqual(
            (6 * MIB, 2 * MIB),
            (self.count(path, OWN), self.count(path, OTHER)),
        )
        made.snapshot(snapshot)
        made.delete_snapshot(snapshot)
        made.resize(volume, 9 * MIB)
        self.lvm('pvmove', slow.path)
        self.lvm('vgreduce', self.group, slow.path)
        self.lvm('pvremove', slow.path)
        self.assertEqual(
            (6 * MIB, 2 * MIB, MIB),
            tuple(self.count(path, byte) for byte in (OWN, OTHER, 0)),
        )

    def test_command_that_outlives_its_agent_is_alone_until_it_has_ended(self):
        slow = SlowDisk(self, 2)
        self.addCleanup(slow.remove)
        self.lvm('pvcreate', slow.path)
        self.lvm('vgextend', self.group, slow.path)
        node = SshNode(exports_case.target_of(self.guest))
        self.addCleanup(node.close)
        agent = node.run('sh', '-c', 'echo $PPID').strip()
        made = driver.LvmDriver(self.settings(), node)
        made.check()
        slow.delay(600_000)
        thread = threading.Thread(
            target=self.make_alone, args=(made._store(self.group).group,))
        thread.start()
        while not slow.is_written_to():
            self.assertTrue(thread.is_alive())
        self.guest.run('kill', '-KILL', agent)
        while self.guest.succeeds('test', '-e', f'/proc/{agent}'):
            pass
        lock = f'/run/lock/lvm/V_{self.group}'
        self.assertFalse(self.guest.succeeds('flock', '-n', lock, 'true'))
        slow.delay(0)
        self.guest.run('flock', '-w', '60', lock, 'true')
        thread.join(60)
        # The kernel has told it to end, and it has finished what it did.
        self.assertIn('mine', self.lvs())
        self.lvm('lvremove', f'{self.group}/mine')
        self.lvm('vgreduce', self.group, slow.path)
        self.lvm('pvremove', slow.path)

    def make_alone(self, group):
        with group.alone() as inside, contextlib.suppress(errors.Unknown):
            inside.change('lvcreate', '-l', '1', '-n', 'mine', self.group)

    def disks_of(self, name):
        """Return where a logical volume lies, as lvs has it."""
        return {
            part.partition('(')[0] for part in self.guest.run(
                'lvs', '--noheadings', '-o', 'devices',
                f'{self.group}/{name}',
            ).replace(',', ' ').split()
        }

    def test_group_is_made_only_of_empty_devices_and_when_asked(self):
        disk = case.disk(3)
        wanted = {
            'volume_groups': ['vg-made'], 'create': True, 'devices': [disk],
            'provisioning': 'thin',
        }
        self.addCleanup(
            self.guest.run, 'vgremove', '-ff', '-y', '-q', 'vg-made',
            check=False)
        looks = driver.LvmDriver(self.settings(**wanted), self.node)
        looks.may_format = False
        with self.assertRaisesRegex(errors.Unavailable, 'no volume group'):
            looks.check()
        self.guest.run('mkfs.ext4', '-q', '-F', disk, '64M')
        with self.assertRaisesRegex(errors.Invalid, 'carries ext4'):
            self.make_driver(**wanted)
        self.guest.run('e2fsck', '-fn', disk)
        self.guest.run('wipefs', '-qa', disk)
        for _ in range(2):
            made = self.make_driver(**wanted)
        pool, = made.pools()
        self.assertLess(3 << 30, pool.free_bytes)
        self.assertTrue(pool.thin)


class MirrorsTest(SmallCase, unittest.TestCase):
    """What a person has put on two disks, of which one goes."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.guest.run('modprobe', 'dm-raid')

    def setUp(self):
        super().setUp()
        # What an earlier test has left there is counted as well.
        for number in range(2):
            self.fill(case.disk(number), 0, self.disk_bytes // MIB)
        self.make_group()
        self.addCleanup(self.remove_group)

    def mirror(self, name, size_mib):
        self.lvm('lvcreate', '--type', 'raid1', '-m1', '-Wn', '-L',
                 f'{size_mib}m', '-n', name, self.group)
        # Until both have the same.
        while '100.00' not in self.guest.run(
            'lvs', '--noheadings', '-o', 'sync_percent',
            f'{self.group}/{name}',
        ):
            pass

    def test_volume_outlives_a_disk_and_is_wiped_on_both(self):
        made = self.make_driver(provisioning='thick', wipe='delete')
        self.mirror('mirror', 8)
        volume = self.wish(8 * MIB)
        made.adopt('mirror', volume)
        path = self.map(made, volume)
        self.fill(path, OWN, 8)
        with self.assertRaisesRegex(errors.Unsupported, 'raid'):
            made.resize(volume, 9 * MIB)
        # LVM takes the disk back with any change but the wiping of this.
        old = f'deleted-{volume.id}'
        self.lvm('lvrename', self.group, f'volume-{volume.id}', old)
        path = f'/dev/{self.group}/{old}'
        with taken_away(self.guest, 1):
            self.fill(path, OTHER, 4)
            self.assertEqual(4 * MIB, self.count(path, OWN))
        made.check()
        with self.assertRaisesRegex(
            errors.Unavailable, 'not well .refresh needed'
        ):
            made.upkeep(self.group)
        self.lvm('lvchange', '--refresh', f'{self.group}/{old}')
        while made.upkeep(self.group):
            pass
        self.assertEqual([], self.lvs())
        for byte in OWN, OTHER:
            self.assertEqual(
                0, sum(self.count(case.disk(at), byte, 1) for at in (0, 1)))

    def test_pool_on_two_disks_is_used_extended_and_told_of(self):
        self.mirror('pool', 16)
        self.mirror('meta', 2)
        self.lvm('lvconvert', '--type', 'thin-pool', '--poolmetadata',
                 f'{self.group}/meta', f'{self.group}/pool')
        self.lvm('lvchange', '--errorwhenfull', 'y', f'{self.group}/pool')
        made = self.make_driver(provisioning='thin')
        volume = self.wish(16 * MIB)
        made.create(volume)
        path = self.map(made, volume)
        self.fill(path, OWN, 14)
        before = made.pools()[0].total_bytes
        self.assertTrue(made.upkeep(self.group))
        self.assertGreater(before, made.pools()[0].free_bytes)
        with taken_away(self.guest, 1) as name:
            self.fill(path, OTHER, 2)
            with self.assertRaisesRegex(
                errors.Unavailable, f'disk that is missing: .*{name}'
            ):
                made.check()
        self.lvm('lvchange', '--refresh', f'{self.group}/pool')
        made.check()
        self.assertEqual(12 * MIB, self.count(path, OWN))
        made.delete(volume)
