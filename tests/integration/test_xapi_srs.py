# SPDX-License-Identifier: Apache-2.0
"""SR and PBD of the simulator: what a server does, and with which error."""

import unittest

from tests import xapi
from tests.integration.xapi_storage_case import Case
from volume.sim.xapi.world import World

GIB = 1 << 30


class TestCreation(Case):

    def test_an_unknown_type_leaves_no_rows(self):
        """S9."""
        with self.refused('SR_UNKNOWN_DRIVER', 'florp'):
            self.create('Florp')
        self.assertEqual([], self.api.SR.get_all())
        self.assertEqual([], self.api.PBD.get_all())

    def test_what_the_driver_refuses_leaves_no_rows_and_no_secret(self):
        """S9."""
        with self.refused('SR_BACKEND_FAILURE_108'):
            self.create(server='nobody', serverpath='/x', apassword='x')
        self.pool.world.add_nfs('filer', '/export')
        with self.refused('SR_BACKEND_FAILURE_73'):
            self.create(server='filer', serverpath='/other')
        with self.refused('SR_BACKEND_FAILURE_72'):
            self.create(
                server='filer', serverpath='/export', nfsversion='5')
        for cls in 'SR', 'PBD', 'secret':
            self.assertEqual([], getattr(self.api, cls).get_all(), cls)

    def test_a_directory_that_is_not_empty_is_refused(self):
        share = self.pool.world.add_nfs('filer', '/export')
        (self.pool.world.share_directory(share) / 'old').touch()
        with self.refused('SR_BACKEND_FAILURE_42'):
            self.create(
                server='filer', serverpath='/export',
                sm_config={'nosubdir': 'true'})

    def test_a_shared_sr_is_plugged_on_every_host(self):
        """S10."""
        sr = self.nfs()
        self.assertEqual(
            dict.fromkeys(self.hosts, True), self.plugged(sr))
        self.assertEqual(str(GIB), self.api.SR.get_physical_size(sr))

    def test_plugs_that_fail_are_not_told(self):
        """S10."""
        host = self.api.host.get_uuid(self.hosts[0])
        self.pool.world.add_device('/dev/sdb', GIB, host)
        sr = self.create('ext', device='/dev/sdb')
        self.assertEqual(
            {self.hosts[0]: True, self.hosts[1]: False}, self.plugged(sr))

    def test_a_local_sr_has_one_pbd(self):
        """S10."""
        host = self.api.host.get_uuid(self.hosts[1])
        self.pool.world.add_device('/dev/sdb', GIB, host)
        sr = self.create('lvm', shared=False, host=1, device='/dev/sdb')
        [pbd] = self.api.SR.get_PBDs(sr)
        self.assertEqual(self.hosts[1], self.api.PBD.get_host(pbd))
        with self.refused('SR_DEVICE_IN_USE'):
            self.create('ext', shared=False, host=1, device='/dev/sdb')

    def test_each_pbd_has_a_secret_of_its_own(self):
        """S12."""
        self.pool.world.add_share(
            'smb', 'server', '/share', user='me', password='pass')
        sr = self.create(
            'smb', server='\\\\server\\share', username='me',
            password='pass')
        pbds = self.api.SR.get_PBDs(sr)
        configs = [self.api.PBD.get_device_config(pbd) for pbd in pbds]
        secrets = [config['password_secret'] for config in configs]
        self.assertEqual(2, len(set(secrets)))
        self.assertNotIn('pass', str(configs[0].values()))
        for pbd in pbds:
            self.assertTrue(self.api.PBD.get_currently_attached(pbd))
        self.api.PBD.unplug(pbds[0])
        self.api.PBD.destroy(pbds[0])
        with self.refused('UUID_INVALID'):
            self.api.secret.get_by_uuid(secrets[0])
        self.assertTrue(self.api.secret.get_by_uuid(secrets[1]))

    def test_a_key_of_the_server_is_refused(self):
        """S13."""
        wanted = (
            'VALUE_NOT_SUPPORTED', 'SRmaster', 'true',
            'This key is for internal use only')
        with self.refused(*wanted):
            self.create(SRmaster='true')
        sr = self.api.SR.introduce('', 'x', '', 'nfs', 'user', True, {})
        with self.refused(*wanted):
            self.api.PBD.create({
                'host': self.hosts[0], 'SR': sr,
                'device_config': {'SRmaster': 'true'}})

    def test_a_type_is_known_in_any_case(self):
        self.pool.world.add_nfs('filer', '/export')
        sr = self.create('NFS', server='filer', serverpath='/export')
        self.assertEqual('nfs', self.api.SR.get_type(sr))
        self.assertIn('nfs', self.api.SR.get_supported_types())

    def test_names_that_xml_cannot_carry_are_refused(self):
        # XML-RPC cannot carry them either; JSON can.
        sr = self.nfs()
        client = xapi.Json(self, self.pool.url()).login()
        answer = client.raw('SR.set_name_label', client.session, sr, 'a\x01b')
        self.assertEqual('SR_BACKEND_FAILURE_447', answer['error']['message'])


