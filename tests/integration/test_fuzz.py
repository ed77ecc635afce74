# SPDX-License-Identifier: Apache-2.0
"""Chance against every route with every method.

Whatever is sent, nothing is 500, nothing breaks off with a traceback, a
request that is refused has stored nothing, and memory has a bound. The seed
is printed; ``VOLUME_SEED`` repeats a run, and ``VOLUME_PROOF`` makes it long
and each time another.
"""

import logging
import os
import random
import re
import unittest

import webob

from tests.integration import hostile_case
from tests.integration import serving
from volume.api import routes

METHODS = (
    'GET', 'GET', 'HEAD', 'POST', 'POST', 'POST', 'POST', 'PUT', 'PUT',
    'DELETE', 'PATCH', 'OPTIONS', 'BREW',
)
ROUNDS = 60 if os.environ.get('VOLUME_PROOF') else 4
GROWTH_BYTES_MAX = 64 << 20
WORDS = ('x', '%00', '%ff', '..', '%2e%2e', 'a' * 300, '%0a', '0', '-')
QUERIES = (
    '', '', '', 'limit=1', 'limit=-1', 'limit=9' + '9' * 30, 'marker=x',
    'offset=9999999999999', 'sort=%00', 'sort=x:y:z', 'name=%ff', '=',
    'metadata=' + '{' * 900, 'all_tenants=x', 'force=x&cascade=x', '&' * 99,
    'with_count=true&limit=1', 'status~=%25', 'a=1&' * 100,
    'name=' + 'x' * 999,
)


