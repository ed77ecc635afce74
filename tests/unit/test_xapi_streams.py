# SPDX-License-Identifier: Apache-2.0
"""The simulator's streams of disks, by readers and writers of others."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import subprocess
import tarfile
import tempfile
import unittest
import uuid

from tests import vhds
from tests.vhds import MIB
from volume import errors
from volume.model import Extent
from volume.sim.xapi.disk import qcow2_disk
from volume.sim.xapi.disk import raw_disk
from volume.sim.xapi.disk import vhd_disk
from volume.sim.xapi.net import qcow2_send
from volume.sim.xapi.net import receiving
from volume.sim.xapi.net import sending

SIZE = 20 * MIB
UID = '11111111-2222-4333-8444-555555555555'
OTHER = '66666666-7777-4888-9999-aaaaaaaaaaaa'


class Case(unittest.TestCase):

    def setUp(self):
        found = tempfile.TemporaryDirectory(prefix='vts')
        self.addCleanup(found.cleanup)
        self.directory = found.name
        self.chance = random.Random(7)

    def disk(self, runs=(), size=SIZE):
        """Return an open VHD with these runs of bytes."""
        path = os.path.join(self.directory, f'{uuid.uuid4()}.vhd')
        vhd_disk.Vhd().create(path, size)
        disk = vhd_disk.Vhd().open(path, writable=True)
        self.addCleanup(disk.close)
        for at, data in dict(runs).items():
            disk.pwrite(at, data)
        return disk

    def full(self):
        """Return a disk with data here and there, and its bytes."""
        runs = {
            0: self.chance.randbytes(5000),
            3 * MIB + 512: self.chance.randbytes(MIB),
            8 * MIB - 4096: self.chance.randbytes(3 * MIB),
            SIZE - 512: self.chance.randbytes(512),
        }
        whole = bytearray(SIZE)
        for at, data in runs.items():
            whole[at:at + len(data)] = data
        return self.disk(runs), bytes(whole)

    def stored(self, chunks, name):
        path = os.path.join(self.directory, name)
        with open(path, 'wb') as file:
            for chunk in chunks:
                file.write(chunk)
        return path


class Out(Case):
    """What is sent is the disk."""

    def test_raw_is_every_byte(self):
        disk, whole = self.full()
        self.assertEqual(
            whole, b''.join(bytes(part) for part in sending.raw(disk)))

    @unittest.skipIf(vhds.Libvhdi.missing(), vhds.Libvhdi.missing())
    def test_a_vhd_is_the_disk_to_libvhdi_and_leaves_out_empty_blocks(self):
        disk, whole = self.full()
        image = sending.vhd(disk, UID, 'ref')
        path = self.stored(image.chunks(sending.Source(disk)), 'out.vhd')
        found = vhds.Libvhdi(type(self)).ask(path)
        self.assertEqual(hashlib.sha256(whole).hexdigest(), found['digest'])
        self.assertEqual(image.length_bytes, os.path.getsize(path))
        self.assertLess(image.length_bytes, 7 * 2 * MIB + 64 * 1024)

    def test_a_delta_over_its_base_is_the_disk(self):
        disk, whole = self.full()
        base, delta = bytearray(whole), vhds.MIB
        base[4 * MIB:5 * MIB] = bytes(delta)
        base[9 * MIB:9 * MIB + 4096] = b'\xee' * 4096
        under = self.disk({0: bytes(base)})
        changed = [Extent(4 * MIB, MIB, False), Extent(9 * MIB, 4096, False)]
        top = sending.vhd_delta(disk, changed, UID, OTHER, 'ref')
        bottom = sending.vhd(under, OTHER, 'ref')
        self.assertEqual(whole, vhds.naive(
            b''.join(map(bytes, top.chunks(sending.Source(disk)))),
            b''.join(map(bytes, bottom.chunks(sending.Source(under)))),
        ))

    def test_a_qcow2_is_the_disk_and_sound_to_qemu(self):
        disk, whole = self.full()
        image = qcow2_send.Image(disk, disk.extents())
        path = self.stored(image.chunks(), 'out.qcow2')
        self.assertEqual(image.length_bytes, os.path.getsize(path))
        subprocess.run(
            ['qemu-img', 'check', '-f', 'qcow2', path], check=True,
            capture_output=True, timeout=60)
        raw = os.path.join(self.directory, 'out.raw')
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', path, raw],
            check=True, timeout=60)
        with open(raw, 'rb') as file:
            self.assertEqual(whole, file.read())

    def test_a_qcow2_delta_over_its_base_is_the_disk(self):
        disk, whole = self.full()
        base = self.disk({0: b'\xdd' * (2 * MIB)})
        self.stored(
            qcow2_send.Image(base, base.extents()).chunks(), 'base.qcow2')
        changed = [Extent(0, SIZE, False)]
        path = self.stored(
            qcow2_send.Image(disk, changed, 'base.qcow2').chunks(),
            'top.qcow2')
        raw = os.path.join(self.directory, 'out.raw')
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', path, raw],
            check=True, timeout=60)
        with open(raw, 'rb') as file:
            self.assertEqual(whole, file.read())

    def test_a_tar_has_the_blocks_with_data_and_their_sums(self):
        disk, whole = self.full()
        data = b''.join(map(bytes, sending.tar(disk)))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            found = {
                member.name: archive.extractfile(member).read()
                for member in archive
            }
        blocks = {
            int(name): block for name, block in found.items()
            if not name.endswith('checksum')
        }
        self.assertEqual({0, 3, 4, 7, 8, 9, 10, 19}, {*blocks})
        for index, block in blocks.items():
            self.assertEqual(whole[index * MIB:(index + 1) * MIB], block)
            self.assertEqual(
                hashlib.sha1(block).hexdigest().encode(),
                found[f'{index:08d}.checksum'])


class In(Case):
    """What comes is on the disk."""

    def read(self, disk):
        return disk.pread(0, disk.size_bytes)

    def test_raw_is_written_from_the_start(self):
        data = self.chance.randbytes(3 * MIB + 17)
        disk = self.disk()
        receiving.raw(disk, vhds.Wire(data, 3, 900_000), len(data))
        self.assertEqual(
            data.ljust(SIZE, b'\0'), self.read(disk))

    def test_raw_that_is_too_long_fails_after_what_fits(self):
        data = self.chance.randbytes(3 * MIB)
        disk = self.disk(size=2 * MIB)
        with self.assertRaises(errors.Invalid):
            receiving.raw(disk, vhds.Wire(data), len(data))
        self.assertEqual(data[:2 * MIB], self.read(disk))

    def test_chunks_are_written_where_they_say(self):
        data = self.chance.randbytes(70_000)
        disk = self.disk()
        wire = b''.join((
            struct.pack('<QI', 5 * MIB + 1, len(data)), data,
            struct.pack('<QI', 512, 4), b'spam', struct.pack('<QI', 0, 0),
        ))
        receiving.chunked(disk, vhds.Wire(wire, 5, 10_000))
        whole = bytearray(SIZE)
        whole[5 * MIB + 1:5 * MIB + 1 + len(data)] = data
        whole[512:516] = b'spam'
        self.assertEqual(bytes(whole), self.read(disk))

    def test_a_vhd_is_read_forward_with_its_blocks_in_any_order(self):
        data = self.chance.randbytes(SIZE)
        order = [4, 0, 9, 2, 7]
        image = vhds.craft(data, order, gap=3, unset=[5, 6])
        whole = vhds.naive(image)
        disk = self.disk()
        receiving.vhd(disk, vhds.Wire(image, 2, 500_000), len(image), False)
        self.assertEqual(whole, self.read(disk))
        written = sum(
            extent.length_bytes for extent in disk.allocated()
            if not extent.is_zero)
        self.assertLessEqual(written, 5 * 2 * MIB)

    def test_a_differencing_vhd_is_laid_over_what_is_there(self):
        below = self.chance.randbytes(SIZE)
        disk = self.disk({0: below})
        data = bytearray(self.chance.randbytes(SIZE))
        data[2 * MIB:2 * MIB + 65536] = bytes(65536)
        image = vhds.craft(
            bytes(data), [1, 6], kind=4, parent=OTHER, unset=range(5000, 6000))
        receiving.vhd(disk, vhds.Wire(image, 4), len(image), True)
        self.assertEqual(
            vhds.naive(image, vhds.craft(below, range(10))), self.read(disk))

    def test_zeros_that_were_sent_are_written(self):
        disk = self.disk({0: b'\xff' * SIZE})
        image = vhds.craft(bytes(SIZE), [0, 3])
        receiving.vhd(disk, vhds.Wire(image), len(image), False)
        self.assertEqual(bytes(2 * MIB), disk.pread(0, 2 * MIB))
        self.assertEqual(b'\xff' * 2 * MIB, disk.pread(2 * MIB, 2 * MIB))

    def test_a_disk_that_keeps_old_bytes_has_what_was_not_sent_zeroed(self):
        path = os.path.join(self.directory, 'lun')
        with open(path, 'wb') as file:
            file.write(b'\xff' * SIZE)
        with raw_disk.RawDisk(path, writable=True) as disk:
            image = vhds.craft(self.chance.randbytes(SIZE), [7, 3])
            receiving.vhd(disk, vhds.Wire(image), len(image), True)
            self.assertEqual(vhds.naive(image), self.read(disk))

    def test_a_fixed_vhd_is_written_with_its_zeros_at_the_start(self):
        disk = self.disk({0: b'\xff' * SIZE})
        image = bytes(4096) + self.chance.randbytes(SIZE - 4096)
        image += vhds.footer(2, SIZE)
        receiving.vhd(disk, vhds.Wire(image), len(image), False)
        self.assertEqual(image[:SIZE], self.read(disk))

    def test_a_vhd_that_is_larger_than_the_disk_is_refused(self):
        image = vhds.craft(bytes(SIZE), [0])
        with self.assertRaises(errors.Invalid):
            receiving.vhd(
                self.disk(size=2 * MIB), vhds.Wire(image), len(image), False)

    def test_a_vhd_that_is_cut_off_is_refused(self):
        image = vhds.craft(self.chance.randbytes(SIZE), range(10))
        for end in (100, 1024, 3 * MIB, len(image) - 512, len(image) - 1):
            with self.subTest(end=end), self.assertRaises(errors.Invalid):
                receiving.vhd(
                    self.disk(), vhds.Wire(image[:end]), len(image), False)

    def test_a_tar_comes_back_as_it_went(self):
        disk, whole = self.full()
        data = b''.join(map(bytes, sending.tar(disk)))
        other = self.disk()
        receiving.tar(other, vhds.Wire(data, 9, 100_000), False)
        self.assertEqual(whole, self.read(other))

    def test_a_tar_with_a_damaged_block_is_refused(self):
        disk, _ = self.full()
        data = bytearray(b''.join(map(bytes, sending.tar(disk))))
        data[3 * MIB] ^= 1
        with self.assertRaises(errors.Invalid):
            receiving.tar(self.disk(), vhds.Wire(bytes(data)), False)

    def test_a_qcow2_of_qemu_is_on_the_disk(self):
        raw = os.path.join(self.directory, 'in.raw')
        whole = self.chance.randbytes(MIB) + bytes(18 * MIB) + b'end' * 512
        with open(raw, 'wb') as file:
            file.write(whole)
        path = os.path.join(self.directory, 'in.qcow2')
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, path],
            check=True, timeout=60)
        with open(path, 'rb') as file:
            image = file.read()
        disk = self.disk()
        receiving.qcow2(
            disk, vhds.Wire(image), len(image), False, self.directory,
            qcow2_disk.Qcow2().open,
        )
        self.assertEqual(whole.ljust(SIZE, b'\0'), self.read(disk))

    def test_a_qcow2_that_names_another_file_is_refused(self):
        base = os.path.join(self.directory, 'secret')
        with open(base, 'wb') as file:
            file.write(b'secret'.ljust(MIB, b'.'))
        path = os.path.join(self.directory, 'evil.qcow2')
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', base, '-F',
             'raw', path], check=True, timeout=60)
        with open(path, 'rb') as file:
            image = file.read()
        disk = self.disk()
        with self.assertRaises(errors.Invalid):
            receiving.qcow2(
                disk, vhds.Wire(image), len(image), False, self.directory,
                qcow2_disk.Qcow2().open,
            )
        self.assertNotIn(b'secret', self.read(disk))
