# SPDX-License-Identifier: Apache-2.0
"""The areas of thick snapshots, before all of their volume changes."""

from tests import lvm
from tests.unit import test_lvm_store
from volume import errors
from volume import ids
from volume import model

SIZE = test_lvm_store.SIZE


class AreasTest(test_lvm_store.Case):

    provisioning = 'thick'

    def test_before_all_of_it_changes_its_snapshots_can_keep_all_of_it(self):
        self.driver = self.make_driver(snapshot_percent=20)
        volume, other = self.volume(seed=1), self.volume(seed=2)
        mine = [model.Snapshot(ids.new(), volume, SIZE) for _ in range(2)]
        for snapshot in *mine, model.Snapshot(ids.new(), other, SIZE):
            self.driver.snapshot(snapshot)
        before = self.areas()
        self.driver.before_overwrite(volume)
        self.driver.before_overwrite(volume)
        whole = SIZE // lvm.EXTENT + 1  # and its tables
        self.assertEqual(
            {f'snap-{each.id}' for each in mine},
            {name for name, size in self.areas().items() if size == whole})
        self.assertEqual(1, len(self.areas().items() & before.items()))

    def test_without_room_for_that_nothing_is_changed(self):
        self.driver = self.make_driver(snapshot_percent=20)
        volume = self.volume(seed=1)
        for _ in range(2):
            self.driver.snapshot(model.Snapshot(ids.new(), volume, SIZE))
        before = self.areas()
        self.lvm('lvcreate', '-n', 'theirs', '-l',
                 str(len(self.world.free) - 1), lvm.GROUP)
        with self.assertRaisesRegex(errors.NoSpace, 'to keep what the snap'):
            self.driver.before_overwrite(volume)
        self.assertEqual(before, self.areas())

    def areas(self):
        """Return how many extents each snapshot's area has."""
        return {
            name: len(lv.extents) for name, lv in self.world.lvs.items()
            if name.startswith('snap-')
        }
