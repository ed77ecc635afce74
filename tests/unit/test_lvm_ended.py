# SPDX-License-Identifier: Apache-2.0
"""What the lvm driver does after a command that was ended in its middle.

LVM has written down what it will do before the kernel has done it.
"""

import concurrent.futures
import contextlib
import threading

from tests import lvm
from tests.unit import test_lvm_store
from volume import errors
from volume import ids
from volume import model
from volume import progress
from volume.testing import workbench

SIZE = test_lvm_store.SIZE


class Ended(BaseException):
    """The service was ended."""


class Common:
    """What thick and thin do alike."""

    def test_snapshot_or_clone_that_a_command_has_left_is_made_anew(self):
        volume, clone = self.volume(seed=1), self.wish()
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        deeds = {snapshot: lambda: self.driver.snapshot(snapshot)}
        if self.provisioning == 'thin':
            deeds[clone] = lambda: self.driver.clone(volume, clone)
        for thing, deed in deeds.items():
            with self.ended_after('lvcreate'), self.assertRaises(Ended):
                deed()
            with self.assertRaises(errors.NotFound):
                with self.driver.reader(thing):
                    pass
        workbench.fill(self.driver, volume, workbench.pattern(2, SIZE))
        for thing, deed in deeds.items():
            deed()
            self.assert_seed(thing, 2)

    def test_what_a_command_has_left_of_a_snapshot_goes_with_it(self):
        volume, other = self.volume(seed=1), self.volume(seed=1)
        snapshots = [
            model.Snapshot(ids.new(), each, SIZE) for each in (volume, other)
        ]
        for snapshot in snapshots:
            with self.ended_after('lvcreate'), self.assertRaises(Ended):
                self.driver.snapshot(snapshot)
        self.driver.delete_snapshot(snapshots[0])
        self.driver.delete(volume)
        self.driver.delete(other)
        self.assertLessEqual(set(self.world.lvs), {'pool'})

    def test_device_that_a_command_has_left_suspended_goes_on(self):
        for deed in (
            lambda each: self.driver.resize(each, SIZE),
            lambda each: self.driver.snapshot(
                model.Snapshot(ids.new(), each, SIZE)),
            lambda each: self.driver.map(each, model.Access.READ),
        ):
            volume = self.volume()
            self.world.lvs[f'volume-{volume.id}'].suspended = True
            deed(volume)
            self.assertFalse(
                self.world.lvs[f'volume-{volume.id}'].suspended)

    def test_device_of_another_is_never_taken_for_a_volumes(self):
        volume, other = self.volume(seed=1), self.volume(seed=2)
        for each in volume, other:
            self.driver.map(each, model.Access.READ)
        self.world.stale[f'volume-{volume.id}'] = f'volume-{other.id}'
        with self.assertRaisesRegex(errors.Unavailable, 'not its device'):
            self.driver.map(volume, model.Access.READ)
        self.world.stale.clear()
        self.assert_seed(volume, 1)

    def test_adoption_that_was_ended_leaves_no_tag(self):
        self.lvm('lvcreate', '-n', 'data', *self.foreign, lvm.GROUP)
        volume = self.wish()
        with self.ended_after('lvchange'), self.assertRaises(Ended):
            self.driver.adopt('data', volume)
        self.driver.disown(volume)
        data = self.world.lvs['data']
        self.assertEqual((set(), False), (data.tags, data.skip))
        for command in 'lvchange', 'lvrename':
            with self.ended_after(command), self.assertRaises(Ended):
                self.driver.adopt('data', volume)
        self.driver.adopt('data', volume)
        self.assertTrue(data.skip)

    @contextlib.contextmanager
    def ended_after(self, command):
        """Have the service end when a command of this name was done."""
        name = f'_{command}'
        done = getattr(self.world, name)

        def do(words):
            done(words)
            raise Ended

        setattr(self.world, name, do)
        try:
            yield
        finally:
            delattr(self.world, name)


