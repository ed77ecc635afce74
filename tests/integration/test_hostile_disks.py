# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, or that may only be read, under a whole service."""

import os
import subprocess
import unittest

from sqlalchemy import select

from tests import images
from tests.integration import hostile_case
from tests.integration import serving
from tests.integration import test_service
from tests.webserver import Web
from volume import errors
from volume import ids
from volume.db import models
from volume.testing import fixtures

MIB = 1 << 20
DISK = 24 * MIB
IMAGE = 40 * MIB


class Disk:
    """A file system of its own in memory, small enough to fill."""

    def __init__(self, test, size_bytes=DISK):
        self.path = fixtures.directory(test, 'disk')
        self._mount('-t', 'tmpfs', '-o', f'size={size_bytes}', 'none')
        test.addCleanup(
            subprocess.run, ['umount', '-l', self.path], capture_output=True
        )
        os.mkdir(os.path.join(self.path, 'pool'))
        self.pool = os.path.join(self.path, 'pool')

    def _mount(self, *words):
        done = subprocess.run(
            ['mount', *words, self.path], capture_output=True, text=True,
        )
        if done.returncode:
            raise unittest.SkipTest(
                f'no file system can be mounted: {done.stderr.strip():.200}'
            )

    def only_read(self):
        self._mount('-o', 'remount,ro')

    def writable(self):
        self._mount('-o', 'remount,rw')

    def fill(self):
        """Take what is left, to the last byte; return how to give it."""
        ballast = os.path.join(self.path, 'ballast')
        with open(ballast, 'wb', buffering=0) as f:
            try:
                while f.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass
        return lambda: os.unlink(ballast)


