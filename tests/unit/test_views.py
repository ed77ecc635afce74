# SPDX-License-Identifier: Apache-2.0
"""What rows look like from outside, and how requests are read."""

import dataclasses
import datetime
import unittest

from volume import core as cores
from volume import errors
from volume import model
from volume.api import fields
from volume.api import microversions
from volume.api import routes
from volume.api import views
from volume.api.call import Call
from volume.api.call import Limits
from volume.api.faults import body
from volume.api.faults import Refused
from volume.api.faults import refused
from volume.context import Caller
from volume.db import models
from volume.verbs import lookup

ID = '0c6c1e3e-7d0a-4a55-9b3a-9a2a5c3f6f10'
OTHER = '5b1a3d02-2b4e-4f0e-8a75-0d4c0f5b7a11'


def a_call(minor=0, is_admin=False, roles=('member',)):
    unused = cores.Core(db=None, hint=None, wait=None)
    return Call(
        core=unused, caller=Caller('p', 'u', is_admin, 'req-1'),
        roles=frozenset(roles), minor=minor, path={}, query={}, headers={},
        body=None, base_url='http://here', project_path='/p',
        route_path='/volumes', limits=Limits(),
    )


def a_volume(**changes):
    values = {
        'id': ID, 'project_id': 'p', 'user_id': 'u', 'name': 'n',
        'description': '', 'meta': {}, 'status': 'available', 'reason': '',
        'backend': 'fast', 'pool': 'one', 'handle': 'h',
        'size_bytes': model.GIB, 'availability_zone': 'nova',
        'volume_type': '', 'bootable': False, 'multiattach': False,
        'readonly': False, 'image': {},
        'created_at': 1543474207.770785, 'updated_at': 1543474207.0,
    }
    return models.Volume(**{**values, **changes})


def shown(row, attachments=(), **call):
    return views.volume(
        a_call(**call), lookup.VolumeSeen(row, attachments, 'node-1')
    )


class Sizes(unittest.TestCase):
    """A GiB is known here and nowhere else."""

    def test_a_volume_never_looks_smaller_than_it_is(self):
        self.assertEqual([1, 1, 1, 2, 2], [
            views.gib(size) for size in (
                512, model.GIB - 512, model.GIB, model.GIB + 512,
                2 * model.GIB,
            )
        ])

    def test_gibibytes_come_back_as_the_same_number(self):
        for size in 1, 2, 1023, 1 << 30:
            self.assertEqual(size, views.gib(views.from_gib(size)))

    def test_a_size_without_reason_is_refused(self):
        with self.assertRaisesRegex(errors.Invalid, 'over every limit'):
            views.from_gib((1 << 30) + 1)

    def test_sums_round_each_thing_up_before_adding(self):
        self.assertEqual(5, views.total_gib({512: 3, 2 * model.GIB: 1}))


class Volumes(unittest.TestCase):

    def test_times_have_microseconds_and_no_zone(self):
        self.assertEqual(
            '2018-11-29T06:50:07.770785', shown(a_volume())['created_at']
        )
        self.assertEqual(
            '2018-11-29T06:50:07.000000', shown(a_volume())['updated_at']
        )
        self.assertIsNone(views.when(None))

    def test_times_are_read_back_exactly(self):
        text = views.when(1700000000.25)
        read = datetime.datetime.fromisoformat(text + '+00:00')
        self.assertEqual(1700000000.25, read.timestamp())

    def test_bootable_is_a_text_and_encrypted_is_not(self):
        row = shown(a_volume(bootable=True))
        self.assertEqual('true', row['bootable'])
        self.assertEqual('false', shown(a_volume())['bootable'])
        self.assertIs(False, row['encrypted'])

    def test_links_carry_the_project_as_the_request_did(self):
        self.assertEqual(
            [f'http://here/v3/p/volumes/{ID}', f'http://here/p/volumes/{ID}'],
            [link['href'] for link in shown(a_volume())['links']],
        )

    def test_a_type_is_shown_for_a_volume_that_wished_none(self):
        self.assertEqual('__DEFAULT__', shown(a_volume())['volume_type'])

    def test_adopting_is_shown_in_words_that_clients_know(self):
        self.assertEqual(
            ['creating', 'error', 'deleting', 'in-use'],
            [
                shown(a_volume(status=status))['status'] for status in (
                    'managing', 'error_managing', 'error_managing_deleting',
                    'in-use',
                )
            ],
        )

    def test_only_hosts_that_have_attached_are_listed(self):
        rows = [
            models.Attachment(
                id=OTHER, volume_id=ID, status=status, host='h',
                instance_uuid=None, mountpoint='/dev/vdb', attached_at=1.0,
            )
            for status in ('reserved', 'attaching', 'attached', 'detaching')
        ]
        row = shown(a_volume(), rows)
        self.assertEqual([OTHER], [
            each['attachment_id'] for each in row['attachments']
        ])
        self.assertEqual(ID, row['attachments'][0]['id'])

    def test_a_host_is_named_to_administrators_and_services_only(self):
        rows = [models.Attachment(
            id=OTHER, volume_id=ID, status='attached', host='h'
        )]
        for roles, is_admin, name in (
            (['member'], False, None), (['service'], False, 'h'),
            (['admin'], True, 'h'),
        ):
            row = shown(a_volume(), rows, roles=roles, is_admin=is_admin)
            self.assertEqual(name, row['attachments'][0]['host_name'])

    def test_where_a_volume_lies_is_the_administrators_to_know(self):
        key = 'os-vol-host-attr:host'
        self.assertNotIn(key, shown(a_volume()))
        self.assertEqual(
            'node-1@fast#one', shown(a_volume(), is_admin=True)[key]
        )
        self.assertIsNone(
            shown(a_volume(backend=''), is_admin=True)[key]
        )

    def test_newer_fields_appear_with_their_version(self):
        for minor, key in (
            (13, 'group_id'), (21, 'provider_id'), (48, 'shared_targets'),
            (48, 'service_uuid'),
        ):
            before = shown(a_volume(), minor=minor - 1, is_admin=True)
            after = shown(a_volume(), minor=minor, is_admin=True)
            self.assertNotIn(key, before)
            self.assertIn(key, after)

    def test_an_images_secrets_are_not_shown(self):
        row = shown(a_volume(image={
            'url': 'https://me:secret@images.example/a.qcow2?sig=secret#x',
            'format': 'qcow2',
        }))
        about = row['volume_image_metadata']
        self.assertEqual('https://images.example/a.qcow2', about['image_url'])
        self.assertNotIn('secret', str(row))
        self.assertEqual('qcow2', about['disk_format'])

    def test_a_read_only_volume_says_so_in_its_metadata(self):
        row = a_volume(readonly=True, meta={'a': 'b'})
        self.assertEqual(
            {'a': 'b', 'readonly': 'True'}, shown(row)['metadata']
        )
        self.assertEqual({'a': 'b'}, row.meta)


