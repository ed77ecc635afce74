# SPDX-License-Identifier: Apache-2.0
"""VDIs of the simulator: sizes, chains, room, and each refusal."""

import os
import unittest

from tests import xapi
from tests.integration.xapi_storage_case import GIB
from tests.integration.xapi_storage_case import MIB
from tests.integration.xapi_storage_case import VdiCase
from volume.sim.xapi.sm.lvmsr import full_bytes

EXTENT = 4 * MIB
VHD_MAX = 2040 * GIB


class TestCapabilities(VdiCase):

    def test_what_a_type_cannot_do_is_refused_before_its_driver(self):
        """S21."""
        sr = self.api.SR.get_by_uuid(xapi.hba_sr(self.pool, ('3a', GIB)))
        self.api.SR.scan(sr)
        vdi = self.vdi(sr, GIB)
        for call in (
            lambda: self.api.VDI.snapshot(vdi),
            lambda: self.api.VDI.clone(vdi),
            lambda: self.api.VDI.resize(vdi, str(2 * GIB)),
            lambda: self.api.VDI.update(vdi),
        ):
            with self.refused('SR_OPERATION_NOT_SUPPORTED', sr):
                call()

    def test_a_raw_disk_is_cloned_by_a_copy_into_a_vhd(self):
        """S21."""
        sr = self.nfs()
        raw = self.vdi(sr, 5 * MIB, sm_config={'type': 'raw'})
        self.write(raw, MIB, b'x' * 1000)
        clone = self.api.VDI.clone(raw)
        self.assertIn(f'{self.api.VDI.get_uuid(raw)}.raw', self.files(sr))
        self.assertIn(f'{self.api.VDI.get_uuid(clone)}.vhd', self.files(sr))
        self.assertEqual(b'x' * 1000, self.read(clone, MIB, 1000))
        self.assertEqual('disk', self.api.VDI.get_name_label(clone))

    def test_a_raw_disk_has_no_snapshot_and_as_a_file_does_not_grow(self):
        """S29."""
        sr = self.nfs()
        raw = self.vdi(sr, sm_config={'type': 'raw'})
        with self.refused('UNIMPLEMENTED_IN_SM_BACKEND', sr):
            self.api.VDI.snapshot(raw)
        with self.refused('INTERNAL_ERROR'):
            self.api.VDI.resize(raw, str(8 * MIB))
        lvm = self.lvm()
        raw = self.vdi(lvm, sm_config={'type': 'raw'})
        with self.refused('UNIMPLEMENTED_IN_SM_BACKEND', lvm):
            self.api.VDI.snapshot(raw)
        self.api.VDI.resize(raw, str(9 * MIB))
        self.assertEqual(12 * MIB, self.size(raw))

    def test_an_unknown_format_is_refused_by_each_family_in_its_way(self):
        with self.refused('SR_BACKEND_FAILURE_66'):
            self.vdi(self.nfs(), sm_config={'type': 'florp'})
        with self.refused('SR_BACKEND_FAILURE_78'):
            self.vdi(self.lvm(), sm_config={'type': 'florp'})

    def test_disks_are_introduced_only_where_the_driver_can(self):
        """S32."""
        args = (
            'd0b1e2c3-0000-4000-8000-000000000000', 'x', '', None, 'user',
            False, False, {}, 'location')
        for sr in self.nfs(), self.lvm():
            with self.refused('SR_OPERATION_NOT_SUPPORTED', sr):
                self.api.VDI.introduce(*args[:3], sr, *args[4:])

    def test_a_location_is_introduced_once(self):
        """S32."""
        self.pool.world.add_target('10.0.0.1', 'iqn.x')
        self.pool.world.add_lun('3b', GIB, iqn='iqn.x', lun_id=1)
        sr = self.create('iscsi', target='10.0.0.1', targetIQN='iqn.x')
        self.api.SR.scan(sr)
        [vdi] = self.api.SR.get_VDIs(sr)
        location = self.api.VDI.get_location(vdi)
        with self.refused('LOCATION_NOT_UNIQUE', sr, location):
            self.api.VDI.introduce(
                'd0b1e2c3-0000-4000-8000-000000000000', 'x', '', sr, 'user',
                False, False, {}, location, {}, {'LUNid': '1'})


