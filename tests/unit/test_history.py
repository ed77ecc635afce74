# SPDX-License-Identifier: Apache-2.0
"""A backup of the database runs nothing again that was under way."""

import dataclasses
import unittest

from tests import database
from tests.fault import world
from volume.db import history
from volume.db import models
from volume.testing import fixtures
from volume.verbs import volumes


@database.on_all
class Backup(unittest.TestCase):
    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = world.World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        # Accepted, and never run: as at the moment of the backup.
        self.core = dataclasses.replace(
            self.world.core, hint=lambda *known: None
        )

    def create(self, core, **wish):
        return volumes.create(
            core, world.CALLER, volumes.NewVolume(**wish)
        ).id

    def end(self):
        return self.world.db.write(
            lambda session: history.end_open_jobs(session, self.world.now)
        )

    def test_open_jobs_end_and_their_rows_say_so(self):
        whole = self.create(self.world.core, size_bytes=1 << 20)
        source = self.create(self.world.core, size_bytes=1 << 20)
        leaving = self.create(self.world.core, size_bytes=1 << 20)
        copy = self.create(self.core, source_volume_id=source)
        volumes.extend(self.core, world.CALLER, whole, 2 << 20)
        volumes.delete(self.core, world.CALLER, leaving)
        self.assertEqual(3, self.end())
        self.assertEqual([], self.world.open_jobs())
        rows = self.world.live(models.Volume)
        self.assertEqual({
            whole: 'error_extending', source: 'available', copy: 'error',
            leaving: 'error_deleting',
        }, {row.id: row.status for row in rows.values()})
        self.assertEqual(0, rows[source].lease_shared)

    def test_what_is_in_error_can_be_deleted_and_gives_back_its_claim(self):
        copy = self.create(self.core, size_bytes=1 << 20)
        self.end()
        volumes.delete(self.world.core, world.CALLER, copy)
        self.assertEqual({}, self.world.live(models.Volume))
        self.assertEqual([], self.world.disagreements())

    def test_nothing_changes_where_nothing_is_open(self):
        whole = self.create(self.world.core, size_bytes=1 << 20)
        self.assertEqual(0, self.end())
        self.assertEqual(
            'available', self.world.live(models.Volume)[whole].status
        )
