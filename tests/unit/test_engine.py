# SPDX-License-Identifier: Apache-2.0
"""Whole transactions, in turn, again if a race was lost."""

import os
import sqlite3
import subprocess
import sys
import threading
import unittest

from sqlalchemy import exc
from sqlalchemy import text
from sqlalchemy import update

from tests import database
from volume import errors
from volume.db import dialects
from volume.db import engine
from volume.db import models
from volume.db.engine import Database
from volume.testing import fixtures

LOCKED = sqlite3.OperationalError('database is locked')


def failure(original, invalidated=False):
    return exc.OperationalError(
        'UPDATE x', {}, original, connection_invalidated=invalidated
    )


@database.on_all
class Engine(unittest.TestCase):
    def setUp(self):
        self.db = database.make(self)
        self.row = database.volume(size_bytes=0)
        database.add(self.db, self.row)

    def size(self):
        return database.get(self.db, models.Volume, self.row.id).size_bytes

    def bump(self, session):
        session.execute(
            update(models.Volume).where(models.Volume.id == self.row.id)
            .values(size_bytes=models.Volume.size_bytes + 1)
        )

    def test_a_lost_race_runs_the_whole_transaction_again(self):
        runs = []

        def fn(session):
            self.bump(session)
            runs.append(1)
            if len(runs) < 3:
                raise failure(LOCKED)
            return 'done'

        self.assertEqual('done', self.db.write(fn))
        self.assertEqual(3, len(runs))
        self.assertEqual(1, self.size())

    def test_a_race_lost_at_the_flush_runs_all_of_it_again(self):
        runs, other = [], database.volume()

        def fn(session):
            runs.append(1)
            self.bump(session)
            if len(runs) == 1:
                session.execute(text('SELECT 1'))
                raise failure(None, invalidated=True)
            session.add(database.volume(id=other.id))

        self.db.write(fn)
        self.assertEqual(2, len(runs))
        self.assertEqual(1, self.size())
        self.assertIsNotNone(database.get(self.db, models.Volume, other.id))

    def test_what_cannot_get_better_is_told_at_once(self):
        runs = []

        def fn(session):
            runs.append(1)
            raise failure(sqlite3.OperationalError('disk I/O error'))

        with self.assertRaisesRegex(errors.Unavailable, 'disk I/O error'):
            self.db.write(fn)
        self.assertEqual(1, len(runs))

    def test_what_the_caller_must_judge_passes_through(self):
        for error in errors.Invalid('no'), KeyError('x'):
            with self.subTest(error), self.assertRaises(type(error)):
                def fn(session, error=error):
                    self.bump(session)
                    raise error

                self.db.write(fn)
        with self.assertRaises(exc.IntegrityError):
            database.add(self.db, database.volume(id=self.row.id))
        self.assertEqual(0, self.size())

    def test_a_failure_names_no_values(self):
        with self.assertRaises(errors.Unavailable) as caught:
            self.db.write(lambda s: s.execute(
                text('INSERT INTO nowhere VALUES (:x)'), {'x': 'hunter2'}
            ))
        self.assertNotIn('hunter2', str(caught.exception))

    def test_what_is_lost_on_each_database_is_known(self):
        for code in '40001', '40P01', '55P03':
            original = Exception()
            original.pgcode = code
            self.assertTrue(dialects.is_race(failure(original)), code)
        for code in 1020, 1205, 1213:
            self.assertTrue(dialects.is_race(failure(Exception(code))))
        for code in 1064, 2013:
            self.assertFalse(dialects.is_race(failure(Exception(code))))
        self.assertTrue(dialects.is_race(failure(LOCKED)))
        self.assertFalse(dialects.is_race(
            failure(sqlite3.OperationalError('no such table: x'))
        ))

    def test_a_connection_that_was_lost_is_known(self):
        self.assertTrue(dialects.is_away(failure(Exception(), True)))
        for code in '57P01', 2003, 2006, 2013:
            original = Exception(code)
            original.pgcode = code
            self.assertTrue(dialects.is_away(failure(original)), code)
        for wrong in LOCKED, Exception(1064), Exception('x'):
            self.assertFalse(dialects.is_away(failure(wrong)), wrong)

    def test_a_value_that_does_not_fit_is_invalid(self):
        if self.db.is_sqlite:
            self.skipTest('SQLite takes values of any length')
        with self.assertRaises(errors.Invalid) as caught:
            database.add(self.db, database.volume(name='hunter2' * 100))
        self.assertNotIn('hunter2', str(caught.exception))

    def test_no_transaction_is_begun_inside_another(self):
        for outer in self.db.read, self.db.write:
            for inner in self.db.read, self.db.write:
                with self.assertRaises(AssertionError):
                    outer(lambda s, inner=inner: inner(lambda s: None))
        self.db.write(self.bump)
        self.assertEqual(1, self.size())

    def test_32_threads_that_write_lose_nothing_and_wait_for_no_ever(self):
        failed, start = [], threading.Barrier(32)

        def work():
            start.wait()
            try:
                for _ in range(20):
                    self.db.write(self.bump)
                    self.db.read(lambda s: s.get(
                        models.Volume, self.row.id
                    ))
            except BaseException as error:  # told to the test's thread
                failed.append(error)
                raise

        threads = [threading.Thread(target=work) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], failed)
        self.assertEqual(640, self.size())

    def test_processes_that_write_at_once_lose_nothing(self):
        code = (
            'import sys; from sqlalchemy import update\n'
            'from volume.db import models\n'
            'from volume.db.engine import Database\n'
            'db = Database(sys.argv[1]); v = models.Volume\n'
            'for _ in range(50):\n'
            '    db.write(lambda s: s.execute(update(v).where(\n'
            '        v.id == sys.argv[2]).values(size_bytes=v.size_bytes+1)))'
        )
        children = [
            subprocess.Popen(
                [sys.executable, '-c', code, self.db.url, self.row.id],
                cwd=os.path.dirname(os.path.dirname(engine.__file__)) + '/..',
            ) for _ in range(3)
        ]
        for _ in range(50):
            self.db.write(self.bump)
        self.assertEqual([0, 0, 0], [child.wait(120) for child in children])
        self.assertEqual(200, self.size())

    def test_statements_of_every_thread_are_counted(self):
        with engine.statements(self.db.engine) as seen:
            thread = threading.Thread(target=self.db.write, args=[self.bump])
            thread.start()
            thread.join()
            self.size()
        self.assertEqual(
            ['UPDATE', 'SELECT'], [each.split()[0] for each in seen]
        )
        self.size()
        self.assertEqual(2, len(seen))