class TestSizes(VdiCase):

    def test_sizes_are_rounded_up(self):
        """S22."""
        nfs, lvm = self.nfs(), self.lvm()
        for sr, asked, got, more in (
            (nfs, 1, 2 * MIB, {}),
            (nfs, 2 * MIB + 1, 4 * MIB, {}),
            (lvm, 4 * MIB + 1, 6 * MIB, {}),
            (lvm, 4 * MIB + 1, 8 * MIB, {'sm_config': {'type': 'raw'}}),
        ):
            vdi = self.vdi(sr, asked, **more)
            self.assertEqual(got, self.size(vdi))
            self.assertEqual(
                {}, self.api.VDI.get_other_config(vdi))

    def test_the_largest_vhd_has_2040_gib(self):
        """S22."""
        pool = xapi.simulator(self, 'xenserver-8')
        self.pool, self.api = pool, xapi.login(self, pool).xenapi
        self.hosts = pool.hosts
        sr = self.nfs()
        self.assertEqual(VHD_MAX, self.size(self.vdi(sr, VHD_MAX)))
        with self.refused(
            'SR_BACKEND_FAILURE_79', '', 'VDI Invalid size '
            '[opterr=VDI size must be between 1 MB and 2088960 MB]', '',
        ):
            self.vdi(sr, VHD_MAX + 1)

    def test_shrinking_is_refused_and_the_same_size_is_nothing(self):
        """S24."""
        for sr in self.nfs(), self.lvm():
            vdi = self.vdi(sr, 8 * MIB)
            with self.refused('SR_BACKEND_FAILURE_79') as refused:
                self.api.VDI.resize(vdi, str(6 * MIB))
            self.assertIn('shrinking not allowed', refused.details[2])
            self.api.VDI.resize(vdi, str(8 * MIB))
            self.assertEqual(8 * MIB, self.size(vdi))
            self.write(vdi, 8 * MIB - 100, b'e' * 100)
            self.api.VDI.resize(vdi, str(11 * MIB))
            self.assertEqual(12 * MIB, self.size(vdi))
            self.assertEqual(
                b'e' * 100 + bytes(100), self.read(vdi, 8 * MIB - 100, 200))

    def test_a_disk_in_use_does_not_grow(self):
        """S24."""
        vdi = self.vdi(self.nfs())
        vbd = self.plug(vdi)
        with self.refused('VDI_IN_USE', vdi, 'resize'):
            self.api.VDI.resize(vdi, str(8 * MIB))
        self.api.VBD.unplug(vbd)
        self.api.VDI.resize(vdi, str(8 * MIB))

    def test_growing_a_disk_in_use_is_a_call_of_other_releases(self):
        """S25."""
        for profile, code in (
            ('xcp-ng-8.3', 'MESSAGE_REMOVED'),
            ('xenserver-7.6', 'MESSAGE_REMOVED'),
            ('head', 'SR_OPERATION_NOT_SUPPORTED'),
            ('xenserver-6.5', 'SR_OPERATION_NOT_SUPPORTED'),
        ):
            with self.subTest(profile):
                pool = xapi.simulator(self, profile)
                self.pool, self.hosts = pool, pool.hosts
                self.api = xapi.login(self, pool).xenapi
                vdi = self.vdi(self.nfs())
                with self.refused(code):
                    self.api.VDI.resize_online(vdi, str(8 * MIB))

    def test_a_file_disk_takes_what_was_written(self):
        """S23."""
        sr = self.nfs()
        vdi = self.vdi(sr, 64 * MIB)
        before = self.used(sr)
        self.write(vdi, 0, os.urandom(4 * MIB))
        self.api.SR.scan(sr)
        self.assertGreaterEqual(self.used(sr) - before, 4 * MIB)
        self.assertLess(self.used(sr) - before, 8 * MIB)
        path = self.files(sr)[f'{self.api.VDI.get_uuid(vdi)}.vhd']
        self.assertEqual(
            path.stat().st_size,
            int(self.api.VDI.get_physical_utilisation(vdi)))
        self.assertEqual(
            str(64 * MIB), self.api.SR.get_virtual_allocation(sr))