class Fuzz(unittest.TestCase):
    """A service, a chance, and one volume that nobody may touch."""

    def setUp(self):
        self.world = serving.World(self)
        self.core = self.world.core
        self.random = random.Random(hostile_case.seed(self.id()))
        self.image = os.path.join(self.world.images, 'i.raw')
        with open(self.image, 'wb') as f:
            f.write(b'image' * 100)
        made = self.world.make(size=None, size_bytes=4096)
        self.safe = made['id']
        with open(self.path(self.safe), 'r+b') as f:
            f.write(b'precious')
        self.refill()

    def path(self, volume_id):
        return os.path.join(self.world.pool, f'{volume_id}.raw')

    def refill(self):
        """Have a volume to be asked for, whatever became of the last."""
        rows = self.world.ask('GET', '/v3/volumes').json['volumes']
        ids = [row['id'] for row in rows if row['id'] != self.safe]
        self.volume = ids[0] if ids else self.world.make(
            size=None, size_bytes=4096
        )['id']
        for volume_id in ids[8:]:
            self.world.ask('POST', f'/v3/volumes/{volume_id}/action',
                           {'os-force_delete': {}})
        hostile_case.quiet(self.core)

    def good(self, path):
        """Return a body that the route would take, or nearly."""
        host = {'host': 'h', 'ip': '192.0.2.1', 'initiator': 'iqn.x:1'}
        action = self.random.choice((
            {'os-extend': {'new_size': 1}},
            {'os-extend': {'new_size_bytes': 8192}},
            {'os-reserve': None}, {'os-unreserve': None},
            {'os-begin_detaching': None}, {'os-roll_detaching': None},
            {'os-attach': {'instance_uuid': self.safe, 'mountpoint': '/x'}},
            {'os-attach': {'host_name': 'h', 'mountpoint': '/x',
                           'mode': 'ro'}},
            {'os-detach': {'attachment_id': self.volume}},
            {'os-force_detach': {'attachment_id': self.volume,
                                 'connector': host}},
            {'os-initialize_connection': {'connector': host}},
            {'os-terminate_connection': {'connector': host}},
            {'os-set_bootable': {'bootable': True}},
            {'os-update_readonly_flag': {'readonly': False}},
            {'os-reset_status': {'status': 'available'}},
            {'os-force_delete': None}, {'revert': {'snapshot_id': 'x'}},
            {'os-volume_upload_image': {
                'image_name': 'up', 'disk_format': 'raw', 'force': True}},
            {'os-complete': {}}, {'os-volume-flatten': None},
            {'cancel': None}, {'retry': None},
        ))
        table = {
            '/volumes': {'volume': {
                self.random.choice(('size', 'size_bytes')): 1 << self.random
                .choice((0, 9, 20, 40)), 'name': 'n',
                'description': 'd', 'metadata': {'a': 'b'},
                'snapshot_id': None, 'source_volid': None, 'imageRef':
                self.random.choice((None, f'file://{self.image}')),
                'volume_type': None, 'availability_zone': None,
                'multiattach': False,
            }, 'OS-SCH-HNT:scheduler_hints': {'tags': ['ssd']}},
            '/volumes/{volume_id}': {'volume': {
                'name': 'n', 'description': 'd', 'metadata': {'a': 'b'}}},
            '/snapshots': {'snapshot': {
                'volume_id': self.volume, 'name': 'n', 'force': True,
                'description': 'd', 'metadata': {}}},
            '/attachments': {'attachment': {
                'volume_uuid': self.volume, 'instance_uuid': self.safe,
                'connector': host, 'mode': 'rw'}},
            '/attachments/{attachment_id}': {
                'attachment': {'connector': host}},
            '/os-volume-manage': {'volume': {
                'host': 'fast#pool', 'ref': {'source-name': 'x'},
                'name': 'n', 'metadata': {}}},
        }
        if path.endswith('/action'):
            return action
        if '{key}' in path:
            return {'meta': {'k': 'v'}}
        if path.endswith('/metadata'):
            return {'metadata': {'k': 'v', 'l': 'w'}}
        return table.get(path, {'x': {'y': 1}})

    def request(self, route):
        """Return a request that is not quite right, now and then one that is.

        What was accepted leads to states that nonsense alone never reaches.
        """
        if self.random.random() < 0.2:
            path = '/v3' + re.sub(r'{\w+}', self.volume, route.path)
            return route.method, path, self.good(route.path)
        words = (self.volume, self.volume, *WORDS)
        path = '/v3' + re.sub(
            r'{\w+}', lambda _: self.random.choice(words), route.path
        )
        if self.random.random() < 0.1:
            path = path.replace('/v3', self.random.choice(
                ('/v3/proj', '/v2', '', '/v3//', '/v3/%00', '/v3/' + 'p' * 99)
            ), 1)
        good = self.good(route.path)
        if self.random.random() < 0.1:
            body = hostile_case.garble(self.random, good)
        else:
            body = hostile_case.spoil(self.random, good)
        method = self.random.choice((route.method, *METHODS))
        query = self.random.choice(QUERIES)
        return method, f'{path}?{query}' if query else path, body

    def check(self, asked, what):
        told = f'{what!r:.2000}: {asked.status} {asked.text:.500}'
        self.assertNotIn(asked.status, (500, 502), told)
        self.assertNotIn('Traceback', asked.text, told)
        if asked.status >= 400 and asked.text:
            self.assertLess(len(asked.text), 8192, told)
            fault = asked.json[asked.fault]
            self.assertEqual(asked.status, fault['code'], told)
            self.assertTrue(fault['message'], told)

    def ask(self, method, path, body):
        try:
            return self.world.ask(
                method, path, body,
                version=self.random.choice(('3.54', '3.54', '3.0', '3.70')),
            )
        except (UnicodeError, ValueError) as unsendable:
            # No client could write it either.
            self.assertIsInstance(unsendable, UnicodeError)
            return None

    def test_whatever_is_sent_it_is_refused_whole_or_done(self):
        told, met, accepted = set(), set(), set()
        before_bytes = 0
        with self.assertNoLogs('volume', logging.ERROR):
            for round_ in range(ROUNDS):
                for route in routes.ROUTES:
                    for _ in range(4 if '{' not in route.path else 2):
                        what = self.request(route)
                        before = hostile_case.kept(self.core)
                        asked = self.ask(*what)
                        if asked is None:
                            continue
                        self.check(asked, what)
                        met.add(asked.status)
                        told.add((route.path, asked.status // 100))
                        if asked.status >= 400:
                            self.assertEqual(
                                before, hostile_case.kept(self.core),
                                f'{what!r:.2000}: {asked.status}',
                            )
                        else:
                            accepted.add(what[0])
                            hostile_case.quiet(self.core)
                    self.refill()
                # By the second round, what is made once has been made.
                if round_ == 1:
                    before_bytes = hostile_case.resident_bytes()
        grown = hostile_case.resident_bytes() - before_bytes
        self.assertLess(grown, GROWTH_BYTES_MAX)
        with open(self.path(self.safe), 'rb') as f:
            self.assertEqual(b'precious', f.read(8))
        row = self.world.ask('GET', f'/v3/volumes/{self.safe}').json
        self.assertEqual('available', row['volume']['status'])
        # A fuzzer whose requests are all refused at the door proves little.
        self.assertLessEqual({200, 202, 400, 404, 405}, met)
        self.assertTrue(accepted & {'POST', 'PUT', 'DELETE'}, accepted)

    def test_headers_of_nonsense_do_nothing(self):
        names = (
            'Content-Type', 'OpenStack-API-Version', 'X-Auth-Token', 'Host',
            'X-Service-Token', 'X-Openstack-Request-Id', 'Content-Length',
            'Idempotency-Key', 'Accept', 'X-Forwarded-For', 'Expect',
            'X-HTTP-Method-Override', 'Transfer-Encoding',
        )
        values = [
            value for value in hostile_case.VALUES
            if isinstance(value, str) and not set('\r\n\0') & set(value)
        ]
        before = hostile_case.kept(self.core)
        with self.assertNoLogs('volume', logging.ERROR):
            for name in names:
                for value in values:
                    request = webob.Request.blank(
                        '/v3/volumes', method='POST',
                    )
                    request.body = b'{"volume": {"size": 0}}'
                    request.content_type = 'application/json'
                    key = name.upper().replace('-', '_')
                    if key not in ('CONTENT_TYPE', 'CONTENT_LENGTH'):
                        key = f'HTTP_{key}'
                    request.environ[key] = value.encode().decode('latin-1')
                    asked = serving.Answer(
                        request.get_response(self.world.app)
                    )
                    self.check(asked, (name, value))
                    self.assertGreaterEqual(asked.status, 400, (name, value))
        self.assertEqual(before, hostile_case.kept(self.core))