class Attachments(unittest.TestCase):

    def test_a_connection_is_flat_and_names_its_driver(self):
        row = models.Attachment(
            id=OTHER, volume_id=ID, status='attached', mode='ro',
            is_connected=True, connector={'host': 'h'}, instance_uuid=None,
            connection={
                'driver_volume_type': 'nbd', 'data': {'url': 'nbd://x'},
            },
        )
        info = views.attachment(row)['connection_info']
        self.assertEqual('nbd', info['driver_volume_type'])
        self.assertEqual('nbd://x', info['url'])
        self.assertEqual(OTHER, info['attachment_id'])
        self.assertEqual('ro', info['access_mode'])

    def test_which_host_has_it_is_told_to_whom_a_volume_tells_it(self):
        row = models.Attachment(
            id=OTHER, volume_id=ID, status='attached', mode='rw', host='h1',
            is_connected=True, connector={'host': 'h1'}, connection={},
        )
        self.assertIsNone(views.attachment(row)['host'])
        self.assertEqual('h1', views.attachment(row, is_trusted=True)['host'])

    def test_what_was_never_connected_has_no_connection(self):
        row = models.Attachment(
            id=OTHER, volume_id=ID, status='reserved', mode='rw',
            is_connected=False, connector={}, connection={},
        )
        view = views.attachment(row)
        self.assertEqual({}, view['connection_info'])
        self.assertEqual(('', ''), (view['attached_at'], view['detached_at']))


class Faults(unittest.TestCase):
    """Our kinds of errors, in the words of Cinder's API."""

    def test_every_kind_has_a_status_and_a_fault(self):
        expected = {
            'Invalid': (400, 'badRequest'), 'Denied': (403, 'forbidden'),
            'NotFound': (404, 'itemNotFound'),
            'Conflict': (409, 'conflictingRequest'),
            'Busy': (409, 'conflictingRequest'),
            'Cancelled': (409, 'conflictingRequest'),
            'NoSpace': (413, 'overLimit'),
            'Corrupt': (500, 'computeFault'),
            'Unsupported': (501, 'notImplemented'),
            'Unavailable': (503, 'serviceUnavailable'),
            'Unknown': (503, 'serviceUnavailable'),
        }
        self.assertEqual(expected, {
            name: (said.status, *body(said))
            for name, kind in errors.KINDS.items()
            for said in [refused(kind('why'))]
        })

    def test_a_kind_below_a_kind_is_that_kind(self):
        self.assertEqual(409, refused(cores.LeaseTaken('held')).status)

    def test_no_space_tells_when_to_come_back_as_clients_expect(self):
        said = refused(errors.NoSpace('no pool fits: 3 without the tags'))
        self.assertEqual('0', said.headers['Retry-After'])
        self.assertEqual(
            {'overLimit': {
                'code': 413, 'message': 'no pool fits: 3 without the tags',
                'retryAfter': '0',
            }},
            body(said),
        )