class Pools(unittest.TestCase):
    """Each driver on a disk of its own that is smaller than it promises."""

    def world(self, driver):
        self.disk = Disk(self)
        self.web = Web(self)
        world = serving.World(
            self, names='fast, small', sections='[small]\n'
            f'driver = {driver}\ndirectories = {self.disk.pool}\n'
            'oversubscription = 100\ncost = -1\n' + (
                'exporter = local\n' if driver == 'file' else ''),
            settings='image_allowed_networks = 127.0.0.0/8\n'
            'job_retry_s = 0.5\nsweep_interval_s = 0.1\n',
        )
        self.addCleanup(world.service.node.blockd.stop)
        self.addCleanup(world.service.stop)
        return world

    def make(self, world, **wish):
        asked = world.ask('POST', '/v3/volumes', {'volume': {
            'size_bytes': IMAGE, 'volume_type': 'small', **wish}})
        self.assertEqual(202, asked.status, asked.text)
        return world.settled(asked.json['volume']['id'])

    def images(self, world):
        """Return images whose data the disk cannot hold, by every way."""
        raw = os.path.join(world.images, 'i.raw')
        packed = os.path.join(world.images, 'i.qcow2')
        # What a volume has to hold is no zeros, and yet it packs well.
        images.make('raw', raw, b'full' * (IMAGE // 4))
        subprocess.run(
            ['qemu-img', 'convert', '-c', '-O', 'qcow2', raw, packed],
            check=True, timeout=60,
        )
        self.assertLess(os.path.getsize(packed), MIB)
        for path in raw, packed:
            yield f'file://{path}'
            with open(path, 'rb') as f:
                yield self.web.put(f'/{os.path.basename(path)}', f.read())

    def test_a_disk_that_fills_up_in_mid_copy_loses_nothing(self):
        for driver in 'file', 'qcow':
            world = self.world(driver)
            kept = self.make(world, size_bytes=4 * MIB, imageRef=(
                'file://' + images.make('raw', os.path.join(
                    world.images, 'kept'), b'kept' * MIB)))
            self.assertEqual('available', kept['status'], kept['reason'])
            before = hostile_case.files(self.disk.pool)
            promised = hostile_case.kept(world.core)['pools']
            for url in self.images(world):
                with self.subTest(driver, url=url):
                    row = self.make(world, imageRef=url)
                    self.assertEqual('error', row['status'])
                    self.assertRegex(
                        row['reason'], 'No space left|space|free')
                    hostile_case.quiet(world.core)
                    self.assertEqual(
                        before, hostile_case.files(self.disk.pool))
                    self.assertEqual(
                        promised, hostile_case.kept(world.core)['pools'])
            out = os.path.join(world.images, 'out')
            world.ask('POST', f'/v3/volumes/{kept["id"]}/action', {
                'os-volume_upload_image': {
                    'image_name': f'file://{out}', 'disk_format': 'raw'}})
            world.settled(kept['id'])
            with open(out, 'rb') as f:
                self.assertTrue(f.read() == b'kept' * MIB, 'other bytes')
            # What fits is served on.
            self.assertEqual(
                'available', self.make(world, size_bytes=MIB)['status'])

    def test_a_full_pool_sends_a_volume_to_the_next_one(self):
        world = self.world('file')
        url = next(self.images(world))
        asked = world.ask('POST', '/v3/volumes', {
            'volume': {'size_bytes': IMAGE, 'imageRef': url},
            'OS-SCH-HNT:scheduler_hints': {'pool': 'pool'},
        })
        row = world.settled(asked.json['volume']['id'])
        self.assertEqual('available', row['status'], row['reason'])
        self.assertEqual('fast', row['backend'])
        jobs = world.core.db.read(lambda s: list(s.scalars(
            select(models.Job).where(models.Job.volume_id == row['id']))))
        # It is cheaper, and so it was the first to be asked.
        self.assertEqual([[['small', 'pool']]], [
            job.args.get('tried') for job in jobs])
        self.assertEqual(
            {}, {name: size for name, size in
                 hostile_case.files(self.disk.pool).items()
                 if row['id'] in name})

    def test_a_disk_that_may_only_be_read_is_said_to_be(self):
        for driver in 'file', 'qcow':
            world = self.world(driver)
            kept = self.make(world, size_bytes=MIB)['id']
            before = hostile_case.files(self.disk.pool)
            self.disk.only_read()
            with self.subTest(driver):
                row = self.make(world, size_bytes=MIB)
                self.assertEqual('error', row['status'])
                self.assertIn('Read-only file system', row['reason'])
                world.ask('DELETE', f'/v3/volumes/{kept}')
                row = world.settled(kept)
                self.assertEqual('error_deleting', row['status'])
                self.assertIn('Read-only file system', row['reason'])
                self.assertEqual(before, hostile_case.files(self.disk.pool))
                small = world.service.runner.backends['small']
                with self.assertRaises(errors.VolumeError):
                    small.call('create', _noun(small))
                # What is said of the backend, says it as well.
                small.check()
                self.assertFalse(small.is_up)
                self.assertIn('ead-only', small.reason)
            self.disk.writable()
            small.check()
            world.ask('POST', f'/v3/volumes/{kept}/action', {
                'os-force_delete': None})
            world.gone(kept)
            row = self.make(world, size_bytes=MIB)
            self.assertEqual('available', row['status'], row['reason'])


class State(test_service.ServiceCase):
    """The disk of the database and of the state directory."""

    def test_a_database_without_room_refuses_and_forgets_nothing(self):
        disk = Disk(self)
        world = serving.World(
            self, settings=f'database = sqlite:///{disk.path}/v.sqlite')
        kept = world.make(size=None, size_bytes=512)['id']
        before = hostile_case.kept(world.core)
        give_back = disk.fill()
        refused = set()
        # The log has a little room of its own before the disk is asked.
        for _ in range(300):
            asked = world.ask('POST', '/v3/volumes', {'volume': {
                'size_bytes': 512, 'name': 'n' * 255}})
            if asked.status != 202:
                refused.add((asked.status, asked.message))
                break
        self.assertEqual(1, len(refused), 'it was never refused')
        ((status, message),) = refused
        self.assertEqual(503, status, message)
        self.assertIn('full', message)
        self.assertEqual(200, world.ask(
            'GET', f'/v3/volumes/{kept}').status)
        give_back()
        hostile_case.quiet(world.core)
        self.assertEqual('available', world.settled(kept)['status'])
        world.make(size=None, size_bytes=512)
        after = hostile_case.kept(world.core)
        self.assertLessEqual(
            {row.id for row in before['volumes']},
            {row.id for row in after['volumes']},
        )
        self.assertEqual(
            after['pools'], sum(row.claimed_bytes for row in after['volumes'])
        )

    def test_a_state_directory_that_cannot_be_written_is_named(self):
        disk = Disk(self)
        disk.only_read()
        service = self.service()
        service.state = os.path.join(disk.path, 'state')
        service.configure(test_service.QCOW)
        said = self.refusal(service)
        self.assertIn(disk.path, said)
        self.assertIn('Read-only file system', said)


def _noun(backend):
    from volume import model
    return model.Volume(ids.new(), next(iter(backend.pools)), 512)
