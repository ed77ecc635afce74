# SPDX-License-Identifier: Apache-2.0
"""Every transaction loses its first race, and is run again from its start.

So no function that writes may keep in memory what it was about to write: the
second run must do all of what the first one did.
"""

import abc
import unittest

from tests.fault import scenarios
from tests.fault.world import World
from volume.db import models
from volume.testing import fixtures


class Lost(Exception):
    pass


class Twice:
    """A database that runs each write, takes it back, and runs it again."""

    def __init__(self, db):
        self._db = db
        self.count = 0

    def __getattr__(self, name):
        return getattr(self._db, name)

    def write(self, fn, happened=None):
        def lose(session):
            fn(session)
            session.flush()
            raise Lost

        try:
            self._db.write(lose)
        except Lost:
            self.count += 1
        return self._db.write(fn, happened)


class RetriedCase(abc.ABC):
    exporter = 'nbd'

    @abc.abstractmethod
    def section(self):
        """Return the driver's lines of the configuration."""

    def survive(self, scenario):
        if scenario.exporter not in (None, self.exporter):
            self.skipTest(f'no exporter {scenario.exporter}')
        world = World(
            self, f'{self.section()}\nexporter = {self.exporter}',
            blockd=self.exporter == 'nbd',
        )
        world.db = Twice(world.db)
        world.boot(None)
        run = scenario(world)
        missing = scenario.needs - set(
            world.backends['b'].pools[world.pool()].features
        )
        if missing:
            self.skipTest(f'no {", ".join(sorted(missing))}')
        run.prepare()
        run.act()
        self.assertEqual([], world.disagreements())
        run.verify()
        self.assertEqual([], world.disagreements())
        self.assertGreater(world.db.count, 2)
        for row in world.live(models.Volume).values():
            self.assertGreater(row.size_bytes, 0)
            self.assertGreaterEqual(row.claimed_bytes, row.size_bytes)


def _add_tests():
    for scenario in scenarios.SCENARIOS:
        words = ''.join(
            f'_{c.lower()}' if c.isupper() else c for c in scenario.__name__
        )

        def test(self, scenario=scenario):
            self.survive(scenario)

        test.__name__ = f'test{words}_can_be_recorded_twice'
        setattr(RetriedCase, test.__name__, test)


_add_tests()


class PlainFile(RetriedCase, unittest.TestCase):
    exporter = 'local'

    def section(self):
        directory = fixtures.plain_directory(self)
        return f'driver = file\ndirectories = {directory}'


class Qcow(RetriedCase, unittest.TestCase):
    def section(self):
        directory = fixtures.plain_directory(self)
        return f'driver = qcow\ndirectories = {directory}'
