# SPDX-License-Identifier: Apache-2.0
"""Where attachments are open, as rows say it: one service, others in words."""

import os
import unittest

from sqlalchemy import update

from tests.integration import managing
from tests.integration import serving
from volume import errors
from volume import ids
from volume import periodic
from volume.blockd import Blockd
from volume.context import Caller
from volume.db import models
from volume.verbs import attachments

CALLER = Caller(project_id='default', user_id='u')
CONNECTOR = {'host': 'compute-1', 'ip': '192.0.2.1'}
LAYERS = '[q]\ndriver = qcow\ndirectories = {}\n'


class Homes(unittest.TestCase):
    def setUp(self):
        directory = serving.fixtures.plain_directory(self, 'layers')
        self.world = serving.World(
            self, names='q', sections=LAYERS.format(directory)
        )
        self.core = self.world.core
        self.backends = self.world.service.runner.backends
        self.addCleanup(self.blockd().stop)

    def blockd(self) -> Blockd:
        return self.world.service.node.blockd

    def attached(self):
        """Return a volume that is attached here, and its attachment."""
        volume = self.world.make()
        made = attachments.create(
            self.core, CALLER, volume['id'], ids.new(), CONNECTOR
        )
        attachments.complete(self.core, CALLER, made.id)
        return volume['id'], made.id

    def say(self, table, **values):
        self.core.db.write(lambda s: s.execute(update(table).values(values)))

    def home(self, attachment_id):
        return self.core.db.read(
            lambda s: s.get(models.Attachment, attachment_id)
        ).node

    def other(self, **values):
        row = models.Service(**{
            'host': 'node-2', 'owner': ids.new(), 'roles': ['manager'],
            'started_at': 0.0, 'heard_at': 0.0, **values,
        })
        self.core.db.write(lambda s: s.add(row))

    def settle(self):
        serving.until(self.world.service.runner.busy, lambda count: not count)

    def manage(self, *words):
        path = os.path.join(self.world.directory, 'volume.conf')
        code, said, wrong = managing.run('--config-file', path, *words)
        return code, said + wrong

    def test_an_attachment_says_where_it_is_open(self):
        _, attachment_id = self.attached()
        self.assertEqual('node-1', self.home(attachment_id))

    def test_one_of_an_earlier_release_is_taken_in_where_it_is_open(self):
        _, attachment_id = self.attached()
        self.say(models.Attachment, node='')
        periodic.restore_exports(self.core, self.backends)
        self.assertEqual('node-1', self.home(attachment_id))

    def test_what_is_open_elsewhere_is_not_exported_here_until_fenced(self):
        _, attachment_id = self.attached()
        self.blockd().unexport(attachment_id)
        self.say(models.Attachment, node='node-2')
        self.other()
        self.assertEqual(
            0, periodic.restore_exports(self.core, self.backends)
        )
        self.core.db.write(lambda s: s.execute(
            update(models.Service).where(models.Service.host == 'node-2')
            .values(is_fenced=True)
        ))
        self.assertEqual(
            1, periodic.restore_exports(self.core, self.backends)
        )
        self.settle()
        self.assertIn(attachment_id, self.blockd().export_ids())
        self.assertEqual('node-1', self.home(attachment_id))

    def test_an_export_that_has_moved_away_ends_here(self):
        _, attachment_id = self.attached()
        self.say(models.Attachment, node='node-2')
        ended = periodic.end_orphan_exports(self.core, self.backends, set())
        self.assertEqual([attachment_id], ended)
        self.assertNotIn(attachment_id, self.blockd().export_ids())

    def left_of_an_export_of(self, domain, is_remote=False):
        """Return what is exported, if it is of a service with a domain.

        Without one, that service has left in good order.
        """
        _, attachment_id = self.attached()
        exporter = self.backends['q'].exporter
        exporter.is_shared = True
        exporter.node.is_remote = is_remote
        if domain:
            self.other(domain=domain)
        self.say(models.Attachment, node='node-2')
        periodic.end_orphan_exports(self.core, self.backends, set())
        return attachment_id, exporter.exported()

    def test_an_export_of_another_service_of_this_kernel_is_its_own(self):
        kernel = self.world.service.domain.id.split(' ')[1]
        export_id, left = self.left_of_an_export_of(
            f'{ids.new()} {kernel} pid:[1]'
        )
        self.assertEqual({export_id}, left)

    def test_one_of_a_service_that_was_stopped_in_good_order_goes_on(self):
        export_id, left = self.left_of_an_export_of('')
        self.assertEqual({export_id}, left)

    def test_one_of_a_kernel_that_is_reached_by_ssh_goes_on(self):
        export_id, left = self.left_of_an_export_of(
            f'{ids.new()} {ids.new()} pid:[1]', is_remote=True
        )
        self.assertEqual({export_id}, left)

    def test_one_that_does_not_end_keeps_no_other_from_it(self):
        ones = [self.attached()[1] for _ in range(2)]
        stuck, other = sorted(ones)
        exporter = self.backends['q'].exporter
        unexport = exporter.unexport

        def hang(attachment_id):
            if attachment_id == stuck:
                raise errors.Busy('somebody else has it')
            unexport(attachment_id)

        exporter.unexport = hang
        self.say(models.Attachment, node='node-2')
        ended = periodic.end_orphan_exports(self.core, self.backends, set())
        self.assertEqual([other], ended)
        self.assertEqual({stuck}, exporter.exported())

    def test_an_export_that_has_moved_to_another_kernel_ends_here(self):
        _, left = self.left_of_an_export_of(f'{ids.new()} {ids.new()} pid:[1]')
        self.assertEqual(set(), left)

    def test_what_several_services_reach_is_at_home_with_none(self):
        exporter = self.backends['q'].exporter
        exporter.node.is_remote = True
        _, attachment_id = self.attached()
        self.assertEqual('', self.home(attachment_id))
        periodic.restore_exports(self.core, self.backends)
        self.assertEqual('', self.home(attachment_id))
        exporter.unexport(attachment_id)
        periodic.restore_exports(self.core, self.backends)
        serving.until(exporter.exported, {attachment_id}.__eq__)
        self.assertEqual('', self.home(attachment_id))

    def test_a_node_that_left_in_good_order_can_be_fenced_for_what_it_has(
        self,
    ):
        self.attached()
        code, said = self.manage('node', 'fence', 'node-2')
        self.assertEqual((1, True), (code, 'there is no node' in said))
        self.say(models.Attachment, node='node-2')
        self.assertEqual(
            (0, 'node node-2: fenced\n'),
            self.manage('node', 'fence', 'node-2'),
        )
        code, said = self.manage('node', 'fence', 'node-1')
        self.assertEqual((1, True), (code, 'stop it first' in said))

    def test_reconcile_mends_nothing_while_another_works_there(self):
        self.other(heard_at=self.core.db.clock(), backends={'q': ''})
        self.world.service.stop()
        code, said = self.manage('reconcile')
        self.assertEqual(1, code)
        self.assertIn('service node-2 works on q as well', said)
