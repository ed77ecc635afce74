# SPDX-License-Identifier: Apache-2.0
"""What an installation costs that is large, against one that is small."""

import unittest

from sqlalchemy import select

import tests
from tests import database
from tests.scale import scale_case
from tools import fill
from volume import ids
from volume import periodic
from volume import report
from volume.db import jobs
from volume.db import models

# Plans that read a table from end to end, or sort what they have found.
FULL = ('SCAN volumes', 'SCAN snapshots', 'SCAN attachments', 'SCAN jobs')
LISTS = (
    '/volumes?limit=20',
    '/volumes/detail?limit=1000',
    '/volumes/detail?limit=1000&all_tenants=1',
    '/volumes?limit=20&sort=created_at:asc',
    '/volumes?limit=20&status=available',
    '/volumes?limit=20&name=fill-7',
    '/volumes/detail?limit=20&with_count=1',
    '/snapshots/detail?limit=100',
    '/snapshots?limit=20&all_tenants=1',
    '/snapshots?volume_id={volume}',
    '/attachments?limit=100',
    '/attachments/detail?limit=100&all_tenants=1',
    '/attachments?instance_id={volume}',
    '/attachments?volume_id={volume}',
    '/os-volume-jobs?limit=100',
    '/os-volume-jobs?limit=100&all_tenants=1',
    '/os-volume-jobs?volume_id={volume}',
)
# These look at all of a project's live volumes, never at history.
LOOKS_AT_MANY = (
    '/volumes?limit=20&sort=name:asc',
    '/volumes?limit=20&sort=size:desc&all_tenants=1',
    '/volumes?limit=20&sort=updated_at:desc',
    '/volumes?limit=20&name~=e-7',
    '/volumes?limit=20&metadata=%7B%22number%22%3A%227%22%7D',
    '/volumes/summary',
    '/volumes/summary?all_tenants=1',
    '/limits',
    '/snapshots?limit=20&sort=name:asc',
)
MINORS = 0, 27, 34, 45, 54


