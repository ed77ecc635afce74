# SPDX-License-Identifier: Apache-2.0
"""Long work is told, stopped and slowed down from far above it."""

import contextvars
import threading
import time
import unittest

from tests.unit.journal_case import JournalCase
from tests.unit.test_concurrency import run
from tests.unit.test_concurrency import START
from volume import concurrency
from volume import errors
from volume import journal
from volume import model
from volume import periodic
from volume import progress
from volume.backends import Backend
from volume.db import models
from volume.drivers import base


class Told(unittest.TestCase):
    def setUp(self):
        self.heard = []

    def hear(self, done_bytes, total_bytes):
        self.heard.append((done_bytes, total_bytes))

    def test_where_nobody_watches_nothing_happens(self):
        progress.tell(1, 2)
        progress.pace(1 << 50)
        with progress.watching(None):
            progress.tell(1, 2)
            progress.pace(1 << 50)

    def test_the_first_word_is_passed_on_at_once_and_not_every_other(self):
        with progress.watching(self.hear):
            for done in range(1000):
                progress.tell(done, 1000)
        self.assertEqual((0, 1000), self.heard[0])
        self.assertLess(len(self.heard), 1000)

    def test_what_the_watch_raises_ends_the_work(self):
        def stop(done_bytes, total_bytes):
            raise errors.Cancelled('stop')

        with progress.watching(stop), self.assertRaises(errors.Cancelled):
            progress.tell(1, 2)
        progress.tell(1, 2)  # it is not watched any more

    def test_an_inner_watch_stands_before_the_outer_one(self):
        with progress.watching(self.hear):
            with progress.watching(None):
                progress.tell(1, 2)
            self.assertEqual([], self.heard)
            progress.tell(2, 2)
        self.assertEqual([(2, 2)], self.heard)

    def test_work_in_the_background_keeps_to_the_rate_as_well(self):
        class Tends(base.Upkeep):
            def upkeep(self, pool):
                progress.tell(1, 2)
                progress.pace(progress.CREDIT_S * 1000 + 300)
                return True

        begun_at = time.monotonic()
        periodic.upkeep([Backend(
            'b', None, Tends(), None, is_up=True, pools={
                'one': model.Pool('one', 1, 1, True, frozenset({'Upkeep'})),
            },
        )], 1000)
        self.assertGreater(time.monotonic() - begun_at, 0.25)

    def test_it_is_seen_where_the_node_blocks(self):
        with progress.watching(self.hear):
            concurrency.blocking(lambda: progress.tell(1, 2))
        self.assertEqual([(1, 2)], self.heard)

    def test_a_thread_sees_it_in_a_copy_of_the_context(self):
        with progress.watching(self.hear):
            context = contextvars.copy_context()
            for work in (
                lambda: progress.tell(1, 4),
                lambda: context.run(progress.tell, 2, 4),
            ):
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
        self.assertEqual([(2, 4)], self.heard)

    def test_work_on_two_jobs_is_watched_apart(self):
        heard, inside = [], threading.Barrier(2)

        def work(number):
            def hear(done_bytes, total_bytes):
                heard.append((number, done_bytes))

            with progress.watching(hear):
                inside.wait(30)
                progress.tell(number, 2)

        threads = [
            threading.Thread(target=work, args=(number,)) for number in (1, 2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([(1, 1), (2, 2)], sorted(heard))


class Paced(unittest.TestCase):
    def test_a_rate_is_kept_to(self):
        started = time.monotonic()
        with progress.watching(None, rate_bytes_per_s=1000):
            for _ in range(15):
                progress.pace(100)
        # One second's worth is free at the beginning.
        self.assertGreaterEqual(time.monotonic() - started, 0.5)

    def test_who_waits_for_the_rate_can_be_stopped(self):
        told = []

        def hear(done_bytes, total_bytes):
            told.append(done_bytes)
            if len(told) == 3:
                raise errors.Cancelled('stop')

        with progress.watching(hear, rate_bytes_per_s=1):
            progress.tell(1 << 20, 1 << 30)
            with self.assertRaises(errors.Cancelled):
                progress.pace(1 << 20)  # twelve days
        self.assertEqual([1 << 20] * 3, told)


class Green(unittest.TestCase):
    def says(self, script):
        done = run(START + 'from volume import errors, progress\n' + script)
        self.assertEqual('', done.stderr)
        self.assertEqual(0, done.returncode)
        return done.stdout

    def test_a_native_thread_is_watched_by_a_greenthread(self):
        # The watch waits as code does that asks a database.
        self.assertEqual('[(1, 2)] True\n', self.says("""
heard = []
def hear(done, total):
    time.sleep(0.01)
    lock = threading.Lock()
    with lock:
        heard.append((done, total))
with progress.watching(hear):
    concurrency.blocking(lambda: progress.tell(1, 2))
    began = time.monotonic()
with progress.watching(None, 1000):
    concurrency.blocking(lambda: progress.pace(1200))
print(heard, time.monotonic() - began >= 0.2)
"""))

    def test_a_stop_goes_through_a_native_thread_and_out(self):
        self.assertEqual('stop\n', self.says("""
def stop(done, total):
    time.sleep(0.01)
    raise errors.Cancelled('stop')
with progress.watching(stop):
    try:
        Node('/').blocking(lambda: progress.tell(1, 2))
    except errors.Cancelled as stopped:
        print(stopped)
"""))

    def test_others_go_on_while_a_rate_is_kept_to(self):
        self.assertEqual('True\n', self.says("""
count = 0
def go_on():
    global count
    while True:
        time.sleep(0.01)
        count += 1
threading.Thread(target=go_on, daemon=True).start()
with progress.watching(None, 1000):
    progress.pace(1300)
    concurrency.blocking(lambda: progress.pace(200))
print(count > 3)
"""))


class Watched(JournalCase):
    """A job's steps are watched, whatever they call."""

    def working(self, *numbers):
        """Return what a step does that has long work in it."""

        def work(job):
            for done in numbers:
                job._told_at = 0.0  # a second has passed
                progress.tell(done, 100)
                self.done.append(done)
                # ... and also here
                progress._current.get()._told_at = -1.0

        return work

    def cancel(self, job=None):
        def ask(session):
            session.get(models.Job, self.row.id).cancel = True

        self.db.write(ask)

    def test_a_job_says_how_far_the_driver_is(self):
        self.start(self.flow())
        self.troubles['b'] = self.working(10, 60)
        self.run_now()
        row = self.fresh()
        self.assertEqual((60, 100), (row.done_bytes, row.total_bytes))
        self.assertEqual('done', row.state)

    def test_the_work_is_ended_by_who_cancels_the_job(self):
        self.start(self.flow())
        work = self.working(10, 60)
        self.troubles['b'] = lambda job: self.cancel() or work(job)
        self.run_now()
        self.assertEqual(
            ['a', 'b', 'undo b', 'undo a', 'failed Cancelled True'],
            self.done)
        self.assertEqual('cancelled', self.fresh().state)

    def test_what_is_undone_is_told_and_never_cancelled(self):
        self.start(self.flow())
        work = self.working(10, 60)
        self.troubles['b'] = errors.Invalid('no')
        self.troubles['undo a'] = lambda job: self.cancel() or work(job)
        self.run_now()
        self.assertIn(60, self.done)
        row = self.fresh()
        self.assertEqual((60, 'failed'), (row.done_bytes, row.state))

    def test_a_late_step_is_not_cancelled(self):
        flow = self.flow()
        late = journal.Step(flow.steps[2].do, is_late=True)
        self.start(journal.Flow(
            flow.kind, (*flow.steps[:2], late), failed=flow.failed))
        work = self.working(10, 60)
        self.troubles['c'] = lambda job: self.cancel() or work(job)
        self.run_now()
        self.assertEqual(60, self.done[-1])
        self.assertEqual('done', self.fresh().state)

    def test_a_service_that_stops_leaves_the_work_for_the_next(self):
        for direction in 'do', 'undo':
            with self.subTest(direction):
                self.setUp()
                self.start(self.flow())
                work = self.working(10, 60)

                def stop(job, work=work):
                    self.is_stopping = True
                    work(job)

                if direction == 'undo':
                    self.troubles['b'] = errors.Invalid('no')
                self.troubles['b' if direction == 'do' else 'undo a'] = stop
                with self.assertRaises(journal.Stopped):
                    self.run_now()
                row = self.fresh()
                self.assertEqual(('open', None, direction), (
                    row.state, row.owner, row.direction))


if __name__ == '__main__':
    unittest.main()
