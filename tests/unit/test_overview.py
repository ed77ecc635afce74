# SPDX-License-Identifier: Apache-2.0
"""What ``volume-manage status`` says of rows, well and not."""

import unittest

from tests import database
from tests.database import GIB
from tests.database import NOW
from volume.db import models
from volume.db import overview

LIMIT = 5
HOST_S = 900.0
SILENT_S = 60.0


def service(**values):
    return models.Service(**{
        'host': 'node-1', 'owner': 'owner', 'roles': ['api', 'manager'],
        'version': '1', 'started_at': NOW - 100, 'heard_at': NOW - 3,
        **values,
    })


class Overview(unittest.TestCase):
    def setUp(self):
        self.db = database.make(self)

    def add(self, *rows):
        database.add(self.db, *rows)

    def add_well(self, **pool):
        self.add(service(), database.backend(), database.pool(**pool))

    def seen(self, limit=LIMIT):
        return self.db.read(
            lambda session: overview.read(
                session, NOW, limit, silent_s=SILENT_S,
                waits_for_host_s=HOST_S,
            )
        )

    def look(self):
        """Return the one thing that needs a look."""
        found = self.seen()['look']
        self.assertEqual(1, len(found), found)
        return found[0]

    def test_where_all_is_well_nothing_needs_a_look(self):
        self.add_well()
        self.add(
            database.volume(), database.job(),
            database.job(owner=None, expires_at=0.0),
            database.volume(status='attaching', updated_at=NOW - HOST_S),
            # Its maker's affair.
            database.volume(status='error', reason='no such image'),
        )
        self.assertEqual([], self.seen()['look'])

    def test_a_service_is_up_silent_or_fenced(self):
        self.add(
            service(),
            service(host='node-2', heard_at=NOW - SILENT_S - 1),
            service(host='node-3', heard_at=NOW - 900, is_fenced=True),
        )
        seen = self.seen()
        self.assertEqual(
            {'node-1': 'up', 'node-2': 'silent', 'node-3': 'fenced'},
            {row['host']: row['state'] for row in seen['services']['rows']},
        )
        self.assertEqual(2, len(seen['look']), seen['look'])
        self.assertIn('node fence node-2', seen['look'][0])

    def test_no_service_at_all_needs_a_look(self):
        self.assertIn('start volume-service', self.look())

    def test_a_backend_that_is_down_says_why(self):
        self.add(service(), database.backend(is_up=False, reason='no disk'))
        self.assertEqual('backend b is down: no disk', self.look())

    def test_a_backend_whose_service_is_gone_is_not_called_up(self):
        self.add(service(), database.backend(host='node-9'))
        self.assertIn('is served by node-9', self.look())
        [row] = self.seen()['backends']['rows']
        self.assertEqual('unserved', row['state'])

    def test_a_pool_that_is_nearly_promised_or_full_alarms(self):
        self.add_well(claimed_bytes=9 * GIB, hidden_bytes=GIB // 2)
        self.assertIn('nearly all is promised', self.look())
        [row] = self.seen()['pools']['rows']
        self.assertEqual(
            (95, 100, 100),
            (row['promised_percent'], row['free_percent'],
             row['limit_percent']),
        )

    def test_a_pool_whose_storage_is_nearly_full_alarms(self):
        self.add_well(free_bytes=GIB - 1)
        self.assertIn('its storage is nearly full', self.look())

    def test_a_pool_that_has_promised_more_than_it_holds_alarms(self):
        self.add_well(limit_bytes=30 * GIB, claimed_bytes=11 * GIB)
        self.assertIn('more is promised than it holds', self.look())

    def test_a_pool_whose_store_another_has_used_up_has_no_room(self):
        self.add_well(device='d')
        self.add(models.Device(
            name='d', limit_bytes=20 * GIB, claimed_bytes=20 * GIB - 5,
        ))
        self.assertIn('other pools on the same storage', self.look())
        [row] = self.seen()['pools']['rows']
        self.assertEqual(5, row['room_bytes'])

    def test_jobs_are_counted_by_kind_and_state(self):
        self.add_well()
        lost = {'expires_at': NOW - 1}
        free = {'owner': None, 'owner_host': '', 'expires_at': 0.0}
        self.add(
            database.job(kind='create', created_at=NOW - 50),
            database.job(kind='create'), database.job(kind='delete', **lost),
            database.job(kind='delete', **free),
            database.job(kind='delete', attempts=2, error='no answer',
                         due_at=NOW + 9, **free),
            database.job(kind='attach', direction='undo'),
            database.job(kind='create', state='done', ended_at=NOW, **free),
        )
        jobs = self.seen()['jobs']
        self.assertEqual({
            ('attach', 'undoing'): 1, ('create', 'running'): 2,
            ('delete', 'expired'): 1, ('delete', 'retrying'): 1,
            ('delete', 'waiting'): 1,
        }, {(e['kind'], e['state']): e['count'] for e in jobs['by_kind']})
        self.assertEqual((6, 50.0), (jobs['open'], jobs['oldest_s']))
        # Those in trouble, then those that take long.
        *troubled, long = [row['state'] for row in jobs['rows']]
        self.assertEqual(['expired', 'retrying', 'undoing'], sorted(troubled))
        self.assertEqual('running', long)
        retried = next(r for r in jobs['rows'] if r['state'] == 'retrying')
        self.assertEqual(
            ('no answer', 9.0), (retried['error'], retried['next_s'])
        )
        self.assertEqual(
            [{'host': 'node-1', 'held': 3, 'expired': 1}],
            self.seen()['leases'],
        )
        self.assertEqual(3, len(self.seen()['look']))

    def test_a_job_that_nobody_takes_needs_a_look(self):
        self.add_well()
        self.add(database.job(
            owner=None, expires_at=0.0, due_at=NOW - overview.SLOW_S - 1
        ))
        self.assertIn('nobody takes them', self.look())

    def test_a_status_that_nothing_leads_on_needs_a_look(self):
        self.add_well()
        old = NOW - overview.SLOW_S - 1
        job = database.job()
        lost = database.volume(status='deleting', updated_at=old)
        self.add(
            job, lost,
            database.volume(status='deleting', updated_at=old,
                            lease_job=job.id),
            database.volume(status='creating', updated_at=NOW - 1),
        )
        self.assertIn('stuck', self.look())
        self.assertEqual(
            [f'volume {lost.id}'],
            [row['what'] for row in self.seen()['stuck']['rows']],
        )

    def test_what_was_good_and_is_in_error_needs_a_look(self):
        self.add_well()
        self.add(
            database.volume(status='error', launched_at=NOW, reason='gone'),
            database.volume(status='error'),
            database.snapshot('v', status='error_deleting'),
            database.volume(status='error_deleting', deleted_at=NOW),
        )
        self.assertIn('2 volumes or snapshots that were good', self.look())
        found = self.seen()['errors']
        self.assertEqual({'error': 2, 'error_deleting': 1}, found['counts'])
        self.assertEqual(
            [True, True, False], [row['is_grave'] for row in found['rows']]
        )

    def test_the_lists_are_short_and_begin_with_what_is_in_trouble(self):
        self.add(service(), database.backend())
        for n in range(200):
            self.add(database.pool(name=f'p{n:03}', is_up=n != 150))
        self.add(*(
            database.volume(status='error', launched_at=NOW)
            for n in range(50)
        ))
        self.add(*(database.job(attempts=1) for n in range(50)))
        seen = self.seen()
        pools = seen['pools']
        self.assertEqual((200, LIMIT), (pools['count'], len(pools['rows'])))
        self.assertEqual('b#p150', pools['rows'][0]['pool'])
        self.assertEqual(LIMIT, len(seen['errors']['rows']))
        self.assertEqual(LIMIT, len(seen['jobs']['rows']))
        self.assertEqual(50, seen['counts']['volumes']['error'])
        self.assertEqual(200, len(self.seen(1000)['pools']['rows']))

    def test_history_is_counted_apart(self):
        self.add_well()
        self.add(
            database.volume(status='deleted', deleted_at=NOW),
            database.job(state='failed', owner=None, ended_at=NOW),
        )
        counts = self.seen()['counts']
        self.assertEqual({}, counts['volumes'])
        self.assertEqual(
            {'ended_jobs': 1, 'deleted_volumes': 1, 'deleted_snapshots': 0},
            counts['history'],
        )

    def test_a_backend_of_several_managers_is_up_where_one_has_it(self):
        self.add(
            service(host='node-1', heard_at=NOW - 900),
            service(host='node-2', backends={'b': ''}),
            service(host='node-3', backends={'b': 'no disk'}),
            database.backend(),
        )
        seen = self.seen()
        [row] = seen['backends']['rows']
        self.assertEqual('up', row['state'])
        self.assertIn('backend b is down on node-3: no disk', seen['look'])
