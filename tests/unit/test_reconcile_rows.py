# SPDX-License-Identifier: Apache-2.0
"""Mending a row asks its lease, for another node may work on it by now."""

import unittest

from tests import database
from volume import reconcile
from volume.db import models


class MendingRows(unittest.TestCase):
    def setUp(self):
        self.db = database.make(self)

    def mended(self, row, status='deleting'):
        finding = reconcile.Finding(
            'status', f'volume {row.id}',
            f'is {status}, and no job leads it on', 'its status becomes error',
        )
        return bool(reconcile.mend(self.db, {}, [finding]))

    def status(self, row):
        return database.get(self.db, models.Volume, row.id).status

    def test_what_nothing_leads_on_becomes_error_with_the_reason(self):
        row = database.volume(status='deleting')
        database.add(self.db, row)
        self.assertTrue(self.mended(row))
        self.assertEqual('error', self.status(row))

    def test_what_a_job_holds_by_now_is_left_alone(self):
        job = database.job()
        row = database.volume(status='deleting', lease_job=job.id)
        database.add(self.db, job, row)
        self.assertFalse(self.mended(row))
        self.assertEqual('deleting', self.status(row))

    def test_what_has_gone_on_since_it_was_looked_at_is_left_alone(self):
        row = database.volume(status='available')
        database.add(self.db, row)
        self.assertFalse(self.mended(row))
        self.assertEqual('available', self.status(row))
