# SPDX-License-Identifier: Apache-2.0
"""Chains of the simulator: snapshots, clones, the collector, scans."""

import dataclasses
import unittest

from tests import xapi
from tests.integration.xapi_storage_case import MIB
from tests.integration.xapi_storage_case import VdiCase
from volume.sim.xapi.published import profiles


class TestChains(VdiCase):

    def test_a_disk_in_use_is_not_destroyed_and_a_base_copy_never(self):
        """S26."""
        sr = self.nfs()
        vdi = self.vdi(sr)
        self.hold_collector()
        self.api.VDI.snapshot(vdi)
        vbd = self.plug(vdi)
        with self.refused('VDI_IN_USE', vdi, 'destroy'):
            self.api.VDI.destroy(vdi)
        [base] = self.base_copies(sr)
        for call in (
            self.api.VDI.destroy, self.api.VDI.snapshot, self.api.VDI.clone,
        ):
            with self.refused('VDI_NOT_MANAGED', base):
                call(base)
        self.api.VBD.unplug(vbd)
        self.api.VDI.destroy(vdi)
        with self.refused('HANDLE_INVALID', 'VDI', vdi):
            self.api.VDI.destroy(vdi)
        self.assertEqual(
            [], [r for r in self.api.VBD.get_all() if r == vbd])

    def base_copies(self, sr):
        return [
            vdi for vdi in self.api.SR.get_VDIs(sr)
            if not self.api.VDI.get_managed(vdi)]

    def test_a_snapshot_hides_a_base_copy_and_keeps_the_bytes(self):
        """S27."""
        for sr in self.nfs(), self.lvm():
            vdi = self.vdi(sr, 8 * MIB, other_config={'volume:id': '1'},
                           tags=['a'], xenstore_data={'b': 'c'})
            self.write(vdi, 0, b'before')
            snapshot = self.api.VDI.snapshot(vdi, {'type': 'single'})
            self.write(vdi, 0, b'after.')
            self.assertEqual(b'before', self.read(snapshot, 0, 6))
            self.assertEqual(b'after.', self.read(vdi, 0, 6))
            origin, copy = self.record(vdi), self.record(snapshot)
            [base] = map(self.record, self.base_copies(sr))
            self.assertTrue(base['read_only'])
            self.assertEqual('base copy', base['name_label'])
            for row in origin, copy:
                self.assertEqual(
                    base['uuid'], row['sm_config']['vhd-parent'])
                self.assertFalse(row['read_only'])
            for key in (
                'name_label', 'other_config', 'tags', 'xenstore_data',
                'type', 'virtual_size',
            ):
                self.assertEqual(origin[key], copy[key], key)
            self.assertTrue(copy['is_a_snapshot'])
            self.assertEqual(vdi, copy['snapshot_of'])
            self.assertNotEqual(
                '19700101T00:00:00Z', str(copy['snapshot_time']))
            self.assertEqual([snapshot], origin['snapshots'])
            self.api.VDI.destroy(vdi)
            self.assertEqual(vdi, self.api.VDI.get_snapshot_of(snapshot))
            self.assertEqual(b'before', self.read(snapshot, 0, 6))

    def test_a_clone_is_no_snapshot_and_goes_its_own_way(self):
        sr = self.nfs()
        vdi = self.vdi(sr, 8 * MIB, other_config={'volume:id': '1'})
        self.write(vdi, 0, b'same')
        snapshot = self.api.VDI.snapshot(vdi)
        clone = self.api.VDI.clone(snapshot)
        row = self.record(clone)
        self.assertFalse(row['is_a_snapshot'])
        self.assertEqual('OpaqueRef:NULL', row['snapshot_of'])
        self.assertEqual({'volume:id': '1'}, row['other_config'])
        self.write(clone, 0, b'else')
        self.assertEqual(b'same', self.read(vdi, 0, 4))
        self.assertEqual(b'same', self.read(snapshot, 0, 4))

    def test_who_writes_goes_on_through_a_snapshot(self):
        for sr in self.nfs(), self.lvm():
            vdi = self.vdi(sr, 8 * MIB)
            manager = self.pool.sm.manager(sr)
            with manager.open(self.api.VDI.get_uuid(vdi), True) as disk:
                disk.pwrite(0, b'1')
                snapshot = self.api.VDI.snapshot(vdi)
                disk.pwrite(1, b'2')
                self.assertEqual(b'12', disk.pread(0, 2))
            self.assertEqual(b'1\0', self.read(snapshot, 0, 2))

    def test_the_thirtieth_snapshot_is_one_too_many_until_some_are_gone(self):
        """S28."""
        sr = self.nfs()
        vdi = self.vdi(sr, 2 * MIB)
        uuid = self.api.VDI.get_uuid(vdi)
        self.hold_collector()
        snapshots = []
        for at in range(29):
            self.write(vdi, 0, bytes([at]))
            snapshots.append(self.api.VDI.snapshot(vdi))
        manager = self.pool.sm.manager(sr)
        self.assertEqual(30, manager.chain_depth(uuid))
        for call in self.api.VDI.snapshot, self.api.VDI.clone:
            with self.refused('SR_BACKEND_FAILURE_109'):
                call(vdi)
        self.api.SR.scan(sr)
        used = self.used(sr)
        for snapshot in snapshots[1::2]:
            self.api.VDI.destroy(snapshot)
        with self.refused('SR_BACKEND_FAILURE_109'):
            self.api.VDI.snapshot(vdi)
        self.release_collector()
        self.collected(sr)
        self.assertEqual(16, manager.chain_depth(uuid))
        self.api.SR.scan(sr)
        self.assertLess(self.used(sr), used)
        for at, snapshot in enumerate(snapshots):
            if not at % 2:
                self.assertEqual(bytes([at]), self.read(snapshot, 0, 1))
        self.check_parents(sr)
        self.api.VDI.snapshot(vdi)

    def check_parents(self, sr):
        """Assert that each vhd-parent is a row and what the file says."""
        nodes = self.pool.sm.manager(sr).chains.nodes()
        rows = {
            row['uuid']: row
            for row in map(self.record, self.api.SR.get_VDIs(sr))}
        self.assertEqual({*nodes}, {*rows})
        for uuid, node in nodes.items():
            self.assertEqual(
                node.parent, rows[uuid]['sm_config'].get('vhd-parent', ''))

    def test_a_disk_whose_snapshots_are_gone_is_one_file_again(self):
        for sr in self.nfs(), self.lvm():
            vdi = self.vdi(sr, 8 * MIB)
            vbd = self.plug(vdi)
            for at in range(3):
                self.write(vdi, at, bytes([65 + at]))
                self.api.VDI.destroy(self.api.VDI.snapshot(vdi))
            self.collected(sr)
            self.assertEqual(1, len(self.files(sr)))
            self.assertEqual(b'ABC', self.read(vdi, 0, 3))
            self.assertNotIn('vhd-parent', self.record(vdi)['sm_config'])
            self.api.VBD.unplug(vbd)

    def test_the_collector_obeys_what_the_sr_says(self):
        sr = self.nfs()
        self.api.SR.add_to_other_config(sr, 'leaf-coalesce', 'false')
        vdi = self.vdi(sr)
        snapshots = [self.api.VDI.snapshot(vdi) for _ in range(3)]
        for snapshot in snapshots:
            self.api.VDI.destroy(snapshot)
        self.collected(sr)
        self.assertEqual(2, len(self.files(sr)))
        self.api.SR.remove_from_other_config(sr, 'leaf-coalesce')
        self.pool.gc(sr)
        self.assertEqual(1, len(self.files(sr)))

    def test_a_disk_is_reverted_where_the_driver_can(self):
        head = profiles.find('head')
        able = dataclasses.replace(head.sm['nfs'], capabilities=(
            *head.sm['nfs'].capabilities, 'VDI_REVERT'))
        for profile in head, dataclasses.replace(
            head, sm={**head.sm, 'nfs': able},
        ):
            self.pool = xapi.simulator(self, profile, gc_delay_s=0.0)
            self.api = xapi.login(self, self.pool).xenapi
            self.hosts = self.pool.hosts
            sr = self.nfs()
            vdi = self.vdi(sr)
            self.write(vdi, 0, b'one')
            snapshot = self.api.VDI.snapshot(vdi)
            self.write(vdi, 0, b'two')
            if profile is head:
                with self.refused('UNIMPLEMENTED_IN_SM_BACKEND', sr):
                    self.api.VDI.revert(snapshot)
                continue
            self.api.VDI.revert(snapshot)
            self.assertEqual(b'one', self.read(vdi, 0, 3))
            self.write(vdi, 0, b'new')
            self.assertEqual(b'one', self.read(snapshot, 0, 3))
            self.collected(sr)
            self.check_parents(sr)
            with self.refused('OPERATION_NOT_ALLOWED'):
                self.api.VDI.revert(vdi)

    def test_some_disks_have_no_snapshots(self):
        """S30."""
        sr = self.nfs()
        shared = self.vdi(sr, sharable=True)
        with self.refused('VDI_IS_SHARABLE', shared):
            self.api.VDI.snapshot(shared)
        fresh = self.vdi(sr)
        self.api.VDI.set_on_boot(fresh, 'reset')
        with self.refused('VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION'):
            self.api.VDI.snapshot(fresh)


