# SPDX-License-Identifier: Apache-2.0
"""Steps in order, undone, tried again, fenced, stopped, placed anew."""

import dataclasses
import sqlite3

from sqlalchemy import exc
from sqlalchemy import update

from tests import database
from tests.unit.journal_case import JournalCase
from volume import errors
from volume import journal
from volume.db import jobs
from volume.db import models
from volume.flows import rows
from volume.flows.image import UPLOAD
from volume.journal import Flow


class Order(JournalCase):
    def test_steps_run_in_order_and_their_effects_are_written(self):
        self.start(self.flow(
            b=self.says('downloading'), c=self.says('available')
        ))
        self.assertTrue(self.run_now())
        self.assertEqual(['a', 'b', 'c'], self.done)
        self.assertEqual('available', self.status())
        row = self.fresh()
        self.assertEqual(('done', None), (row.state, row.owner))
        self.assertEqual(['done'], self.ended)

    def test_a_failure_is_undone_backwards_beginning_with_itself(self):
        self.start(self.flow())
        self.troubles['b'] = errors.Invalid('no')
        self.assertTrue(self.run_now())
        self.assertEqual(
            ['a', 'b', 'undo b', 'undo a', 'failed Invalid True'], self.done
        )
        row = self.fresh()
        self.assertEqual(
            ('failed', 'Invalid', 'no'), (row.state, row.error_kind, row.error)
        )
        self.assertEqual('error', self.status())
        self.assertEqual(['failed'], self.ended)

    def test_the_log_says_what_a_job_of_many_volumes_is_about(self):
        self.start(self.flow('a'))
        for given, said in ([1], 'of 1 attachment '), (
            [1, 2], 'of 2 attachments ',
        ):
            row = self.fresh()
            row.volume_id, row.args = None, {'attachments': given}
            with self.assertLogs('volume.journal', 'INFO') as log:
                journal.run(self.job(row))
            self.assertIn(said, log.output[0])

    def test_a_step_without_undo_is_passed_over(self):
        self.start(self.flow(undo=False))
        self.troubles['c'] = errors.Conflict('no')
        self.run_now()
        self.assertEqual(['a', 'b', 'c', 'failed Conflict True'], self.done)

    def test_a_crash_goes_on_from_its_step(self):
        self.start(self.flow())
        self.troubles['b'] = [KeyboardInterrupt()]
        with self.assertRaises(KeyboardInterrupt):
            self.run_now()
        self.assertEqual(1, self.fresh().step)
        self.clock.now += 31
        self.take('next')
        self.assertTrue(self.run_now())
        self.assertEqual(['a', 'b', 'b', 'c'], self.done)

    def test_a_crash_while_undoing_goes_on_undoing(self):
        self.start(self.flow())
        self.troubles['b'] = errors.Invalid('no')
        self.troubles['undo a'] = [KeyboardInterrupt()]
        with self.assertRaises(KeyboardInterrupt):
            self.run_now()
        self.clock.now += 31
        self.take('next')
        self.assertTrue(self.run_now())
        self.assertEqual(
            ['a', 'b', 'undo b', 'undo a', 'undo a', 'failed Invalid True'],
            self.done,
        )
        self.assertEqual('no', self.fresh().error)

    def test_an_effect_and_the_record_of_its_step_are_one(self):
        def dies(session):
            self.says('downloading')(session)
            raise KeyboardInterrupt

        self.start(self.flow(a=dies))
        with self.assertRaises(KeyboardInterrupt):
            self.run_now()
        self.assertEqual((0, 'creating'), (self.fresh().step, self.status()))


