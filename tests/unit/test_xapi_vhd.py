# SPDX-License-Identifier: Apache-2.0
"""The VHD files of the simulator hold what was written, to every reader."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import tempfile
import unittest

from tests import images
from tests import vhds
from tests.integration import hostile_case
from tests.vhds import MIB
from tests.vhds import SECTOR
from volume import errors
from volume.sim.xapi.disk import disks
from volume.sim.xapi.disk import raw_disk
from volume.sim.xapi.disk import vhd_disk
from volume.transfer import vhd

BLOCK = 2 * MIB
PLACES = (0, 1, 511, 512, 4095, 4096, BLOCK - 4096, BLOCK - 1)
LENGTHS = (1, 511, 512, 513, 4096, 5000, 65536, 300_001, BLOCK, BLOCK + 8192)


class Chain:
    """A chain of VHDs with a model of the disk; the leaf is open."""

    def __init__(self, directory: str, size: int, chance: random.Random):
        self.directory = directory
        self.chance = chance
        self.format = vhd_disk.Vhd()
        self.model = bytearray(size)
        self.paths = [self.path(0)]
        self.format.create(self.paths[0], size)
        self.disk = self.open()

    def path(self, level: int) -> str:
        return os.path.join(self.directory, f'{level}.vhd')

    def open(self, writable: bool = True) -> disks.Disk:
        return self.format.open(
            self.paths[0], writable, self.paths[1:])

    def reopen(self) -> None:
        self.disk.close()
        self.disk = self.open()

    def push(self) -> None:
        """Put a new leaf on top."""
        self.disk.close()
        self.format.hide(self.paths[0], True)
        self.paths.insert(0, self.path(len(self.paths)))
        self.format.create(self.paths[0], len(self.model), self.paths[1])
        self.disk = self.open()

    def grow(self, size: int) -> None:
        self.disk.close()
        self.format.grow(self.paths[0], size)
        self.model += bytes(size - len(self.model))
        self.disk = self.open()

    def act(self) -> None:
        """Write or zero somewhere."""
        at = self.chance.choice(PLACES)
        at += self.chance.randrange(max(1, len(self.model) // BLOCK)) * BLOCK
        length = self.chance.choice(LENGTHS)
        length = max(0, min(length, len(self.model) - at))
        at = min(at, len(self.model))
        if self.chance.random() < 0.3:
            self.disk.zero(at, length)
            self.model[at:at + length] = bytes(length)
        else:
            data = self.chance.randbytes(length)
            self.disk.pwrite(at, data)
            self.model[at:at + length] = data


class Vhds(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = self.enterContext(tempfile.TemporaryDirectory())
        self.chance = random.Random(hostile_case.seed(self.id()))

    def chain(self, size: int) -> Chain:
        chain = Chain(
            tempfile.mkdtemp(dir=self.directory), size, self.chance)
        self.addCleanup(lambda: chain.disk.close())
        return chain

    def is_true(self, chain: Chain) -> None:
        """Ours, the reader of images, and a naive one see the model."""
        expected = bytes(chain.model)
        self.assertEqual(expected, chain.disk.pread(0, len(expected)))
        files = [open(path, 'rb') for path in chain.paths]
        try:
            other = vhd.Disk(files)
            self.assertEqual(expected, other.read())
            self.assertEqual(
                [*other.extents()], [*chain.disk.extents()])
        finally:
            for file in files:
                file.close()
        naive = []
        for path in chain.paths:
            with open(path, 'rb') as file:
                naive.append(file.read())
        self.assertEqual(expected, vhds.naive(*naive))

    def test_what_is_written_is_read_in_chains_of_any_depth(self) -> None:
        for depth in 1, 2, 5:
            chain = self.chain(6 * MIB)
            for level in range(depth):
                if level:
                    chain.push()
                for _ in range(25):
                    chain.act()
                chain.reopen()
            with self.subTest(depth=depth):
                self.is_true(chain)
                for _ in range(60):
                    at = self.chance.randrange(len(chain.model))
                    length = min(
                        self.chance.choice(LENGTHS), len(chain.model) - at)
                    self.assertEqual(
                        chain.model[at:at + length],
                        chain.disk.pread(at, length))

    def test_a_disk_grows_and_its_parents_do_not(self) -> None:
        chain = self.chain(3 * MIB + SECTOR)
        for size in 4 * MIB, 5 * MIB + 3 * SECTOR, 40 * MIB, 300 * MIB:
            for _ in range(6):
                chain.act()
            chain.push()
            for _ in range(6):
                chain.act()
            chain.grow(size)
            at = len(chain.model) - 5000
            chain.disk.pwrite(at, b'x' * 5000)
            chain.model[at:] = b'x' * 5000
            if size < 100 * MIB:
                self.is_true(chain)
        self.assertEqual(
            bytes(chain.model), chain.disk.pread(0, len(chain.model)))

    def test_it_holds_only_what_was_written(self) -> None:
        chain = self.chain(64 * MIB)
        empty = os.path.getsize(chain.paths[0])
        self.assertLess(empty, 8192)
        chain.disk.pwrite(9 * MIB, b'x')
        self.assertLessEqual(
            os.path.getsize(chain.paths[0]), empty + BLOCK + 8192)
        (first, run, last) = chain.disk.extents()
        self.assertEqual(
            (9 * MIB, 4096, False),
            (run.offset_bytes, run.length_bytes, run.is_zero))
        chain.push()
        chain.disk.zero(0, 64 * MIB)
        self.assertEqual(bytes(8192), chain.disk.pread(9 * MIB, 8192))
        (first, run, last) = chain.disk.allocated()
        self.assertTrue(first.is_zero and last.is_zero)
        self.assertEqual((9 * MIB, 4096), (run.offset_bytes,
                                           run.length_bytes))

    def test_the_largest_disk_is_sparse_and_true(self) -> None:
        size = 2040 << 30
        path = os.path.join(self.directory, 'large.vhd')
        leaf = os.path.join(self.directory, 'leaf.vhd')
        format = vhd_disk.Vhd()
        format.create(path, size)
        places = {
            at: self.chance.randbytes(9000)
            for at in (0, 1 << 40, size - 9000, 700 * MIB - 1)
        }
        with format.open(path, True) as disk:
            for at, data in places.items():
                disk.pwrite(at, data)
        format.create(leaf, size, path)
        with format.open(leaf, True, [path]) as disk:
            disk.pwrite(3 << 39, b'leaf')
            places[3 << 39] = b'leaf'
            for at, data in places.items():
                self.assertEqual(data, disk.pread(at, len(data)))
            self.assertEqual(
                5, sum(not each.is_zero for each in disk.extents()))
        files = [open(name, 'rb') for name in (leaf, path)]
        try:
            other = vhd.Disk(files)
            for at, data in places.items():
                other.seek(at)
                self.assertEqual(data, other.read(len(data)))
        finally:
            for file in files:
                file.close()
        self.assertLess(os.stat(path).st_blocks * 512, 16 * MIB)
        with self.assertRaises(errors.Invalid):
            format.create(path, size + SECTOR)
        with self.assertRaises(errors.Invalid):
            format.grow(path, size + SECTOR)

    def test_what_others_made_is_read_and_written(self) -> None:
        """By qemu, and with odd bitmaps, blocks and gaps."""
        disk = images.disk(7 * MIB + 5 * SECTOR, 4)
        path = images.make('vhd', os.path.join(self.directory, 'q'), disk)
        crafted = vhds.craft(
            self.chance.randbytes(5 * MIB + SECTOR), [7, 2, 0],
            block=MIB // 2, gap=3,
            unset=self.chance.sample(range(10 * MIB // SECTOR), 4000),
        )
        other = os.path.join(self.directory, 'c')
        with open(other, 'wb') as file:
            file.write(crafted)
        for source, expected in (path, disk), (other, vhds.naive(crafted)):
            chain = self.chain(SECTOR)
            chain.disk.close()
            chain.paths = [source]
            chain.model[:] = expected
            chain.disk = chain.open()
            for _ in range(30):
                chain.act()
            self.is_true(chain)
            chain.push()
            for _ in range(30):
                chain.act()
            self.is_true(chain)
            chain.grow(9 * MIB)
            self.is_true(chain)

    def test_qemu_reads_a_disk_without_parents(self) -> None:
        """It looks at no bitmap: what is not set must be zeros."""
        chain = self.chain(8 * MIB)
        for _ in range(40):
            chain.act()
        chain.grow(50 * MIB)
        chain.disk.flush()
        raw = os.path.join(self.directory, 'raw')
        with open(raw, 'wb') as file:
            file.write(chain.model)
        subprocess.run(
            ['qemu-img', 'compare', '-q', '-f', 'raw', '-F', 'vpc', raw,
             chain.paths[0]], check=True, timeout=60)

    def test_a_merge_changes_nothing_and_stops_when_told(self) -> None:
        for _ in range(6):
            chain = self.chain(5 * MIB)
            depth = self.chance.randrange(2, 5)
            for level in range(depth):
                if level:
                    chain.push()
                if self.chance.random() < 0.3:
                    chain.grow(len(chain.model) + self.chance.choice(
                        (SECTOR, 4096, BLOCK)))
                for _ in range(12):
                    chain.act()
            index = self.chance.randrange(1, depth)
            chain.disk.close()
            upper, lower = chain.paths[index - 1], chain.paths[index]
            with self.assertRaises(disks.Stopped):
                chain.format.merge(upper, lower, lambda: True)
            extra = chain.format.extra_bytes(upper, lower)
            before = os.path.getsize(lower)
            chain.format.merge(upper, lower)
            self.assertLessEqual(
                os.path.getsize(lower), before + extra + 65536)
            chain.reopen()
            self.is_true(chain)
            chain.disk.close()
            if index > 1:
                chain.format.relink(chain.paths[index - 2], lower)
                del chain.paths[index - 1]
                self.assertEqual(
                    os.path.basename(lower),
                    chain.format.look(chain.paths[index - 2]).parent)
            else:
                os.replace(lower, upper)
                chain.format.hide(upper, False)
                del chain.paths[1]
            chain.disk = chain.open()
            self.is_true(chain)

    def test_what_a_file_says_of_itself(self) -> None:
        chain = self.chain(4 * MIB)
        chain.push()
        facts = chain.format.look(chain.paths[0])
        self.assertEqual(
            (4 * MIB, '0.vhd', False),
            (facts.size_bytes, facts.parent, facts.is_hidden))
        self.assertTrue(chain.format.look(chain.paths[1]).is_hidden)
        self.assertEqual('', chain.format.look(chain.paths[1]).parent)

    def test_what_is_not_one_is_refused(self) -> None:
        chain = self.chain(4 * MIB)
        chain.push()
        reads = [
            (chain.paths[0], []), (chain.paths[1], [chain.paths[0]]),
            (chain.paths[0], [chain.paths[1], chain.paths[1]]),
        ]
        for content in (
            b'', b'x' * 5000, vhds.footer(2, SECTOR),
            bytes(SECTOR) + vhds.footer(2, SECTOR),
        ):
            path = os.path.join(self.directory, f'{len(content)}')
            with open(path, 'wb') as file:
                file.write(content)
            reads.append((path, []))
        chain.push()
        reads.append((chain.paths[0], [chain.paths[2]]))
        for path, parents in reads:
            with self.subTest(path=path, parents=parents):
                with self.assertRaises(errors.Invalid):
                    chain.format.open(path, False, parents)
        with chain.open(writable=False) as disk:
            for act in (
                lambda: disk.pwrite(0, b'x'), lambda: disk.zero(0, 1),
                lambda: disk.pread(4 * MIB, 1), lambda: disk.pread(-1, 1),
            ):
                with self.assertRaises(errors.Invalid):
                    act()

    def test_a_claim_that_fails_leaves_the_disk_as_it_was(self) -> None:
        chain = self.chain(8 * MIB)
        chain.disk.pwrite(0, b'old' * 1000)
        chain.disk.close()

        def full(length: int) -> None:
            raise errors.NoSpace('full')

        with chain.format.open(chain.paths[0], True, (), full) as disk:
            disk.pwrite(0, b'new')
            with self.assertRaises(errors.NoSpace):
                disk.pwrite(BLOCK - 1, b'xy')
        chain.model[:3000] = b'old' * 1000
        chain.model[:3] = b'new'
        chain.model[BLOCK - 1:BLOCK] = b'x'
        chain.disk = chain.open()
        self.is_true(chain)


@unittest.skipIf(vhds.Libvhdi.missing(), vhds.Libvhdi.missing())
class Libvhdi(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.reader = vhds.Libvhdi(cls)

    def test_chains_of_thirty_are_the_disk_to_libvhdi(self) -> None:
        chance = random.Random(hostile_case.seed(self.id()))
        directory = self.enterContext(tempfile.TemporaryDirectory())
        chain = Chain(directory, 6 * MIB, chance)
        for depth in range(1, 31):
            if depth > 1:
                chain.push()
            if depth == 7:
                # The table moves to the end.
                chain.grow(270 * MIB)
            for _ in range(4):
                chain.act()
            if depth in (1, 2, 8, 30):
                expected = hashlib.sha256(chain.model[:6 * MIB])
                answer = self.reader.ask(
                    *chain.paths, runs=[(0, 6 * MIB)])
                with self.subTest(depth=depth):
                    self.assertEqual(len(chain.model), answer['size'])
                    self.assertEqual(
                        expected.hexdigest(), answer['digest'])
                    if depth > 1:
                        self.assertEqual(
                            f'{depth - 2}.vhd', answer['path'])
        chain.disk.close()


class Raws(unittest.TestCase):
    def test_a_raw_file_is_the_disk(self) -> None:
        directory = self.enterContext(tempfile.TemporaryDirectory())
        chance = random.Random(hostile_case.seed(self.id()))
        path = os.path.join(directory, 'raw')
        format = raw_disk.Raw()
        format.create(path, 9 * MIB)
        self.assertLess(os.stat(path).st_blocks, 64)
        model = bytearray(9 * MIB)
        with format.open(path, True) as disk:
            for _ in range(50):
                at = chance.randrange(len(model))
                length = min(chance.choice(LENGTHS), len(model) - at)
                if chance.random() < 0.4:
                    disk.zero(at, length)
                    model[at:at + length] = bytes(length)
                else:
                    data = chance.randbytes(length)
                    disk.pwrite(at, data)
                    model[at:at + length] = data
            disk.flush()
            self.assertEqual(bytes(model), disk.pread(0, len(model)))
            at = 0
            for extent in disk.extents():
                self.assertEqual(at, extent.offset_bytes)
                at += extent.length_bytes
                if extent.is_zero:
                    self.assertFalse(any(model[extent.offset_bytes:at]))
            self.assertEqual(len(model), at)
        format.grow(path, 10 * MIB)
        self.assertEqual(10 * MIB, format.look(path).size_bytes)
        with self.assertRaises(errors.Unsupported):
            format.create(path, MIB, path)


if __name__ == '__main__':
    unittest.main()
