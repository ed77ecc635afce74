# SPDX-License-Identifier: Apache-2.0
"""What connectors take, refuse, and note; no kernel is asked."""

import concurrent.futures
import dataclasses
import os
import stat
import subprocess
import sys
import tempfile
import time
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.cli import hostside
from volume.connector import here
from volume.connector import iscsi_paths
from volume.connector import naming
from volume.connector import nfs
from volume.connector import nvmeof
from volume.connector import open_iscsi
from volume.connector.base import Connector
from volume.connector.base import Stray
from volume.connector.iscsi import IscsiConnector
from volume.connector.kept import Kept
from volume.machine import users
from volume.testing import fixtures

VOLUME = '11111111-2222-4333-8444-555555555555'
ATTACHMENT = 'aaaaaaaa-2222-4333-8444-555555555555'
TARGET = f'iqn.2010-10.org.openstack:volume-{VOLUME}.{ATTACHMENT}'
ISCSI = {
    'driver_volume_type': 'iscsi', 'volume_id': VOLUME,
    'target_discovered': False, 'target_portal': '192.0.2.1:3260',
    'target_iqn': TARGET, 'target_lun': 0,
    'target_portals': ['192.0.2.1:3260', '[2001:db8::1]:3260'],
    'target_iqns': [TARGET] * 2, 'target_luns': [0, 0], 'access_mode': 'rw',
    'auth_method': 'CHAP', 'auth_username': 'u',
    'auth_password': 'pass-word-0123',
}
# What iscsiadm 2.1.8 made, in part; an iscsid.conf with a secret of its own.
RECORD = '''\
# BEGIN RECORD 2.1.8
node.name = iqn.x
node.startup = automatic
node.session.auth.authmethod = CHAP
node.session.auth.username = old
node.session.auth.password = old-secret
node.session.auth.username_in = old-in
node.session.scan = manual
node.conn[0].address = 192.0.2.1
# END RECORD
'''


class Infos(unittest.TestCase):
    """connection_info, flat or not, and what in it is secret."""

    def test_passwords_are_no_fields_and_all_else_is(self):
        for info in ISCSI, {
            'driver_volume_type': 'iscsi',
            'data': {k: v for k, v in ISCSI.items() if k[0] != 'd'},
        }:
            found = here.connection(info)
            self.assertEqual('iscsi', found.protocol)
            self.assertEqual(
                {'auth_method', 'auth_username', 'auth_password'},
                set(found.credentials),
            )
            self.assertFalse(set(found.fields) & set(found.credentials))
            self.assertEqual(TARGET, found.fields['target_iqn'])
            self.assertNotIn('pass-word', repr(found))

    def test_the_user_of_ceph_is_no_secret(self):
        found = here.connection({
            'driver_volume_type': 'rbd', 'auth_username': 'volumes',
            'secret_uuid': None,
        })
        self.assertEqual('volumes', found.fields['auth_username'])

    def test_an_attachment_is_known_by_its_target_or_by_what_it_leads_to(
        self
    ):
        self.assertEqual(ATTACHMENT, here.attachment_of(ISCSI))
        given = ids.new()
        self.assertEqual(given, here.attachment_of(
            {**ISCSI, 'attachment_id': given}
        ))
        other = {'driver_volume_type': 'nfs', 'export': 'a:/b', 'name': 'v'}
        self.assertEqual(
            here.attachment_of(other), here.attachment_of(dict(other))
        )
        self.assertNotEqual(
            here.attachment_of(other),
            here.attachment_of({**other, 'name': 'w'}),
        )

    def test_a_target_of_another_form_is_nobodys(self):
        self.assertEqual((VOLUME, ATTACHMENT), naming.parts(TARGET))
        for name in (
            f'iqn.2010-10.org.openstack:volume-{VOLUME}',
            f'iqn.2010-10.org.openstack:volume-{VOLUME}.{ATTACHMENT}x',
            f'iqn.2010-10.org.openstack:{VOLUME}.{ATTACHMENT}',
            'iqn.2010-10.org.example:disk1', '',
        ):
            self.assertIsNone(naming.parts(name), name)


