# SPDX-License-Identifier: Apache-2.0
"""What the lvm driver does where others, or a crash, have been before it."""

import functools
import threading
import unittest

from tests import lvm
from volume import errors
from volume import ids
from volume import model
from volume import progress
from volume.cli import manage_lvm
from volume.drivers.lvm import driver
from volume.drivers.lvm import names
from volume.drivers.lvm import options
from volume.drivers.lvm import wiping
from volume.testing import fixtures
from volume.testing import workbench

SIZE = 4 * lvm.EXTENT


def cancel(done_bytes, total_bytes):
    raise errors.Cancelled('a person wants it')


class Case(unittest.TestCase):

    provisioning = 'thin'
    extents = 256

    def setUp(self):
        self.world = lvm.World(
            fixtures.directory(self), self.extents,
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
        self.world.users = ['qemu (pid 7)']
        with self.assertRaisesRegex(errors.Invalid, 'in use by qemu'):
            self.make_driver(**wanted)
        self.world.users = []
        with self.assertRaisesRegex(errors.Unavailable, 'no volume group'):
            self.make_driver()
        for _ in range(2):
            self.driver = self.make_driver(**wanted)
        self.assertEqual(['pool'], list(self.world.lvs))
        self.volume(seed=1)

    def test_what_others_depend_on_stays_with_them(self):
        volume = self.volume(seed=1)
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.driver.snapshot(snapshot)
        whole, kept = f'volume-{volume.id}', f'snap-{snapshot.id}'
        # A backup tool's snapshot of the old kind, and a thin volume that
        # another pool has made of a read-only one.
        for origin, deed in (
            (whole, self.driver.revert), (kept, self.driver.delete_snapshot),
        ):
            backup = f'backup-{origin[:4]}'
            self.lvm('lvcreate', '-s', '-n', backup, '-l', '1',
                     f'{lvm.GROUP}/{origin}')
            self.assert_stays(
                origin, backup, functools.partial(deed, snapshot))
        child = self.world._new('child', 'thin', SIZE)
        child.origin, child.pool = kept, 'another'
        self.lvm('lvremove', f'{lvm.GROUP}/backup-snap')
        with open(self.world._file(child), 'wb'):
            pass
        self.assert_stays(
            kept, 'child', lambda: self.driver.delete_snapshot(snapshot))
        self.lvm('lvremove', f'{lvm.GROUP}/child')
        self.driver.delete_snapshot(snapshot)
        self.assert_stays(
            whole, 'backup-volu', lambda: self.driver.delete(volume))
        self.assert_seed(volume, 1)

    def test_origin_of_another_pool_is_not_adopted(self):
        volume = self.wish()
        self.lvm('lvcreate', '-n', 'data', '-V', '65536b', lvm.GROUP)
        child = self.world._new('child', 'thin', SIZE)
        child.origin, child.pool = 'data', 'another'
        self.assert_stays(
            'data', 'child', lambda: self.driver.adopt('data', volume))
        child.pool = 'pool'
        self.driver.adopt('data', volume)

    def assert_stays(self, name, other, deed):
        before = set(self.world.lvs)
        with self.assertRaisesRegex(
            errors.Busy, f'{lvm.GROUP}/{name} has {lvm.GROUP}/{other}, which'
        ):
            deed()
        self.assertEqual(before, set(self.world.lvs))

    def test_nothing_is_removed_while_a_disk_is_missing(self):
        volume, other = self.volume(seed=1), self.volume()
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.driver.snapshot(snapshot)
        self.lvm('lvrename', lvm.GROUP, f'volume-{other.id}',
                 f'deleted-{other.id}')
        before, self.world.missing = set(self.world.lvs), True
        for deed in (
            lambda: self.driver.delete_snapshot(snapshot),
            lambda: self.driver.delete(other),
            lambda: self.driver.upkeep(lvm.GROUP),
        ):
            with self.assertRaisesRegex(errors.Unavailable, 'misses SIMPV'):
                deed()
        self.assertEqual(before, set(self.world.lvs))

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

    def test_what_somebody_has_built_on_a_volume_is_not_wiped_under_him(
        self,
    ):
        volume = self.volume(seed=1)
        name = f'volume-{volume.id}'
        child = self.world._new('child', 'thin', SIZE)
        child.origin, child.pool = name, 'another'
        with self.assertRaisesRegex(errors.Busy, 'has sim-vg/child, which'):
            self.driver.delete(volume)
        self.assert_seed(volume, 1)
        # Also not if he came when it was called deleted already.
        self.lvm('lvrename', lvm.GROUP, name, f'deleted-{volume.id}')
        for deed in (
            lambda: self.driver.delete(volume),
            lambda: self.driver.upkeep(lvm.GROUP),
        ):
            with self.assertRaisesRegex(
                errors.Unavailable, 'has sim-vg/child'
            ):
                deed()
        self.lvm('lvrename', lvm.GROUP, f'deleted-{volume.id}', name)
        self.assert_seed(volume, 1)

    def test_extension_that_was_killed_is_not_in_its_own_way(self):
        volume, free = self.volume(seed=1), len(self.world.free)
        self.lvm(
            'lvcreate', '-n', f'tail-{volume.id}', '-l', str(free),
            '--addtag', f'volume:{volume.id}', '-ky', '-K', lvm.GROUP,
        )
        size_bytes = SIZE + free * lvm.EXTENT
        self.driver.resize(volume, size_bytes)
        self.assertEqual(
            size_bytes, self.driver.inspect(volume).size_bytes)

    def test_extents_that_were_zeroed_are_not_discarded_on_the_way(self):
        self.world.discards = True
        volume = self.volume(seed=1)
        self.driver.resize(volume, 2 * SIZE)
        found = workbench.content(self.driver, volume)
        self.assertEqual(workbench.pattern(1, SIZE), found[:SIZE])
        self.assertFalse(any(found[SIZE:]))
        # And where nothing new is wiped, zeros that were left are relied on.
        self.driver = self.make_driver(wipe='delete')
        self.driver.delete(volume)
        self.assertEqual(
            2 * SIZE // lvm.EXTENT,
            self.world.disk.count(bytes(lvm.EXTENT)))

    def test_nobody_has_the_extents_of_a_growing_volume_in_between(self):
        volume = self.volume(seed=1)
        extend, others = self.world._lvextend, []

        def beside(words):
            # Another process would take them, if it could.
            others.append(threading.Thread(target=self.lvm, args=(
                'lvcreate', '-n', 'strange', '-l', '6', lvm.GROUP,
            )))
            others[0].start()
            others[0].join(0.2)
            extend(words)

        self.world._lvextend = beside
        self.driver.resize(volume, 2 * SIZE)
        others[0].join()
        self.assertIn('strange', self.world.lvs)
        found = workbench.content(self.driver, volume)
        self.assertEqual(workbench.pattern(1, SIZE), found[:SIZE])
        self.assertFalse(any(found[SIZE:]))

    def test_zeros_that_somebody_removes_become_part_of_nothing(self):
        volume = self.volume(seed=1)
        change = self.world._lvchange

        def beside(words):
            change(words)
            if '-an' in words:
                self.world._lvremove(words[-1:])

        self.world._lvchange = beside
        with self.assertRaisesRegex(errors.Unavailable, 'went away'):
            self.driver.resize(volume, 2 * SIZE)
        self.assert_seed(volume, 1)
        self.world._lvchange = change
        self.driver.resize(volume, 2 * SIZE)
        self.assertFalse(any(workbench.content(self.driver, volume)[SIZE:]))

    def test_what_a_host_writes_where_a_volume_has_grown_stays(self):
        volume, other = self.volume(seed=1), self.volume()
        device = names.device(lvm.GROUP, f'volume-{volume.id}')
        self.driver.map(volume, model.Access.WRITE)
        run, beside = self.node.run, []
        others = [self.driver, self.make_driver()]  # of another backend

        def busy(*argv, **options):
            said = run(*argv, **options)
            if argv[0] == 'lvextend':
                with open(self.world.path(device), 'r+b') as host:
                    host.seek(SIZE)
                    host.write(b'mine')
            if argv[0] in ('lvremove', 'lvextend'):
                # Another request of this service changes the group, too.
                beside.append(threading.Thread(
                    target=others.pop().describe,
                    args=(other, {'after': argv[0]}),
                ))
                beside[-1].start()
                beside[-1].join(0.2)
            return said

        self.node.run = busy
        self.driver.resize(volume, 2 * SIZE)
        for each in beside:
            each.join()
        self.assertEqual(2, len(beside))
        found = workbench.content(self.driver, volume)
        self.assertEqual(workbench.pattern(1, SIZE), found[:SIZE])
        self.assertEqual(b'mine', found[SIZE:SIZE + 4])
        self.assertFalse(any(found[SIZE + 4:]))

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

    def test_full_group_is_no_reason_not_to_make_room_in_it(self):
        self.driver = self.make_driver(snapshot_percent=10)
        volume, other = self.volume(seed=1), self.volume(seed=2)
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.driver.snapshot(snapshot)
        filling = self.world.lvs[f'snap-{snapshot.id}']
        filling.filled = 90.0
        self.lvm('lvrename', lvm.GROUP, f'volume-{other.id}',
                 f'deleted-{other.id}')
        self.lvm('lvcreate', '-n', 'strange', '-l',
                 str(len(self.world.free)), lvm.GROUP)
        count = len(filling.extents)
        with self.assertRaises(errors.NoSpace):
            self.driver.upkeep(lvm.GROUP)
        self.assertNotIn(f'deleted-{other.id}', self.world.lvs)
        self.assertTrue(self.driver.upkeep(lvm.GROUP))
        self.assertGreater(len(filling.extents), count)

    def test_one_that_cannot_be_removed_keeps_no_other_from_it(self):
        names = []
        for number in range(3):
            volume = self.volume(seed=number)
            names.append(f'deleted-{volume.id}')
            self.lvm('lvrename', lvm.GROUP, f'volume-{volume.id}', names[-1])
        activate = self.world._lvchange

        def refuse(words):
            if words[-1].endswith(names[0]):
                raise lvm.Said(f'Couldn\'t find device for {words[-1]}')
            activate(words)

        self.world._lvchange = refuse
        self.world.lvs[names[0]].active = False
        for _ in range(2):
            with self.assertRaisesRegex(errors.Unavailable, 'find device'):
                self.driver.upkeep(lvm.GROUP)
        self.assertEqual([names[0]], list(self.world.lvs))

    def test_missing_disk_stops_what_is_new_and_nothing_else(self):
        volume = self.volume(seed=1)
        self.world.missing = True
        self.driver = self.make_driver()
        with self.assertRaisesRegex(errors.Unavailable, 'misses SIMPV'):
            self.driver.create(self.wish())
        self.assertEqual(0, self.driver.pools()[0].free_bytes)
        self.assert_seed(volume, 1)

    def test_missing_disk_that_is_back_is_told_how_to_be_let_in(self):
        self.world.missing = self.world.is_back = True
        with self.assertRaisesRegex(
            errors.Unavailable,
            'vgextend --restoremissing sim-vg /dev/sim',
        ):
            self.driver.create(self.wish())

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


class LongWipeTest(Case):
    """What is so large that upkeep wipes it in pieces."""

    provisioning = 'thick'
    extents = 600

    def make_driver(self, **wanted):
        made = super().make_driver(**wanted)
        made._store(lvm.GROUP).upkeep_s = 0.0  # one piece at a time
        return made

    def deleted(self):
        """Return a volume of three pieces, full, and called deleted."""
        volume = model.Volume(
            ids.new(), lvm.GROUP, 2 * wiping.CHUNK_BYTES + lvm.EXTENT)
        self.driver.create(volume)
        with self.driver.writer(volume) as writer:
            writer.write(b'\x5a' * volume.size_bytes)
            writer.commit()
        self.lvm('lvrename', lvm.GROUP, f'volume-{volume.id}',
                 f'deleted-{volume.id}')
        return volume

    def test_upkeep_wipes_a_piece_and_whoever_comes_goes_on_from_there(
        self,
    ):
        for ends in (
            lambda volume: self.driver.upkeep(lvm.GROUP),
            lambda volume: self.driver.delete(volume),
        ):
            with self.subTest(ends):
                volume = self.deleted()
                lv = self.world.lvs[f'deleted-{volume.id}']
                self.assertTrue(self.driver.upkeep(lvm.GROUP))
                self.assertIn(f'wiped:{wiping.CHUNK_BYTES}', lv.tags)
                # It is not wiped twice: nobody has written to it but we.
                with open(self.world._file(lv), 'r+b') as f:
                    f.write(b'mark')
                self.driver = self.make_driver()
                while lv.name in self.world.lvs:
                    ends(volume)
                self.assertIn(
                    b'mark'.ljust(lvm.EXTENT, b'\0'), self.world.disk)
                self.assertNotIn(b'\x5a' * lvm.EXTENT, self.world.disk)

    def test_what_was_taken_back_by_hand_is_wiped_from_its_beginning(self):
        volume = self.deleted()
        self.driver.upkeep(lvm.GROUP)
        self.lvm('lvrename', lvm.GROUP, f'deleted-{volume.id}',
                 f'volume-{volume.id}')
        with self.driver.writer(volume) as writer:
            writer.write(b'\x5a' * lvm.EXTENT)
            writer.commit()
        # Whoever was to wipe it dies, and upkeep comes.
        with progress.watching(cancel), self.assertRaises(
            errors.Cancelled
        ):
            self.driver.delete(volume)
        while self.driver.upkeep(lvm.GROUP):
            pass
        self.assertEqual({}, self.world.lvs)
        self.assertNotIn(b'\x5a' * lvm.EXTENT, self.world.disk)
