# SPDX-License-Identifier: Apache-2.0
"""The copy engine: every byte, no more memory than said, and an end."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from typing import Any

from tests import images
from volume import errors
from volume.model import Extent
from volume.transfer import copy

SIZE = 5 * copy.CHUNK_BYTES + 12_345


class Disk:
    """A target in memory that knows what was asked of it."""

    def __init__(self, size: int, fill: bytes = b'\0') -> None:
        self.data = bytearray(fill * size)[:size]
        self.at = 0
        self.written = 0
        self.offsets: list[int] = []

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.at = offset
        return offset

    def write(self, data: Any, /) -> int:
        # Short writes are allowed to a raw file, so they must not hurt.
        part = bytes(data[:1 + len(data) // 2])
        self.data[self.at:self.at + len(part)] = part
        self.offsets.append(self.at)
        self.at += len(part)
        self.written += len(part)
        return len(part)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        self.offsets.append(offset_bytes)
        self.data[offset_bytes:offset_bytes + length_bytes] = bytes(
            length_bytes
        )


class Dribble(io.RawIOBase):
    """A source that gives what it likes, as sockets do."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.chance = random.Random(3)

    def readinto(self, buffer: Any, /) -> int:
        count = min(
            len(buffer), len(self.data), self.chance.randrange(1, 300_000)
        )
        buffer[:count] = self.data[:count]
        self.data = self.data[count:]
        return count


