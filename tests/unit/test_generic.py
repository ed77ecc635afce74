# SPDX-License-Identifier: Apache-2.0
"""Readers and writers of plain files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import unittest
from collections.abc import Callable
from typing import TypeVar

from volume import errors
from volume import progress
from volume.drivers import generic
from volume.node import Node

T = TypeVar('T')
MIB = 1 << 20
SIZE = 4 * MIB


class FailingNode(Node):
    """Answers one kind of call with an error of the system, always."""

    verb = ''
    number = 0

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.done: list[str] = []

    def act(self, what: str, effect: Callable[[], T]) -> T:
        self.done.append(what)
        if self.verb and what.startswith(self.verb):
            try:
                raise OSError(self.number, 'by the test')
            except OSError as cause:
                raise errors.Unknown(what) from cause
        return effect()


class FileTest(unittest.TestCase):
    def setUp(self) -> None:
        root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        self.addCleanup(shutil.rmtree, root)
        self.node = FailingNode(root)
        self.path = os.path.join(root, 'a')
        with open(self.path, 'wb') as f:
            f.truncate(SIZE)

    def bytes(self) -> bytes:
        with open(self.path, 'rb') as f:
            return f.read()

    def test_what_was_written_is_read(self) -> None:
        data = os.urandom(MIB)
        with generic.file_writer(self.node, self.path, SIZE) as writer:
            writer.seek(MIB)
            self.assertEqual(MIB, writer.write(data))
            self.assertEqual(2 * MIB, writer.tell())
            writer.commit()
        with generic.file_reader(self.node, self.path) as reader:
            self.assertEqual(SIZE, reader.size_bytes)
            self.assertEqual(
                bytes(MIB) + data + bytes(2 * MIB), reader.read()
            )
            reader.seek(-3, os.SEEK_END)
            buffer = bytearray(10)
            self.assertEqual(3, reader.readinto(buffer))
            self.assertEqual(0, reader.readinto(buffer))

    def test_extents_cover_the_file_and_zero_ones_hold_zeros(self) -> None:
        with open(self.path, 'r+b') as f:
            f.seek(MIB)
            f.write(b'x' * 65536)
        for size in SIZE, SIZE + 1, MIB:
            os.truncate(self.path, size)
            with generic.file_reader(self.node, self.path) as reader:
                at = 0
                for extent in reader.extents():
                    self.assertEqual(at, extent.offset_bytes)
                    self.assertGreater(extent.length_bytes, 0)
                    at += extent.length_bytes
                    if extent.is_zero:
                        reader.seek(extent.offset_bytes)
                        found = reader.read(extent.length_bytes)
                        self.assertEqual(bytes(extent.length_bytes), found)
                self.assertEqual(size, at)

    def test_empty_file_has_no_extents(self) -> None:
        os.truncate(self.path, 0)
        with generic.file_reader(self.node, self.path) as reader:
            self.assertEqual([], list(reader.extents()))

    def test_file_cut_while_it_is_read_is_corrupt(self) -> None:
        with generic.file_reader(self.node, self.path) as reader:
            os.truncate(self.path, 10)
            with self.assertRaises(errors.Corrupt):
                reader.read()

    def test_zero_clears_and_leaves_the_neighbours(self) -> None:
        with open(self.path, 'r+b') as f:
            f.write(b'x' * SIZE)
        with generic.file_writer(self.node, self.path, SIZE) as writer:
            writer.zero(3, 2 * MIB)
            writer.zero(SIZE, 0)
            writer.commit()
        self.assertEqual(
            b'xxx' + bytes(2 * MIB) + b'x' * (2 * MIB - 3), self.bytes()
        )

    def test_zero_that_fails_is_not_replaced_by_writing(self) -> None:
        self.node.verb, self.node.number = 'zero', errno.EIO
        with generic.file_writer(self.node, self.path, SIZE) as writer:
            with self.assertRaises(errors.Unknown):
                writer.zero(0, 10)
            with self.assertRaises(errors.Unknown):
                writer.commit()

    def test_a_whole_volume_is_zeroed_in_pieces_that_are_told_and_stopped(
        self,
    ) -> None:
        size = 5 * generic.ZERO_BYTES_MAX + 7
        os.truncate(self.path, size)
        told: list[tuple[int, int]] = []

        def watch(done_bytes: int, total_bytes: int) -> None:
            told.append((done_bytes, total_bytes))
            if requests == 1:
                raise errors.Cancelled('enough')

        for requests in 6, 1:
            self.node.done.clear()
            with generic.file_writer(self.node, self.path, size) as writer:
                with progress.watching(watch), contextlib.suppress(
                    errors.Cancelled
                ):
                    writer.zero(0, size)
            self.assertEqual(
                requests, sum('zero' in what for what in self.node.done))
            self.assertEqual((generic.ZERO_BYTES_MAX, size), told.pop(0))

    def test_the_pieces_cover_the_run_and_touch_nothing_beside_it(
        self
    ) -> None:
        piece, start = generic.ZERO_BYTES_MAX, MIB + 3
        length = 2 * piece + 5
        end = start + length
        inside = start, start + piece - 1, start + piece, end - 6, end - 1
        beside = start - 1, end, end + piece
        size = end + piece + 1
        os.truncate(self.path, size)
        with open(self.path, 'r+b') as f:
            for at in inside + beside:
                os.pwrite(f.fileno(), b'x', at)
            with generic.file_writer(self.node, self.path, size) as writer:
                writer.zero(start, length)
                writer.commit()
            self.assertEqual({
                **dict.fromkeys(inside, b'\0'), **dict.fromkeys(beside, b'x'),
            }, {at: os.pread(f.fileno(), 1, at) for at in inside + beside})

    def test_zeros_that_are_written_keep_to_the_rate(self) -> None:
        # What has to be freed costs nothing, whatever the rate.
        with progress.watching(None, 1):
            with generic.file_writer(self.node, self.path, SIZE) as writer:
                writer.zero(0, SIZE)
        waits = []

        def watch(done_bytes: int, total_bytes: int) -> None:
            waits.append(done_bytes)
            if len(waits) > 2:
                raise errors.Cancelled('enough')

        with generic.file_writer(self.node, '/dev/null', 0) as writer:
            writer.size_bytes = SIZE  # no holes: it has to be written
            with progress.watching(watch, 1), self.assertRaises(
                errors.Cancelled
            ):
                progress.tell(0, SIZE)
                writer.zero(0, SIZE)

    def test_after_a_failed_write_or_sync_nothing_is_committed(self) -> None:
        for verb, call in (
            ('write', lambda w: w.write(b'x')),
            ('sync', lambda w: w.commit()),
        ):
            with self.subTest(verb), generic.file_writer(
                self.node, self.path, SIZE
            ) as writer:
                self.node.verb = verb
                with self.assertRaises(errors.Unknown):
                    call(writer)
                self.node.verb = ''
                with self.assertRaises(errors.Unknown):
                    writer.commit()

    def test_nothing_is_written_beyond_the_end(self) -> None:
        with generic.file_writer(self.node, self.path, MIB) as writer:
            writer.seek(MIB - 1)
            for call in (
                lambda: writer.write(b'xx'), lambda: writer.zero(MIB, 1),
                lambda: writer.zero(-1, 1), lambda: writer.seek(-1),
            ):
                with self.assertRaises(errors.Invalid):
                    call()
        self.assertEqual(bytes(SIZE), self.bytes())

    def test_file_too_short_to_fill_is_refused(self) -> None:
        with self.assertRaises(errors.Invalid):
            with generic.file_writer(self.node, self.path, SIZE + 1):
                pass

    def test_absent_file_is_not_found(self) -> None:
        with self.assertRaises(errors.NotFound):
            with generic.file_reader(self.node, f'{self.path}.none'):
                pass
        with self.assertRaises(errors.NotFound):
            with generic.file_writer(self.node, f'{self.path}.none', 1):
                pass

    def test_absent_device_says_nothing_of_its_volume(self) -> None:
        path = f'{self.path}.none'
        for opened in (
            generic.file_reader(self.node, path, is_mapped=True),
            generic.file_writer(self.node, path, 1, is_mapped=True),
        ):
            with self.assertRaisesRegex(errors.Unavailable, path), opened:
                pass


if __name__ == '__main__':
    unittest.main()
