# SPDX-License-Identifier: Apache-2.0
"""The file driver, with reflink and without."""

import concurrent.futures
import contextlib
import os
import shutil
import subprocess
import tempfile
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.drivers import file
from volume.drivers import marker
from volume.nbd import NbdClient
from volume.node import Node
from volume.testing import conformance
from volume.testing import fixtures
from volume.testing import workbench

NOBODY = 65534


class Suite(conformance.DriverSuite):

    def setUp(self):
        self.node = self.make_node()
        self.directory = self.make_directory()
        super().setUp()

    def make_node(self):
        return fixtures.make_node(self)

    def make_driver(self):
        conf = fixtures.settings(
            file.FileDriver, directories=[self.directory]
        )
        return file.FileDriver(conf, self.node)

    def make_foreign(self, pool, image):
        path = os.path.join(self.directory, 'somebody.img')
        with open(path, 'wb') as f:
            f.write(image)
        self.addCleanup(lambda: os.path.exists(path) and os.unlink(path))
        return 'somebody.img'

    def test_directory_holds_nothing_but_what_scan_shows(self):
        self.volume(seed=1)
        self.assertEqual(
            sorted([*self.handles(), marker.NAME]),
            sorted(os.listdir(self.directory)),
        )

    def test_relative_directory_is_refused(self):
        self.assert_refused(['pool'], 'relative')

    def test_directories_of_one_name_are_refused(self):
        other = fixtures.plain_directory(
            self, os.path.basename(self.directory)
        )
        self.assert_refused([self.directory, other], 'two directories')

    def test_missing_directory_is_refused(self):
        self.assert_refused([self.directory + '-gone'], 'make it')

    def test_missing_directory_is_told_in_the_same_words_each_time(self):
        # What differs from before is logged: once, not at each check.
        conf = fixtures.settings(
            file.FileDriver, directories=[self.directory + '-gone']
        )
        driver = file.FileDriver(conf, self.node)
        told = set()
        for _ in range(2):
            with self.assertRaises(errors.Invalid) as caught:
                driver.check()
            told.add(str(caught.exception))
        self.assertEqual(1, len(told), told)

    def test_file_for_a_directory_is_refused(self):
        path = os.path.join(self.node.state_dir, 'file')
        with open(path, 'wb'):
            pass
        self.assert_refused([path], 'cannot write')

    def test_no_directory_at_all_is_refused(self):
        self.assert_refused([], 'at least one')

    def assert_refused(self, directories, words):
        conf = fixtures.settings(file.FileDriver, directories=directories)
        with self.assertRaisesRegex(errors.Invalid, words):
            file.FileDriver(conf, self.node).check()

    def test_directories_of_a_backend_are_its_pools(self):
        other = fixtures.plain_directory(self, 'other')
        conf = fixtures.settings(
            file.FileDriver, directories=[self.directory, other + '/']
        )
        driver = file.FileDriver(conf, self.node)
        driver.check()
        self.assertEqual(
            [os.path.basename(self.directory), 'other'],
            [pool.name for pool in driver.pools()],
        )
        volume = model.Volume(ids.new(), 'other', 4096)
        driver.create(volume)
        self.assertEqual([], list(driver.scan(self.pool.name)))
        self.assertEqual([driver.inspect(volume)], list(driver.scan('other')))

    def test_directory_that_is_gone_is_no_empty_pool(self):
        # "Not found" would let a deletion pass for done.
        volume = self.volume(seed=1)
        away = self.directory + '-away'
        os.rename(self.directory, away)
        try:
            for call in (
                lambda: self.driver.delete(volume),
                lambda: self.driver.inspect(volume),
                lambda: self.driver.create(volume),
                lambda: list(self.driver.scan(self.pool.name)),
                lambda: self.driver.pools(),
            ):
                self.assertRaises(errors.Unavailable, call)
        finally:
            os.rename(away, self.directory)
        self.assert_seed(volume, 1)

    def test_another_file_system_in_its_place_is_no_empty_pool(self):
        volume = self.volume(seed=1)
        there = os.stat(self.directory).st_dev
        others = [
            path for path in ('/tmp', '/dev/shm')
            if os.path.isdir(path) and os.stat(path).st_dev != there
        ]
        if not others:
            self.skipTest('only one file system')
        away = self.directory + '-away'
        os.rename(self.directory, away)
        empty = self.enterContext(tempfile.TemporaryDirectory(dir=others[0]))
        os.symlink(empty, self.directory)
        try:
            for call in self.driver.delete, self.driver.create:
                with self.assertRaises(errors.Unavailable):
                    call(volume)
        finally:
            os.unlink(self.directory)
            os.rename(away, self.directory)
        self.assert_seed(volume, 1)

    def test_empty_mount_point_is_no_empty_pool_after_a_restart(self):
        # Neither for a new driver, nor for one that has looked before.
        volume = self.volume(seed=1)
        away = self.directory + '-away'
        os.rename(self.directory, away)
        os.mkdir(self.directory)
        for driver in self.make_driver(), self.driver:
            with self.assertRaisesRegex(errors.Invalid, 'mount'):
                driver.check()
            for call in (
                lambda d: d.delete(volume),
                lambda d: d.inspect(volume),
                lambda d: d.create(self.wish()),
                lambda d: list(d.scan(self.pool.name)),
                lambda d: d.pools(),
            ):
                self.assertRaises(errors.Unavailable, call, driver)
        self.assertEqual([], os.listdir(self.directory))
        os.rmdir(self.directory)
        os.rename(away, self.directory)
        driver.check()
        self.assert_seed(volume, 1)

    def test_lost_directory_leaves_the_others_in_service(self):
        other = fixtures.plain_directory(self, 'other')
        conf = fixtures.settings(
            file.FileDriver, directories=[self.directory, other]
        )
        os.unlink(os.path.join(self.directory, marker.NAME))
        driver = file.FileDriver(conf, self.node)
        self.assertRaises(errors.Invalid, driver.check)
        driver.create(volume := model.Volume(ids.new(), 'other', 4096))
        self.assertEqual(4096, driver.inspect(volume).size_bytes)

    def test_full_disk_takes_no_backend_down(self):
        had = self.pool.features
        for word in 'open', 'write', 'clone':
            node = FullNode(self.node.state_dir, word)
            conf = self.driver.conf
            driver = file.FileDriver(conf, node)
            driver.check()
            self.assertEqual(self.pool.name, driver.pools()[0].name)
            node.is_full = False
            driver.check()
            node.is_full = True
            driver.check()
            self.assertEqual(had, driver.pools()[0].features, word)
            self.assertFalse(self.probes())

    def test_checks_at_once_do_not_disturb_each_other(self):
        drivers = [self.make_driver() for _ in range(8)]

        def check(driver):
            for _ in range(20):
                driver.check()

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(check, each) for each in drivers]:
                done.result()
        self.assertFalse(self.probes())

    def test_probe_that_was_left_is_removed_and_a_new_one_is_not(self):
        old = ('.probe', '.probe-clone', f'.probe.{ids.new()}',
               f'.probe.{ids.new()}-clone')
        keep = f'.probe.{ids.new()}', '.probe.mine', '.probes'
        for name in (*old, *keep):
            path = os.path.join(self.directory, name)
            with open(path, 'wb'):
                pass
            if name != keep[0]:
                os.utime(path, (1, 1))
        self.driver.check()
        self.assertEqual(set(keep), self.probes())
        for name in keep:
            os.unlink(os.path.join(self.directory, name))

    def probes(self):
        return {
            name for name in os.listdir(self.directory)
            if name.startswith('.probe')
        }

    def test_what_is_attached_is_not_replaced_cut_or_removed(self):
        fixtures.serve_blocks(self, self.node)
        volume = self.volume(seed=1)
        self.attach(volume, 'a')
        for call in (
            lambda: self.driver.delete(volume),
            lambda: self.driver.disown(volume),
            lambda: self.driver.resize(volume, 2 * volume.size_bytes),
            lambda: self.driver.unmap(volume),
            lambda: self.driver.writer(volume),
        ):
            self.assertRaises(errors.Busy, call)
        self.assert_seed(volume, 1)
        self.node.blockd.unexport('a')
        self.driver.resize(volume, 2 * volume.size_bytes)
        self.driver.unmap(volume)

    def test_what_any_qemu_has_open_is_not_replaced_cut_or_removed(self):
        # A host was told the path, and opens it as whatever user it is.
        if shutil.which('qemu-io') is None:
            self.skipTest('qemu-io is not installed')
        volume = self.volume(seed=1)
        path = os.path.join(self.directory, f'{volume.id}.raw')
        stranger = os.path.join(self.directory, 'stranger')
        with open(stranger, 'wb') as f:
            f.truncate(4096)
        self.addCleanup(os.unlink, stranger)
        for is_read_only in False, True:
            with opened(path, is_read_only), opened(stranger, is_read_only):
                for call in (
                    lambda: self.driver.delete(volume),
                    lambda: self.driver.disown(volume),
                    lambda: self.driver.resize(volume, 2 * volume.size_bytes),
                    lambda: self.driver.unmap(volume),
                    lambda: self.driver.writer(volume),
                    lambda: self.driver.adopt('stranger', self.wish()),
                ):
                    self.assertRaises(errors.Busy, call)
                self.assert_seed(volume, 1)
        self.driver.resize(volume, 2 * volume.size_bytes)
        self.driver.delete(volume)

    def attach(self, source, name):
        client = NbdClient(self.node.blockd.export(
            name, self.driver.blocknode(source),
            isinstance(source, model.Volume),
        ))
        self.addCleanup(client.close)
        return client

    def test_adopted_file_is_a_plain_one_of_whole_sectors(self):
        secret = os.path.join(self.node.state_dir, 'secret')
        for path, size_bytes in (
            (secret, 1024), (os.path.join(self.directory, 'odd'), 1000),
            (os.path.join(self.directory, 'empty'), 0),
        ):
            with open(path, 'wb') as f:
                f.truncate(size_bytes)
            self.addCleanup(os.unlink, path)
        link = os.path.join(self.directory, 'link')
        os.symlink(secret, link)
        self.addCleanup(os.unlink, link)
        folder = os.path.join(self.directory, 'folder')
        os.mkdir(folder)
        self.addCleanup(os.rmdir, folder)
        self.assertLessEqual({'odd', 'empty'}, set(self.handles()))
        self.assertFalse({'link', 'folder'} & set(self.handles()))
        for handle in 'odd', 'empty', 'link', 'folder', secret:
            with self.assertRaises(errors.Invalid, msg=handle):
                self.driver.adopt(handle, self.wish())

    def test_disown_replaces_no_file(self):
        volume = self.volume(seed=1)
        self.driver.disown(volume)
        self.driver.create(volume)
        with self.assertRaises(errors.Conflict):
            self.driver.disown(volume)
        self.driver.adopt(f'{volume.id}.disowned.raw', rescued := self.wish())
        self.assert_seed(rescued, 1)

    def test_broken_note_is_no_note(self):
        volume = self.volume()
        note = os.path.join(self.directory, f'{volume.id}.json')
        for text in b'', b'[1]', b'{', b'[' * 60000, b'\xff\xfe':
            with open(note, 'wb') as f:
                f.write(text)
            self.assertEqual({}, self.driver.inspect(volume).sidecar)
            self.assertEqual(1, len(self.handles()))

    def test_delete_leaves_no_draft_and_no_note(self):
        volume = self.volume()
        self.driver.describe(volume, {'name': 'x'})
        for name in f'.{volume.id}.raw.new', f'{volume.id}.json.new':
            with open(os.path.join(self.directory, name), 'wb'):
                pass
        self.assertEqual(1, len(self.handles()))
        self.driver.delete(volume)
        self.assertEqual([marker.NAME], os.listdir(self.directory))


