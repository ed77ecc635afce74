# SPDX-License-Identifier: Apache-2.0
"""The simulator answers SR.probe as the drivers do: mostly by failing."""

import unittest
import xml.etree.ElementTree as ElementTree

import XenAPI

from tests import xapi

GIB = 1 << 30
IQN = 'iqn.2026-11.test:one'
# A device_config that lacks something, and what says so.
INCOMPLETE = (
    ('nfs', {}, 102),
    ('nfs', {'server': 'filer'}, 101),
    ('smb', {}, 102),
    ('cephfs', {}, 102),
    ('cephfs', {'server': 'filer'}, 101),
    ('glusterfs', {}, 102),
    ('moosefs', {}, 102),
    ('moosefs', {'masterhost': 'filer'}, 101),
    ('ext', {}, 90),
    ('xfs', {}, 90),
    ('largeblock', {}, 90),
    ('lvm', {}, 90),
    ('lvm', {'device': 'sdb'}, 91),
    ('file', {}, 94),
    ('zfs', {}, 94),
    ('iscsi', {}, 95),
    ('iscsi', {'target': '192.0.2.1'}, 96),
    ('iscsi', {'target': '192.0.2.1', 'port': '0'}, 142),
    ('lvmoiscsi', {}, 95),
    ('lvmoiscsi', {'target': '192.0.2.1'}, 96),
    ('lvmoiscsi', {'target': '192.0.2.1', 'targetIQN': IQN}, 107),
    ('lvmohba', {}, 107),
    ('lvmofcoe', {}, 107),
    ('netapp', {}, 120),
    ('netapp', {'target': 'filer'}, 121),
    ('netapp', {'target': 'filer', 'username': 'root'}, 122),
    ('equal', {}, 160),
    ('equal', {'target': '192.0.2.9'}, 161),
    ('equal', {'target': '192.0.2.9', 'username': 'root'}, 162),
)


