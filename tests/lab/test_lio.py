# SPDX-License-Identifier: Apache-2.0
"""The lio exporter on a real kernel; hosts by libiscsi and by open-iscsi."""

from __future__ import annotations

import dataclasses
import json

from tests import iscsi
from tests import lab
from tests.lab import case
from tests.lab import exports_case
from tests.lab import hosts
from volume import errors
from volume import identity
from volume import ids
from volume import model
from volume.exports.lio import LioExporter
from volume.exports.lio_target import ISCSI
from volume.node import Op
from volume.testing import exports
from volume.testing import fixtures

# rtslib is what other tools of the kernel's target stand on, and shares no
# code with the exporter.
DUMP = (
    'import json, rtslib_fb as r; d = r.RTSRoot().dump(); '
    'print(json.dumps([d["storage_objects"], d["targets"]]))'
)
# A target such as another service of the same prefix would make.
FOREIGN = '''
import sys, rtslib_fb as r
name = sys.argv[1]
store = r.FileIOStorageObject(name, '/var/tmp/foreign.raw', 1 << 20)
group = r.TPG(r.Target(r.FabricModule('iscsi'), name), 1)
group.enable = True
lun = r.LUN(group, 0, store)
r.NetworkPortal(group, '127.0.0.1', 3260)
acl = r.NodeACL(group, 'iqn.2024-01.org.example:foreign')
r.MappedLUN(acl, 0, lun)
'''
REMOVE = '''
import os, sys, rtslib_fb as r
name = sys.argv[1]
r.Target(r.FabricModule('iscsi'), name).delete()
r.FileIOStorageObject(name).delete()
os.unlink('/var/tmp/foreign.raw')
'''
# Says which words came up in any process's command line.
WATCH = '''
import glob, select, sys
words = [bytes.fromhex(each) for each in sys.argv[1:]]
found = set()
print('watching', flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try:
            line = open(path, 'rb').read()
        except OSError:
            continue
        found.update(word for word in words if word in line)
for word in found:
    print(word.decode())
'''


class LioCase(exports_case.DeviceCase):
    """An exporter in front of the guest's kernel, and hosts of two kinds."""

    chap = 'mutual'
    host = model.Host('one', ('192.0.2.9',), 'iqn.2024-01.org.example:one')
    other_host = model.Host(
        'two', ('192.0.2.9',), 'iqn.2024-01.org.example:two'
    )

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tunnels = exports_case.Tunnels(cls.guest)
        cls.addClassCleanup(cls.tunnels.close)

    def setUp(self):
        self.initiators = {}
        super().setUp()

    def make_exporter(self, node=None, **options):
        conf = fixtures.settings(LioExporter, **{
            'iscsi_portals': list(case.PORTALS), 'chap': self.chap, **options
        })
        return LioExporter(conf, node or self.node)

    def wanted(self, attachment_id, *args, **named):
        wanted = super().wanted(attachment_id, *args, **named)
        self.initiators[attachment_id] = wanted.host.iqn
        return wanted

    def login(self, connection, number=0, **changes):
        """Return how its host logs in at a portal, but for changes."""
        attachment_id = connection.fields['target_iqn'].rpartition('.')[2]
        at = self.tunnels.to(connection.fields['target_portals'][number])
        login = iscsi.Login.of(connection, self.initiators[attachment_id])
        return dataclasses.replace(login, **{'portal': at} | changes)

    def open_session(self, connection):
        return iscsi.Session(self.login(connection))

    def refused(self, connection, **changes):
        with self.assertRaises(iscsi.Refused):
            iscsi.Session(self.login(connection, **changes)).close()

    def dump(self):
        """Return backstores and targets, as another tool sees them."""
        return json.loads(self.guest.run('python3', '-c', DUMP))