@contextlib.contextmanager
def opened(path, is_read_only):
    """Have a QEMU of another user, if there can be one, open a raw file."""
    other = {} if os.getuid() else {
        'user': NOBODY, 'group': NOBODY, 'extra_groups': [],
    }
    os.chmod(path, 0o666)
    with open(path, 'rb') as f, subprocess.Popen(
        # By a name that leads through no directory of ours.
        ['qemu-io', '-f', 'raw', *['-r'][:is_read_only],
         f'/proc/self/fd/{f.fileno()}'],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        pass_fds=[f.fileno()], **other,
    ) as user:
        user.stdin.write(b'length\n')
        user.stdin.flush()
        while b'iB' not in (line := user.stdout.readline()):
            assert line, 'qemu-io has ended'
        try:
            yield
        finally:
            user.stdin.close()


class FullNode(Node):
    """A node whose disk is full for whatever starts with a word."""

    def __init__(self, state_dir, word):
        super().__init__(state_dir)
        self.word, self.is_full = word, True

    def act(self, what, effect):
        if self.is_full and what.startswith((self.word, 'write')):
            raise errors.NoSpace(f'{what}: no space left')
        return super().act(what, effect)


class PlainFileTest(Suite, unittest.TestCase):

    def make_directory(self):
        return fixtures.plain_directory(self)

    def test_pool_without_reflink_says_so(self):
        self.assertFalse(
            {'Clone', 'Snapshots', 'Revert'} & self.pool.features
        )
        self.assertIn('Resize', self.pool.features)


