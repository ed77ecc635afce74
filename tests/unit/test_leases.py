# SPDX-License-Identifier: Apache-2.0
"""Who may touch a row: one job alone, or several that only read it."""

import threading
import unittest

from sqlalchemy import update

from tests import database
from volume.db import leases
from volume.db import models


@database.on_all
class Leases(unittest.TestCase):
    def setUp(self):
        self.db = database.make(self)
        self.row = database.volume()
        self.first, self.second = database.job(), database.job()
        database.add(self.db, self.row, self.first, self.second)

    def take(self, job, statuses=('available',), **values):
        return self.db.write(lambda s: leases.take(
            s, models.Volume, self.row.id, job.id, statuses, **values
        ))

    def share(self):
        return self.db.write(lambda s: leases.share(
            s, models.Volume, self.row.id, {'available'}
        ))

    def unshare(self):
        self.db.write(
            lambda s: leases.unshare(s, models.Volume, self.row.id)
        )

    def move(self, **values):
        return self.db.write(lambda s: leases.move(
            s, models.Volume, self.row.id, {'available'}, **values
        ))

    def end(self, job, state='done'):
        self.db.write(lambda s: s.execute(
            update(models.Job).where(models.Job.id == job.id)
            .values(state=state)
        ))

    def now(self):
        return database.get(self.db, models.Volume, self.row.id)

    def test_only_one_job_has_the_row_for_itself(self):
        self.assertTrue(self.take(self.first, status='extending'))
        self.assertEqual('extending', self.now().status)
        self.assertFalse(
            self.take(self.second, ('extending',), status='deleting')
        )
        self.assertEqual(self.first.id, self.now().lease_job)
        self.assertEqual('extending', self.now().status)

    def test_a_lease_ends_with_its_job_whatever_its_end(self):
        for state in 'done', 'failed', 'cancelled':
            with self.subTest(state):
                job = database.job()
                database.add(self.db, job)
                self.assertTrue(self.take(job))
                self.assertFalse(self.take(self.second))
                self.end(job, state)
                self.assertTrue(self.move(reason=state))

    def test_a_job_whose_row_was_forgotten_holds_nothing(self):
        self.assertTrue(self.take(self.first))
        self.db.write(lambda s: s.delete(
            s.get(models.Job, self.first.id)
        ))
        self.assertTrue(self.take(self.second))

    def test_readers_share_and_keep_a_writer_out(self):
        self.assertTrue(self.share())
        self.assertTrue(self.share())
        self.assertFalse(self.take(self.first))
        self.unshare()
        self.assertFalse(self.take(self.first))
        self.unshare()
        self.assertTrue(self.take(self.first))

    def test_a_writer_keeps_readers_out(self):
        self.assertTrue(self.take(self.first))
        self.assertFalse(self.share())
        self.end(self.first)
        self.assertTrue(self.share())

    def test_giving_back_more_than_was_taken_does_not_go_below_none(self):
        self.unshare()
        self.assertEqual(0, self.now().lease_shared)

    def test_a_status_that_is_not_asked_for_is_not_taken(self):
        self.assertFalse(self.take(self.first, ('error', 'in-use')))
        self.assertIsNone(self.now().lease_job)

    def test_a_deleted_row_cannot_be_taken_shared_or_moved(self):
        self.db.write(lambda s: s.execute(
            update(models.Volume).values(deleted_at=1.0)
        ))
        self.assertFalse(self.take(self.first))
        self.assertFalse(self.share())
        self.assertFalse(self.move(status='error'))

    def test_a_held_row_cannot_be_moved(self):
        self.assertTrue(self.take(self.first))
        self.assertFalse(self.move(status='attaching'))

    def test_only_the_holder_changes_what_it_holds(self):
        self.take(self.first)

        def change(job):
            return self.db.write(lambda s: leases.change(
                s, models.Volume, self.row.id, job.id, reason=job.id
            ))

        self.assertTrue(change(self.first))
        self.assertFalse(change(self.second))
        self.assertEqual(self.first.id, self.now().reason)

    def test_of_sixteen_at_once_exactly_one_succeeds(self):
        jobs = [database.job() for _ in range(16)]
        database.add(self.db, *jobs)
        start = threading.Barrier(len(jobs))
        won = []

        def race(job):
            start.wait()
            if self.take(job):
                won.append(job.id)

        threads = [threading.Thread(target=race, args=[j]) for j in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([self.now().lease_job], won)
