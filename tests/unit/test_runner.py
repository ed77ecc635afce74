# SPDX-License-Identifier: Apache-2.0
"""Jobs on threads: bounded, found again, drained, never forgotten."""

import dataclasses
import threading
import time
import types
import unittest

from sqlalchemy import update

from tests import database
from volume import conf as options
from volume import errors
from volume import hints
from volume import model
from volume import rpc
from volume.backends import Backend
from volume.core import Settings
from volume.db import models
from volume.flows.kinds import FLOWS
from volume.journal import Flow
from volume.journal import Step
from volume.runner import Runner
from volume.testing import fixtures

KIND = 'tiny'
LONG_S = 30


class RunnerCase(unittest.TestCase):
    def setUp(self):
        self.clock = database.Clock()
        self.db = database.make(self, self.clock)
        self.node = fixtures.make_node(self)
        self.ran = []
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.inside = self.most = 0
        self.guard = threading.Lock()
        self.step = self.work
        FLOWS[KIND] = Flow(
            KIND, (Step(lambda job: self.step(job)),),
            failed=lambda job, error: lambda session: None,
        )
        self.addCleanup(FLOWS.pop, KIND)
        self.runner = self.make('owner')

    def make(self, owner, names=('b',), parallel=2):
        conf = types.SimpleNamespace(max_parallel=parallel)
        pools = {'pool': model.Pool('pool', 1, 1, True)}
        runner = Runner(
            self.db, self.node,
            {
                name: Backend(name, conf, None, None, is_up=True, pools=pools)
                for name in names
            },
            owner=owner, host='node-1',
            settings=Settings(lease_s=30.0, job_retry_s=100.0),
            notify=lambda event, payload: None, spool_directory='',
            source_for=lambda url: None,
        )
        self.addCleanup(runner.drain, 5)
        self.addCleanup(self.gate.set)
        return runner

    def work(self, job):
        self.ran.append(job.row.id)

    def blocks(self, job):
        """Run until the gate opens, and count who is inside."""
        with self.guard:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.begun.release()
        self.gate.wait(LONG_S)
        with self.guard:
            self.inside -= 1
        self.ran.append(job.row.id)

    def accept(self, **values):
        row = database.job(**{'kind': KIND, **values})
        database.add(self.db, row)
        return row

    def state(self, row):
        return database.get(self.db, models.Job, row.id)

    def until(self, is_right):
        deadline = time.monotonic() + LONG_S
        while not is_right():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.002)


