# SPDX-License-Identifier: Apache-2.0
"""While a host can reach a volume, or may yet, it is never available."""

import dataclasses
import unittest

from sqlalchemy import update

from tests.fault import world
from volume import errors
from volume import ids
from volume import model
from volume import periodic
from volume.db import models
from volume.exports.base import Export
from volume.testing import fixtures
from volume.verbs import attachments
from volume.verbs import volumes

CONNECTOR = {'host': 'compute-1'}


def too_late(job_id, timeout_s):
    raise errors.Unknown(f'job {job_id} goes on')


class GivenUp(unittest.TestCase):
    """A host asks, and stops waiting before its job has begun."""

    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = world.World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        self.core = self.world.core
        self.volume_id = volumes.create(
            self.core, world.CALLER, volumes.NewVolume(size_bytes=1 << 20)
        ).id
        attachments.reserve(self.core, world.CALLER, self.volume_id)
        hasty = dataclasses.replace(
            self.core, hint=lambda *known: None, wait=too_late
        )
        with self.assertRaises(errors.Unknown):
            attachments.connect(
                hasty, world.CALLER, self.volume_id, CONNECTOR
            )

    def status(self):
        return self.world.live(models.Volume)[self.volume_id].status

    def reachable(self):
        return self.world.backends['b'].exporter.exported()

    def test_unreserved_it_is_not_exported_behind_our_back(self):
        attachments.unreserve(self.core, world.CALLER, self.volume_id)
        self.world.recover()
        self.assertEqual('available', self.status())
        self.assertEqual(set(), self.reachable())
        self.assertEqual([], self.world.disagreements())

    def test_not_unreserved_it_is_attaching_until_the_job_has_ended(self):
        self.assertEqual('attaching', self.status())
        self.world.restart()
        self.assertEqual('attaching', self.status())
        self.assertEqual(1, len(self.reachable()))
        with self.assertRaises(errors.Invalid):
            volumes.extend(
                self.core, world.CALLER, self.volume_id, 2 << 20
            )
        with self.assertRaises(errors.Invalid):
            volumes.delete(self.core, world.CALLER, self.volume_id)

    def test_detached_by_force_nothing_comes_after_it(self):
        attachments.detach(
            self.core, world.CALLER, self.volume_id, force=True
        )
        self.world.recover()
        self.assertEqual('available', self.status())
        self.assertEqual(set(), self.reachable())


class Strangers(unittest.TestCase):
    def test_an_export_that_the_database_does_not_know_goes_on(self):
        directory = fixtures.plain_directory(self)
        made = world.World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        volume_id = volumes.create(
            made.core, world.CALLER, volumes.NewVolume(size_bytes=1 << 20)
        ).id
        exporter = made.backends['b'].exporter
        export_id = ids.new()
        exporter.export(Export(
            export_id, volume_id,
            made.driver().map(made.noun(volume_id), model.Access.WRITE),
            model.Host('h'), model.Access.WRITE, 1 << 20,
        ))
        strangers = set()
        for _ in range(2):
            self.assertEqual([], periodic.end_orphan_exports(
                made.core, made.backends, strangers
            ))
        self.assertEqual({export_id}, strangers)
        self.assertEqual({export_id}, exporter.exported())


class TwiceOnOneHost(unittest.TestCase):
    """Two virtual machines of one host share a volume."""

    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = world.World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        self.core = self.world.core
        self.volume_id = volumes.create(
            self.core, world.CALLER,
            volumes.NewVolume(size_bytes=1 << 20, multiattach=True),
        ).id

    def attach(self, host):
        made = attachments.create(
            self.core, world.CALLER, self.volume_id, ids.new()
        )
        attachments.update(
            self.core, world.CALLER, made.id, {'host': host}
        )
        attachments.complete(self.core, world.CALLER, made.id)

    def reachable(self):
        return self.world.backends['b'].exporter.exported()

    def test_each_has_an_attachment_of_its_own(self):
        self.attach('one')
        self.attach('one')
        self.assertEqual(2, len(self.reachable()))

    def test_who_cannot_serve_a_host_twice_refuses_before_anything(self):
        pool, = self.world.all(models.Pool)
        features = sorted({*pool.features} - {'export:twice_per_host'})
        self.core.db.write(lambda session: session.execute(
            update(models.Pool).values(features=features)
        ))
        self.attach('one')
        with self.assertRaisesRegex(errors.Unsupported, 'host one twice'):
            self.attach('one')
        self.assertEqual(1, len(self.reachable()))
        self.attach('two')
        self.assertEqual(2, len(self.reachable()))
