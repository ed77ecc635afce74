# SPDX-License-Identifier: Apache-2.0
"""The block daemon, for real: exports, snapshots under use, its death."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from volume import blockgraph
from volume import errors
from volume import qmp
from volume.blockd import Blockd
from volume.drivers import generic
from volume.nbd import NbdClient
from volume.node import Node

T = TypeVar('T')

MIB = 1 << 20
SIZE = 8 * MIB
COMMAND_S = 30
PROGRAMS = ('qemu-storage-daemon', 'qemu-img', 'nbdcopy', 'nbdinfo')
MISSING = [name for name in PROGRAMS if not shutil.which(name)]


def run(*argv: str) -> str:
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=COMMAND_S
    ).stdout


class FailingNode(Node):
    """Loses the reply to one kind of call, or refuses it, once."""

    def __init__(self, state_dir: str) -> None:
        super().__init__(state_dir)
        self.what = ''
        self.before = False
        self.seen: list[str] = []

    def act(self, what: str, effect: Callable[[], T]) -> T:
        self.seen.append(what)
        if what != self.what:
            return effect()
        self.what = ''
        if self.before:
            raise errors.Unavailable('refused by the test')
        effect()
        raise errors.Unknown('lost by the test')


@unittest.skipIf(MISSING, f'not installed: {", ".join(MISSING)}')
class BlockdCase(unittest.TestCase):
    """A daemon and images of its own for each test."""

    def setUp(self) -> None:
        self.root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        self.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        self.node = FailingNode(self.root)
        self.directory = os.path.join(self.root, 'blockd')
        self.addCleanup(Blockd(Node(self.root), self.directory).stop)
        self.blockd = Blockd(self.node, self.directory)
        self.node.blockd = self.blockd

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def qcow2(self, name: str, below: str | None = None) -> str:
        path = self.path(name)
        backing = ['-b', self.path(below), '-F', 'qcow2'] if below else []
        size = [] if below else [str(SIZE)]
        run('qemu-img', 'create', '-q', '-f', 'qcow2', *backing, path, *size)
        return path

    def raw(self, name: str, data: bytes = b'') -> str:
        with open(self.path(name), 'wb') as f:
            f.write(data)
            f.truncate(SIZE)
        return self.path(name)

    def chain(self, *names: str) -> dict[str, Any]:
        """Return the block node of a chain, the top first."""
        node: dict[str, Any] | None = None
        for name in reversed(names):
            node = {
                'driver': 'qcow2', 'backing': node,
                'file': {'driver': 'file', 'filename': self.path(name)},
            }
        assert node
        return node

    def plain(self, name: str) -> dict[str, Any]:
        return {
            'driver': 'raw',
            'file': {'driver': 'file', 'filename': self.path(name)},
        }

    def client(self, uri: str) -> NbdClient:
        client = NbdClient(uri)
        self.addCleanup(client.close)
        return client

    def write(self, uri: str, data: bytes, offset: int = 0) -> None:
        with contextlib.closing(NbdClient(uri)) as client:
            client.pwrite(data, offset)
            client.flush()

    def read(
        self, uri: str, length: int = 4096, offset: int = 0
    ) -> bytes:
        buffer = bytearray(length)
        with contextlib.closing(NbdClient(uri)) as client:
            client.pread_into(buffer, offset)
        return bytes(buffer)

    def copied(self, uri: str) -> bytes:
        """Return all bytes as libnbd reads them: not by our client."""
        target = self.path('copied')
        run('nbdcopy', uri, target)
        with open(target, 'rb') as f:
            return f.read()

    def pid(self) -> int:
        with open(os.path.join(self.directory, 'daemon.json')) as f:
            return int(json.load(f)['pid'])

    def kill(self) -> None:
        """End the daemon as a power cut would, and wait until it is."""
        fd = os.pidfd_open(self.pid())
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            self.blockd.stop()  # reaps; there is nothing left to end
        finally:
            os.close(fd)


class ExportTest(BlockdCase):
    def test_bytes_written_through_an_export_are_in_the_image(self) -> None:
        self.qcow2('a')
        data = os.urandom(3 * MIB)
        uri = self.blockd.export('one', self.chain('a'), True)
        self.write(uri, data, MIB)
        self.assertEqual(
            bytes(MIB) + data + bytes(SIZE - len(data) - MIB),
            self.copied(uri),
        )
        self.blockd.unexport('one')
        run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw',
            self.path('a'), self.path('out'))
        with open(self.path('out'), 'rb') as f:
            f.seek(MIB)
            self.assertEqual(data, f.read(len(data)))

    def test_raw_file_is_served_and_written_in_place(self) -> None:
        path = self.raw('a', b'before')
        uri = self.blockd.export('one', self.plain('a'), True)
        self.assertEqual(b'before', self.read(uri, 6))
        self.write(uri, b'after!', 0)
        with open(path, 'rb') as f:
            self.assertEqual(b'after!', f.read(6))

    def test_an_image_of_odd_size_is_served_whole(self) -> None:
        with open(self.path('a'), 'wb') as f:
            f.write(b'x' * 1536)
        uri = self.blockd.export('one', self.plain('a'), False)
        self.assertEqual(b'x' * 1536, self.copied(uri))

    def test_export_again_is_the_same_uri_and_one_export(self) -> None:
        self.qcow2('a')
        first = self.blockd.export('one', self.chain('a'), True)
        self.assertEqual(
            first, self.blockd.export('one', self.chain('a'), True)
        )
        self.assertEqual({'one': self.path('a')}, self.blockd.exports())

    def test_nbd_name_is_the_export_id(self) -> None:
        self.raw('a')
        name = '0a1b-2c'
        self.blockd.export(name, self.plain('a'), False)
        listed = run(
            'nbdinfo', '--list', '--json',
            f'nbd+unix:///?socket={self.directory}/nbd',
        )
        names = [e['export-name'] for e in json.loads(listed)['exports']]
        self.assertEqual([name], names)

    def test_same_id_of_another_file_is_a_conflict(self) -> None:
        self.qcow2('a')
        other = self.qcow2('other')
        self.blockd.export('one', self.chain('a'), True)
        with self.assertRaises(errors.Conflict):
            self.blockd.export('one', self.chain('other'), True)
        self.assertEqual({'one': self.path('a')}, self.blockd.exports())
        self.assertFalse(self.blockd.is_open(other))

    def test_same_id_with_another_access_is_a_conflict(self) -> None:
        self.raw('a')
        self.blockd.export('one', self.plain('a'), False)
        with self.assertRaises(errors.Conflict):
            self.blockd.export('one', self.plain('a'), True)

    def test_read_only_export_cannot_be_written_to(self) -> None:
        self.raw('a')
        uri = self.blockd.export('one', self.plain('a'), False)
        self.assertTrue(self.client(uri).is_read_only)

    def test_image_open_for_reading_becomes_writable_for_a_writer(
        self
    ) -> None:
        self.qcow2('a')
        reader = self.blockd.export('one', self.chain('a'), False)
        writer = self.blockd.export('two', self.chain('a'), True)
        self.write(writer, b'new')
        self.assertEqual(b'new', self.read(reader, 3))

    def test_a_pointer_is_followed_once(self) -> None:
        self.raw('a', b'a')
        self.raw('other', b'b')
        os.symlink(self.path('a'), self.path('pointer'))
        uri = self.blockd.export('one', self.plain('pointer'), False)
        os.unlink(self.path('pointer'))
        os.symlink(self.path('other'), self.path('pointer'))
        self.assertEqual({'one': self.path('a')}, self.blockd.exports())
        self.assertEqual(b'a', self.read(uri, 1))

    def test_image_locked_by_another_process_is_busy(self) -> None:
        self.qcow2('a')
        other = Blockd(Node(self.root), self.path('second'))
        self.addCleanup(other.stop)
        other.export('one', self.chain('a'), True)
        with self.assertRaises(errors.Busy):
            self.blockd.export('one', self.chain('a'), True)
        self.assertEqual(frozenset(), self.blockd.open_files())
        with self.assertRaises(subprocess.CalledProcessError):
            run('qemu-img', 'resize', '-f', 'qcow2', self.path('a'), '+1M')

    def test_absent_image_is_not_found(self) -> None:
        for node in self.plain('none'), self.chain('none'):
            with self.assertRaises(errors.NotFound):
                self.blockd.export('one', node, True)

    def test_missing_base_leaves_nothing_open(self) -> None:
        self.qcow2('base')
        self.qcow2('a', below='base')
        os.unlink(self.path('base'))
        with self.assertRaises(errors.NotFound):
            self.blockd.export('one', self.chain('a', 'base'), True)
        self.assertEqual(frozenset(), self.blockd.open_files())

    def test_image_that_is_no_qcow2_is_corrupt(self) -> None:
        self.raw('a')
        with self.assertRaises(errors.Corrupt):
            self.blockd.export('one', self.chain('a'), True)

    def test_chain_that_its_headers_contradict_is_corrupt(self) -> None:
        self.qcow2('base')
        self.qcow2('other')
        self.qcow2('a', below='base')
        for chain in (
            self.chain('a'), self.chain('a', 'other'),
            self.chain('base', 'other'),
        ):
            with self.assertRaises(errors.Corrupt):
                self.blockd.export('one', chain, False)
        self.assertEqual({}, self.blockd.exports())

    def test_ids_that_are_none_are_refused(self) -> None:
        for name in '', '-x', 'a/b', 'a,b', 'x' * 101, 'a b', 'ä':
            with self.subTest(name), self.assertRaises(errors.Invalid):
                self.blockd.export(name, self.plain('a'), True)

    def test_200_exports_at_once_from_8_threads_are_all_there(self) -> None:
        self.qcow2('base')
        data = os.urandom(4096)
        self.write(self.blockd.export('w', self.chain('base'), True), data)
        self.blockd.unexport('w')
        names = [f'v{i}' for i in range(200)]
        template = self.qcow2('v', below='base')
        for name in names:
            shutil.copy(template, self.path(name))
        with ThreadPoolExecutor(8) as threads:
            uris = dict(zip(names, threads.map(
                lambda n: self.blockd.export(n, self.chain(n, 'base'), True),
                names,
            ), strict=True))
        self.assertEqual(
            {name: self.path(name) for name in names}, self.blockd.exports()
        )
        self.assertEqual(data, self.read(uris['v137']))
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(self.blockd.unexport, names))
        self.assertEqual({}, self.blockd.exports())
        self.assertEqual(frozenset(), self.blockd.open_files())

    def test_exports_come_and_go_over_one_base_in_8_threads(self) -> None:
        self.qcow2('base')
        data = os.urandom(4096)
        self.write(self.blockd.export('w', self.chain('base'), True), data)
        self.blockd.unexport('w')
        for i in range(8):
            self.qcow2(f'v{i}', below='base')

        def come_and_go(i: int) -> None:
            for _ in range(8):
                chain = self.chain(f'v{i}', 'base')
                uri = self.blockd.export(f'v{i}', chain, True)
                self.assertEqual(data, self.read(uri))
                self.blockd.unexport(f'v{i}')

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(come_and_go, range(8)))
        self.assertEqual(frozenset(), self.blockd.open_files())


class UnexportTest(BlockdCase):
    def test_unexport_ends_an_open_session(self) -> None:
        self.raw('a', b'secret')
        uri = self.blockd.export('one', self.plain('a'), True)
        client = self.client(uri)
        client.pread_into(bytearray(6), 0)
        self.blockd.unexport('one')
        with self.assertRaises(errors.Unknown):
            client.pread_into(bytearray(6), 0)
        with self.assertRaises(errors.NotFound):
            NbdClient(uri)

    def test_unexport_leaves_the_other_export_of_the_volume(self) -> None:
        self.qcow2('a')
        one = self.blockd.export('one', self.chain('a'), True)
        two = self.blockd.export('two', self.chain('a'), True)
        client = self.client(two)
        self.write(one, b'x' * 512)
        self.blockd.unexport('one')
        buffer = bytearray(512)
        client.pread_into(buffer, 0)
        self.assertEqual(b'x' * 512, buffer)
        self.assertTrue(self.blockd.is_open(self.path('a')))
        self.blockd.unexport('two')
        self.assertFalse(self.blockd.is_open(self.path('a')))

    def test_unexport_closes_what_only_it_used(self) -> None:
        self.qcow2('base')
        self.qcow2('a', below='base')
        self.qcow2('c', below='base')
        self.blockd.export('one', self.chain('a', 'base'), True)
        self.blockd.export('two', self.chain('c', 'base'), True)
        self.assertTrue(self.blockd.is_open(self.path('base')))
        self.blockd.unexport('one')
        self.assertEqual(
            {self.path('c'), self.path('base')}, self.blockd.open_files()
        )
        self.blockd.unexport('two')
        self.assertEqual(frozenset(), self.blockd.open_files())
        # Nobody holds a lock any longer.
        run('qemu-img', 'resize', '-f', 'qcow2', self.path('a'), '+1M')

    def test_unexport_of_what_is_gone_succeeds(self) -> None:
        self.blockd.unexport('one')
        self.blockd.ensure()
        self.blockd.unexport('one')

    def test_unexport_repeated_after_a_crash_closes_the_image(self) -> None:
        self.qcow2('a')
        self.blockd.export('one', self.chain('a'), True)
        for before in True, False:
            self.node.what, self.node.before = 'qmp blockdev-del', before
            with contextlib.suppress(errors.VolumeError):
                self.blockd.unexport('one')
            self.blockd.unexport('one')
            self.assertEqual(frozenset(), self.blockd.open_files())

    def test_every_lost_or_refused_call_is_mended_by_repeating(self) -> None:
        self.qcow2('base')
        self.qcow2('a', below='base')
        for what in (
            'qmp connect', 'qmp blockdev-add', 'qmp block-export-add',
            'qmp block-export-del', 'qmp query-block-exports',
            'qmp blockdev-del', 'qmp x-debug-query-block-graph',
        ):
            for before in True, False:
                with self.subTest(what=what, before=before):
                    self._mended(what, before)

    def _mended(self, what: str, before: bool) -> None:
        chain = self.chain('a', 'base')
        self.node.what, self.node.before = what, before
        with contextlib.suppress(errors.VolumeError):
            self.blockd.export('one', chain, True)
        # A call that only a repeat makes may still be due to fail.
        with contextlib.suppress(errors.VolumeError):
            self.blockd.export('one', chain, True)
        uri = self.blockd.export('one', chain, True)
        self.assertEqual(bytes(8), self.read(uri, 8))
        self.node.what, self.node.before = what, before
        with contextlib.suppress(errors.VolumeError):
            self.blockd.unexport('one')
        self.node.what = ''
        self.blockd.unexport('one')
        self.assertEqual({}, self.blockd.exports())
        self.assertEqual(frozenset(), self.blockd.open_files())


class SnapshotTest(BlockdCase):
    def overlay(self, name: str, below: str) -> str:
        # As the driver does it: the active image is open, and locked.
        path = self.path(name)
        run(
            'qemu-img', 'create', '-q', '-u', '-f', 'qcow2',
            '-b', self.path(below), '-F', 'qcow2', path, str(SIZE),
        )
        return path

    def test_bytes_from_before_the_snapshot_are_read_through_the_export(
        self
    ) -> None:
        self.qcow2('a')
        old, new = os.urandom(MIB), os.urandom(MIB)
        uri = self.blockd.export('one', self.chain('a'), True)
        client = self.client(uri)
        client.pwrite(old, 0)
        client.pwrite(old, 4 * MIB)
        client.flush()
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        client.pwrite(new, 4 * MIB)
        client.flush()
        whole = old + bytes(3 * MIB) + new + bytes(3 * MIB)
        buffer = bytearray(SIZE)
        client.pread_into(buffer, 0)
        self.assertEqual(whole, buffer)
        self.assertEqual(whole, self.copied(uri))
        # And the snapshot is what was there before.
        snapshot = self.blockd.export('s', self.chain('a'), False)
        self.assertEqual(
            old + bytes(3 * MIB) + old + bytes(3 * MIB),
            self.copied(snapshot),
        )

    def test_snapshot_again_changes_nothing(self) -> None:
        self.qcow2('a')
        uri = self.blockd.export('one', self.chain('a'), True)
        overlay = self.overlay('b', 'a')
        self.blockd.snapshot(self.path('a'), overlay)
        self.write(uri, b'later')
        self.blockd.snapshot(self.path('a'), overlay)
        self.assertEqual(b'later', self.read(uri, 5))
        self.assertEqual({'one': overlay}, self.blockd.exports())
        # Also when there is a later one on top.
        self.blockd.snapshot(overlay, self.overlay('c', 'b'))
        self.blockd.snapshot(self.path('a'), overlay)
        self.assertEqual({'one': self.path('c')}, self.blockd.exports())

    def test_all_exports_of_the_volume_go_on_through_the_overlay(
        self
    ) -> None:
        self.qcow2('a')
        one = self.blockd.export('one', self.chain('a'), True)
        two = self.blockd.export('two', self.chain('a'), False)
        overlay = self.overlay('b', 'a')
        self.blockd.snapshot(self.path('a'), overlay)
        self.write(one, b'x')
        self.assertEqual(b'x', self.read(two, 1))
        self.assertEqual(
            {'one': overlay, 'two': overlay}, self.blockd.exports()
        )

    def test_volume_is_exported_again_over_its_new_layer(self) -> None:
        self.qcow2('a')
        one = self.blockd.export('one', self.chain('a'), True)
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        chain = self.chain('b', 'a')
        two = self.blockd.export('two', chain, True)
        self.assertEqual(one, self.blockd.export('one', chain, True))
        self.write(two, b'by two')
        self.assertEqual(b'by two', self.read(one, 6))
        self.blockd.unexport('one')
        self.assertEqual(b'by two', self.read(two, 6))
        self.blockd.unexport('two')
        self.assertEqual(frozenset(), self.blockd.open_files())
        three = self.blockd.export('three', chain, True)
        self.assertEqual(b'by two', self.read(three, 6))

    def test_clone_of_the_snapshot_is_exported_beside_the_volume(
        self
    ) -> None:
        self.qcow2('a')
        one = self.blockd.export('one', self.chain('a'), True)
        self.write(one, b'old')
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        self.overlay('clone', 'a')
        self.write(one, b'new')
        clone = self.blockd.export('clone', self.chain('clone', 'a'), True)
        self.assertEqual(b'old', self.read(clone, 3))
        self.write(clone, b'own')
        self.assertEqual(b'new', self.read(one, 3))
        self.assertEqual(b'own', self.read(clone, 3))

    def test_layer_under_an_open_one_is_not_opened_for_writing(self) -> None:
        self.qcow2('a')
        self.blockd.export('one', self.chain('a'), True)
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        with self.assertRaises(errors.Busy):
            self.blockd.export('two', self.chain('a'), True)

    def test_layer_that_is_written_to_is_not_opened_under_another(
        self
    ) -> None:
        self.qcow2('a')
        self.blockd.export('one', self.chain('a'), True)
        self.overlay('b', 'a')
        with self.assertRaises(errors.Busy):
            self.blockd.export('two', self.chain('b', 'a'), True)

    def test_crash_at_any_step_is_mended_by_repeating(self) -> None:
        for number, (what, before) in enumerate(
            (what, before)
            for what in ('qmp blockdev-add', 'qmp blockdev-snapshot')
            for before in (True, False)
        ):
            with self.subTest(what=what, before=before):
                self._mended(f'a{number}', f'b{number}', what, before)

    def _mended(
        self, active: str, overlay: str, what: str, before: bool
    ) -> None:
        self.qcow2(active)
        uri = self.blockd.export(active, self.chain(active), True)
        self.write(uri, b'old')
        self.overlay(overlay, active)
        self.node.what, self.node.before = what, before
        with self.assertRaises(errors.VolumeError):
            self.blockd.snapshot(self.path(active), self.path(overlay))
        self.assertEqual(b'old', self.read(uri, 3))
        # The service was restarted.
        later = Blockd(Node(self.root), self.directory)
        later.snapshot(self.path(active), self.path(overlay))
        self.assertEqual(self.path(overlay), later.exports()[active])
        self.assertEqual(b'old', self.read(uri, 3))

    def test_overlay_left_by_a_crash_is_never_served_without_its_base(
        self
    ) -> None:
        self.qcow2('a')
        self.write(self.blockd.export('one', self.chain('a'), True), b'old')
        self.overlay('b', 'a')
        self.node.what, self.node.before = 'qmp blockdev-snapshot', True
        with contextlib.suppress(errors.Unknown), self._refusal_is_lost():
            self.blockd.snapshot(self.path('a'), self.path('b'))
        self.assertTrue(self.blockd.is_open(self.path('b')))
        self.blockd.unexport('one')
        uri = self.blockd.export('one', self.chain('b', 'a'), True)
        self.assertEqual(b'old', self.read(uri, 3))

    @contextlib.contextmanager
    def _refusal_is_lost(self) -> Iterator[None]:
        """Nothing of ours runs after the refusal, as in a crash."""
        act = self.node.act

        class Crash(BaseException):
            pass

        def dying(what: str, effect: Callable[[], T]) -> T:
            if what == 'qmp blockdev-snapshot':
                raise Crash
            return act(what, effect)

        self.node.act = dying  # type: ignore[method-assign]
        try:
            with contextlib.suppress(Crash):
                yield
        finally:
            del self.node.act  # type: ignore[method-assign]

    def test_overlay_of_another_size_or_base_is_refused(self) -> None:
        self.qcow2('a')
        self.qcow2('other')
        uri = self.blockd.export('one', self.chain('a'), True)
        run('qemu-img', 'create', '-q', '-u', '-f', 'qcow2', '-b',
            self.path('a'), '-F', 'qcow2', self.path('large'), '16M')
        for bad in self.path('large'), self.overlay('b', 'other'):
            with self.assertRaises(errors.Invalid):
                self.blockd.snapshot(self.path('a'), bad)
            self.assertFalse(self.blockd.is_open(bad))
        self.write(uri, b'x')
        self.assertEqual({'one': self.path('a')}, self.blockd.exports())

    def test_snapshot_of_what_is_not_open_is_not_found(self) -> None:
        self.qcow2('a')
        self.overlay('b', 'a')
        for _ in range(2):
            with self.assertRaises(errors.NotFound):
                self.blockd.snapshot(self.path('a'), self.path('b'))
            self.blockd.ensure()

    def test_second_overlay_on_a_layer_is_a_conflict(self) -> None:
        self.qcow2('a')
        self.blockd.export('one', self.chain('a'), True)
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        with self.assertRaises(errors.Conflict):
            self.blockd.snapshot(self.path('a'), self.overlay('c', 'a'))


class DaemonTest(BlockdCase):
    def test_first_start_is_news_and_told_once(self) -> None:
        self.assertTrue(self.blockd.ensure())
        self.assertFalse(self.blockd.ensure())

    def test_restarted_service_adopts_the_daemon_and_its_exports(
        self
    ) -> None:
        self.qcow2('a')
        self.blockd.ensure()
        uri = self.blockd.export('one', self.chain('a'), True)
        client = self.client(uri)
        later = Blockd(Node(self.root), self.directory)
        self.assertFalse(later.ensure())
        self.assertEqual({'one': self.path('a')}, later.exports())
        self.assertTrue(later.is_open(self.path('a')))
        self.assertEqual(uri, later.export('one', self.chain('a'), True))
        client.pread_into(bytearray(1), 0)
        later.unexport('one')
        self.assertEqual({}, self.blockd.exports())

    def test_killed_daemon_is_started_again_and_names_come_back(
        self
    ) -> None:
        self.qcow2('base')
        self.qcow2('a', below='base')
        chain = self.chain('a', 'base')
        self.blockd.ensure()
        uri = self.blockd.export('one', chain, True)
        self.write(uri, b'flushed')
        first = self.pid()
        self.kill()
        self.assertEqual({}, self.blockd.exports())
        self.assertFalse(self.blockd.is_open(self.path('a')))
        self.blockd.unexport('one')
        self.assertTrue(self.blockd.ensure())
        self.assertNotEqual(first, self.pid())
        self.assertEqual(uri, self.blockd.export('one', chain, True))
        self.assertEqual(b'flushed', self.read(uri, 7))

    def test_start_by_an_export_is_still_told_to_whoever_restores(
        self
    ) -> None:
        self.raw('a')
        self.blockd.ensure()
        self.kill()
        self.blockd.export('one', self.plain('a'), True)
        self.assertTrue(self.blockd.ensure())
        self.assertEqual({'one': self.path('a')}, self.blockd.exports())

    def test_lost_reply_to_the_start_is_mended_by_adopting(self) -> None:
        for before in True, False:
            self.node.what = 'start qemu-storage-daemon'
            self.node.before = before
            with self.assertRaises(errors.VolumeError):
                self.blockd.ensure()
            self.assertTrue(self.blockd.ensure())
            self.blockd.stop()

    def test_daemon_has_a_session_of_its_own_and_many_files(self) -> None:
        self.blockd.ensure()
        pid = self.pid()
        self.assertEqual(pid, os.getsid(pid))
        soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        self.assertGreaterEqual(soft, 4096)

    def test_too_low_limit_of_files_is_raised_when_it_is_found(self) -> None:
        self.blockd.ensure()
        _, hard = resource.prlimit(self.pid(), resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid(), resource.RLIMIT_NOFILE, (1024, hard))
        self.blockd.ensure()
        soft, _ = resource.prlimit(self.pid(), resource.RLIMIT_NOFILE)
        self.assertGreaterEqual(soft, 4096)

    def test_daemon_inherits_no_lock_of_its_starter(self) -> None:
        with self.node.hold(exclusive=['volume']):
            self.blockd.ensure()
        names = {
            os.readlink(f'/proc/{self.pid()}/fd/{fd}')
            for fd in os.listdir(f'/proc/{self.pid()}/fd')
        }
        self.assertNotIn(self.path('locks/volume'), names)

    def test_starting_at_once_starts_one(self) -> None:
        others = [Blockd(Node(self.root), self.directory) for _ in range(6)]
        with ThreadPoolExecutor(6) as threads:
            news = list(threads.map(lambda each: each.ensure(), others))
        self.assertEqual(1, sum(news))

    def test_directory_is_for_its_owner_alone(self) -> None:
        os.mkdir(self.directory, 0o755)
        self.blockd.ensure()
        self.assertEqual(0o700, os.stat(self.directory).st_mode & 0o777)

    def test_stop_ends_it_and_may_be_repeated(self) -> None:
        self.blockd.stop()
        self.blockd.ensure()
        pid = self.pid()
        Blockd(Node(self.root), self.directory).stop()
        self.blockd.stop()
        with self.assertRaises(ProcessLookupError):
            os.kill(pid, 0)

    def test_stop_never_ends_a_process_that_got_the_pid_later(self) -> None:
        self.blockd.ensure()
        self.blockd.stop()
        with subprocess.Popen(['sleep', '60']) as bystander:
            try:
                record = {
                    'address': os.path.join(self.directory, 'nbd'),
                    'pid': bystander.pid, 'start': 1,
                }
                with open(
                    os.path.join(self.directory, 'daemon.json'), 'w'
                ) as f:
                    json.dump(record, f)
                self.blockd.stop()
                self.assertIsNone(bystander.poll())
                self.assertTrue(self.blockd.ensure())
            finally:
                bystander.kill()

    def test_stopped_daemon_is_ended_all_the_same(self) -> None:
        self.blockd.ensure()
        os.kill(self.pid(), signal.SIGSTOP)
        self.blockd.stop()
        self.assertTrue(self.blockd.ensure())

    def test_daemon_without_its_sockets_is_not_taken_for_dead(self) -> None:
        self.blockd.ensure()
        for path in qmp.paths(self.directory):
            os.unlink(path)
        for call in (
            self.blockd.ensure, self.blockd.exports,
            self.blockd.open_files, lambda: self.blockd.unexport('x'),
        ):
            with self.assertRaises(errors.Unavailable):
                call()

    def test_lost_record_is_written_again(self) -> None:
        self.blockd.ensure()
        pid = self.pid()
        os.unlink(os.path.join(self.directory, 'daemon.json'))
        self.assertFalse(self.blockd.ensure())
        self.assertEqual(pid, self.pid())

    def test_taken_monitors_are_passed_over(self) -> None:
        self.raw('a')
        self.blockd.ensure()
        with contextlib.ExitStack() as stack:
            for _ in range(qmp.MONITORS - 1):
                stack.enter_context(
                    qmp.conversation(self.node, self.directory)
                )
            self.blockd.export('one', self.plain('a'), True)

    def test_stranger_on_a_monitor_blocks_nobody(self) -> None:
        self.blockd.ensure()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(qmp.paths(self.directory)[0])
            stranger.recv(100)
            self.assertEqual({}, self.blockd.exports())

    def test_why_it_does_not_start_is_said(self) -> None:
        os.makedirs(os.path.join(self.directory, 'nbd'), 0o700)
        with self.assertRaisesRegex(errors.Unavailable, 'nbd'):
            self.blockd.ensure()

    def test_path_too_long_for_a_socket_is_refused_with_the_reason(
        self
    ) -> None:
        long = os.path.join(self.root, 'x' * 100)
        with self.assertRaisesRegex(errors.Invalid, '107'):
            Blockd(self.node, long).ensure()

    def test_path_with_a_comma_and_a_blank_works(self) -> None:
        odd = Blockd(self.node, self.path('a,b c'))
        self.addCleanup(odd.stop)
        self.raw('a', b'x')
        self.assertEqual(
            b'x', self.read(odd.export('one', self.plain('a'), False), 1)
        )

    def test_tcp_serves_on_loopback(self) -> None:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        tcp = Blockd(self.node, self.path('t'), tcp=f'127.0.0.1:{port}')
        self.addCleanup(tcp.stop)
        self.raw('a', b'x')
        uri = tcp.export('one', self.plain('a'), False)
        self.assertEqual(f'nbd://127.0.0.1:{port}/one', uri)
        self.assertEqual(b'x', self.copied(uri)[:1])
        # One address a daemon: another wish is not silently ignored.
        with self.assertRaises(errors.Unavailable):
            Blockd(self.node, self.path('t')).ensure()

    def test_tcp_on_anything_but_loopback_is_refused(self) -> None:
        for tcp in (
            '0.0.0.0:10809', '192.0.2.1:10809', 'localhost:1', '127.0.0.1',
            '127.0.0.1:0', '127.0.0.1:99999', '[::]:1', '::1:80', '',
        ):
            with self.subTest(tcp), self.assertRaises(errors.Invalid):
                Blockd(self.node, self.directory, tcp=tcp)


class PrivateTest(BlockdCase):
    def test_writer_fills_and_reader_reads_a_chain(self) -> None:
        self.qcow2('base')
        self.qcow2('a', below='base')
        chain = self.chain('a', 'base')
        data = os.urandom(MIB)
        with generic.nbd_writer(self.node, self.chain('base')) as writer:
            self.assertEqual(SIZE, writer.size_bytes)
            writer.seek(2 * MIB)
            writer.write(data)
            writer.commit()
        with generic.nbd_writer(self.node, chain) as writer:
            writer.zero(2 * MIB, 4096)
            writer.seek(0)
            writer.write(b'top')
            writer.commit()
        with generic.nbd_reader(self.node, chain) as reader:
            found = reader.read()
            runs = [(e.offset_bytes, e.length_bytes, e.is_zero)
                    for e in reader.extents()]
            self.assertEqual(b'', reader.read(1))
        whole = b'top' + bytes(2 * MIB - 3) + bytes(4096) + data[4096:]
        self.assertEqual(whole + bytes(SIZE - len(whole)), found)
        self.assertEqual(SIZE, sum(length for _, length, _ in runs))
        self.assertEqual((3 * MIB, 5 * MIB, True), runs[-1])
        self.assertEqual(frozenset(), self.blockd.open_files())

    def test_each_write_is_an_act_and_a_lost_one_is_never_committed(
        self
    ) -> None:
        self.qcow2('a')
        for what, call in (
            ('nbd write', lambda w: w.write(b'x')),
            ('nbd zero', lambda w: w.zero(0, 10)),
            ('nbd flush', lambda w: w.commit()),
        ):
            with self.subTest(what), generic.nbd_writer(
                self.node, self.chain('a')
            ) as writer:
                self.node.what, self.node.before = what, False
                with self.assertRaises(errors.Unknown):
                    call(writer)
                with self.assertRaises(errors.Unknown):
                    writer.commit()

    def test_writing_past_the_end_is_refused(self) -> None:
        self.qcow2('a')
        with generic.nbd_writer(self.node, self.chain('a')) as writer:
            writer.seek(SIZE - 1)
            with self.assertRaises(errors.Invalid):
                writer.write(b'xx')
            with self.assertRaises(errors.Invalid):
                writer.zero(SIZE, 1)

    def test_reader_of_a_snapshot_does_not_disturb_the_volume(self) -> None:
        self.qcow2('a')
        uri = self.blockd.export('one', self.chain('a'), True)
        self.write(uri, b'old')
        overlay = self.path('b')
        run('qemu-img', 'create', '-q', '-u', '-f', 'qcow2', '-b',
            self.path('a'), '-F', 'qcow2', overlay, str(SIZE))
        self.blockd.snapshot(self.path('a'), overlay)
        self.write(uri, b'new')
        with generic.nbd_reader(self.node, self.chain('a')) as reader:
            self.assertEqual(b'old', reader.read(3))
        self.assertEqual(b'new', self.read(uri, 3))

    def test_ending_survives_one_refusal(self) -> None:
        self.qcow2('a')
        with generic.nbd_reader(self.node, self.chain('a')):
            self.node.what, self.node.before = 'qmp connect', True
        self.assertEqual(frozenset(), self.blockd.open_files())

    def test_what_a_dead_service_left_is_ended_and_nothing_else(
        self
    ) -> None:
        for name in 'a', 'b', 'c', 'd':
            self.qcow2(name)
        self.blockd.export('p-dead', self.chain('a'), False)
        self.blockd.export('one', self.chain('b'), True)
        self.node.what, self.node.before = 'qmp block-export-add', True
        with self.assertRaises(errors.Unavailable):
            self.blockd.export('two', self.chain('d'), True)
        with generic.nbd_reader(self.node, self.chain('c')) as reader:
            self.blockd.end_private()
            self.assertEqual(bytes(3), reader.read(3))
            self.assertEqual(2, len(self.blockd.exports()))
        self.assertEqual({'one': self.path('b')}, self.blockd.exports())
        self.assertEqual({self.path('b')}, self.blockd.open_files())

    def test_node_without_a_daemon_says_so(self) -> None:
        with self.assertRaises(errors.Unavailable):
            with generic.nbd_reader(Node(self.root), self.plain('a')):
                pass


class BlockNodeTest(unittest.TestCase):
    def file(self, name: str = '/v/a') -> dict[str, Any]:
        return {'driver': 'file', 'filename': name}

    def test_block_nodes_that_leave_something_to_guess_are_refused(
        self
    ) -> None:
        bad: list[Any] = [
            {}, {'file': self.file()}, {'driver': 'raw', 'file': {}},
            {'driver': 'qcow2', 'file': self.file()},
            {'driver': 'raw', 'file': self.file('a')},
            {'driver': 'raw', 'file': self.file('/a\0b')},
            {'driver': 'raw', 'file': 'node'},
            {'driver': 'raw', 'file': {**self.file(), 'locking': 'off'}},
            {'driver': 'raw', 'file': self.file(), 'force-share': True},
            {'driver': 'raw', 'file': self.file(), 'backing': self.file()},
            {'driver': 'qcow2', 'file': self.file(), 'backing': 'x'},
            {'driver': 'raw', 'file': {'driver': 'raw',
                                       'file': self.file()}},
            None, 'raw',
        ]
        for node in bad:
            with self.subTest(node), self.assertRaises(errors.Invalid):
                blockgraph.parse(node)

    def test_names_fit_qemu_and_differ_by_what_they_mean(self) -> None:
        base = {'driver': 'qcow2', 'file': self.file('/v/b'),
                'backing': None}
        layers = [blockgraph.parse(node) for node in (
            base,
            {'driver': 'raw', 'file': self.file('/v/b')},
            {'driver': 'qcow2', 'file': self.file(), 'backing': base},
            {'driver': 'qcow2', 'file': self.file(), 'backing': None},
        )]
        names = [n for la in layers for n in (la.name, la.name_below)]
        self.assertEqual(len(names), len(set(names)))
        self.assertTrue(all(len(name) <= 31 for name in names))

    def test_endless_chain_is_refused(self) -> None:
        node: dict[str, Any] = {
            'driver': 'qcow2', 'file': self.file(), 'backing': None
        }
        node['backing'] = node
        with self.assertRaises(errors.Invalid):
            blockgraph.parse(node)

    def test_header_of_nonsense_is_an_error_of_ours(self) -> None:
        layer = blockgraph.parse(
            {'driver': 'qcow2', 'file': self.file(), 'backing': None}
        )
        far = struct.pack('>4sIQI', b'QFI\xfb', 3, 1 << 60, 0xFFFFFFFF)
        near = struct.pack('>4sIQI', b'QFI\xfb', 3, 20, 1023) + b'\xff\0' * 99
        for head in far, near, near[:30]:
            with self.assertRaises(errors.Corrupt):
                blockgraph.check_header(layer, head)


if __name__ == '__main__':
    unittest.main()