class IscsiForms(unittest.TestCase):

    def test_each_portal_is_a_way(self):
        asked = iscsi_paths.Asked(here.connection(ISCSI))
        self.assertEqual(
            ['192.0.2.1:3260', '[2001:db8::1]:3260'],
            [way.portal for way in asked.ways],
        )
        self.assertEqual({TARGET}, asked.targets)
        single = {k: v for k, v in ISCSI.items() if not k.endswith('s')}
        (way,) = iscsi_paths.Asked(here.connection(single)).ways
        self.assertEqual((TARGET, '192.0.2.1:3260', 0), (
            way.target, way.portal, way.lun))

    def test_what_would_be_a_path_or_an_option_is_refused(self):
        for key, value in (
            ('target_portals', ['192.0.2.1:3260']),
            ('target_iqns', ['iqn.2010-10.x:../../etc', TARGET]),
            ('target_iqns', ['--logoutall=all', TARGET]),
            ('target_portals', ['-x:1', '192.0.2.1:3260']),
            ('target_portals', ['192.0.2.1:99999', '192.0.2.1:3260']),
            ('target_luns', ['0', 0]),
            ('target_luns', [-1, 0]),
            ('volume_id', '../x'),
        ):
            with self.subTest(key=key, value=value):
                with self.assertRaises(errors.Invalid):
                    iscsi_paths.Asked(here.connection(
                        {**ISCSI, key: value}
                    ))

    def test_a_secret_that_is_missing_or_would_break_the_record_is_refused(
        self
    ):
        for value in None, '', 'a\nnode.startup = automatic', 'a b':
            with self.subTest(value=value):
                with self.assertRaises(errors.Invalid) as refused:
                    iscsi_paths.Asked(here.connection(
                        {**ISCSI, 'auth_password': value}
                    ))
                self.assertNotIn('startup', str(refused.exception))

    def test_a_way_to_prove_oneself_that_is_unknown_is_refused(self):
        with self.assertRaises(errors.Unsupported):
            iscsi_paths.Asked(here.connection(
                {**ISCSI, 'auth_method': 'SRP'}
            ))

    def test_a_record_has_the_new_secret_and_no_old_one(self):
        asked = iscsi_paths.Asked(here.connection(ISCSI))
        made = open_iscsi.with_settings(RECORD, asked.settings)
        lines = made.splitlines()
        self.assertEqual(len(lines), len(set(lines)))
        self.assertIn('node.session.auth.password = pass-word-0123', lines)
        self.assertIn('node.session.auth.username = u', lines)
        self.assertIn('node.startup = manual', lines)
        self.assertIn('node.session.scan = auto', lines)
        self.assertIn('node.conn[0].address = 192.0.2.1', lines)
        self.assertNotIn('old', made)
        self.assertEqual('# END RECORD', lines[-1])

    def test_without_a_secret_the_hosts_own_is_not_sent(self):
        plain = {k: v for k, v in ISCSI.items() if k[:5] != 'auth_'}
        asked = iscsi_paths.Asked(here.connection(plain))
        made = open_iscsi.with_settings(RECORD, asked.settings)
        self.assertIn('node.session.auth.authmethod = None', made)
        self.assertNotIn('old', made)


class OtherForms(unittest.TestCase):

    def test_the_forms_of_nvme_are_understood_the_old_one_too(self):
        nqn = TARGET.replace('iqn', 'nqn', 1)
        new = {
            'driver_volume_type': 'nvmeof', 'volume_id': VOLUME,
            'target_nqn': nqn,
            'portals': [['192.0.2.1', '4420', 'tcp'],
                        ['2001:db8::1', 4420, 'TCP']],
        }
        asked = nvmeof.Asked(here.connection(new))
        self.assertEqual(
            ['192.0.2.1:4420', '[2001:db8::1]:4420'],
            [str(portal) for portal in asked.portals],
        )
        old = {
            'driver_volume_type': 'nvmeof', 'volume_id': VOLUME, 'nqn': nqn,
            'target_portal': '192.0.2.1', 'target_port': 4420,
            'transport_type': 'tcp',
        }
        asked = nvmeof.Asked(here.connection(old))
        self.assertEqual(nqn, asked.nqn)
        for bad in (
            {'portals': [['192.0.2.1', '4420', 'rdma']]},
            {'portals': [['--x', '4420', 'tcp']]},
            {'target_nqn': '--nqn'},
        ):
            with self.assertRaises(errors.Invalid):
                nvmeof.Asked(here.connection({**new, **bad}))

    def test_an_export_of_nfs_is_no_way_out_of_its_mount(self):
        node = fixtures.make_node(self)
        good = {'driver_volume_type': 'nfs', 'export': 'host:/srv/v',
                'name': f'volume-{VOLUME}', 'options': '-o vers=4.2'}
        asked = nfs.Asked(here.connection(good), node)
        self.assertEqual('vers=4.2', asked.options)
        for bad in (
            {'name': '../x'}, {'name': 'a/b'}, {'name': '.hidden'},
            {'export': '-o:/x'}, {'export': '/local'},
            {'options': 'exec --bind'}, {'options': 7},
        ):
            with self.subTest(bad=bad), self.assertRaises(errors.Invalid):
                nfs.Asked(here.connection({**good, **bad}), node)


