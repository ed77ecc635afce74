# SPDX-License-Identifier: Apache-2.0
"""Volumes, snapshots and jobs through the REST door of a real service."""

import hashlib
import os
import unittest

from tests.integration import serving
from volume import ids
from volume import model

MIB16 = 16 * model.MIB


class Volumes(unittest.TestCase):
    """On a pool without snapshots, which every machine has."""

    def setUp(self):
        self.world = serving.World(self)
        self.ask = self.world.ask

    def create(self, headers=None, version='3.54', hints=None, **volume):
        body = {'volume': {'size': 1, **volume}}
        if hints is not None:
            body['OS-SCH-HNT:scheduler_hints'] = hints
        return self.ask(
            'POST', '/v3/volumes', body, headers=headers, version=version
        )

    def test_a_volume_is_made_shown_renamed_and_deleted(self):
        asked = self.create(
            name='data', description='d', metadata={'k': 'v'},
            snapshot_id=None, source_volid=None, imageRef=None,
            availability_zone=None, volume_type=None, backup_id=None,
        )
        self.assertEqual(202, asked.status, asked.text)
        made = asked.json['volume']
        self.assertEqual(
            ('creating', 1, 'data', {'k': 'v'}),
            (made['status'], made['size'], made['name'], made['metadata']),
        )
        row = self.world.settled(made['id'])
        self.assertEqual('available', row['status'])
        path = os.path.join(self.world.pool, f'{made["id"]}.raw')
        self.assertEqual(model.GIB, os.stat(path).st_size)
        changed = self.ask('PUT', f'/v3/volumes/{made["id"]}', {
            'volume': {'name': 'other', 'description': None},
        })
        self.assertEqual(200, changed.status)
        self.assertEqual('other', changed.json['volume']['name'])
        for empty in '', ' ', None:
            refused = self.ask('PUT', f'/v3/volumes/{made["id"]}', {
                'volume': {'name': empty, 'description': 'e'},
            })
            self.assertEqual(400, refused.status, empty)
            self.assertIn('name of \'other\' is empty', refused.message)
        gone = self.ask('DELETE', f'/v3/volumes/{made["id"]}')
        self.assertEqual((202, ''), (gone.status, gone.text))
        self.world.gone(made['id'])
        self.assertFalse(os.path.exists(path))

    def test_the_size_may_be_digits_and_may_be_bytes(self):
        self.assertEqual(1, self.create(size='1').json['volume']['size'])
        made = self.create(size=None, size_bytes=MIB16).json['volume']
        self.assertEqual((1, MIB16), (made['size'], made['size_bytes']))
        row = self.world.settled(made['id'])
        path = os.path.join(self.world.pool, f'{row["id"]}.raw')
        self.assertEqual(MIB16, os.stat(path).st_size)

    def test_a_size_that_makes_no_sense_is_refused(self):
        for size in 0, -1, 1.5, 'x', True, [], 1 << 40, None:
            asked = self.create(size=size)
            self.assertEqual(400, asked.status, size)
            self.assertEqual('badRequest', asked.fault)
        self.assertEqual(400, self.create(size=1, size_bytes=5).status)
        self.assertEqual(
            400, self.create(size=2, size_bytes=MIB16).status
        )

    def test_a_full_pool_is_over_the_limit_and_says_why(self):
        asked = self.create(size=9)
        self.assertEqual((413, 'overLimit'), (asked.status, asked.fault))
        self.assertEqual(
            'no pool fits: 1 without room for it; see "volume pools"',
            asked.message,
        )
        self.assertEqual('0', asked.headers['Retry-After'])
        listed = self.ask('GET', '/v3/volumes').json['volumes']
        self.assertEqual([], listed)

    def test_hints_choose_the_pool_and_others_are_refused(self):
        self.assertEqual(202, self.create(hints={
            'tags': ['ssd'], 'backend': 'fast', 'pool': 'pool',
        }).status)
        self.assertEqual(202, self.create(hints={'tags': 'ssd,local'}).status)
        asked = self.create(hints={'tags': ['tape']})
        self.assertEqual(
            'no pool fits: 1 without the tags; see "volume pools"',
            asked.message,
        )
        asked = self.create(hints={'different_host': [ids.new()]})
        self.assertEqual(400, asked.status)
        self.assertIn('different_host', asked.message)

    def test_a_type_is_a_backend_by_name_or_id(self):
        types = {
            each['name']: each['id'] for each in
            self.ask('GET', '/v3/types').json['volume_types']
        }
        self.assertEqual({'__DEFAULT__', 'fast'}, set(types))
        for wanted, name in (
            ('fast', 'fast'), (types['fast'], 'fast'),
            ('__DEFAULT__', '__DEFAULT__'),
            (types['__DEFAULT__'], '__DEFAULT__'),
        ):
            made = self.create(volume_type=wanted, size_bytes=512, size=None)
            self.assertEqual(202, made.status, made.text)
            self.assertEqual(name, made.json['volume']['volume_type'])
        for wanted in 'slow', ids.new(), 'x' * 300:
            self.assertEqual(404, self.create(volume_type=wanted).status)
        self.assertEqual(
            'fast',
            self.ask('GET', f'/v3/types/{types["fast"]}').json[
                'volume_type']['extra_specs']['volume_backend_name'],
        )

    def test_unknown_keys_are_passed_over_until_3_53(self):
        self.assertEqual(202, self.create(version='3.52', colour=1).status)
        self.assertEqual(400, self.create(version='3.53', colour=1).status)

    def test_what_is_not_there_is_said_not_to_be(self):
        self.assertEqual(501, self.create(backup_id=ids.new()).status)
        self.assertEqual(501, self.create(group_id=ids.new()).status)
        self.assertEqual(400, self.create(multiattach=True).status)
        self.assertEqual(
            400, self.create(availability_zone='elsewhere').status
        )
        self.assertEqual(202, self.create(availability_zone='nova').status)

    def test_the_same_request_with_the_same_id_is_the_same_volume(self):
        wanted = ids.new()
        for header in 'X-Volume-Id', 'Idempotency-Key':
            made = self.create(headers={header: wanted}, name='a')
            self.assertEqual(202, made.status, made.text)
            self.assertEqual(wanted, made.json['volume']['id'])
        other = self.create(headers={'X-Volume-Id': wanted}, name='b')
        self.assertEqual(409, other.status)
        listed = self.ask('GET', '/v3/volumes').json['volumes']
        self.assertEqual(1, len(listed))
        self.world.settled(wanted)
        self.ask('DELETE', f'/v3/volumes/{wanted}')
        self.world.gone(wanted)
        again = self.create(headers={'X-Volume-Id': wanted}, name='a')
        self.assertEqual(409, again.status)
        self.assertIn('was deleted', again.message)

    def test_a_volume_grows_and_never_shrinks(self):
        row = self.world.make(size=1)
        path = f'/v3/volumes/{row["id"]}/action'
        self.assertEqual(400, self.ask(
            'POST', path, {'os-extend': {'new_size': 1}}).status)
        self.assertEqual(202, self.ask(
            'POST', path, {'os-extend': {'new_size': 2}}).status)
        row = self.world.settled(row['id'])
        self.assertEqual((2, 'available'), (row['size'], row['status']))
        self.assertEqual(413, self.ask(
            'POST', path, {'os-extend': {'new_size': 9}}).status)

    def test_the_wrong_state_is_a_bad_request(self):
        row = self.world.make(size_bytes=512, size=None)
        path = f'/v3/volumes/{row["id"]}/action'
        self.assertEqual(
            202, self.ask('POST', path, {'os-reserve': None}).status
        )
        again = self.ask('POST', path, {'os-reserve': None})
        self.assertEqual((400, 'badRequest'), (again.status, again.fault))
        self.assertEqual(
            202, self.ask('POST', path, {'os-unreserve': None}).status
        )

    def test_metadata_is_merged_replaced_and_removed(self):
        row = self.world.make(size_bytes=512, size=None,
                              metadata={'a': '1'})
        path = f'/v3/volumes/{row["id"]}/metadata'
        self.assertEqual({'a': '1', 'b': '2'}, self.ask(
            'POST', path, {'metadata': {'b': '2'}}).json['metadata'])
        self.assertEqual({'meta': {'b': '2'}},
                         self.ask('GET', f'{path}/b').json)
        self.assertEqual(200, self.ask('DELETE', f'{path}/a').status)
        self.assertEqual(404, self.ask('DELETE', f'{path}/a').status)
        self.assertEqual(200, self.ask(
            'PUT', f'{path}/b', {'meta': {'b': '3'}}).status)
        self.assertEqual(400, self.ask(
            'PUT', f'{path}/b', {'meta': {'c': '3'}}).status)
        self.assertEqual({'c': '4'}, self.ask(
            'PUT', path, {'metadata': {'c': '4'}}).json['metadata'])
        self.assertEqual({'metadata': {'c': '4'}},
                         self.ask('GET', path).json)

    def test_metadata_that_has_changed_meanwhile_is_not_overwritten(self):
        row = self.world.make(size_bytes=512, size=None)
        path = f'/v3/volumes/{row["id"]}/metadata'
        seen = self.ask('GET', path).headers['ETag']
        new = {'metadata': {'a': '1'}}
        first = self.ask('PUT', path, new, headers={'If-Match': seen})
        self.assertEqual(200, first.status)
        second = self.ask('PUT', path, new, headers={'If-Match': seen})
        self.assertEqual(412, second.status)

    def test_an_image_is_read_and_a_volume_uploaded(self):
        data = os.urandom(model.MIB)
        source = os.path.join(self.world.images, 'source.raw')
        with open(source, 'wb') as f:
            f.write(data)
        made = self.create(
            size=None, size_bytes=model.MIB, imageRef=f'file://{source}',
            hints={
                'image_format': 'raw',
                'image_checksum':
                    f'sha256:{hashlib.sha256(data).hexdigest()}',
            },
        )
        self.assertEqual(202, made.status, made.text)
        row = self.world.settled(made.json['volume']['id'])
        self.assertEqual('available', row['status'], row['reason'])
        self.assertEqual('true', row['bootable'])
        self.assertEqual('raw', row['volume_image_metadata']['disk_format'])
        path = f'/v3/volumes/{row["id"]}/action'
        for key, code in (('disk_format', 200), ('disk_format', 404)):
            asked = self.ask('POST', path, {
                'os-unset_image_metadata': {'key': key},
            })
            self.assertEqual(code, asked.status, asked.text)
        asked = self.ask('POST', path, {
            'os-set_image_metadata': {'metadata': {'image_name': 'mine'}},
        })
        self.assertEqual(
            {'image_name': 'mine', 'container_format': 'bare'},
            {key: said for key, said in asked.json['metadata'].items()
             if key in ('image_name', 'container_format', 'disk_format')},
        )
        asked = self.ask('POST', path, {
            'os-set_image_metadata': {'metadata': {'image_name': None}},
        })
        self.assertEqual(400, asked.status)
        target = os.path.join(self.world.images, 'target.raw')
        asked = self.ask('POST', path, {'os-volume_upload_image': {
            'image_name': f'file://{target}', 'disk_format': 'raw',
            'container_format': 'bare', 'force': False,
        }})
        self.assertEqual(202, asked.status, asked.text)
        told = asked.json['os-volume_upload_image']
        self.assertEqual('uploading', told['status'])
        self.assertEqual('available', self.world.settled(row['id'])['status'])
        with open(target, 'rb') as f:
            self.assertEqual(data, f.read())
        refused = self.ask('POST', path, {'os-volume_upload_image': {
            'image_name': 'plain',
        }})
        self.assertEqual(400, refused.status)

    def test_jobs_are_listed_shown_and_refuse_to_be_undone_twice(self):
        row = self.world.make(size_bytes=512, size=None)
        listed = self.ask(
            'GET', f'/v3/os-volume-jobs?volume_id={row["id"]}'
        ).json['jobs']
        self.assertEqual([('create', 'done')], [
            (each['kind'], each['state']) for each in listed
        ])
        path = f'/v3/os-volume-jobs/{listed[0]["id"]}'
        self.assertEqual(listed[0], self.ask('GET', path).json['job'])
        for action in 'os-cancel', 'os-retry':
            asked = self.ask('POST', f'{path}/action', {action: None})
            self.assertEqual(400, asked.status)
            self.assertIn('has ended', asked.message)
        self.assertEqual([], self.ask(
            'GET', '/v3/os-volume-jobs?state=open').json['jobs'])
        self.assertEqual(404, self.ask(
            'GET', f'/v3/os-volume-jobs/{ids.new()}').status)

    def test_a_foreign_file_is_adopted_and_let_go(self):
        path = os.path.join(self.world.pool, 'foreign.raw')
        with open(path, 'wb') as f:
            f.write(os.urandom(4096))
        asked = self.ask('POST', '/v3/os-volume-manage', {'volume': {
            'host': 'node-1@fast#pool', 'ref': {'source-name': 'foreign.raw'},
            'name': 'mine', 'bootable': False, 'volume_type': None,
        }})
        self.assertEqual(202, asked.status, asked.text)
        self.assertEqual('creating', asked.json['volume']['status'])
        row = self.world.settled(asked.json['volume']['id'])
        self.assertEqual(
            ('available', 4096), (row['status'], row['size_bytes'])
        )
        self.assertEqual(202, self.ask(
            'POST', f'/v3/volumes/{row["id"]}/action', {'os-unmanage': {}},
        ).status)
        self.world.gone(row['id'])
        for host in 'fast#none', 'none#pool', '', 'none':
            asked = self.ask('POST', '/v3/os-volume-manage', {'volume': {
                'host': host, 'ref': {'source-name': 'x.raw'},
            }})
            self.assertIn(asked.status, (400, 404), host)

    def test_what_clients_ask_about_the_service_is_answered(self):
        row = self.world.make(size=1)
        used = self.ask('GET', '/v3/limits').json['limits']['absolute']
        self.assertEqual((1, 1, -1), (
            used['totalVolumesUsed'], used['totalGigabytesUsed'],
            used['maxTotalVolumes'],
        ))
        quota = self.ask(
            'GET', '/v3/os-quota-sets/default?usage=True'
        ).json['quota_set']
        self.assertEqual(
            {'limit': -1, 'in_use': 1, 'reserved': 0}, quota['gigabytes']
        )
        zones = self.ask('GET', '/v3/os-availability-zone').json
        self.assertEqual('nova', zones['availabilityZoneInfo'][0]['zoneName'])
        (pool,) = self.ask(
            'GET', '/v3/scheduler-stats/get_pools?detail=true'
        ).json['pools']
        self.assertEqual('node-1@fast#pool', pool['name'])
        self.assertEqual(
            1.0, pool['capabilities']['allocated_capacity_gb']
        )
        services = self.ask('GET', '/v3/os-services').json['services']
        self.assertEqual(
            [('cinder-scheduler', 'up'), ('cinder-volume', 'up')],
            [(each['binary'], each['state']) for each in services],
        )
        (backend,) = self.ask('GET', '/v3/os-volume-backends').json['backends']
        self.assertEqual(('up', ''), (backend['state'], backend['reason']))
        self.assertEqual(
            model.GIB, backend['pools'][0]['claimed_bytes']
        )
        self.assertEqual(
            {'encryption_key_id': None},
            self.ask('GET', f'/v3/volumes/{row["id"]}/encryption').json,
        )
        aliases = {each['alias'] for each in
                   self.ask('GET', '/v3/extensions').json['extensions']}
        self.assertIn('os-volume-actions', aliases)
        told = self.ask('GET', '/v3/volumes/summary').json['volume-summary']
        self.assertEqual((1, 1), (told['total_count'], told['total_size']))

    def test_an_operator_sets_a_status_and_deletes_by_force(self):
        row = self.world.make(size_bytes=512, size=None)
        path = f'/v3/volumes/{row["id"]}/action'
        self.assertEqual(202, self.ask(
            'POST', path, {'os-reset_status': {'status': 'attaching'}}
        ).status)
        self.assertEqual(400, self.ask(
            'DELETE', f'/v3/volumes/{row["id"]}').status)
        self.assertEqual(400, self.ask(
            'POST', path, {'os-reset_status': {'attach_status': 'x'}}
        ).status)
        self.assertEqual(202, self.ask(
            'POST', path, {'os-force_delete': None}).status)
        self.world.gone(row['id'])

    def test_force_is_a_word_of_version_3_23(self):
        row = self.world.make(size_bytes=512, size=None)
        path = f'/v3/volumes/{row["id"]}?force=true'
        self.assertEqual(400, self.ask('DELETE', path, version='3.22').status)
        self.assertEqual(202, self.ask('DELETE', path, version='3.23').status)
        self.world.gone(row['id'])


