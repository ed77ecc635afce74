# SPDX-License-Identifier: Apache-2.0
"""Claims about the features that are no copies: access, notes, adoption."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base
from volume.node import Node
from volume.testing import workbench
from volume.testing.workbench import pattern


class FeatureClaims(workbench.Workbench):
    """Claims about all features but Clone, Resize, Revert and Snapshots."""

    # Adopt.

    def test_disowned_volume_is_foreign_and_can_be_adopted(self) -> None:
        driver = self.need(base.Adopt)
        volume = self.volume(seed=1)
        handle = self.disown(volume)
        self.assert_absent(volume)
        adopted = self.wish()
        ours = driver.adopt(handle, adopted)
        self.assertEqual(ours, driver.inspect(adopted).handle)
        self.assert_seed(adopted, 1)

    def test_disown_repeated_is_nothing(self) -> None:
        driver = self.need(base.Adopt)
        volume = self.volume(seed=1)
        handle = self.disown(volume)
        driver.disown(volume)
        self.assertIn(handle, self.handles())
        driver.adopt(handle, volume)
        self.assert_seed(volume, 1)

    def test_adopt_repeated_is_the_same_volume(self) -> None:
        driver = self.need(base.Adopt)
        handle = self.disown(self.volume(seed=1))
        adopted = self.wish()
        first = driver.adopt(handle, adopted)
        self.assertEqual(first, driver.adopt(handle, adopted))
        self.assert_seed(adopted, 1)

    def test_adopt_of_what_is_absent_is_not_found(self) -> None:
        driver = self.need(base.Adopt)
        volume = self.volume()
        handle = driver.inspect(volume).handle
        driver.delete(volume)
        with self.assertRaises(errors.NotFound):
            driver.adopt(handle.replace(volume.id, ids.new()), self.wish())

    def test_adopt_of_another_volume_of_ours_is_a_conflict(self) -> None:
        driver = self.need(base.Adopt)
        volume, thief = self.volume(seed=1), self.wish()
        with self.assertRaises(errors.Conflict):
            driver.adopt(driver.inspect(volume).handle, thief)
        self.assert_seed(volume, 1)
        self.assert_absent(thief)

    def test_adopt_never_replaces_a_volume(self) -> None:
        driver = self.need(base.Adopt)
        handle, volume = self.disown(self.volume(seed=1)), self.volume(seed=2)
        with self.assertRaises(errors.Conflict):
            driver.adopt(handle, volume)
        self.assert_seed(volume, 2)
        driver.adopt(handle, rescued := self.wish())
        self.assert_seed(rescued, 1)

    def test_adopt_takes_no_path_for_a_handle(self) -> None:
        driver = self.need(base.Adopt)
        for handle in '../x', '/etc/hostname', '', '.', '..', '.hidden':
            with self.assertRaises((errors.Invalid, errors.NotFound)):
                driver.adopt(handle, self.wish())

    def test_foreign_thing_keeps_its_bytes_when_adopted(self) -> None:
        driver = self.need(base.Adopt)
        image = pattern(1, self.size())
        handle = self.make_foreign(self.pool.name, image)
        if handle is None:
            self.skipTest('no foreign thing is made here')
        adopted = self.wish()
        driver.adopt(handle, adopted)
        self.assert_holds(adopted, image)

    def test_volume_with_snapshots_is_not_let_go(self) -> None:
        driver = self.need(base.Adopt, base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        with self.assertRaises(errors.Busy):
            driver.disown(volume)
        self.assert_seed(snapshot, 1)
        self.assert_seed(volume, 1)

    def disown(self, volume: model.Volume) -> str:
        """Let go of the volume; return the handle that scan then shows."""
        before = self.foreign()
        self.driver.disown(volume)
        handle, = self.foreign() - before
        return handle

    def foreign(self) -> set[str]:
        return {found.handle for found in self.scan() if found.id is None}

    # BlockNode.

    def test_blocknode_names_every_driver(self) -> None:
        driver = self.need(base.BlockNode)

        def check(node: Mapping[str, Any]) -> None:
            self.assertIsInstance(node['driver'], str)
            if node['driver'] in ('qcow2', 'vmdk', 'qed'):
                # Left out, QEMU would follow what stands in the image.
                self.assertIn('backing', node)
            for name in 'file', 'backing', 'extents':
                if isinstance(node.get(name), Mapping):
                    check(node[name])

        volume = self.volume(seed=1)
        check(driver.blocknode(volume))
        if 'Clone' in self.pool.features:
            check(driver.blocknode(self.clone(volume)))

    def test_blocknode_reads_the_same_in_qemu(self) -> None:
        driver = self.need(base.BlockNode)
        sources: list[workbench.Source] = [self.volume(seed=1)]
        if 'Snapshots' in self.pool.features:
            volume = self.volume(seed=1)
            sources.append(self.snapshot(volume))
            self.fill(volume, 2)
        if 'Clone' in self.pool.features:
            sources.append(self.clone(sources[-1]))
        for source in sources:
            node = dict(driver.blocknode(source))
            # An option that asks to write needs no image that is written.
            node['read-only'] = True
            self.assert_qemu_reads(node, pattern(1, source.size_bytes))

    def test_blocknode_of_what_is_absent_is_not_found(self) -> None:
        driver = self.need(base.BlockNode)
        with self.assertRaises(errors.NotFound):
            driver.blocknode(self.wish())

    def assert_qemu_reads(self, node: Mapping[str, Any], image: bytes) -> None:
        root = self.enterContext(tempfile.TemporaryDirectory())
        where = self.machine() or Node(root)
        target = os.path.join(where.state_dir, f'{ids.new()}.raw')
        where.make_directory(where.state_dir)
        try:
            where.run(
                'qemu-img', 'convert', '-O', 'raw',
                'json:' + json.dumps(node), target,
            )
            with where.open(target) as f:
                found = workbench.read_all(f)
        except errors.Unavailable:
            self.skipTest('no qemu-img')
        finally:
            where.unlink(target)
        self.assertEqual(image, found[:len(image)])
        self.assertFalse(any(found[len(image):]))

    def machine(self) -> Node | None:
        """Return the machine where the paths are, if it is another one."""
        node = getattr(self.driver, 'node', None)
        return node if isinstance(node, Node) and node.is_remote else None

    # Describe.

    def test_note_is_shown_beside_its_volume(self) -> None:
        driver = self.need(base.Describe)
        volume, other = self.volume(), self.volume()
        for name in 'one', 'two, with "quotes" and ü', 'three\nlines':
            note = {'name': name, 'project': 'p-1'}
            driver.describe(volume, note)
            self.restart()
            found, = self.found(volume.id)
            self.assertEqual(note, dict(found.sidecar))
            self.assertEqual(
                note, dict(self.driver.inspect(volume).sidecar)
            )
        self.assertEqual({}, dict(driver.inspect(other).sidecar))

    def test_note_goes_with_its_volume(self) -> None:
        driver = self.need(base.Describe)
        volume = self.volume()
        driver.describe(volume, {'name': 'old'})
        driver.delete(volume)
        driver.create(volume)
        self.assertEqual({}, dict(driver.inspect(volume).sidecar))

    def test_note_stays_when_the_volume_changes(self) -> None:
        driver = self.need(base.Describe, base.Resize)
        volume = self.volume(seed=1)
        driver.describe(volume, {'name': 'kept'})
        driver.resize(volume, self.size(2 * volume.size_bytes))
        self.assertEqual(
            {'name': 'kept'}, dict(driver.inspect(volume).sidecar)
        )
        self.assert_seed(volume, 1)

    def test_note_of_what_is_absent_is_not_found(self) -> None:
        driver = self.need(base.Describe)
        before = self.handles()
        with self.assertRaises(errors.NotFound):
            driver.describe(self.wish(), {'name': 'nobody'})
        self.assertEqual(before, self.handles())

    # Extents.

    def test_extents_tell_all_that_is_not_zero(self) -> None:
        driver = self.need(base.Extents)
        volume = self.volume(seed=1)
        self.assert_covers(
            list(driver.extents(volume, None)),
            bytes(volume.size_bytes), pattern(1, volume.size_bytes),
        )

    def test_extents_tell_all_that_changed_since_a_snapshot(self) -> None:
        driver = self.need(base.Extents, base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        self.fill(volume, 2)
        self.assert_covers(
            list(driver.extents(volume, snapshot)),
            pattern(1, volume.size_bytes), pattern(2, volume.size_bytes),
        )

    def assert_covers(
        self, runs: list[model.Extent], old: bytes, new: bytes
    ) -> None:
        """Fail unless old bytes become new by taking the runs."""
        image = bytearray(old)
        for run in runs:
            end = run.offset_bytes + run.length_bytes
            image[run.offset_bytes:end] = (
                bytes(run.length_bytes) if run.is_zero
                else new[run.offset_bytes:end]
            )
        self.assertEqual(new, bytes(image[:len(new)]))

    # Flatten.

    def test_flattened_clone_keeps_its_bytes(self) -> None:
        driver = self.need(base.Flatten, base.Clone)
        source = self.volume(seed=1)
        clone = self.clone(source, 2 * source.size_bytes)
        seen: list[float] = []
        for _ in range(2):
            handle = driver.flatten(clone, seen.append)
            self.assertEqual(handle, driver.inspect(clone).handle)
            self.assert_holds(clone, pattern(1, source.size_bytes))
        self.assertTrue(all(0 <= percent <= 100 for percent in seen))
        self.fill(source, 2)
        driver.delete(source)
        workbench.tend(driver, self.pool.name)
        self.restart()
        self.assert_holds(clone, pattern(1, source.size_bytes))

    def test_flatten_that_is_cancelled_changes_nothing(self) -> None:
        driver = self.need(base.Flatten, base.Clone)
        source = self.volume(seed=1)
        clone = self.clone(source)

        def stop(percent: float) -> None:
            raise errors.Cancelled('stop')

        try:
            driver.flatten(clone, stop)
        except errors.Cancelled:
            pass  # a quick copy may end before it asks
        self.assert_seed(clone, 1)
        self.assert_seed(source, 1)
        driver.flatten(clone, lambda percent: None)
        self.assert_seed(clone, 1)

    def test_volume_with_snapshots_is_not_flattened(self) -> None:
        driver = self.need(base.Flatten, base.Snapshots)
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        with self.assertRaises(errors.Busy):
            driver.flatten(volume, lambda percent: None)
        self.assert_seed(volume, 1)
        self.assert_seed(snapshot, 1)

    # GroupSnapshot.

    def test_group_snapshot_keeps_every_volume(self) -> None:
        driver = self.need(base.GroupSnapshot, base.Snapshots)
        volumes = [self.volume(seed=seed) for seed in range(3)]
        wishes = [self.snapshot_wish(volume) for volume in volumes]
        handles = driver.snapshot_group(wishes)
        for volume in volumes:
            self.fill(volume, 9)
        self.assertEqual(handles, driver.snapshot_group(wishes))
        for seed, snapshot in enumerate(wishes):
            self.assert_seed(snapshot, seed)

    # Limits.

    def test_limits_can_be_set_changed_and_lifted(self) -> None:
        driver = self.need(base.Limits)
        volume = self.volume(seed=1)
        for limits in (
            model.IoLimits(iops=500), model.IoLimits(bytes_per_s=1 << 20),
            model.IoLimits(),
        ):
            for _ in range(2):
                driver.limit(volume, limits)
        self.assert_seed(volume, 1)

    # LocalDevice.

    def test_mapped_path_holds_the_bytes(self) -> None:
        driver = self.need(base.LocalDevice)
        volume = self.volume(seed=1)
        device = driver.map(volume, model.Access.READ)
        self.assertIn(device.form, driver.forms)
        try:
            if device.format != 'raw':
                self.skipTest(f'only QEMU reads {device.format}')
            where = self.machine()
            with (where.open if where else open)(device.path, 'rb') as f:
                self.assertEqual(
                    pattern(1, volume.size_bytes), f.read(volume.size_bytes)
                )
        finally:
            driver.unmap(volume)

    def test_map_repeated_is_the_same_path(self) -> None:
        driver = self.need(base.LocalDevice)
        volume = self.volume(seed=1)
        first = driver.map(volume, model.Access.WRITE)
        self.assertEqual(first, driver.map(volume, model.Access.WRITE))
        for _ in range(2):
            driver.unmap(volume)
        self.assert_seed(volume, 1)

    def test_map_of_what_is_absent_is_not_found(self) -> None:
        driver = self.need(base.LocalDevice)
        with self.assertRaises(errors.NotFound):
            driver.map(self.wish(), model.Access.READ)

    def test_unmap_of_what_is_gone_succeeds(self) -> None:
        driver = self.need(base.LocalDevice)
        driver.unmap(self.volume())
        driver.unmap(self.wish())

    # Move.

    def test_moved_volume_is_in_its_new_pool_with_its_bytes(self) -> None:
        driver = self.need(base.Move)
        names = [p.name for p in driver.pools() if p.name != self.pool.name]
        if not names:
            self.skipTest('only one pool')
        volume = self.volume(seed=1)
        moved = model.Volume(volume.id, names[0], volume.size_bytes)
        self.addCleanup(lambda: self.driver.delete(moved))
        for _ in range(2):
            driver.move(volume, names[0])
            self.assert_seed(moved, 1)
            self.assertEqual([], list(self.found(volume.id)))

    # NativeAccess.

    def test_grant_and_revoke_repeat(self) -> None:
        driver = self.need(base.NativeAccess)
        volume = self.volume(seed=1)
        first = driver.grant(volume, self.host, model.Access.WRITE)
        again = driver.grant(volume, self.host, model.Access.WRITE)
        self.assertEqual(first, again)
        json.dumps(dict(first.fields))
        for _ in range(2):
            driver.revoke(volume, self.host)
        self.assert_seed(volume, 1)

    # PoolAdmin.

    def test_pool_is_made_and_forgotten(self) -> None:
        driver = self.need(base.PoolAdmin)
        if self.pool_settings is None:
            self.skipTest('no settings for a pool are given')
        for _ in range(2):
            pool = driver.create_pool('suite-pool', self.pool_settings)
            self.assertEqual('suite-pool', pool.name)
        self.assertIn('suite-pool', [p.name for p in driver.pools()])
        for _ in range(2):
            driver.forget_pool('suite-pool')
        self.assertNotIn('suite-pool', [p.name for p in driver.pools()])

    # Upkeep.

    def test_upkeep_has_an_end_and_loses_nothing(self) -> None:
        driver = self.need(base.Upkeep)
        volume = self.volume(seed=0)
        kept: list[tuple[workbench.Source, int]] = [(volume, 0)]
        if {'Snapshots', 'Clone'} <= self.pool.features:
            snapshots = []
            for seed in range(1, 6):
                self.fill(volume, seed)
                snapshots.append(self.snapshot(volume))
            clone = self.clone(snapshots[2])
            for at in 0, 2, 3:
                driver.delete_snapshot(snapshots[at])
            kept = [(volume, 5), (clone, 3),
                    (snapshots[1], 2), (snapshots[4], 5)]
        for _ in range(workbench.UPKEEP_MAX):
            more = driver.upkeep(self.pool.name)
            for source, seed in kept:
                self.assert_seed(source, seed)
            if not more:
                break
        self.assertFalse(driver.upkeep(self.pool.name))
