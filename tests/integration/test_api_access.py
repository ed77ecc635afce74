# SPDX-License-Identifier: Apache-2.0
"""Who gets in, and what each may see and do."""

import json
import os
import unittest

from tests.integration import serving
from volume import errors
from volume import ids
from volume.api import auth
from volume.api import server
from volume.api.faults import Refused
from volume.testing import fixtures

HOST = {'host': 'h1'}
PEOPLE = [
    serving.token('root', 'ops', 'admin'),
    serving.token('ann', 'red', 'member'),
    serving.token('bob', 'blue', 'member'),
    serving.token('eve', 'red', 'reader'),
    serving.token('nova', 'service', 'service'),
]


class Projects(unittest.TestCase):
    """Two projects and an administrator."""

    def setUp(self):
        self.world = serving.World(self)
        self.world.with_tokens(PEOPLE)
        self.ask = self.world.ask

    def make(self, who='ann'):
        return self.world.make(
            size=None, size_bytes=512, token=who
        )['id']

    def attach(self, volume_id, who='ann', **attachment):
        asked = self.ask('POST', '/v3/attachments', {'attachment': {
            'volume_uuid': volume_id, 'connector': HOST, **attachment,
        }}, token=who)
        self.assertEqual(200, asked.status, asked.text)
        return asked.json['attachment']['id']

    def test_nobody_gets_in_without_a_token_that_is_known(self):
        for token in None, '', 'mallory', 'x' * 5000, 'é':
            asked = self.ask('GET', '/v3/volumes', token=token)
            self.assertEqual(
                (401, 'unauthorized'), (asked.status, asked.fault)
            )
            self.assertIn('WWW-Authenticate', asked.headers)
        self.assertEqual(401, self.ask('GET', '/v3/nowhere').status)
        for path in '/', '/v3', '/v3/', '/healthcheck':
            self.assertIn(self.ask('GET', path).status, (200, 300))

    def test_what_is_another_projects_is_not_there(self):
        volume_id = self.make('ann')
        attachment_id = self.attach(volume_id, 'ann')
        job_id = self.ask('GET', '/v3/os-volume-jobs', token='ann').json[
            'jobs'][0]['id']
        for who, status in (('ann', 200), ('bob', 404), ('root', 200)):
            for path in (
                f'volumes/{volume_id}', f'attachments/{attachment_id}',
                f'os-volume-jobs/{job_id}', f'volumes/{volume_id}/metadata',
            ):
                self.assertEqual(
                    status,
                    self.ask('GET', f'/v3/{path}', token=who).status,
                    (who, path),
                )
        for method, path, body in (
            ('PUT', f'volumes/{volume_id}', {'volume': {'name': 'x'}}),
            ('DELETE', f'volumes/{volume_id}', None),
            ('POST', f'volumes/{volume_id}/metadata', {'metadata': {}}),
            ('PUT', f'volumes/{volume_id}/metadata', {'metadata': {}}),
            ('DELETE', f'volumes/{volume_id}/metadata/x', None),
            ('DELETE', f'attachments/{attachment_id}', None),
            ('PUT', f'attachments/{attachment_id}',
             {'attachment': {'connector': HOST}}),
            ('POST', f'attachments/{attachment_id}/action',
             {'os-complete': None}),
            ('POST', 'volumes', {'volume': {'source_volid': volume_id}}),
            ('POST', 'snapshots', {'snapshot': {'volume_id': volume_id}}),
            ('POST', 'attachments',
             {'attachment': {'volume_uuid': volume_id}}),
            ('POST', f'os-volume-jobs/{job_id}/action', {'os-cancel': None}),
            *(
                ('POST', f'volumes/{volume_id}/action', {name: info})
                for name, info in (
                    ('os-reserve', None), ('os-unreserve', None),
                    ('os-begin_detaching', None),
                    ('os-roll_detaching', None),
                    ('os-attach', {'host_name': 'h'}), ('os-detach', {}),
                    ('os-initialize_connection', {'connector': HOST}),
                    ('os-terminate_connection', {'connector': HOST}),
                    ('os-extend', {'new_size': 2}),
                    ('os-set_bootable', {'bootable': True}),
                    ('os-update_readonly_flag', {'readonly': True}),
                    ('revert', {'snapshot_id': ids.new()}),
                    ('os-volume_upload_image', {'image_name': 'file:///x'}),
                )
            ),
        ):
            asked = self.ask(method, f'/v3/{path}', body, token='bob')
            self.assertEqual(
                (404, 'itemNotFound'), (asked.status, asked.fault),
                (method, path, body),
            )
        row = self.ask('GET', f'/v3/volumes/{volume_id}', token='ann')
        self.assertEqual('attaching', row.json['volume']['status'])

    def test_a_list_is_of_ones_own_unless_an_administrator_asks_for_all(self):
        mine, others = self.make('ann'), self.make('bob')
        for who, query, seen in (
            ('ann', '', {mine}), ('ann', '?all_tenants=1', {mine}),
            ('bob', '?project_id=red', set()), ('root', '', set()),
            ('root', '?all_tenants=True', {mine, others}),
            ('root', '?all_tenants=1&project_id=blue', {others}),
        ):
            listed = self.ask('GET', f'/v3/volumes{query}', token=who).json
            self.assertEqual(
                seen, {each['id'] for each in listed['volumes']}, (who, query)
            )
        marker = self.ask('GET', f'/v3/volumes?marker={others}', token='ann')
        self.assertEqual(404, marker.status)

    def test_the_project_of_the_path_must_be_the_callers(self):
        volume_id = self.make('ann')
        self.assertEqual(200, self.ask(
            'GET', f'/v3/red/volumes/{volume_id}', token='ann').status)
        other = self.ask('GET', '/v3/blue/volumes', token='ann')
        self.assertEqual((400, 'badRequest'), (other.status, other.fault))
        listed = self.ask('GET', '/v3/red/volumes', token='root').json
        self.assertEqual([volume_id], [
            each['id'] for each in listed['volumes']
        ])

    def test_an_id_that_anothers_deleted_volume_had_tells_nothing(self):
        wanted = ids.new()
        body = {'volume': {'size_bytes': 512, 'name': 'secret'}}
        headers = {'X-Volume-Id': wanted}
        self.ask('POST', '/v3/volumes', body, token='ann', headers=headers)
        self.world.settled(wanted, token='ann')
        alive = self.ask(
            'POST', '/v3/volumes', body, token='bob', headers=headers
        )
        self.assertEqual(409, alive.status)
        self.ask('DELETE', f'/v3/volumes/{wanted}', token='ann')
        serving.until(
            lambda: self.ask(
                'GET', f'/v3/volumes/{wanted}', token='ann').status,
            lambda status: status == 404,
        )
        dead = self.ask(
            'POST', '/v3/volumes', body, token='bob', headers=headers
        )
        self.assertEqual(409, dead.status)
        self.assertNotIn('secret', alive.text + dead.text)

    def test_what_only_an_administrator_may_is_forbidden_to_others(self):
        volume_id = self.make('ann')
        actions = (
            ('os-reset_status', {'status': 'available'}),
            ('os-force_delete', None), ('os-force_detach', {}),
            ('os-unmanage', None),
        )
        for who in 'ann', 'nova':
            for name, info in actions:
                asked = self.ask(
                    'POST', f'/v3/volumes/{volume_id}/action', {name: info},
                    token=who,
                )
                self.assertEqual(
                    (403, 'forbidden'), (asked.status, asked.fault), name
                )
            for method, path in (
                ('GET', 'os-services'), ('GET', 'scheduler-stats/get_pools'),
                ('POST', 'os-volume-manage'),
                ('DELETE', f'volumes/{volume_id}?force=true'),
                ('GET', 'os-quota-sets/blue'),
            ):
                asked = self.ask(method, f'/v3/{path}', {}, token=who)
                self.assertEqual(403, asked.status, path)
        (seen,) = self.ask(
            'GET', '/v3/os-volume-backends', token='ann').json['backends']
        self.assertEqual('up', seen['state'])
        self.assertNotIn('host', seen)
        self.assertNotIn('total_bytes', seen['pools'][0])

    def test_a_reader_looks_and_changes_nothing(self):
        volume_id = self.make('ann')
        path = f'/v3/volumes/{volume_id}'
        self.assertEqual(200, self.ask('GET', path, token='eve').status)
        for method, body in (
            ('PUT', {'volume': {'name': 'x'}}), ('DELETE', None),
        ):
            self.assertEqual(
                403, self.ask(method, path, body, token='eve').status
            )
        self.assertEqual(403, self.ask(
            'POST', '/v3/volumes', {'volume': {'size': 1}}, token='eve'
        ).status)

    def test_what_an_instance_uses_only_its_service_lets_go(self):
        volume_id = self.make('ann')
        path = '/v3/attachments/' + self.attach(
            volume_id, instance_uuid=ids.new()
        )
        action = f'/v3/volumes/{volume_id}/action'
        for method, where, body in (
            ('DELETE', path, None), ('POST', action, {'os-detach': {}}),
            ('POST', action,
             {'os-terminate_connection': {'connector': HOST}}),
            # What it proves itself with is not for the owner either.
            ('POST', action,
             {'os-initialize_connection': {'connector': HOST}}),
            ('PUT', path, {'attachment': {'connector': HOST}}),
        ):
            asked = self.ask(method, where, body, token='ann')
            self.assertEqual(
                (409, 'conflictingRequest'), (asked.status, asked.fault)
            )
        for method, where, body in (
            ('POST', action,
             {'os-initialize_connection': {'connector': HOST}}),
            ('PUT', path, {'attachment': {'connector': HOST}}),
        ):
            asked = self.ask(
                method, where, body, token='ann',
                headers={'X-Service-Token': 'nova'},
            )
            self.assertEqual(200, asked.status, asked.text)
        wrong = self.ask(
            'DELETE', path, token='ann', headers={'X-Service-Token': 'bob'}
        )
        self.assertEqual(409, wrong.status)
        right = self.ask(
            'DELETE', path, token='ann', headers={'X-Service-Token': 'nova'}
        )
        self.assertEqual(200, right.status, right.text)

    def test_a_host_of_ones_own_is_let_go_by_oneself(self):
        path = '/v3/attachments/' + self.attach(self.make('ann'))
        self.assertEqual(200, self.ask('DELETE', path, token='ann').status)