class ThinTest(Common, test_lvm_store.Case):

    foreign = ('-V', f'{SIZE}b', '--thinpool', 'pool')

    def test_pool_that_a_command_has_left_suspended_goes_on(self):
        self.world.hangs = True
        self.driver.check()
        self.assertFalse(self.world.hangs)

    def test_pool_that_needs_a_check_is_not_extended(self):
        self.world.metadata_percent = 100.0
        self.world.lvs['pool'].needs_check = True
        before = self.world.seqno
        self.assertFalse(self.driver.upkeep(lvm.GROUP))
        self.assertEqual(before, self.world.seqno)

    def test_pool_that_many_find_full_at_once_is_extended_once(self):
        self.world.metadata_percent = 95.0
        looked, look = threading.Barrier(4), self.node.run

        def run(*argv, **options):
            said = look(*argv, **options)
            if argv[0] == 'lvm':
                # All of them have seen it before anybody does anything.
                with contextlib.suppress(threading.BrokenBarrierError):
                    looked.wait(5.0)
                looked.abort()
            return said

        self.node.run = run
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(self.driver.create, [self.wish() for _ in range(4)]))
        self.assertEqual(['pool'], self.world.extended)

    def test_what_a_revert_has_left_beside_its_volume_is_removed(self):
        volume, old = self.volume(seed=1), self.volume(seed=2)
        left = f'deleted-{volume.id}'
        self.lvm('lvrename', lvm.GROUP, f'volume-{old.id}', left)
        self.lvm('lvchange', '--addtag', f'volume:{volume.id}',
                 f'{lvm.GROUP}/{left}')
        self.assertTrue(self.driver.upkeep(lvm.GROUP))
        self.assertNotIn(left, self.world.lvs)
        self.assert_seed(volume, 1)

    def test_what_a_revert_calls_so_meanwhile_is_not_removed(self):
        volume, old = self.volume(seed=1), self.volume(seed=2)
        name, left = f'volume-{volume.id}', f'deleted-{volume.id}'
        self.lvm('lvrename', lvm.GROUP, f'volume-{old.id}', left)
        self.lvm('lvchange', '--addtag', f'volume:{volume.id}',
                 f'{lvm.GROUP}/{left}')
        borrow = self.node.borrow

        def late(path, wait_s):
            # A revert had its turn before: that one is gone, and what the
            # volume was has its name.
            self.node.borrow = borrow
            self.lvm('lvremove', f'{lvm.GROUP}/{left}')
            self.lvm('lvrename', lvm.GROUP, name, left)
            return borrow(path, wait_s)

        self.node.borrow = late
        self.driver.upkeep(lvm.GROUP)
        self.assertEqual(borrow, self.node.borrow)
        self.lvm('lvrename', lvm.GROUP, left, name)
        self.assert_seed(volume, 1)


class ThickTest(Common, test_lvm_store.Case):

    provisioning = 'thick'
    foreign = ('-l', '4')

    def test_area_that_is_no_snapshot_yet_is_not_read_as_one(self):
        volume = self.volume(seed=1)
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        tags = [
            '--addtag', f'snapshot:{snapshot.id}',
            '--addtag', f'of:{volume.id}',
        ]
        self.lvm('lvcreate', '-n', f'draft-{snapshot.id}', '-l', '5',
                 *tags, lvm.GROUP)
        self.driver.snapshot(snapshot)
        self.assert_seed(snapshot, 1)
        self.lvm('lvconvert', '--splitsnapshot',
                 f'{lvm.GROUP}/snap-{snapshot.id}')
        with self.assertRaisesRegex(errors.Corrupt, 'no snapshot any more'):
            with self.driver.reader(snapshot):
                pass
        self.driver.delete_snapshot(snapshot)
        self.driver.delete(volume)

    def test_deletion_that_is_held_up_after_the_wiping_is_gone_on_with(self):
        volume = self.volume(seed=1)
        remove = self.world._lvremove

        def refuse(words):
            raise lvm.Said(f'Logical volume {words[0]} in use.')

        self.world._lvremove = refuse
        # Never Busy, which would say that it is as it was.
        with self.assertRaisesRegex(errors.Unavailable, 'in use'):
            self.driver.delete(volume)
        self.world._lvremove = remove
        self.driver.delete(volume)
        self.assertEqual({}, self.world.lvs)

    def test_extension_that_is_cancelled_takes_no_space(self):
        volume = self.volume(seed=1)

        def stop(done_bytes, total_bytes):
            raise errors.Cancelled('stop')

        with progress.watching(stop), self.assertRaises(errors.Cancelled):
            self.driver.resize(volume, 2 * SIZE)
        self.assertEqual({f'volume-{volume.id}'}, set(self.world.lvs))
        self.assert_seed(volume, 1)

    def test_volume_that_cannot_be_wiped_where_it_lies_is_not_adopted(self):
        self.world._new('data', 'cache', SIZE)
        with self.assertRaisesRegex(errors.Invalid, 'data is cache'):
            self.driver.adopt('data', self.wish())