class Hints(RunnerCase):
    def test_a_hinted_job_runs_and_its_waiter_is_answered(self):
        def work(job):
            job.answer['x'] = 1

        self.step = work
        row = self.accept()
        self.runner.hint(row)
        ended = self.runner.wait(row.id, LONG_S)
        self.assertEqual(('done', {'x': 1}), (ended.state, ended.answer))

    def test_who_waits_after_the_end_is_answered_too(self):
        self.step = lambda job: job.answer.update(x=1)
        row = self.accept()
        self.runner.hint(row)
        self.until(lambda: not self.runner.busy())
        for _ in range(2):
            self.assertEqual(
                {'x': 1}, self.runner.wait(row.id, LONG_S).answer
            )

    def test_who_sees_the_end_before_it_is_told_has_the_answer_too(self):
        seen, look = threading.Event(), self.runner._row

        def row_of(job_id):
            row = look(job_id)
            if row.state == 'done':
                seen.set()
            return row

        self.runner._row = row_of
        self.step = lambda job: job.answer.update(x=1)
        FLOWS[KIND] = dataclasses.replace(
            FLOWS[KIND], ended=lambda job: seen.wait(LONG_S)
        )
        row = self.accept()
        self.runner.hint(row)
        ended = self.runner.wait(row.id, LONG_S)
        self.assertTrue(seen.is_set())
        self.assertEqual({'x': 1}, ended.answer)

    def test_several_waiters_are_all_answered(self):
        self.step = self.blocks
        row = self.accept()
        self.runner.hint(row)
        answers = []
        threads = [threading.Thread(
            target=lambda: answers.append(self.runner.wait(row.id, LONG_S))
        ) for _ in range(5)]
        for thread in threads:
            thread.start()
        self.begun.acquire(timeout=LONG_S)
        self.gate.set()
        for thread in threads:
            thread.join()
        self.assertEqual(['done'] * 5, [each.state for each in answers])

    def test_a_failure_reaches_the_waiter(self):
        def work(job):
            raise errors.Conflict('it differs')

        self.step = work
        row = self.accept()
        self.runner.hint(row)
        ended = self.runner.wait(row.id, LONG_S)
        self.assertEqual(
            ('failed', 'Conflict', 'it differs'),
            (ended.state, ended.error_kind, ended.error),
        )

    def test_a_job_that_another_process_ran_is_seen_to_end(self):
        row = self.accept(owner='elsewhere')
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(self.runner.wait(row.id, LONG_S))
        )
        thread.start()
        self.db.write(lambda s: s.execute(
            update(models.Job).values(state='failed', error_kind='NoSpace')
        ))
        thread.join(LONG_S)
        self.assertEqual('NoSpace', answers[0].error_kind)

    def test_who_waits_too_long_is_told_that_the_job_goes_on(self):
        self.step = self.blocks
        row = self.accept()
        self.runner.hint(row)
        with self.assertRaisesRegex(errors.Unknown, 'goes on'):
            self.runner.wait(row.id, 0.01)
        self.gate.set()
        self.assertEqual('done', self.runner.wait(row.id, LONG_S).state)

    def test_what_ends_while_it_is_looked_at_for_the_last_time_has_ended(self):
        look = self.runner._row

        def row_of(job_id):
            row = look(job_id)
            self.gate.set()
            self.until(lambda: not self.runner.busy())
            return row

        self.runner._row = row_of
        self.step = self.blocks
        row = self.accept()
        self.runner.hint(row)
        self.begun.acquire(timeout=LONG_S)
        self.assertEqual('done', self.runner.wait(row.id, 0.0).state)

    def test_a_job_hinted_twice_runs_once(self):
        self.step = self.blocks
        row = self.accept()
        for _ in range(3):
            self.runner.hint(row)
        self.gate.set()
        self.runner.wait(row.id, LONG_S)
        self.until(lambda: not self.runner.busy())
        self.assertEqual([row.id], self.ran)

    def test_anothers_job_is_left_to_the_sweep(self):
        row = self.accept(owner='elsewhere')
        self.runner.hint(row)
        self.assertEqual(0, self.runner.busy())
        self.assertEqual([], self.ran)

    def test_a_hint_that_comes_after_its_lease_ran_out_runs_nothing(self):
        row = self.accept()
        self.clock.now += 31
        self.runner.hint(row)
        self.assertEqual(0, self.runner.busy())

    def test_a_backend_runs_no_more_jobs_at_once_than_it_may(self):
        self.step = self.blocks
        rows = [self.accept() for _ in range(8)]
        for row in rows:
            self.runner.hint(row)
        for _ in range(2):
            self.assertTrue(self.begun.acquire(timeout=LONG_S))
        self.assertEqual(8, self.runner.busy())
        self.gate.set()
        for row in rows:
            self.runner.wait(row.id, LONG_S)
        self.assertEqual(2, self.most)

    def test_a_backend_in_trouble_does_not_stop_another(self):
        runner = self.make('two', ('b', 'c'), parallel=1)

        def work(job):
            if job.row.backend == 'b':
                self.blocks(job)

        self.step = work
        slow = [self.accept(owner='two') for _ in range(3)]
        quick = self.accept(owner='two', backend='c')
        for row in (*slow, quick):
            runner.hint(row)
        self.assertEqual('done', runner.wait(quick.id, LONG_S).state)
        self.assertEqual('open', self.state(slow[0]).state)