class Probes(unittest.TestCase):
    """A probe of what a world holds."""

    def setUp(self):
        self.pool = xapi.simulator(self, profile='xcp-ng-8.3+netapp+equal')
        world = self.pool.world
        world.add_nfs('filer', '/exports/a', access='10.0.0.0/8')
        world.add_nfs('filer', '/exports/b')
        for kind in ('smb', 'cephfs', 'glusterfs', 'moosefs'):
            world.add_share(kind, 'filer', '/share')
        world.add_device('/dev/sdb', 8 * GIB)
        world.add_target('192.0.2.1', IQN)
        world.add_target('192.0.2.1', 'iqn.2026-11.test:two')
        world.add_target(
            '192.0.2.1', 'iqn.2026-11.test:three', port=3261)
        world.add_target(
            '192.0.2.2', IQN, chap_user='initiator', chap_password='letmein')
        world.add_target('192.0.2.3', IQN, is_down=True)
        world.add_lun('360a98000aa', 4 * GIB, lun_id=1, iqn=IQN, vendor='V')
        world.add_lun('360a98000bb', 2 * GIB, lun_id=2, iqn=IQN)
        world.add_lun('3600fc0001', 4 * GIB, lun_id=5, adapter='FC')
        world.add_lun('3600fc0002', 1 * GIB, lun_id=6, adapter='fcoe')
        self.session = xapi.login(self, self.pool)
        self.host = self.session.xenapi.host.get_all()[0]

    def probe(self, kind, **device_config):
        return self.session.xenapi.SR.probe(
            self.host, device_config, kind, {})

    def refused(self, kind, **device_config):
        with self.assertRaises(XenAPI.Failure) as caught:
            self.probe(kind, **device_config)
        return caught.exception.details

    def test_each_incomplete_configuration_is_refused_with_its_number(self):
        for kind, config, number in INCOMPLETE:
            with self.subTest(kind=kind, config=config):
                details = self.refused(kind, **config)
                self.assertEqual(
                    f'SR_BACKEND_FAILURE_{number}', details[0])
                self.assertEqual('', details[1])
                self.assertEqual(4, len(details))

    def test_creating_with_the_same_is_refused_as_well(self):
        for kind, config, number in INCOMPLETE:
            with self.subTest(kind=kind, config=config):
                with self.assertRaises(XenAPI.Failure) as caught:
                    self.session.xenapi.SR.create(
                        self.host, config, '0', 'new', '', kind, 'user',
                        False, {})
                self.assertEqual(
                    f'SR_BACKEND_FAILURE_{number}',
                    caught.exception.details[0])
                self.assertEqual(
                    [], self.session.xenapi.SR.get_by_name_label('new'))

    def test_a_server_of_nfs_tells_its_exports(self):
        exports = ElementTree.fromstring(
            self.refused('nfs', server='filer')[3])
        self.assertEqual('nfs-exports', exports.tag)
        self.assertEqual([
            ('filer', '/exports/a', '10.0.0.0/8'),
            ('filer', '/exports/b', '*'),
        ], [rows(export, 'Target', 'Path', 'Accesslist')
            for export in exports.findall('Export')])

    def test_a_server_that_is_not_there_is_another_error(self):
        self.assertEqual('SR_BACKEND_FAILURE_108', self.refused(
            'nfs', server='nobody', serverpath='/exports/a')[0])

    def test_an_export_that_is_not_there_cannot_be_mounted(self):
        self.assertEqual('SR_BACKEND_FAILURE_73', self.refused(
            'nfs', server='filer', serverpath='/exports/c')[0])

    def test_a_version_that_the_server_lacks_is_refused(self):
        world = self.pool.world
        old = world.add_nfs('old', '/a', versions=('3',))
        self.addCleanup(world.remove, old)
        self.assertEqual('SR_BACKEND_FAILURE_72', self.refused(
            'nfs', server='old', serverpath='/a', nfsversion='4')[0])

    def test_versions_are_told_when_asked_for(self):
        found = ElementTree.fromstring(self.probe(
            'nfs', server='filer', serverpath='/exports/a',
            probeversion=''))
        self.assertEqual(['3', '4'], [
            version.text.strip()
            for version in found.findall('SupportedVersions/Version')
        ])

    def test_directories_named_by_a_uuid_are_repositories(self):
        world = self.pool.world
        uuid = '12345678-1234-4234-8234-123456789abc'
        for kind, config in (
            ('nfs', {'server': 'filer', 'serverpath': '/exports/b'}),
            ('smb', {'server': r'\\filer\share'}),
            ('cephfs', {'server': 'filer', 'serverpath': '/share'}),
            ('glusterfs', {'server': 'filer:/share'}),
            ('moosefs', {'masterhost': 'filer', 'rootpath': '/share'}),
        ):
            with self.subTest(kind=kind):
                share = world.shares(kind, 'filer')[-1]
                top = world.share_directory(share)
                (top / uuid).mkdir(exist_ok=True)
                (top / 'lost+found').mkdir(exist_ok=True)
                self.assertEqual([uuid], listed(self.probe(kind, **config)))

    def test_a_target_tells_its_names_and_last_a_star(self):
        found = ElementTree.fromstring(
            self.refused('lvmoiscsi', target='192.0.2.1')[3])
        self.assertEqual('iscsi-target-iqns', found.tag)
        self.assertEqual([
            ('0', '192.0.2.1', None, IQN),
            ('1', '192.0.2.1', None, 'iqn.2026-11.test:two'),
            ('2', '192.0.2.1', None, '*'),
        ], [rows(one, 'Index', 'IPAddress', 'Port', 'TargetIQN')
            for one in found.findall('TGT')])

    def test_a_port_that_is_not_the_usual_one_is_told(self):
        found = ElementTree.fromstring(
            self.refused('iscsi', target='192.0.2.1', port='3261')[3])
        self.assertEqual(['3261', '3261'], [
            port.text.strip() for port in found.findall('TGT/Port')])

    def test_a_target_that_is_down_is_another_error(self):
        self.assertEqual('SR_BACKEND_FAILURE_141', self.refused(
            'lvmoiscsi', target='192.0.2.3')[0])

    def test_a_target_tells_its_luns(self):
        found = ElementTree.fromstring(self.refused(
            'lvmoiscsi', target='192.0.2.1', targetIQN=IQN)[3])
        self.assertEqual('iscsi-target', found.tag)
        self.assertEqual([
            ('V', '1', str(4 * GIB), '360a98000aa'),
            ('SIM', '2', str(2 * GIB), '360a98000bb'),
        ], [rows(lun, 'vendor', 'LUNid', 'size', 'SCSIid')
            for lun in found.findall('LUN')])

    def test_a_lun_without_a_group_is_an_empty_list(self):
        self.assertEqual([], listed(self.probe(
            'lvmoiscsi', target='192.0.2.1', targetIQN=IQN,
            SCSIid='360a98000aa')))

    def test_a_lun_that_is_not_there_is_no_device(self):
        self.assertEqual('SR_BACKEND_FAILURE_19', self.refused(
            'lvmohba', SCSIid='3nothing')[0])

    def test_chap_is_asked_for_and_the_password_becomes_a_secret(self):
        config = {
            'target': '192.0.2.2', 'targetIQN': IQN,
            'chapuser': 'initiator', 'chappassword': 'wrong',
        }
        self.assertEqual(
            'SR_BACKEND_FAILURE_68', self.refused('lvmoiscsi', **config)[0])
        config['chappassword'] = 'letmein'
        self.assertEqual(
            'SR_BACKEND_FAILURE_107', self.refused('lvmoiscsi', **config)[0])

    def test_adapters_tell_their_luns_and_themselves(self):
        found = ElementTree.fromstring(self.refused('lvmohba')[3])
        self.assertEqual('Devlist', found.tag)
        self.assertEqual([
            ('3600fc0001', '1', str(4 * GIB), '5', 'qla2xxx'),
            ('3600fc0002', '1', str(1 * GIB), '6', 'fcoe'),
        ], [rows(disk, 'SCSIid', 'numpaths', 'size', 'lun', 'hba')
            for disk in found.findall('BlockDevice')])
        self.assertEqual([
            ('host0', 'qla2xxx', '0'), ('host1', 'fcoe', '1'),
        ], [rows(adapter, 'host', 'name', 'id')
            for adapter in found.findall('Adapter')])

    def test_fcoe_sees_its_own_adapters_only(self):
        found = ElementTree.fromstring(self.refused('lvmofcoe')[3])
        self.assertEqual(['3600fc0002'], [
            one.text.strip() for one in found.findall('BlockDevice/SCSIid')])

    def test_some_types_cannot_be_probed(self):
        for kind in ('file', 'zfs'):
            with self.subTest(kind=kind):
                self.assertEqual('INTERNAL_ERROR', self.refused(
                    kind, location='/srv/a')[0])

    def test_xml_of_python_2_has_its_texts_on_lines_of_their_own(self):
        pool = xapi.simulator(self, profile='xenserver-6.5')
        pool.world.add_nfs('filer', '/exports/a')
        session = xapi.login(self, pool)
        with self.assertRaises(XenAPI.Failure) as caught:
            session.xenapi.SR.probe(
                session.xenapi.host.get_all()[0], {'server': 'filer'}, 'nfs',
                {})
        text = caught.exception.details[3]
        self.assertIn('<Path>\n\t\t\t/exports/a\n\t\t</Path>', text)
        self.assertEqual(['/exports/a'], [
            path.text.strip() for path in
            ElementTree.fromstring(text).findall('Export/Path')])


