# SPDX-License-Identifier: Apache-2.0
"""How many SQL statements a verb costs, to the closed job.

The real service with its real runner. What its periodic threads ask for
themselves (heartbeat, sweep, report) is not counted; nobody polls.
"""

import contextlib
import threading
import unittest

from sqlalchemy import event

import tests
from tests import database
from tests.database import NOW
from tests.database import volume
from tests.integration import serving
from volume import ids
from volume.context import Caller
from volume.db import models
from volume.verbs import attachments
from volume.verbs import lookup
from volume.verbs import snapshots
from volume.verbs import volumes

CALLER = Caller(project_id='default', user_id='u')
CONNECTOR = {'host': 'compute-1', 'ip': '192.0.2.1'}
MIB = 1 << 20
QUIET = """
lease_s = 3000
sweep_interval_s = 3000
stats_interval_s = 3000
upkeep_interval_s = 3000
"""
PERIODIC = {
    'renew', 'heartbeat', 'sweep', 'exports', 'stats', 'upkeep', 'history',
}


@contextlib.contextmanager
def statements(db):
    """Collect what requests and jobs ask, without BEGIN and COMMIT."""
    seen = []

    def note(connection, cursor, statement, *rest):
        if threading.current_thread().name not in PERIODIC and (
            not statement.startswith('BEGIN')
        ):
            seen.append(statement)

    event.listen(db.engine, 'before_cursor_execute', note)
    try:
        yield seen
    finally:
        event.remove(db.engine, 'before_cursor_execute', note)


@tests.by_thread
@database.on_all
class Budgets(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        case = cls('run_nothing')
        cls.addClassCleanup(case.doCleanups)
        directory = serving.fixtures.plain_directory(case, 'layers')
        cls.world = serving.World(
            case, settings=QUIET, names='q',
            sections=(
                f'[q]\ndriver = qcow\ndirectories = {directory}\n'
                'exporter = local\n'
            ),
        )
        cls.core = cls.world.core

    def run_nothing(self):
        """Stand for the class while its world is made."""

    def settled(self):
        """Wait until no job is open, without asking the database."""
        serving.until(
            self.world.service.runner.busy, lambda count: not count
        )

    def cost(self, limit, *verbs):
        """Run verbs one after another; return the statements they cost."""
        self.settled()
        with statements(self.world.service.db) as seen:
            for verb in verbs:
                result = verb()
                self.settled()
        self.assertLessEqual(
            len(seen), limit, '\n'.join(f'{len(seen)}:\n{s}' for s in seen)
        )
        self.assertTrue(seen, 'nothing was counted')
        return result

    def make(self, **wish):
        made = volumes.create(
            self.core, CALLER, volumes.NewVolume(size_bytes=MIB, **wish)
        )
        self.settled()
        return made.id

    def status(self, volume_id):
        return lookup.volume(self.core, CALLER, volume_id).row.status

    def test_a_create_costs_at_most_12(self):
        made = self.cost(12, lambda: volumes.create(
            self.core, CALLER, volumes.NewVolume(size_bytes=MIB)
        ))
        self.assertEqual('available', self.status(made.id))

    def test_a_create_with_the_callers_id_costs_at_most_12(self):
        made = self.cost(12, lambda: volumes.create(
            self.core, CALLER,
            volumes.NewVolume(size_bytes=MIB, id=ids.new()),
        ))
        self.assertEqual('available', self.status(made.id))

    def test_a_create_by_rest_costs_at_most_12(self):
        answer = self.cost(12, lambda: self.world.ask(
            'POST', '/v3/volumes', {'volume': {'size': 1}}
        ))
        self.assertEqual(202, answer.status, answer.text)

    def test_a_delete_costs_at_most_10(self):
        volume_id = self.make()
        self.cost(10, lambda: volumes.delete(self.core, CALLER, volume_id))
        self.assertEqual(404, self.world.ask(
            'GET', f'/v3/volumes/{volume_id}'
        ).status)

    def test_a_delete_by_rest_costs_at_most_10(self):
        volume_id = self.make()
        answer = self.cost(10, lambda: self.world.ask(
            'DELETE', f'/v3/volumes/{volume_id}'
        ))
        self.assertEqual(202, answer.status, answer.text)

    def test_a_snapshot_costs_at_most_10(self):
        volume_id = self.make()
        made = self.cost(10, lambda: snapshots.create(
            self.core, CALLER, snapshots.NewSnapshot(volume_id)
        ))
        self.assertEqual('available', lookup.snapshot(
            self.core, CALLER, made.id
        ).status)

    def test_the_six_verbs_of_an_attach_and_a_detach_cost_at_most_16(self):
        volume_id, instance = self.make(), ids.new()
        self.cost(
            16,
            lambda: attachments.reserve(self.core, CALLER, volume_id),
            lambda: attachments.connect(
                self.core, CALLER, volume_id, CONNECTOR
            ),
            lambda: attachments.attach(
                self.core, CALLER, volume_id, instance, '/dev/vdb'
            ),
            lambda: attachments.begin_detaching(
                self.core, CALLER, volume_id
            ),
            lambda: attachments.disconnect(
                self.core, CALLER, volume_id, CONNECTOR
            ),
            lambda: attachments.detach(self.core, CALLER, volume_id),
        )
        self.assertEqual('available', self.status(volume_id))

    def test_one_whole_life_costs_at_most_45(self):
        def life():
            made = volumes.create(
                self.core, CALLER, volumes.NewVolume(size_bytes=MIB)
            )
            self.settled()
            attachment = attachments.create(
                self.core, CALLER, made.id, ids.new(), CONNECTOR
            )
            attachments.complete(self.core, CALLER, attachment.id)
            attachments.delete(self.core, CALLER, attachment.id)
            volumes.delete(self.core, CALLER, made.id)

        self.cost(45, life)


@tests.by_thread
class Lists(unittest.TestCase):
    def setUp(self):
        self.world = serving.World(self, settings=QUIET)
        rows = [
            volume(project_id='default', created_at=NOW + number)
            for number in range(1000)
        ]
        beside = [
            models.Attachment(
                id=ids.new(), volume_id=row.id, project_id='default',
                backend='fast', status='attached', created_at=NOW,
            ) for row in rows[::2]
        ]
        self.world.core.db.write(
            lambda s: s.add_all([*rows, *beside])
        )

    def test_a_thousand_volumes_cost_at_most_5(self):
        db = self.world.service.db
        for path in '/v3/volumes/detail', '/v3/volumes':
            with self.subTest(path):
                with statements(db) as seen:
                    answer = self.world.ask('GET', f'{path}?limit=1000')
                self.assertEqual(1000, len(answer.json['volumes']))
                self.assertLessEqual(len(seen), 5, seen)
        with_one = [
            each for each in self.world.ask(
                'GET', '/v3/volumes/detail?limit=1000'
            ).json['volumes'] if each['attachments']
        ]
        self.assertEqual(500, len(with_one))
