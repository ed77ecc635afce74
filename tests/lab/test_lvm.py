# SPDX-License-Identifier: Apache-2.0
"""What only a kernel can show of the lvm driver: bytes, and full pools.

The groups are small, so that all of their space can be filled with a pattern
before, and be looked through afterwards.
"""

import unittest

from tests import lab
from tests.lab import case
from tests.lab.lvm_case import MIB
from tests.lab.lvm_case import OLD
from tests.lab.lvm_case import OTHER
from tests.lab.lvm_case import OWN
from tests.lab.lvm_case import SmallCase
from volume import errors
from volume import ids
from volume import model
from volume.cli import manage_lvm
from volume.drivers.lvm import driver
from volume.drivers.lvm import groups
from volume.drivers.lvm import options

# One byte in every so many-th 64 KiB of 256 MiB. DEVICE STEP
BREAK = '''
import os, sys
f = os.open(sys.argv[1], os.O_WRONLY)
for at in range(0, 4096, int(sys.argv[2])):
    os.pwrite(f, b'x', at << 16)
os.fsync(f)
'''
SCATTER = '''
import os, sys
f = os.open(sys.argv[1], os.O_WRONLY)
for at in range(0, 250, 25):
    os.pwrite(f, os.urandom(4096), at << 20)
os.fsync(f)
'''
# Leaves it in the page cache, and the device open, as tgtd does.
CACHE = '''
import os, sys
f = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(f, bytes([int(sys.argv[2])]) * int(sys.argv[3]), 0)
print('written', flush=True)
sys.stdin.read()
'''


class CachedCase(SmallCase):
    """What a daemon has in the node's memory, and has told its host of."""

    def check_snapshot_of_what_is_cached(self, made, volume):
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        with self.guest.start(
            'python3', '-c', CACHE, self.map(made, volume), str(OWN),
            str(volume.size_bytes),
        ) as daemon:
            self.assertEqual(b'written\n', daemon.stdout.readline())
            made.snapshot(snapshot)
            with made.reader(snapshot) as reader:
                found = bytearray()
                while part := reader.read(MIB):
                    found += part
            daemon.stdin.close()
        self.assertEqual(bytes([OWN]) * volume.size_bytes, bytes(found))
        made.delete_snapshot(snapshot)


