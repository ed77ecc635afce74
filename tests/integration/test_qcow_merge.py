# SPDX-License-Identifier: Apache-2.0
"""Merging of hidden layers: what it saves, and that it may end anywhere."""

import contextlib
import itertools
import os
import shutil
import signal
import threading
import time

from tests.integration.qcow_case import CLUSTER
from tests.integration.qcow_case import HookedNode
from tests.integration.qcow_case import MIB
from tests.integration.qcow_case import QcowCase
from volume import errors
from volume import model
from volume.drivers import qcow_layers
from volume.testing import faults

SLOW = 64 << 10  # bytes a second: it never ends by itself here
PATIENCE_S = 60.0


class MergeTest(QcowCase):

    def test_hidden_layers_are_counted_and_go(self):
        volume = self.volume(1)
        snapshots = []
        for fill in 2, 3, 4:
            snapshots.append(self.snapshot(volume))
            self.write(volume, fill, fill * 4096, 4096)
        self.assertEqual(0, self.hidden_bytes())
        for snapshot in snapshots[:2]:
            self.driver.delete_snapshot(snapshot)
        self.assertGreater(self.hidden_bytes(), MIB)
        self.tend()
        self.assertEqual((0, 2), (self.hidden_bytes(), len(self.layers())))
        self.assert_holds(
            snapshots[2], (1, 8192), (2, 4096), (3, 4096),
            (1, MIB - 16384),
        )
        self.assert_holds(
            volume, (1, 8192), (2, 4096), (3, 4096), (4, 4096),
            (1, MIB - 20480),
        )

    def test_less_is_copied(self):
        # A snapshot of an empty volume, and a small change of a full one.
        for first, second in (0, 1), (1, 0):
            volume = self.volume(first)
            snapshot = self.snapshot(volume)
            if second:
                self.write(volume, second, 0, MIB)
            else:
                self.write(volume, 5, 0, 4096)
            large = self.layer(volume if second else snapshot)
            self.driver.delete_snapshot(snapshot)
            self.tend()
            self.assertEqual(large, self.layer(volume))
            self.driver.delete(volume)

    def test_snapshot_with_many_children_is_merged_with_what_is_below(self):
        volume = self.volume(1)
        first = self.snapshot(volume)
        self.write(volume, 2, 0, 4096)
        second = self.snapshot(volume)
        clones = [self.clone(second) for _ in range(12)]
        self.write(clones[0], 3, 0, 4096)
        self.driver.delete_snapshot(first)
        self.tend()
        self.assertEqual({2}, set(map(self.depth, clones)))
        self.assert_holds(clones[0], (3, 4096), (1, MIB - 4096))
        for source in second, volume, clones[1]:
            self.assert_holds(source, (2, 4096), (1, MIB - 4096))

    def test_volume_written_right_after_its_merge_keeps_it(self):
        volume = self.volume(1)
        self.driver.delete_snapshot(self.snapshot_then_write(volume))
        chain = self.json(volume)
        self.node.hook = (
            'run qemu-img commit',
            lambda: self.qemu_io('write -P 7 0 64k', chain),
        )
        self.driver.upkeep(self.pool)
        self.assert_holds(volume, (7, 65536), (1, MIB - 65536))
        self.assertEqual(2, self.depth(volume))
        self.tend()
        self.assert_holds(volume, (7, 65536), (1, MIB - 65536))
        self.assertEqual(1, self.depth(volume))

    def test_nobody_opens_a_volume_while_it_is_switched(self):
        volume = self.volume(1)
        self.driver.delete_snapshot(self.snapshot_then_write(volume))
        chain = self.json(volume)
        refused = []

        def write():
            with self.assertRaises(AssertionError) as failed:
                self.qemu_io('write -P 7 0 64k', chain)
            refused.append(str(failed.exception))

        # The pointer is moved, and the old layer is there for a moment.
        self.node.hook = (f'point {volume.id}', write)
        self.tend()
        self.assertIn('Failed to get', refused[0])
        self.assertEqual(1, self.depth(volume))
        self.assert_holds(volume, (2, 4096), (1, MIB - 4096))

    def test_snapshot_taken_during_a_merge_is_right(self):
        volume = self.volume(1)
        self.driver.delete_snapshot(self.snapshot_then_write(volume))
        taken = []
        self.node.hook = (
            'run qemu-img commit',
            lambda: taken.append(self.snapshot(volume)),
        )
        self.driver.upkeep(self.pool)
        self.write(volume, 9, 0, MIB)
        self.tend()
        self.assert_holds(taken[0], (2, 4096), (1, MIB - 4096))
        self.assert_holds(volume, (9, MIB))

    def snapshot_then_write(self, volume):
        """Return a snapshot over which the volume has a few bytes."""
        snapshot = self.snapshot(volume)
        self.write(volume, 2, 0, 4096)
        return snapshot


