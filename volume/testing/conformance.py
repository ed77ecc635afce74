# SPDX-License-Identifier: Apache-2.0
"""The driver suite: the contract of ``drivers/base.py`` as tests.

For authors of drivers, in this tree or out of it. Subclass ``DriverSuite``
together with ``unittest.TestCase``, and make a driver::

    class ZfsTest(conformance.DriverSuite, unittest.TestCase):

        def setUp(self):
            self.node = fixtures.make_node(self)
            super().setUp()

        def make_driver(self):
            conf = fixtures.settings(zfs.ZfsDriver, dataset='tank/test')
            return zfs.ZfsDriver(conf, self.node)

Each test is a claim in plain words. What the pool has no feature for is
skipped, and the skip names the feature. Whatever a test makes it removes.
The claims about the eight methods stand here, those about features in
``copies.py`` (snapshots, clones, growth) and ``features.py`` (the rest).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base
from volume.testing import copies
from volume.testing import features
from volume.testing import workbench

CONTRACT = {
    name
    for interface in (base.Driver, *base.FEATURES)
    for name in vars(interface)
}


class DriverSuite(
    features.FeatureClaims, copies.CopyClaims, workbench.Workbench
):
    """What holds for every driver."""

    # check, pools and what the class says of itself.

    def test_check_may_be_repeated(self) -> None:
        volume = self.volume(seed=1)
        self.driver.check()
        self.assert_seed(volume, 1)

    def test_class_has_no_public_name_outside_the_contract(self) -> None:
        public = {n for n in dir(type(self.driver)) if not n.startswith('_')}
        self.assertEqual(set(), public - CONTRACT)

    def test_options_are_explained_in_one_sentence(self) -> None:
        for option in type(self.driver).options:
            first = (option.help or '').splitlines()[:1]
            self.assertRegex(''.join(first), r'^.{1,79}\.$', option.name)

    def test_pools_have_different_names(self) -> None:
        names = [pool.name for pool in self.driver.pools()]
        self.assertTrue(all(names))
        self.assertEqual(sorted(set(names)), sorted(names))

    def test_pools_have_no_more_free_than_total(self) -> None:
        for pool in self.driver.pools():
            self.assertLessEqual(0, pool.free_bytes)
            self.assertLessEqual(pool.free_bytes, pool.total_bytes)

    def test_pools_have_whole_grains(self) -> None:
        for pool in self.driver.pools():
            self.assertGreater(pool.granularity_bytes, 0)
            self.assertEqual(0, pool.granularity_bytes % model.SECTOR_BYTES)
            self.assertGreaterEqual(
                pool.max_volume_bytes, pool.granularity_bytes
            )

    def test_pools_have_only_features_of_the_class(self) -> None:
        for pool in self.driver.pools():
            self.assertLessEqual(pool.features, base.features(self.driver))

    def test_pool_without_a_feature_refuses_it_as_unsupported(self) -> None:
        lacks = base.features(self.driver) - self.pool.features
        volume, target = self.volume(seed=1), self.wish()
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        calls = {
            'Clone': lambda: self.driver.clone(volume, target),
            'Resize': lambda: self.driver.resize(
                volume, self.size(2 * volume.size_bytes)
            ),
            'Snapshots': lambda: self.driver.snapshot(snapshot),
        }
        if not lacks & set(calls):
            self.skipTest('the pool has all features of its class')
        before = self.handles()
        for name in lacks & set(calls):
            with self.assertRaises(errors.Unsupported, msg=name):
                calls[name]()
        self.assertEqual(before, self.handles())
        self.assert_seed(volume, 1)

    # create.

    def test_created_volume_is_found_by_its_id(self) -> None:
        volume = self.wish()
        handle = self.driver.create(volume)
        found = self.driver.inspect(volume)
        self.assertTrue(handle)
        self.assertEqual((volume.id, handle), (found.id, found.handle))
        self.assertIsNone(found.snapshot_of)

    def test_created_volume_is_all_zero(self) -> None:
        self.assert_holds(self.volume(), b'')

    def test_create_twice_is_the_same_volume(self) -> None:
        volume = self.wish()
        first = self.driver.create(volume)
        before = self.handles()
        self.assertEqual(first, self.driver.create(volume))
        self.assertEqual(before, self.handles())

    def test_create_again_keeps_the_bytes(self) -> None:
        volume = self.volume(seed=1)
        self.driver.create(volume)
        self.assert_seed(volume, 1)

    def test_create_twice_with_another_size_is_a_conflict(self) -> None:
        volume = self.volume(seed=1, size_bytes=2 * self.size())
        for size_bytes in 2 * volume.size_bytes, self.size():
            other = dataclasses.replace(volume, size_bytes=size_bytes)
            with self.assertRaises(errors.Conflict):
                self.driver.create(other)
        self.assert_seed(volume, 1)

    def test_volumes_of_unusual_sizes_hold_their_bytes(self) -> None:
        for size_bytes in 512, 1536, 65536 + 512, model.MIB + 512:
            volume = self.volume(seed=size_bytes, size_bytes=size_bytes)
            found = self.driver.inspect(volume)
            self.assertGreaterEqual(found.size_bytes, volume.size_bytes)
            self.assert_seed(volume, size_bytes)

    def test_part_of_a_grain_is_refused_or_rounded_up(self) -> None:
        volume = dataclasses.replace(
            self.wish(), size_bytes=self.size() + 100
        )
        try:
            self.driver.create(volume)
        except errors.Invalid:
            self.assert_absent(volume)
            return
        found = self.driver.inspect(volume)
        self.assertGreaterEqual(found.size_bytes, volume.size_bytes)

    def test_empty_volume_is_refused(self) -> None:
        volume = dataclasses.replace(self.wish(), size_bytes=0)
        with self.assertRaises(errors.Invalid):
            self.driver.create(volume)
        self.assert_absent(volume)

    def test_thin_volume_may_be_far_larger_than_what_it_stores(self) -> None:
        if not self.pool.thin:
            self.skipTest('the pool is not thin')
        size_bytes = self.size(1 << 40)
        if size_bytes > self.pool.max_volume_bytes:
            self.skipTest('the pool has no volumes of 1 TiB')
        volume = self.volume(size_bytes=size_bytes)
        with self.driver.writer(volume) as writer:
            writer.seek(size_bytes - 512)
            workbench.write_all(writer, b'\x5a' * 512)
            writer.commit()
        with self.driver.reader(volume) as reader:
            reader.seek(size_bytes - 1024)
            end = reader.read(512), reader.read(512)
        self.assertEqual((bytes(512), b'\x5a' * 512), end)

    def test_volume_above_the_limit_is_refused(self) -> None:
        volume = dataclasses.replace(
            self.wish(),
            size_bytes=self.pool.max_volume_bytes
            + self.pool.granularity_bytes,
        )
        with self.assertRaises((errors.Invalid, errors.NoSpace)):
            self.driver.create(volume)
        self.assert_absent(volume)

    def test_unknown_pool_is_refused(self) -> None:
        volume = model.Volume(ids.new(), 'no-such-pool', self.size())
        with self.assertRaises(errors.VolumeError):
            self.driver.create(volume)
        with self.assertRaises(errors.VolumeError):
            list(self.driver.scan('no-such-pool'))

    def test_volumes_are_made_and_deleted_side_by_side(self) -> None:
        volumes = [self.wish() for _ in range(8)]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            handles = list(threads.map(self.driver.create, volumes))
            self.assertEqual(8, len(set(handles)))
            list(threads.map(self.fill, volumes, range(8)))
            list(threads.map(self.driver.delete, volumes[:4]))
        for seed, volume in enumerate(volumes[4:], 4):
            self.assert_seed(volume, seed)
        for volume in volumes[:4]:
            self.assert_absent(volume)

    # delete.

    def test_deleted_volume_is_gone(self) -> None:
        volume = self.volume(seed=1)
        self.driver.delete(volume)
        self.assert_absent(volume)
        with self.assertRaises(errors.NotFound):
            self.driver.inspect(volume)

    def test_delete_of_what_is_gone_succeeds(self) -> None:
        volume = self.volume()
        self.driver.delete(volume)
        self.driver.delete(volume)
        self.driver.delete(self.wish())

    def test_delete_leaves_other_volumes_whole(self) -> None:
        kept, volume = self.volume(seed=1), self.volume(seed=2)
        self.driver.delete(volume)
        self.assert_seed(kept, 1)

    def test_volume_made_after_a_deletion_has_none_of_the_old_bytes(
        self,
    ) -> None:
        volume = self.volume(seed=1)
        self.driver.delete(volume)
        self.driver.create(volume)
        self.assert_holds(volume, b'')

    # inspect and scan.

    def test_inspect_of_what_is_absent_is_not_found(self) -> None:
        with self.assertRaises(errors.NotFound):
            self.driver.inspect(self.wish())

    def test_inspect_and_scan_say_the_same(self) -> None:
        for volume in self.volume(), self.volume(seed=1):
            found = list(self.found(volume.id))
            self.assertEqual([self.driver.inspect(volume)], found)

    def test_scan_shows_no_volume_that_was_not_made(self) -> None:
        before = self.handles()
        volume = self.wish()
        self.assertEqual(before, self.handles())
        self.driver.create(volume)
        self.assertEqual(len(before) + 1, len(self.handles()))

    def test_scan_shows_a_volume_in_its_own_pool_only(self) -> None:
        others = [
            pool.name for pool in self.driver.pools()
            if pool.name != self.pool.name
        ]
        if not others:
            self.skipTest('only one pool')
        volume = self.volume()
        for name in others:
            there = [found.id for found in self.driver.scan(name)]
            self.assertNotIn(volume.id, there)

    def test_foreign_things_are_shown_as_foreign_and_left_alone(self) -> None:
        handle = self.make_foreign(self.pool.name, b'\xa5' * 4096)
        if handle is None:
            self.skipTest('no foreign thing is made here')
        before = self.handles()
        self.assertIn(handle, before)
        self.driver.delete(self.volume(seed=1))
        self.restart()
        workbench.tend(self.driver, self.pool.name)
        self.assertEqual(before, self.handles())
        ours = {found.handle: found.id for found in self.scan()}
        self.assertIsNone(ours[handle])

    def test_new_driver_on_the_same_storage_sees_the_same(self) -> None:
        volumes = [self.volume(seed=seed) for seed in range(3)]
        before = self.scan()
        handle = self.driver.inspect(volumes[0]).handle
        self.restart()
        self.assertEqual(before, self.scan())
        self.assertEqual(handle, self.driver.create(volumes[0]))
        for seed, volume in enumerate(volumes):
            self.assert_seed(volume, seed)

    # reader.

    def test_reader_of_what_is_absent_is_not_found(self) -> None:
        self.assert_absent(self.wish())

    def test_reader_is_as_long_as_the_volume(self) -> None:
        volume = self.volume()
        size_bytes = self.driver.inspect(volume).size_bytes
        with self.driver.reader(volume) as reader:
            self.assertEqual(size_bytes, reader.size_bytes)
            self.assertEqual(size_bytes, reader.seek(0, io.SEEK_END))
            self.assertEqual(b'', reader.read(512))

    def test_reader_reads_from_where_it_was_told(self) -> None:
        volume = self.volume(seed=1)
        image = workbench.pattern(1, volume.size_bytes)
        with self.driver.reader(volume) as reader:
            for offset in len(image) // 2, 0, len(image) - 512, 4000:
                self.assertEqual(offset, reader.seek(offset))
                buffer = bytearray(512)
                count = reader.readinto(buffer) or 0
                self.assertGreater(count, 0)
                self.assertEqual(image[offset:offset + count], buffer[:count])
                self.assertEqual(offset + count, reader.tell())

    def test_several_readers_do_not_disturb_each_other(self) -> None:
        volume = self.volume(seed=1)
        image = workbench.pattern(1, volume.size_bytes)
        with self.driver.reader(volume) as a, self.driver.reader(volume) as b:
            a.seek(4096)
            # A volume may be larger than asked for.
            for reader, wanted in (b, image), (a, image[4096:]):
                found = workbench.read_all(reader)
                self.assertEqual(wanted, found[:len(wanted)])

    def test_extents_cover_the_volume_and_zero_runs_are_zero(self) -> None:
        for volume in self.volume(), self.volume(seed=1):
            image = workbench.content(self.driver, volume)
            with self.driver.reader(volume) as reader:
                runs = list(reader.extents())
            offset = 0
            for run in runs:
                self.assertEqual(offset, run.offset_bytes)
                self.assertGreater(run.length_bytes, 0)
                offset += run.length_bytes
                if run.is_zero:
                    self.assertFalse(any(image[run.offset_bytes:offset]))
            self.assertEqual(len(image), offset)

    # writer.

    def test_writer_of_what_is_absent_is_not_found(self) -> None:
        with self.assertRaises(errors.NotFound):
            with self.driver.writer(self.wish()):
                pass

    def test_written_bytes_are_read_back(self) -> None:
        volume = self.volume(seed=1)
        self.assert_seed(volume, 1)
        self.fill(volume, 2)
        self.assert_seed(volume, 2)

    def test_what_a_writer_skips_stays(self) -> None:
        volume = self.volume(seed=1)
        image = bytearray(workbench.pattern(1, volume.size_bytes))
        with self.driver.writer(volume) as writer:
            self.assertGreaterEqual(writer.size_bytes, volume.size_bytes)
            for offset in 1024, 131072:
                writer.seek(offset)
                workbench.write_all(writer, b'\xff' * 512)
                image[offset:offset + 512] = b'\xff' * 512
            writer.commit()
        self.assert_holds(volume, bytes(image))

    def test_zeroed_runs_read_as_zeros(self) -> None:
        volume = self.volume(seed=1)
        image = bytearray(workbench.pattern(1, volume.size_bytes))
        with self.driver.writer(volume) as writer:
            for offset, length in (512, 1024), (4096, len(image) - 4096):
                writer.zero(offset, length)
                image[offset:offset + length] = bytes(length)
            writer.commit()
        self.assert_holds(volume, bytes(image))

    def test_writer_never_goes_beyond_the_end(self) -> None:
        volume = self.volume(seed=1)
        size_bytes = self.driver.inspect(volume).size_bytes
        with self.driver.writer(volume) as writer:
            with self.assertRaises(errors.VolumeError):
                writer.seek(size_bytes)
                workbench.write_all(writer, b'\xff' * 512)
        found = self.driver.inspect(volume)
        self.assertEqual(size_bytes, found.size_bytes)

    def test_volume_left_half_filled_can_be_filled_again(self) -> None:
        volume = self.volume()
        with self.driver.writer(volume) as writer:
            workbench.write_all(writer, b'\xff' * 8192)
        self.fill(volume, 1)
        self.assert_seed(volume, 1)

    def test_writer_leaves_other_volumes_whole(self) -> None:
        kept, volume = self.volume(seed=1), self.volume()
        with self.driver.writer(volume) as writer:
            workbench.write_all(writer, b'\xff' * self.size())
            writer.commit()
        self.assert_seed(kept, 1)
