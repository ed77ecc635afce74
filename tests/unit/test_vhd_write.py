# SPDX-License-Identifier: Apache-2.0
"""The VHDs that we make are read by others, byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import tempfile
import unittest
import uuid
from collections.abc import Iterator

from tests import vhds
from tests.integration import hostile_case
from tests.vhds import MIB
from tests.vhds import SECTOR
from volume import errors
from volume.model import Extent
from volume.transfer import vhd
from volume.transfer import vhd_write

SIZES = (
    SECTOR, 3 * SECTOR, MIB // 2, 2 * MIB, 2 * MIB + SECTOR,
    10 * MIB - SECTOR, 127 * MIB, (3 << 30) + 7 * SECTOR,
)
EMPTY_BYTES = 512 + 1024 + 512 + 512 + 512


def new_id(chance: random.Random) -> str:
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


def save(image: vhd_write.Image, disk: vhd_write.Seekable, path: str) -> str:
    with open(path, 'wb') as file:
        for chunk in image.chunks(disk):
            file.write(chunk)
    return path


def qemu_img(*argv: str) -> bytes:
    return subprocess.run(
        ['qemu-img', *argv], check=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, timeout=60,
    ).stdout


class Written(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = self.enterContext(tempfile.TemporaryDirectory())
        self.chance = random.Random(hostile_case.seed(self.id()))

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def qemu_compares(self, raw: str, path: str) -> None:
        """Every byte and the size; by cylinders it would be another."""
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'vpc', raw, path)
        info = json.loads(
            qemu_img('info', '-f', 'vpc', '--output=json', path))
        self.assertEqual(os.path.getsize(raw), info['virtual-size'])

    def test_a_dynamic_vhd_is_the_disk_to_qemu_and_to_us(self) -> None:
        for size in SIZES:
            for block in vhd_write.BLOCK_BYTES:
                if size > 1 << 30 and block < 2 * MIB:
                    continue
                disk = vhds.Model.random(size, self.chance)
                image = vhd_write.Dynamic(
                    size, disk.extents(), uuid=new_id(self.chance),
                    block_bytes=block)
                path = save(image, disk, self.path('vhd'))
                raw = disk.store(self.path('raw'))
                with self.subTest(size=size, block=block):
                    self.assertEqual(
                        image.length_bytes, os.path.getsize(path))
                    self.qemu_compares(raw, path)
                    with open(path, 'rb') as file:
                        ours = vhd.Disk([file])
                        self.assertEqual(size, ours.size_bytes)
                        for at, data in disk.runs:
                            ours.seek(at)
                            self.assertEqual(data, ours.read(len(data)))

    def test_a_fixed_vhd_is_the_disk_to_qemu(self) -> None:
        for size in (SECTOR, 3 * MIB + SECTOR):
            disk = vhds.Model.random(size, self.chance)
            image = vhd_write.Fixed(size, uuid=new_id(self.chance))
            path = save(image, disk, self.path('vhd'))
            self.assertEqual(image.length_bytes, os.path.getsize(path))
            self.assertEqual(size + SECTOR, image.length_bytes)
            self.qemu_compares(disk.store(self.path('raw')), path)

    def test_empty_blocks_do_not_travel(self) -> None:
        """Nor are they read."""
        size = 64 * MIB
        disk = vhds.Model(size, {
            5 * MIB: b'x', 8 * MIB - 1: b'yz', 63 * MIB: b'z' * MIB})
        image = vhd_write.Dynamic(
            size, disk.extents(), uuid=new_id(self.chance))
        used = 4  # of 2 MiB, at 4, 6, 8 and 62 MiB
        self.assertEqual(
            EMPTY_BYTES + used * (512 + 2 * MIB), image.length_bytes)
        sent = sum(len(chunk) for chunk in image.chunks(disk))
        self.assertEqual(image.length_bytes, sent)
        self.assertEqual(used * 2 * MIB, disk.read_bytes)

    def test_a_disk_that_is_written_makes_the_same_vhd(self) -> None:
        for size in SIZES[:-1]:
            disk = vhds.Model.random(size, self.chance)
            image = vhd_write.Dynamic(
                size, disk.extents(), uuid=new_id(self.chance))
            wanted = b''.join(map(bytes, image.chunks(disk)))
            sent = bytearray()
            feed = vhd_write.Feed(image, sent.extend)
            for at, data in disk.runs:
                # In pieces, and the zeros between them not at all.
                for start in range(0, len(data), 700_000):
                    piece = data[start:start + 700_000]
                    feed.write(at + start, memoryview(piece))
            feed.finish()
            with self.subTest(size=size):
                self.assertEqual(wanted, bytes(sent))

    def test_what_was_to_be_zero_cannot_be_written(self) -> None:
        image = vhd_write.Dynamic(
            8 * MIB,
            [Extent(0, 2 * MIB, False), Extent(2 * MIB, 6 * MIB, True)],
            uuid=new_id(self.chance),
        )
        feed = vhd_write.Feed(image, lambda chunk: None)
        feed.write(MIB, memoryview(b'x' * 512))
        with self.assertRaises(errors.Unsupported):
            feed.write(0, memoryview(b'x' * 512))
        with self.assertRaises(errors.Conflict):
            feed.write(2 * MIB - 512, memoryview(b'x' * 1024))

    def test_the_length_is_known_for_the_largest_disk(self) -> None:
        size = 2040 << 30
        data = Extent(0, size, False)
        image = vhd_write.Dynamic(size, [data], uuid=new_id(self.chance))
        blocks = size // (2 * MIB)
        self.assertEqual(
            2048 + blocks * 4 + blocks * (512 + 2 * MIB) + 512,
            image.length_bytes,
        )

    def test_a_chain_that_grows_is_the_disk_of_each_moment(self) -> None:
        """It is overwritten, zeroed, and left alone in places."""
        for chain, disk, parent in chains(self, MIB):
            files = [open(path, 'rb') for path in chain]
            with contextlib.ExitStack() as opened:
                for file in files:
                    opened.enter_context(file)
                self.assertEqual(
                    disk, vhds.naive(*(file.read() for file in files)))
                ours = vhd.Disk(files)
                self.assertEqual(disk, ours.read())
                assert ours.facts.header is not None
                self.assertEqual(
                    [parent.path, f'file://{parent.path}'],
                    vhd.parent_paths(files[0], ours.facts.header),
                )

    def test_what_has_not_changed_does_not_travel(self) -> None:
        """What became zero does, and more is sent when told in crumbs."""
        disk = vhds.Model.of(self.chance.randbytes(8 * MIB))
        parent = vhd_write.Parent(new_id(self.chance))
        changed = [
            Extent(MIB + at * 8192, 512, at % 2 == 0) for at in range(32)
        ] + [Extent(6 * MIB, 4096, True)]
        for runs_max, read in ((100, 32 * 4096), (8, 31 * 8192 + 4096)):
            image = vhd_write.Differencing(
                8 * MIB, changed, parent, uuid=new_id(self.chance),
                runs_max=runs_max)
            disk.read_bytes = 0
            sent = b''.join(map(bytes, image.chunks(disk)))
            self.assertEqual(
                EMPTY_BYTES + 2 * (512 + 2 * MIB), image.length_bytes)
            self.assertEqual(image.length_bytes, len(sent))
            self.assertEqual(read + 4096, disk.read_bytes)
            whole = vhd_write.Dynamic(
                8 * MIB, [Extent(0, 8 * MIB, False)], uuid=parent.uuid)
            old = vhds.Model(8 * MIB, {0: bytes(8 * MIB)})
            got = vhds.naive(sent, b''.join(map(bytes, whole.chunks(old))))
            for extent in changed:
                at, end = extent.offset_bytes, extent.offset_bytes + 512
                self.assertEqual(disk.part(at, 512), got[at:end])
            self.assertFalse(any(got[:MIB]))

    def test_what_no_vhd_can_hold_is_refused(self) -> None:
        parent = vhd_write.Parent(new_id(self.chance))
        for size in (0, -512, 511, MIB + 1, (2040 << 30) + 512):
            for make in (
                lambda size: vhd_write.Fixed(size, uuid=vhds.ROOT),
                lambda size: vhd_write.Dynamic(size, [], uuid=vhds.ROOT),
                lambda size: vhd_write.Differencing(
                    size, [], parent, uuid=vhds.ROOT),
            ):
                with self.assertRaisesRegex(errors.Invalid, f' {size} bytes'):
                    make(size)
        with self.assertRaisesRegex(errors.Invalid, 'blocks of 4096'):
            vhd_write.Dynamic(MIB, [], uuid=vhds.ROOT, block_bytes=4096)
        with self.assertRaisesRegex(errors.Invalid, 'its own parent'):
            vhd_write.Differencing(MIB, [], parent, uuid=parent.uuid.upper())

    def test_a_source_that_contradicts_itself_makes_no_image(self) -> None:
        parent = vhd_write.Parent(new_id(self.chance))
        for told in (
            [], [Extent(0, MIB, True)], [Extent(512, 2 * MIB - 512, True)],
            [Extent(0, MIB, True), Extent(MIB + 512, MIB - 512, False)],
            [Extent(0, MIB, False), Extent(0, 2 * MIB, False)],
            [Extent(0, 3 * MIB, True)],
            # A hole as long as what is told twice.
            [Extent(0, MIB, True), Extent(MIB + 512, 512, False),
             Extent(MIB + 512, MIB - 512, False)],
            [Extent(0, 2 * MIB, True), Extent(2 * MIB, -512, True)],
        ):
            with self.assertRaises(errors.Corrupt):
                vhd_write.Dynamic(2 * MIB, told, uuid=vhds.ROOT)
        for told in (
            [Extent(0, 3 * MIB, True)], [Extent(-512, MIB, False)],
            [Extent(MIB, 512, False), Extent(0, 512, False)],
            [Extent(MIB, -512, False)],
        ):
            with self.assertRaises(errors.Corrupt):
                vhd_write.Differencing(
                    2 * MIB, told, parent, uuid=vhds.ROOT)

    def test_a_source_that_ends_early_does_not_end_the_image(self) -> None:
        data = [Extent(0, 4 * MIB, False)]
        short = vhds.Model(3 * MIB, {})
        for image in (
            vhd_write.Dynamic(4 * MIB, data, uuid=vhds.ROOT),
            vhd_write.Fixed(4 * MIB, uuid=vhds.ROOT),
        ):
            sent = io.BytesIO()
            with self.assertRaisesRegex(errors.Corrupt, 'ended at byte'):
                for chunk in image.chunks(short):
                    sent.write(chunk)
            self.assertLess(sent.tell(), image.length_bytes)
            self.assertNotEqual(b'conectix', sent.getvalue()[-512:][:8])


@unittest.skipIf(vhds.Libvhdi.missing(), vhds.Libvhdi.missing())
class ByLibvhdi(unittest.TestCase):
    """A reader that shares no code with ours, nor with QEMU."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.libvhdi = vhds.Libvhdi(cls)

    def setUp(self) -> None:
        self.directory = self.enterContext(tempfile.TemporaryDirectory())
        self.chance = random.Random(hostile_case.seed(self.id()))

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def test_a_vhd_without_parent_is_the_disk(self) -> None:
        for size in SIZES:
            disk = vhds.Model.random(size, self.chance)
            uid = new_id(self.chance)
            images: list[vhd_write.Image] = [
                vhd_write.Dynamic(size, disk.extents(), uuid=uid)]
            if size < 20 * MIB:
                images.append(vhd_write.Fixed(size, uuid=uid))
            for image in images:
                path = save(image, disk, self.path('vhd'))
                ends = [(0, min(size, 4096)), (size - SECTOR, SECTOR)]
                runs = [(0, size)] if size < 20 * MIB else ends + [
                    (at, len(data)) for at, data in disk.runs]
                expected = hashlib.sha256()
                for at, length in runs:
                    expected.update(disk.part(at, length))
                with self.subTest(size=size, kind=type(image).__name__):
                    answer = self.libvhdi.ask(path, runs=runs)
                    self.assertEqual(size, answer['size'])
                    self.assertEqual(uid, answer['id'])
                    self.assertEqual(expected.hexdigest(), answer['digest'])

    def test_a_chain_of_five_is_the_disk_of_each_moment(self) -> None:
        for chain, disk, parent in chains(self, 0):
            answer = self.libvhdi.ask(*chain)
            self.assertEqual(
                (len(disk), parent.uuid, parent.path),
                (answer['size'], answer['parent'], answer['path']),
            )
            self.assertEqual(
                hashlib.sha256(disk).hexdigest(), answer['digest'])


