# SPDX-License-Identifier: Apache-2.0
"""Guests write while their disks are split, merged, grown and deleted."""

import os
import random
import sys
import threading
import unittest

from tests import xapi
from tests.integration.xapi_storage_case import VdiCase

MIB = 1 << 20
ROUNDS = 150 if os.environ.get('VOLUME_PROOF') else 12
BLOCK = 4096
KEPT = 10  # a chain has an end


class Writer(threading.Thread):
    """A guest: it writes at random and knows what must be there."""

    def __init__(self, disk, seed):
        super().__init__()
        self.disk = disk
        self.random = random.Random(seed)
        self.wanted = bytearray(disk.size_bytes)
        self.lock = threading.Lock()
        self.ending = threading.Event()
        self.failed = None

    def run(self):
        try:
            while not self.ending.wait(0.002):
                at = self.random.randrange(len(self.wanted) // BLOCK) * BLOCK
                data = self.random.randbytes(BLOCK)
                with self.lock:
                    self.disk.pwrite(at, data)
                    self.wanted[at:at + BLOCK] = data
                where = self.random.randrange(len(self.wanted) - BLOCK)
                with self.lock:
                    found = self.disk.pread(where, BLOCK)
                    if found != self.wanted[where:where + BLOCK]:
                        raise AssertionError(f'other bytes at {where}')
        except BaseException as failed:
            self.failed = failed


class Busy(VdiCase):

    def busy(self, sr):
        seed = int(os.environ.get('VOLUME_SEED', '0')) or (
            random.randrange(1 << 32))
        print(f'seed {seed}', file=sys.stderr)
        # Everything is built from the seed; threads are not its part.
        manager = self.pool.sm.manager(sr)
        vdis = [self.vdi(sr, 8 * MIB) for _ in range(2)]
        writers = [
            Writer(manager.open(self.api.VDI.get_uuid(vdi), True), seed + at)
            for at, vdi in enumerate(vdis)]
        workers = [
            threading.Thread(target=self.work, args=(sr, vdi, writer, seed))
            for vdi, writer in zip(vdis, writers, strict=True)]
        self.problems = []
        for thread in writers + workers:
            thread.start()
        for thread in workers:
            thread.join()
        for writer in writers:
            writer.ending.set()
            writer.join()
            writer.disk.close()
        self.assertEqual([], self.problems)
        self.assertEqual([None, None], [writer.failed for writer in writers])
        self.collected(sr)
        for vdi, writer in zip(vdis, writers, strict=True):
            self.assertEqual(
                bytes(writer.wanted), self.read(vdi, 0, 8 * MIB))
        self.assertEqual(2, len(self.files(sr)))
        self.assertEqual(2, len(self.api.SR.get_VDIs(sr)))

    def work(self, sr, vdi, writer, seed):
        api = xapi.login(self, self.pool).xenapi
        chance = random.Random(seed)
        kept = []
        try:
            for _ in range(ROUNDS):
                verb = chance.choice(('snapshot', 'clone', 'drop', 'scan'))
                if len(kept) == KEPT:
                    verb = 'drop'
                if verb == 'scan':
                    api.SR.scan(sr)
                elif verb == 'drop' and kept:
                    self.drop(api, kept.pop(chance.randrange(len(kept))))
                elif verb in ('snapshot', 'clone'):
                    with writer.lock:
                        copy = getattr(api.VDI, verb)(vdi)
                        kept.append((copy, bytes(writer.wanted)))
            for one in kept:
                self.drop(api, one)
        except BaseException as failed:
            self.problems.append(failed)

    def drop(self, api, one):
        copy, wanted = one
        row = self.pool.rows.get('VDI', copy)
        with self.pool.sm.manager(row['SR']).open(row['uuid']) as disk:
            if disk.pread(0, 8 * MIB) != wanted:
                raise AssertionError(f'{copy} is not what it was')
        api.VDI.destroy(copy)

    def test_in_a_file_sr(self):
        self.busy(self.nfs())

    def test_in_a_volume_group(self):
        self.busy(self.lvm(4 << 30))


if __name__ == '__main__':
    unittest.main()
