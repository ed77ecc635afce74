# SPDX-License-Identifier: Apache-2.0
"""Mending a row asks its lease, for another node may work on it by now."""

import types
import unittest

from tests import database
from volume import ids
from volume import model
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


class AdoptedRows(unittest.TestCase):
    """What a lost row is made again as, from what the storage says."""

    def setUp(self):
        self.db = database.make(self)
        self.row_id = ids.new()

    def adopted(self, **found):
        """Return the volume's row."""
        pools = {'p': types.SimpleNamespace(thin=True)}
        finding = reconcile.Finding(
            'orphan', f'volume {self.row_id}', '', '', 'b', 'p',
            model.Found('h', 1 << 20, id=self.row_id, **found),
        )
        self.assertEqual([finding], reconcile.mend(
            self.db, {'b': types.SimpleNamespace(pools=pools)}, [finding],
            adopt=True,
        ))
        return database.get(self.db, models.Volume, self.row_id)

    def test_a_whole_one_is_available(self):
        row = self.adopted(sidecar={'name': 'n', 'filled': 'yes'})
        self.assertEqual(('available', '', 'n'), (
            row.status, row.reason, row.name))

    def test_one_that_was_being_filled_is_in_error(self):
        row = self.adopted(sidecar={'filled': 'no'})
        self.assertEqual('error', row.status)
        self.assertIn('was being filled', row.reason)

    def test_one_whose_revert_broke_off_is_to_be_reverted_again(self):
        row = self.adopted(is_torn=True)
        self.assertEqual('error_reverting', row.status)
        self.assertIn('was being reverted', row.reason)

    def test_one_that_a_host_has_is_in_use(self):
        database.add(self.db, models.Attachment(
            id=ids.new(), volume_id=self.row_id, project_id='p', backend='b',
            status='attached', created_at=0.0,
        ))
        self.assertEqual('in-use', self.adopted().status)
