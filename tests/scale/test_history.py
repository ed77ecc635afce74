# SPDX-License-Identifier: Apache-2.0
"""History goes by its age, in small bites, and takes nothing else along."""

import unittest

from sqlalchemy import event
from sqlalchemy import func
from sqlalchemy import insert
from sqlalchemy import select

from tests import database
from volume import core as cores
from volume import ids
from volume import periodic
from volume.db import jobs
from volume.db import models

DAY_S = 86400.0
OLD = database.NOW - 40 * DAY_S
YOUNG = database.NOW - DAY_S
EACH = jobs.BATCH * 2 + 7


class Rows(unittest.TestCase):
    """A database to put many rows into."""

    def setUp(self):
        self.db = database.make(self)
        self.core = cores.Core(
            db=self.db, hint=lambda *known: None, wait=None
        )

    def put(self, row, count=1):
        """Write one row many times, each with an id of its own."""
        table = type(row)
        values = {
            column.key: getattr(row, column.key)
            for column in table.__table__.columns
            if getattr(row, column.key) is not None
        }
        self.db.write(lambda session: session.execute(
            insert(table), [{**values, 'id': ids.new()} for _ in range(count)]
        ))

    def count(self, table):
        return self.db.read(lambda session: session.scalar(
            select(func.count()).select_from(table)
        ))


class History(Rows):
    """Ended jobs and tombstones, old and young."""

    def fill(self):
        for ended_at, count in (OLD, EACH), (YOUNG, 3):
            self.put(database.job(
                state='done', ended_at=ended_at, exclusive=[], args={},
            ), count)
            self.put(database.volume(
                status='deleted', deleted_at=ended_at,
            ), count)
            self.put(database.snapshot(
                ids.new(), status='deleted', deleted_at=ended_at,
            ), count)
        # However old it is, what is alive is no history.
        self.put(database.job(state='open', created_at=OLD, due_at=OLD))
        self.put(database.volume(created_at=OLD, updated_at=OLD))
        self.put(database.snapshot(ids.new(), created_at=OLD))

    def test_what_is_old_goes_and_all_else_stays(self):
        self.fill()
        self.assertEqual(3 * EACH, periodic.forget(self.core, 30 * DAY_S))
        for table in models.Job, models.Volume, models.Snapshot:
            self.assertEqual(4, self.count(table))
        self.assertEqual(0, periodic.forget(self.core, 30 * DAY_S))

    def test_no_transaction_removes_more_than_a_batch(self):
        self.fill()
        removed = []

        def note(connection, cursor, statement, *rest):
            if statement.startswith('DELETE'):
                removed.append(cursor.rowcount)

        event.listen(self.db.engine, 'after_cursor_execute', note)
        periodic.forget(self.core, 30 * DAY_S)
        event.remove(self.db.engine, 'after_cursor_execute', note)
        self.assertEqual(3 * EACH, sum(removed))
        self.assertEqual(jobs.BATCH, max(removed))

    def test_others_write_between_two_batches(self):
        self.fill()
        removed = self.db.write(lambda s: jobs.forget(s, YOUNG))
        self.assertEqual(jobs.BATCH, removed)
        self.put(database.volume())
        self.assertEqual(
            3 * EACH - jobs.BATCH, periodic.forget(self.core, 30 * DAY_S)
        )
        self.assertEqual(5, self.count(models.Volume))


class Searched(Rows):
    """Whose export it was is found out, without reading all of history."""

    def ended(self, export_id, created_at):
        self.put(database.job(
            kind='detach', state='done', created_at=created_at,
            ended_at=created_at, exclusive=[],
            args={'attachments': [[export_id, {}]], 'remove': [export_id]},
        ))

    def test_what_ended_last_is_found_at_once(self):
        export_id = ids.new()
        self.put(database.job(
            kind='detach', state='done', created_at=YOUNG, ended_at=YOUNG,
            exclusive=[], args={'attachments': [], 'remove': []},
        ), 3 * periodic.ASKED_AT_ONCE)
        self.ended(export_id, database.NOW)
        seen = []

        def note(connection, cursor, statement, *rest):
            if 'jobs.args' in statement:
                seen.append(statement)

        event.listen(self.db.engine, 'before_cursor_execute', note)
        found = periodic._over(self.core, {export_id})
        self.assertEqual({export_id}, found)
        self.assertEqual(1, len(seen))
        # One that nobody knows is looked for in all there is.
        self.assertEqual(set(), periodic._over(self.core, {ids.new()}))
        event.remove(self.db.engine, 'before_cursor_execute', note)
        self.assertEqual(1 + 4, len(seen))


if __name__ == '__main__':
    unittest.main()
