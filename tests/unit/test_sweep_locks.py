# SPDX-License-Identifier: Apache-2.0
"""Lock files of what is gone go, whoever died before removing them."""

import os
import unittest
import uuid

from tests import database
from tests.fault import world
from volume import periodic
from volume.testing import fixtures
from volume.verbs import volumes


class SweepLocks(unittest.TestCase):
    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = world.World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        self.core, self.node = self.world.core, self.world.node

    def lock(self, *names):
        """Leave lock files behind, as a process does that is killed."""
        with self.node.hold(names):
            pass

    def sweep(self):
        count = periodic.sweep_locks(self.core, self.node)
        return count, {
            name for name in os.listdir(self.node.lock_dir)
            if not name.startswith('.')
        }

    def test_those_of_the_deleted_go_and_those_of_the_living_stay(self):
        dead, alive = (
            volumes.create(
                self.core, world.CALLER, volumes.NewVolume(size_bytes=1 << 20)
            ).id for _ in range(2)
        )
        volumes.delete(self.core, world.CALLER, dead)
        self.lock(f'volume-{dead}', f'volume-{alive}')
        self.assertEqual((1, {f'volume-{alive}'}), self.sweep())

    def test_those_of_uploads_go_when_their_jobs_have_ended(self):
        ended, going_on = database.job(kind='upload'), database.job(
            kind='upload'
        )
        ended.state = 'done'
        database.add(self.world.db, ended, going_on)
        self.lock(f'snapshot-{ended.id}', f'snapshot-{going_on.id}')
        self.assertEqual((1, {f'snapshot-{going_on.id}'}), self.sweep())

    def test_what_the_database_does_not_know_is_left_alone(self):
        names = {f'volume-{uuid.uuid4()}', f'snapshot-{uuid.uuid4()}'}
        self.lock(*names)
        self.assertEqual((0, names), self.sweep())