class Again(JournalCase):
    def test_what_may_get_better_is_tried_again_with_longer_pauses(self):
        for kind in errors.Unavailable, errors.Unknown:
            with self.subTest(kind):
                self.setUp()
                self.start(self.flow('a'))
                self.troubles['a'] = [kind('later') for _ in range(8)]
                self.assertEqual(
                    [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 30.0],
                    self.to_the_end()[:7],
                )
                self.assertEqual('done', self.fresh().state)
                self.assertEqual('', self.fresh().error)

    def test_while_it_waits_the_job_says_why_and_nobody_holds_it(self):
        self.start(self.flow('a'))
        self.troubles['a'] = errors.Unavailable('the pool is away')
        self.assertFalse(self.run_now())
        row = self.fresh()
        self.assertEqual(
            ('open', None, 'Unavailable', 'the pool is away'),
            (row.state, row.owner, row.error_kind, row.error),
        )
        self.assertEqual([], self.ended)

    def test_trouble_without_end_is_given_up_and_undone(self):
        self.start(self.flow('ab'), give_up_at=database.NOW + 100)
        self.troubles['b'] = errors.Unavailable('gone')
        self.to_the_end()
        self.assertEqual('failed Unavailable True', self.done[-1])
        self.assertEqual(['undo b', 'undo a'], self.done[-3:-1])
        self.assertGreaterEqual(self.clock.now, database.NOW + 100)
        self.assertLessEqual(self.clock.now, database.NOW + 131)

    def test_busy_is_tried_for_seconds_only(self):
        self.start(self.flow('a'))
        self.troubles['a'] = errors.Busy('in use')
        self.to_the_end()
        self.assertEqual('failed', self.fresh().state)
        self.assertLessEqual(
            self.clock.now, database.NOW + journal.BUSY_RETRY_S + 10
        )

    def test_busy_while_undoing_has_its_own_time(self):
        self.start(self.flow('a'))
        self.clock.now += 90
        self.troubles['a'] = errors.Invalid('no')
        self.troubles['undo a'] = [errors.Busy('in use')] * 3
        self.to_the_end()
        self.assertEqual('failed Invalid True', self.done[-1])

    def test_an_undo_that_never_succeeds_is_given_up_and_told(self):
        self.start(self.flow('ab'))
        self.troubles['b'] = errors.Invalid('wrong')
        self.troubles['undo b'] = errors.Unknown('no answer')
        self.to_the_end()
        self.assertEqual('failed Invalid False', self.done[-1])
        self.assertNotIn('undo a', self.done)
        self.assertEqual(
            'wrong; and it could not be undone: no answer',
            self.fresh().error,
        )
        self.assertEqual('error', self.status())

    def test_corrupt_keeps_everything_as_it_is(self):
        self.start(self.flow('ab'))
        self.troubles['b'] = errors.Corrupt('wrong bytes')
        self.assertTrue(self.run_now())
        self.assertEqual(['a', 'b', 'failed Corrupt False'], self.done)
        self.assertEqual('failed', self.fresh().state)

    def test_a_step_that_succeeds_starts_the_pauses_anew(self):
        self.start(self.flow('ab'))
        self.troubles['a'] = [errors.Unavailable('x')] * 2
        self.troubles['b'] = [errors.Unavailable('x')] * 2
        self.assertEqual([0.1, 0.3, 0.1, 0.3], self.to_the_end())

    def test_an_effect_that_fails_is_a_step_that_failed(self):
        def full(session):
            self.says('downloading')(session)
            raise errors.NoSpace('full')

        self.start(self.flow('ab', a=full))
        self.assertTrue(self.run_now())
        self.assertEqual(['a', 'undo a', 'failed NoSpace True'], self.done)
        self.assertEqual('error', self.status())

    def test_an_effect_that_may_get_better_is_tried_with_longer_pauses(self):
        troubles = [errors.Unavailable('x')] * 3

        def effect(session):
            if troubles:
                raise troubles.pop()

        for names in 'a', 'ab':
            with self.subTest(names):
                self.setUp()
                troubles = [errors.Unavailable('x')] * 3
                self.start(self.flow(names, a=effect))
                self.assertEqual([0.1, 0.3, 1.0], self.to_the_end())
                self.assertEqual('done', self.fresh().state)

    def test_a_transaction_that_is_run_again_records_one_step(self):
        lost = []

        def effect(session):
            self.says('downloading')(session)
            if not lost:
                lost.append(1)
                raise exc.OperationalError(
                    '', {}, sqlite3.OperationalError('database is locked')
                )

        self.start(self.flow('abc', a=effect))
        self.run_now()
        self.assertEqual(['a', 'b', 'c'], self.done)

    def test_a_commit_that_fails_leaves_the_step_undone_in_memory_too(self):
        """A full disk says so at the commit: then nothing was written."""
        class Full(journal.Database):
            left = 1

            def write(self, fn, happened=None):
                if self.left:
                    self.left -= 1
                    try:
                        return super().write(lambda s: (fn(s), 1 / 0))
                    except ZeroDivisionError:
                        raise errors.Unavailable('disk is full') from None
                return super().write(fn, happened)

        self.start(self.flow('ab'))
        full = Full(self.db.url, self.clock)
        self.addCleanup(full.close)
        job = self.job()
        job.db = full
        self.assertFalse(journal.run(job))
        self.assertEqual(
            (0, 'open'), (job.row.step, job.row.state)
        )
        self.assertEqual((0, 'open'), (self.fresh().step, self.fresh().state))
        self.run_later()
        self.assertEqual(['a', 'a', 'b'], self.done)

    def test_a_commit_whose_reply_was_lost_is_not_recorded_twice(self):
        """Whoever asks again is told that the job has moved already."""
        class Deaf(journal.Database):
            left = 2

            def write(self, fn, happened=None):
                result = super().write(fn)
                if self.left and happened is not None:
                    self.left -= 1
                    if not super().read(happened):
                        return super().write(fn)
                return result

        def grow(session):
            session.execute(update(models.Volume).values(
                size_bytes=models.Volume.size_bytes + 1
            ))

        before = database.get(
            self.db, models.Volume, self.volume.id
        ).size_bytes
        self.start(self.flow('ab', a=grow, b=grow))
        deaf = Deaf(self.db.url, self.clock)
        self.addCleanup(deaf.close)
        job = self.job()
        job.db = deaf
        self.assertTrue(journal.run(job))
        self.assertEqual(0, deaf.left)
        self.assertEqual(['a', 'b'], self.done)
        self.assertEqual('done', self.fresh().state)
        self.assertEqual(before + 2, database.get(
            self.db, models.Volume, self.volume.id
        ).size_bytes)

    def test_a_job_waits_while_the_database_is_away(self):
        """It is let go of, or its lease runs out: no more than that."""
        class Away(journal.Database):
            def write(self, fn, happened=None):
                raise errors.Unavailable('the database does not answer')

        self.start(self.flow('ab'))
        away = Away(self.db.url, self.clock)
        self.addCleanup(away.close)
        job = self.job()
        job.db = away
        self.assertFalse(journal.run(job))
        self.assertEqual((0, 'open'), (self.fresh().step, self.fresh().state))
        self.assertGreaterEqual(job.row.due_at, self.clock.now + 30)
        self.clock.now += 31
        self.take('next')
        self.assertTrue(self.run_now())
        self.assertEqual(['a', 'a', 'b'], self.done)

    def test_a_bug_is_tried_again_and_has_an_end(self):
        self.start(self.flow('ab'), give_up_at=database.NOW + 50)
        self.troubles['b'] = ZeroDivisionError()
        while self.fresh().state == 'open':
            job = self.job()
            try:
                journal.run(job)
            except ZeroDivisionError as bug:
                journal.fail(job, bug)
            if self.fresh().state == 'open':
                self.assertIsNone(self.fresh().owner)
                self.clock.now = max(self.fresh().due_at, self.clock.now)
                self.take()
        self.assertEqual(
            ['undo b', 'undo a', 'failed Unknown True'], self.done[-3:]
        )
        self.assertIn('ZeroDivisionError', self.fresh().error)
        self.assertEqual('error', self.status())


