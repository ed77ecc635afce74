# SPDX-License-Identifier: Apache-2.0
"""A revert that fails: the volume is whole, or nobody gets it."""

from __future__ import annotations

import dataclasses
import os
import unittest
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import delete

from tests.fault.world import CALLER
from tests.fault.world import HOST
from tests.fault.world import World
from volume import errors
from volume import model
from volume import periodic
from volume import reconcile
from volume.db import models
from volume.drivers.file import FileDriver
from volume.node import Node
from volume.testing import fixtures
from volume.testing import workbench
from volume.verbs import attachments
from volume.verbs import snapshots
from volume.verbs import volumes

SIZE = 2 * model.MIB
OLD, NEW = workbench.pattern(1, SIZE), workbench.pattern(2, SIZE)


class InPlace(FileDriver):
    """Reverts in place, says so while it lasts, and fails when told to."""

    before: errors.VolumeError | None = None
    midway: errors.VolumeError | None = None
    silent: errors.VolumeError | None = None

    def __init__(self, conf: Any, node: Node) -> None:
        super().__init__(conf, node)
        self.kept: dict[str, bytes] = {}
        self.is_torn = False

    def pools(self) -> list[model.Pool]:
        return [dataclasses.replace(
            pool, features=pool.features | {'Revert', 'Snapshots'},
        ) for pool in super().pools()]

    def inspect(self, volume: model.Volume) -> model.Found:
        if self.silent:
            raise self.silent
        return dataclasses.replace(
            super().inspect(volume), is_torn=self.is_torn)

    def scan(self, pool: str) -> Iterator[model.Found]:
        for found in super().scan(pool):
            yield dataclasses.replace(found, is_torn=self.is_torn)

    def snapshot(self, snapshot: model.Snapshot) -> str:
        self.kept[snapshot.id] = workbench.content(self, snapshot.volume)
        return snapshot.id

    def revert(self, snapshot: model.Snapshot) -> str:
        if self.before:
            raise self.before
        data = self.kept[snapshot.id]
        self.is_torn = True
        self._write(snapshot.volume, data[:SIZE // 2])
        if self.midway:
            raise self.midway
        self._write(snapshot.volume, data)
        self.is_torn = False
        return snapshot.volume.handle

    def _write(self, volume: model.Volume, data: bytes) -> None:
        with self.writer(volume) as writer:
            workbench.write_all(writer, data)
            writer.commit()


def world_of(test: unittest.TestCase, kind: Any) -> tuple[World, Any]:
    """Return a world with such a driver, which has been looked at."""
    world = World(test, '\n'.join((
        'driver = file', 'exporter = local',
        f'directories = {fixtures.directory(test)}',
    )))
    backend = world.backends['b']
    driver = backend.driver = kind(backend.conf, world.node)
    periodic.refresh(world.core, [backend], HOST)
    return world, driver


def old_and_new(world: World) -> tuple[str, str]:
    """Make a volume with new bytes, and a snapshot of its old ones."""
    volume_id = volumes.create(
        world.core, CALLER, volumes.NewVolume(size_bytes=SIZE)).id
    world.write(volume_id, 0, OLD)
    snapshot_id = snapshots.create(
        world.core, CALLER, snapshots.NewSnapshot(volume_id)).id
    world.write(volume_id, 0, NEW)
    return volume_id, snapshot_id


class Copied(InPlace):
    """Has its bytes copied back; its snapshots may lack room for that."""

    full: errors.VolumeError | None = None

    def pools(self) -> list[model.Pool]:
        return [dataclasses.replace(
            pool, features=pool.features - {'Revert'},
        ) for pool in super().pools()]

    def before_overwrite(self, volume: model.Volume) -> None:
        if self.full:
            raise self.full

    def blocknode(
        self, source: model.Volume | model.Snapshot
    ) -> Mapping[str, Any]:
        if isinstance(source, model.Volume):
            return super().blocknode(source)
        if self.midway:
            raise self.midway
        path = os.path.join(self.node.state_dir, source.id)
        with open(path, 'wb') as f:
            f.write(self.kept[source.id])
        return {
            'driver': 'raw', 'file': {'driver': 'file', 'filename': path}}


class CopiedBackTest(unittest.TestCase):
    """Where the storage cannot do it by itself."""

    def setUp(self) -> None:
        self.world, self.driver = world_of(self, Copied)
        self.v, self.s = old_and_new(self.world)

    def revert(self) -> tuple[str, str]:
        volumes.revert(self.world.core, CALLER, self.v, self.s)
        self.world.recover()
        self.assertEqual([], self.world.open_jobs())
        row = self.world.live(models.Volume)[self.v]
        content = self.world.content(self.world.noun(self.v))
        return str(row.status), {OLD: 'old', NEW: 'new'}.get(content, '?')

    def test_volume_gets_its_bytes_back(self) -> None:
        self.assertEqual(('available', 'old'), self.revert())

    def test_without_room_for_its_snapshots_it_stays_as_it_is(self) -> None:
        self.driver.full = errors.NoSpace('what they keep has no room')
        self.assertEqual(('available', 'new'), self.revert())
        self.driver.full = None
        self.assertEqual(('available', 'old'), self.revert())

    def test_without_room_a_mixture_stays_a_mixture(self) -> None:
        self.driver.midway = errors.NoSpace('the pool is full')
        self.assertEqual('error_reverting', self.revert()[0])
        self.driver.full = errors.NoSpace('what they keep has no room')
        self.assertEqual('error_reverting', self.revert()[0])


class RevertTest(unittest.TestCase):

    def setUp(self) -> None:
        self.world, self.driver = world_of(self, InPlace)
        self.v, self.s = old_and_new(self.world)

    def revert(self) -> str:
        """Ask for it; return what becomes of the volume."""
        volumes.revert(self.world.core, CALLER, self.v, self.s)
        self.world.recover()
        self.assertEqual([], self.world.open_jobs())
        row = self.world.live(models.Volume)[self.v]
        return str(row.status)

    def content(self) -> bytes:
        return self.world.content(self.world.noun(self.v))

    def test_volume_that_is_half_reverted_is_given_to_nobody(self) -> None:
        self.driver.midway = errors.NoSpace('the pool is full')
        self.assertEqual('error_reverting', self.revert())
        self.assertNotIn(self.content(), (OLD, NEW))
        with self.assertRaisesRegex(errors.Invalid, 'error_reverting'):
            attachments.reserve(self.world.core, CALLER, self.v)

    def test_revert_that_broke_off_can_be_asked_for_again(self) -> None:
        self.driver.midway = errors.NoSpace('the pool is full')
        self.revert()
        self.driver.midway = None
        self.assertEqual('available', self.revert())
        self.assertEqual(OLD, self.content())

    def test_revert_that_never_began_leaves_the_volume_in_use(self) -> None:
        for refused in errors.Busy, errors.NotFound, errors.NoSpace:
            self.driver.before = refused('not now')
            self.assertEqual('available', self.revert())
            self.assertEqual(NEW, self.content())

    def test_mixture_stays_one_when_the_next_revert_never_begins(
        self,
    ) -> None:
        self.driver.midway = errors.NoSpace('the pool is full')
        self.revert()
        self.driver.before = errors.Busy('somebody has it open')
        self.assertEqual('error_reverting', self.revert())

    def test_copy_that_broke_off_is_not_forgotten_by_a_native_revert(
        self,
    ) -> None:
        self.world.db.write(lambda s: setattr(
            s.get(models.Volume, self.v), 'status', 'error_reverting'))
        self.driver.before = errors.Busy('somebody has it open')
        self.assertEqual('error_reverting', self.revert())

    def test_storage_that_cannot_be_asked_is_not_believed_whole(self) -> None:
        self.driver.before = errors.Invalid('no')
        self.driver.silent = errors.Unavailable('it is away')
        self.assertEqual('error_reverting', self.revert())

    def test_mixture_whose_row_was_lost_is_found_as_one(self) -> None:
        self.driver.midway = errors.NoSpace('the pool is full')
        self.revert()
        db, backends = self.world.db, self.world.backends
        for table in models.Snapshot, models.Volume:
            db.write(lambda s, t=table: s.execute(delete(t)))
        findings = reconcile.look(db, backends, HOST)
        reconcile.mend(db, backends, findings, adopt=True)
        row = self.world.live(models.Volume)[self.v]
        self.assertEqual('error_reverting', row.status)