class TestFormats(VdiCase):

    def format(self, vdi):
        return self.api.VDI.get_sm_config(vdi).get('image-format')

    def test_what_no_vhd_can_hold_becomes_a_qcow2(self):
        """S22."""
        for sr in self.nfs(), self.thin():
            vdi = self.vdi(sr, VHD_MAX + 1)
            self.assertEqual('qcow2', self.format(vdi))
            self.assertGreater(self.size(vdi), VHD_MAX)
            self.assertEqual('vhd', self.format(self.vdi(sr, VHD_MAX)))
            with self.refused('SR_BACKEND_FAILURE_79'):
                self.vdi(sr, 17 << 40)

    def thin(self):
        self.pool.world.add_lun('360b', GIB, adapter='FC')
        return self.create('lvmohba', SCSIid='360b', allocation='thin')

    def test_a_format_is_asked_for_by_disk(self):
        sr = self.nfs()
        for wanted in 'vhd', 'qcow2', 'raw':
            for key in 'image-format', 'type':
                vdi = self.vdi(sr, sm_config={key: wanted})
                self.assertEqual(wanted, self.format(vdi))
                self.assertIn(
                    f'{self.api.VDI.get_uuid(vdi)}.{wanted}', self.files(sr))

    def test_a_format_is_preferred_by_sr(self):
        self.pool.world.add_nfs('filer', '/export', size_bytes=GIB)
        sr = self.create(**{
            'server': 'filer', 'serverpath': '/export',
            'preferred-image-formats': 'qcow2'})
        self.assertEqual('qcow2', self.format(self.vdi(sr)))
        with self.refused('SR_BACKEND_FAILURE_66'):
            self.vdi(sr, sm_config={'image-format': 'vhd'})
        sr = self.create(**{
            'server': 'filer', 'serverpath': '/export',
            'preferred-image-formats': 'vhd'})
        with self.refused('SR_BACKEND_FAILURE_79'):
            self.vdi(sr, VHD_MAX + 1)

    def test_older_servers_know_no_other_format(self):
        self.pool = xapi.simulator(self, 'xenserver-8')
        self.api = xapi.login(self, self.pool).xenapi
        self.hosts = self.pool.hosts
        sr = self.nfs()
        self.assertEqual({}, self.api.VDI.get_sm_config(self.vdi(sr)))
        self.assertEqual('vhd', next(iter(self.files(sr))).split('.')[1])

    def test_qcow2_disks_have_chains_that_are_collected(self):
        sr = self.nfs()
        vdi = self.vdi(sr, 8 * MIB, sm_config={'image-format': 'qcow2'})
        self.write(vdi, 0, b'one')
        first = self.api.VDI.snapshot(vdi)
        self.write(vdi, 0, b'two')
        clone = self.api.VDI.clone(vdi)
        self.write(vdi, 0, b'six')
        self.assertEqual('qcow2', self.format(clone))
        for disk, wanted in (first, b'one'), (clone, b'two'), (vdi, b'six'):
            self.assertEqual(wanted, self.read(disk, 0, 3))
        self.api.VDI.destroy(clone)
        self.api.VDI.destroy(first)
        self.collected(sr)
        self.assertEqual(b'six', self.read(vdi, 0, 3))
        self.assertEqual(1, len(self.files(sr)))
        self.api.VDI.resize(vdi, str(12 * MIB))
        self.assertEqual(12 * MIB, self.size(vdi))


