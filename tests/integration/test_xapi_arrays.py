# SPDX-License-Identifier: Apache-2.0
"""``netapp`` and ``equal`` on the simulator: modelled on their manuals."""

import unittest
import xml.etree.ElementTree as ElementTree

import XenAPI

from tests import xapi

MIB = 1 << 20
GIB = 1 << 30
NETAPP = {'target': 'filer', 'username': 'root', 'password': 'secret'}
EQUAL = {'target': '192.0.2.9', 'username': 'grpadmin', 'password': 'secret'}


class ArrayCase(unittest.TestCase):
    """A pool that may use an array."""

    kind = ''
    login = {}
    pools = {}

    def setUp(self):
        self.pool = xapi.simulator(self, profile='xcp-ng-8.3+netapp+equal')
        self.world = self.pool.world
        self.array()
        self.session = xapi.login(self, self.pool)
        self.api = self.session.xenapi
        self.host = self.api.pool.get_master(self.api.pool.get_all()[0])

    def array(self, is_down=False, **facts):
        """Make the array, or make it another."""
        self.world.add_array(
            self.kind, self.login['target'], self.login['username'],
            self.login['password'], self.pools, is_down=is_down,
            facts=facts)

    def sr(self, **device_config):
        return self.api.SR.create(
            self.host, {**self.login, **device_config}, '0', self.kind, '',
            self.kind, 'user', True, {})

    def create(self, sr, size_bytes, **sm_config):
        return self.api.VDI.create({
            'SR': sr, 'virtual_size': str(size_bytes), 'type': 'user',
            'sharable': False, 'read_only': False, 'other_config': {},
            'name_label': 'mine', 'sm_config': sm_config,
        })

    def refused(self, number, call, *arguments, **keywords):
        with self.assertRaises(XenAPI.Failure) as caught:
            call(*arguments, **keywords)
        self.assertEqual(
            f'SR_BACKEND_FAILURE_{number}', caught.exception.details[0])
        return caught.exception.details

    def used(self, sr):
        self.api.SR.scan(sr)
        return int(self.api.SR.get_physical_utilisation(sr))

    def manager(self, vdi):
        """Return the simulator's own manager of a VDI's SR."""
        return self.pool.sm.manager(self.api.VDI.get_SR(vdi))

    def open(self, vdi, writable=True):
        """Return the bytes of a VDI, as a guest has them."""
        uuid = self.api.VDI.get_uuid(vdi)
        disk = self.manager(vdi).open(uuid, writable)
        self.addCleanup(disk.close)
        return disk


