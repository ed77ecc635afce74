# SPDX-License-Identifier: Apache-2.0
"""S36: full copies of disks, and moves under a VM, in a simulated pool."""

import random

from tests import xapi
from tests.integration.xapi_case import Case
from tests.integration.xapi_case import MIB
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.objects.guests import guests

NULL = 'OpaqueRef:NULL'


class Copy(Case):

    def setUp(self):
        super().setUp()
        self.chance = random.Random(5)

    def filled(self, size=8 * MIB, length=5 * MIB // 2, **more):
        """Return a disk, and its bytes."""
        data = self.chance.randbytes(length)
        vdi = self.vdi(size, **more)
        self.put(vdi, data)
        self.left(vdi)
        return vdi, data.ljust(size, b'\0')

    def test_a_copy_has_the_bytes_and_the_properties(self):
        vdi, whole = self.filled(
            other_config={'key': 'value'}, tags=['a'], name_label='name')
        copy = self.x.VDI.copy(vdi, self.sr)
        self.assertEqual(whole, self.content(copy))
        row = self.x.VDI.get_record(copy)
        self.assertEqual(
            ('name', {'key': 'value'}, ['a'], False),
            (row['name_label'], row['other_config'], row['tags'],
             row['is_a_snapshot']))
        self.assertNotIn('vhd-parent', row['sm_config'])

    def test_a_copy_goes_to_another_sr_and_outlives_its_source(self):
        vdi, whole = self.filled()
        other = self.x.SR.get_by_uuid(xapi.lvm_sr(self.pool))
        copy = self.x.VDI.copy(vdi, other)
        self.assertEqual(other, self.x.VDI.get_SR(copy))
        self.left(vdi)
        self.x.VDI.destroy(vdi)
        self.assertEqual(whole, self.content(copy))

    def test_a_copy_goes_into_a_disk_that_is_there(self):
        vdi, whole = self.filled()
        target = self.vdi(16 * MIB)
        self.assertEqual(
            target, self.x.VDI.copy(vdi, NULL, NULL, target))
        self.assertEqual(
            whole.ljust(16 * MIB, b'\0'), self.content(target))

    def test_a_target_that_is_smaller_is_too_small_and_stays(self):
        vdi, _ = self.filled()
        target = self.vdi(4 * MIB)
        with self.refuses('VDI_TOO_SMALL', target, str(8 * MIB)):
            self.x.VDI.copy(vdi, NULL, NULL, target)
        self.x.VDI.get_uuid(target)

    def test_a_target_for_reading_is_read_only(self):
        vdi, _ = self.filled()
        target = self.vdi(read_only=True)
        with self.refuses('VDI_READONLY', target):
            self.x.VDI.copy(vdi, NULL, NULL, target)

    def test_a_source_that_is_written_to_is_in_use(self):
        vdi, _ = self.filled()
        self.plugged(vdi)
        with self.refuses('VDI_IN_USE', vdi, 'copy'):
            self.x.VDI.copy(vdi, self.sr)

    def test_a_source_that_is_read_is_copied(self):
        vdi, whole = self.filled()
        self.plugged(vdi, 'RO')
        self.assertEqual(
            whole, self.content(self.x.VDI.copy(vdi, self.sr)))

    def test_with_a_base_only_what_has_changed_is_copied(self):
        vdi, whole = self.filled()
        base = self.x.VDI.snapshot(vdi)
        self.put(vdi, b'new')
        self.left(vdi)
        # A mark where nothing has changed, and one where it has.
        marked = bytearray(whole)
        marked[5 * MIB:5 * MIB + 4] = b'mark'
        marked[:4] = b'lost'
        target = self.vdi()
        self.put(target, bytes(marked))
        self.left(target)
        self.x.VDI.copy(vdi, NULL, base, target)
        marked[:4] = b'new' + whole[3:4]
        self.assertEqual(bytes(marked), self.content(target))

    def test_a_raw_source_with_a_base_is_not_sparse(self):
        vdi = self.vdi(sm_config={'type': 'raw'})
        with self.refuses('VDI_NOT_SPARSE', vdi):
            self.x.VDI.copy(vdi, self.sr, self.vdi())

    def test_a_copy_that_fails_leaves_nothing_behind(self):
        vdi, _ = self.filled(length=7 * MIB)
        small = self.x.SR.get_by_uuid(
            xapi.nfs_sr(self.pool, path='/small', size=6 * MIB))
        before = {*self.x.VDI.get_all()}
        with self.refuses('VDI_IO_ERROR', 'Device I/O errors'):
            self.x.VDI.copy(vdi, small)
        self.assertEqual(before, {*self.x.VDI.get_all()})

    def test_a_copy_that_is_cancelled_leaves_nothing_behind(self):
        vdi, _ = self.filled()
        before = {*self.x.VDI.get_all()}
        self.pool.faults.add(
            Fault('VDI.copy', 'delay', 'before', params=(3.0,)))
        task = self.x.Async.VDI.copy(vdi, self.sr)
        self.x.task.cancel(task)
        row = self.ended(task)
        self.assertEqual('cancelled', row['status'])
        self.assertEqual('TASK_CANCELLED', row['error_info'][0])
        self.until(lambda: before == {*self.x.VDI.get_all()})

    def test_a_task_gives_the_new_disk_and_comes_to_an_end(self):
        vdi, _ = self.filled()
        row = self.ended(self.x.Async.VDI.copy(vdi, self.sr))
        ref = row['result'].removeprefix('<value>').removesuffix('</value>')
        self.assertEqual('8388608', self.x.VDI.get_virtual_size(ref))
        self.assertEqual(1.0, row['progress'])

    def test_what_was_kept_of_changes_is_not_copied(self):
        vdi, _ = self.filled()
        self.x.VDI.enable_cbt(vdi)
        snapshot = self.x.VDI.snapshot(vdi)
        self.x.VDI.data_destroy(snapshot)
        with self.refuses(
            'VDI_INCOMPATIBLE_TYPE', snapshot, 'cbt_metadata',
        ):
            self.x.VDI.copy(snapshot, self.sr)

    def test_a_raw_disk_is_cloned_by_a_copy_into_a_vhd(self):
        """S21."""
        vdi, whole = self.filled(sm_config={'type': 'raw'})
        clone = self.x.VDI.clone(vdi)
        self.assertEqual(whole, self.content(clone))
        self.assertEqual(
            'vhd', self.x.VDI.get_sm_config(clone)['image-format'])


class Migrate(Case):

    def setUp(self):
        super().setUp()
        self.other = self.x.SR.get_by_uuid(
            xapi.nfs_sr(self.pool, path='/other'))

    def test_a_disk_without_a_vm_is_not_migrated(self):
        vdi = self.vdi()
        with self.refuses('VDI_NEEDS_VM_FOR_MIGRATE', vdi):
            self.x.VDI.pool_migrate(vdi, self.other, {})

    def test_a_guest_goes_on_with_its_disk_elsewhere(self):
        vdi = self.vdi(other_config={'key': 'value'})
        vm, vbd = self.plugged(vdi)
        self.write(vm, b'before', MIB)
        new = self.x.VDI.pool_migrate(vdi, self.other, {})
        self.assertNotEqual(vdi, new)
        self.assertEqual(self.other, self.x.VDI.get_SR(new))
        self.assertEqual({'key': 'value'}, self.x.VDI.get_other_config(new))
        self.assertEqual(new, self.x.VBD.get_VDI(vbd))
        with self.refuses('HANDLE_INVALID', 'VDI', vdi):
            self.x.VDI.get_uuid(vdi)
        self.write(vm, b'after', 2 * MIB)
        self.x.VM.hard_shutdown(vm)
        found = self.content(new)
        self.assertEqual(b'before', found[MIB:MIB + 6])
        self.assertEqual(b'after', found[2 * MIB:2 * MIB + 5])

    def test_a_disk_that_is_tracked_is_not_migrated(self):
        vdi = self.vdi()
        self.plugged(vdi)
        self.x.VDI.enable_cbt(vdi)
        with self.refuses('VDI_CBT_ENABLED', vdi):
            self.x.VDI.pool_migrate(vdi, self.other, {})

    def test_an_sr_that_cannot_snapshot_takes_part_in_no_migration(self):
        luns = self.x.SR.get_by_uuid(
            xapi.hba_sr(self.pool, ('3600a', 16 * MIB)))
        vdi = self.vdi()
        self.plugged(vdi)
        with self.refuses('SR_DOES_NOT_SUPPORT_MIGRATION', luns):
            self.x.VDI.pool_migrate(vdi, luns, {})

    def test_a_format_that_the_target_does_not_have_is_incompatible(self):
        vdi = self.vdi()
        self.plugged(vdi)
        with self.refuses('VDI_INCOMPATIBLE_TYPE', vdi):
            self.x.VDI.pool_migrate(
                vdi, self.other, {'dest-img-format': 'vdi'})


class Dom0(Case):

    def test_a_disk_that_was_copied_is_in_dom0_for_a_while(self):
        guests(self.pool).linger_s = 2.0
        vdi = self.vdi()
        self.x.VDI.copy(vdi, self.sr)
        with self.refuses('VDI_IN_USE', vdi, 'destroy'):
            self.x.VDI.destroy(vdi)
        self.left(vdi)
        self.x.VDI.destroy(vdi)