@database.on_all
class Fences(JournalCase):
    def test_a_stale_token_writes_nothing(self):
        stale = self.start(self.flow(a=self.says('downloading')))
        self.clock.now += 31
        self.take('next')
        with self.assertRaises(journal.LeaseLost):
            journal.run(self.job(stale))
        self.assertEqual('creating', self.status())
        row = self.fresh()
        self.assertEqual(
            (0, 'next', 2), (row.step, row.owner, row.token)
        )

    def test_a_stale_failure_undoes_nothing(self):
        stale = self.start(self.flow())
        self.clock.now += 31
        self.take('next')
        for error in errors.Invalid('x'), errors.Unavailable('x'):
            self.done.clear()
            self.troubles['a'] = error
            with self.assertRaises(journal.LeaseLost):
                journal.run(self.job(stale))
            self.assertEqual(['a'], self.done)
        self.assertEqual('do', self.fresh().direction)

    def test_a_job_that_has_ended_is_not_ended_again(self):
        stale = self.start(self.flow('a', a=self.says('available')))
        self.run_now()
        self.db.write(lambda s: s.execute(
            update(models.Volume).values(status='in-use')
        ))
        with self.assertRaises(journal.LeaseLost):
            stale.state = 'open'
            journal.run(self.job(stale))
        self.assertEqual('in-use', self.status())

    def test_a_row_that_the_job_does_not_hold_is_left_alone(self):
        def effect(session):
            rows.change(
                self.job(), session, models.Volume, self.volume.id,
                status='available',
            )

        self.start(self.flow('a', a=effect))
        self.db.write(lambda s: s.execute(
            update(models.Volume).values(lease_job='another')
        ))
        with self.assertRaises(journal.LeaseLost):
            self.run_now()
        self.assertEqual('creating', self.status())
        self.assertEqual('open', self.fresh().state)

    def test_progress_under_a_stale_token_stops_the_step(self):
        stale = self.start(self.flow('a'))
        self.clock.now += 31
        self.take('next')
        with self.assertRaises(journal.LeaseLost):
            self.job(stale).watch(1, 2)
        self.assertEqual(0, self.fresh().done_bytes)

    def test_each_record_renews_the_lease(self):
        self.start(self.flow('ab'))
        self.clock.now += 20
        self.troubles['b'] = lambda job: self.assertEqual(
            self.clock.now + 30, self.fresh().expires_at
        )
        self.run_now()
        self.assertEqual(['a', 'b'], self.done)