class Shared:
    """Claims about both kinds of array."""

    def test_a_volume_has_bytes(self):
        vdi = self.create(self.made(), 4 * MIB)
        disk = self.open(vdi)
        disk.pwrite(MIB, b'data')
        self.assertEqual(b'data', disk.pread(MIB, 4))
        self.assertEqual(bytes(4), disk.pread(0, 4))

    def test_a_thick_volume_takes_its_size_at_once(self):
        sr = self.made()
        before = self.used(sr)
        self.create(sr, 8 * MIB, **self.plain)
        self.assertEqual(8 * MIB, self.used(sr) - before)

    def test_a_thin_volume_takes_what_was_written(self):
        sr = self.made(allocation='thin')
        before = self.used(sr)
        vdi = self.create(sr, 8 * MIB, **self.plain)
        self.assertEqual(before, self.used(sr))
        self.open(vdi).pwrite(0, bytes(range(256)) * 4096)
        self.assertEqual(MIB, self.used(sr) - before)

    def test_what_does_not_fit_is_refused(self):
        sr = self.made()
        self.refused(44, self.create, sr, 2 * GIB)

    def test_a_snapshot_keeps_what_was_there(self):
        vdi = self.create(self.made(), 4 * MIB)
        disk = self.open(vdi)
        disk.pwrite(0, b'before')
        snapshot = self.api.VDI.snapshot(vdi)
        disk.pwrite(0, b'after!')
        self.assertEqual(b'before', self.open(snapshot, False).pread(0, 6))
        self.assertEqual(b'after!', disk.pread(0, 6))
        self.assertEqual(vdi, self.api.VDI.get_snapshot_of(snapshot))

    def test_a_snapshot_takes_what_was_overwritten_since(self):
        sr = self.made()
        vdi = self.create(sr, 4 * MIB, **self.reserved)
        self.open(vdi).pwrite(0, bytes(4 * MIB))
        snapshot = self.api.VDI.snapshot(vdi)
        self.assertEqual('0', self.taken(sr, snapshot))
        self.open(vdi).pwrite(MIB, b'x')
        self.assertEqual(str(MIB), self.taken(sr, snapshot))

    def test_there_is_no_base_copy(self):
        sr = self.made()
        vdi = self.create(sr, 4 * MIB)
        snapshot = self.api.VDI.snapshot(vdi)
        self.assertEqual(
            {vdi, snapshot}, set(self.api.SR.get_VDIs(sr)))

    def test_a_clone_is_a_volume_of_its_own(self):
        vdi = self.create(self.made(), 4 * MIB)
        self.open(vdi).pwrite(0, b'before')
        clone = self.api.VDI.clone(vdi)
        self.open(clone).pwrite(0, b'after!')
        self.assertEqual(b'before', self.open(vdi).pread(0, 6))
        self.assertFalse(self.api.VDI.get_is_a_snapshot(clone))
        self.assertTrue(self.api.VDI.get_managed(clone))

    def test_a_clone_of_a_snapshot_outlives_it(self):
        vdi = self.create(self.made(), 4 * MIB)
        self.open(vdi).pwrite(0, b'before')
        snapshot = self.api.VDI.snapshot(vdi)
        clone = self.api.VDI.clone(snapshot)
        self.api.VDI.destroy(snapshot)
        self.assertEqual(b'before', self.open(clone).pread(0, 6))

    def test_a_volume_grows_and_never_shrinks(self):
        vdi = self.create(self.made(), 4 * MIB)
        self.api.VDI.resize(vdi, str(8 * MIB))
        self.assertEqual(str(8 * MIB), self.api.VDI.get_virtual_size(vdi))
        self.assertEqual(bytes(MIB), self.open(vdi).pread(7 * MIB, MIB))
        details = self.refused(79, self.api.VDI.resize, vdi, str(4 * MIB))
        self.assertIn('shrinking not allowed', details[2])

    def test_destroy_gives_its_room_back_at_once(self):
        sr = self.made()
        before = self.used(sr)
        self.api.VDI.destroy(self.create(sr, 8 * MIB))
        self.assertEqual(before, self.used(sr))

    def test_an_array_that_is_down_is_an_error_of_its_own(self):
        self.array(is_down=True)
        self.refused(self.down, self.made)

    def test_a_wrong_password_is_an_error_of_its_own(self):
        self.refused(self.denied, self.made, password='wrong')

    def test_a_repository_is_found_by_a_probe(self):
        sr = self.made()
        found = ElementTree.fromstring(
            self.api.SR.probe(self.host, self.login, self.kind, {}))
        self.assertEqual([self.api.SR.get_uuid(sr)], [
            uuid.text.strip() for uuid in found.findall('SR/UUID')])

    def test_a_scan_finds_volumes_by_their_own_names(self):
        sr = self.made()
        vdi = self.create(sr, 4 * MIB)
        uuid = self.api.VDI.get_uuid(vdi)
        self.api.VDI.forget(vdi)
        self.api.SR.scan(sr)
        again = self.api.VDI.get_by_uuid(uuid)
        self.assertEqual('mine', self.api.VDI.get_name_label(again))

    def taken(self, sr, vdi):
        self.api.SR.scan(sr)
        return self.api.VDI.get_physical_utilisation(vdi)


class Netapp(Shared, ArrayCase):
    """FlexVols of an aggregate."""

    kind = 'netapp'
    login = NETAPP
    pools = {
        'aggr0': {'size': GIB, 'disks': 12, 'raidtype': 'raid_dp'},
        'aggr1': {'size': GIB, 'asis_dedup': False},
    }
    down = 124
    denied = 125
    plain = {}
    reserved = {}

    def made(self, **device_config):
        return self.sr(**{'aggregate': 'aggr0', **device_config})

    def test_without_an_aggregate_the_choice_is_told(self):
        found = ElementTree.fromstring(self.refused(123, self.sr)[3])
        self.assertEqual([
            ('aggr0', str(GIB), '12', 'raid_dp', 'true'),
            ('aggr1', str(GIB), '4', 'raid_dp', 'false'),
        ], [tuple(aggr.findtext(name).strip() for name in (
            'Name', 'size', 'disks', 'raidtype', 'asis_dedup'))
            for aggr in found.findall('Aggr')])

    def test_each_obstacle_has_its_number(self):
        for number, facts in (
            (126, {'privileged': False}), (130, {'version': [6, 5]}),
            (131, {'iqn': ''}), (132, {'iscsi': False}),
            (127, {'flexvols_max': 7}),
        ):
            with self.subTest(facts=facts):
                self.array(**facts)
                self.refused(number, self.made)

    def test_deduplication_wants_a_licence_a_thin_sr_and_an_aggregate(self):
        self.refused(133, self.made, asis='true')
        self.refused(
            134, self.made, asis='true', allocation='thin',
            aggregate='aggr1')
        self.array(asis_licence=False)
        self.refused(133, self.made, asis='true', allocation='thin')

    def test_the_number_of_flexvols_is_bounded(self):
        self.refused(1, self.made, FlexVols='33')
        self.assertTrue(self.made(FlexVols='32'))

    def test_snapshots_of_a_flexvol_are_bounded(self):
        self.array(snapshots_max=2)
        vdi = self.create(self.made(FlexVols='1'), MIB)
        self.api.VDI.snapshot(vdi)
        self.api.VDI.snapshot(vdi)
        self.refused(128, self.api.VDI.snapshot, vdi)

    def test_volumes_go_to_the_emptiest_flexvol(self):
        self.array(luns_max=1)
        sr = self.made(FlexVols='2')
        self.create(sr, MIB)
        self.create(sr, MIB)
        self.refused(44, self.create, sr, MIB)

    def test_a_full_aggregate_takes_no_snapshot(self):
        sr = self.made()
        vdi = self.create(sr, GIB)
        self.refused(129, self.api.VDI.snapshot, vdi)

    def test_what_a_snapshot_takes_is_taken_from_the_aggregate(self):
        sr = self.made()
        vdi = self.create(sr, 4 * MIB)
        self.api.VDI.snapshot(vdi)
        before = self.used(sr)
        self.open(vdi).pwrite(MIB - 1, b'xy')
        self.assertEqual(2 * MIB, self.used(sr) - before)

    def test_a_lun_that_another_pool_writes_to_is_locked(self):
        sr = self.made()
        vdi = self.create(sr, MIB)
        uuid = self.api.VDI.get_uuid(vdi)
        self.world.take(f'array/{uuid}', 'another pool')
        with self.assertRaisesRegex(Exception, 'SR_BACKEND_FAILURE_135'):
            self.open(vdi)
        self.world.give_back(f'array/{uuid}', 'another pool')