class SlowTest(QcowCase):
    """A merge that takes long is ended by whoever needs its layers."""

    def setUp(self):
        super().setUp()
        self.slow = self.make_driver(merge_bytes_per_s=SLOW)
        self.answers = []
        self.thread = threading.Thread(
            target=lambda: self.answers.append(self.slow.upkeep(self.pool))
        )
        self.addCleanup(self.end)

    def end(self):
        if self.thread.ident:
            for pid in self.helpers():
                os.kill(pid, signal.SIGKILL)
            self.thread.join()

    def test_killed_commit_leaves_all_as_it_was(self):
        self.check_killed(8 * MIB, 4 * MIB, 'commit')

    def test_killed_pull_leaves_all_as_it_was(self):
        self.check_killed(4 * MIB, 8 * MIB, 'rebase')

    def check_killed(self, below, above, verb):
        volume, wanted = self.merging(below, above)
        pid = self.helper(verb)
        os.kill(pid, signal.SIGKILL)
        self.thread.join()
        self.assertEqual([False], self.answers)
        self.assert_holds(volume, *wanted)
        self.tend()
        self.assertEqual(1, self.depth(volume))
        self.assert_holds(volume, *wanted)
        self.qemu('qemu-img', 'check', '-f', 'qcow2', self.layer(volume))

    def test_whoever_needs_the_layers_does_not_wait(self):
        volume, wanted = self.merging(8 * MIB, 4 * MIB)
        self.helper('commit')
        self.driver.resize(volume, 16 * MIB + 512)
        self.thread.join()
        self.assertEqual([False], self.answers)
        self.assert_holds(volume, *wanted, (0, 512))

    def test_one_merges_at_a_time(self):
        self.merging(8 * MIB, 4 * MIB)
        pid = self.helper('commit')
        self.assertFalse(self.driver.upkeep(self.pool))
        self.assertEqual([pid], self.helpers())

    def test_volume_can_be_deleted_under_a_merge(self):
        volume, _ = self.merging(8 * MIB, 4 * MIB)
        self.helper('commit')
        self.driver.delete(volume)
        self.thread.join()
        self.tend()
        self.assertEqual([], self.layers())

    def merging(self, below, above):
        """Begin to merge two layers; return volume and what it holds."""
        volume = self.volume(0, 16 * MIB)
        self.write(volume, 1, 0, below)
        snapshot = self.snapshot(volume)
        self.write(volume, 2, 16 * MIB - above, above)
        self.driver.delete_snapshot(snapshot)
        self.thread.start()
        between = 16 * MIB - above - below
        return volume, ((1, below), (0, between), (2, above))

    def helper(self, verb):
        """Wait for the helper that merges; return its process."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for pid in self.helpers():
                if qcow_layers.words_of(pid)[1:2] == [verb]:
                    return pid
            time.sleep(0.01)
        self.fail(f'no {verb} began')

    def helpers(self):
        paths = frozenset(self.path('layers', n) for n in self.layers())
        return qcow_layers.openers(paths, 'qemu-img')


class SpoiltTest(QcowCase):
    """A commit that dies at any act is right at once, and made whole."""

    SIZE = 4 * CLUSTER

    def test_commit_of_a_volume(self):
        volume = self.volume(1, self.SIZE)
        snapshot = self.snapshot(volume)
        self.write(volume, 2, 0, 4096)
        self.driver.delete_snapshot(snapshot)
        self.spoil([(volume, (2, 4096), (1, self.SIZE - 4096))], layers=1)

    def test_commit_of_a_snapshot_with_children(self):
        volume = self.volume(1, self.SIZE)
        first = self.snapshot(volume)
        self.write(volume, 2, 0, 4096)
        second = self.snapshot(volume)
        self.write(volume, 3, 0, 4096)
        clone = self.clone(second, self.SIZE)
        self.driver.delete_snapshot(first)
        rest = 1, self.SIZE - 4096
        self.spoil([
            (volume, (3, 4096), rest), (second, (2, 4096), rest),
            (clone, (2, 4096), rest),
        ], layers=3)

    def spoil(self, wanted, layers):
        fresh = self.directory + '-fresh'
        shutil.copytree(self.directory, fresh, symlinks=True)
        verbs = set()
        for nth in itertools.count(1):
            # Before an act is after the one before it.
            for kind in 'crash', 'lost':
                shutil.rmtree(self.directory)
                shutil.copytree(fresh, self.directory, symlinks=True)
                self.node = faults.FaultyNode(self.node.state_dir)
                self.driver = self.make_driver()
                self.node.arm(faults.Fault(kind, nth, True))
                with contextlib.suppress(faults.Crash, errors.VolumeError):
                    self.tend()
                words = f'{kind} at {nth}: {self.node.trace}'
                verbs.update(self.node.trace)
                is_fired = self.node.fired
                self.node = HookedNode(self.node.state_dir)
                self.driver = self.make_driver()
                with self.subTest(words):
                    self.check(wanted)
                    self.tend()
                    self.check(wanted)
                    self.assertEqual(layers, len(self.layers()))
                    self.assertEqual([], os.listdir(self.path('merges')))
            if not is_fired:
                break
        self.assertIn('run qemu-img commit', verbs)

    def check(self, wanted):
        for source, *runs in wanted:
            self.assert_holds(source, *runs)


class LiveTest(QcowCase):
    """Volumes that the block daemon exports."""

    has_daemon = True

    def setUp(self):
        super().setUp()
        self.exported = self.volume(1)
        self.uri = self.attach(self.exported)

    def attach(self, volume, writable=True):
        uri = self.node.blockd.export(
            volume.id, self.driver.blocknode(volume), writable
        )
        self.addCleanup(self.node.blockd.unexport, volume.id)
        return uri

    def write_through(self, fill, offset, length):
        self.qemu_io(
            f'write -P {fill} {offset} {length}', '-f', 'raw', self.uri
        )

    def assert_export_holds(self, *runs):
        wanted = b''.join(bytes([fill]) * length for fill, length in runs)
        self.assertEqual(wanted, self.converted('-f', 'raw', self.uri))

    def test_snapshot_of_an_exported_volume_is_of_its_moment(self):
        self.write_through(2, 0, 65536)
        snapshot = self.snapshot(self.exported)
        self.assert_export_holds((2, 65536), (1, MIB - 65536))
        self.write_through(3, 32768, 65536)
        self.assert_export_holds(
            (2, 32768), (3, 65536), (1, MIB - 98304)
        )
        self.assert_holds(snapshot, (2, 65536), (1, MIB - 65536))
        self.node.blockd.unexport(self.exported.id)
        self.assert_holds(
            self.exported, (2, 32768), (3, 65536), (1, MIB - 98304)
        )

    def test_clone_of_an_exported_volume_is_of_its_moment(self):
        clones = []
        for fill in 2, 3, 4:
            self.write_through(fill, 0, 65536)
            clones.append(self.clone(self.exported))
        self.write_through(5, 0, 65536)
        for fill, clone in zip((2, 3, 4), clones, strict=True):
            self.assert_holds(clone, (fill, 65536), (1, MIB - 65536))

    def test_daemon_that_was_not_told_is_told_by_the_next_call(self):
        snapshot = model.Snapshot(
            'b8a5b6a2-0000-4000-8000-000000000001', self.exported, MIB
        )

        def die():
            raise RuntimeError('died here')

        self.node.hook = (f'point {self.exported.id}', die)
        with self.assertRaises(RuntimeError):
            self.driver.snapshot(snapshot)
        self.write_through(2, 0, 65536)
        self.assert_export_holds((2, 65536), (1, MIB - 65536))
        self.driver.snapshot(snapshot)
        self.write_through(3, 0, 65536)
        self.assert_export_holds((3, 65536), (1, MIB - 65536))
        self.assert_holds(snapshot, (2, 65536), (1, MIB - 65536))
        top = self.node.blockd.exports()[self.exported.id]
        self.assertEqual(self.layer(self.exported), top)

    def test_daemon_that_was_never_told_has_written_the_right_bytes(self):
        def die():
            raise RuntimeError('died here')

        self.node.hook = (f'point {self.exported.id}', die)
        with self.assertRaises(RuntimeError):
            self.snapshot(self.exported)
        self.write_through(2, 0, 65536)
        self.node.blockd.unexport(self.exported.id)
        self.tend()
        self.assert_holds(self.exported, (2, 65536), (1, MIB - 65536))
        self.assertEqual(1, self.depth(self.exported))

    def test_second_host_sees_what_the_first_writes(self):
        def die():
            raise RuntimeError('died here')

        self.node.hook = (f'point {self.exported.id}', die)
        with self.assertRaises(RuntimeError):
            self.snapshot(self.exported)
        second = self.node.blockd.export(
            'second', self.driver.blocknode(self.exported), True
        )
        self.addCleanup(self.node.blockd.unexport, 'second')
        self.write_through(2, 0, 65536)
        self.assertEqual(
            b'\2' * 65536 + b'\1' * (MIB - 65536),
            self.converted('-f', 'raw', second),
        )

    def test_what_needs_a_volume_alone_is_refused(self):
        snapshot = self.snapshot(self.exported)
        before = self.layers()
        self.assert_busy(
            lambda: self.driver.revert(snapshot),
            lambda: self.driver.resize(self.exported, 2 * MIB),
            lambda: self.driver.writer(self.exported).__enter__(),
            lambda: self.driver.map(self.exported, model.Access.WRITE),
        )
        self.driver.delete_snapshot(snapshot)
        self.assert_busy(
            lambda: self.driver.delete(self.exported),
            lambda: self.driver.disown(self.exported),
            lambda: self.driver.flatten(self.exported, lambda p: None),
        )
        self.tend()  # nor is anything of it merged
        self.assertEqual(before, self.layers())
        self.assert_export_holds((1, MIB))

    def test_exported_volume_and_its_snapshots_can_be_read(self):
        self.write_through(2, 0, 65536)
        snapshot = self.snapshot(self.exported)
        self.write_through(3, 0, 65536)
        for source, fill in (snapshot, 2), (self.exported, 3):
            with self.driver.reader(source) as reader:
                self.assertEqual(bytes([fill]) * 512, reader.read(512))

    def test_snapshot_that_is_read_is_not_deleted(self):
        snapshot = self.snapshot(self.exported)
        with self.driver.reader(snapshot) as reader:
            self.assert_busy(lambda: self.driver.delete_snapshot(snapshot))
            self.assertEqual(b'\1' * 512, reader.read(512))
        self.driver.delete_snapshot(snapshot)

    def test_volume_can_be_read_while_a_snapshot_is_taken(self):
        volume = self.volume(4)
        with self.driver.reader(volume) as reader:
            snapshot = self.snapshot(volume)
            self.assertEqual(b'\4' * 4096, reader.read(4096))
        self.write(volume, 5, 0, MIB)
        self.assert_holds(snapshot, (4, MIB))

    def test_layers_keep_their_names_for_ever(self):
        known = {}
        volume = self.volume(1)
        for fill in range(2, 6):
            snapshot = self.snapshot(self.exported)
            self.write_through(fill, 0, 4096)
            other = self.snapshot(volume)
            self.write(volume, fill, 0, 4096)
            self.driver.delete_snapshot(other)
            self.driver.delete_snapshot(snapshot)
            self.tend()
            for name in self.layers():
                inode = os.stat(self.path('layers', name)).st_ino
                self.assertEqual(inode, known.setdefault(name, inode))
