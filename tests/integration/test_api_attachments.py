# SPDX-License-Identifier: Apache-2.0
"""Attaching and detaching through the REST door, the old way and the new."""

import os
import unittest

from tests.integration import serving
from volume import ids
from volume import model

HOST = {'host': 'h1', 'ip': '192.0.2.1', 'os_type': 'linux'}
OTHER = {'host': 'h2'}


class Attachments(unittest.TestCase):

    def setUp(self):
        self.world = serving.World(self)
        self.ask = self.world.ask
        self.volume = self.world.make(size=None, size_bytes=model.MIB)
        self.path = f'/v3/volumes/{self.volume["id"]}'

    def act(self, **action):
        return self.ask('POST', f'{self.path}/action', {
            name.replace('__', '-'): info for name, info in action.items()
        })

    def status(self):
        return self.ask('GET', self.path).json['volume']['status']

    def create(self, version='3.54', **attachment):
        return self.ask('POST', '/v3/attachments', {'attachment': {
            'volume_uuid': self.volume['id'], **attachment,
        }}, version=version)

    def test_the_six_old_verbs_lead_there_and_back(self):
        steps = []
        instance = ids.new()
        steps.append(self.act(os__reserve=None).status)
        steps.append(self.status())
        info = self.act(os__initialize_connection={'connector': HOST})
        steps.append(info.status)
        connection = info.json['connection_info']
        self.assertEqual('local', connection['driver_volume_type'])
        self.assertEqual(
            os.path.join(self.world.pool, f'{self.volume["id"]}.raw'),
            connection['data']['path'],
        )
        steps.append(self.act(os__attach={
            'instance_uuid': instance, 'mountpoint': '/dev/vdb',
        }).status)
        steps.append(self.status())
        (there,) = self.ask('GET', self.path).json['volume']['attachments']
        self.assertEqual(
            (instance, '/dev/vdb', 'h1'),
            (there['server_id'], there['device'], there['host_name']),
        )
        steps.append(self.act(os__begin_detaching=None).status)
        steps.append(self.act(
            os__terminate_connection={'connector': HOST}).status)
        steps.append(self.status())
        steps.append(self.act(
            os__detach={'attachment_id': there['attachment_id']}).status)
        steps.append(self.status())
        self.assertEqual([
            202, 'attaching', 200, 202, 'in-use', 202, 202, 'detaching',
            202, 'available',
        ], steps)

    def test_who_attaches_is_an_instance_or_a_host_and_not_both(self):
        self.act(os__reserve=None)
        for info in {}, {'mountpoint': '/x'}, {
            'instance_uuid': ids.new(), 'host_name': 'h',
        }, {'instance_uuid': 'x'}:
            self.assertEqual(400, self.act(os__attach=info).status, info)
        self.assertEqual(202, self.act(os__attach={'host_name': 'h'}).status)

    def test_an_attachment_is_reserved_connected_completed_and_deleted(self):
        made = self.create(instance_uuid=ids.new(), connector=None)
        self.assertEqual(200, made.status, made.text)
        row = made.json['attachment']
        self.assertEqual(
            ('reserved', {}), (row['status'], row['connection_info'])
        )
        self.assertEqual('reserved', self.status())
        path = f'/v3/attachments/{row["id"]}'
        early = self.ask('POST', f'{path}/action', {'os-complete': None})
        self.assertEqual(400, early.status)
        updated = self.ask('PUT', path, {'attachment': {'connector': HOST}})
        self.assertEqual(200, updated.status, updated.text)
        info = updated.json['attachment']['connection_info']
        self.assertEqual('local', info['driver_volume_type'])
        self.assertEqual(row['id'], info['attachment_id'])
        done = self.ask('POST', f'{path}/action', {'os-complete': row['id']})
        self.assertEqual((204, ''), (done.status, done.text))
        self.assertEqual('in-use', self.status())
        shown = self.ask('GET', path).json['attachment']
        self.assertEqual('attached', shown['status'])
        self.assertRegex(shown['attached_at'], r'^\d{4}-\d\d-\d\dT')
        gone = self.ask('DELETE', path)
        self.assertEqual(
            (200, {'attachments': []}), (gone.status, gone.json)
        )
        self.assertEqual('available', self.status())
        self.assertEqual(404, self.ask('GET', path).status)

    def test_a_connector_at_once_connects_at_once(self):
        row = self.create(connector=HOST).json['attachment']
        self.assertEqual('attaching', row['status'])
        self.assertEqual('local', row['connection_info']['driver_volume_type'])

    def test_a_second_host_is_refused_unless_the_volume_is_for_several(self):
        self.assertEqual(200, self.create(connector=HOST).status)
        second = self.create(connector=OTHER)
        self.assertEqual(400, second.status)
        self.assertIn('multi-attach', second.message)
        shared = self.ask('POST', '/v3/volumes', {
            'volume': {'size_bytes': 512},
            'OS-SCH-HNT:scheduler_hints': {'multiattach': True},
        }).json['volume']
        self.world.settled(shared['id'])
        for host in HOST, OTHER:
            made = self.create(connector=host, volume_uuid=shared['id'])
            self.assertEqual(200, made.status, made.text)
            self.ask(
                'POST',
                f'/v3/attachments/{made.json["attachment"]["id"]}/action',
                {'os-complete': None},
            )
        row = self.ask('GET', f'/v3/volumes/{shared["id"]}').json['volume']
        self.assertEqual((True, 2), (
            row['multiattach'], len(row['attachments'])
        ))
        left = self.ask('DELETE', '/v3/attachments/' + row['attachments'][0][
            'attachment_id']).json['attachments']
        self.assertEqual([row['attachments'][1]['attachment_id']], [
            each['id'] for each in left
        ])

    def test_a_mode_is_a_word_of_version_3_54(self):
        self.assertEqual(400, self.create('3.53', mode='ro').status)
        row = self.create('3.54', mode='ro', connector=HOST)
        self.assertEqual('ro', row.json['attachment']['attach_mode'])
        self.assertEqual(
            'ro', row.json['attachment']['connection_info']['access_mode']
        )

    def test_an_attachment_knows_no_other_words(self):
        self.assertEqual(400, self.create(colour='red').status)
        self.assertEqual(400, self.create(volume_uuid=None).status)
        self.assertEqual(404, self.create(volume_uuid=ids.new()).status)
        self.assertEqual(400, self.create(connector={'ip': 'x'}).status)
        self.assertEqual(400, self.create(instance_uuid='x').status)
        self.assertEqual('available', self.status())

    def test_attachments_are_listed_and_chosen(self):
        instance = ids.new()
        row = self.create(instance_uuid=instance, connector=HOST).json[
            'attachment']
        for query, count in (
            ('', 1), (f'volume_id={self.volume["id"]}', 1),
            (f'instance_id={instance}', 1), (f'instance_id={ids.new()}', 0),
            (f'volume_id={ids.new()}', 0), ('status=attaching', 1),
            ('limit=1', 1),
        ):
            listed = self.ask('GET', f'/v3/attachments?{query}')
            self.assertEqual(
                count, len(listed.json['attachments']), query
            )
        self.assertEqual(
            {'id', 'status', 'instance', 'volume_id'}, set(
                self.ask('GET', '/v3/attachments').json['attachments'][0])
        )
        (detail,) = self.ask('GET', '/v3/attachments/detail').json[
            'attachments']
        self.assertEqual(
            row['connection_info'], detail['connection_info']
        )

    def test_the_attachments_of_a_later_version_are_not_there_before_it(self):
        self.assertEqual(404, self.create('3.26').status)
        row = self.create('3.27', connector=HOST).json['attachment']
        path = f'/v3/attachments/{row["id"]}/action'
        body = {'os-complete': None}
        self.assertEqual(
            404, self.ask('POST', path, body, version='3.43').status
        )
        self.assertEqual(
            204, self.ask('POST', path, body, version='3.44').status
        )

    def test_an_operator_ends_an_attachment_whose_host_is_gone(self):
        row = self.create(connector=HOST).json['attachment']
        self.ask('POST', f'/v3/attachments/{row["id"]}/action',
                 {'os-complete': None})
        self.assertEqual('in-use', self.status())
        asked = self.act(os__force_detach={'attachment_id': row['id']})
        self.assertEqual(202, asked.status, asked.text)
        self.assertEqual('available', self.status())
        self.assertEqual([], self.ask(
            'GET', '/v3/attachments').json['attachments'])

    def test_a_read_only_volume_is_attached_for_reading(self):
        self.assertEqual(202, self.act(
            os__update_readonly_flag={'readonly': True}).status)
        row = self.create(connector=HOST).json['attachment']
        self.assertEqual('ro', row['attach_mode'])

    def test_a_volume_is_made_bootable(self):
        self.assertEqual(200, self.act(
            os__set_bootable={'bootable': 'true'}).status)
        row = self.ask('GET', self.path).json['volume']
        self.assertEqual('true', row['bootable'])
        self.assertEqual(400, self.act(os__set_bootable={}).status)
