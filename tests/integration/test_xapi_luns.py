# SPDX-License-Identifier: Apache-2.0
"""LUN-per-VDI on the simulator: claims, releases, and bytes that stay."""

import unittest

import XenAPI

from tests import xapi

MIB = 1 << 20
IQN = 'iqn.2026-11.test:one'


class LunCase(unittest.TestCase):
    """A pool that sees some LUNs."""

    profile = 'xcp-ng-8.3'

    def setUp(self):
        self.pool = xapi.simulator(self, profile=self.profile)
        self.world = self.pool.world
        self.session = xapi.login(self, self.pool)
        self.api = self.session.xenapi
        self.host = self.api.pool.get_master(self.api.pool.get_all()[0])

    def sr(self, kind, **device_config):
        return self.api.SR.create(
            self.host, device_config, '0', kind, '', kind, 'user', True, {})

    def create(self, sr, size_bytes):
        return self.api.VDI.create({
            'SR': sr, 'virtual_size': str(size_bytes), 'type': 'user',
            'sharable': False, 'read_only': False, 'other_config': {},
            'name_label': 'mine',
        })

    def vdis(self, sr):
        """Return the records of an SR's VDIs by SCSIid."""
        records = (
            self.api.VDI.get_record(vdi) for vdi in self.api.SR.get_VDIs(sr))
        return {
            record['sm_config']['SCSIid']: record for record in records
        }

    def assert_refused(self, code, call, *arguments):
        with self.assertRaises(XenAPI.Failure) as caught:
            call(*arguments)
        self.assertEqual(code, caught.exception.details[0])
        return caught.exception.details

    def write(self, scsi_id, data):
        with open(self.world.lun_file(scsi_id), 'r+b') as file:
            file.write(data)

    def read(self, scsi_id, length):
        with open(self.world.lun_file(scsi_id), 'rb') as file:
            return file.read(length)