@database.on_all
class FailingHints(hints.Hints):
    """Whatever it sends meets a bug."""

    def _wake(self, bus, word):
        self.words.append(word.job_id)
        raise RuntimeError('a bug')


class Messages(RunnerCase):
    def test_a_bug_in_one_hint_keeps_no_other_from_being_sent(self):
        conf = options.load([], [])
        rpc.register_opts(conf)
        conf.set_override('transport_url', 'rabbit://h/')
        told = FailingHints(conf, self.db, self.runner, silent_s=1.0)
        told.words = []
        rows = [self.accept(owner='x', backend='c') for _ in range(3)]
        for row in rows:
            told(row)
        told.start()
        told.stop()
        told._thread.join(LONG_S)  # who stops it does not wait as long
        self.assertEqual([row.id for row in rows], told.words)


class Sweeps(RunnerCase):
    def sweep(self, runner=None):
        taken = (runner or self.runner).sweep()
        self.until(lambda: not (runner or self.runner).busy())
        return taken

    def test_a_job_that_nobody_was_told_of_is_found(self):
        row = self.accept(owner=None, expires_at=0.0)
        self.assertEqual(1, self.sweep())
        self.assertEqual('done', self.state(row).state)
        self.assertEqual(2, self.state(row).token)

    def test_what_is_leased_or_not_due_or_anothers_is_left(self):
        self.accept(owner='elsewhere')
        self.accept(owner=None, expires_at=0.0, due_at=database.NOW + 1)
        self.accept(owner=None, expires_at=0.0, backend='c')
        self.accept(owner=None, expires_at=0.0, state='done')
        self.assertEqual(0, self.sweep())
        self.assertEqual([], self.ran)

    def test_a_dead_process_of_this_node_is_succeeded_when_it_expires(self):
        row = self.accept(owner='dead')
        self.assertEqual(0, self.sweep())
        self.clock.now += 31
        self.assertEqual(1, self.sweep())
        self.assertEqual('done', self.state(row).state)

    def test_an_earlier_process_of_this_node_is_succeeded_at_once(self):
        row = self.accept(owner='dead')
        other = self.accept(owner='elsewhere', owner_host='node-2')
        self.runner.void_earlier()
        self.assertEqual(1, self.sweep())
        self.assertEqual('done', self.state(row).state)
        self.assertEqual('open', self.state(other).state)

    def test_a_dead_nodes_job_needs_an_operators_word(self):
        row = self.accept(owner='dead', owner_host='node-2')
        database.add(self.db, models.Service(
            host='node-2', owner='dead', started_at=0.0, heard_at=0.0,
            is_fenced=False,
        ))
        self.clock.now += 3600
        self.assertEqual(0, self.sweep())
        self.db.write(lambda s: s.execute(
            update(models.Service).values(is_fenced=True)
        ))
        self.assertEqual(1, self.sweep())
        self.assertEqual('done', self.state(row).state)

    def test_a_job_of_a_volume_that_is_open_elsewhere_is_left_to_its_home(
        self,
    ):
        mine = self.accept(owner=None, expires_at=0.0, node='node-1')
        other = self.accept(owner=None, expires_at=0.0, node='node-2')
        self.assertEqual(1, self.sweep())
        self.assertEqual('done', self.state(mine).state)
        self.clock.now += 3600
        self.assertEqual(0, self.sweep())
        with self.assertRaisesRegex(errors.Unknown, 'node fence node-2'):
            self.runner.wait(other.id, 0.01)
        database.add(self.db, models.Service(
            host='node-2', owner='dead', roles=[], started_at=0.0,
            heard_at=0.0, is_fenced=True,
        ))
        self.assertEqual(1, self.sweep())
        self.assertEqual(
            ('done', 'node-1'), (
                self.state(other).state, self.state(other).node,
            ),
        )

    def test_of_two_sweepers_one_takes_the_job(self):
        rows = [
            self.accept(owner=None, expires_at=0.0) for _ in range(20)
        ]
        other = self.make('other')
        start = threading.Barrier(2)
        taken = []

        def sweep(runner):
            start.wait()
            taken.append(runner.sweep())

        threads = [
            threading.Thread(target=sweep, args=[each])
            for each in (self.runner, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.until(lambda: not self.runner.busy() and not other.busy())
        self.assertEqual(20, sum(taken))
        self.assertEqual(
            sorted(row.id for row in rows), sorted(self.ran)
        )

    def test_renewal_keeps_what_runs_or_is_queued(self):
        self.step = self.blocks
        rows = [self.accept() for _ in range(4)]
        for row in rows:
            self.runner.hint(row)
        self.clock.now += 25
        self.runner.renew()
        self.clock.now += 25
        self.assertEqual(0, self.make('other').sweep())
        self.gate.set()
        for row in rows:
            self.assertEqual(
                'done', self.runner.wait(row.id, LONG_S).state
            )

    def test_a_job_whose_acceptor_died_before_its_hint_is_found(self):
        """Its thread has ended; the process, which holds the lease, lives."""
        row = self.accept()
        self.runner.renew()
        self.assertEqual(0, self.sweep())
        self.clock.now += 31
        self.runner.renew()
        self.assertEqual(1, self.sweep())
        self.assertEqual('done', self.state(row).state)

    def test_a_job_that_is_due_again_wakes_the_sweep_in_time(self):
        troubles = [errors.Unavailable('later')]

        def work(job):
            if troubles:
                raise troubles.pop()

        self.step = work
        row = self.accept()
        self.runner.hint(row)
        self.until(lambda: not self.runner.busy())
        self.clock.now = self.state(row).due_at
        self.runner.idle(self.clock.now + 3600)  # returns at once
        self.assertEqual(1, self.sweep())
        self.assertEqual('done', self.state(row).state)

    def test_a_kind_that_only_a_newer_release_knows_is_left_alone(self):
        self.accept(owner=None, expires_at=0.0, kind='teleport')
        row = self.accept(owner=None, expires_at=0.0)
        self.assertEqual(1, self.sweep())
        self.assertEqual('done', self.state(row).state)


class Bugs(RunnerCase):
    def test_a_bug_in_a_flow_leaves_the_job_due_again(self):
        def work(job):
            raise ZeroDivisionError

        self.step = work
        row = self.accept()
        self.runner.hint(row)
        self.until(lambda: not self.runner.busy())
        now = self.state(row)
        self.assertEqual(('open', None), (now.state, now.owner))
        self.assertIn('ZeroDivisionError', now.error)
        self.step = self.work
        self.clock.now = now.due_at
        self.runner.sweep()
        self.assertEqual('done', self.runner.wait(row.id, LONG_S).state)

    def test_a_bug_that_stays_ends_the_job_with_the_reason(self):
        def work(job):
            raise ZeroDivisionError

        self.step = work
        row = self.accept(give_up_at=database.NOW + 100)
        self.runner.hint(row)
        for _ in range(100):
            self.until(lambda: not self.runner.busy())
            now = self.state(row)
            if now.state != 'open':
                break
            self.clock.now = max(self.clock.now, now.due_at)
            self.runner.sweep()
        self.assertEqual('failed', now.state)
        self.assertIn('bug', self.runner.wait(row.id, LONG_S).error)

    def test_a_worker_outlives_a_bug(self):
        def work(job):
            raise ZeroDivisionError

        self.step = work
        for _ in range(5):
            self.runner.hint(self.accept())
        self.until(lambda: not self.runner.busy())
        self.step = self.work
        row = self.accept()
        self.runner.hint(row)
        self.assertEqual('done', self.runner.wait(row.id, LONG_S).state)

    def test_a_job_for_which_there_was_no_thread_is_found_by_a_sweep(self):
        row = self.accept()
        threading.stack_size(1 << 46)  # more than there is
        self.addCleanup(threading.stack_size, 0)
        self.runner.hint(row)
        threading.stack_size(0)
        self.runner.renew()
        self.clock.now += 31.0
        self.runner.sweep()
        self.until(lambda: self.state(row).state == 'done')
        self.assertEqual([row.id], self.ran)

    def test_a_job_that_lost_its_rows_lease_is_not_held_for_ever(self):
        from volume.flows import rows

        volume = database.volume(lease_job='another')
        database.add(self.db, volume)
        self.step = lambda job: rows.volume(job, status='available')
        row = self.accept(volume_id=volume.id)
        self.runner.hint(row)
        self.until(lambda: not self.runner.busy())
        now = self.state(row)
        self.assertEqual(('open', None), (now.state, now.owner))
        self.assertGreater(now.due_at, self.clock.now)


class Drains(RunnerCase):
    def test_running_steps_end_and_queued_jobs_are_given_back(self):
        self.step = self.blocks
        rows = [self.accept() for _ in range(5)]
        for row in rows:
            self.runner.hint(row)
        for _ in range(2):
            self.begun.acquire(timeout=LONG_S)
        thread = threading.Thread(target=self.runner.drain, args=[LONG_S])
        thread.start()
        self.until(lambda: not self.runner.runs('b'))
        self.gate.set()
        thread.join(LONG_S)
        self.assertEqual(2, len(self.ran))
        left = [self.state(row) for row in rows]
        self.assertEqual(
            {'done': 2, 'open': 3},
            {state: sum(row.state == state for row in left)
             for state in ('done', 'open')},
        )
        self.assertEqual(
            {None}, {row.owner for row in left if row.state == 'open'}
        )

    def test_a_long_step_is_stopped_at_its_next_report(self):
        def long(job):
            self.begun.release()
            while True:
                job.watch(1, 2)
                time.sleep(0.002)

        self.step = long
        row = self.accept()
        self.runner.hint(row)
        self.begun.acquire(timeout=LONG_S)
        self.runner.drain(0.01)
        now = self.state(row)
        self.assertEqual(
            ('open', None, 'do', 0),
            (now.state, now.owner, now.direction, now.attempts),
        )

    def test_what_a_sweep_takes_meanwhile_is_given_back(self):
        rows = [self.accept(owner=None, expires_at=0.0) for _ in range(3)]
        submit = self.runner._submit

        def late(*words):
            self.begun.release()
            self.until(lambda: self.runner._closed)
            submit(*words)

        self.runner._submit = late
        sweep = threading.Thread(target=self.runner.sweep)
        sweep.start()
        self.begun.acquire(timeout=LONG_S)
        self.runner.drain(LONG_S)
        sweep.join(LONG_S)
        self.assertEqual(
            {None}, {self.state(row).owner for row in rows}
        )
        self.assertEqual([], self.ran)

    def test_a_drained_runner_takes_nothing_more(self):
        self.runner.drain(1)
        self.accept(owner=None, expires_at=0.0)
        self.assertEqual(0, self.runner.sweep())
        self.assertFalse(self.runner.runs('b'))
        self.runner.hint(self.accept())
        self.assertEqual(0, self.runner.busy())

    def test_hints_that_meet_the_drain_neither_fail_nor_hang(self):
        """Of a hundred that race with it, each ran or waits for a sweep."""
        rows = [self.accept() for _ in range(100)]
        failed, start = [], threading.Barrier(5)

        def hint(part):
            start.wait()
            try:
                for row in part:
                    self.runner.hint(row)
            except BaseException as error:  # told to the test's thread
                failed.append(error)
                raise

        threads = [
            threading.Thread(target=hint, args=[rows[number::4]])
            for number in range(4)
        ]
        for thread in threads:
            thread.start()
        start.wait()
        self.runner.drain(LONG_S)
        for thread in threads:
            thread.join()
        self.assertEqual([], failed)
        self.assertEqual(0, self.runner.busy())
        for row in rows:
            now = self.state(row)
            self.assertEqual(now.id in self.ran, now.state == 'done')