class Tokens(unittest.TestCase):
    """The file of tokens."""

    def setUp(self):
        self.path = os.path.join(fixtures.state_dir(self), 'tokens.json')

    def refuses(self, words):
        return self.assertRaisesRegex(errors.Invalid, words)

    def test_a_token_is_known_by_its_hash_alone(self):
        serving.write_tokens(self.path, PEOPLE)
        with open(self.path) as f:
            self.assertNotIn('ann"', f.read().replace('"user": "ann"', ''))
        who = auth.Tokens(self.path).identify('ann')
        self.assertEqual(('ann', 'red', False), (
            who.user_id, who.project_id, who.is_admin
        ))

    def test_a_change_counts_at_once(self):
        serving.write_tokens(self.path, PEOPLE)
        door = auth.Tokens(self.path)
        door.identify('ann')
        serving.write_tokens(self.path, PEOPLE[2:])
        with self.assertRaises(Refused) as said:
            door.identify('ann')
        self.assertEqual(401, said.exception.status)
        door.identify('bob')

    def test_a_file_that_went_wrong_lets_nobody_in(self):
        serving.write_tokens(self.path, PEOPLE)
        door = auth.Tokens(self.path)
        with open(self.path, 'w') as f:
            f.write('{')
        for _ in range(2):
            with self.assertLogs('volume.api.auth', 'ERROR'):
                with self.assertRaises(errors.Unavailable):
                    door.identify('ann')
        serving.write_tokens(self.path, PEOPLE)
        door.identify('ann')
        os.unlink(self.path)
        with self.assertLogs('volume.api.auth', 'ERROR'):
            with self.assertRaises(errors.Unavailable):
                door.identify('ann')

    def test_a_file_that_others_can_read_is_refused(self):
        for mode in 0o640, 0o604, 0o666:
            serving.write_tokens(self.path, PEOPLE, mode)
            with self.refuses('chmod 600'):
                auth.Tokens(self.path)

    def test_a_file_that_is_not_as_documented_is_refused(self):
        good = PEOPLE[0]
        for wrong in (
            {**good, 'token_sha256': 'x'}, {**good, 'token': 'plain'},
            {**good, 'roles': []}, {**good, 'roles': ['king']},
            {**good, 'user': ''}, {**good, 'project': 'a/b'}, 'x',
            {key: good[key] for key in good if key != 'project'},
        ):
            serving.write_tokens(self.path, [good, wrong])
            with self.refuses('entry 2'):
                auth.Tokens(self.path)
        for text in '', '[]', '{"tokens": 1}', '{}', '[' * 100000:
            with open(self.path, 'w') as f:
                f.write(text)
            with self.refuses('is not like'):
                auth.Tokens(self.path)
        with self.refuses('cannot be read'):
            auth.Tokens(f'{self.path}.none')

    def test_a_message_about_the_file_tells_no_hash(self):
        entry = {**PEOPLE[0], 'roles': ['king']}
        serving.write_tokens(self.path, [entry])
        with self.assertRaises(errors.Invalid) as said:
            auth.Tokens(self.path)
        self.assertNotIn(entry['token_sha256'], str(said.exception))


