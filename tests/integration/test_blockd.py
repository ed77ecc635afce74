# SPDX-License-Identifier: Apache-2.0
"""Exports of the block daemon, for real, and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import unittest
from concurrent.futures import ThreadPoolExecutor

from tests.integration.blockd_case import BlockdCase
from tests.integration.blockd_case import MIB
from tests.integration.blockd_case import run
from tests.integration.blockd_case import SIZE
from volume import errors
from volume import progress
from volume.blockd import Blockd
from volume.drivers import generic
from volume.nbd import NbdClient
from volume.node import Node


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

    def test_zeros_are_made_in_pieces_that_are_told_and_stopped(
        self
    ) -> None:
        piece, start, told = generic.ZERO_BYTES_MAX, MIB, []
        length = 2 * piece + 512
        end = start + length
        inside = start, start + piece - 1, start + piece, end - 513, end - 1
        beside = start - 1, end
        path = self.raw('a')
        os.truncate(path, end + MIB)

        def watch(done_bytes: int, total_bytes: int) -> None:
            told.append((done_bytes, total_bytes))
            if requests == 1:
                raise errors.Cancelled('enough')

        with open(path, 'r+b') as f:
            for requests in 1, 3:
                for at in inside + beside:
                    os.pwrite(f.fileno(), b'x', at)
                self.node.seen.clear()
                with generic.nbd_writer(
                    self.node, self.plain('a')
                ) as writer, progress.watching(watch), contextlib.suppress(
                    errors.Cancelled
                ):
                    writer.zero(start, length)
                self.assertEqual(requests, self.node.seen.count('nbd zero'))
                self.assertEqual((piece, length), told.pop(0))
            self.assertEqual({
                **dict.fromkeys(inside, b'\0'), **dict.fromkeys(beside, b'x'),
            }, {at: os.pread(f.fileno(), 1, at) for at in inside + beside})

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

    def test_a_reader_whose_end_failed_keeps_nobody_out_for_long(
        self
    ) -> None:
        self.qcow2('a')
        self.qcow2('b')
        self.blockd.end_left()  # of a daemon that has none
        self.blockd.export('p-left', self.chain('a'), False)
        with generic.nbd_reader(self.node, self.chain('b')) as reader:
            self.blockd.end_left()
            self.assertEqual(bytes(3), reader.read(3))
            self.assertEqual(
                [self.path('b')], list(self.blockd.exports().values())
            )

    def test_node_without_a_daemon_says_so(self) -> None:
        with self.assertRaises(errors.Unavailable):
            with generic.nbd_reader(Node(self.root), self.plain('a')):
                pass


if __name__ == '__main__':
    unittest.main()
