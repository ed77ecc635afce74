# SPDX-License-Identifier: Apache-2.0
"""Volumes, snapshots and jobs through the REST door of a real service."""

import hashlib
import os
import unittest
import urllib.parse

from tests.integration import serving
from volume import ids
from volume import model
from volume.db import engine
from volume.db import models

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
        self.assertEqual('no pool fits: capacity -1', asked.message)
        self.assertEqual('0', asked.headers['Retry-After'])
        listed = self.ask('GET', '/v3/volumes').json['volumes']
        self.assertEqual([], listed)

    def test_hints_choose_the_pool_and_others_are_refused(self):
        self.assertEqual(202, self.create(hints={
            'tags': ['ssd'], 'backend': 'fast', 'pool': 'pool',
        }).status)
        self.assertEqual(202, self.create(hints={'tags': 'ssd,local'}).status)
        asked = self.create(hints={'tags': ['tape']})
        self.assertEqual('no pool fits: tags -1', asked.message)
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
        target = os.path.join(self.world.images, 'target.raw')
        path = f'/v3/volumes/{row["id"]}/action'
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


class Lists(unittest.TestCase):
    """Paging, filters and order, on one filled service."""

    def setUp(self):
        self.world = serving.World(self)
        self.ask = self.world.ask
        self.ids = [
            self.world.make(
                size=None, size_bytes=512 * (9 - number), name=f'v{number}',
                metadata={'n': str(number), 'even': str(number % 2 == 0)},
            )['id']
            for number in range(5)
        ]

    def listed(self, query='', path='/v3/volumes/detail', **options):
        asked = self.ask('GET', f'{path}?{query}', **options)
        self.assertEqual(200, asked.status, asked.text)
        return [each['id'] for each in asked.json['volumes']]

    def test_the_newest_comes_first(self):
        self.assertEqual(self.ids[::-1], self.listed())

    def test_a_list_without_details_has_ids_names_and_links(self):
        asked = self.ask('GET', '/v3/volumes')
        self.assertEqual(
            {'id', 'name', 'links'}, set(asked.json['volumes'][0])
        )

    def test_pages_follow_each_other_to_the_end(self):
        seen, path = [], '/v3/volumes?limit=2&sort=name:asc'
        while path:
            page = self.ask('GET', path).json
            seen.append([each['name'] for each in page['volumes']])
            links = page.get('volumes_links')
            path = links[0]['href'].removeprefix('http://localhost') if (
                links) else None
        self.assertEqual([['v0', 'v1'], ['v2', 'v3'], ['v4']], seen)

    def test_a_page_goes_on_where_the_last_one_ended_whatever_was_deleted(
        self,
    ):
        first = self.ask('GET', '/v3/volumes?limit=2').json
        last = first['volumes'][-1]['id']
        self.ask('DELETE', f'/v3/volumes/{last}')
        self.world.gone(last)
        self.assertEqual(
            self.ids[2::-1], self.listed(f'marker={last}')
        )

    def test_ties_are_never_split_wrongly(self):
        seen, marker = [], ''
        while True:
            page = self.listed(
                f'limit=1&sort=status:asc{marker}', path='/v3/volumes'
            )
            if not page:
                break
            seen += page
            marker = f'&marker={page[-1]}'
        self.assertEqual(sorted(self.ids), sorted(seen))

    def test_an_unknown_marker_is_not_found(self):
        self.assertEqual(
            404, self.ask('GET', f'/v3/volumes?marker={ids.new()}').status
        )
        self.assertEqual(400, self.ask('GET', '/v3/volumes?marker=x').status)

    def test_offset_and_limit_are_counted(self):
        self.assertEqual(
            self.ids[::-1][1:3], self.listed('offset=1&limit=2')
        )
        self.assertEqual([], self.listed('limit=0'))
        for query in 'limit=-1', 'limit=x', 'offset=-1', 'offset=1.5':
            self.assertEqual(
                400, self.ask('GET', f'/v3/volumes?{query}').status, query
            )

    def test_filters_choose(self):
        for query, numbers in (
            ('name=v3', [3]), ('display_name=v3', [3]), ('name=v9', []),
            ('status=available', [4, 3, 2, 1, 0]), ('status=error', []),
            ('bootable=true', []), ('bootable=False', [4, 3, 2, 1, 0]),
            (f'id={self.ids[2]}', [2]), ('backend=fast&name=v1', [1]),
            (urllib.parse.urlencode({'metadata': {'n': '2'}}), [2]),
            (urllib.parse.urlencode({'metadata': {
                'even': 'True', 'n': '4'}}), [4]),
            ('metadata={"even":"False"}', [3, 1]),
        ):
            self.assertEqual(
                [self.ids[number] for number in numbers],
                self.listed(query), query,
            )

    def test_a_filter_finds_a_part_from_3_34_on(self):
        self.assertEqual([self.ids[3]], self.listed('name~=3'))
        self.assertEqual([], self.listed('name~=%25'))
        self.assertEqual(400, self.ask(
            'GET', '/v3/volumes?name~=3', version='3.33').status)

    def test_a_filter_that_is_not_known_is_refused_not_ignored(self):
        for query in (
            'colour=red', 'metadata=x', 'metadata={}', 'bootable=maybe',
            'metadata={"a":1}', 'bootable~=t', 'metadata~={"n":"2"}',
            'all_tenants=maybe', 'size=1', "metadata={'a\"b':'c'}",
        ):
            self.assertEqual(
                400, self.ask('GET', f'/v3/volumes?{query}').status, query
            )

    def test_order_is_by_any_known_key(self):
        self.assertEqual(self.ids, self.listed('sort=name:asc'))
        self.assertEqual(self.ids[::-1], self.listed('sort=name'))
        self.assertEqual(self.ids[::-1], self.listed('sort=size:asc'))
        self.assertEqual(
            self.ids, self.listed('sort_key=display_name&sort_dir=asc')
        )
        for query in (
            'sort=colour', 'sort=name:up', 'sort=name&sort_key=name',
            'sort=' + ','.join(['name'] * 9), 'sort_dir=x',
        ):
            self.assertEqual(
                400, self.ask('GET', f'/v3/volumes?{query}').status, query
            )

    def test_the_count_is_of_all_that_fit(self):
        for query, minor, count in (
            ('limit=1&with_count=true', 45, 5),
            ('name=v1&with_count=true', 45, 1),
            ('limit=1', 45, None), ('with_count=true', 44, None),
        ):
            asked = self.ask(
                'GET', f'/v3/volumes?{query}', version=f'3.{minor}'
            )
            self.assertEqual(count, asked.json.get('count'), query)

    def test_a_list_of_a_thousand_costs_five_statements_at_most(self):
        self.world.core.db.write(lambda session: session.add_all(
            row for number in range(995) for row in a_used_volume(number)
        ))
        with engine.statements(self.world.core.db.engine) as seen:
            asked = self.ask('GET', '/v3/volumes/detail?with_count=true')
        self.assertLessEqual(len(seen), 5, seen)
        page = asked.json
        self.assertEqual((1000, 1000), (page['count'], len(page['volumes'])))
        self.assertNotIn('volumes_links', page)
        self.assertEqual(995, sum(
            len(each['attachments']) for each in page['volumes']
        ))


def a_used_volume(number):
    """Return the rows of a volume that a host has."""
    volume_id = ids.new()
    return models.Volume(
        id=volume_id, project_id='default', user_id='u', name=f'n{number}',
        status='in-use', size_bytes=512, created_at=float(number),
        updated_at=0.0,
    ), models.Attachment(
        id=ids.new(), volume_id=volume_id, project_id='default',
        backend='fast', status='attached', host='h', created_at=0.0,
    )


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