class TestTypes(Case):
    """Each type of the file and the LVM families, from birth to end."""

    def life(self, kind, shared=True, **config):
        with self.subTest(kind):
            sr = self.create(kind, shared, **config)
            self.assertIn(True, self.plugged(sr).values())
            vdi = self.vdi(sr)
            snapshot = self.api.VDI.snapshot(vdi)
            self.api.SR.scan(sr)
            self.assertEqual(
                self.api.VDI.get_sm_config(vdi)['vhd-parent'],
                self.api.VDI.get_sm_config(snapshot)['vhd-parent'])
            self.api.VDI.destroy(snapshot)
            self.api.VDI.destroy(vdi)
            self.assertTrue(self.pool.sm.wait_collected(sr, 60))
            self.unplug_all(sr)
            self.api.SR.destroy(sr)
            self.assertEqual([], self.api.SR.get_all())

    def test_on_file_servers(self):
        add = self.pool.world.add_share
        add('smb', 'server', '/share', GIB, user='me', password='x')
        self.life('smb', server='//server/share', username='me', password='x')
        add('cephfs', 'mon', '/volumes', GIB)
        self.life('cephfs', server='mon', serverpath='/volumes')
        add('glusterfs', 'brick', '/vol', GIB)
        self.life('glusterfs', server='brick:/vol')
        add('moosefs', 'master', '/xcp', GIB)
        self.life('moosefs', masterhost='master', rootpath='/xcp')
        add('linstor', 'group', '/', GIB)
        self.life('linstor', **{'group-name': 'group', 'redundancy': '2'})

    def test_on_disks_and_directories_of_a_host(self):
        world = self.pool.world
        world.add_device('/dev/sdb', GIB)
        world.add_device('/dev/sdc', GIB)
        world.add_device('/dev/sdd', GIB, sector_bytes=4096)
        for kind in 'ext', 'xfs', 'lvm':
            self.life(kind, False, device='/dev/sdb,/dev/sdc')
        self.life('largeblock', False, device='/dev/sdd')
        with self.refused('SR_BACKEND_FAILURE_5010'):
            self.create('largeblock', False, device='/dev/sdb')
        self.life('file', False, location='/srv/disks')
        with self.refused('SR_BACKEND_FAILURE_5000'):
            self.create('zfs', False, location='/tank')
        world.add_share('zfs', '*', '/tank', GIB)
        self.life('zfs', False, location='/tank/disks')

    def test_on_luns(self):
        world = self.pool.world
        world.add_target(
            '10.0.0.1', 'iqn.a', chap_user='u', chap_password='p')
        world.add_lun('3a', GIB, iqn='iqn.a')
        self.life(
            'lvmoiscsi', target='10.0.0.1', targetIQN='iqn.a', SCSIid='3a',
            chapuser='u', chappassword='p')
        world.add_lun('3b', GIB, adapter='FC')
        self.life('lvmohba', SCSIid='3b')
        world.add_lun('3c', GIB, adapter='fcoe')
        self.life('lvmofcoe', SCSIid='3c')

    def test_a_volume_group_signs_its_lun(self):
        world = self.pool.world
        world.add_lun('3b', GIB, adapter='FC')
        sr = self.create('lvmohba', SCSIid='3b')
        with open(world.lun_file('3b'), 'rb') as lun:
            self.assertEqual(b'LABELONE', lun.read(520)[512:])
        self.unplug_all(sr)
        self.api.SR.destroy(sr)
        with open(world.lun_file('3b'), 'rb') as lun:
            self.assertEqual(bytes(520), lun.read(520))


