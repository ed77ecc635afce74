# SPDX-License-Identifier: Apache-2.0
"""Real races, hangs and lost connections, on real database servers."""

import os
import subprocess
import sys
import threading
import time
import unittest

from sqlalchemy import event
from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy import update

from tests import database
from tests.integration import serving
from tests.wire import Wire
from volume import errors
from volume.db import leases
from volume.db import models
from volume.db.engine import Database

JOIN_S = 60
IS_PROOF = os.environ.get('VOLUME_PROOF') == '1'

# Four native threads that write, more than there are connections.
NATIVE = """
import sys
from volume import concurrency
concurrency.start('eventlet')
import sqlalchemy
from volume.db.engine import Database
from volume.db.models import Base, Service
db = Database(sys.stdin.read(), for_native=True, connections=2)
db.write(lambda session: Base.metadata.create_all(session.connection()))
db.write(lambda session: session.add(
    Service(host='h', owner='o', started_at=0, heard_at=0)
))
def beat(session):
    session.get(Service, 'h').heard_at += 1
def work():
    for _ in range(100):
        db.write(beat)
threads = [concurrency.native().Thread(target=work) for _ in range(4)]
for each in threads:
    each.start()
for each in threads:
    each.join()
print(round(db.read(lambda session: session.get(Service, 'h').heard_at)))
"""


