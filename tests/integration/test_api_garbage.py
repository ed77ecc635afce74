# SPDX-License-Identifier: Apache-2.0
"""Whatever arrives, the answer is a fault of the caller's, and short."""

import logging
import random
import re
import unittest

import webob

from tests.integration import serving
from volume import conf as options
from volume import core as cores
from volume.api import app
from volume.api import auth
from volume.api import routes
from volume.api.call import Limits
from volume.db.engine import Database
from volume.testing import fixtures

SEED = 20250607
VALUES = (
    None, True, False, 0, 1, -1, 1.5, 1e308, 2**62, -2**63, '', 'x', '1',
    'a' * 300, 'é', '\x01', '%00', "'; DROP TABLE volumes; --", '../../etc',
    'file:///etc/shadow', 'http://127.0.0.1:1/x', '${jndi}', [], [[]],
    ['x'] * 200, {}, {'a': 'b'}, {'a': {'a': {'a': 1}}}, {'': ''},
    {'host': 'h'}, {'host': []}, {'host': 'h' * 300}, {'k' * 300: 'v'},
    {f'k{number}': 'v' for number in range(200)},
    '00000000-0000-0000-0000-000000000000',
)
QUERIES = (
    'limit=x', 'limit=-1', 'limit=99999999999999999999', 'offset=' + '9' * 30,
    'marker=%00', 'marker=%ff', '%ff=1', 'sort=%ed%a0%80', 'name=%00',
    'metadata=' + '(' * 1500, 'metadata=' + '[' * 2000, 'name~=%', '&&&', '=',
    'metadata={"a":"' + 'b' * 2000 + '"}', 'all_tenants=[]', 'a=1&' * 100,
    'metadata=' + '-' * 2000 + '1', "metadata={'a':'b'}", 'status=' + 'x' * 9,
    'with_count=2', 'usage=x', 'detail=x', 'cascade=x', 'force=x', 'sort=:',
    'created_at=gt:2020', 'sort=id:asc,id:asc', 'marker=' + 'a' * 36,
)
RAW = (
    b'', b'\x00', b'\xff\xfe', b'{', b'[]', b'1', b'"x"', b'null', b'{}',
    b'[' * 40000, b'{"volume":' * 5000, b'{"volume": {"size": NaN}}',
    b'{"volume": {"size": 1e999}}', b'{"volume": {"name": "\\ud800"}}',
    b'{"volume": {"name": "\\u0000"}}', b'9' * 10000, b'{"a":1,"a":2}',
    b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "a">]><volume/>',
)