class Stuck(io.RawIOBase):
    """A source that waits until it is told to end."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def readinto(self, buffer: Any, /) -> int:
        self.ended.wait(30)
        raise errors.Unavailable('ended')

    def abort(self) -> None:
        self.ended.set()


def extents_of(data: bytes, block: int = 4096) -> Iterator[Extent]:
    for at in range(0, len(data), block):
        part = data[at:at + block]
        yield Extent(at, len(part), not any(part))


class Copying(unittest.TestCase):
    def setUp(self) -> None:
        self.data = images.disk(SIZE)

    def test_every_byte_arrives_in_a_new_target(self) -> None:
        for size in (1, 511, copy.ZERO_BYTES, copy.CHUNK_BYTES, SIZE):
            data = self.data[-size:]
            with self.subTest(size):
                target = Disk(size)
                copy.copy(io.BytesIO(data), target, size)
                self.assertEqual(data, bytes(target.data))

    def test_nothing_old_stays_where_the_source_is_zero(self) -> None:
        for extents in (None, list(extents_of(self.data))):
            with self.subTest(by_extents=extents is not None):
                target = Disk(SIZE, b'\xee')
                copy.copy(
                    io.BytesIO(self.data), target, SIZE, extents=extents,
                    zero=target.zero,
                )
                self.assertEqual(self.data, bytes(target.data))

    def test_zeros_are_not_written(self) -> None:
        data = bytearray(SIZE)
        data[copy.CHUNK_BYTES + 5] = 1
        target = Disk(SIZE)
        copy.copy(io.BytesIO(data), target, SIZE)
        self.assertEqual(copy.ZERO_BYTES, target.written)
        self.assertEqual(data, target.data)

    def test_offsets_only_ascend(self) -> None:
        target = Disk(SIZE, b'\xee')
        copy.copy(Dribble(self.data), target, SIZE, zero=target.zero)
        self.assertEqual(sorted(target.offsets), target.offsets)

    def test_a_source_that_dribbles_is_copied_whole(self) -> None:
        target = Disk(SIZE)
        copy.copy(Dribble(self.data), target, SIZE)
        self.assertEqual(self.data, bytes(target.data))

    def test_no_byte_beyond_the_size_is_touched(self) -> None:
        target = Disk(SIZE, b'\xee')
        copy.copy(
            io.BytesIO(self.data), target, SIZE - 1000, zero=target.zero
        )
        self.assertEqual(b'\xee' * 1000, bytes(target.data[-1000:]))

    def test_the_digest_is_of_all_bytes_zeros_too(self) -> None:
        for extents in (None, list(extents_of(self.data))):
            for name in copy.DIGESTS:
                with self.subTest(name, by_extents=extents is not None):
                    digest = copy.copy(
                        io.BytesIO(self.data), Disk(SIZE), SIZE,
                        extents=extents, algorithm=name,
                    )
                    expected = hashlib.new(name, self.data).hexdigest()
                    self.assertEqual(expected, digest)

    def test_no_buffer_is_used_again_before_it_is_hashed(self) -> None:
        # Reading is far quicker than hashing here.
        size = 4 * copy.CHUNKS * copy.CHUNK_BYTES
        data = random.Random(7).randbytes(size)
        target = io.BytesIO()
        digest = copy.copy(
            io.BytesIO(data), target, size, algorithm='sha512')
        self.assertEqual(hashlib.sha512(data).hexdigest(), digest)
        self.assertTrue(data == target.getvalue())

    def test_runs_known_to_be_zero_are_not_read(self) -> None:
        class Counted(io.BytesIO):
            read_bytes = 0

            def readinto(self, buffer: Any, /) -> int:
                count = super().readinto(buffer)
                self.read_bytes += count
                return count

        data = bytes(4 << 20) + b'x' * 4096
        source = Counted(data)
        runs = [Extent(0, 4 << 20, True), Extent(4 << 20, 4096, False)]
        target = Disk(len(data))
        copy.copy(source, target, len(data), extents=runs)
        self.assertEqual(4096, source.read_bytes)
        self.assertEqual(data, bytes(target.data))

    def test_a_source_that_ends_early_is_no_success(self) -> None:
        with self.assertRaisesRegex(errors.Corrupt, 'ended at byte'):
            copy.copy(io.BytesIO(self.data), Disk(SIZE + 1), SIZE + 1)

    def test_extents_with_a_gap_or_too_few_are_no_success(self) -> None:
        for runs in (
            [Extent(0, 10, False), Extent(20, SIZE - 20, False)],
            [Extent(0, SIZE - 1, True)],
            [],
        ):
            with self.subTest(runs), self.assertRaises(errors.Corrupt):
                copy.copy(
                    io.BytesIO(self.data), Disk(SIZE), SIZE, extents=runs
                )

    def test_what_the_system_refuses_is_told_as_ours(self) -> None:
        class Full(Disk):
            def write(self, data: Any, /) -> int:
                raise OSError(28, 'full')

        with self.assertRaises(errors.NoSpace):
            copy.copy(io.BytesIO(self.data), Full(SIZE), SIZE)

    def test_memory_is_bounded_however_slow_the_target(self) -> None:
        class Slow(Disk):
            ahead = 0

            def write(self, data: Any, /) -> int:
                # The reader gets all the time that it needs to go too far.
                deadline = time.monotonic() + 10
                while not self.written and time.monotonic() < deadline:
                    if source.tell() >= copy.CHUNKS * copy.CHUNK_BYTES:
                        time.sleep(0.05)
                        break
                    time.sleep(0.001)
                self.ahead = max(self.ahead, source.tell() - self.at)
                return super().write(data)

        size = 20 * copy.CHUNK_BYTES
        source, target = io.BytesIO(b'x' * size), Slow(size)
        copy.copy(source, target, size)
        self.assertEqual(b'x' * size, bytes(target.data))
        self.assertEqual(copy.CHUNKS * copy.CHUNK_BYTES, target.ahead)


class Ending(unittest.TestCase):
    def tearDown(self) -> None:
        left = [thread.name for thread in threading.enumerate()]
        self.assertNotIn('read ahead', left)

    def test_watch_ends_the_copy_by_what_it_raises(self) -> None:
        def watch(done: int, total: int) -> None:
            raise errors.Cancelled('enough')

        with self.assertRaises(errors.Cancelled):
            copy.copy(io.BytesIO(bytes(SIZE)), Disk(SIZE), SIZE, watch=watch)

    def test_a_source_that_waits_is_ended_too(self) -> None:
        calls = []

        def watch(done: int, total: int) -> None:
            calls.append((done, total))
            raise errors.Cancelled('enough')

        with self.assertRaises(errors.Cancelled):
            copy.copy(Stuck(), Disk(SIZE), SIZE, watch=watch)
        self.assertEqual([(0, SIZE)], calls)

    def test_watch_is_told_the_whole_at_the_end(self) -> None:
        seen: list[tuple[int, int]] = []
        copy.copy(
            io.BytesIO(bytes(SIZE)), Disk(SIZE), SIZE,
            watch=lambda done, total: seen.append((done, total)),
        )
        self.assertEqual((SIZE, SIZE), seen[-1])
        self.assertEqual(sorted(seen), seen)

    def test_a_rate_is_kept_and_watched_meanwhile(self) -> None:
        # Where a machine is no faster than the rate, there is no meanwhile.
        self.assertTrue(any(
            self.watched(duration_s) > 2 for duration_s in (0.5, 2.0, 8.0)
        ))

    def watched(self, duration_s: float) -> int:
        """Say how often a copy is watched that may not be faster."""
        seen: list[int] = []
        start = time.monotonic()
        copy.copy(
            io.BytesIO(b'x' * SIZE), Disk(SIZE), SIZE,
            rate_bytes_per_s=int(SIZE / duration_s),
            watch=lambda done, total: seen.append(done),
        )
        self.assertGreaterEqual(time.monotonic() - start, duration_s)
        return len(seen)


class Files(unittest.TestCase):
    def test_holes_of_a_file_are_told_and_nothing_else(self) -> None:
        with tempfile.TemporaryFile() as f:
            f.seek(3 << 20)
            f.write(b'x' * 100_000)
            f.truncate(9 << 20)
            f.flush()
            runs = list(copy.file_extents(f.fileno(), 9 << 20))
            at = 0
            for run in runs:
                self.assertEqual(at, run.offset_bytes)
                at += run.length_bytes
                f.seek(run.offset_bytes)
                if run.is_zero:
                    self.assertFalse(any(f.read(run.length_bytes)))
            self.assertEqual(9 << 20, at)


class Checksums(unittest.TestCase):
    def test_the_usual_ways_to_write_one(self) -> None:
        for name, length in copy.DIGESTS.items():
            digest = 'Ab' * (length // 2)
            expected = copy.Checksum(name, digest.lower())
            self.assertEqual(expected, copy.checksum(f'{name}:{digest}'))
            self.assertEqual(expected, copy.checksum(digest))
        self.assertIsNone(copy.checksum(None))

    def test_a_malformed_one_is_refused_not_forgotten(self) -> None:
        for text in ('sha256:', 'sha256:12', 'crc32:12345678', 'x' * 64,
                     'md5:' + 'a' * 40, 'a' * 41):
            with self.subTest(text), self.assertRaises(errors.Invalid):
                copy.checksum(text)
