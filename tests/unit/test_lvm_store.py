# SPDX-License-Identifier: Apache-2.0
"""What the lvm driver does where others, or a crash, have been before it."""

import unittest

from tests import lvm
from volume import errors
from volume import ids
from volume import model
from volume import progress
from volume.cli import manage_lvm
from volume.drivers.lvm import driver
from volume.drivers.lvm import options
from volume.testing import fixtures
from volume.testing import workbench

SIZE = 4 * lvm.EXTENT


class Case(unittest.TestCase):

    provisioning = 'thin'

    def setUp(self):
        self.world = lvm.World(
            fixtures.directory(self), 256,
            has_pool=self.provisioning == 'thin',
        )
        self.node = lvm.SimNode(fixtures.state_dir(self))
        self.node.world = self.world
        self.driver = self.make_driver()

    def make_driver(self, **wanted):
        made = driver.LvmDriver(self.settings(**wanted), self.node)
        made.check()
        return made

    def settings(self, **wanted):
        return fixtures.settings(driver.LvmDriver, **{
            'volume_groups': [lvm.GROUP], 'provisioning': self.provisioning,
            **wanted,
        })

    def wish(self, size_bytes=SIZE):
        return model.Volume(ids.new(), lvm.GROUP, size_bytes)

    def volume(self, seed=None):
        volume = self.wish()
        self.driver.create(volume)
        if seed is not None:
            workbench.fill(
                self.driver, volume, workbench.pattern(seed, SIZE))
        return volume

    def lvm(self, *argv):
        self.world.command(argv)

    def assert_seed(self, source, seed):
        self.assertEqual(
            workbench.pattern(seed, SIZE),
            workbench.content(self.driver, source),
        )


class ThinTest(Case):

    def test_revert_that_died_between_its_renames_is_ended_by_whoever_comes(
        self,
    ):
        for ask in (
            lambda v: self.driver.inspect(v),
            lambda v: self.driver.map(v, model.Access.READ),
            lambda v: self.driver.resize(v, SIZE),
        ):
            volume = self.volume(seed=2)
            self.lvm('lvrename', lvm.GROUP, f'volume-{volume.id}',
                     f'deleted-{volume.id}')
            self.lvm('lvcreate', '-s', '-n', f'reverted-{volume.id}', '-ky',
                     '--addtag', f'volume:{volume.id}',
                     f'{lvm.GROUP}/deleted-{volume.id}')
            while self.driver.upkeep(lvm.GROUP):
                self.fail('upkeep takes away a part of a revert')
            ask(volume)
            self.assert_seed(volume, 2)
            self.driver.delete(volume)
            self.assertEqual(['pool'], list(self.world.lvs))

    def test_new_volumes_are_refused_before_metadata_are_full(self):
        volume = self.volume(seed=1)
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.world.metadata_percent = 90.0
        self.driver = self.make_driver(extend_percent=100)
        for deed in (
            lambda: self.driver.create(self.wish()),
            lambda: self.driver.snapshot(snapshot),
            lambda: self.driver.clone(volume, self.wish()),
        ):
            with self.assertRaisesRegex(errors.NoSpace, '90 % full'):
                deed()
        self.assert_seed(volume, 1)

    def test_group_and_pool_are_made_of_empty_disks_when_asked(self):
        self.world.has_group = False
        self.world.lvs.clear()
        wanted = {'create': True, 'devices': ['/dev/sim']}
        looks = driver.LvmDriver(self.settings(**wanted), self.node)
        looks.may_format = False
        with self.assertRaisesRegex(errors.Unavailable, 'no volume group'):
            looks.check()
        self.world.signatures = ['ext4', 'gpt']
        with self.assertRaisesRegex(errors.Invalid, 'carries ext4, gpt'):
            self.make_driver(**wanted)
        self.assertFalse(self.world.has_group)
        self.world.signatures = []
        with self.assertRaisesRegex(errors.Unavailable, 'no volume group'):
            self.make_driver()
        for _ in range(2):
            self.driver = self.make_driver(**wanted)
        self.assertEqual(['pool'], list(self.world.lvs))
        self.volume(seed=1)

    def test_damaged_metadata_are_found_and_released_again(self):
        self.world.damaged = True
        row, = self.checked({})
        self.assertIn('are damaged: thin_check', row['why'])
        self.assertIsNone(self.world.held)

    def test_check_names_each_difference_with_a_remedy(self):
        fine, small, orphan = (self.volume() for _ in range(3))
        lost, born = ids.new(), ids.new()
        self.lvm('lvcreate', '-n', 'renamed', '-V', '65536b', '--addtag',
                 f'volume:{lost}', lvm.GROUP)
        rows = self.checked({
            fine.id: manage_lvm.Known(lvm.GROUP, 'x', SIZE),
            small.id: manage_lvm.Known(lvm.GROUP, 'x', SIZE + 1),
            lost: manage_lvm.Known(lvm.GROUP, f'volume-{lost}', SIZE),
            born: manage_lvm.Known(lvm.GROUP, '', SIZE),
            ids.new(): manage_lvm.Known('another', 'x', SIZE),
        })
        self.assertEqual(
            {
                f'{lvm.GROUP}/volume-{small.id}': 'should have',
                f'{lvm.GROUP}/volume-{orphan.id}': 'no row',
                f'{lvm.GROUP}/volume-{lost}': 'the group has not',
                f'{lvm.GROUP}/renamed': 'not its name',
            },
            {
                row['what']: words for row in rows for words in (
                    'should have', 'no row', 'the group has not',
                    'not its name',
                ) if words in row['why']
            },
        )
        self.assertTrue(all(row['remedy'] for row in rows))

    def checked(self, known):
        return manage_lvm.check(
            options.read(self.settings()), self.node, known)


