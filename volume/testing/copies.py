# SPDX-License-Identifier: Apache-2.0
"""Claims about snapshots, clones, revert and growth.

All are one claim in many forms: every name keeps the bytes that it was
given, whatever is done to the others, and in whatever order.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base
from volume.testing import workbench
from volume.testing.workbench import pattern


class CopyClaims(workbench.Workbench):
    """Claims about Clone, Resize, Revert and Snapshots."""

    # Resize.

    def test_resize_grows_and_repeats(self) -> None:
        driver = self.need(base.Resize)
        volume = self.volume(seed=1)
        larger = self.size(2 * volume.size_bytes + 512)
        for _ in range(2):
            driver.resize(volume, larger)
            found = driver.inspect(volume)
            self.assertGreaterEqual(found.size_bytes, larger)
        self.assert_seed(volume, 1)  # and zeros behind

    def test_grown_volume_takes_bytes_up_to_its_new_end(self) -> None:
        driver = self.need(base.Resize)
        volume = self.volume(seed=1)
        driver.resize(volume, self.size(3 * volume.size_bytes))
        grown = dataclasses.replace(
            volume, size_bytes=driver.inspect(volume).size_bytes
        )
        self.fill(grown, 2)
        self.restart()
        self.assert_seed(grown, 2)

    def test_resize_never_shrinks(self) -> None:
        driver = self.need(base.Resize)
        volume = self.volume(seed=1, size_bytes=2 * self.size())
        with self.assertRaises(errors.Invalid):
            driver.resize(volume, self.size())
        self.assert_seed(volume, 1)

    def test_resize_above_the_limit_is_refused(self) -> None:
        driver = self.need(base.Resize)
        volume = self.volume(seed=1)
        limit = self.pool.max_volume_bytes + self.pool.granularity_bytes
        with self.assertRaises((errors.Invalid, errors.NoSpace)):
            driver.resize(volume, limit)
        self.assert_seed(volume, 1)

    def test_resize_of_what_is_absent_is_not_found(self) -> None:
        driver = self.need(base.Resize)
        with self.assertRaises(errors.NotFound):
            driver.resize(self.wish(), self.size(2 * self.size_bytes))

    # Snapshots.

    def test_snapshot_keeps_the_bytes_of_its_moment(self) -> None:
        self.need(base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        self.fill(volume, 2)
        self.restart()
        self.assert_seed(snapshot, 1)
        self.assert_seed(volume, 2)

    def test_each_snapshot_keeps_its_own_moment(self) -> None:
        self.need(base.Snapshots)
        volume = self.volume()
        snapshots = []
        for seed in range(4):
            self.fill(volume, seed)
            snapshots.append(self.snapshot(volume))
        self.fill(volume, 9)
        for seed, snapshot in enumerate(snapshots):
            self.assert_seed(snapshot, seed)
        self.assert_seed(volume, 9)

    def test_snapshot_repeated_never_takes_a_later_moment(self) -> None:
        driver = self.need(base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot_wish(volume)
        handle = driver.snapshot(snapshot)
        self.fill(volume, 2)
        before = self.handles()
        self.assertEqual(handle, driver.snapshot(snapshot))
        self.assertEqual(before, self.handles())
        self.assert_seed(snapshot, 1)
        self.assert_seed(volume, 2)

    def test_snapshot_is_found_as_one_of_its_volume(self) -> None:
        driver = self.need(base.Snapshots)
        volume = self.volume()
        snapshot = self.snapshot_wish(volume)
        handle = driver.snapshot(snapshot)
        found, = self.found(snapshot.id)
        self.assertEqual(
            (handle, volume.id), (found.handle, found.snapshot_of)
        )
        self.assertGreaterEqual(found.size_bytes, volume.size_bytes)
        itself, = self.found(volume.id)
        self.assertIsNone(itself.snapshot_of)

    def test_snapshot_has_the_size_of_its_moment(self) -> None:
        driver = self.need(base.Snapshots, base.Resize)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        driver.resize(volume, self.size(2 * volume.size_bytes))
        with driver.reader(snapshot) as reader:
            self.assertLess(reader.size_bytes, 2 * volume.size_bytes)
        self.assert_seed(snapshot, 1)

    def test_deleted_snapshot_is_gone_and_may_be_deleted_again(self) -> None:
        driver = self.need(base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        for _ in range(2):
            driver.delete_snapshot(snapshot)
            self.assert_absent(snapshot)
        self.assert_seed(volume, 1)

    def test_delete_of_an_absent_snapshot_succeeds(self) -> None:
        driver = self.need(base.Snapshots)
        driver.delete_snapshot(self.snapshot_wish(self.volume()))
        driver.delete_snapshot(self.snapshot_wish(self.wish()))

    def test_snapshot_of_what_is_absent_is_not_found(self) -> None:
        driver = self.need(base.Snapshots)
        snapshot = self.snapshot_wish(self.wish())
        with self.assertRaises(errors.NotFound):
            driver.snapshot(snapshot)
        self.assert_absent(snapshot)

    def test_snapshots_may_be_deleted_in_any_order(self) -> None:
        driver = self.need(base.Snapshots)
        for order in (1, 0, 2), (2, 1, 0), (0, 2, 1):
            volume = self.volume()
            snapshots = []
            for seed in range(3):
                self.fill(volume, seed)
                snapshots.append(self.snapshot(volume))
            self.fill(volume, 9)
            left = set(order)
            for at in order:
                driver.delete_snapshot(snapshots[at])
                left.remove(at)
                workbench.tend(driver, self.pool.name)
                for seed in left:
                    self.assert_seed(snapshots[seed], seed)
                self.assert_seed(volume, 9)

    def test_volume_with_snapshots_of_its_own_is_not_deleted(self) -> None:
        driver = self.need(base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        with self.assertRaises(errors.Busy):
            driver.delete(volume)
        self.assert_seed(volume, 1)
        self.assert_seed(snapshot, 1)
        driver.delete_snapshot(snapshot)
        driver.delete(volume)
        self.assert_absent(volume)

    def test_snapshot_can_be_taken_again_after_its_deletion(self) -> None:
        driver = self.need(base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        driver.delete_snapshot(snapshot)
        self.fill(volume, 2)
        driver.snapshot(snapshot)
        self.assert_seed(snapshot, 2)

    # Clone.

    def test_clone_has_the_bytes_of_its_source(self) -> None:
        self.need(base.Clone)
        source = self.volume(seed=1)
        clone = self.clone(source)
        self.restart()
        self.assert_seed(clone, 1)
        found, = self.found(clone.id)
        self.assertIsNone(found.snapshot_of)

    def test_clone_and_source_do_not_change_each_other(self) -> None:
        self.need(base.Clone)
        source = self.volume(seed=1)
        one, two = self.clone(source), self.clone(source)
        self.fill(source, 2)
        self.fill(one, 3)
        for volume, seed in (source, 2), (one, 3), (two, 1):
            self.assert_seed(volume, seed)

    def test_clone_of_a_snapshot_has_the_bytes_of_its_moment(self) -> None:
        self.need(base.Clone, base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        self.fill(volume, 2)
        clone = self.clone(snapshot)
        self.assert_seed(clone, 1)
        self.fill(clone, 3)
        self.assert_seed(snapshot, 1)
        self.assert_seed(volume, 2)

    def test_clone_may_be_larger_and_is_zero_beyond(self) -> None:
        self.need(base.Clone)
        source = self.volume(seed=1)
        for extra in self.pool.granularity_bytes, source.size_bytes:
            clone = self.clone(source, source.size_bytes + extra)
            found = self.driver.inspect(clone)
            self.assertGreaterEqual(found.size_bytes, clone.size_bytes)
            self.assert_seed(source, 1)
            self.assert_holds(clone, pattern(1, source.size_bytes))

    def test_clone_smaller_than_its_source_is_refused(self) -> None:
        driver = self.need(base.Clone)
        source = self.volume(seed=1, size_bytes=2 * self.size())
        clone = self.wish()
        with self.assertRaises(errors.Invalid):
            driver.clone(source, clone)
        self.assert_absent(clone)

    def test_clone_repeated_is_the_same_volume(self) -> None:
        driver = self.need(base.Clone)
        source, clone = self.volume(seed=1), self.wish()
        handle = driver.clone(source, clone)
        self.fill(clone, 2)
        self.fill(source, 3)
        before = self.handles()
        self.assertEqual(handle, driver.clone(source, clone))
        self.assertEqual(before, self.handles())
        self.assert_seed(clone, 2)

    def test_clone_onto_another_size_is_a_conflict(self) -> None:
        driver = self.need(base.Clone)
        source = self.volume(seed=1)
        clone = self.clone(source)
        other = dataclasses.replace(
            clone, size_bytes=self.size(2 * clone.size_bytes)
        )
        with self.assertRaises(errors.Conflict):
            driver.clone(source, other)
        self.assert_seed(clone, 1)

    def test_clone_of_what_is_absent_is_not_found(self) -> None:
        driver = self.need(base.Clone)
        clone = self.wish()
        with self.assertRaises(errors.NotFound):
            driver.clone(self.wish(), clone)
        self.assert_absent(clone)

    def test_clone_of_a_clone_has_the_same_bytes(self) -> None:
        self.need(base.Clone)
        volumes = [self.volume(seed=1)]
        for _ in range(3):
            volumes.append(self.clone(volumes[-1]))
        self.fill(volumes[1], 2)
        for volume, seed in zip(volumes, (1, 2, 1, 1), strict=True):
            self.assert_seed(volume, seed)

    def test_clones_outlive_their_snapshot_and_their_origin(self) -> None:
        driver = self.need(base.Clone, base.Snapshots)
        for first in 'snapshot', 'volume':
            volume = self.volume(seed=1)
            snapshot = self.snapshot(volume)
            of_snapshot, of_volume = self.clone(snapshot), self.clone(volume)
            if first == 'volume':
                self.driver.delete(of_volume)
                self.driver.clone(snapshot, of_volume)
            driver.delete_snapshot(snapshot)
            driver.delete(volume)
            workbench.tend(driver, self.pool.name)
            self.restart()
            self.assert_seed(of_snapshot, 1)
            self.assert_seed(of_volume, 1)
            self.fill(of_volume, 2)
            self.assert_seed(of_snapshot, 1)

    def test_origin_of_a_clone_may_be_deleted_at_once(self) -> None:
        driver = self.need(base.Clone)
        source = self.volume(seed=1)
        clone = self.clone(source)
        driver.delete(source)
        self.assert_absent(source)
        workbench.tend(driver, self.pool.name)
        self.assert_seed(clone, 1)

    def test_deleting_a_clone_leaves_its_source_whole(self) -> None:
        driver = self.need(base.Clone)
        source = self.volume(seed=1)
        driver.delete(self.clone(source))
        workbench.tend(driver, self.pool.name)
        self.assert_seed(source, 1)

    def test_deleted_origin_made_again_is_a_new_volume(self) -> None:
        driver = self.need(base.Clone)
        source = self.volume(seed=1)
        clone = self.clone(source)
        driver.delete(source)
        driver.create(source)
        self.assert_holds(source, b'')
        self.fill(source, 2)
        self.assert_seed(clone, 1)

    def test_clones_are_made_side_by_side(self) -> None:
        driver = self.need(base.Clone)
        source = self.volume(seed=1)
        clones = [self.wish() for _ in range(6)]
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda c: driver.clone(source, c), clones))
            list(threads.map(driver.delete, clones[:3]))
        workbench.tend(driver, self.pool.name)
        for clone in clones[3:]:
            self.assert_seed(clone, 1)
        self.assert_seed(source, 1)

    def test_clone_can_have_snapshots_and_grow(self) -> None:
        driver = self.need(base.Clone, base.Snapshots, base.Resize)
        clone = self.clone(self.volume(seed=1))
        snapshot = self.snapshot(clone)
        driver.resize(clone, self.size(2 * clone.size_bytes))
        self.fill(clone, 2)
        self.assert_seed(snapshot, 1)
        self.assert_seed(clone, 2)

    # Revert.

    def test_revert_gives_the_bytes_of_the_snapshot(self) -> None:
        driver = self.need(base.Revert, base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        self.fill(volume, 2)
        for _ in range(2):
            handle = driver.revert(snapshot)
            self.assertEqual(handle, driver.inspect(volume).handle)
            self.assert_seed(volume, 1)
        self.restart()
        self.assert_seed(volume, 1)
        self.assert_seed(snapshot, 1)

    def test_any_snapshot_can_be_reverted_to_and_all_stay(self) -> None:
        driver = self.need(base.Revert, base.Snapshots)
        volume = self.volume()
        snapshots = []
        for seed in range(3):
            self.fill(volume, seed)
            snapshots.append(self.snapshot(volume))
        for seed in 1, 0, 2:
            driver.revert(snapshots[seed])
            self.assert_seed(volume, seed)
            self.fill(volume, 9)
            for other, snapshot in enumerate(snapshots):
                self.assert_seed(snapshot, other)

    def test_revert_keeps_the_size_and_zeros_what_is_beyond(self) -> None:
        driver = self.need(base.Revert, base.Snapshots, base.Resize)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        driver.resize(volume, self.size(2 * volume.size_bytes + 512))
        size_bytes = driver.inspect(volume).size_bytes
        self.fill(dataclasses.replace(volume, size_bytes=size_bytes), 2)
        driver.revert(snapshot)
        self.assertEqual(size_bytes, driver.inspect(volume).size_bytes)
        self.assert_seed(volume, 1)

    def test_reverted_volume_takes_snapshots_as_before(self) -> None:
        driver = self.need(base.Revert, base.Snapshots)
        volume = self.volume(seed=1)
        first = self.snapshot(volume)
        self.fill(volume, 2)
        driver.revert(first)
        self.fill(volume, 3)
        second = self.snapshot(volume)
        driver.delete_snapshot(first)
        workbench.tend(driver, self.pool.name)
        self.assert_seed(second, 3)
        self.assert_seed(volume, 3)

    def test_revert_to_an_absent_snapshot_is_not_found(self) -> None:
        driver = self.need(base.Revert, base.Snapshots)
        volume = self.volume(seed=1)
        with self.assertRaises(errors.NotFound):
            driver.revert(model.Snapshot(ids.new(), volume, self.size_bytes))
        self.assert_seed(volume, 1)

    def test_revert_leaves_clones_whole(self) -> None:
        driver = self.need(base.Revert, base.Snapshots, base.Clone)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        self.fill(volume, 2)
        clone = self.clone(volume)
        driver.revert(snapshot)
        workbench.tend(driver, self.pool.name)
        self.assert_seed(clone, 2)
        self.assert_seed(volume, 1)