class Hba(LunCase):
    """``hba``: VDI.create claims what is there."""

    def setUp(self):
        super().setUp()
        for number, size in enumerate((64, 16, 32)):
            self.world.add_lun(
                f'3600fc{number}', size * MIB, lun_id=number, adapter='FC')

    def test_luns_are_introduced_unmanaged(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        self.assertEqual(
            {'3600fc0': False, '3600fc1': False, '3600fc2': False},
            {scsi: vdi['managed'] for scsi, vdi in self.vdis(sr).items()})

    def test_a_vdi_says_which_lun_it_is(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        vdi = self.vdis(sr)['3600fc2']
        self.assertEqual(
            {'LUNid': '2', 'SCSIid': '3600fc2', 'backend-kind': 'vbd'},
            vdi['sm_config'])
        self.assertEqual(vdi['uuid'], vdi['location'])
        self.assertEqual(str(32 * MIB), vdi['virtual_size'])

    def test_create_claims_the_smallest_that_fits(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        vdi = self.create(sr, 20 * MIB)
        record = self.api.VDI.get_record(vdi)
        self.assertEqual('3600fc2', record['sm_config']['SCSIid'])
        self.assertEqual(str(32 * MIB), record['virtual_size'])
        self.assertTrue(record['managed'])
        self.assertEqual('mine', record['name_label'])

    def test_what_is_claimed_is_not_claimed_again(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        claimed = [
            self.api.VDI.get_sm_config(self.create(sr, MIB))['SCSIid']
            for _ in range(3)
        ]
        self.assertEqual(['3600fc1', '3600fc2', '3600fc0'], claimed)
        self.assert_refused('SR_BACKEND_FAILURE_44', self.create, sr, MIB)

    def test_nothing_is_large_enough(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        self.assert_refused(
            'SR_BACKEND_FAILURE_44', self.create, sr, 65 * MIB)

    def test_destroy_releases_and_a_scan_brings_it_back_with_its_data(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        vdi = self.create(sr, 16 * MIB)
        uuid = self.api.VDI.get_uuid(vdi)
        self.write('3600fc1', b'secret of a tenant')
        self.api.VDI.destroy(vdi)
        self.assertNotIn('3600fc1', self.vdis(sr))
        self.api.SR.scan(sr)
        again = self.vdis(sr)['3600fc1']
        self.assertEqual(uuid, again['uuid'])
        self.assertFalse(again['managed'])
        self.assertEqual(
            b'secret of a tenant', self.read('3600fc1', 18))

    def test_the_uuid_is_the_same_in_another_pool(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        other = xapi.simulator(self, world=self.world)
        session = xapi.login(self, other)
        theirs = session.xenapi.SR.create(
            session.xenapi.host.get_all()[0], {}, '0', 'hba', '', 'hba',
            'user', True, {})
        session.xenapi.SR.scan(theirs)
        self.assertEqual(
            {vdi['uuid'] for vdi in self.vdis(sr).values()},
            {session.xenapi.VDI.get_uuid(vdi)
             for vdi in session.xenapi.SR.get_VDIs(theirs)})

    def test_two_pools_that_write_to_one_lun_at_once_are_told(self):
        other = xapi.simulator(self, world=self.world, name='other')
        disks = []
        for pool in (self.pool, other):
            api = xapi.login(self, pool).xenapi
            sr = api.SR.get_by_uuid(xapi.hba_sr(pool))
            api.SR.scan(sr)
            uuid = api.VDI.get_uuid(sorted(
                api.SR.get_VDIs(sr), key=api.VDI.get_uuid)[0])
            self.assertEqual([], self.world.violations)
            disk = pool.sm.manager(sr).open(uuid, True)
            self.addCleanup(disk.close)
            disks.append(disk)
        self.assertRegex(
            '\n'.join(self.world.violations), 'uses luns/3600fc. while pool')
        (self.world.directory / 'violations').unlink()

    def test_a_scan_keeps_claims(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        vdi = self.create(sr, 16 * MIB)
        self.api.SR.scan(sr)
        self.assertTrue(self.api.VDI.get_managed(vdi))

    def test_sizes_are_counted_twice_as_the_driver_does(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        self.create(sr, 16 * MIB)
        self.api.SR.scan(sr)
        self.assertEqual(str(112 * MIB), self.api.SR.get_physical_size(sr))
        self.assertEqual(
            str(128 * MIB), self.api.SR.get_physical_utilisation(sr))

    def test_nothing_else_can_be_done_with_a_lun(self):
        sr = self.sr('hba')
        self.api.SR.scan(sr)
        vdi = self.create(sr, 16 * MIB)
        for call, *more in (
            (self.api.VDI.snapshot,), (self.api.VDI.clone,),
            (self.api.VDI.resize, str(64 * MIB)),
            (self.api.VDI.enable_cbt,),
        ):
            with self.subTest(call=str(call)):
                self.assertEqual(
                    ['SR_OPERATION_NOT_SUPPORTED', sr],
                    self.assert_refused(
                        'SR_OPERATION_NOT_SUPPORTED', call, vdi, *more))

    def test_there_is_one_repository_for_each_kind_of_adapter(self):
        self.sr('hba')
        self.assert_refused('SR_DEVICE_IN_USE', self.sr, 'hba')
        self.assertTrue(self.sr('hba', type='FC'))

    def test_without_an_adapter_there_is_no_device(self):
        self.assert_refused(
            'SR_BACKEND_FAILURE_19', lambda: self.sr('hba', type='SAS'))

    def test_the_repository_says_what_it_is(self):
        sm_config = self.api.SR.get_sm_config(self.sr('hba'))
        self.assertEqual(
            ('Raw', 'HBA', 'any', 'true'),
            tuple(sm_config.get(key) for key in (
                'disktype', 'datatype', 'hbatype', 'multipathable')))

    def test_introduce_finds_nothing(self):
        sr = self.sr('hba')
        self.assert_refused(
            'SR_BACKEND_FAILURE_46', self.api.VDI.introduce,
            'c0ffee00-0000-4000-8000-000000000000', 'x', '', sr, 'user',
            False, False, {}, 'c0ffee00-0000-4000-8000-000000000000', {},
            {'LUNid': '1'})


class RawHba(LunCase):
    """``rawhba``: seeing a LUN is taking it."""

    def setUp(self):
        super().setUp()
        for number in range(2):
            self.world.add_lun(
                f'3600fc{number}', 16 * MIB, lun_id=number, adapter='FC')

    def test_luns_appear_managed_and_named_by_their_scsi_id(self):
        sr = self.sr('rawhba')
        self.api.SR.scan(sr)
        found = self.vdis(sr)
        self.assertEqual(
            {'3600fc0': ('3600fc0', True), '3600fc1': ('3600fc1', True)},
            {scsi: (vdi['name_label'], vdi['managed'])
             for scsi, vdi in found.items()})

    def test_each_lun_is_reserved_in_sm_config(self):
        sr = self.sr('rawhba')
        self.api.SR.scan(sr)
        sm_config = self.api.SR.get_sm_config(sr)
        for scsi, vdi in self.vdis(sr).items():
            self.assertEqual(vdi['uuid'], sm_config[f'scsi-{scsi}'])

    def test_a_name_given_by_a_client_is_lost_at_the_next_scan(self):
        sr = self.sr('rawhba')
        self.api.SR.scan(sr)
        vdi = self.api.VDI.get_by_uuid(self.vdis(sr)['3600fc0']['uuid'])
        self.api.VDI.set_name_label(vdi, 'mine')
        self.api.VDI.add_to_other_config(vdi, 'key', 'value')
        self.api.SR.scan(sr)
        self.assertEqual('3600fc0', self.api.VDI.get_name_label(vdi))
        self.assertEqual('value', self.api.VDI.get_other_config(vdi)['key'])

    def test_a_vdi_cannot_be_created(self):
        sr = self.sr('rawhba')
        self.api.SR.scan(sr)
        self.assert_refused(
            'SR_OPERATION_NOT_SUPPORTED', self.create, sr, MIB)

    def test_destroy_removes_the_reservation_alone(self):
        sr = self.sr('rawhba')
        self.api.SR.scan(sr)
        self.write('3600fc0', b'data')
        vdi = self.api.VDI.get_by_uuid(self.vdis(sr)['3600fc0']['uuid'])
        self.api.VDI.destroy(vdi)
        self.assertNotIn('scsi-3600fc0', self.api.SR.get_sm_config(sr))
        self.assertEqual(b'data', self.read('3600fc0', 4))
        self.api.SR.scan(sr)
        self.assertIn('3600fc0', self.vdis(sr))

    def test_a_lun_that_grew_is_larger_after_a_scan(self):
        sr = self.sr('rawhba')
        self.api.SR.scan(sr)
        self.world.update(self.world.lun('3600fc0'), size_bytes=32 * MIB)
        self.api.SR.scan(sr)
        self.assertEqual(
            str(32 * MIB), self.vdis(sr)['3600fc0']['virtual_size'])

    def test_a_lun_that_is_gone_stays_in_the_list(self):
        sr = self.sr('rawhba')
        self.api.SR.scan(sr)
        self.world.remove(self.world.lun('3600fc0'))
        self.api.SR.scan(sr)
        self.assertEqual({'3600fc0', '3600fc1'}, set(self.vdis(sr)))

    def test_luns_of_other_repositories_are_left_alone(self):
        self.world.update(self.world.lun('3600fc1'), size_bytes=64 * MIB)
        self.sr('lvmohba', SCSIid='3600fc1')
        sr = self.sr('rawhba')
        self.api.SR.scan(sr)
        self.assertEqual({'3600fc0'}, set(self.vdis(sr)))


class IscsiCase(LunCase):
    """A target with two LUNs."""

    def setUp(self):
        super().setUp()
        self.world.add_target('192.0.2.1', IQN)
        for number in range(2):
            self.world.add_lun(
                f'360a98{number}', (number + 1) * 16 * MIB, lun_id=number,
                iqn=IQN)

    def iscsi(self):
        return self.sr('iscsi', target='192.0.2.1', targetIQN=IQN)


class Iscsi(IscsiCase):
    """``iscsi`` since 2016: LUNs are managed as soon as they are seen."""

    def test_luns_are_introduced_managed(self):
        sr = self.iscsi()
        self.api.SR.scan(sr)
        self.assertEqual(
            {'360a980': True, '360a981': True},
            {scsi: vdi['managed'] for scsi, vdi in self.vdis(sr).items()})

    def test_create_finds_nothing_to_claim(self):
        sr = self.iscsi()
        self.api.SR.scan(sr)
        self.assert_refused('SR_BACKEND_FAILURE_44', self.create, sr, MIB)

    def test_a_target_has_one_repository(self):
        self.iscsi()
        self.assert_refused('SR_DEVICE_IN_USE', self.iscsi)

    def test_introduce_finds_a_lun_by_its_number(self):
        sr = self.iscsi()
        self.api.SR.scan(sr)
        uuid = self.vdis(sr)['360a981']['uuid']
        self.api.VDI.forget(self.api.VDI.get_by_uuid(uuid))
        vdi = self.api.VDI.introduce(
            uuid, 'x', '', sr, 'user', False, False, {}, uuid, {},
            {'LUNid': '1'})
        self.assertEqual(
            '360a981', self.api.VDI.get_sm_config(vdi)['SCSIid'])

    def test_introduce_without_a_number_finds_nothing(self):
        sr = self.iscsi()
        uuid = 'c0ffee00-0000-4000-8000-000000000000'
        self.assert_refused(
            'SR_BACKEND_FAILURE_46', self.api.VDI.introduce, uuid, 'x', '',
            sr, 'user', False, False, {}, uuid, {}, {})

    def test_the_repository_says_what_it_is(self):
        sm_config = self.api.SR.get_sm_config(self.iscsi())
        self.assertEqual(
            ('Raw', 'ISCSI', '192.0.2.1', IQN, 'true', 'true'),
            tuple(sm_config.get(key) for key in (
                'disktype', 'datatype', 'target', 'targetIQN',
                'multipathable', 'LUNperVDI')))


class OldIscsi(IscsiCase):
    """``iscsi`` of sm 1.9 and before: it claims, as ``hba`` does."""

    profile = 'xenserver-6.5'

    def test_luns_are_introduced_unmanaged(self):
        sr = self.iscsi()
        self.api.SR.scan(sr)
        self.assertEqual(
            {'360a980': False, '360a981': False},
            {scsi: vdi['managed'] for scsi, vdi in self.vdis(sr).items()})

    def test_create_claims_the_smallest_that_fits(self):
        sr = self.iscsi()
        self.api.SR.scan(sr)
        vdi = self.create(sr, 17 * MIB)
        self.assertEqual(
            '360a981', self.api.VDI.get_sm_config(vdi)['SCSIid'])