def chains(
    test: Written | ByLibvhdi, growth: int
) -> Iterator[tuple[list[str], bytes, vhd_write.Parent]]:
    """Yield a chain that gets longer: its files, its disk, its parent."""
    chance = test.chance
    disk = bytearray(chance.randbytes(5 * MIB + SECTOR))
    uid, stamp = new_id(chance), 1000
    first = vhds.Model.of(bytes(disk))
    image: vhd_write.Image = vhd_write.Dynamic(
        len(disk), first.extents(), uuid=uid, timestamp=stamp)
    chain = [save(image, first, test.path('0'))]
    for level in range(1, 6):
        parent = vhd_write.Parent(uid, stamp, f'./{level - 1}')
        disk += bytes(chance.choice((0, growth)))
        changed = change(disk, chance)
        uid, stamp = new_id(chance), stamp + level
        image = vhd_write.Differencing(
            len(disk), changed, parent, uuid=uid, timestamp=stamp,
            block_bytes=chance.choice(vhd_write.BLOCK_BYTES),
            runs_max=chance.choice((4, 1000)),
        )
        now = vhds.Model.of(bytes(disk))
        chain.insert(0, save(image, now, test.path(f'{level}')))
        test.assertEqual(image.length_bytes, os.path.getsize(chain[0]))
        yield chain, bytes(disk), parent


def change(disk: bytearray, chance: random.Random) -> list[Extent]:
    """Write to a disk in some places; tell where, in odd pieces."""
    changed, at = [], 0
    for _ in range(chance.choice((1, 9, 30))):
        at += chance.randrange(len(disk) // 8)
        length = min(
            chance.choice((1, 512, 5000, 65536, 300_000)), len(disk) - at)
        if length <= 0:
            break
        is_zero = chance.random() < 0.3
        disk[at:at + length] = (
            bytes(length) if is_zero else chance.randbytes(length))
        changed.append(Extent(at, length, is_zero))
        at += length
    return changed


if __name__ == '__main__':
    unittest.main()
