# SPDX-License-Identifier: Apache-2.0
"""What a host must know and nobody may keep: in one reply, nowhere else."""

import json
import unittest

from sqlalchemy import text

from tests.integration.serving import World
from volume import context
from volume import errors
from volume import model
from volume.testing import noop
from volume.verbs import attachments

SECRET = 'sesame-of-the-storage'
CONNECTOR = {'host': 'h1', 'xensm_pool': 'p', 'multipath': False}
CALLER = context.Caller(is_admin=True)


class Telling(noop.NoopDriver):
    """A storage that hosts need a password for."""

    def grant(self, volume, host, access):
        self.hosts.append(host)
        if self.trouble:
            raise self.trouble
        return model.Connection(
            'noop', {'user': 'u'}, {'password': SECRET})

    def revoke(self, volume, host):
        self.revoked.append(host.name)


class Secrets(unittest.TestCase):

    def setUp(self):
        self.world = World(
            self, names='fast, n', sections='[n]\ndriver = noop\n')
        backend = self.world.service.runner.backends['n']
        backend.driver.__class__ = Telling
        self.driver = backend.driver
        self.driver.hosts, self.driver.revoked = [], []
        self.driver.trouble = None
        made = self.world.ask('POST', '/v3/volumes', {
            'volume': {'size': 1},
            'OS-SCH-HNT:scheduler_hints': {'backend': 'n'},
        }).json['volume']
        self.volume_id = self.world.settled(made['id'])['id']

    def connect(self, **options):
        return attachments.connect(
            self.world.core, CALLER, self.volume_id, CONNECTOR, **options)

    def kept(self):
        """Return all that the database holds."""
        def read(session):
            return [
                str(row)
                for table in ('attachments', 'jobs', 'volumes')
                for row in session.execute(text(f'SELECT * FROM {table}'))
            ]
        return '\n'.join(self.world.core.db.read(read))

    def test_secret_is_in_the_reply_to_who_asks_for_it_and_is_not_kept(self):
        told = self.connect(with_secrets=True)
        self.assertEqual(SECRET, told['data']['password'])
        self.assertEqual(['password'], told['data']['secret_keys'])
        self.assertEqual(told, self.connect(with_secrets=True))
        self.assertNotIn('password', self.connect()['data'])
        self.assertIn('secret_keys', self.kept())
        self.assertNotIn(SECRET, self.kept())

    def test_rest_never_has_it(self):
        first = self.world.ask(
            'POST', f'/v3/volumes/{self.volume_id}/action',
            {'os-initialize_connection': {'connector': CONNECTOR}})
        self.assertEqual(200, first.status, first.text)
        shown = self.world.ask('GET', '/v3/attachments/detail')
        for said in first.text, shown.text:
            self.assertIn('secret_keys', said)
            self.assertNotIn(SECRET, said)

    def test_asking_again_in_vain_ends_nobodys_access(self):
        self.connect(with_secrets=True)
        self.driver.trouble = errors.Invalid('not now')
        with self.assertRaises(errors.Invalid):
            self.connect(with_secrets=True)
        self.assertEqual([], self.driver.revoked)
        self.driver.trouble = None
        self.assertEqual(
            SECRET, self.connect(with_secrets=True)['data']['password'])

    def test_driver_hears_what_else_a_connector_says(self):
        self.connect()
        (host,) = self.driver.hosts
        self.assertEqual(
            ('h1', {'xensm_pool': 'p'}), (host.name, dict(host.properties)))
        json.dumps(dict(host.properties))
