# SPDX-License-Identifier: Apache-2.0
"""Trees of qcow2 layers: sizes, depth, sweeping, damage, strangers."""

import concurrent.futures
import os
import struct
import subprocess
import unittest

from tests.integration.qcow_case import CLUSTER
from tests.integration.qcow_case import MIB
from tests.integration.qcow_case import QcowCase
from volume import errors
from volume import ids
from volume import model
from volume.drivers import qcow
from volume.testing import fixtures

ODD = MIB + 7 * 512  # an end in the middle of a cluster


class SizeTest(QcowCase):
    """What is beyond an old end never shows again."""

    def test_bytes_beyond_a_smaller_snapshot_are_zero_after_a_revert(self):
        volume = self.volume(1, ODD)
        snapshot = self.snapshot(volume)
        self.driver.resize(volume, 2 * ODD)
        self.write(volume, 2, 0, 2 * ODD)
        later = self.snapshot(volume)
        self.driver.revert(snapshot)
        self.assert_holds(volume, (1, ODD), (0, ODD))
        self.driver.resize(volume, 3 * ODD)
        self.assert_holds(volume, (1, ODD), (0, 2 * ODD))
        self.driver.revert(later)
        self.assert_holds(volume, (2, 2 * ODD), (0, ODD))
        self.driver.delete_snapshot(later)
        self.driver.revert(snapshot)
        self.tend()
        self.assert_holds(volume, (1, ODD), (0, 2 * ODD))
        self.assert_holds(snapshot, (1, ODD))

    def test_larger_clone_shows_nothing_of_what_came_later(self):
        volume = self.volume(1, ODD)
        snapshot = self.snapshot(volume)
        self.driver.resize(volume, 2 * ODD)
        self.write(volume, 2, 0, 2 * ODD)
        clone = self.clone(snapshot, 2 * ODD)
        self.assert_holds(clone, (1, ODD), (0, ODD))
        self.driver.delete_snapshot(snapshot)
        self.tend()
        self.assert_holds(clone, (1, ODD), (0, ODD))
        self.assert_holds(volume, (2, 2 * ODD))

    def test_merging_into_a_smaller_layer_makes_it_as_large(self):
        # Committed, and pulled: by which of the layers stores more.
        for first, last in (MIB, 4096), (4096, MIB):
            volume = self.volume(0, ODD)
            self.write(volume, 1, 0, first)
            snapshot = self.snapshot(volume)
            self.driver.resize(volume, 4 * ODD)
            self.write(volume, 2, 4 * ODD - last, last)
            self.driver.delete_snapshot(snapshot)
            self.tend()
            self.assertEqual(1, self.depth(volume))
            self.assert_holds(
                volume, (1, first), (0, 4 * ODD - first - last), (2, last)
            )
            self.driver.delete(volume)

    def test_snapshot_of_a_grown_but_unwritten_volume_has_its_size(self):
        volume = self.volume(1)
        self.snapshot(volume)
        self.driver.resize(volume, 2 * MIB)
        snapshot = self.snapshot(volume)
        self.assert_holds(snapshot, (1, MIB), (0, MIB))

    def test_layer_smaller_than_what_it_stands_on_is_refused(self):
        volume = self.volume(1, 2 * MIB)
        self.snapshot(volume)
        with open(self.layer(volume), 'rb+') as f:
            f.seek(24)
            f.write(struct.pack('>Q', MIB))
        with self.assertRaisesRegex(errors.Corrupt, 'smaller'):
            self.driver.blocknode(volume)


class DepthTest(QcowCase):

    options = {'max_depth': 5}

    def test_snapshot_beyond_the_limit_is_refused_with_the_way_out(self):
        volume = self.volume()
        snapshots = []
        for fill in range(1, 5):
            self.write(volume, fill, 0, 4096)
            snapshots.append(self.snapshot(volume))
        self.write(volume, 9, 0, 4096)
        before = self.layers()
        with self.assertRaisesRegex(errors.Invalid, 'volume flatten'):
            self.snapshot(volume)
        self.assertEqual(before, self.layers())
        for snapshot in snapshots:
            self.driver.delete_snapshot(snapshot)
        self.driver.flatten(volume, lambda percent: None)
        self.assertEqual(1, self.depth(volume))
        self.snapshot(volume)
        self.assert_holds(volume, (9, 4096), (0, MIB - 4096))

    def test_snapshots_of_an_unchanged_volume_take_no_layer(self):
        volume = self.volume(1)
        snapshots = [self.snapshot(volume) for _ in range(20)]
        self.assertEqual(2, len(self.layers()))
        for snapshot in snapshots[:-1]:
            self.driver.delete_snapshot(snapshot)
        self.assert_holds(snapshots[-1], (1, MIB))

    def test_clones_of_an_unchanged_volume_stand_on_one_layer(self):
        volume = self.volume(1)
        clones = [self.clone(volume, MIB + 512) for _ in range(12)]
        clones.append(self.clone(clones[0], MIB + 1024))
        self.assertEqual({2}, {self.depth(clone) for clone in clones})
        self.assert_holds(clones[-1], (1, MIB), (0, 1024))