class Lamp(Connector):
    """Leaves a trace: it is on or off; it may be told to fail."""

    protocol = 'lamp'
    leaves_traces = True

    def __init__(self, node):
        self.is_on = False
        self.path = '/dev/lamp'
        self.cleared = 0
        self.left = []
        self.fails: errors.VolumeError | None = None

    def host(self):
        return model.Host('lamp')

    def clear(self, connection):
        self.cleared += 1

    def attach(self, connection):
        if self.fails:
            raise self.fails
        self.is_on = True
        return self.path

    def detach(self, connection):
        if self.fails:
            raise self.fails
        self.is_on = False

    def present(self, connection):
        return self.path if self.is_on else ''

    def strays(self):
        return iter(self.left)


class Service:
    """What is asked to end an access."""

    def __init__(self, *fails):
        self.fails, self.deleted = fails, []

    def delete(self, path):
        self.deleted.append(path)
        for each in self.fails:
            raise each


@unittest.skipIf(os.getuid(), 'this user is not root')
class Notes(unittest.TestCase):

    def setUp(self):
        self.node = fixtures.make_node(self)
        self.lamp = Lamp(self.node)
        self.kept = Kept(self.node, lambda protocol: self.lamp)
        self.connection = model.Connection(
            'iscsi', {'volume_id': VOLUME, 'auth_password': 'in the open'},
            credentials={'auth_password': 'hidden'},
        )

    def notes(self):
        return [
            (note.attachment_id, note.state, note.location)
            for note in self.kept.notes()
        ]

    def test_what_is_attached_is_noted_until_it_is_detached(self):
        self.assertEqual([], self.notes())
        self.kept.attach(self.connection, ATTACHMENT, 'there')
        self.assertEqual([(ATTACHMENT, 'attached', '/dev/lamp')],
                         self.notes())
        (note,) = self.kept.notes()
        self.assertEqual((VOLUME, 'there'), (note.volume_id, note.origin))
        self.kept.detach(self.connection, ATTACHMENT)
        self.assertEqual([], self.notes())

    def test_two_that_attach_at_once_do_so_one_after_the_other(self):
        inside, most = [], []

        def attach(connection):
            inside.append(connection)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()
            return '/dev/lamp'

        self.lamp.attach = attach
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(
                lambda _: self.kept.attach(self.connection, ATTACHMENT),
                range(4),
            ))
        self.assertEqual((['/dev/lamp'] * 4, 1), (found, max(most)))

    def test_what_was_seen_to_be_over_is_ended_only_if_it_still_is(self):
        self.kept.attach(self.connection, ATTACHMENT)
        (there,) = self.kept.notes()
        for state in 'attaching', 'gone':
            seen = dataclasses.replace(there, state=state)
            with self.assertRaisesRegex(errors.Busy, 'is attached by now'):
                self.kept.end(seen)
            self.assertTrue(self.lamp.is_on)
        self.lamp.is_on = False
        self.kept.end(seen)
        self.assertEqual([], self.notes())
        self.kept.end(seen)
        # Of one that was attached the service has said that it is over.
        self.kept.attach(self.connection, ATTACHMENT)
        self.kept.end(there)
        self.assertEqual(([], False), (self.notes(), self.lamp.is_on))

    def test_what_is_new_here_has_its_place_cleared_first_and_only_then(self):
        for _ in range(2):
            self.kept.attach(self.connection, ATTACHMENT)
        self.assertEqual(1, self.lamp.cleared)

    def test_what_has_its_place_taken_is_not_attached(self):
        self.lamp.clear = lambda connection: self.fail_with(
            errors.Busy('it shines for another'))
        with self.assertRaises(errors.Busy):
            self.kept.attach(self.connection, ATTACHMENT)
        self.assertEqual(([], False), (self.notes(), self.lamp.is_on))

    def fail_with(self, failure):
        raise failure

    def test_what_this_host_has_by_another_name_is_ended_at_the_service(
        self
    ):
        for gone in (), (errors.NotFound('ended'),):
            self.kept.attach(self.connection, ATTACHMENT)
            (note,) = self.kept.notes()
            service = Service(*gone)
            hostside._end_noted(service, self.kept, note)
            self.assertEqual([f'/attachments/{ATTACHMENT}'], service.deleted)
            self.assertEqual(([], False), (self.notes(), self.lamp.is_on))
        self.kept.attach(self.connection, ATTACHMENT)
        self.lamp.fails = errors.Busy('it shines')
        service = Service()
        with self.assertRaises(errors.Busy):
            hostside._end_noted(service, self.kept, note)
        self.assertEqual([], service.deleted)

    def test_no_secret_is_noted(self):
        self.kept.attach(self.connection, ATTACHMENT)
        directory = os.path.join(self.node.state_dir, 'attached')
        self.assertEqual(0o700, stat.S_IMODE(os.stat(directory).st_mode))
        for name in os.listdir(directory):
            text = self.node.read(os.path.join(directory, name)).decode()
            self.assertNotIn('hidden', text)
            self.assertNotIn('in the open', text)

    def test_what_was_refused_leaves_no_note(self):
        self.lamp.fails = errors.Denied('no')
        with self.assertRaises(errors.Denied):
            self.kept.attach(self.connection, ATTACHMENT)
        self.assertEqual([], self.notes())

    def test_a_connection_that_can_never_work_leaves_no_note(self):
        real = Kept(self.node, lambda protocol: IscsiConnector(self.node))
        with self.assertRaises(errors.Invalid):
            real.attach(model.Connection('iscsi', {}), ATTACHMENT)
        self.assertEqual([], self.notes())

    def test_what_failed_and_left_something_is_noted(self):
        self.lamp.is_on, self.lamp.fails = True, errors.Unknown('lost')
        with self.assertRaises(errors.Unknown):
            self.kept.attach(self.connection, ATTACHMENT)
        self.assertEqual([(ATTACHMENT, 'attaching', '')], self.notes())

    def test_what_is_in_use_stays_attached(self):
        self.kept.attach(self.connection, ATTACHMENT)
        self.lamp.fails = errors.Busy('in use')
        with self.assertRaises(errors.Busy):
            self.kept.detach(self.connection, ATTACHMENT)
        self.assertEqual([(ATTACHMENT, 'attached', '/dev/lamp')],
                         self.notes())

    def test_what_is_not_there_any_more_is_gone(self):
        self.kept.attach(self.connection, ATTACHMENT)
        self.lamp.is_on = False
        self.assertEqual([(ATTACHMENT, 'gone', '/dev/lamp')], self.notes())

    def test_what_has_come_anew_is_told_by_the_name_that_it_has_now(self):
        self.kept.attach(self.connection, ATTACHMENT)
        self.lamp.path = '/dev/other-lamp'
        self.assertEqual(
            [(ATTACHMENT, 'attached', '/dev/other-lamp')], self.notes())

    def test_of_what_is_there_only_some_protocols_know_that_it_is_dead(self):
        self.kept.attach(self.connection, ATTACHMENT)
        note, = self.kept.notes()
        self.assertTrue(self.kept.may_be_dead(note))
        self.lamp.knows_the_dead = True
        self.assertFalse(self.kept.may_be_dead(note))
        self.lamp.is_on = False
        gone, = self.kept.notes()
        self.assertTrue(self.kept.may_be_dead(gone))

    def test_what_is_there_and_answers_no_more_is_listed_as_dead(self):
        other = Stray('iscsi', VOLUME, ids.new(), 'a record')
        self.kept.attach(self.connection, ATTACHMENT)
        self.lamp.left = [other]
        (note,), strays = self.kept.seen()
        self.assertEqual(('attached', [other]), (note.state, strays))
        self.lamp.left = [Stray('iscsi', VOLUME, ATTACHMENT, '1 dead')]
        (note,), strays = self.kept.seen()
        self.assertEqual(('dead', []), (note.state, strays))
        self.lamp.is_on = False
        (note,), strays = self.kept.seen()
        self.assertEqual(('gone', []), (note.state, strays))

    def test_a_note_in_pieces_is_said(self):
        self.kept.attach(self.connection, ATTACHMENT)
        self.node.write(os.path.join(
            self.node.state_dir, 'attached', f'{ATTACHMENT}.json'
        ), b'{')
        with self.assertRaisesRegex(errors.Corrupt, 'no note'):
            self.notes()


class Users(unittest.TestCase):

    def test_a_process_that_has_a_file_open_is_named(self):
        with tempfile.NamedTemporaryFile() as f:
            child = subprocess.Popen(
                [sys.executable, '-c', 'input()'], stdin=subprocess.PIPE,
                stdout=f, close_fds=True,
            )
            try:
                name = f.name
                self.assertTrue(any(
                    f'(pid {child.pid})' in each
                    for each in users.users(name)
                ))
            finally:
                child.communicate(b'\n')
            self.assertFalse(any(
                f'(pid {child.pid})' in each for each in users.users(name)
            ))

    def test_nobody_uses_what_is_not_there(self):
        self.assertEqual([], users.users('/nonexistent'))