def at_once(*works):
    """Run functions side by side, and raise what one of them raises."""
    failed = []

    def guarded(work):
        try:
            work()
        except BaseException as error:  # told to the test's thread
            failed.append(error)

    threads = [
        threading.Thread(target=guarded, args=[work]) for work in works
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    if failed:
        raise failed[0]


def grow(session, row_id):
    session.execute(
        update(models.Volume).where(models.Volume.id == row_id)
        .values(size_bytes=models.Volume.size_bytes + 1)
    )


def is_written(db, volume_id):
    """Say whether the server has taken a write; if not, nothing was done."""
    try:
        db.write(lambda session: grow(session, volume_id))
    except errors.Unavailable:
        return False
    return True


class Case(unittest.TestCase):
    def setUp(self):
        self.db = database.make(self)
        rows = [database.volume(size_bytes=0) for _ in range(2)]
        self.one, self.two = (row.id for row in rows)
        database.add(self.db, *rows)

    def size(self, row_id=None):
        return database.get(
            self.db, models.Volume, row_id or self.one
        ).size_bytes

    def another(self, **options):
        """Return the same database, with connections of its own."""
        made = Database(
            options.pop('url', self.db.url), self.db.clock, **options
        )
        self.addCleanup(made.close)
        return made


@database.on_all
class Races(Case):
    def test_a_deadlock_costs_a_second_run_and_loses_nothing(self):
        runs, meet = [], threading.Barrier(2)

        def both(first, second):
            def fn(session):
                runs.append(first)
                grow(session, first)
                if len(runs) <= 2 and not self.db.is_sqlite:
                    meet.wait(JOIN_S)
                grow(session, second)

            return lambda: self.db.write(fn)

        at_once(both(self.one, self.two), both(self.two, self.one))
        self.assertEqual((2, 2), (self.size(), self.size(self.two)))
        if not self.db.is_sqlite:
            # Once more, if the other has not yet ended by then.
            self.assertGreaterEqual(len(runs), 3)

    def test_what_another_has_changed_since_is_read_again(self):
        """The value that a transaction writes may rest on what it read."""
        runs, read, done = [], threading.Event(), threading.Event()

        def slow(session):
            row = session.get(models.Volume, self.one)
            runs.append(row.size_bytes)
            if len(runs) == 1 and not self.db.is_sqlite:
                read.set()
                done.wait(JOIN_S)
            row.size_bytes += 10

        def quick():
            if not self.db.is_sqlite:
                read.wait(JOIN_S)
            self.db.write(lambda s: grow(s, self.one))
            done.set()

        at_once(lambda: self.db.write(slow), quick)
        self.assertEqual(11, self.size())
        if not self.db.is_sqlite:
            self.assertEqual([0, 1], runs)

    def test_a_lease_is_not_taken_on_what_was_read_before_its_job_ended(self):
        """What that job has written would not have been seen."""
        job = database.job(volume_id=self.one)
        database.add(self.db, job, *(
            database.job(state='done') for _ in range(20)
        ))
        self.db.write(lambda s: leases.take(
            s, models.Volume, self.one, job.id, {'available'}
        ))
        seen = []

        def end(session):
            session.execute(
                update(models.Job).where(models.Job.id == job.id)
                .values(state='done')
            )
            session.add(models.Attachment(
                volume_id=self.one, id=database.job().id, project_id='p',
                backend='b', status='attached', created_at=database.NOW,
            ))

        def fn(session):
            seen.append(session.scalar(
                select(func.count()).select_from(models.Attachment)
            ))
            if len(seen) == 1 and not self.db.is_sqlite:
                at_once(lambda: self.db.write(end))
            return leases.take(
                session, models.Volume, self.one, 'next', {'available'}
            )

        taken = self.db.write(fn)
        # Either it was told to look again, or it has to wait.
        self.assertNotEqual((True, 0), (taken, seen[-1]))

    def test_a_read_is_of_one_moment(self):
        if self.db.is_sqlite:
            self.skipTest('see tests/unit/test_engine.py')

        def fn(session):
            first = session.get(models.Volume, self.one).size_bytes
            at_once(lambda: self.db.write(lambda s: grow(s, self.two)))
            return first, session.get(models.Volume, self.two).size_bytes

        self.assertEqual((0, 0), self.db.read(fn))
        self.assertEqual(1, self.size(self.two))

    def test_a_row_that_is_matched_counts_though_nothing_changes(self):
        done = self.db.write(lambda s: s.execute(
            update(models.Volume).where(models.Volume.id == self.one)
            .values(size_bytes=0)
        ).rowcount)
        self.assertEqual(1, done)

    def test_two_that_insert_the_same_row_are_told_apart(self):
        made, meet = [], threading.Barrier(2)
        wanted = database.volume().id

        def insert():
            is_first = []

            def fn(session):
                there = session.get(models.Volume, wanted)
                if there is None:
                    if not is_first and not self.db.is_sqlite:
                        is_first.append(1)
                        meet.wait(JOIN_S)
                    session.add(database.volume(id=wanted))
                return there is None

            made.append(self.db.write(fn))

        at_once(insert, insert)
        self.assertEqual([False, True], sorted(made))


class OnServer(Case):
    """What only a server can do; run for each kind of them."""

    database_kind = 'postgresql'

    def wired(self):
        """Return a wire, and a database behind it that is connected."""
        wire = Wire(self, self.db.url)
        db = self.another(url=wire.url)
        db.read(lambda s: s.get(models.Volume, self.one))
        return wire, db

    def test_a_commit_whose_reply_is_lost_is_not_done_again(self):
        wire, db = self.wired()
        for fate in 'unheard', 'unsent':
            with self.subTest(fate):
                runs = []

                def fn(session, runs=runs):
                    runs.append(1)
                    row = database.job()
                    session.add(row)
                    grow(session, self.one)
                    return row.id

                before = self.size()
                wire.plan[wire.commits + 1] = fate
                made = db.write(fn)
                self.assertEqual(before + 1, self.size())
                self.assertIsNotNone(database.get(self.db, models.Job, made))
                self.assertEqual(1 if fate == 'unheard' else 2, len(runs))
        self.assertEqual(2, len(self.db.read(
            lambda s: s.scalars(select(models.Job)).all()
        )))

    def test_a_commit_that_arrives_late_is_waited_for(self):
        """It is neither done twice, nor told to have failed."""
        wire, db = self.wired()
        runs = []

        def fn(session):
            runs.append(1)
            session.add(database.job())
            grow(session, self.one)

        wire.plan[wire.commits + 1] = 'late'
        thread = threading.Thread(target=db.write, args=[fn])
        thread.start()
        thread.join(0.5)
        self.assertTrue(thread.is_alive())
        wire.let_go()
        thread.join(JOIN_S)
        self.assertEqual([1], runs)
        self.assertEqual(1, self.size())

    def test_what_may_have_happened_is_not_called_refused(self):
        wire, db = self.wired()

        def fn(session):
            if session.get(models.Volume, self.one).size_bytes:
                raise errors.Invalid('it is there already')
            grow(session, self.one)

        wire.plan[wire.commits + 1] = 'unheard'
        with self.assertRaisesRegex(errors.Unknown, 'may have been done'):
            db.write(fn)
        self.assertEqual(1, self.size())

    def test_who_can_tell_is_asked_whether_it_happened(self):
        wire, db = self.wired()

        def happened(session):
            return bool(session.scalar(
                select(models.Volume.size_bytes)
                .where(models.Volume.id == self.one).with_for_update()
            ))

        for fate in 'unheard', 'unsent', 'late':
            with self.subTest(fate):
                self.db.write(lambda s: s.execute(
                    update(models.Volume).values(size_bytes=0)
                ))
                wire.plan[wire.commits + 1] = fate
                if fate == 'late':
                    timer = threading.Timer(0.3, wire.let_go)
                    timer.start()
                    self.addCleanup(timer.join)
                self.assertEqual('x', db.write(
                    lambda s: grow(s, self.one) or 'x', happened
                ))
                self.assertEqual(1, self.size())

    def test_a_process_that_hangs_does_not_keep_its_locks(self):
        slow = self.another(timeout_s=1.0)
        with slow.engine.connect() as hung:
            hung.execute(
                update(models.Volume).where(models.Volume.id == self.one)
                .values(size_bytes=7)
            )
            self.db.write(lambda s: grow(s, self.one))
            self.assertEqual(1, self.size())
            hung.invalidate()

    def test_a_wait_for_a_lock_ends(self):
        meet, go = threading.Event(), threading.Event()

        def hold(session):
            grow(session, self.one)
            meet.set()
            go.wait(JOIN_S)

        def wait():
            meet.wait(JOIN_S)
            slow = self.another(timeout_s=1.0)
            try:
                with self.assertRaisesRegex(errors.Unavailable, 'nothing was'):
                    slow.write(lambda s: grow(s, self.one))
            finally:
                go.set()

        at_once(lambda: self.db.write(hold), wait)
        self.assertEqual(1, self.size())

    def test_a_server_that_hangs_is_given_up_and_found_again(self):
        db = self.another(timeout_s=1.0)
        db.read(lambda s: s.get(models.Volume, self.one))
        server = database.server(self.db.kind)
        server.freeze()
        try:
            for work in (
                lambda: db.read(lambda s: s.get(models.Volume, self.one)),
                lambda: db.write(lambda s: grow(s, self.one)),
            ):
                begun = time.monotonic()
                with self.assertRaisesRegex(
                    errors.Unavailable, 'the database does not answer'
                ):
                    work()
                self.assertLess(time.monotonic() - begun, 20)
        finally:
            server.thaw()
        # It serves those first that have been given up.
        serving.until(lambda: is_written(db, self.one), bool)
        self.assertEqual(1, self.size())

    def test_a_server_that_was_restarted_is_found_by_every_connection(self):
        db = self.another()
        at_once(*[lambda: db.write(lambda s: grow(s, self.one))] * 5)
        server = database.server(self.db.kind)
        server.kill()
        with self.assertRaisesRegex(errors.Unavailable, 'nothing was done'):
            self.another(timeout_s=0.5).write(lambda s: grow(s, self.one))
        server.start()
        at_once(*[lambda: db.write(lambda s: grow(s, self.one))] * 5)
        self.assertEqual(10, self.size())

    def test_more_at_once_than_there_are_connections_wait_in_turn(self):
        db = self.another(connections=2)
        at_once(*[lambda: db.write(lambda s: grow(s, self.one))] * 8)
        self.assertEqual(8, self.size())
        self.assertLessEqual(db.engine.pool.checkedin(), 2)

    def test_a_connection_is_made_once_and_kept(self):
        made = []
        db = self.another()
        event.listen(db.engine, 'connect', lambda *rest: made.append(1))
        for _ in range(5):
            db.write(lambda s: grow(s, self.one))
        self.assertEqual([1], made)


class OnMariadb(OnServer):
    database_kind = 'mariadb'


class Busy(unittest.TestCase):
    database_kind = 'postgresql'

    def test_a_heart_beats_while_all_connections_are_in_use(self):
        """Otherwise a service with much to do is taken for a dead one."""
        world = serving.World(
            self, settings='database_connections = 2\nlease_s = 3\n'
        )
        outside = Database(world.service.db.url)
        self.addCleanup(outside.close)

        def heard():
            return outside.read(
                lambda s: s.get(models.Service, 'node-1').heard_at
            )

        with (
            world.service.db.engine.connect(),
            world.service.db.engine.connect(),
        ):
            before = heard()
            serving.until(heard, lambda at: at > before)


@database.on_all
class Native(unittest.TestCase):
    """Under eventlet, which would leave native threads waiting for ever."""

    def test_native_threads_that_share_a_database_wait_for_one_another(self):
        done = subprocess.run(
            [sys.executable, '-c', NATIVE], capture_output=True, text=True,
            input=database.url(self), timeout=JOIN_S,
        )
        self.assertEqual(('400\n', ''), (done.stdout, done.stderr))


class Addresses(unittest.TestCase):
    def test_what_was_not_tried_is_refused_by_name(self):
        for url in 'oracle://x/y', 'mysql+mysqldb://x/y', 'nonsense', '':
            with self.subTest(url), self.assertRaisesRegex(
                errors.Invalid, 'option database'
            ):
                Database(url)

    def test_a_server_that_is_not_there_is_unavailable(self):
        for url in (
            'postgresql://u:hunter2@127.0.0.1:1/v',
            'mariadb://u:hunter2@127.0.0.1:1/v',
        ):
            with self.subTest(url):
                db = Database(url, timeout_s=0.2)
                self.addCleanup(db.close)
                with self.assertRaises(errors.Unavailable) as caught:
                    db.read(lambda s: s.scalar(select(1)))
                self.assertNotIn('hunter2', str(caught.exception))