class SweepTest(QcowCase):
    """Nothing that anybody needs is ever removed."""

    def test_layer_that_nobody_needs_goes_with_all_below_it(self):
        volume = self.volume(1)
        self.snapshot(volume)
        self.write(volume, 2, 0, 4096)
        os.unlink(self.path('volumes', volume.id))
        self.driver.upkeep(self.pool)
        self.assertEqual(1, len(self.layers()))  # the snapshot's

    def test_volume_that_was_let_go_keeps_its_layers(self):
        origin = self.volume(1)
        clone = self.clone(origin)
        self.driver.delete(origin)
        self.driver.disown(clone)
        before = self.layers()
        self.tend()
        self.assertEqual(before, self.layers())
        adopted = self.wish()
        self.driver.adopt(f'disowned/{clone.id}', adopted)
        self.tend()
        self.assert_holds(adopted, (1, MIB))
        self.assertEqual(1, len(self.layers()))

    def test_layer_that_is_being_made_is_left_alone(self):
        other = self.make_driver()
        self.node.hook = (
            'run qemu-img create', lambda: other.upkeep(self.pool)
        )
        volume = self.volume(1)
        self.assert_holds(volume, (1, MIB))

    def test_draft_that_was_left_is_removed(self):
        path = self.path('drafts', f'{ids.new()}.qcow2')
        with open(path, 'wb'):
            pass
        self.driver.upkeep(self.pool)
        self.assertFalse(os.path.exists(path))

    def test_files_of_others_are_left_where_they_are(self):
        paths = [
            self.path('layers', 'readme.txt'), self.path('notes', 'mine'),
            self.path('a.qcow2'), self.path('b'),
        ]
        for path in paths:
            with open(path, 'wb') as f:
                f.write(b'x' * 4096)
        self.tend()
        self.driver.delete(self.volume(1))
        self.assertTrue(all(map(os.path.exists, paths)))

    def test_nothing_goes_while_a_needed_header_cannot_be_read(self):
        volume = self.volume(1)
        snapshot = self.snapshot(volume)
        self.write(volume, 2, 0, 4096)
        clone = self.clone(snapshot)
        for damaged in volume, clone:
            with open(self.layer(damaged), 'rb+') as f:
                f.write(b'\0')
        before = self.layers()
        self.driver.delete_snapshot(snapshot)
        self.tend()
        self.assertEqual(before, self.layers())
        for damaged in volume, clone:
            with open(self.layer(damaged), 'rb+') as f:
                f.write(b'Q')
        self.tend()
        self.assert_holds(clone, (1, MIB))
        self.assert_holds(volume, (2, 4096), (1, MIB - 4096))

    def test_half_adopted_file_is_shown_once_and_kept(self):
        self.qemu('qemu-img', 'create', '-q', '-f', 'qcow2',
                  self.path('f.img'), '1M')
        self.qemu_io('write -P 7 0 1M', '-f', 'qcow2', self.path('f.img'))
        self.node.hook = ('point', lambda: self.fail('cut off here'))
        adopted = self.wish()
        with self.assertRaisesRegex(AssertionError, 'cut off'):
            self.driver.adopt('f.img', adopted)
        self.tend()
        self.assertEqual(
            [adopted.id], [f.id for f in self.driver.scan(self.pool)]
        )
        self.driver.adopt('f.img', adopted)
        self.assertFalse(os.path.exists(self.path('f.img')))
        self.assert_holds(adopted, (7, MIB))