@database.only_sqlite
@tests.by_thread
class Large(unittest.TestCase):
    """Ten thousand volumes, two hundred pools, 100,000 rows of history."""

    @classmethod
    def setUpClass(cls):
        case = cls('run_nothing')
        cls.addClassCleanup(case.doCleanups)
        cls.large = scale_case.World(case, scale_case.LARGE)
        cls.small = scale_case.World(case, scale_case.SMALL)
        cls.volume_ids = {
            world: world.one(select(models.Volume.id).where(
                models.Volume.name == 'fill-7'
            )) for world in (cls.small, cls.large)
        }

    def run_nothing(self):
        """Stand for the class while its worlds are made."""

    def costs(self, *requests):
        """Return what one after another costs in both worlds."""
        found = []
        for world in self.small, self.large:
            with world.watched() as cost:
                answer = None
                for request in requests:
                    answer = request(world, answer)
                    world.settle()
            self.assertTrue(cost.statements, 'nothing was counted')
            found.append(cost)
        return found

    def assert_same(self, small, large):
        self.assertEqual(
            len(small.statements), len(large.statements),
            '\n'.join(statement for statement, _ in large.statements),
        )
        self.assertEqual(small.acts, large.acts)

    def assert_no_scan(self, cost, sorts=False):
        for step, statement in self.large.plans(cost):
            words = step.replace(' USING', '').split()
            if 'USING' not in step:
                self.assertFalse(step.startswith(FULL), f'{step}: {statement}')
            self.assertTrue(words)
            if not sorts:
                self.assertNotIn('TEMP B-TREE', step, statement)

    def a_volume(self, world):
        return self.volume_ids[world]

    def test_a_get_costs_what_it_costs_with_ten(self):
        small, large = self.costs(lambda world, _: world.ask(
            'GET', f'/volumes/{self.a_volume(world)}'
        ))
        self.assert_same(small, large)
        self.assert_no_scan(large)

    def test_lists_read_an_index_in_every_version(self):
        for path in LISTS:
            for minor in MINORS:
                if ('attachments' in path and minor < 27) or (
                    'with_count' in path and minor < 45
                ) or ('-jobs' in path and minor < 54):
                    continue
                with self.subTest(path, minor=minor):
                    small, large = self.costs(
                        lambda world, _, path=path, minor=minor: world.ask(
                            'GET', path.format(volume=self.a_volume(world)),
                            version=f'3.{minor}',
                        )
                    )
                    self.assertEqual(
                        len(small.statements), len(large.statements)
                    )
                    self.assert_no_scan(large)

    def test_a_page_far_behind_costs_what_the_first_one_costs(self):
        def first_and_next(world, _):
            return world.ask('GET', '/volumes/detail?limit=100')

        marker = self.a_volume(self.large)
        _, first = self.costs(first_and_next)
        with self.large.watched() as behind:
            self.large.ask(
                'GET', f'/volumes/detail?limit=100&marker={marker}'
            )
        # One more: the row that the page begins behind.
        self.assertEqual(
            len(first.statements) + 1, len(behind.statements)
        )
        self.assert_no_scan(behind)

    def test_other_orders_and_filters_look_at_live_rows_only(self):
        for path in LOOKS_AT_MANY:
            with self.subTest(path):
                small, large = self.costs(
                    lambda world, _, path=path: world.ask('GET', path)
                )
                self.assertEqual(
                    len(small.statements), len(large.statements)
                )
                self.assert_no_scan(large, sorts=True)

    def test_a_life_costs_what_it_costs_with_ten(self):
        def create(world, _):
            return world.ask(
                'POST', '/volumes', {'volume': {'size': 1}}
            )['volume']['id']

        def attach(world, volume_id):
            attachment = world.ask('POST', '/attachments', {'attachment': {
                'volume_uuid': volume_id, 'instance_uuid': ids.new(),
                'connector': {'host': 'compute-1'},
            }})['attachment']
            world.ask(
                'POST', f'/attachments/{attachment["id"]}/action',
                {'os-complete': {}},
            )
            return attachment

        def detach(world, attachment):
            world.ask('DELETE', f'/attachments/{attachment["id"]}')
            return attachment['volume_id']

        def extend(world, volume_id):
            world.ask(
                'POST', f'/volumes/{volume_id}/action',
                {'os-extend': {'new_size': 2}},
            )
            return volume_id

        def delete(world, volume_id):
            world.ask('DELETE', f'/volumes/{volume_id}')

        small, large = self.costs(create, extend, delete)
        self.assert_same(small, large)
        self.assert_no_scan(large)
        small, large = self.costs(create, attach)
        self.assert_same(small, large)
        self.assert_no_scan(large)
        small, large = self.costs(create, attach, detach)
        self.assertEqual(len(small.statements), len(large.statements))
        self.assert_no_scan(large)

    def test_what_managers_ask_all_the_time_reads_an_index(self):
        world = self.large
        now = world.core.db.clock()
        names = list(world.service.runner.backends)
        with world.watched() as cost:
            world.core.db.read(lambda s: jobs.due(s, names, 'large', now))
            world.core.db.write(lambda s: jobs.void_earlier(s, 'o', 'large'))
            world.core.db.write(lambda s: jobs.renew(s, 'o', ['a'], now))
            world.core.db.write(lambda s: jobs.release(s, 'o'))
            periodic.end_stale_reservations(world.core, 900.0)
            periodic.forget(world.core, 86400.0 * 365)
        self.assert_no_scan(cost, sorts=True)

    def test_a_report_of_200_pools_is_as_many_statements_as_of_four(self):
        small, large = self.costs(lambda world, _: (
            world.core.db.write(lambda session: report.report(
                session, list(world.service.runner.backends.values()),
                fill.HOST, world.core.db.clock(),
            ))
        ))
        self.assertEqual(len(small.statements), len(large.statements))

    def test_what_is_exported_is_known_in_few_statements(self):
        world = self.large
        with world.watched() as cost:
            self.assertEqual(0, periodic.restore_exports(
                world.core, world.service.runner.backends
            ))
            self.assertEqual([], periodic.end_orphan_exports(
                world.core, world.service.runner.backends, set()
            ))
        backends = len(world.service.runner.backends)
        # Ids are asked for 500 at a time.
        most = 2 + backends + 1 + scale_case.LARGE.attachments // 500
        self.assertLessEqual(len(cost.statements), most)

    def test_a_start_asks_no_more_before_it_serves(self):
        small, large = (
            world.start_again() for world in (self.small, self.large)
        )
        self.assertEqual(len(small.statements), len(large.statements))
        self.assert_no_scan(large)
        # It looks at pools, never at volumes, attachments or jobs.
        for statement, _ in large.statements:
            if statement.startswith('SELECT'):
                self.assertNotRegex(
                    statement, 'FROM (volumes|snapshots|attachments|jobs)'
                )


if __name__ == '__main__':
    unittest.main()
