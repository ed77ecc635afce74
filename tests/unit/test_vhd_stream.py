# SPDX-License-Identifier: Apache-2.0
"""A VHD that comes over a wire is taken whole and right, or refused."""

from __future__ import annotations

import io
import os
import random
import struct
import tempfile
import tracemalloc
import unittest
from typing import Any

from tests import images
from tests import vhds
from tests.integration import hostile_case
from tests.vhds import MIB
from tests.vhds import SECTOR
from volume import errors
from volume.transfer import vhd_stream
from volume.transfer import vhd_write

PARENT = '11111111-1111-4111-8111-111111111111'
OTHER = '22222222-2222-4222-8222-222222222222'
MEMORY_BYTES_MAX = 8 << 20
TABLE_BYTES_MAX = 64 << 20


def taken(
    source: Any, over: bytes = b'', **options: Any
) -> tuple[bytes, list[tuple[int, bytes]]]:
    """Return what a stream makes of a disk, and the runs that came."""
    stream = vhd_stream.Stream(source, **options)
    disk = bytearray(over.ljust(stream.size_bytes, b'\0'))
    runs = []
    for at, data in stream.runs():
        disk[at:at + len(data)] = data
        runs.append((at, bytes(data)))
    assert stream.facts is not None
    assert stream.size_bytes == len(disk)
    return bytes(disk), runs