class TestRoom(VdiCase):

    def test_a_full_file_sr_makes_no_disk_and_takes_no_bytes(self):
        """S23."""
        self.pool.world.add_nfs('filer', '/export', size_bytes=16 * MIB)
        sr = self.create(server='filer', serverpath='/export')
        vdi = self.vdi(sr, 64 * MIB)  # thin: it may promise too much
        with self.assertRaises(Exception) as failed:
            self.write(vdi, 0, os.urandom(20 * MIB))
        self.assertEqual('NoSpace', type(failed.exception).__name__)
        self.assertLessEqual(self.used(sr), 16 * MIB)
        with self.refused('SR_BACKEND_FAILURE_44'):
            self.vdi(sr)
        with self.refused('SR_BACKEND_FAILURE_44'):
            self.api.VDI.snapshot(vdi)
        self.api.VDI.destroy(vdi)
        self.vdi(sr)

    def test_room_can_be_taken_away_by_order(self):
        """S23."""
        sr = self.nfs()
        uuid = self.api.SR.get_uuid(sr)
        self.pool.faults.fill_sr(uuid, 0)
        with self.refused('SR_BACKEND_FAILURE_44'):
            self.vdi(sr)
        self.api.SR.update(sr)
        self.assertEqual(GIB, self.used(sr))
        self.pool.faults.fill_sr(uuid, None)
        self.vdi(sr)

    def test_a_thick_disk_takes_all_of_it_at_once(self):
        """S23."""
        sr = self.lvm()
        before = self.used(sr)
        vdi = self.vdi(sr, 400 * MIB)
        self.assertEqual(full_bytes(400 * MIB), self.used(sr) - before)
        self.assertEqual(
            full_bytes(400 * MIB),
            int(self.api.VDI.get_physical_utilisation(vdi)))
        self.assertEqual(0, full_bytes(400 * MIB) % EXTENT)
        with self.refused('SR_BACKEND_FAILURE_44'):
            self.vdi(sr, 800 * MIB)

    def test_a_thick_snapshot_wants_the_whole_disk_again(self):
        """S23."""
        sr = self.lvm()
        vdi = self.vdi(sr, 600 * MIB)
        self.write(vdi, 0, os.urandom(600 * MIB // 100))
        # Of the base copy only what was written is kept, so that fits.
        first = self.api.VDI.snapshot(vdi)
        self.assertLess(
            int(self.api.VDI.get_physical_utilisation(first)), 20 * MIB)
        self.assertEqual(
            full_bytes(600 * MIB),
            int(self.api.VDI.get_physical_utilisation(vdi)))
        # A clone is a second whole disk, for which there is no room.
        with self.refused('SR_BACKEND_FAILURE_44'):
            self.api.VDI.clone(vdi)
        free = int(self.api.SR.get_physical_size(sr)) - self.used(sr)
        manager = self.pool.sm.manager(sr)
        with manager.open(self.api.VDI.get_uuid(vdi), True) as disk:
            for offset in range(0, 600 * MIB, 2 * MIB):
                disk.pwrite(offset, b'x' * 4096)
        # What is hidden now is whole: the disk that goes on has no room.
        self.assertLess(free, full_bytes(600 * MIB))
        with self.refused('SR_BACKEND_FAILURE_44'):
            self.api.VDI.snapshot(vdi)

    def test_a_snapshot_is_inflated_while_it_is_open(self):
        sr = self.lvm()
        vdi = self.vdi(sr, 300 * MIB)
        snapshot = self.api.VDI.snapshot(vdi)
        before = self.used(sr)
        manager = self.pool.sm.manager(sr)
        with manager.open(self.api.VDI.get_uuid(snapshot)):
            self.assertGreater(
                manager.sizes().physical_utilisation, before + 290 * MIB)
        self.api.SR.update(sr)
        self.assertEqual(before, self.used(sr))

    def test_thin_volumes_that_promise_too_much_fail_when_opened(self):
        self.pool.world.add_lun('360a', GIB, adapter='FC')
        sr = self.create('lvmohba', SCSIid='360a', allocation='thin')
        self.vdi(sr, 700 * MIB)
        second = self.vdi(sr, 700 * MIB)
        third = self.vdi(sr, 700 * MIB)
        manager = self.pool.sm.manager(sr)
        with manager.open(self.api.VDI.get_uuid(second), True):
            with self.assertRaises(Exception) as failed:
                manager.open(self.api.VDI.get_uuid(third), True)
        self.assertEqual(
            'SR_BACKEND_FAILURE_180', failed.exception.code)

    def test_the_room_of_a_deleted_volume_comes_back_with_the_collector(self):
        """S28."""
        sr = self.lvm()
        vdi = self.vdi(sr, 400 * MIB)
        self.hold_collector()
        before = self.used(sr)
        self.api.VDI.destroy(vdi)
        self.assertEqual(before, self.used(sr))
        self.api.SR.scan(sr)
        self.assertEqual([], self.api.SR.get_VDIs(sr))
        self.release_collector()
        self.collected(sr)
        self.assertEqual(before - full_bytes(400 * MIB), self.used(sr))


class TestRules(VdiCase):

    def test_nobody_sets_what_only_a_driver_may(self):
        vdi = self.vdi(self.nfs())
        with self.refused('PERMISSION_DENIED', ''):
            self.api.VDI.set_read_only(vdi, True)
        pbd = self.api.PBD.get_all()[0]
        with self.refused('PERMISSION_DENIED', ''):
            self.api.PBD.set_device_config(pbd, {})

    def test_a_key_of_other_config_is_added_once(self):
        vdi = self.vdi(self.nfs(), other_config={'a': 'b'})
        with self.refused(
            'MAP_DUPLICATE_KEY', 'VDI', 'other_config', vdi, 'a',
        ):
            self.api.VDI.add_to_other_config(vdi, 'a', 'c')
        self.api.VDI.remove_from_other_config(vdi, 'absent')

    def test_two_creates_make_two_disks(self):
        sr = self.nfs()
        self.assertNotEqual(
            self.api.VDI.get_uuid(self.vdi(sr)),
            self.api.VDI.get_uuid(self.vdi(sr)))

    def test_a_record_without_a_member_is_an_internal_error(self):
        with self.refused('INTERNAL_ERROR') as refused:
            self.api.VDI.create({'SR': self.nfs()})
        self.assertIn('Dispatcher_FieldNotFound', refused.details[1])

    def test_uuid_and_location_are_not_chosen(self):
        vdi = self.vdi(self.nfs(), uuid='x', location='y')
        row = self.record(vdi)
        self.assertEqual(row['uuid'], row['location'])
        self.assertNotEqual('x', row['uuid'])

    def test_metadata_of_tracking_is_no_disk_to_make(self):
        with self.refused('VDI_INCOMPATIBLE_TYPE'):
            self.vdi(self.nfs(), type='cbt_metadata')


if __name__ == '__main__':
    unittest.main()
