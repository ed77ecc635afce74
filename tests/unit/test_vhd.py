# SPDX-License-Identifier: Apache-2.0
"""The disk in a VHD and its parents is read right, or refused."""

from __future__ import annotations

import io
import itertools
import os
import random
import struct
import tempfile
import tracemalloc
import unittest
from collections.abc import Callable
from typing import Any

from tests import images
from tests import vhds
from tests.integration import hostile_case
from tests.vhds import MIB
from tests.vhds import SECTOR
from volume import errors
from volume.transfer import vhd
from volume.transfer import vhd_layout
from volume.transfer import vhd_stream

IDS = [f'{n}{n}{n}{n}{n}{n}{n}{n}-0000-4000-8000-000000000000'
       for n in range(6)]
MEMORY_BYTES_MAX = 6 << 20
# Which of the bits of a byte is turned, of all bytes of all metadata.
ROUNDS = 8 if os.environ.get('VOLUME_PROOF') else 1


def disk_of(*chain: bytes, **options: Any) -> vhd.Disk:
    return vhd.Disk([io.BytesIO(data) for data in chain], **options)


class Disks(unittest.TestCase):
    def setUp(self) -> None:
        self.chance = random.Random(hostile_case.seed(self.id()))

    def chain(self, depth: int, size: int = 5 * MIB) -> list[bytes]:
        """Return files of odd blocks, holes and rubbish; the leaf first."""
        files: list[bytes] = []
        for level in range(depth):
            size += self.chance.choice((0, MIB, -MIB))
            block = self.chance.choice((4096, MIB // 2, 2 * MIB))
            count = -(-size // block)
            files.insert(0, vhds.craft(
                self.chance.randbytes(size),
                self.chance.sample(range(count), -(-count // 3)),
                block=block, kind=4 if level else 3, uid=IDS[level],
                stamp=level, parent=IDS[level - 1] if level else '',
                parent_stamp=max(0, level - 1),
                gap=self.chance.randrange(3),
                unset=self.chance.sample(range(size // SECTOR), 900),
            ))
        return files

    def test_any_part_is_read_as_it_is(self) -> None:
        for depth in range(1, 6):
            files = self.chain(depth)
            expected = vhds.naive(*files)
            disk = disk_of(*files)
            self.assertEqual(len(expected), disk.size_bytes)
            for _ in range(60):
                at = self.chance.randrange(len(expected) + 10)
                length = self.chance.choice((1, 511, 4097, 70_000, 3 * MIB))
                disk.seek(at)
                with self.subTest(depth=depth, at=at, length=length):
                    self.assertEqual(
                        expected[at:at + length], disk.read(length))
            disk.seek(0)
            self.assertEqual(expected, disk.read())
            self.assertEqual(b'', disk.read(1))
            self.assertEqual(len(expected) - 5, disk.seek(-5, os.SEEK_END))
            self.assertEqual(len(expected) - 2, disk.seek(3, os.SEEK_CUR))

    def test_extents_cover_the_disk_and_zero_runs_are_zero(self) -> None:
        for depth in range(1, 6):
            files = self.chain(depth)
            expected = vhds.naive(*files)
            at, kinds = 0, []
            for run in disk_of(*files).extents():
                self.assertEqual(at, run.offset_bytes)
                self.assertGreater(run.length_bytes, 0)
                end = at + run.length_bytes
                if run.is_zero:
                    self.assertFalse(any(expected[at:end]))
                else:
                    # Random bytes: each sector was written.
                    for sector in range(at, end, SECTOR):
                        self.assertTrue(any(expected[sector:][:SECTOR]))
                kinds.append(run.is_zero)
                at = end
            self.assertEqual(len(expected), at)
            self.assertGreater(len(kinds), 3)
            self.assertTrue(all(a != b for a, b in itertools.pairwise(kinds)))

    def test_a_huge_empty_disk_is_one_run(self) -> None:
        size = 2040 << 30
        data = vhds.footer(3, size) + vhds.header(
            size // (2 * MIB), 2 * MIB
        ) + b'\xff' * (size // (2 * MIB) * 4) + vhds.footer(3, size)
        (run,) = disk_of(data).extents()
        self.assertEqual((0, size, True), (
            run.offset_bytes, run.length_bytes, run.is_zero))

    def test_what_qemu_wrote_is_the_disk(self) -> None:
        disk = images.disk(7 * MIB + 5 * SECTOR, 4)
        with tempfile.TemporaryDirectory() as directory:
            for kind in ('vhd', 'vhd-fixed'):
                path = images.make(kind, os.path.join(directory, kind), disk)
                with open(path, 'rb') as file:
                    self.assertEqual(disk, vhd.Disk([file]).read())

    def test_a_fixed_vhd_may_be_the_last_parent(self) -> None:
        below = self.chance.randbytes(MIB)
        under = below + vhds.footer(2, MIB, uid=IDS[0], stamp=7)
        over = vhds.craft(
            bytes(2 * MIB), [0], block=MIB, kind=4, uid=IDS[1],
            parent=IDS[0], parent_stamp=7, unset=range(100, 200))
        expected = vhds.naive(over, under)
        self.assertEqual(expected, disk_of(over, under).read())
        self.assertEqual(
            below[100 * SECTOR:200 * SECTOR],
            expected[100 * SECTOR:200 * SECTOR],
        )

    def test_files_that_are_no_chain_are_refused(self) -> None:
        def made(level: int, above: int | None, stamp: int = 0) -> bytes:
            return vhds.craft(
                bytes(MIB), [0], block=MIB, kind=3 if above is None else 4,
                uid=IDS[level], parent='' if above is None else IDS[above],
                parent_stamp=stamp,
            )

        base, child, leaf = made(0, None), made(1, 0), made(2, 1)
        disk_of(leaf, child, base)
        stale = made(1, 0, stamp=5)
        disk_of(stale, base, are_times_kept=False)
        self.assertEqual(IDS[0], disk_of(base).facts.footer.uuid)
        for expected, files in (
            ('parent is elsewhere', (child,)),
            ('parent is elsewhere', (leaf, child)),
            (f'is the vhd {IDS[1]}, not {IDS[0]}', (leaf, base)),
            ('has no parent, but one is given', (base, base)),
            ('has no parent, but one is given', (child, base, base)),
            ('changed since', (stale, base)),
            ('comes back', (made(1, 2), leaf, child, base)),
            ('comes back', (made(1, 1), made(1, 0), base)),
            ('a chain of 0', ()),
            ('a chain of 65', (child,) * 64 + (base,)),
        ):
            with self.assertRaisesRegex(errors.Invalid, expected):
                disk_of(*files)

    def test_a_file_that_lies_is_refused(self) -> None:
        size = 10 * 4096
        good = vhds.craft(bytes(size), [2, 1], block=4096)
        fixed = bytes(size) + vhds.footer(2, size)
        end = (len(good) - 512) // 512

        def with_entries(*entries: int) -> bytes:
            table = struct.pack(f'>{len(entries)}I', *entries)
            return good[:1536] + table + good[1536 + len(table):]

        def with_head(header_at: int = 512, **options: Any) -> bytes:
            made = {'count': 10, 'block': 4096, **options}
            foot = vhds.footer(3, size, header_at=header_at)
            return foot + vhds.header(**made) + good[1536:-512] + foot

        unused = 0xFFFFFFFF
        self.assertEqual(bytes(size), disk_of(with_head()).read())
        # The last block that fits.
        disk_of(with_entries(end - 9, *(unused,) * 9))
        for expected, data in (
            ('over each other', with_entries(unused, 4, 4)),
            ('over each other', with_entries(unused, 4, 12)),
            ('over itself or the header', with_entries(0)),
            ('over itself or the header', with_entries(3)),
            ('beyond its end', with_entries(end - 8, *(unused,) * 9)),
            ('beyond its end', with_entries(0xFFFFFFFE, *(unused,) * 9)),
            ('blocks of 3584', with_head(block=3584)),
            ('smaller than its disk', with_head(count=9)),
            ('table is cut off', with_head(count=1 << 22)),
            ('4194305 entries', with_head(count=(1 << 22) + 1)),
            ('lie over each other', with_head(table_at=1024)),
            ('lie over each other', with_head(table_at=0)),
            ('table is cut off', with_head(table_at=len(good) - 16)),
            ('table is cut off', with_head(table_at=len(good) - 17)),
            ('table is cut off', with_head(table_at=1 << 63)),
            ('table is missing', with_head(header_at=0)),
            ('table is missing', with_head(header_at=1 << 63)),
            ('table is missing', with_head(header_at=len(good) - 512)),
            ('no footer', good[:-512]),
            ('no footer', good + b'x'),
            ('no footer', b''),
            ('no footer', b'x'),
            ('differs', good[:-512] + vhds.footer(3, size - 512)),
            ('differs', good[:-512] + vhds.footer(4, size)),
            ('no disk has', fixed[:-512] + vhds.footer(2, 2041 << 30)),
            ('no disk has', fixed[:-512] + vhds.footer(2, 0)),
            ('no disk has', fixed[:-512] + vhds.footer(2, 513)),
            ('holds less', fixed[:-512] + vhds.footer(2, size + 512)),
            ('holds less', vhds.footer(2, 512)),
            ('another by its start', good[:-512] + vhds.footer(2, 4096)),
            ('type 7', fixed[:-512] + vhds.footer(7, size)),
        ):
            with self.subTest(expected):
                with self.assertRaisesRegex(errors.Invalid, expected):
                    disk_of(data)

    def test_what_is_cut_off_while_it_is_read_is_not_zero(self) -> None:
        data = vhds.craft(self.chance.randbytes(4 * MIB), [0, 1])
        file = io.BytesIO(data)
        disk = vhd.Disk([file])
        file.truncate(3 * MIB)
        with self.assertRaisesRegex(errors.Corrupt, 'cut off'):
            disk.read()

    def test_paths_of_parents_are_shown_and_bounded(self) -> None:
        name = 'bä.vhd'
        texts = {
            b'W2ru': f'.\\{name}'.encode('utf-16-le'),
            b'MacX': f'file://./{name}'.encode() + bytes(9), b'Wi2k': b'x',
        }
        locators = [
            vhd_layout.Locator(platform, 512, len(text), 1024 + at * 512)
            for at, (platform, text) in enumerate(texts.items())
        ]
        locators += [
            vhd_layout.Locator(b'W2ku', 512, 1 << 30, 0),
            vhd_layout.Locator(b'W2ku', 512, 64, 1 << 62),
        ]
        data = bytearray(vhd_layout.Header(
            2048, 1, MIB, IDS[0], 0, name, tuple(locators)).pack())
        for text in texts.values():
            data += text.ljust(512, b'\0')
        header = vhd_layout.Header.parse(bytes(data[:1024]), MIB, 'x')
        self.assertEqual(
            [name, f'.\\{name}', f'file://./{name}', ''],
            vhd.parent_paths(io.BytesIO(data), header),
        )

    def test_a_large_disk_is_read_in_little_memory(self) -> None:
        """A bitmap for each sector, a change at each, a table's claims."""
        size, small = 24 * MIB, 12_000 * SECTOR
        chain = [
            vhds.craft(bytes(size), range(12), kind=kind, uid=IDS[kind],
                       parent=IDS[3] if kind == 4 else '',
                       unset=range(0, size // SECTOR, 2))
            for kind in (4, 3)
        ]
        crumbs = vhds.craft(bytes(small), range(12_000), block=SECTOR)
        claims = vhds.footer(3, MIB) + vhds.header(
            1 << 22, 512) + vhds.footer(3, MIB)
        opened = [io.BytesIO(file) for file in (*chain, crumbs, claims)]
        tracemalloc.start()
        try:
            disk = vhd.Disk(opened[:2])
            self.assertEqual(
                size // SECTOR, sum(1 for _ in disk.extents()))
            disk = vhd.Disk(opened[2:3])
            self.assertEqual(1, sum(1 for _ in disk.extents()))
            with self.assertRaisesRegex(errors.Invalid, 'cut off'):
                vhd.Disk(opened[3:])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        self.assertLess(peak, MEMORY_BYTES_MAX)


class Flipped(unittest.TestCase):
    """Each byte of the metadata is damaged in turn."""

    def test_a_damaged_byte_is_refused_or_harmless(self) -> None:
        """But for the table and the bitmaps, which have no checksum."""
        chance = random.Random(hostile_case.seed(self.id()))
        size = 6 * 4096 - SECTOR
        base = vhds.craft(
            chance.randbytes(size), [4, 0], block=4096, uid=IDS[0],
            unset=[3, 33])
        leaf = vhds.craft(
            chance.randbytes(size), [5, 1], block=4096, kind=4, uid=IDS[1],
            parent=IDS[0], unset=[9, 41], gap=1)
        under = vhds.naive(base)
        expected = vhds.naive(leaf, base)
        plain = {*range(2048, 2560)}  # a gap: nobody looks there
        table = {*range(1536, 2048)}
        bitmap = {*range(2560, 3072)}
        summed = {*range(1536), *range(len(leaf) - 512, len(leaf))}
        for at in sorted(summed | table | bitmap | plain):
            for _ in range(ROUNDS):
                spoilt = bytearray(leaf)
                spoilt[at] ^= 1 << chance.randrange(8)
                for read in (self.disk, self.stream):
                    got = self.outcome(read, bytes(spoilt), base, under)
                    with self.subTest(at=at, read=read.__name__):
                        if at in summed:
                            self.assertIsNone(got)
                        elif at in plain:
                            self.assertEqual(expected, got)
                        elif got is not None and got != expected:
                            # What is said is what is done.
                            self.assertEqual(
                                vhds.naive(bytes(spoilt), base), got)

    def outcome(
        self, read: Callable[..., bytes], *files: bytes
    ) -> bytes | None:
        try:
            return read(*files)
        except errors.Invalid:
            return None

    def disk(self, leaf: bytes, base: bytes, under: bytes) -> bytes:
        disk = disk_of(leaf, base)
        for run in disk.extents():
            self.assertGreater(run.length_bytes, 0)
        return disk.read()

    def stream(self, leaf: bytes, base: bytes, under: bytes) -> bytes:
        stream = vhd_stream.Stream(vhds.Wire(leaf), parent_uuid=IDS[0])
        disk = bytearray(under.ljust(stream.size_bytes, b'\0'))
        for at, data in stream.runs():
            disk[at:at + len(data)] = data
        return bytes(disk)


if __name__ == '__main__':
    unittest.main()