class Garbage(unittest.TestCase):
    """Never 500, never a traceback, always a fault."""

    def setUp(self):
        self.world = serving.World(self)
        self.random = random.Random(SEED)
        self.volume = self.world.make(size=None, size_bytes=512)['id']

    def check(self, asked, *what):
        self.assertNotIn(asked.status, (500, 502), (*what, asked.text))
        self.assertLess(len(asked.text), 8192, what)
        self.assertNotIn('Traceback', asked.text)
        self.assertNotIn('sqlalchemy', asked.text.lower())
        if asked.status >= 400:
            fault = asked.json[asked.fault]
            self.assertEqual(asked.status, fault['code'])
            self.assertTrue(fault['message'])
            self.assertIn('X-Openstack-Request-Id', asked.headers)

    def paths(self, route):
        for word in (self.volume, 'x', '%ff', '%00', '..', 'a' * 500):
            yield '/v3' + re.sub(r'{\w+}', word, route.path)

    def test_every_route_survives_every_raw_body(self):
        with self.assertNoLogs('volume', logging.ERROR):
            for route in routes.ROUTES:
                if route.method not in ('POST', 'PUT'):
                    continue
                path = next(self.paths(route))
                for raw in RAW:
                    self.check(
                        self.world.ask(route.method, path, raw), path, raw
                    )

    def test_every_route_survives_every_path_and_query(self):
        with self.assertNoLogs('volume', logging.ERROR):
            for route in routes.ROUTES:
                if route.method == 'GET':
                    for path in self.paths(route):
                        self.check(self.world.ask('GET', path), path)
            for path in ('volumes/detail', 'snapshots', 'attachments/detail',
                         'os-volume-jobs', 'os-services', 'limits',
                         'scheduler-stats/get_pools',
                         'os-quota-sets/default'):
                for query in QUERIES:
                    asked = self.world.ask('GET', f'/v3/{path}?{query}')
                    self.check(asked, path, query)
            for query in QUERIES:
                self.check(self.world.ask(
                    'DELETE', f'/v3/snapshots/{self.volume}?{query}'), query)

    def test_every_key_survives_every_value(self):
        action = f'/v3/volumes/{self.volume}/action'
        templates = (
            ('/v3/volumes', 'volume', (
                'size', 'size_bytes', 'name', 'description', 'metadata',
                'snapshot_id', 'source_volid', 'imageRef', 'volume_type',
                'availability_zone', 'multiattach', 'backup_id',
                'OS-SCH-HNT:scheduler_hints',
            )),
            ('/v3/snapshots', 'snapshot', (
                'volume_id', 'name', 'metadata', 'force', 'description',
            )),
            ('/v3/attachments', 'attachment', (
                'volume_uuid', 'instance_uuid', 'connector', 'mode',
            )),
            ('/v3/os-volume-manage', 'volume', ('host', 'ref', 'name')),
            (action, 'os-extend', ('new_size', 'new_size_bytes')),
            (action, 'os-attach', (
                'instance_uuid', 'host_name', 'mountpoint', 'mode',
            )),
            (action, 'os-detach', ('attachment_id',)),
            (action, 'os-force_detach', ('attachment_id', 'connector')),
            (action, 'os-initialize_connection', ('connector',)),
            (action, 'os-terminate_connection', ('connector',)),
            (action, 'os-set_bootable', ('bootable',)),
            (action, 'os-update_readonly_flag', ('readonly',)),
            (action, 'os-reset_status', ('status', 'attach_status')),
            (action, 'revert', ('snapshot_id',)),
            (action, 'os-volume_upload_image', (
                'image_name', 'disk_format', 'container_format', 'force',
            )),
        )
        good = {
            'volume': {'size_bytes': 512}, 'snapshot': {
                'volume_id': self.volume}, 'attachment': {
                'volume_uuid': self.volume},
        }
        with self.assertNoLogs('volume.api', logging.ERROR):
            for path, noun, keys in templates:
                for key in keys:
                    for value in VALUES:
                        body = {noun: {**good.get(noun, {}), key: value}}
                        asked = self.world.ask('POST', path, body)
                        self.check(asked, path, body)
                for value in VALUES:
                    self.check(self.world.ask('POST', path, {noun: value}),
                               path, noun, value)

    def test_hints_survive_every_value(self):
        with self.assertNoLogs('volume.api', logging.ERROR):
            for key in ('tags', 'backend', 'pool', 'cluster', 'role',
                        'multiattach', 'image_format', 'image_checksum',
                        'volume_id', 'x'):
                for value in VALUES:
                    self.check(self.world.ask('POST', '/v3/volumes', {
                        'volume': {'size_bytes': 512},
                        'OS-SCH-HNT:scheduler_hints': {key: value},
                    }), key, value)

    def test_random_bytes_anywhere_are_survived(self):
        alphabet = (
            *'{}[]":,/\\?&=%0123456789', 'volume', 'size', 'null', '\\u00',
            '/v3/', 'volumes', 'action', 'os-extend', '\x7f', 'é',
        )
        with self.assertNoLogs('volume.api', logging.ERROR):
            for _ in range(400):
                noise = ''.join(self.random.choices(alphabet, k=20))
                method = self.random.choice(
                    ['GET', 'PUT', 'POST', 'DELETE', 'PATCH', 'OPTIONS',
                     'TRACE', 'x' * 50]
                )
                request = webob.Request({
                    'REQUEST_METHOD': method, 'SCRIPT_NAME': '',
                    'PATH_INFO': self.random.choice(['/v3/', '/', ''])
                    + noise.encode().decode('latin-1'),
                    'QUERY_STRING': noise.encode().decode('latin-1'),
                    'SERVER_NAME': 'x', 'SERVER_PORT': '1',
                    'HTTP_HOST': noise.encode().decode('latin-1'),
                    'HTTP_OPENSTACK_API_VERSION': self.random.choice(
                        ['volume ' + noise, noise, 'volume 3.54']
                    ).encode().decode('latin-1'),
                    'HTTP_X_OPENSTACK_REQUEST_ID': noise,
                    'CONTENT_TYPE': 'application/json',
                    'CONTENT_LENGTH': self.random.choice(
                        [noise, '', '-1', '20']
                    ),
                    'wsgi.input': _Input(noise.encode()),
                    'wsgi.url_scheme': 'http', 'wsgi.version': (1, 0),
                    'wsgi.errors': None,
                })
                self.check(serving.Answer(
                    request.get_response(self.world.app)), noise, method)

    def test_a_body_that_is_too_large_is_not_even_read(self):
        world = self.world
        world.app = app.make_app(
            world.core, auth.NoAuth(), limits=Limits(body_bytes_max=100)
        )
        body = b'{"volume": {"size": 1, "name": "' + b'x' * 100 + b'"}}'
        request = webob.Request.blank('/v3/volumes', method='POST', environ={
            'wsgi.input': _Input(body), 'CONTENT_LENGTH': str(len(body)),
            'CONTENT_TYPE': 'application/json',
        })
        asked = serving.Answer(request.get_response(world.app))
        self.assertEqual((413, 'overLimit'), (asked.status, asked.fault))
        self.assertEqual(0, request.environ['wsgi.input'].taken)
        # Without a length, as it comes in chunks.
        request = webob.Request.blank('/v3/volumes', method='POST', environ={
            'wsgi.input': _Input(body * 1000), 'wsgi.input_terminated': True,
            'CONTENT_TYPE': 'application/json',
        })
        request.environ.pop('CONTENT_LENGTH', None)
        asked = serving.Answer(request.get_response(world.app))
        self.assertEqual(413, asked.status)
        self.assertLessEqual(request.environ['wsgi.input'].taken, 101)

    def test_after_all_that_the_volume_is_as_it_was(self):
        for raw in RAW:
            self.world.ask('PUT', f'/v3/volumes/{self.volume}', raw)
        row = self.world.ask('GET', f'/v3/volumes/{self.volume}').json
        self.assertEqual('available', row['volume']['status'])