class LioTest(exports.ExporterSuite, LioCase):
    """Block devices, CHAP both ways."""

    def test_target_that_is_not_the_one_is_noticed(self):
        connection = self.export(self.attachment())
        self.refused(connection, mutual_password='another-secret')

    def test_host_without_the_secret_is_refused(self):
        connection = self.export(self.attachment())
        self.refused(connection, username='', password='')
        self.refused(connection, password='another-secret')
        self.refused(connection, username='another-user')
        self.assertEqual(self.image, self.read(connection))

    def test_another_host_with_the_secret_is_refused(self):
        connection = self.export(self.attachment())
        self.refused(connection, initiator=self.other_host.iqn)

    def test_only_its_host_is_told_the_name_of_a_target(self):
        connection = self.export(self.attachment())
        portal = self.login(connection).portal
        name = connection.fields['target_iqn']
        self.assertIn(name, iscsi.discover(portal, self.host.iqn))
        self.assertEqual([], iscsi.discover(portal, self.other_host.iqn))

    def test_secrets_can_be_replaced(self):
        attachment_id = self.attachment()
        before = self.export(attachment_id)
        del self._secrets[attachment_id]
        after = self.export(attachment_id)
        self.assertNotEqual(before.credentials, after.credentials)
        self.refused(before)
        self.assertEqual(self.image, self.read(after))

    def test_user_whose_name_begins_as_a_number_is_never_let_in(self):
        # So no such name is made (vault.new_secret).
        for name in '0xabcdefghijklmn', '0Babcdefghijklmn':
            attachment_id = self.attachment()
            self.wanted(attachment_id)
            self._secrets[attachment_id]['username'] = name
            self.refused(self.export(attachment_id))

    def test_name_of_a_host_is_the_same_in_capitals(self):
        loud = model.Host('loud', (), 'iqn.2024-01.ORG.Example:LOUD')
        connection = self.export(self.attachment(), host=loud)
        self.assertEqual(self.image, self.read(connection))

    def test_each_portal_leads_to_the_volume(self):
        connection = self.export(self.attachment())
        self.assertEqual(
            [f'{address}:3260' for address in case.PORTALS],
            connection.fields['target_portals'],
        )
        for number in range(len(case.PORTALS)):
            session = iscsi.Session(self.login(connection, number))
            self.assertEqual(self.image[:512], session.read(0, 512))
            session.close()

    def test_portals_of_the_options_hold_for_what_is_exported(self):
        attachment_id = self.attachment()
        self.export(attachment_id)
        self.exporter = self.make_exporter(iscsi_portals=case.PORTALS[1:])
        connection = self.export(attachment_id)
        self.assertEqual(self.image, self.read(connection))
        taken_away = self.tunnels.to(f'{case.PORTALS[0]}:3260')
        self.refused(connection, portal=taken_away)

    def test_volume_is_one_disk_by_all_its_exports_and_after_a_restart(self):
        one, two = self.attachment(), self.attachment()
        seen = []
        for attachment_id in one, two, one:
            with self.session(self.export(attachment_id)) as session:
                seen.append((session.serial, session.wwns))
            if len(seen) == 2:
                self.exporter.unexport(one)
                self.exporter.unexport(two)
                self.exporter = self.make_exporter()
                self.exporter.check()
        volume_id = self.wanted(one).volume_id
        self.assertEqual([(
            identity.scsi_serial(volume_id), [identity.scsi_naa(volume_id)]
        )] * 3, seen)

    def test_another_volume_is_another_disk(self):
        sources = self.source, self.make_source(self.image)
        found = set()
        for source in sources:
            connection = self.export(self.attachment(), source)
            with self.session(connection) as session:
                found.add((session.serial, *session.wwns))
        self.assertEqual(2, len(found))

    def test_what_a_host_was_told_is_stored_is_on_the_device(self):
        with self.session(self.export(self.attachment())) as session:
            session.write(8192, b'\xa5' * 4096, through=True)
            found = self.stored(self.source, 12288)
        self.assertEqual(b'\xa5' * 4096, found[8192:])

    def test_attachment_is_not_given_to_another_host_or_for_writing(self):
        attachment_id = self.attachment()
        connection = self.export(attachment_id, access=model.Access.READ)
        with self.assertRaisesRegex(errors.Conflict, 'org.example:one'):
            self.export(
                attachment_id, access=model.Access.READ, host=self.other_host
            )
        self.initiators[attachment_id] = self.host.iqn
        with self.assertRaisesRegex(errors.Conflict, 'read-only'):
            self.export(attachment_id)
        self.assertEqual(self.image, self.read(connection))

    def test_host_without_a_usable_name_is_told_so(self):
        for iqn in None, '', 'one', 'iqn.2024-01.org.example:a/../b':
            with self.assertRaises(errors.Invalid):
                self.export(
                    self.attachment(), host=model.Host('bare', (), iqn)
                )

    def test_options_that_are_wrong_are_refused(self):
        for options in (
            {'iscsi_portals': []},
            {'iscsi_portals': ['storage.example']},
            {'iscsi_portals': ['0.0.0.0']},
            {'iscsi_target_prefix': 'targets:'},
            {'iscsi_target_prefix': f'iqn.2010-10.org.{"long" * 40}:'},
        ):
            with self.assertRaises(errors.Invalid, msg=options):
                self.make_exporter(**options).check()

    def test_host_sees_that_the_volume_has_grown(self):
        host = hosts.IscsiHost(self.guest, 'grow')
        attachment_id = self.attachment()
        connection = self.export(
            attachment_id, host=model.Host(host.name, (), host.iqn)
        )
        info = {**connection.fields, **connection.credentials}
        self.addCleanup(host.disconnect, info)
        devices = host.connect(info)
        self.assertEqual(len(case.PORTALS), len(devices))
        self.assertEqual({exports_case.LV_BYTES}, self.sizes(devices))
        self.guest.run('lvextend', '-q', '-L', '+4M', self.source.path)
        self.addCleanup(
            self.guest.run, 'lvreduce', '-q', '-f', '-L', '4M',
            self.source.path,
        )
        self.exporter.grow(self.wanted(attachment_id))
        host.rescan()
        self.assertEqual({2 * exports_case.LV_BYTES}, self.sizes(devices))
        self.addCleanup(self.exporter.unexport, attachment_id)

    def sizes(self, devices):
        return {
            int(self.guest.run('blockdev', '--getsize64', device))
            for device in devices
        }

    def test_targets_that_are_not_ours_are_left_alone(self):
        name = f'{self.exporter.prefix}volume-{ids.new()}'
        self.guest.run('python3', '-c', FOREIGN, name)
        self.addCleanup(self.guest.run, 'python3', '-c', REMOVE, name)
        before = self.dump()
        self.assertIn(name, str(before))
        attachment_id = self.attachment()
        self.export(attachment_id)
        self.exporter = self.make_exporter()
        self.exporter.check()
        self.assertEqual({attachment_id}, self.exporter.exported())
        self.exporter.unexport(attachment_id)
        self.assertEqual(before, self.dump())

    def test_what_another_tool_has_restored_is_not_taken_for_ours(self):
        attachment_id = self.attachment()
        for by_check in True, False:
            before = self.export(attachment_id)
            self.guest.run('targetctl', 'save', '/run/saved.json')
            self.exporter.unexport(attachment_id)
            self.guest.run('targetctl', 'restore', '/run/saved.json')
            self.addCleanup(self.guest.run, 'rm', '-f', '/run/saved.json')
            self.assertEqual(self.image, self.read(before))
            del self._secrets[attachment_id]
            self.exporter = self.make_exporter()
            if by_check:
                self.exporter.check()
                self.assertEqual(set(), self.exporter.exported())
                self.assertEqual([[], []], self.dump())
            after = self.export(attachment_id)
            self.refused(before)
            self.assertEqual(self.image, self.read(after))
            self.exporter.unexport(attachment_id)
            self.assertEqual([[], []], self.dump())

    def test_target_that_was_removed_by_hand_leaves_no_backstore(self):
        one, two = self.attachment(), self.attachment()
        connection = self.export(two)
        self.lose(one)
        self.exporter.unexport(one)
        self.assertEqual(self.image, self.read(connection))
        self.lose(two)
        self.exporter.check()
        self.assertEqual([[], []], self.dump())
        self.lose(one)
        self.exporter.unexport(one)
        self.assertEqual([[], []], self.dump())

    def test_half_made_it_is_not_exported_and_is_made_whole(self):
        attachment_id = self.attachment()
        name = self.export(attachment_id).fields['target_iqn']
        self.node.configure([
            Op.put(f'{ISCSI}/{name}/tpgt_1/enable', '0')
        ])
        self.assertEqual(set(), self.exporter.exported())
        connection = self.export(attachment_id)
        self.assertEqual({attachment_id}, self.exporter.exported())
        self.assertEqual(self.image, self.read(connection))

    def lose(self, attachment_id):
        """Have somebody remove the target of an attachment."""
        name = self.export(attachment_id).fields['target_iqn']
        self.guest.run('targetcli', '/iscsi', 'delete', name)

    def test_secrets_are_in_no_command_line(self):
        ones = [self.wanted(self.attachment()) for _ in range(3)]
        secrets = [
            each for one in ones for each in one.credentials.values()
        ]
        # Not the secrets themselves: it would find its own line.
        watcher = self.guest.start('python3', '-c', WATCH, *(
            each.encode().hex() for each in [*secrets, 'a-known-word']
        ))
        self.addCleanup(watcher.wait)
        self.addCleanup(watcher.stdin.close)
        self.assertEqual(b'watching\n', watcher.stdout.readline())
        self.guest.run('sh', '-c', 'sleep 1', 'a-known-word')
        for one in ones:
            self.exporter.export(one)
        out, _ = watcher.communicate(b'')
        self.assertEqual(b'a-known-word\n', out)

    def test_many_are_exported_in_few_round_trips(self):
        count = 1000 if lab.FULL else 102
        self.guest.run('bash', '-c', (
            f'mkdir /var/tmp/many && cd /var/tmp/many && '
            f'truncate -s 1M $(seq -f %g.raw {count})'
        ))
        self.addCleanup(self.guest.run, 'rm', '-rf', '/var/tmp/many')
        many = [
            self.wanted(ids.new(), model.Device(
                f'/var/tmp/many/{number}.raw', is_block=False
            ))
            for number in range(1, count + 1)
        ]
        self.addCleanup(self.end, many)
        hundreds = -(-count // 100)
        for trips_each, ops_each in (6, 44), (3, 21):
            self.node.trips = self.node.ops = 0
            found = self.exporter.export_many(many)
            self.assertEqual(
                {each.attachment_id for each in many}, set(found)
            )
            for each in found.values():
                self.assertIsInstance(each, model.Connection)
            self.assertLessEqual(self.node.trips, 1 + trips_each * hundreds)
            self.assertLessEqual(self.node.ops, 1 + ops_each * count)
        self.assertEqual(
            {each.attachment_id for each in many}, self.exporter.exported()
        )

    def end(self, many):
        for each in many:
            self.exporter.unexport(each.attachment_id)

    def test_one_that_fails_leaves_the_others(self):
        good, bad = self.wanted(self.attachment()), self.wanted(
            self.attachment(), model.Device('/dev/nothing', is_block=True)
        )
        found = self.exporter.export_many([bad, good])
        self.assertIsInstance(
            found[bad.attachment_id], errors.VolumeError
        )
        self.assertEqual(self.image, self.read(found[good.attachment_id]))
        self.assertEqual({good.attachment_id}, self.exporter.exported())


class LioFileTest(LioCase):
    """Files as sources, and what the host's name alone opens."""

    chap = 'off'
    disks = 0

    @classmethod
    def _remove_devices(cls):
        cls.guest.run('rm', '-rf', '/var/tmp/lio')

    def make_source(self, image):
        path = f'/var/tmp/lio/{ids.new()}.raw'
        self.node.make_directory('/var/tmp/lio')
        self.write(path, 'xb', image)
        return model.Device(path, is_block=False)

    def test_host_is_told_of_the_write_cache(self):
        with self.session(self.export(self.attachment())) as session:
            mode = session.inquire(0x86)  # extended inquiry data: V_SUP
            self.assertTrue(mode[6] & 1)
            session.write(0, b'\xa5' * 4096)
            session.flush()
        self.assertEqual(b'\xa5' * 4096, self.stored(self.source, 4096))

    def test_file_that_has_grown_is_seen_larger(self):
        attachment_id = self.attachment()
        wanted = self.wanted(attachment_id)
        connection = self.exporter.export(wanted)
        self.guest.run('truncate', '-s', '+1M', self.source.path)
        self.exporter.grow(dataclasses.replace(
            wanted, size_bytes=2 * self.size_bytes
        ))
        with self.session(connection) as session:
            session.write(2 * self.size_bytes - 512, b'\xa5' * 512)
            self.assertEqual(
                self.image, session.read(0, self.size_bytes)
            )