class Snapshots(unittest.TestCase):
    """On a file system whose files can share blocks."""

    def setUp(self):
        self.world = serving.World(self, snapshots=True)
        self.ask = self.world.ask
        self.volume = self.world.make(size=None, size_bytes=model.MIB)

    def take(self, version='3.54', headers=None, **snapshot):
        return self.ask('POST', '/v3/snapshots', {
            'snapshot': {'volume_id': self.volume['id'], **snapshot},
        }, version=version, headers=headers)

    def test_a_snapshot_is_taken_shown_renamed_and_deleted(self):
        asked = self.take(name='s', metadata={'a': 'b'}, force=False)
        self.assertEqual(202, asked.status, asked.text)
        made = asked.json['snapshot']
        self.assertEqual(
            ('creating', '0%', 1, self.volume['id']),
            (made['status'],
             made['os-extended-snapshot-attributes:progress'],
             made['size'], made['volume_id']),
        )
        path = f'/v3/snapshots/{made["id"]}'
        row = self.world.settled(made['id'], 'snapshot')
        self.assertEqual('available', row['status'])
        self.assertEqual(
            '100%', row['os-extended-snapshot-attributes:progress']
        )
        changed = self.ask('PUT', path, {'snapshot': {'name': 't'}})
        self.assertEqual('t', changed.json['snapshot']['name'])
        self.assertEqual({'metadata': {'a': 'b', 'c': 'd'}}, self.ask(
            'POST', f'{path}/metadata', {'metadata': {'c': 'd'}}).json)
        self.assertEqual([made['id']], [
            each['id'] for each in self.ask(
                'GET', f'/v3/snapshots/detail?volume_id={self.volume["id"]}'
            ).json['snapshots']
        ])
        self.assertEqual(202, self.ask('DELETE', path).status)
        self.world.gone(made['id'], 'snapshot')

    def test_a_snapshot_knows_no_other_words(self):
        self.assertEqual(400, self.take(colour='red').status)
        self.assertEqual(400, self.ask('POST', '/v3/snapshots', {
            'snapshot': {'name': 'x'}}).status)
        self.assertEqual(404, self.take(volume_id=ids.new()).status)

    def test_the_same_request_with_the_same_id_is_the_same_snapshot(self):
        headers = {'Idempotency-Key': ids.new()}
        first = self.take(headers=headers).json['snapshot']
        second = self.take(headers=headers).json['snapshot']
        self.assertEqual(headers['Idempotency-Key'], first['id'])
        self.assertEqual(first['id'], second['id'])

    def test_a_volume_goes_back_and_a_clone_keeps_its_bytes(self):
        path = os.path.join(self.world.pool, f'{self.volume["id"]}.raw')
        with open(path, 'r+b') as f:
            f.write(b'before')
        snapshot = self.take().json['snapshot']
        self.world.settled(snapshot['id'], 'snapshot')
        with open(path, 'r+b') as f:
            f.write(b'after!')
        clone = self.world.make(size=None, snapshot_id=snapshot['id'])
        self.assertEqual(snapshot['id'], clone['snapshot_id'])
        clone_path = os.path.join(self.world.pool, f'{clone["id"]}.raw')
        with open(clone_path, 'rb') as f:
            self.assertEqual(b'before', f.read(6))
        body = {'revert': {'snapshot_id': snapshot['id']}}
        action = f'/v3/volumes/{self.volume["id"]}/action'
        self.assertEqual(
            404, self.ask('POST', action, body, version='3.39').status
        )
        self.assertEqual(
            202, self.ask('POST', action, body, version='3.40').status
        )
        self.world.settled(self.volume['id'])
        with open(path, 'rb') as f:
            self.assertEqual(b'before', f.read(6))

    def test_a_volume_with_snapshots_goes_with_them_or_not_at_all(self):
        snapshot = self.take().json['snapshot']
        self.world.settled(snapshot['id'], 'snapshot')
        path = f'/v3/volumes/{self.volume["id"]}'
        self.assertEqual(400, self.ask('DELETE', path).status)
        self.assertEqual(
            202, self.ask('DELETE', f'{path}?cascade=true').status
        )
        self.world.gone(self.volume['id'])
        self.world.gone(snapshot['id'], 'snapshot')