class TestScan(VdiCase):

    def test_rows_follow_the_files(self):
        """S33."""
        sr = self.nfs()
        kept, lost = self.vdi(sr), self.vdi(sr)
        uuid = self.api.VDI.get_uuid(lost)
        path = self.files(sr)[f'{uuid}.vhd']
        data = path.read_bytes()
        path.unlink()
        self.api.SR.scan(sr)
        self.assertEqual([kept], self.api.SR.get_VDIs(sr))
        path.write_bytes(data)
        self.api.SR.scan(sr)
        found = self.record(self.api.VDI.get_by_uuid(uuid))
        self.assertEqual('', found['name_label'])
        self.assertTrue(found['managed'])
        path.with_name('notes.vhd').write_text('no disk')
        path.with_name(uuid[::-1] + '.vhd').write_text('broken')
        self.api.SR.scan(sr)
        self.assertEqual(2, len(self.api.SR.get_VDIs(sr)))

    def test_what_was_deleted_and_not_collected_stays_deleted(self):
        """S33."""
        for sr in self.nfs(), self.lvm():
            self.hold_collector()
            vdi = self.vdi(sr)
            snapshot = self.api.VDI.snapshot(vdi)
            deleted = [self.api.VDI.get_uuid(v) for v in (vdi, snapshot)]
            self.api.VDI.destroy(snapshot)
            self.api.VDI.destroy(vdi)
            self.api.SR.scan(sr)
            found = self.api.SR.get_VDIs(sr)
            self.assertFalse(
                {*deleted} & {*map(self.api.VDI.get_uuid, found)})
            if self.api.SR.get_type(sr) == 'nfs':
                self.assertEqual([], found)
            self.release_collector()
            self.collected(sr)
            self.assertEqual({}, self.files(sr))
            self.assertEqual([], self.api.SR.get_VDIs(sr))

    def test_names_and_keys_outlive_a_scan(self):
        sr = self.nfs()
        vdi = self.vdi(sr, other_config={'volume:id': '1'})
        self.api.VDI.set_name_description(vdi, 'about it')
        before = self.record(vdi)
        self.api.SR.scan(sr)
        self.assertEqual(before, self.record(vdi))

    def test_an_sr_that_wants_it_is_scanned_by_itself(self):
        self.pool = xapi.simulator(self, auto_scan_s=0.05)
        self.api = xapi.login(self, self.pool).xenapi
        self.hosts = self.pool.hosts
        sr = self.nfs()
        self.api.VDI.forget(self.vdi(sr))
        self.api.SR.add_to_other_config(sr, 'auto-scan', 'true')
        token = ''
        while not self.api.SR.get_VDIs(sr):
            token = self.api.event_from(['vdi'], token, 5.0)['token']

    def test_a_forgotten_disk_is_found_again(self):
        sr = self.nfs()
        vdi = self.vdi(sr)
        uuid = self.api.VDI.get_uuid(vdi)
        self.api.VDI.forget(vdi)
        self.assertEqual([], self.api.SR.get_VDIs(sr))
        self.api.SR.scan(sr)
        self.assertEqual(uuid, self.api.VDI.get_uuid(
            self.api.SR.get_VDIs(sr)[0]))


if __name__ == '__main__':
    unittest.main()