class ThickBytesTest(CachedCase, unittest.TestCase):
    """No byte of an earlier owner, wherever it may lie."""

    provisioning = 'thick'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.make_group()

    def setUp(self):
        super().setUp()
        # All of the free space has an earlier owner's bytes.
        self.lvm('lvcreate', '-Wn', '-Zn', '-l', '100%FREE', '-n', 'all',
                 self.group)
        size = int(self.guest.run(
            'blockdev', '--getsize64', f'/dev/{self.group}/all'))
        self.fill(f'/dev/{self.group}/all', OLD, size // MIB)
        self.lvm('lvremove', f'{self.group}/all')
        self.driver = self.make_driver()

    def volume(self, size_mib=8):
        volume = self.wish(size_mib * MIB)
        self.driver.create(volume)
        self.addCleanup(self.driver.delete, volume)
        return volume

    def free_bytes_that_are(self, byte):
        """Look through what nobody has now."""
        self.lvm('lvcreate', '-Wn', '-Zn', '-l', '100%FREE', '-n', 'all',
                 self.group)
        try:
            return self.count(f'/dev/{self.group}/all', byte)
        finally:
            self.lvm('lvremove', f'{self.group}/all')

    def test_new_volume_and_its_grown_tail_are_zero_under_use(self):
        volume = self.volume()
        path = self.map(self.driver, volume)
        self.assertEqual(8 * MIB, self.count(path, 0))
        self.fill(path, OWN, 8)
        with self.held_open(path):
            self.driver.resize(volume, 24 * MIB)
            self.driver.resize(volume, 24 * MIB)
        self.assertEqual(16 * MIB, self.count(path, 0))
        self.assertEqual(8 * MIB, self.count(path, OWN))
        self.assertEqual(
            24 * MIB, self.driver.inspect(volume).size_bytes)
        self.assertEqual([f'volume-{volume.id}'], self.lvs())

    def test_snapshot_has_what_a_daemon_has_not_stored_yet(self):
        self.check_snapshot_of_what_is_cached(self.driver, self.volume())

    def test_nothing_of_a_deleted_volume_or_snapshot_is_left(self):
        volume = self.volume()
        path = self.map(self.driver, volume)
        self.fill(path, OWN, 8)
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        self.driver.snapshot(snapshot)
        self.fill(path, OTHER, 8)  # so that the area has its old bytes
        with self.driver.reader(snapshot) as reader:
            self.assertEqual(0x5a, reader.read(1)[0])
        with self.held_open(path):
            self.driver.delete_snapshot(snapshot)
        self.driver.delete(volume)
        self.assertEqual([], self.lvs())
        self.assertEqual(0, self.free_bytes_that_are(OWN))
        self.assertEqual(0, self.free_bytes_that_are(OTHER))
        # It was there to be found.
        self.assertLess(30 * MIB, self.free_bytes_that_are(OLD))

    def test_upkeep_goes_on_with_its_wiping_where_it_was(self):
        self.driver._store(self.group).upkeep_s = 0.0  # one piece at a time
        volume = self.volume(40)
        self.fill(self.map(self.driver, volume), OWN, 40)
        self.driver.unmap(volume)
        name = f'deleted-{volume.id}'
        self.lvm('lvrename', self.group, f'volume-{volume.id}', name)
        found = []
        while name in self.lvs():
            found.append(self.guest.run(
                'lvs', '--noheadings', '-o', 'lv_tags',
                f'{self.group}/{name}').strip())
            self.driver.upkeep(self.group)
        tag = f'volume:{volume.id}'
        self.assertEqual([
            tag, f'{tag},wiped:{16 * MIB}', f'{tag},wiped:{32 * MIB}',
        ], found)
        self.assertEqual(0, self.free_bytes_that_are(OWN))

    def test_zeroed_extents_are_not_discarded_when_they_change_hands(self):
        place = '/etc/lvm/lvmlocal.conf'
        self.guest.run('sh', '-c', (
            f'test -e {place} && cp {place} {place}.kept; '
            f'echo "devices {{ issue_discards = 1 }}" > {place}'
        ))
        self.addCleanup(self.guest.run, 'sh', '-c', (
            f'rm {place}; test ! -e {place}.kept || mv {place}.kept {place}'
        ))
        volume = self.volume()
        self.fill(self.map(self.driver, volume), OWN, 8)
        before = self.discards()
        self.driver.resize(volume, 16 * MIB)
        self.assertEqual(before, self.discards())
        self.assertEqual(
            8 * MIB, self.count(self.map(self.driver, volume), 0))
        self.driver.delete(volume)
        # As the machine's own configuration has it.
        self.assertLess(before, self.discards())

    def test_no_command_of_lvm_comes_between_those_that_hand_extents_on(self):
        volume = self.volume()
        with self.driver._store(self.group).group.alone() as group:
            stranger = self.guest.start(
                'lvcreate', '-qq', '--yes', '-l', '1', '-n', 'strange',
                self.group,
            )
            self.addCleanup(stranger.communicate)
            while '-> FLOCK' not in self.guest.run('cat', '/proc/locks'):
                self.assertIsNone(stranger.poll())
            group.change('lvcreate', '-l', '1', '-n', 'mine', self.group)
            self.assertEqual(
                {'mine', f'volume-{volume.id}'},
                {lv.name for lv in group.look(groups.EVERYTHING).lvs},
            )
            group.remove('mine')
        said, _ = stranger.communicate(timeout=60)
        self.assertEqual(0, stranger.returncode, said)
        self.assertEqual(
            {'strange', f'volume-{volume.id}'}, set(self.lvs()))
        self.lvm('lvremove', f'{self.group}/strange')

    def discards(self):
        """Return how often the disks were told that something is free."""
        return sum(
            int(self.guest.run(
                'sh', '-c', 'cat /sys/block/$(basename $(readlink -f $0))'
                '/stat', case.disk(number),
            ).split()[11]) for number in range(2)
        )

    def test_volume_that_another_pool_stands_on_is_neither_wiped_nor_taken(
        self,
    ):
        volume = self.volume()
        name = f'{self.group}/volume-{volume.id}'
        self.fill(self.map(self.driver, volume), OWN, 8)
        self.driver.unmap(volume)
        self.lvm('lvchange', '-pr', name)
        self.lvm('lvcreate', '-T', '-L', '8m', f'{self.group}/another')
        self.lvm('lvcreate', '-s', '--thinpool', f'{self.group}/another',
                 '-n', 'child', name)
        with self.assertRaisesRegex(errors.Busy, f'has {self.group}/child'):
            self.driver.delete(volume)
        self.assertEqual(
            8 * MIB, self.count(f'/dev/{self.group}/child', OWN))
        self.lvm('lvrename', self.group, f'volume-{volume.id}', 'data')
        with self.assertRaisesRegex(errors.Busy, f'has {self.group}/child'):
            self.driver.adopt('data', volume)
        self.lvm('lvremove', f'{self.group}/another')
        self.driver.adopt('data', volume)

    def test_volume_in_use_is_not_deleted_or_renamed(self):
        volume = self.volume()
        path = self.map(self.driver, volume)
        self.fill(path, OWN, 1)
        with self.held_open(path):
            for deed in (
                lambda: self.driver.delete(volume),
                lambda: self.driver.unmap(volume),
                lambda: self.driver.disown(volume),
                lambda: self.driver.writer(volume).__enter__(),
            ):
                with self.assertRaises(errors.Busy):
                    deed()
        self.assertEqual([f'volume-{volume.id}'], self.lvs())
        self.assertEqual(MIB, self.count(path, OWN))

    def test_snapshot_that_overflows_says_so_and_can_be_deleted(self):
        self.driver = self.make_driver(snapshot_percent=10)
        volume = self.volume(16)
        path = self.map(self.driver, volume)
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        self.driver.snapshot(snapshot)
        self.fill(path, OWN, 16)
        with self.assertRaisesRegex(errors.Corrupt, 'snapshot_percent'):
            with self.driver.reader(snapshot):
                pass
        rows = manage_lvm.check(
            options.read(self.settings()), self.node, {})
        self.assertIn('overflowed', ' '.join(row['why'] for row in rows))
        self.driver.delete_snapshot(snapshot)
        self.assertEqual(16 * MIB, self.count(path, OWN))

    def test_snapshot_that_fills_up_is_extended_in_time(self):
        self.driver = self.make_driver(
            snapshot_percent=30, extend_percent=20, extend_by_percent=100)
        volume = self.volume(16)
        path = self.map(self.driver, volume)
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        self.driver.snapshot(snapshot)
        for at in range(0, 16, 2):
            self.fill(path, OWN, 2, at)
            while self.driver.upkeep(self.group):
                pass
        with self.driver.reader(snapshot) as reader:
            self.assertFalse(any(reader.read(4 * MIB)))
        self.driver.delete_snapshot(snapshot)


class ThinPoolTest(CachedCase, unittest.TestCase):
    """A pool that is nearly full, full, and looked into."""

    provisioning = 'thin'
    disk_bytes = 100 * MIB

    def setUp(self):
        self.make_group(1)
        self.addCleanup(self.remove_group)
        # Of so little metadata a tenth is in use at once.
        self.lvm(
            'lvcreate', '-T', '-L', '32m', '--poolmetadatasize', '2m',
            '--errorwhenfull', 'y', f'{self.group}/pool',
        )

    def test_snapshot_has_what_a_daemon_has_not_stored_yet(self):
        made, volume = self.make_driver(), self.wish(8 * MIB)
        made.create(volume)
        self.check_snapshot_of_what_is_cached(made, volume)
        extents = list(made.extents(volume, None))
        self.assertEqual([], [each for each in extents if each.is_zero])
        self.assertEqual(
            8 * MIB, sum(each.length_bytes for each in extents))
        made.delete(volume)

    def test_full_pool_refuses_and_goes_on_when_it_was_extended(self):
        made = self.make_driver()
        volume, other = self.wish(256 * MIB), self.wish(MIB)
        for each in volume, other:
            made.create(each)
        path = self.map(made, volume)
        self.fill(path, OWN, 16)
        with self.assertRaises(lab.Failed):
            self.fill(path, OLD, 32, 16)
        self.assertEqual(16 * MIB, self.count(path, OWN))
        with self.assertRaises(errors.NoSpace):
            made.create(self.wish(MIB))
        while made.upkeep(self.group):
            pass
        self.fill(path, OLD, 20, 16)
        self.assertEqual(
            (16 * MIB, 20 * MIB),
            (self.count(path, OWN), self.count(path, OLD)),
        )
        for each in volume, other:
            made.delete(each)

    def test_snapshots_are_refused_before_metadata_are_full(self):
        volume = self.wish(256 * MIB)
        self.make_driver().create(volume)
        used = float(self.guest.run(
            'lvs', '--noheadings', '-o', 'metadata_percent',
            f'{self.group}/pool',
        ))
        # Each snapshot that is broken takes about a fifth of a percent.
        made = self.make_driver(
            metadata_high_percent=int(used) + 1, extend_percent=100)
        path = self.map(made, volume)
        taken = []
        with self.assertRaisesRegex(errors.NoSpace, 'metadata of thin pool'):
            for _ in range(60):
                snapshot = model.Snapshot(
                    ids.new(), volume, volume.size_bytes)
                made.snapshot(snapshot)
                taken.append(snapshot)
                # A block here and there breaks what is shared.
                self.guest.run('python3', '-c', SCATTER, path)
        self.assertTrue(taken)
        for snapshot in taken:
            made.delete_snapshot(snapshot)
        made.snapshot(taken[0])
        made.delete_snapshot(taken[0])
        made.delete(volume)

    def test_pool_without_metadata_is_read_and_extended_by_a_check(self):
        self.remove_group()
        self.make_large_group()
        made = self.make_driver()
        volume = self.wish(256 * MIB)
        made.create(volume)
        self.guest.run('python3', '-c', BREAK, self.map(made, volume), '1')
        # Each takes next to nothing now, and its share once it is written.
        clones = [self.wish(volume.size_bytes) for _ in range(28)]
        for clone in clones:
            made.clone(volume, clone)
        with self.assertRaises(lab.Failed):
            for clone in clones:
                self.guest.run(
                    'python3', '-c', BREAK, self.map(made, clone), '100')
        looks = driver.LvmDriver(self.settings(), self.node)
        looks.may_format = False
        for deed in looks.check, lambda: made.create(self.wish(MIB)):
            with self.assertRaisesRegex(errors.Unavailable, 'read-only'):
                deed()
        self.assertEqual(0, made.pools()[0].free_bytes)
        with made.reader(volume) as reader:
            self.assertEqual(b'x' + bytes(999), reader.read(1000))
        made.check()
        self.guest.run('python3', '-c', BREAK, self.map(made, volume), '7')
        for each in [*clones, volume]:
            made.delete(each)
        self.assertEqual(['pool'], self.lvs())

    @classmethod
    def make_large_group(cls):
        cls.lvm('vgcreate', '-s', '1m', cls.group, case.disk(0))
        cls.lvm(
            'lvcreate', '-T', '-L', '512m', '--poolmetadatasize', '2m',
            '--errorwhenfull', 'y', f'{cls.group}/pool',
        )

    def test_snapshot_that_a_backup_has_made_is_not_taken_away(self):
        made = self.make_driver()
        volume = self.wish(4 * MIB)
        made.create(volume)
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        made.snapshot(snapshot)
        for name, deed in (
            (f'snap-{snapshot.id}', made.delete_snapshot),
            (f'volume-{volume.id}', made.revert),
        ):
            self.lvm('lvcreate', '-s', '-L', '1m', '-n', 'backup',
                     f'{self.group}/{name}')
            with self.assertRaisesRegex(errors.Busy, f'{self.group}/backup'):
                deed(snapshot)
            self.assertIn('backup', self.lvs())
            self.lvm('lvremove', f'{self.group}/backup')
            deed(snapshot)
            if deed == made.delete_snapshot:
                made.snapshot(snapshot)
        made.delete_snapshot(snapshot)
        made.delete(volume)

    def test_metadata_snapshot_that_was_left_is_released(self):
        made = self.make_driver()
        volume = self.wish(4 * MIB)
        made.create(volume)
        self.fill(self.map(made, volume), OWN, 1)
        name = self.group.replace('-', '--') + '-pool-tpool'
        hold = 'dmsetup', 'message', name, '0', 'reserve_metadata_snap'
        self.guest.run(*hold)
        with self.assertRaisesRegex(errors.Unavailable, 'another tool'):
            list(made.extents(volume, None))
        again = self.make_driver()
        runs = list(again.extents(volume, None))
        self.assertEqual(MIB, sum(run.length_bytes for run in runs))
        self.assertTrue(self.guest.succeeds(*hold))
        self.guest.run(*hold[:-1], 'release_metadata_snap')
        made.delete(volume)

    def test_check_compares_group_metadata_and_database(self):
        made = self.make_driver()
        volume, lost = self.wish(4 * MIB), self.wish(4 * MIB)
        made.create(volume)
        self.lvm('lvcreate', '-V', '4m', '--thinpool', 'pool', '-n',
                 f'draft-{lost.id}', '--addtag', f'volume:{lost.id}',
                 self.group)
        known = {
            volume.id: manage_lvm.Known(self.group, 'x', 8 * MIB),
            lost.id: manage_lvm.Known(self.group, f'volume-{lost.id}', 1),
        }
        rows = manage_lvm.check(
            options.read(self.settings()), self.node, known)
        self.assertEqual(
            {f'{self.group}/volume-{volume.id}',
             f'{self.group}/draft-{lost.id}',
             f'{self.group}/volume-{lost.id}'},
            {row['what'] for row in rows},
        )
        for each in volume, lost:
            made.delete(each)
        self.assertEqual([], manage_lvm.check(
            options.read(self.settings()), self.node, {}))