class DamageTest(QcowCase):
    """What is not as we made it is refused, and names itself."""

    def test_header_that_names_another_file_is_refused(self):
        volume = self.volume()
        secret = self.path('secret')
        with open(secret, 'wb') as f:
            f.write(b's' * MIB)
        layer = self.layer(volume)
        self.qemu('qemu-img', 'rebase', '-u', '-f', 'qcow2', '-F', 'raw',
                  '-b', secret, layer)
        for call in (
            lambda: self.driver.blocknode(volume),
            lambda: self.driver.inspect(volume),
            lambda: self.snapshot(volume),
            lambda: self.driver.resize(volume, 2 * MIB),
        ):
            with self.assertRaisesRegex(errors.Corrupt, 'backing file'):
                call()
        self.driver.delete(volume)

    def test_missing_layer_is_damage_and_not_absence(self):
        volume = self.volume(1)
        snapshot = self.snapshot(volume)
        os.rename(self.layer(snapshot), self.path('away'))
        with self.assertRaisesRegex(errors.Corrupt, 'missing'):
            self.driver.blocknode(volume)
        with self.assertRaisesRegex(errors.Corrupt, 'missing'):
            self.driver.blocknode(snapshot)

    def test_pointer_out_of_the_pool_is_refused(self):
        volume = self.volume()
        pointer = self.path('volumes', volume.id)
        os.unlink(pointer)
        os.symlink('/etc/passwd', pointer)
        with self.assertRaisesRegex(errors.Corrupt, 'no layer'):
            self.driver.inspect(volume)

    def test_directory_that_is_gone_is_no_empty_pool(self):
        volume = self.volume()
        os.rename(self.directory, self.directory + '-away')
        os.mkdir(self.directory)
        for call in (
            lambda: self.driver.delete(volume),
            lambda: self.driver.inspect(volume),
            lambda: self.driver.create(self.wish()),
            lambda: list(self.driver.scan(self.pool)),
            lambda: self.driver.pools(),
            lambda: self.driver.upkeep(self.pool),
        ):
            self.assertRaises(errors.Unavailable, call)


    def test_empty_mount_point_is_no_empty_pool_after_a_restart(self):
        volume = self.volume()
        away = self.directory + '-away'
        os.rename(self.directory, away)
        os.mkdir(self.directory)
        conf = fixtures.settings(
            qcow.QcowDriver, directories=[self.directory])
        for is_used_before in False, True:
            if is_used_before:  # it has been a pool, under what was mounted
                for name in 'volumes', 'layers', 'notes', '.lock':
                    os.rename(os.path.join(away, name), self.path(name))
                os.unlink(self.path('volumes', volume.id))
            driver = qcow.QcowDriver(conf, self.node)
            with self.assertRaisesRegex(errors.Invalid, 'mount'):
                driver.check()
            for call in (
                lambda d: d.delete(volume),
                lambda d: d.inspect(volume),
                lambda d: d.create(self.wish()),
                lambda d: list(d.scan(self.pool)),
                lambda d: d.pools(),
            ):
                self.assertRaises(errors.Unavailable, call, driver)
            if not is_used_before:
                self.assertEqual([], os.listdir(self.directory))

    def test_pool_that_is_mounted_late_is_served_whole(self):
        volume = self.volume(fill=7)
        away = self.directory + '-away'
        os.rename(self.directory, away)
        os.mkdir(self.directory)
        self.assertRaises(errors.Invalid, self.make_driver)
        os.rmdir(self.directory)
        os.rename(away, self.directory)
        self.driver = self.make_driver()
        self.assert_holds(volume, (7, MIB))
        self.assertEqual(1, len(list(self.driver.scan(self.pool))))


class AdoptTest(QcowCase):
    """A foreign file becomes a volume only if it stands alone."""

    def test_files_that_cannot_be_volumes_are_refused_and_kept(self):
        base = self.make('base')
        cases = {
            'backed': ['-b', base, '-F', 'qcow2'],
            'external': ['-o', f'data_file={self.path("data")}'],
            'old': ['-o', 'compat=0.10'],
        }
        for name, options in cases.items():
            self.make(name, *options)
        inside = self.make('inside')
        self.qemu('qemu-img', 'snapshot', '-c', 'one', inside)
        broken = self.make('broken')
        self.qemu_io('write -P 1 0 1M', '-f', 'qcow2', broken)
        with open(broken, 'rb+') as f:
            f.seek(3 * CLUSTER)  # the table of the first clusters
            f.write(os.urandom(CLUSTER))
        for name in (*cases, 'inside', 'broken'):
            with self.assertRaises(errors.Invalid, msg=name):
                self.driver.adopt(name, self.wish())
            self.assertTrue(os.path.exists(self.path(name)))
        self.assertEqual([], self.layers())

    def test_file_that_is_open_is_not_taken(self):
        path = self.make('open')
        with opened(path):
            with self.assertRaises(errors.Busy):
                self.driver.adopt('open', self.wish())
        self.driver.adopt('open', self.wish())

    def make(self, name, *options):
        path = self.path(name)
        self.qemu('qemu-img', 'create', '-q', '-f', 'qcow2', *options, path,
                  '1M')
        return path