class Versions(unittest.TestCase):

    def test_a_header_is_read_as_clients_send_it(self):
        for header, minor in (
            (None, 0), ('', 0), ('volume 3.0', 0), ('volume 3.27', 27),
            ('Volume 3.54', 54), ('volume latest', 59),
            ('compute 2.1, volume 3.44', 44), ('compute 2.1', 0),
        ):
            self.assertEqual(minor, microversions.negotiate(header), header)

    def test_no_version_is_refused_as_such(self):
        for header in 'volume', 'volume 3', 'volume 3.x', 'volume -3.1', (
            'volume 3.1 3.2'
        ), 'volume ٣.١':
            with self.assertRaises(Refused, msg=header) as said:
                microversions.negotiate(header)
            self.assertEqual(400, said.exception.status, header)

    def test_a_version_that_is_not_there_is_not_acceptable(self):
        for header in 'volume 3.60', 'volume 2.0', 'volume 4.1':
            with self.assertRaises(Refused) as said:
                microversions.negotiate(header)
            self.assertEqual(406, said.exception.status, header)


class Routes(unittest.TestCase):

    def test_a_path_works_with_and_without_a_project(self):
        for path, project_id in (
            (f'/volumes/{ID}', ''), (f'/p/volumes/{ID}', 'p'),
        ):
            found = routes.match('GET', path, 0)
            self.assertEqual(project_id, found.project_id)
            self.assertEqual({'volume_id': ID}, found.params)
            self.assertEqual(f'/volumes/{ID}', found.path)

    def test_a_fixed_word_wins_over_an_id(self):
        found = routes.match('GET', '/volumes/detail', 0)
        self.assertEqual({}, found.params)

    def test_a_wrong_method_names_the_right_ones(self):
        with self.assertRaises(Refused) as said:
            routes.match('PATCH', f'/volumes/{ID}', 0)
        self.assertEqual(405, said.exception.status)
        self.assertEqual('DELETE, GET, PUT', said.exception.headers['Allow'])

    def test_what_is_no_path_is_not_found(self):
        for path in '/', '//', '/p', '/p/', '/volumes//action', '/p/q/r', (
            f'/volumes/{ID}/'
        ) + 'x/y':
            with self.assertRaises(Refused, msg=path) as said:
                routes.match('GET', path, 54)
            self.assertEqual(404, said.exception.status, path)

    def test_a_route_is_not_there_before_its_version(self):
        with self.assertRaises(Refused) as said:
            routes.match('GET', '/attachments', 26)
        self.assertEqual(404, said.exception.status)
        routes.match('GET', '/attachments', 27)


class Bodies(unittest.TestCase):

    def test_json_comes_through(self):
        self.assertEqual(
            {'a': [1, 'é', None]}, fields.parse('{"a":[1,"é",null]}'.encode())
        )

    def test_what_no_database_can_keep_is_refused(self):
        for raw in (
            b'', b'\xff', b'{', b'nul', b'{"a":NaN}', b'{"a":1e999}',
            b'{"a":-Infinity}', b'{"a":"\\u0000"}', b'{"a":"\\ud800"}',
            b'{"\\udfff":1}', b'9' * 5000, b'9223372036854775808',
            b'[' * 50000, b'{"a":' * 13 + b'1' + b'}' * 13,
        ):
            with self.assertRaises(errors.Invalid, msg=raw[:40]):
                fields.parse(raw)

    def test_depth_is_allowed_up_to_the_limit(self):
        deep = b'{"a":' * 11 + b'1' + b'}' * 11
        self.assertIsInstance(fields.parse(deep), dict)

    def test_whole_numbers_are_whole(self):
        self.assertEqual(12, fields.whole('12', 'size'))
        self.assertEqual(12, fields.whole(12, 'size'))
        for value in (
            0, -1, 1.5, True, '', '1.0', '-1', ' 1', '١', '1' * 30, None,
            [], {}, 1 << 62,
        ):
            with self.assertRaises(errors.Invalid, msg=value):
                fields.whole(value, 'size')

    def test_flags_are_read_in_every_way_that_clients_write_them(self):
        for value in True, 'true', 'True', 1, '1', 'yes', 'on':
            self.assertIs(True, fields.flag(value, 'x'))
        for value in False, 'FALSE', 0, '0', 'no':
            self.assertIs(False, fields.flag(value, 'x'))
        for value in 'maybe', 2, '', [], {}, ['true']:
            with self.assertRaises(errors.Invalid, msg=value):
                fields.flag(value, 'x')

    def test_a_header_that_chooses_an_id_must_be_one(self):
        call = dataclasses.replace(
            a_call(), headers={'Idempotency-Key': f'"{ID.upper()}"'}
        )
        self.assertEqual(ID, call.minted_id('X-Volume-Id', 'Idempotency-Key'))
        call = dataclasses.replace(a_call(), headers={'X-Volume-Id': '../x'})
        with self.assertRaises(errors.Invalid):
            call.minted_id('X-Volume-Id')
