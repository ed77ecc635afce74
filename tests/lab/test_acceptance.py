# SPDX-License-Identifier: Apache-2.0
"""nova-volume's cases 43 to 50: volume groups and targets, in the kernel.

``doc/source/contributor/acceptance.rst`` says what became of each.
"""

import concurrent.futures

from tests.lab.service_case import LabService
from tests.lab.service_case import MIB
from tests.process import Refused
from volume import errors
from volume.drivers.lvm.driver import LvmDriver
from volume.remote import ssh
from volume.remote.node import SshNode
from volume.testing import fixtures


class Groups(LabService):
    """Thick volumes: what LVM has of them."""

    driver, exporter = 'thick', 'lio'

    def test_case_43_a_volume_group_that_is_missing_is_named(self):
        node = SshNode(ssh.parse(
            f'ssh://root@{self.guest.address}:{self.guest.port}',
            self.guest.key, self.guest.known_hosts,
            '/usr/local/bin/volume-node',
        ))
        self.addCleanup(node.close)
        driver = LvmDriver(
            fixtures.settings(LvmDriver, volume_groups=['vg-none']), node)
        with self.assertRaisesRegex(errors.VolumeError, 'vg-none'):
            driver.check()

    def test_case_44_a_volume_is_as_large_as_it_was_asked_for(self):
        for wish, size_bytes in (
            ({'size': 1, 'size_bytes': None}, 1 << 30),
            ({'size_bytes': 32 * MIB}, 32 * MIB),
        ):
            with self.subTest(wish):
                volume_id = self.volume(**wish)
                self.assertEqual(str(size_bytes), self.lvs(
                    'lv_size', volume_id))
                # The dashes of an id are LVM's own separators as well.
                self.assertTrue(self.guest.succeeds(
                    'test', '-b', self.lvs('lv_path', volume_id)))

    def test_case_45_a_volume_that_snapshots_need_is_not_deleted(self):
        volume_id = self.volume()
        snapshot_id = self.snapshot(volume_id)
        self.assertEqual('o', self.lvs('lv_attr', volume_id)[0])
        with self.assertRaisesRegex(Refused, 'snapshots'):
            self.service.call('DELETE', f'/volumes/{volume_id}')
        self.assertEqual('o', self.lvs('lv_attr', volume_id)[0])
        for kind, row_id in ('snapshot', snapshot_id), ('volume', volume_id):
            self.service.call('DELETE', f'/{kind}s/{row_id}')
            self.wait(row_id, 'gone', kind=kind)
            self.assertNotIn(row_id, self.stored())

    def test_case_46_no_byte_of_a_deleted_volume_is_read_again(self):
        volume_id = self.volume(size_bytes=32 * MIB)
        path = self.lvs('lv_path', volume_id)
        extents = self.lvs('seg_pe_ranges', volume_id)
        self.guest.run(
            'bash', '-c', 'yes noise | head -c "$2" | dd '
            'of="$1" bs=1M iflag=fullblock oflag=direct conv=nocreat', '-',
            path, str(32 * MIB),
        )
        self.assertEqual(b'noise\n', self.guest.run_bytes('head', '-c6', path))
        self.service.call('DELETE', f'/volumes/{volume_id}')
        self.wait(volume_id, 'gone')
        # Where it lay, as it lies there now: nobody has asked for it yet.
        again = 'again'
        self.guest.run(
            'lvcreate', '-y', '-q', '-Zn', '-Wn', '-n', again, '-l', '8',
            self.group, *extents.split(),
        )
        self.addCleanup(
            self.guest.run, 'lvremove', '-y', '-q', f'{self.group}/{again}')
        self.assertTrue(self.guest.succeeds(
            'cmp', '-n', str(32 * MIB), f'/dev/{self.group}/{again}',
            '/dev/zero',
        ))

    def lvs(self, field, volume_id):
        return self.guest.run(
            'lvs', '--noheadings', '--nosuffix', '--units', 'b', '-o', field,
            f'{self.group}/volume-{volume_id}',
        ).strip()


class Targets(LabService):
    """Thin volumes behind LIO: what the kernel has of them."""

    driver, exporter = 'thin', 'lio'

    def test_case_47_what_is_exported_is_in_the_kernel_and_then_is_not(self):
        volume_id = self.volume()
        attachment = self.connect(volume_id, self.host('one'))
        name = f'volume-{volume_id}.{attachment["id"]}'
        self.assertIn(name, self.guest.run('targetcli', 'ls', '/iscsi'))
        self.end(attachment)
        self.assertNotIn(name, self.guest.run('targetcli', 'ls', '/'))

    def test_case_48_what_is_gone_can_be_ended_and_a_failure_leaves_nothing(
        self,
    ):
        volume_id = self.volume()
        attachment = self.connect(volume_id, self.host('one'))
        target = attachment['connection_info']['target_iqn']
        self.guest.run('targetcli', '/iscsi', 'delete', target)
        self.end(attachment)
        self.assertEqual('available', self.service.volume(volume_id)['status'])
        self.assertNotIn(volume_id, self.guest.run('targetcli', 'ls', '/'))
        with self.assertRaisesRegex(Refused, 'iSCSI name'):
            self.service.call('POST', '/attachments', {'attachment': {
                'volume_uuid': volume_id, 'instance_uuid': volume_id,
                'connector': {'host': 'one'},
            }})
        self.assertEqual(set(), self.targets())
        self.wait(volume_id, 'available')
        self.assert_agreement(sessions=set())

    def test_case_49_targets_made_at_once_are_different(self):
        host = self.host('one')
        volumes = [self.volume() for _ in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda v: self.connect(v, host), volumes))
        infos = [row['connection_info'] for row in made]
        self.assertEqual(4, len({info['target_iqn'] for info in infos}))
        self.assertEqual({row['id'] for row in made}, self.targets())
        for row in made:
            self.end(row)

    def test_case_50_a_connection_has_what_an_initiator_needs(self):
        host = self.host('one')
        attachment = self.connect(self.volume(), host)
        info = attachment['connection_info']
        self.assertEqual('iscsi', info['driver_volume_type'])
        self.assertLessEqual({
            'target_portal', 'target_iqn', 'target_lun', 'auth_method',
            'auth_username', 'auth_password',
        }, set(info))
        kept = self.service.sql('SELECT * FROM attachments')
        self.assertNotIn(info['auth_password'], repr(kept))
        self.assertTrue(host.admitted(info))
        self.end(attachment)