class TestIntroducing(Case):

    def test_an_sr_is_forgotten_and_introduced_with_its_disks(self):
        """S14."""
        sr = self.nfs()
        uuid = self.api.SR.get_uuid(sr)
        disk = self.api.VDI.get_uuid(self.vdi(sr))
        config = self.api.PBD.get_device_config(
            self.api.SR.get_PBDs(sr)[0])
        with self.refused('SR_UUID_EXISTS', uuid):
            self.api.SR.introduce(uuid, 'x', '', 'nfs', 'user', True, {})
        with self.refused('SR_HAS_PBD', sr):
            self.api.SR.forget(sr)
        self.unplug_all(sr)
        self.api.SR.forget(sr)
        self.assertEqual([], self.api.VDI.get_all())
        self.assertEqual([], self.api.PBD.get_all())

        sr = self.api.SR.introduce(uuid, 'x', '', 'nfs', 'user', True, {})
        self.assertEqual('-1', self.api.SR.get_physical_size(sr))
        self.assertEqual('-1', self.api.SR.get_physical_utilisation(sr))
        for host in self.hosts:
            self.api.PBD.plug(self.api.PBD.create({
                'host': host, 'SR': sr, 'device_config': config,
                'other_config': {'lost': 'yes'}}))
        self.api.SR.scan(sr)
        [vdi] = self.api.SR.get_VDIs(sr)
        self.assertEqual(disk, self.api.VDI.get_uuid(vdi))
        self.assertEqual('', self.api.VDI.get_name_label(vdi))
        for pbd in self.api.SR.get_PBDs(sr):
            self.assertEqual({}, self.api.PBD.get_other_config(pbd))

    def test_lvm_keeps_the_names_of_disks(self):
        self.pool.world.add_lun('360a', GIB, adapter='FC')
        sr = self.create('lvmohba', SCSIid='360a')
        uuid = self.api.SR.get_uuid(sr)
        vdi = self.vdi(sr)
        snapshot = self.api.VDI.get_uuid(self.api.VDI.snapshot(vdi))
        self.api.VDI.set_name_label(vdi, 'renamed')
        origin = self.api.VDI.get_uuid(vdi)
        self.unplug_all(sr)
        self.api.SR.forget(sr)
        sr = self.api.SR.introduce(uuid, 'x', '', 'lvmohba', 'user', True, {})
        self.api.PBD.plug(self.api.PBD.create({
            'host': self.hosts[0], 'SR': sr,
            'device_config': {'SCSIid': '360a'}}))
        self.assertEqual('renamed', self.api.VDI.get_name_label(
            self.api.VDI.get_by_uuid(origin)))
        again = self.api.VDI.get_record(self.api.VDI.get_by_uuid(snapshot))
        self.assertTrue(again['is_a_snapshot'])

    def test_a_host_has_one_pbd_for_an_sr(self):
        """S15."""
        sr = self.nfs()
        pbd = next(
            pbd for pbd in self.api.SR.get_PBDs(sr)
            if self.api.PBD.get_host(pbd) == self.hosts[1])
        with self.refused('PBD_EXISTS', sr, self.hosts[1], pbd):
            self.api.PBD.create({
                'host': self.hosts[1], 'SR': sr, 'device_config': {}})


