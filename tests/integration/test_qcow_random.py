# SPDX-License-Identifier: Apache-2.0
"""Random work on one qcow pool, against a model of what each name holds.

What is on the storage is written and read by QEMU's own tools, so that the
driver does not judge itself. The seed is in every message; set
``VOLUME_SEED`` to play a run again.
"""

import json
import os
import random
import re
import subprocess
import tempfile
import threading
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.drivers import qcow
from volume.testing import fixtures

STEPS = 200
SECTOR = 512
CLUSTER = 65536
MAX_BYTES = 12 * CLUSTER

IN_THE_WAY = 'Failed to get|No such file|in use|not there|changed'


class World:
    """A driver, and a dictionary that says what its volumes must hold."""

    def __init__(self, test, seed):
        self.test = test
        self.seed = seed
        self.random = random.Random(seed)
        self.node = fixtures.make_node(test)
        fixtures.serve_blocks(test, self.node)
        self.directory = fixtures.plain_directory(test)
        self.restart()
        self.volumes = {}  # id -> bytes
        self.snapshots = {}  # id -> (volume id, bytes)
        self.attached = {}  # volume id -> URI
        self.log = []

    def make_driver(self, **options):
        conf = fixtures.settings(
            qcow.QcowDriver, directories=[self.directory], max_depth=12,
            **options,
        )
        driver = qcow.QcowDriver(conf, self.node)
        driver.check()
        return driver

    def restart(self):
        self.driver = self.make_driver(merge_bytes_per_s=0)

    # What can happen. Each says whether it could.

    def create(self):
        volume = self.wish(self.size())
        self.driver.create(volume)
        self.volumes[volume.id] = bytes(volume.size_bytes)
        return True

    def write(self):
        if not self.volumes:
            return False
        volume = self.any_volume()
        image = bytearray(self.volumes[volume.id])
        commands = []
        for _ in range(self.random.randint(1, 4)):
            offset = self.random.randrange(0, len(image), SECTOR)
            length = min(
                self.random.choice((SECTOR, 4096, CLUSTER, 3 * CLUSTER)),
                len(image) - offset,
            )
            fill = self.random.choice((0, *range(1, 256)))
            if fill:
                commands.append(f'write -P {fill} {offset} {length}')
            else:
                commands.append(f'write -z -u {offset} {length}')
            image[offset:offset + length] = bytes([fill]) * length
        words = [w for c in (*commands, 'flush') for w in ('-c', c)]
        again(lambda: run(
            'qemu-io', '-d', 'unmap', *words, *self.target(volume)
        ))
        self.volumes[volume.id] = bytes(image)
        return True

    def snapshot(self):
        if not self.volumes:
            return False
        volume = self.any_volume()
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        try:
            self.driver.snapshot(snapshot)
        except errors.Invalid as deep:
            self.test.assertIn('max_depth', str(deep))
            return False
        self.snapshots[snapshot.id] = volume.id, self.volumes[volume.id]
        return True

    def clone(self):
        if not self.volumes:
            return False
        if self.snapshots and self.random.random() < 0.6:
            source = self.any_snapshot()
            image = self.snapshots[source.id][1]
        else:
            source = self.any_volume()
            image = self.volumes[source.id]
        more = self.random.choice((0, 0, SECTOR, CLUSTER, 5 * SECTOR))
        volume = self.wish(len(image) + more)
        try:
            self.driver.clone(source, volume)
        except errors.Invalid as deep:
            self.test.assertIn('max_depth', str(deep))
            return False
        self.volumes[volume.id] = image + bytes(more)
        return True

    def revert(self):
        if not self.snapshots:
            return False
        snapshot = self.any_snapshot()
        volume_id, image = self.snapshots[snapshot.id]
        if volume_id in self.attached:
            self.test.assertRaises(
                errors.Busy, self.driver.revert, snapshot
            )
            return False
        try:
            self.driver.revert(snapshot)
        except errors.Invalid as deep:
            self.test.assertIn('max_depth', str(deep))
            return False
        beyond = len(self.volumes[volume_id]) - len(image)
        self.volumes[volume_id] = image + bytes(beyond)
        return True

    def resize(self):
        if not self.volumes:
            return False
        volume = self.any_volume()
        more = self.random.choice((SECTOR, 3 * SECTOR, CLUSTER))
        size_bytes = volume.size_bytes + more
        if volume.id in self.attached:
            with self.test.assertRaises(errors.Busy):
                self.driver.resize(volume, size_bytes)
            return False
        self.driver.resize(volume, size_bytes)
        self.volumes[volume.id] += bytes(more)
        return True

    def flatten(self):
        if not self.volumes:
            return False
        volume = self.any_volume()
        is_busy = volume.id in self.attached or any(
            origin == volume.id for origin, _ in self.snapshots.values()
        )
        try:
            self.driver.flatten(volume, lambda percent: None)
        except errors.Busy:
            self.test.assertTrue(is_busy)
            return False
        self.test.assertFalse(is_busy)
        return True

    def delete(self):
        if not self.volumes:
            return False
        volume = self.any_volume()
        is_busy = volume.id in self.attached or any(
            origin == volume.id for origin, _ in self.snapshots.values()
        )
        if is_busy:
            self.test.assertRaises(errors.Busy, self.driver.delete, volume)
            return False
        self.driver.delete(volume)
        del self.volumes[volume.id]
        return True

    def delete_snapshot(self):
        if not self.snapshots:
            return False
        snapshot = self.any_snapshot()
        self.driver.delete_snapshot(snapshot)
        del self.snapshots[snapshot.id]
        return True

    def attach(self):
        free = [v for v in self.volumes if v not in self.attached]
        if not free:
            return False
        volume = self.volume(self.random.choice(free))
        self.attached[volume.id] = again(lambda: self.node.blockd.export(
            volume.id, self.driver.blocknode(volume), writable=True
        ))
        return True

    def detach(self):
        if not self.attached:
            return False
        volume_id = self.random.choice(list(self.attached))
        self.node.blockd.unexport(volume_id)
        del self.attached[volume_id]
        return True

    def upkeep(self):
        self.driver.upkeep(self.pool)
        return True

    def adopt(self):
        free = [
            v for v in self.volumes
            if v not in self.attached
            and all(origin != v for origin, _ in self.snapshots.values())
        ]
        if not free:
            return False
        volume = self.volume(self.random.choice(free))
        self.driver.disown(volume)
        self.driver.upkeep(self.pool)
        adopted = self.wish(volume.size_bytes)
        self.driver.adopt(f'disowned/{volume.id}', adopted)
        self.volumes[adopted.id] = self.volumes.pop(volume.id)
        return True

    # How it happens.

    DEEDS = (
        ('write', 40), ('snapshot', 16), ('clone', 12), ('create', 5),
        ('upkeep', 14), ('revert', 6), ('resize', 5), ('delete', 8),
        ('delete_snapshot', 14), ('attach', 6), ('detach', 6),
        ('flatten', 1), ('adopt', 2), ('restart', 2),
    )

    def step(self):
        names, weights = zip(*self.DEEDS, strict=True)
        name, = self.random.choices(names, weights)
        self.log.append(name)
        return getattr(self, name)()

    def verify(self):
        """Fail unless every name holds what it must."""
        for volume_id, image in self.volumes.items():
            self.assert_holds(self.volume(volume_id), image)
        for snapshot_id, (_, image) in self.snapshots.items():
            self.assert_holds(self.a_snapshot(snapshot_id), image)
        found = {f.id: f.size_bytes for f in self.driver.scan(self.pool)}
        wanted = {v: len(image) for v, image in self.volumes.items()}
        wanted |= {s: len(i) for s, (_, i) in self.snapshots.items()}
        self.test.assertEqual(wanted, found, self.words())

    def assert_holds(self, source, image):
        with tempfile.NamedTemporaryFile() as target:
            again(lambda: run(
                'qemu-img', 'convert', '-O', 'raw',
                *self.target(source, True), target.name,
            ))
            found = target.read()
        self.test.assertEqual(
            len(image), len(found), f'{source}: {self.words()}'
        )
        if image != found:
            at = next(i for i, b in enumerate(image) if found[i] != b)
            self.test.fail(
                f'{source}: byte {at} is {found[at]}, not {image[at]}; '
                + self.words()
            )

    def target(self, source, is_read_only=False):
        """Return how a tool of QEMU opens it."""
        if isinstance(source, model.Volume) and source.id in self.attached:
            return ['-f', 'raw', self.attached[source.id]]
        node = dict(self.driver.blocknode(source))
        if is_read_only:
            node['read-only'] = True
            node['file'] = {**node['file'], 'read-only': True}
        return ['json:' + json.dumps(node)]

    def words(self):
        return f'VOLUME_SEED={self.seed}, steps {" ".join(self.log)}'

    # Names.

    @property
    def pool(self):
        return os.path.basename(self.directory)

    def wish(self, size_bytes):
        return model.Volume(ids.new(), self.pool, size_bytes)

    def size(self):
        return self.random.randrange(SECTOR, MAX_BYTES, SECTOR)

    def volume(self, volume_id):
        size_bytes = len(self.volumes.get(volume_id, b'')) or SECTOR
        return model.Volume(volume_id, self.pool, size_bytes)

    def a_snapshot(self, snapshot_id):
        volume_id, image = self.snapshots[snapshot_id]
        return model.Snapshot(
            snapshot_id, self.volume(volume_id), len(image)
        )

    def any_volume(self):
        return self.volume(self.random.choice(list(self.volumes)))

    def any_snapshot(self):
        return self.a_snapshot(self.random.choice(list(self.snapshots)))


