# SPDX-License-Identifier: Apache-2.0
"""A backend whose exporter was changed while hosts had its volumes."""

import unittest

from sqlalchemy import select
from sqlalchemy import update

from tests.integration import serving
from volume import ids
from volume import periodic
from volume.db import models


class ExporterChanged(unittest.TestCase):

    def setUp(self):
        self.world = serving.World(self)
        self.addCleanup(lambda: self.world.service.node.blockd.stop())
        self.volume_id, self.other_id = (
            self.world.make()['id'] for _ in range(2))
        self.attachment_id = self.attach(self.volume_id).json[
            'attachment']['id']
        self.exporter('local', 'nbd')

    def ask(self, method, path, body=None):
        answer = self.world.ask(method, f'/v3{path}', body)
        self.assertLess(answer.status, 300, answer.text)
        return answer.json

    def attach(self, volume_id):
        return self.world.ask('POST', '/v3/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': ids.new(),
            'connector': {'host': 'one', 'ip': '127.0.0.1'},
        }})

    def exporter(self, old, new):
        """Start the service again with another one."""
        self.world.stop()
        with open(self.world.path) as f:
            text = f.read()
        self.assertIn(f'exporter = {old}\n', text)
        with open(self.world.path, 'w') as f:
            f.write(text.replace(f'exporter = {old}', f'exporter = {new}'))
        self.world.start()

    def backend(self):
        (row,) = self.ask('GET', '/os-volume-backends')['backends']
        return row

    def rows(self, table):
        return self.world.service.db.read(
            lambda s: list(s.scalars(select(table))))

    def test_backend_is_down_and_says_what_to_do(self):
        row = self.backend()
        self.assertEqual('down', row['state'])
        self.assertIn(
            '1 attachments were made by exporter local', row['reason'])
        self.assertIn('set exporter = local again', row['reason'])

    def test_no_access_is_called_ended(self):
        for answer in (
            self.world.ask('DELETE', f'/v3/attachments/{self.attachment_id}'),
            self.world.ask('POST', f'/v3/volumes/{self.volume_id}/action', {
                'os-force_detach': {}}),
        ):
            self.assertEqual(409, answer.status, answer.text)
            self.assertIn('set exporter = local again', answer.text)
        (row,) = self.rows(models.Attachment)
        self.assertTrue(row.is_connected)

    def test_nobody_else_is_let_in_meanwhile(self):
        answer = self.attach(self.other_id)
        self.assertEqual(409, answer.status, answer.text)
        row = self.ask('GET', f'/volumes/{self.other_id}')['volume']
        self.assertEqual('available', row['status'])
        self.assertEqual(1, len(self.rows(models.Attachment)))

    def test_nothing_is_exported_a_second_time(self):
        core = self.world.core
        periodic.restore_exports(core, self.world.service.runner.backends)
        self.assertEqual(set(), self.world.service.runner.backends[
            'fast'].exporter.exported())
        self.assertEqual('local', self.rows(models.Attachment)[0].exporter)

    def test_with_the_old_one_it_ends_and_the_new_one_serves(self):
        self.world.ask('DELETE', f'/v3/attachments/{self.attachment_id}')
        self.exporter('nbd', 'local')
        self.assertEqual('up', self.backend()['state'])
        self.ask('DELETE', f'/attachments/{self.attachment_id}')
        self.exporter('local', 'nbd')
        self.assertEqual('up', self.backend()['state'])
        answer = self.attach(self.volume_id)
        self.assertEqual(200, answer.status, answer.text)
        self.assertEqual('nbd', self.rows(models.Attachment)[0].exporter)

    def test_what_an_earlier_release_made_is_of_the_one_before(self):
        self.world.service.db.write(
            lambda s: s.execute(
                update(models.Attachment).values(exporter='')))
        answer = self.world.ask(
            'DELETE', f'/v3/attachments/{self.attachment_id}')
        self.assertEqual(409, answer.status, answer.text)
        self.exporter('nbd', 'local')
        self.ask('DELETE', f'/attachments/{self.attachment_id}')
        self.assertEqual([], self.rows(models.Attachment))