class ReflinkFileTest(Suite, unittest.TestCase):

    def make_directory(self):
        return fixtures.reflink_directory(self)

    def test_pool_with_reflink_says_so(self):
        self.assertLessEqual(
            {'Clone', 'Snapshots', 'Revert'}, self.pool.features
        )

    def test_attached_volume_keeps_its_bytes_when_it_is_copied(self):
        fixtures.serve_blocks(self, self.node)
        volume = self.volume(seed=1)
        client = self.attach(volume, 'a')
        self.addCleanup(lambda: self.node.blockd.unexport('a'))
        snapshot, clone = self.snapshot(volume), self.clone(volume)
        client.pwrite(b'\xff' * 512, 0)
        client.flush()
        self.assert_seed(snapshot, 1)
        self.assert_seed(clone, 1)
        with self.assertRaises(errors.Busy):
            self.driver.revert(snapshot)
        image = b'\xff' * 512 + workbench.pattern(1, volume.size_bytes)[512:]
        self.assert_holds(volume, image)
        there = bytearray(volume.size_bytes)
        client.pread_into(there, 0)
        self.assertEqual(image, there)

    def test_attached_snapshot_is_not_deleted(self):
        fixtures.serve_blocks(self, self.node)
        snapshot = self.snapshot(self.volume(seed=1))
        self.attach(snapshot, 'a')
        with self.assertRaises(errors.Busy):
            self.driver.delete_snapshot(snapshot)
        self.node.blockd.unexport('a')

    def test_clone_shares_the_bytes_of_its_source(self):
        source = self.volume(size_bytes=64 * model.MIB)
        with self.driver.writer(source) as writer:
            workbench.write_all(writer, b'\x5a' * source.size_bytes)
            writer.commit()

        def cost():
            before = self.driver.pools()[0].free_bytes
            self.clone(source)
            return before - self.driver.pools()[0].free_bytes

        # Others may write there meanwhile, but hardly each time.
        self.assertTrue(any(
            cost() < source.size_bytes // 4 for _ in range(5)
        ))