def run(*argv):
    done = subprocess.run(argv, capture_output=True, timeout=60)
    # qemu-io says what failed, and ends with zero all the same.
    if done.returncode or b'failed' in done.stdout + done.stderr:
        raise AssertionError(f'{argv}: {done.stdout!r} {done.stderr!r}')


def check(path, may_leak):
    """Fail unless the image is sound; a killed merge may lose space."""
    argv = ['qemu-img', 'check', '-q', '-f', 'qcow2', path]
    done = subprocess.run(argv, capture_output=True, timeout=60)
    if done.returncode not in ((0, 3) if may_leak else (0,)):
        raise AssertionError(f'{path}: {done.stdout!r} {done.stderr!r}')


def again(deed):
    """Do it again while a merge that began just now is in the way."""
    for left in reversed(range(20)):
        try:
            return deed()
        except (AssertionError, errors.VolumeError) as failed:
            if not left or not re.search(IN_THE_WAY, str(failed)):
                raise


def seed():
    return int(os.environ.get('VOLUME_SEED') or random.randrange(10 ** 6))


class RandomTest(unittest.TestCase):

    def test_every_name_keeps_its_bytes_whatever_is_done(self):
        self.play(World(self, seed()))

    def test_merging_beside_all_other_work_changes_nothing(self):
        world = World(self, seed())
        other = world.make_driver(merge_bytes_per_s=4 << 20)
        stop = threading.Event()
        failures = []

        def tend():
            while not stop.is_set() and not failures:
                try:
                    other.upkeep(world.pool)
                except BaseException as failed:
                    failures.append(failed)
                    raise

        thread = threading.Thread(target=tend)
        thread.start()
        try:
            self.play(world, stop.set)
        finally:
            stop.set()
            thread.join()
        self.assertEqual([], failures, world.words())

    def play(self, world, stop=None):
        done = 0
        try:
            while done < STEPS:
                done += bool(world.step())
                if done % 50 == 25:
                    world.verify()
            world.verify()
            if stop:
                stop()
            self.shrink(world, may_leak=stop is not None)
        except (errors.VolumeError, AssertionError) as failed:
            raise AssertionError(f'{failed}; {world.words()}') from failed

    def shrink(self, world, may_leak):
        """Merge all that can be, then delete everything."""
        while world.attached:
            world.detach()
        while world.driver.upkeep(world.pool):
            pass
        world.verify()
        layers = os.path.join(world.directory, 'layers')
        for name in os.listdir(layers):
            check(os.path.join(layers, name), may_leak)
        while world.snapshots:
            world.delete_snapshot()
        while world.volumes:
            world.delete()
        while world.driver.upkeep(world.pool):
            pass
        self.assertEqual([], os.listdir(layers))
        pool, = world.driver.pools()
        self.assertEqual(0, pool.hidden_bytes)