class Equal(Shared, ArrayCase):
    """Volumes of a storage pool."""

    kind = 'equal'
    login = EQUAL
    pools = {'default': {'size': GIB, 'members': 2}, 'fast': {'size': GIB}}
    down = 171
    denied = 169
    plain = {'snap-reserve-percentage': '0'}
    reserved = {'snap-reserve-percentage': '100'}

    def made(self, **device_config):
        return self.sr(**{'storagepool': 'default', **device_config})

    def test_without_a_storage_pool_the_choice_is_told(self):
        found = ElementTree.fromstring(self.refused(163, self.sr)[3])
        self.assertEqual([
            ('default', 'true', '2', '0', str(GIB), str(GIB)),
            ('fast', 'false', '1', '0', str(GIB), str(GIB)),
        ], [tuple(pool.findtext(name).strip() for name in (
            'name', 'default', 'members', 'volumes', 'capacity',
            'freespace'))
            for pool in found.findall('StoragePool')])

    def test_each_obstacle_has_its_number(self):
        self.refused(172, self.made, storagepool='slow')
        self.refused(173, self.made, target='group.example.org')
        self.refused(171, self.made, target='192.0.2.10')
        self.array(version=[3, 9])
        self.refused(170, self.made)

    def test_sessions_of_the_array_are_few(self):
        sr = self.made()
        self.array(sessions_busy=7)
        self.refused(164, self.create, sr, MIB)

    def test_a_repository_has_a_small_volume_of_its_own(self):
        self.assertEqual(30 * MIB, self.used(self.made()))

    def test_room_for_snapshots_is_taken_with_the_volume(self):
        sr = self.made()
        before = self.used(sr)
        self.create(sr, 8 * MIB)
        self.assertEqual(16 * MIB, self.used(sr) - before)
        self.create(sr, 8 * MIB, **{'snap-reserve-percentage': '50'})
        self.assertEqual(28 * MIB, self.used(sr) - before)

    def test_what_is_wrong_with_a_volume_has_its_number(self):
        sr = self.made()
        self.refused(
            165, self.create, sr, MIB, **{'snap-reserve-percentage': 'all'})
        self.refused(166, self.create, sr, MIB, **{'snap-depletion': 'cry'})

    def test_a_snapshot_of_a_snapshot_is_forbidden(self):
        vdi = self.create(self.made(), MIB)
        self.refused(
            168, self.api.VDI.snapshot, self.api.VDI.snapshot(vdi))

    def test_a_full_reserve_costs_the_oldest_snapshot(self):
        sr = self.made()
        vdi = self.create(sr, 4 * MIB, **{'snap-reserve-percentage': '25'})
        first = self.api.VDI.snapshot(vdi)
        self.open(vdi).pwrite(0, b'x')
        second = self.api.VDI.snapshot(vdi)
        self.open(vdi).pwrite(0, b'y')
        self.api.SR.scan(sr)
        self.assertEqual({vdi, second}, set(self.api.SR.get_VDIs(sr)))
        self.assertNotIn(first, self.api.SR.get_VDIs(sr))

    def test_or_it_costs_the_volume(self):
        vdi = self.create(self.made(), 4 * MIB, **{
            'snap-reserve-percentage': '25',
            'snap-depletion': 'volume-offline',
        })
        snapshot = self.api.VDI.snapshot(vdi)
        disk = self.open(vdi)
        disk.pwrite(0, b'x')
        with self.assertRaisesRegex(Exception, 'went offline'):
            disk.pwrite(MIB, b'y')
        self.refused(167, self.api.VDI.snapshot, vdi)
        self.api.VDI.destroy(snapshot)
        disk.pwrite(MIB, b'y')
        self.assertTrue(self.api.VDI.snapshot(vdi))
