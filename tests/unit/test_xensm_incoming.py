# SPDX-License-Identifier: Apache-2.0
"""A VDI is filled in one stream: what arrives, and what is refused."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import unittest
from collections.abc import Iterator, Sequence
from typing import Any

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers.xensm import incoming
from volume.drivers.xensm import samples
from volume.testing import fixtures
from volume.transfer import vhd_stream

MIB = model.MIB
SIZE = 16 * MIB


class Upload:
    """Takes a PUT into a disk in memory."""

    def __init__(self, vdi: Vdi, format: str, length: int) -> None:
        self.vdi, self.format, self.length = vdi, format, length
        self.data = bytearray()
        self.is_abandoned = False

    def send(self, view: memoryview) -> None:
        self.data += view
        if len(self.data) > self.length:
            raise errors.Unknown('more than was said')

    def finish(self) -> None:
        if len(self.data) != self.length:
            raise errors.Unknown('less than was said')
        if self.format == 'raw':
            self.vdi.disk[:] = self.data
        else:
            stream = vhd_stream.Stream(
                io.BytesIO(bytes(self.data)),  # type: ignore[arg-type]
                length_bytes=self.length,
            )
            for at, run in stream.runs():
                self.vdi.disk[at:at + len(run)] = run
        if self.vdi.loses is not None:
            self.vdi.disk[self.vdi.loses:] = bytes(
                SIZE - self.vdi.loses)

    def abandon(self) -> None:
        self.is_abandoned = True


class Reader(io.BytesIO, base.Reader):
    """A disk in memory."""

    def __init__(self, disk: bytes) -> None:
        super().__init__(disk)
        self.size_bytes = len(disk)
        self.disk = disk

    def extents(self) -> Iterator[model.Extent]:
        for at in range(0, self.size_bytes, MIB):
            yield model.Extent(at, MIB, not any(self.disk[at:at + MIB]))


class Vdi:
    """A VDI as its writer sees it."""

    name = 'volume x'
    size_bytes = SIZE

    def __init__(self, disk: bytes = b'', is_fresh: bool = True) -> None:
        self.disk = bytearray(disk.ljust(SIZE, b'\0'))
        self.is_fresh = is_fresh
        self.uploads: list[Upload] = []
        self.loses: int | None = None
        self.is_read_back = True

    def put(self, format: str, length_bytes: int) -> Upload:
        assert not self.is_fresh, 'it was not noted before the first byte'
        self.uploads.append(Upload(self, format, length_bytes))
        return self.uploads[-1]

    @contextlib.contextmanager
    def reader(self) -> Iterator[base.Reader]:
        yield Reader(bytes(self.disk))

    def prove(self, samples: samples.Samples) -> None:
        with self.reader() as reader:
            samples.check_places(reader.extents(), self.name)
            if self.is_read_back:
                samples.check(reader, self.name)

    def spoil(self) -> None:
        self.is_fresh = False


class IncomingTest(unittest.TestCase):
    def setUp(self) -> None:
        self.node = fixtures.make_node(self)
        self.chance = random.Random(7)

    def writer(self, vdi: Vdi) -> incoming.VdiWriter:
        return self.enterContext(
            contextlib.closing(incoming.VdiWriter(self.node, vdi)))

    def put(self, writer: base.Writer, at: int, data: bytes) -> None:
        writer.seek(at)
        self.assertEqual(len(data), writer.write(data))

    def test_new_volume_is_zero_in_the_gaps(self) -> None:
        for runs, formats in (
            ((), ['vhd']),
            ([model.Extent(0, SIZE, False)], ['raw']),
        ):
            self.fill_with_gaps(runs, formats)

    def fill_with_gaps(
        self, runs: Sequence[model.Extent], formats: list[str]
    ) -> None:
        vdi = Vdi()
        writer = self.writer(vdi)
        if runs:
            writer.expect(runs)
        data = self.chance.randbytes(3 * MIB)
        self.put(writer, 512, data)
        writer.zero(6 * MIB, MIB)
        self.put(writer, SIZE - 512, b'x' * 512)
        writer.commit()
        wanted = bytearray(SIZE)
        wanted[512:512 + len(data)] = data
        wanted[-512:] = b'x' * 512
        self.assertEqual(wanted, vdi.disk)
        self.assertEqual(formats, [u.format for u in vdi.uploads])

    def test_what_is_expected_to_be_empty_does_not_travel(self) -> None:
        vdi = Vdi()
        writer = self.writer(vdi)
        writer.expect([
            model.Extent(0, 4 * MIB, True),
            model.Extent(4 * MIB, 4 * MIB, False),
            model.Extent(8 * MIB, 8 * MIB, True),
        ])
        data = self.chance.randbytes(4 * MIB)
        self.put(writer, 4 * MIB, data)
        writer.commit()
        upload, = vdi.uploads
        self.assertEqual('vhd', upload.format)
        self.assertLess(upload.length, 4 * MIB + 10_000)
        self.assertEqual(bytes(4 * MIB) + data + bytes(8 * MIB), vdi.disk)

    def test_old_bytes_are_never_taken_for_empty(self) -> None:
        old = self.chance.randbytes(SIZE)
        vdi = Vdi(old, is_fresh=False)
        writer = self.writer(vdi)
        writer.expect([
            model.Extent(0, 8 * MIB, True),
            model.Extent(8 * MIB, 8 * MIB, False),
        ])
        writer.zero(0, 8 * MIB)
        self.put(writer, 8 * MIB, old[:8 * MIB])
        writer.commit()
        self.assertEqual(bytes(8 * MIB) + old[:8 * MIB], vdi.disk)
        self.assertEqual(['raw'], [u.format for u in vdi.uploads])

    def test_promise_that_is_broken_is_refused(self) -> None:
        vdi = Vdi(b'x' * SIZE, is_fresh=False)
        writer = self.writer(vdi)
        writer.expect([model.Extent(0, SIZE, False)])
        self.put(writer, 0, b'y' * 512)
        with self.assertRaises(errors.Invalid):
            self.put(writer, 4096, b'y' * 512)
        with self.assertRaises(errors.Unknown):
            writer.commit()
        writer.close()
        self.assertTrue(vdi.uploads[0].is_abandoned)

    def test_what_was_to_be_zero_cannot_come(self) -> None:
        writer = self.writer(Vdi())
        writer.expect([
            model.Extent(0, 2 * MIB, False),
            model.Extent(2 * MIB, 14 * MIB, True),
        ])
        self.put(writer, 0, b'x' * 512)
        with self.assertRaises(errors.Conflict):
            self.put(writer, 4 * MIB, b'x' * 512)

    def test_what_is_skipped_in_an_old_volume_stays(self) -> None:
        old = self.chance.randbytes(5 * MIB)
        vdi = Vdi(old, is_fresh=False)
        writer = self.writer(vdi)
        self.put(writer, 3 * MIB, b'new')
        self.put(writer, MIB, b'back')
        writer.zero(2 * MIB, 512)
        writer.commit()
        wanted = bytearray(old.ljust(SIZE, b'\0'))
        wanted[3 * MIB:3 * MIB + 3] = b'new'
        wanted[MIB:MIB + 4] = b'back'
        wanted[2 * MIB:2 * MIB + 512] = bytes(512)
        self.assertEqual(wanted, vdi.disk)
        self.assertEqual(
            [], os.listdir(os.path.join(self.node.state_dir, 'xensm')))

    def test_stream_has_no_way_back(self) -> None:
        writer = self.writer(Vdi())
        writer.expect([model.Extent(0, SIZE, False)])
        self.put(writer, MIB, b'x' * 512)
        with self.assertRaises(errors.Unsupported):
            self.put(writer, 0, b'x' * 512)
        with self.assertRaises(errors.Unknown):
            writer.commit()

    def test_bytes_that_the_server_has_lost_are_missed(self) -> None:
        for loses, is_read_back in (
            (0, True), (5 * MIB, True), (SIZE - 512, True),
            # Whole blocks are missed without reading a byte.
            (5 * MIB, False),
        ):
            vdi = Vdi()
            vdi.loses, vdi.is_read_back = loses, is_read_back
            writer = self.writer(vdi)
            for at in range(0, SIZE, MIB):
                self.put(writer, at, self.chance.randbytes(MIB))
            with self.assertRaises(errors.Corrupt):
                writer.commit()

    def test_nothing_written_is_nothing_sent(self) -> None:
        vdi = Vdi()
        self.writer(vdi).commit()
        self.assertTrue(vdi.is_fresh)
        self.assertEqual([], vdi.uploads)

    def test_what_is_not_committed_is_broken_off(self) -> None:
        vdi = Vdi()
        writer = self.writer(vdi)
        writer.expect([model.Extent(0, SIZE, False)])
        self.put(writer, 0, b'x' * 4096)
        writer.close()
        self.assertTrue(vdi.uploads[0].is_abandoned)
        self.assertFalse(vdi.is_fresh)


class SamplesTest(unittest.TestCase):
    def test_samples_are_few_and_spread_over_all(self) -> None:
        for size in 512, 10_000, MIB, 300 * MIB:
            found: Any = samples.Samples()
            piece = bytes(64 << 10)
            for at in range(0, size, len(piece)):
                found.note(at, memoryview(piece)[:min(len(piece), size - at)])
            kept = list(found)
            self.assertLessEqual(len(kept), samples.SAMPLES + 1)
            last = kept[-1]
            self.assertEqual(size, last[0] + len(last[1]))
            if size > MIB:
                gaps = [b[0] - a[0] for a, b in itertools.pairwise(kept)]
                self.assertLess(max(gaps), size // 3)


if __name__ == '__main__':
    unittest.main()