class Closed(unittest.TestCase):
    """Without tokens everybody is an administrator, so nobody is let near."""

    def test_without_tokens_only_this_machine_may_listen(self):
        for host in (
            '127.0.0.1', '127.9.9.9', '::1', '[::1]', 'localhost',
            'unix:/run/x', '/run/x',
        ):
            auth.check_binding('none', host)
        for host in '0.0.0.0', '::', '', '192.0.2.1', 'no.such.host.invalid':
            with self.assertRaisesRegex(errors.Invalid, 'auth = tokens'):
                auth.check_binding('none', host)
            auth.check_binding('tokens', host)
        for host in '127.0.0.1:18776', '[::1]:80', 'localhost:80':
            with self.assertRaisesRegex(errors.Invalid, 'option port'):
                auth.check_binding('none', host)

    def test_a_web_page_with_a_name_for_this_machine_is_refused(self):
        world = serving.World(self)
        for host, status in (
            ('127.0.0.1:8776', 200), ('localhost', 200), ('[::1]:80', 200),
            ('evil.example:8776', 403), ('localhost.evil.example', 403),
            ('127.0.0.1.evil.example', 403),
        ):
            asked = world.ask('GET', '/v3/volumes', headers={'Host': host},
                              remote='127.0.0.1')
            self.assertEqual(status, asked.status, host)

    def test_a_body_that_a_web_page_may_send_unasked_is_refused(self):
        world = serving.World(self)
        body = json.dumps({'volume': {'size': 1}}).encode()
        for kind in (
            'text/plain', '', 'application/x-www-form-urlencoded',
            'multipart/form-data',
        ):
            asked = world.ask('POST', '/v3/volumes', body,
                              headers={'Content-Type': kind})
            self.assertEqual(
                (415, 'badMediaType'), (asked.status, asked.fault), kind
            )

    def test_a_token_names_user_and_project_only_with_a_colon(self):
        for token, user, project in (
            (None, 'default', 'default'), ('notused', 'default', 'default'),
            ('u:p', 'u', 'p'),
        ):
            who = auth.NoAuth().identify(token)
            self.assertEqual(
                (user, project, True),
                (who.user_id, who.project_id, who.is_admin),
            )
        for token in ':', 'u:', ':p', 'u:p/q', 'u:' + 'p' * 65:
            with self.assertRaises(Refused, msg=token):
                auth.NoAuth().identify(token)

    def test_the_server_needs_a_certificate_that_is_there(self):
        with self.assertRaisesRegex(errors.Invalid, 'TLS cannot be used'):
            server.Server(
                lambda environ, start: [], port=0,
                tls_certificate='/no/such.pem', tls_key='/no/such.key',
            )