class Lists(unittest.TestCase):
    """What was made is found again."""

    def setUp(self):
        self.pool = xapi.simulator(self)
        self.session = xapi.login(self, self.pool)
        self.host = self.session.xenapi.host.get_all()[0]

    def create(self, kind, shared, **device_config):
        sr = self.session.xenapi.SR.create(
            self.host, device_config, '0', kind, '', kind, 'user', shared,
            {})
        return self.session.xenapi.SR.get_uuid(sr)

    def probe(self, kind, **device_config):
        return self.session.xenapi.SR.probe(
            self.host, device_config, kind, {})

    def test_a_group_is_found_on_its_disk(self):
        self.pool.world.add_device('/dev/sdb', 8 * GIB)
        self.pool.world.add_device('/dev/sdc', 4 * GIB)
        for kind, device, size in (
            ('lvm', '/dev/sdb', 8 * GIB), ('ext', '/dev/sdc', 4 * GIB),
        ):
            with self.subTest(kind=kind):
                uuid = self.create(kind, False, device=device)
                found = ElementTree.fromstring(
                    self.probe(kind, device=device))
                self.assertEqual([(uuid, device, str(size))], [
                    rows(sr, 'UUID', 'Devlist', 'size')
                    for sr in found.findall('SR')])

    def test_a_group_on_a_lun_is_found_by_its_scsi_id(self):
        self.pool.world.add_lun('3600fc', 8 * GIB, adapter='FC')
        uuid = self.create('lvmohba', True, SCSIid='3600fc')
        self.assertEqual(
            [uuid], listed(self.probe('lvmohba', SCSIid='3600fc')))

    def test_a_lun_in_use_is_left_out_of_the_choice(self):
        self.pool.world.add_lun('3600fc', 8 * GIB, adapter='FC')
        self.pool.world.add_lun('3600fd', 8 * GIB, adapter='FC')
        self.create('lvmohba', True, SCSIid='3600fc')
        with self.assertRaises(XenAPI.Failure) as caught:
            self.probe('lvmohba')
        found = ElementTree.fromstring(caught.exception.details[3])
        self.assertEqual(['3600fd'], [
            one.text.strip() for one in found.findall('BlockDevice/SCSIid')])

    def test_iscsi_and_hba_are_found_in_the_database(self):
        world = self.pool.world
        world.add_target('192.0.2.1', IQN)
        world.add_lun('3600fc', 1 * GIB, adapter='FC')
        iscsi = self.create(
            'iscsi', True, target='192.0.2.1', targetIQN=IQN)
        hba = self.create('hba', True)
        found = ElementTree.fromstring(self.probe(
            'iscsi', target='192.0.2.1', targetIQN=IQN))
        self.assertEqual([(iscsi, '192.0.2.1', IQN)], [
            rows(sr, 'UUID', 'Target', 'TargetIQN')
            for sr in found.findall('SR')])
        self.assertEqual([hba], listed(self.probe('hba')))


def rows(element, *names):
    """Return the texts of an element's children; None for one that lacks."""
    texts = (element.findtext(name) for name in names)
    return tuple(text.strip() if text else text for text in texts)


def listed(text):
    """Return the uuids of a list of repositories."""
    return [
        uuid.text.strip()
        for uuid in ElementTree.fromstring(text).findall('SR/UUID')
    ]