class ThickTest(Case):

    provisioning = 'thick'

    def test_strange_volume_of_our_name_is_a_conflict_until_it_is_taken(
        self,
    ):
        volume = self.wish()
        name = f'volume-{volume.id}'
        self.lvm('lvcreate', '-n', name, '-l', '4', lvm.GROUP)
        with self.assertRaisesRegex(errors.Conflict, 'not ours'):
            self.driver.create(volume)
        with self.assertRaises(errors.NotFound):
            self.driver.inspect(volume)
        self.driver.delete(volume)
        self.assertIn(name, self.world.lvs)
        self.assertEqual(name, self.driver.adopt(name, volume))
        self.assertEqual(volume.id, self.driver.inspect(volume).id)

    def test_extents_that_others_had_in_between_are_zeroed_again(self):
        volume = self.volume(seed=1)
        extend = self.world._lvextend

        def beside(words):
            # Another process takes the extents, writes, and gives them back.
            for number in self.world.free:
                self.world.disk[number] = b'\xbb' * lvm.EXTENT
            self.world.seqno += 2
            extend(words)

        self.world._lvextend = beside
        self.driver.resize(volume, 2 * SIZE)
        found = workbench.content(self.driver, volume)
        self.assertEqual(workbench.pattern(1, SIZE), found[:SIZE])
        self.assertFalse(any(found[SIZE:]))

    def test_extents_that_others_keep_are_replaced_by_other_ones(self):
        volume = self.volume(seed=1)
        extend, taken = self.world._lvextend, []

        def beside(words):
            if not taken:
                taken.append(words)
                self.world._lvcreate(
                    ['-n', 'strange', '-l', '6', lvm.GROUP])
            extend(words)

        self.world._lvextend = beside
        self.driver.resize(volume, 2 * SIZE)
        found = workbench.content(self.driver, volume)
        self.assertFalse(any(found[SIZE:]))
        self.assertEqual(2 * SIZE, len(found))

    def test_volume_that_somebody_uses_stays_what_it_is(self):
        volume = self.volume(seed=1)
        self.world.lvs[f'volume-{volume.id}'].open = True
        for deed in (
            lambda: self.driver.delete(volume),
            lambda: self.driver.unmap(volume),
            lambda: self.driver.disown(volume),
            lambda: self.driver.writer(volume).__enter__(),
        ):
            with self.assertRaises(errors.Busy):
                deed()
        self.assert_seed(volume, 1)

    def test_lost_snapshot_says_so_and_can_be_deleted(self):
        volume = self.volume(seed=1)
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.driver.snapshot(snapshot)
        self.world.lvs[f'snap-{snapshot.id}'].invalid = True
        for read in self.driver.reader, self.driver.blocknode:
            with self.assertRaisesRegex(errors.Corrupt, 'is lost'):
                with read(snapshot):
                    pass
        self.driver.delete_snapshot(snapshot)
        self.assert_seed(volume, 1)

    def test_what_a_lost_job_has_deleted_is_wiped_by_upkeep(self):
        volume = self.volume(seed=1)
        self.lvm('lvrename', lvm.GROUP, f'volume-{volume.id}',
                 f'deleted-{volume.id}')
        self.assertTrue(self.driver.upkeep(lvm.GROUP))
        self.assertFalse(self.driver.upkeep(lvm.GROUP))
        self.assertEqual({}, self.world.lvs)
        self.assertEqual(4, self.world.disk.count(bytes(lvm.EXTENT)))

    def test_missing_disk_stops_what_is_new_and_nothing_else(self):
        volume = self.volume(seed=1)
        self.world.missing = True
        self.driver = self.make_driver()
        with self.assertRaisesRegex(errors.Unavailable, 'misses SIMPV'):
            self.driver.create(self.wish())
        self.assertEqual(0, self.driver.pools()[0].free_bytes)
        self.assert_seed(volume, 1)

    def test_wiping_that_is_cancelled_leaves_no_volume_and_can_be_undone(
        self,
    ):
        told = []

        def stop(done_bytes, total_bytes):
            told.append((done_bytes, total_bytes))
            raise errors.Cancelled('stop')

        volume, other = self.wish(), self.volume(seed=1)
        for deed in self.driver.create, lambda _: self.driver.delete(other):
            with progress.watching(stop), self.assertRaises(
                errors.Cancelled
            ):
                deed(volume)
        self.assertEqual([(SIZE, SIZE)] * 2, told)
        for each in volume, other:
            with self.assertRaises(errors.NotFound):
                self.driver.inspect(each)
        self.assertEqual(
            {f'draft-{volume.id}', f'deleted-{other.id}'},
            set(self.world.lvs),
        )
        self.driver.delete(other)
        self.driver.create(volume)
        self.assertFalse(any(workbench.content(self.driver, volume)))
        self.driver.delete(volume)
        self.assertEqual({}, self.world.lvs)

    def test_wipe_says_when_zeros_are_written(self):
        for wipe, is_new_zero, is_old_zero in (
            ('both', True, True), ('create', True, False),
            ('delete', False, True),
        ):
            with self.subTest(wipe):
                self.world.disk = [lvm.STALE * lvm.EXTENT] * 256
                self.driver = self.make_driver(wipe=wipe)
                volume = self.volume()
                found = workbench.content(self.driver, volume)
                self.assertEqual(is_new_zero, not any(found))
                with self.driver.writer(volume) as writer:
                    writer.write(b'\x5a' * SIZE)
                    writer.commit()
                self.driver.delete(volume)
                left = self.world.disk.count(b'\x5a' * lvm.EXTENT)
                self.assertEqual(0 if is_old_zero else 4, left)