class LocalTest(QcowCase):
    """Who was given a path may use it until it is taken back."""

    def test_mapped_volume_is_in_use(self):
        volume = self.volume(1)
        snapshot = self.snapshot(volume)
        device = self.driver.map(volume, model.Access.WRITE)
        self.assertEqual(('qcow2', False), (device.format, device.is_block))
        self.assert_busy(
            lambda: self.snapshot(volume),
            lambda: self.clone(volume),
            lambda: self.driver.revert(snapshot),
            lambda: self.driver.resize(volume, 2 * MIB),
            lambda: self.driver.writer(volume).__enter__(),
        )
        self.driver.delete_snapshot(snapshot)
        before = self.layers()
        self.driver.upkeep(self.pool)
        self.assertEqual(before, self.layers())
        self.assert_busy(
            lambda: self.driver.delete(volume),
            lambda: self.driver.disown(volume),
            lambda: self.driver.flatten(volume, lambda percent: None),
        )
        self.driver.unmap(volume)
        self.tend()
        self.assertEqual(1, len(self.layers()))
        self.assert_holds(volume, (1, MIB))

    def test_path_is_not_taken_back_while_it_is_open(self):
        volume = self.volume(1)
        device = self.driver.map(volume, model.Access.WRITE)
        with opened(device.path):
            self.assert_busy(lambda: self.driver.unmap(volume))
        self.driver.unmap(volume)

    def test_stranger_that_writes_is_seen(self):
        volume = self.volume(1)
        with opened(self.layer(volume)):
            self.assert_busy(
                lambda: self.snapshot(volume),
                lambda: self.clone(volume),
                lambda: self.driver.resize(volume, 2 * MIB),
                lambda: self.driver.delete(volume),
            )
        self.snapshot(volume)


class ManyTest(QcowCase):

    def test_two_services_on_one_directory_do_not_disturb_each_other(self):
        drivers = [self.make_driver() for _ in range(2)]
        origin = self.volume(1)
        snapshot = self.snapshot(origin)

        def work(number):
            driver = drivers[number % 2]
            volume, clone = self.wish(), self.wish()
            driver.create(volume)
            driver.clone(snapshot, clone)
            driver.snapshot(model.Snapshot(ids.new(), clone, MIB))
            drivers[1 - number % 2].delete(volume)
            driver.upkeep(self.pool)
            return clone

        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            clones = list(threads.map(work, range(18)))
        found = [f.id for f in self.driver.scan(self.pool)]
        self.assertEqual(2 + 2 * len(clones), len(found))
        self.assert_holds(clones[0], (1, MIB))
        self.assert_holds(origin, (1, MIB))


class OptionTest(unittest.TestCase):

    def test_impossible_options_are_refused_with_the_reason(self):
        root = fixtures.state_dir(self)
        a, b = os.path.join(root, 'a'), os.path.join(root, 'b', 'a')
        for options, words in (
            ({'directories': []}, 'at least one'),
            ({'directories': ['pool']}, 'relative'),
            ({'directories': [a, b]}, 'two directories'),
            ({'directories': [a], 'cluster_size': 66000}, 'power of two'),
            ({'directories': ['/proc/nothing']}, 'cannot write'),
        ):
            conf = fixtures.settings(qcow.QcowDriver, **options)
            driver = qcow.QcowDriver(conf, fixtures.make_node(self))
            with self.assertRaisesRegex(errors.Invalid, words):
                driver.check()

    def test_format_and_tables_are_as_the_options_say(self):
        root = fixtures.state_dir(self)
        for options, bits in (
            ({'cluster_size': 1 << 20}, 20),
            ({'preallocation': 'metadata'}, 16),
        ):
            conf = fixtures.settings(
                qcow.QcowDriver, directories=[root], **options
            )
            driver = qcow.QcowDriver(conf, fixtures.make_node(self))
            driver.check()
            volume = model.Volume(
                ids.new(), os.path.basename(root), 64 * MIB
            )
            driver.create(volume)
            path = driver.blocknode(volume)['file']['filename']
            with open(path, 'rb') as f:
                head = f.read(CLUSTER)
            self.assertEqual(bits, struct.unpack_from('>I', head, 20)[0])
            driver.snapshot(model.Snapshot(ids.new(), volume, 64 * MIB))
            driver.resize(volume, 128 * MIB)


def opened(path):
    """Have a QEMU that is not ours open a qcow2 file, as a context."""
    return _Opened(path)


class _Opened:

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.process = subprocess.Popen(
            ['qemu-io', '-f', 'qcow2', self.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        self.process.stdin.write(b'length\n')
        self.process.stdin.flush()
        while b'MiB' not in self.process.stdout.readline():
            pass

    def __exit__(self, *error):
        self.process.communicate(b'quit\n', timeout=60)