@database.only_sqlite
class OnSqlite(unittest.TestCase):
    setUp, size, bump = Engine.setUp, Engine.size, Engine.bump

    def other(self):
        """Return another process's connection, as far as SQLite knows."""
        path = self.db.url.removeprefix('sqlite:///')
        connection = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False
        )
        self.addCleanup(connection.close)
        return connection

    def test_a_reader_is_not_held_up_by_a_writer(self):
        other = self.other()
        other.execute('BEGIN IMMEDIATE')
        other.execute('UPDATE volumes SET size_bytes = 7')
        self.assertEqual(0, self.size())
        other.execute('COMMIT')
        self.assertEqual(7, self.size())

    def test_a_writer_is_not_held_up_by_a_reader(self):
        other = self.other()
        other.execute('BEGIN')
        other.execute('SELECT * FROM volumes').fetchall()
        self.db.write(self.bump)
        self.assertEqual(1, self.size())

    def test_a_read_is_of_one_moment(self):
        def fn(session):
            first = session.get(models.Volume, self.row.id).size_bytes
            other = self.other()
            other.execute('UPDATE volumes SET size_bytes = 9')
            session.expire_all()
            return first, session.get(models.Volume, self.row.id).size_bytes

        self.assertEqual((0, 0), self.db.read(fn))
        self.assertEqual(9, self.size())

    def test_a_writer_has_the_lock_before_it_reads(self):
        """One that reads first, and writes then, would fail at once."""
        other = self.other()
        other.execute('PRAGMA busy_timeout = 0')

        def fn(session):
            session.get(models.Volume, self.row.id)
            with self.assertRaisesRegex(sqlite3.OperationalError, 'locked'):
                other.execute('BEGIN IMMEDIATE')

        self.db.write(fn)
        other.execute('BEGIN IMMEDIATE')
        other.execute('ROLLBACK')

    def test_a_writer_waits_for_another_process(self):
        other = self.other()
        other.execute('BEGIN IMMEDIATE')
        done = threading.Event()

        def work():
            self.db.write(self.bump)
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        self.assertFalse(done.wait(0.1))
        other.execute('COMMIT')
        thread.join(30)
        self.assertTrue(done.is_set())

    def test_commits_are_durable_and_the_log_is_written_ahead(self):
        def ask(session):
            return [
                session.execute(text(f'PRAGMA {name}')).scalar()
                for name in ('journal_mode', 'synchronous', 'foreign_keys')
            ]

        self.assertEqual(['wal', 2, 1], self.db.read(ask))


@database.only_sqlite
class NoDatabase(unittest.TestCase):
    def test_a_database_that_cannot_be_opened_is_unavailable(self):
        directory = fixtures.state_dir(self)
        os.mkdir(os.path.join(directory, 'volume.sqlite'))
        db = Database(f'sqlite:///{directory}/volume.sqlite')
        self.addCleanup(db.close)
        with self.assertRaises(errors.Unavailable):
            db.read(lambda s: s.execute(text('SELECT 1')))

    def test_its_directory_is_made_for_this_user_alone(self):
        directory = os.path.join(fixtures.state_dir(self), 'a', 'b')
        db = Database(f'sqlite:///{directory}/volume.sqlite')
        self.addCleanup(db.close)
        db.read(lambda s: s.execute(text('SELECT 1')))
        self.assertEqual(0o700, os.stat(directory).st_mode & 0o777)