class TestPlugging(Case):

    def test_a_local_sr_is_not_plugged_on_a_second_host(self):
        """S16."""
        host = self.api.host.get_uuid(self.hosts[0])
        self.pool.world.add_device('/dev/sdb', GIB, host)
        sr = self.create('ext', shared=False, device='/dev/sdb')
        pbd = self.api.PBD.create({
            'host': self.hosts[1], 'SR': sr,
            'device_config': {'device': '/dev/sdb'}})
        with self.refused('SR_NOT_SHARABLE', sr, self.hosts[0]):
            self.api.PBD.plug(pbd)

    def test_plugging_and_unplugging_twice_is_once(self):
        """S17."""
        sr = self.nfs()
        pbd = self.api.SR.get_PBDs(sr)[0]
        for want in False, True:
            for _ in range(2):
                (self.api.PBD.plug if want else self.api.PBD.unplug)(pbd)
                self.assertEqual(
                    want, self.api.PBD.get_currently_attached(pbd))

    def test_an_sr_in_use_is_not_unplugged(self):
        """S17."""
        sr = self.nfs()
        vdi = self.vdi(sr)
        dom0 = self.api.host.get_control_domain(self.hosts[0])
        vbd = self.api.VBD.create({
            'VM': dom0, 'VDI': vdi, 'userdevice': 'autodetect',
            'bootable': False, 'mode': 'RW', 'type': 'Disk', 'empty': False,
            'other_config': {}, 'qos_algorithm_type': '',
            'qos_algorithm_params': {}})
        self.api.VBD.plug(vbd)
        pbds = {
            self.api.PBD.get_host(pbd): pbd
            for pbd in self.api.SR.get_PBDs(sr)}
        with self.refused('VDI_IN_USE', vdi):
            self.api.PBD.unplug(pbds[self.hosts[0]])
        self.api.PBD.unplug(pbds[self.hosts[1]])
        self.api.VBD.unplug(vbd)
        self.api.PBD.unplug(pbds[self.hosts[0]])

    def test_a_plugged_pbd_is_not_destroyed(self):
        """S18."""
        pbd = self.api.SR.get_PBDs(self.nfs())[0]
        with self.refused(
            'OPERATION_NOT_ALLOWED', 'PBD is currently attached',
        ):
            self.api.PBD.destroy(pbd)

    def test_an_sr_is_destroyed_only_unplugged_with_a_pbd_and_empty(self):
        """S19."""
        sr = self.nfs()
        vdi = self.vdi(sr)
        uuid = self.api.SR.get_uuid(sr)
        directory = self.pool.world.share_directory(
            self.pool.world.share('nfs', 'filer', '/export'), uuid)
        self.assertTrue(directory.is_dir())
        with self.refused('SR_HAS_PBD', sr):
            self.api.SR.destroy(sr)
        self.unplug_all(sr)
        # The row counts, even if there is nothing behind it any more.
        [file] = directory.iterdir()
        aside = file.rename(directory.parent / file.name)
        with self.refused('SR_NOT_EMPTY'):
            self.api.SR.destroy(sr)
        aside.rename(file)
        for pbd in self.api.SR.get_PBDs(sr):
            self.api.PBD.plug(pbd)
        self.api.VDI.destroy(vdi)
        self.unplug_all(sr)
        self.api.SR.add_to_other_config(sr, 'indestructible', 'true')
        with self.refused('SR_INDESTRUCTIBLE', sr):
            self.api.SR.destroy(sr)
        self.api.SR.remove_from_other_config(sr, 'indestructible')
        self.api.SR.destroy(sr)
        self.assertFalse(directory.exists())
        self.assertEqual([], self.api.SR.get_all())
        self.assertEqual([], self.api.PBD.get_all())
        alone = self.api.SR.introduce('', 'x', '', 'nfs', 'user', True, {})
        with self.refused('SR_HAS_NO_PBDS', alone):
            self.api.SR.destroy(alone)

    def test_disks_that_only_the_driver_knows_keep_an_sr(self):
        """S19."""
        sr = self.nfs()
        vdi = self.vdi(sr)
        self.api.VDI.forget(vdi)
        self.unplug_all(sr)
        with self.refused('SR_NOT_EMPTY'):
            self.api.SR.destroy(sr)
        self.assertEqual([sr], self.api.SR.get_all())

    def test_a_shared_sr_is_served_by_the_master_alone(self):
        """S20."""
        sr = self.nfs()
        vdi = self.vdi(sr)
        for pbd in self.api.SR.get_PBDs(sr):
            if self.api.PBD.get_host(pbd) == self.hosts[0]:
                self.api.PBD.unplug(pbd)
        wanted = 'SR_HAS_NO_PBDS', sr
        for call in (
            lambda: self.vdi(sr),
            lambda: self.api.SR.scan(sr),
            lambda: self.api.SR.update(sr),
            lambda: self.api.SR.set_name_label(sr, 'x'),
            lambda: self.api.VDI.set_name_label(vdi, 'x'),
            lambda: self.api.VDI.snapshot(vdi),
            lambda: self.api.VDI.clone(vdi),
            lambda: self.api.VDI.resize(vdi, str(8 << 20)),
            lambda: self.api.VDI.destroy(vdi),
        ):
            with self.refused(*wanted):
                call()

    def test_only_one_pbd_may_be_left_to_make_it_unshared(self):
        sr = self.nfs()
        with self.refused('SR_HAS_MULTIPLE_PBDS', sr):
            self.api.SR.set_shared(sr, False)

    def test_storage_out_of_reach_is_an_error_until_it_is_back(self):
        sr = self.nfs()
        uuid = self.api.SR.get_uuid(sr)
        vdi = self.vdi(sr)
        self.pool.faults.put_sr_offline(uuid)
        for call in (
            lambda: self.api.SR.scan(sr),
            lambda: self.vdi(sr),
            lambda: self.api.VDI.snapshot(vdi),
            lambda: self.api.VDI.destroy(vdi),
        ):
            with self.refused('SR_BACKEND_FAILURE_47'):
                call()
        self.pool.faults.put_sr_online(uuid)
        self.api.SR.scan(sr)
        self.assertEqual([vdi], self.api.SR.get_VDIs(sr))

    def test_two_pools_that_plug_one_sr_are_seen(self):
        sr = self.nfs()
        uuid = self.api.SR.get_uuid(sr)
        world = self.pool.world
        other = xapi.simulator(self, world=World(world.directory))
        api = xapi.login(self, other).xenapi
        theirs = api.SR.introduce(uuid, 'x', '', 'nfs', 'user', True, {})
        pbd = api.PBD.create({
            'host': other.master, 'SR': theirs, 'device_config':
            {'server': 'filer', 'serverpath': '/export'}})
        self.unplug_all(sr)
        api.PBD.plug(pbd)
        self.assertEqual([], world.violations)
        self.api.PBD.plug(self.api.SR.get_PBDs(sr)[0])
        self.assertIn(uuid, world.violations[0])
        (world.directory / 'violations').unlink()


if __name__ == '__main__':
    unittest.main()
