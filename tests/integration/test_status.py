# SPDX-License-Identifier: Apache-2.0
"""``volume-manage`` beside a real service: what it says, and to whom."""

import json
import os
import unittest

from tests import database
from tests.integration import managing
from tests.integration import serving
from volume.testing import fixtures


class Status(unittest.TestCase):
    def setUp(self):
        self.world = serving.World(self, roles='api, manager')

    def manage(self, *words):
        """Run a command; return its exit code and what it has printed."""
        path = os.path.join(self.world.directory, 'volume.conf')
        return managing.run('--config-file', path, *words)

    def test_it_says_by_its_exit_code_whether_all_is_well(self):
        self.world.make()
        code, said, _ = self.manage('status')
        self.assertEqual(0, code, said)
        self.assertTrue(said.startswith('all is well\n'), said)
        for words in (
            'node-1  up', 'fast     up', 'fast#pool  up', 'jobs: none open',
            'volumes: 1 (1 available)', 'history: 1 ended jobs',
        ):
            self.assertIn(words, said)
        self.world.service.stop()
        code, said, _ = self.manage('status')
        self.assertEqual(1, code)
        self.assertIn('no service is up', said)

    def test_it_agrees_with_what_the_api_says(self):
        code, said, _ = self.manage('status', '--format', 'json')
        seen = json.loads(said)
        self.assertEqual((0, True), (code, seen['is_well']))
        services = self.world.ask('GET', '/v3/os-services').json['services']
        self.assertEqual(
            {each['host']: each['state'] for each in services},
            {
                **{r['host']: r['state'] for r in seen['services']['rows']},
                **{f'{r["host"]}@{r["backend"]}': r['state']
                   for r in seen['backends']['rows']},
            },
        )
        [backend] = self.world.ask(
            'GET', '/v3/os-volume-backends'
        ).json['backends']
        [pool], [shown] = backend['pools'], seen['pools']['rows']
        for key in 'total_bytes', 'free_bytes', 'limit_bytes':
            self.assertEqual(pool[key], shown[key])

    def test_no_database_is_made_by_looking_for_one(self):
        if database.kind(self) != 'sqlite':
            self.skipTest('a server makes no database by being looked at')
        state = fixtures.state_dir(self)
        for words in ('status',), ('jobs',), ('db', 'version'), (
            'reconcile', '--dry-run',
        ):
            code, _, said = self.manage('--state-path', state, *words)
            self.assertEqual(1, code)
            self.assertIn('there is no database', said)
        self.assertEqual([], os.listdir(state))

    @unittest.skipIf(os.geteuid(), 'only root can give a directory away')
    def test_no_file_is_left_where_its_owner_could_not_use_it(self):
        state = fixtures.state_dir(self)
        os.chown(state, 65534, 65534)
        for words in ('status',), ('db', 'upgrade'), ('reconcile',):
            code, _, said = self.manage('--state-path', state, *words)
            self.assertEqual(1, code)
            self.assertIn('runuser -u nobody', said)
        self.assertEqual([], os.listdir(state))
