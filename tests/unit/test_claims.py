# SPDX-License-Identifier: Apache-2.0
"""Bytes are promised once, whatever the statistics say."""

import threading
import unittest

from tests import database
from tests.database import GIB
from volume import errors
from volume import model
from volume import placement
from volume import report
from volume.backends import Backend
from volume.db import claims
from volume.db import models


@database.on_all
class Claims(unittest.TestCase):
    def setUp(self):
        self.db = database.make(self)
        database.add(
            self.db, database.backend(), database.pool(device='d'),
            models.Device(name='d', limit_bytes=12 * GIB, claimed_bytes=0),
        )
        self.pool = self.candidate()

    def candidate(self, name='pool'):
        found = self.db.read(claims.candidates)
        return next(each for each in found if each.name == name)

    def claim(self, size_bytes, pool=None):
        return self.db.write(
            lambda s: claims.claim(s, pool or self.pool, size_bytes)
        )

    def give_back(self, size_bytes):
        self.db.write(lambda s: claims.give_back(s, 'b', 'pool', size_bytes))

    def claimed(self):
        return (
            database.get(self.db, models.Pool, ('b', 'pool')).claimed_bytes,
            database.get(self.db, models.Device, 'd').claimed_bytes,
        )

    def change(self, table, key, **values):
        def change(session):
            row = session.get(table, key)
            for name, value in values.items():
                setattr(row, name, value)

        self.db.write(change)

    def test_what_is_left_can_be_claimed_to_the_byte_and_no_more(self):
        self.assertTrue(self.claim(9 * GIB))
        self.assertFalse(self.claim(GIB + 1))
        self.assertEqual((9 * GIB, 9 * GIB), self.claimed())
        self.assertTrue(self.claim(GIB))
        self.assertFalse(self.claim(1))

    def test_what_was_given_back_can_be_claimed_again(self):
        self.claim(10 * GIB)
        self.give_back(4 * GIB)
        self.assertEqual((6 * GIB, 6 * GIB), self.claimed())
        self.assertFalse(self.claim(5 * GIB))
        self.assertTrue(self.claim(4 * GIB))

    def test_hidden_bytes_are_not_promised_again(self):
        self.change(models.Pool, ('b', 'pool'), hidden_bytes=3 * GIB)
        self.assertEqual(7 * GIB, self.candidate().unclaimed_bytes)
        self.assertFalse(self.claim(8 * GIB))
        self.assertTrue(self.claim(7 * GIB))

    def test_pools_of_one_device_share_one_budget(self):
        database.add(self.db, database.pool(name='other', device='d'))
        other = self.candidate('other')
        self.assertTrue(self.claim(8 * GIB))
        self.assertFalse(self.claim(5 * GIB, other))
        self.assertEqual(
            0, database.get(self.db, models.Pool, ('b', 'other')).claimed_bytes
        )
        self.assertTrue(self.claim(4 * GIB, other))
        self.assertEqual((8 * GIB, 12 * GIB), self.claimed())

    def test_nothing_costs_nothing(self):
        self.change(models.Pool, ('b', 'pool'), limit_bytes=0)
        self.assertTrue(self.claim(0))

    def test_a_burst_claims_what_there_is_and_no_more(self):
        won, start = [], threading.Barrier(32)

        def race():
            start.wait()
            if self.claim(GIB):
                won.append(1)

        threads = [threading.Thread(target=race) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(10, len(won))
        self.assertEqual((10 * GIB, 10 * GIB), self.claimed())

    def test_the_choice_goes_by_the_claims_not_by_the_statistics(self):
        self.claim(9 * GIB)
        wish = placement.Wish(size_bytes=2 * GIB)
        with self.assertRaisesRegex(Exception, '1 without room for it'):
            placement.choose(self.db.read(claims.candidates), wish)

    def test_a_pool_of_a_backend_that_is_down_is_no_choice(self):
        self.change(models.Backend, 'b', is_up=False)
        self.assertFalse(self.candidate().is_up)


class Conf:
    driver, exporter, tags, projects = 'file', 'nbd', [], []
    cluster = role = ''
    cost, reserved_percent, oversubscription, capacity_gib = 0, 0, 1.0, None

    def __init__(self, **values):
        vars(self).update(values)


class Reporting(unittest.TestCase):
    """What the tests of reports share."""

    def setUp(self):
        self.db = database.make(self)

    def backend(self, name, pools, is_up=True, **conf):
        return Backend(
            name, Conf(**conf), None, None, '' if is_up else 'broken', is_up,
            {each.name: each for each in pools},
        )

    def report_all(self, backends, host='node-1', now=database.NOW):
        self.db.write(lambda s: report.report(s, backends, host, now))

    def pool(self, name='pool', key='b'):
        return database.get(self.db, models.Pool, (key, name))


class Reports(Reporting):
    """What a manager reports never changes what was promised."""

    def report(self, *pools, name='b', is_up=True, **conf):
        self.report_all([self.backend(name, pools, is_up, **conf)])

    def test_the_limit_is_total_times_oversubscription_less_the_reserve(self):
        seen = model.Pool('pool', 100 * GIB, 50 * GIB, thin=True)
        for conf, limit, free in (
            ({}, 100, 50),
            ({'reserved_percent': 10}, 90, 40),
            ({'oversubscription': 2.0}, 200, 50),
            ({'oversubscription': 2.0, 'reserved_percent': 10}, 190, 40),
            ({'capacity_gib': 20.0}, 20, 50),
        ):
            with self.subTest(conf):
                self.report(seen, **conf)
                row = self.pool()
                self.assertEqual(limit * GIB, row.limit_bytes)
                self.assertEqual(free * GIB, row.free_bytes)

    def test_a_thick_pool_is_never_oversubscribed(self):
        self.report(
            model.Pool('pool', GIB, GIB, thin=False), oversubscription=3.0
        )
        self.assertEqual(GIB, self.pool().limit_bytes)

    def test_a_report_keeps_the_claims(self):
        seen = model.Pool('pool', 10 * GIB, 10 * GIB, thin=True)
        self.report(seen)
        candidate = self.db.read(claims.candidates)[0]
        self.db.write(lambda s: claims.claim(s, candidate, GIB))
        self.report(seen)
        self.assertEqual(GIB, self.pool().claimed_bytes)

    def test_a_pool_that_is_gone_is_down_and_comes_back(self):
        seen = model.Pool('pool', GIB, GIB, thin=True)
        self.report(seen)
        self.report()
        self.assertFalse(self.pool().is_up)
        self.report(seen)
        self.assertTrue(self.pool().is_up)

    def test_a_backend_that_is_down_takes_its_pools_down(self):
        self.report(model.Pool('pool', GIB, GIB, thin=True))
        self.report(is_up=False)
        self.assertFalse(self.pool().is_up)
        row = database.get(self.db, models.Backend, 'b')
        self.assertEqual((False, 'broken'), (row.is_up, row.reason))

    def test_a_backend_that_left_the_configuration_is_down(self):
        pools = [model.Pool('pool', GIB, GIB, thin=True)]
        self.report_all([self.backend('b', pools), self.backend('c', pools)])
        self.report_all([self.backend('x', [])], host='node-2')
        self.report_all([self.backend('c', pools)])
        up = {
            row.name: row.is_up for row in self.db.read(
                lambda s: s.query(models.Backend).all()
            )
        }
        self.assertEqual({'b': False, 'c': True, 'x': True}, up)

    def test_a_pool_takes_its_claims_along_to_another_device(self):
        """A reboot may number the file systems anew, and so back again."""
        def at(a, b):
            self.report(
                model.Pool('a', 9 * GIB, GIB, thin=True, device=a),
                model.Pool('b', 9 * GIB, GIB, thin=True, device=b),
            )

        def devices():
            return {
                row.name: row.claimed_bytes for row in self.db.read(
                    lambda s: s.query(models.Device).all()
                )
            }

        at('1', '2')
        candidates = {
            each.name: each for each in self.db.read(claims.candidates)
        }
        self.db.write(lambda s: claims.claim(s, candidates['a'], 3 * GIB))
        self.db.write(lambda s: claims.claim(s, candidates['b'], 2 * GIB))
        self.assertEqual(
            {'node-1/1': 3 * GIB, 'node-1/2': 2 * GIB}, devices()
        )
        at('2', '1')
        self.assertEqual(
            {'node-1/1': 2 * GIB, 'node-1/2': 3 * GIB}, devices()
        )
        at('3', '3')
        self.assertEqual(
            {'node-1/1': 0, 'node-1/2': 0, 'node-1/3': 5 * GIB}, devices()
        )


class SeveralManagers(Reporting):
    """A backend is up while one of its managers says so."""

    def setUp(self):
        super().setUp()
        for host in 'node-1', 'node-2':
            database.add(self.db, models.Service(
                host=host, owner=host, roles=[], started_at=database.NOW,
                heard_at=database.NOW,
            ))
        self.seen = [model.Pool('pool', GIB, GIB, thin=True)]

    def say(self, host, is_up=True, now=database.NOW):
        def hear(session):
            session.get(models.Service, host).heard_at = now

        self.db.write(hear)
        self.report_all([self.backend('b', self.seen, is_up)], host, now)

    def row(self):
        found = database.get(self.db, models.Backend, 'b')
        return found.host, found.is_up, found.updated_at - database.NOW

    def test_one_that_is_down_takes_down_nobody_elses(self):
        self.say('node-1')
        self.say('node-2', is_up=False)
        self.assertEqual(('node-1', True, 0), self.row())
        self.assertTrue(self.pool().is_up)
        self.say('node-1', is_up=False)
        self.assertEqual(('node-1', False, 0), self.row())

    def test_another_that_is_up_comes_in_for_one_that_is_down(self):
        self.say('node-1')
        self.say('node-2')
        self.assertEqual('node-1', self.row()[0])
        self.say('node-1', is_up=False)
        self.assertTrue(self.row()[1])
        self.say('node-2')
        self.assertEqual(('node-2', True, 0), self.row())

    def test_another_comes_in_for_one_that_is_silent_before_it_is_missed(
        self,
    ):
        self.say('node-1')
        self.say('node-2', now=database.NOW + 29)
        self.assertEqual(('node-1', True, 0), self.row())
        self.say('node-2', now=database.NOW + 31)
        self.assertEqual(('node-2', True, 31), self.row())

    def test_one_that_leaves_it_out_leaves_it_to_the_other(self):
        self.say('node-1')
        self.say('node-2')
        self.report_all([], 'node-1')
        self.assertTrue(self.row()[1])

    def test_a_backend_that_nobody_reports_is_not_chosen(self):
        self.say('node-1')
        for after_s, is_heard in (0, True), (0.5, False):
            found = self.db.read(lambda s, after_s=after_s: claims.candidates(
                s, database.NOW + after_s
            ))
            self.assertEqual([is_heard], [each.is_heard for each in found])
        wish = placement.Wish(size_bytes=GIB)
        with self.assertRaisesRegex(errors.NoSpace, '1 not heard of lately'):
            placement.choose(found, wish)