class Stops(JournalCase):
    def cancel(self):
        self.db.write(lambda s: s.execute(
            update(models.Job).values(cancel=True)
        ))

    def test_a_cancelled_job_is_undone_at_its_next_step(self):
        self.start(self.flow())
        self.troubles['a'] = lambda job: self.cancel()
        self.run_now()
        self.assertEqual(
            ['a', 'undo b', 'undo a', 'failed Cancelled True'], self.done
        )
        self.assertEqual('cancelled', self.fresh().state)

    def test_a_cancelled_job_is_undone_at_its_next_report(self):
        def copy(job):
            job.watch(1, 2)
            self.cancel()
            job.watch(1, 2)  # within the second: nobody looks
            job._told_at -= 2
            job.watch(2, 2)
            self.fail('it goes on')

        self.start(self.flow())
        self.troubles['b'] = copy
        self.run_now()
        self.assertEqual(
            ['a', 'b', 'undo b', 'undo a', 'failed Cancelled True'], self.done
        )

    def test_what_is_being_undone_is_not_cancelled(self):
        def undo(job):
            self.cancel()
            job._told_at = 0.0
            job.watch(1, 2)

        self.start(self.flow('a'))
        self.troubles['a'] = errors.Invalid('x')
        self.troubles['undo a'] = undo
        self.run_now()
        self.assertEqual('failed', self.fresh().state)

    def test_a_cancelled_job_that_waits_is_undone_when_it_runs(self):
        self.start(self.flow())
        self.troubles['b'] = [errors.Unavailable('x')]
        self.run_now()
        self.cancel()
        self.run_later()
        self.assertEqual('cancelled', self.fresh().state)

    def test_what_was_done_already_cannot_be_cancelled(self):
        flow = self.flow('ab')
        last = dataclasses.replace(flow.steps[1], is_late=True)
        self.start(dataclasses.replace(flow, steps=(flow.steps[0], last)))
        self.troubles['a'] = lambda job: self.cancel()
        self.run_now()
        self.assertEqual(['a', 'b'], self.done)
        self.assertEqual('done', self.fresh().state)

    def test_an_upload_whose_image_is_published_is_not_cancelled(self):
        self.assertEqual(
            [('freeze', False), ('upload', False), ('finish', True)],
            [(step.do.__name__, step.is_late) for step in UPLOAD.steps],
        )

    def test_a_stopping_service_gives_the_lease_back_between_steps(self):
        def stop(job):
            self.is_stopping = True

        self.start(self.flow())
        self.troubles['a'] = stop
        with self.assertRaises(journal.Stopped):
            self.run_now()
        self.assertEqual(['a'], self.done)
        row = self.fresh()
        self.assertEqual(
            ('open', None, 1, 0), (row.state, row.owner, row.step,
                                   row.attempts)
        )
        self.is_stopping = False
        self.take('next')
        self.assertTrue(self.run_now())
        self.assertEqual(['a', 'b', 'c'], self.done)

    def test_a_stopping_service_ends_a_long_step_at_its_report(self):
        def long(job):
            self.is_stopping = True
            job.watch(1, 2)

        self.start(self.flow('a'))
        self.troubles['a'] = long
        with self.assertRaises(journal.Stopped):
            self.run_now()
        row = self.fresh()
        self.assertEqual(('open', None, 'do'), (
            row.state, row.owner, row.direction
        ))

    def test_progress_is_in_the_row(self):
        def copy(job):
            job.watch(5, 10)
            row = self.fresh()
            self.assertEqual((5, 10), (row.done_bytes, row.total_bytes))

        self.start(self.flow('a'))
        self.troubles['a'] = copy
        self.assertTrue(self.run_now())

    def test_the_end_gives_back_what_was_shared(self):
        other = database.volume(lease_shared=2)
        database.add(self.db, other)
        self.start(self.flow('a'), shared=[f'volume-{other.id}'])
        self.run_now()
        self.assertEqual(
            1, database.get(self.db, models.Volume, other.id).lease_shared
        )

    def test_a_failure_gives_back_what_was_shared_once(self):
        other = database.snapshot(self.volume.id, lease_shared=2)
        database.add(self.db, other)
        self.start(self.flow('ab'), shared=[f'snapshot-{other.id}'])
        self.troubles['b'] = errors.Invalid('x')
        self.troubles['undo a'] = [errors.Unavailable('x')] * 3
        self.to_the_end()
        self.assertEqual(
            1, database.get(self.db, models.Snapshot, other.id).lease_shared
        )