class Taken(unittest.TestCase):
    def setUp(self) -> None:
        self.chance = random.Random(hostile_case.seed(self.id()))

    def test_what_qemu_wrote_is_the_disk(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            for size in (SECTOR, 7 * MIB + 5 * SECTOR):
                disk = images.disk(size, 3)
                for kind in ('vhd', 'vhd-fixed'):
                    path = images.make(
                        kind, os.path.join(directory, kind), disk)
                    with open(path, 'rb') as file:
                        data = file.read()
                    with self.subTest(kind=kind, size=size):
                        got, _ = taken(
                            vhds.Wire(data), length_bytes=len(data))
                        self.assertEqual(disk, got)

    def test_what_we_write_is_the_disk(self) -> None:
        disk = vhds.Model.random(9 * MIB + SECTOR, self.chance)
        for image in (
            vhd_write.Dynamic(
                disk.size_bytes, disk.extents(), uuid=PARENT),
            vhd_write.Fixed(disk.size_bytes, uuid=PARENT),
        ):
            data = b''.join(map(bytes, image.chunks(disk)))
            got, _ = taken(vhds.Wire(data), length_bytes=image.length_bytes)
            self.assertEqual(disk.part(0, disk.size_bytes), got)

    def test_blocks_may_come_in_any_order_and_pieces(self) -> None:
        """With rubbish between them, and in the sectors that are not set."""
        for block, count in ((2 * MIB, 3), (MIB // 2, 9), (4096, 40)):
            size = block * count - SECTOR
            disk = self.chance.randbytes(size)
            blocks = self.chance.sample(range(count), count - 2)
            if count - 1 not in blocks:
                blocks[-1] = count - 1
            unset = {
                self.chance.randrange(size // SECTOR) for _ in range(90)}
            data = vhds.craft(
                disk, blocks, block=block, unset=unset, gap=3,
                count=count + 5, is_short=blocks[-1] == count - 1)
            with self.subTest(block=block):
                wire = vhds.Wire(data, 1, 100_000)
                got, _ = taken(wire)
                self.assertEqual(vhds.naive(data), got)

    def test_which_blocks_will_come_is_known_first(self) -> None:
        disk = vhds.Model(9 * MIB, {2 * MIB: b'x', 6 * MIB - 1: b'yz'})
        image = vhd_write.Dynamic(
            disk.size_bytes, disk.extents(), uuid=PARENT)
        data = b''.join(map(bytes, image.chunks(disk)))
        for length, wanted in (
            (2048 + 512, [(0, 2, True), (2, 6, False), (8, 1, True)]),
            (len(data), [(0, 2, True), (2, 6, False), (8, 1, True)]),
        ):
            stream = vhd_stream.Stream(vhds.Wire(data[:length]))
            self.assertEqual(wanted, [
                (run.offset_bytes // MIB, run.length_bytes // MIB,
                 run.is_zero) for run in stream.blocks()
            ])

    def test_zeros_are_not_passed_on(self) -> None:
        disk = bytearray(4 * MIB)
        disk[MIB:MIB + 5] = b'hello'
        data = vhds.craft(bytes(disk), [1, 0])
        got, runs = taken(vhds.Wire(data))
        self.assertEqual(bytes(disk), got)
        self.assertEqual([(MIB, 1 << 16)], [(a, len(d)) for a, d in runs])
        fixed = bytes(disk) + vhds.footer(2, len(disk))
        got, runs = taken(vhds.Wire(fixed), length_bytes=len(fixed))
        self.assertEqual(bytes(disk), got)
        self.assertLessEqual(sum(len(d) for _, d in runs), 2 << 16)

    def test_changes_are_taken_over_their_parent_alone(self) -> None:
        """With the zeros that they have; without the parent, not at all."""
        below = self.chance.randbytes(4 * MIB)
        disk = bytes(SECTOR * 9) + self.chance.randbytes(4 * MIB - SECTOR * 9)
        data = vhds.craft(
            disk, [1, 0], kind=4, parent=PARENT, unset=range(5, 4000, 7))
        under = below + vhds.footer(2, len(below), uid=PARENT)
        got, _ = taken(vhds.Wire(data), below, parent_uuid=PARENT.upper())
        self.assertEqual(vhds.naive(data, under), got)
        self.assertFalse(any(got[:5 * SECTOR]))
        with self.assertRaisesRegex(errors.Invalid, f'parent {PARENT} is els'):
            taken(vhds.Wire(data))
        with self.assertRaisesRegex(errors.Invalid, f'not {OTHER}'):
            taken(vhds.Wire(data), parent_uuid=OTHER)
        whole = vhds.craft(disk, [1, 0])
        fixed = disk + vhds.footer(2, len(disk))
        for data in (whole, fixed):
            with self.assertRaisesRegex(errors.Invalid, 'has no parent'):
                taken(vhds.Wire(data), parent_uuid=PARENT,
                      length_bytes=len(data))

    def test_what_is_cut_off_is_refused(self) -> None:
        """Wherever; whether or not its length was told."""
        disk = self.chance.randbytes(40 * 4096)
        whole = vhds.craft(disk, range(0, 40, 3), block=4096)
        fixed = disk + vhds.footer(2, len(disk))
        ends = {*range(0, 4096, 61), *range(len(whole) - 600, len(whole), 7)}
        ends |= {self.chance.randrange(len(whole)) for _ in range(60)}
        for end in ends:
            for told in (None, len(whole), end):
                with self.subTest(end=end, told=told):
                    with self.assertRaises(errors.Invalid):
                        taken(vhds.Wire(whole[:end]), length_bytes=told)
            with self.assertRaises(errors.Invalid):
                taken(vhds.Wire(fixed[:end]), length_bytes=len(fixed))

    def test_what_is_longer_than_told_is_refused(self) -> None:
        disk = self.chance.randbytes(8192)
        whole = vhds.craft(disk, [0, 1], block=4096)
        fixed = disk + vhds.footer(2, len(disk))
        for data in (whole, fixed):
            for extra in (b'x', bytes(SECTOR), data[-SECTOR:]):
                with self.assertRaises(errors.Invalid):
                    taken(vhds.Wire(data + extra), length_bytes=len(data))
            taken(vhds.Wire(data), length_bytes=len(data))

    def test_a_fixed_one_needs_its_length(self) -> None:
        data = bytes(MIB) + vhds.footer(2, MIB)
        with self.assertRaisesRegex(errors.Invalid, 'its length is told'):
            taken(vhds.Wire(data))
        for kind, size in ((2, MIB - SECTOR), (2, MIB + SECTOR), (3, MIB)):
            data = bytes(MIB) + vhds.footer(kind, size)
            with self.assertRaises(errors.Invalid):
                taken(vhds.Wire(data), length_bytes=len(data))

    def test_what_never_ends_is_refused_in_little_memory(self) -> None:
        cases = {
            'nothing after a huge table': vhds.footer(3, 2 << 30)
            + vhds.header(1 << 22, 512),
            'endless slack': vhds.craft(bytes(8192), [0], block=4096),
            'a header far away': vhds.footer(3, MIB, header_at=1 << 60),
            'a table far away': vhds.footer(3, MIB)
            + vhds.header(1, 2 * MIB, table_at=1 << 50),
        }
        for name, data in cases.items():
            for endless in (False, True):
                if not endless and name == 'endless slack':
                    continue
                for told in (None, len(data) + 2 * MIB):
                    wire = Endless(data) if endless else vhds.Wire(data)
                    tracemalloc.start()
                    try:
                        with self.subTest(name, endless=endless, told=told):
                            with self.assertRaises(errors.Invalid):
                                stream = vhd_stream.Stream(
                                    wire, length_bytes=told)
                                for _ in stream.runs():
                                    pass
                        _, peak = tracemalloc.get_traced_memory()
                    finally:
                        tracemalloc.stop()
                    # A table of the largest size came, and was sorted.
                    came = endless and 'huge' in name
                    self.assertLess(
                        peak, TABLE_BYTES_MAX if came else MEMORY_BYTES_MAX)

    def test_a_head_that_lies_is_refused(self) -> None:
        size, count = 10 * 4096, 10
        good = vhds.craft(bytes(size), [2, 1], block=4096)
        table_at = 1536
        taken(vhds.Wire(good))

        def with_entries(*entries: int) -> bytes:
            table = struct.pack(f'>{len(entries)}I', *entries)
            return good[:table_at] + table + good[table_at + len(table):]

        def with_head(**options: Any) -> bytes:
            made = {'count': count, 'block': 4096, **options}
            return good[:512] + vhds.header(**made) + good[1536:]

        unused, first = 0xFFFFFFFF, 4
        for expected, data in (
            ('over each other', with_entries(unused, first, first)),
            ('over each other', with_entries(unused, first, first + 8)),
            ('over itself or the header', with_entries(0)),
            ('over itself or the header', with_entries(1)),
            ('over itself or the header', with_entries(3)),
            ('far away|cut off', with_entries(0xFFFFFFFE)),
            ('cut off', with_entries(1000)),
            ('blocks of 3584', with_head(block=3584)),
            ('blocks of 0', with_head(block=0)),
            ('blocks of 256', with_head(block=256)),
            ('smaller than its disk', with_head(count=9)),
            ('4194305 entries', with_head(count=(1 << 22) + 1)),
            ('over each other|too early', with_head(table_at=1024)),
            ('comes too early', with_head(table_at=0)),
            ('version', with_head(version=0x20000)),
            ('comes too early',
             vhds.footer(3, size, header_at=0) + good[512:]),
            ('version', vhds.footer(3, size, version=0x20000) + good[512:]),
            ('type 5', vhds.footer(5, size) + good[512:]),
            ('type 0', vhds.footer(0, size) + good[512:]),
            ('begins with a footer', vhds.footer(2, size) + good[512:]),
            ('no disk has', vhds.footer(3, size + 1) + good[512:]),
            ('no disk has', vhds.footer(3, 0) + good[512:]),
            ('no disk has', vhds.footer(3, 2041 << 30) + good[512:]),
            ('differs', good[:-512] + vhds.footer(3, size - 512)),
            ('differs', good[:-512] + vhds.footer(3, size, uid=OTHER)),
            ('differs', good[:-512] + vhds.footer(4, size)),
            ('no footer|cut off', good[:-512]),
            ('no whole sectors', good + b'x'),
            ('not begin as a vhd', images.qcow2()[:4096]),
        ):
            for told in (None, len(data)):
                if told is None and expected == 'no whole sectors':
                    continue
                with self.subTest(expected, told=told):
                    if expected == 'not begin as a vhd' and told:
                        expected = 'no footer'
                    with self.assertRaisesRegex(errors.Invalid, expected):
                        taken(vhds.Wire(data), length_bytes=told)


class Endless(io.RawIOBase):
    """Zeros without end behind something."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        count = self._file.readinto(view)
        view[count:] = bytes(len(view) - count)
        return len(view)


if __name__ == '__main__':
    unittest.main()