class Bugs(unittest.TestCase):
    """A fault of our own."""

    def test_a_bug_is_logged_with_its_story_and_told_without(self):
        # The database is none at all, which no code expects.
        core = cores.Core(db=None, hint=None, wait=None)
        world = object.__new__(serving.World)
        world.app = app.make_app(core, auth.NoAuth())
        with self.assertLogs('volume.api.app', 'ERROR') as logged:
            asked = world.ask('GET', '/v3/volumes')
        self.assertEqual((500, 'computeFault'), (asked.status, asked.fault))
        self.assertNotIn('NoneType', asked.text)
        self.assertIn('AttributeError', logged.output[0])

    def test_a_database_that_does_not_answer_is_unavailable(self):
        # A directory is no file.
        nowhere = Database(f'sqlite:///{fixtures.state_dir(self)}')
        self.addCleanup(nowhere.close)
        world = object.__new__(serving.World)
        world.app = app.make_app(
            cores.Core(db=nowhere, hint=None, wait=None), auth.NoAuth()
        )
        asked = world.ask('GET', '/v3/volumes')
        self.assertEqual(
            (503, 'serviceUnavailable'), (asked.status, asked.fault)
        )


class Traces(unittest.TestCase):
    """What a request leaves behind."""

    def setUp(self):
        self.world = serving.World(self)

    def test_a_request_keeps_its_id_if_it_has_a_proper_one(self):
        proper = 'req-0c6c1e3e-7d0a-4a55-9b3a-9a2a5c3f6f10'
        for given, kept in (
            (proper, True), ('req-x', False), ('x\r\ny', False),
            (f'{proper}x', False),
        ):
            asked = self.world.ask('GET', '/v3/volumes', headers={
                'X-Openstack-Request-Id': given})
            told = asked.headers['X-Openstack-Request-Id']
            self.assertEqual(kept, told == given)
            self.assertRegex(told, app.REQUEST_ID)

    def test_a_job_carries_the_id_of_its_request(self):
        asked = self.world.ask(
            'POST', '/v3/volumes', {'volume': {'size_bytes': 512}}
        )
        (job,) = self.world.ask('GET', '/v3/os-volume-jobs').json['jobs']
        self.assertEqual(
            asked.headers['X-Openstack-Request-Id'], job['request_id']
        )

    def test_one_line_a_request_without_query_token_or_line_breaks(self):
        with self.assertLogs('volume.api.access', 'INFO') as logged:
            self.world.ask(
                'GET', '/v3/volumes%0A127.0.0.1%20GET?name=secret',
                token='u:p',
            )
            self.world.ask('GET', '/v3/volumes', token='u:p')
        self.assertEqual(2, len(logged.output))
        first, second = logged.output
        self.assertNotIn('\n', first)
        self.assertNotIn('secret', first)
        self.assertRegex(
            second, r'unix "GET /v3/volumes" 200 \d+ \d+\.\dms req-\S+ u:p$'
        )

    def test_versions_are_told_on_answers_and_on_faults(self):
        for path, version, status in (
            ('/v3/volumes', '3.27', 200), ('/v3/volumes/x', '3.27', 404),
        ):
            asked = self.world.ask('GET', path, version=version)
            self.assertEqual(status, asked.status)
            self.assertEqual(
                'volume 3.27', asked.headers['OpenStack-API-Version']
            )
            self.assertEqual('OpenStack-API-Version', asked.headers['Vary'])
        asked = self.world.ask('GET', '/v3/volumes', version=None)
        self.assertEqual('volume 3.0', asked.headers['OpenStack-API-Version'])
        asked = self.world.ask('GET', '/v3/volumes', version='3.99')
        self.assertEqual((406, 'computeFault'), (asked.status, asked.fault))
        asked = self.world.ask('GET', '/v3/volumes', version='3')
        self.assertEqual(400, asked.status)

    def test_links_name_the_public_address(self):
        world = self.world
        world.app = app.make_app(
            world.core, auth.NoAuth(), public_url='https://volumes.example/x/'
        )
        asked = world.ask('GET', '/v3', headers={'Host': 'inside:1'})
        self.assertEqual(
            'https://volumes.example/x/v3/',
            asked.json['versions'][0]['links'][0]['href'],
        )

    def test_head_is_get_without_the_body(self):
        asked = self.world.ask('HEAD', '/v3/volumes')
        self.assertEqual((200, ''), (asked.status, asked.text))
        self.assertEqual('14', asked.headers['Content-Length'])

    def test_the_options_have_what_the_door_needs(self):
        conf = options.load([], [])
        self.assertEqual('none', auth.load(conf).mode)


class _Input:
    """A stream that counts what is taken from it."""

    def __init__(self, data):
        self.data = data
        self.taken = 0

    def read(self, size=-1):
        piece = self.data[self.taken:] if size < 0 else (
            self.data[self.taken:self.taken + size]
        )
        self.taken += len(piece)
        return piece
