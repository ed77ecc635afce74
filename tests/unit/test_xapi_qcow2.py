# SPDX-License-Identifier: Apache-2.0
"""The qcow2 files of the simulator: qemu's, with chains and the collector."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
import unittest

from tests.integration import hostile_case
from tests.vhds import MIB
from volume import errors
from volume.sim.xapi.disk import chains
from volume.sim.xapi.disk import disks
from volume.sim.xapi.disk import gc
from volume.sim.xapi.disk import qcow2_disk
from volume.sim.xapi.sm.taps import Taps

SIZE = 3 * MIB
CLOSES_S = 0.2
IDS = [f'{number:08x}-0000-4000-8000-000000000000' for number in range(9)]


@unittest.skipUnless(
    shutil.which('qemu-nbd') and shutil.which('qemu-img'),
    'qemu-utils is missing')
class Qcow2s(unittest.TestCase):
    def setUp(self) -> None:
        self.chance = random.Random(hostile_case.seed(self.id()))
        self.directory = self.enterContext(tempfile.TemporaryDirectory())
        self.taps = Taps(
            lambda uuid, writable: self.chains.open_disk(uuid, writable))
        self.chains = chains.Chains(
            self.directory, [qcow2_disk.Qcow2()], users=self.taps)
        self.model = bytearray(SIZE)

    def write(self, disk: disks.Disk) -> None:
        for _ in range(4):
            at = self.chance.randrange(SIZE)
            data = self.chance.randbytes(min(70_000, SIZE - at))
            disk.pwrite(at, data)
            self.model[at:at + len(data)] = data

    def is_true(self, uuid: str, model: bytes | bytearray) -> None:
        """Ours and qemu see it, without us."""
        with self.chains.open_disk(uuid) as disk:
            self.assertTrue(model == disk.pread(0, disk.size_bytes))
        raw = os.path.join(self.directory, 'raw')
        with open(raw, 'wb') as file:
            file.write(model)
        subprocess.run(
            ['qemu-img', 'compare', '-q', '-f', 'raw', '-F', 'qcow2', raw,
             self.chains.node(uuid).path], check=True, timeout=60)

    def test_who_comes_as_the_last_one_leaves_opens_it(self) -> None:
        closing = threading.Event()

        class Slow(disks.Passed):
            def close(self) -> None:
                closing.set()
                time.sleep(CLOSES_S)
                super().close()

        self.chains.create(IDS[0], SIZE, 'qcow2')
        taps = Taps(lambda uuid, writable: Slow(
            self.chains.open_disk(uuid, writable)))
        leaving = threading.Thread(target=taps.open(IDS[0], False).close)
        leaving.start()
        closing.wait()
        with taps.open(IDS[0], True) as tap:
            self.write(tap)
        leaving.join()
        self.assertEqual([], taps.opened())
        self.is_true(IDS[0], self.model)

    def test_a_chain_is_split_and_merged_under_its_user(self) -> None:
        disk, base, snapshot, base2, snapshot2 = IDS[:5]
        self.chains.create(disk, SIZE, 'qcow2')
        with self.taps.open(disk, True) as tap:
            self.write(tap)
            old = bytes(self.model)
            self.chains.snapshot(disk, base, [snapshot])
            self.write(tap)
            middle = bytes(self.model)
            self.chains.snapshot(disk, base2, [snapshot2])
            self.write(tap)
            self.assertEqual(3, self.chains.depth(disk))
            self.is_true(snapshot, old)
            self.is_true(snapshot2, middle)
            self.assertTrue(self.chains.node(base).is_hidden)
            self.assertFalse(self.chains.node(snapshot).is_hidden)
            self.assertEqual([], [*gc.Pass(self.chains).steps()])
            self.chains.remove(snapshot)
            (step,) = gc.Pass(self.chains).steps()
            self.assertEqual((base2,), step.gone)
            self.assertTrue(self.chains.node(base).is_hidden)
            self.write(tap)
            self.chains.remove(snapshot2)
            (step,) = gc.Pass(self.chains).steps()
            self.assertEqual((base,), step.gone)
            self.assertEqual(1, self.chains.depth(disk))
            self.write(tap)
            tap.zero(100, MIB)
            self.model[100:100 + MIB] = bytes(MIB)
            self.assertEqual(self.model, tap.pread(0, SIZE))
        self.is_true(disk, self.model)
        node = self.chains.node(disk)
        self.assertFalse(node.is_hidden)
        told = json.loads(subprocess.run(
            ['qemu-img', 'check', '-f', 'qcow2', '--output=json', node.path],
            check=True, capture_output=True, timeout=60).stdout)
        self.assertEqual(0, told['check-errors'])

    def test_runs_are_told_of_the_chain_and_of_the_file(self) -> None:
        disk, base = IDS[:2]
        self.chains.create(disk, SIZE, 'qcow2')
        with self.chains.open_disk(disk, True) as opened:
            opened.pwrite(0, b'x' * 65536)
        self.chains.snapshot(disk, base)
        with self.chains.open_disk(disk, True) as opened:
            opened.pwrite(MIB, b'y' * 65536)
            self.assertEqual(
                [(0, 65536), (MIB, 65536)],
                [(run.offset_bytes, run.length_bytes)
                 for run in opened.extents() if not run.is_zero])
            self.assertEqual(
                [(MIB, 65536)],
                [(run.offset_bytes, run.length_bytes)
                 for run in opened.allocated() if not run.is_zero])

    def test_it_grows_beyond_what_a_vhd_can(self) -> None:
        disk = IDS[0]
        self.chains.create(disk, SIZE, 'qcow2')
        node = self.chains.grow(disk, 3 << 40)
        self.assertEqual(3 << 40, node.size_bytes)
        with self.chains.open_disk(disk, True) as opened:
            opened.pwrite((3 << 40) - 3, b'end')
            self.assertEqual(b'\0end', opened.pread((3 << 40) - 4, 4))

    def test_no_process_is_left(self) -> None:
        disk = IDS[0]
        self.chains.create(disk, SIZE, 'qcow2')
        opened = self.chains.open_disk(disk)
        process = opened._process
        with self.assertRaises(errors.Invalid):
            opened.pwrite(0, b'x')
        opened.close()
        self.assertEqual(0, process.returncode)

    def test_what_is_none_is_refused(self) -> None:
        path = os.path.join(self.directory, f'{IDS[0]}.qcow2')
        for content in b'', b'x' * 4096:
            with open(path, 'wb') as file:
                file.write(content)
            with self.assertRaises(errors.Invalid):
                self.chains.node(IDS[0])
            with self.assertRaises(errors.Unavailable):
                qcow2_disk.Qcow2().open(path)
        self.assertEqual({}, self.chains.nodes())
        with self.assertRaises(FileNotFoundError):
            qcow2_disk.Qcow2().open(path + 'x')

    def test_a_merge_can_be_stopped(self) -> None:
        with self.assertRaises(disks.Stopped):
            qcow2_disk.run('sleep', '30', stop=lambda: True)


if __name__ == '__main__':
    unittest.main()