class Anew(JournalCase):
    """A flow may place its job in another pool when one is full."""

    def test_a_full_pool_sends_the_job_to_another_backend(self):
        def again(job, error, session):
            if error.kind != 'NoSpace' or job.row.backend == 'c':
                return False
            job.row.backend = 'c'
            job.row.args = {**job.args, 'tried': 'b'}
            return True

        flow = self.flow('ab')
        self.start(Flow(
            flow.kind, flow.steps, failed=flow.failed, again=again,
            ended=flow.ended,
        ))
        self.troubles['b'] = [errors.NoSpace('full')]
        self.assertFalse(self.run_now())
        self.assertEqual(['a', 'b', 'undo b', 'undo a'], [
            each for each in self.done if not each.startswith('failed')
        ])
        row = self.fresh()
        self.assertEqual(
            ('open', 'do', 0, 'c', None, 'b'),
            (row.state, row.direction, row.step, row.backend, row.owner,
             row.args['tried']),
        )
        self.assertEqual('creating', self.status())
        self.done.clear()
        (found,) = self.db.read(
            lambda s: jobs.due(s, ['c'], 'node-1', self.clock.now)
        )
        self.db.write(lambda s: jobs.take(
            s, found, 'owner', 'node-1', self.clock.now, 30.0
        ))
        self.row = self.fresh()
        self.assertTrue(self.run_now())
        self.assertEqual(['a', 'b'], self.done)
        self.assertEqual('done', self.fresh().state)
