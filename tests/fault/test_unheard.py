# SPDX-License-Identifier: Apache-2.0
"""Every flow survives commits that are lost, or whose reply is lost.

A COMMIT that was not heard of may have been done. Whether it was is found
out; nothing is promised, recorded or done twice, and nothing is forgotten.
"""

import os
import random
import unittest

from tests import database
from tests.fault import scenarios
from tests.fault.world import World
from tests.wire import Wire
from volume import errors
from volume.db import models
from volume.db.engine import Database
from volume.drivers import base
from volume.drivers.file import FileDriver
from volume.testing import fixtures

IS_PROOF = os.environ.get('VOLUME_PROOF') == '1'
SEEDS = range(20) if IS_PROOF else range(1)
# What every day must do: each way in which rows are written.
SOME = frozenset({'Create', 'CloneSnapshot', 'AttachApi', 'Delete'})


class Unheard:
    """One test a scenario, on a real server behind a bad wire."""

    def survive(self, scenario):
        if scenario.exporter not in (None, 'local'):
            self.skipTest(f'no exporter {scenario.exporter}')
        missing = scenario.needs - base.features(FileDriver)
        if missing:
            self.skipTest(f'no {", ".join(sorted(missing))}')
        for seed in SEEDS:
            with self.subTest(seed=seed):
                self.one(scenario, seed)

    def one(self, scenario, seed):
        directory = fixtures.reflink_directory(self)
        world = World(self, (
            f'driver = file\ndirectories = {directory}\nexporter = local\n'
            'oversubscription = 20'
        ))
        wire = Wire(self, world.db.url)
        world.db = Database(wire.url, world.db.clock)
        self.addCleanup(world.db.close)
        world.boot(None)
        run = scenario(world)
        run.prepare()
        wire.spoil(random.Random(seed))
        try:
            run.act()
        except errors.Unknown as unheard:
            self.assertIn('may have been done', str(unheard))
        wire.mend()
        world.restart()
        self.assertEqual([], world.disagreements())
        run.verify()
        for job in world.db.read(lambda s: s.query(models.Job).all()):
            self.assertNotEqual('open', job.state)


def _add_tests():
    for scenario in scenarios.SCENARIOS:
        if not IS_PROOF and scenario.__name__ not in SOME:
            continue
        words = ''.join(
            f'_{c.lower()}' if c.isupper() else c for c in scenario.__name__
        )

        def test(self, scenario=scenario):
            self.survive(scenario)

        test.__name__ = f'test{words}_survives_lost_commits'
        setattr(Unheard, test.__name__, test)


_add_tests()


class OnPostgresql(Unheard, unittest.TestCase):
    database_kind = 'postgresql'


class OnMariadb(Unheard, unittest.TestCase):
    database_kind = 'mariadb'


assert {'postgresql', 'mariadb'} == set(database.SERVERS)
