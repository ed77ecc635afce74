# SPDX-License-Identifier: Apache-2.0
"""Forty snapshots in a row, where the server allows chains of thirty."""

from __future__ import annotations

import os
import random
import time
import unittest
from typing import Any

from tests import xensm
from tests.integration import hostile_case
from volume import errors
from volume import ids
from volume import model
from volume.drivers.xensm import chains
from volume.drivers.xensm import vdis
from volume.sim.xapi.sm.host import SmHost
from volume.testing import fixtures
from volume.testing import workbench
from volume.testing.workbench import pattern

proof = unittest.skipUnless(
    os.environ.get('VOLUME_PROOF'), 'VOLUME_PROOF is not set: a long run')
SIZE = 2 * model.MIB
COUNT = 40
MERGED_S = 60.0


class Chains(xensm.SharedPool):
    by_nbd = True
    switches = {'gc_delay_s': 0.05}

    def setUp(self) -> None:
        self.chance = random.Random(hostile_case.seed(self.id()))
        self.driver = self.xensm(fixtures.make_node(self))
        self.driver.check()
        self.pool, = self.driver.pools()
        self.volume = model.Volume(ids.new(), self.pool.name, SIZE)
        self.seeds: dict[model.Snapshot, int] = {}

    def fill(self, seed: int) -> None:
        workbench.fill(self.driver, self.volume, pattern(seed, SIZE))

    def take(self, seed: int) -> model.Snapshot:
        self.fill(seed)
        snapshot = model.Snapshot(ids.new(), self.volume, SIZE)
        self.driver.snapshot(snapshot)
        self.seeds[snapshot] = seed
        return snapshot

    def check_bytes(self) -> None:
        for snapshot, seed in self.seeds.items():
            self.assertEqual(
                pattern(seed, SIZE), workbench.content(self.driver, snapshot),
                f'snapshot {seed}',
            )

    def chain(self) -> chains.Chain:
        """Return what the server says of the volume's chain."""
        with xensm.session(self.simulator) as xenapi:
            found = [
                vdis.Vdi.of(ref, record) for ref, record
                in xenapi.VDI.get_all_records().items()
            ]
        mine, = (vdi for vdi in found if vdi.id == self.volume.id)
        return chains.of(mine, found)

    def used(self) -> int:
        """Return what the pool says is used."""
        pool, = self.driver.pools()
        self.assertGreaterEqual(pool.free_bytes, 0)
        self.assertLessEqual(pool.free_bytes, pool.total_bytes)
        return pool.total_bytes - pool.free_bytes

    def pause_merging(self, is_paused: bool) -> None:
        self.simulator.faults.gc_paused = is_paused
        self.simulator.part(SmHost).gc_changed()

    def clear(self) -> None:
        self.pause_merging(False)
        for snapshot in list(self.seeds):
            self.driver.delete_snapshot(snapshot)
        self.driver.delete(self.volume)

    def test_forty_are_taken_and_deleted_in_any_order(self) -> None:
        self.addCleanup(self.clear)
        self.driver.create(self.volume)
        for seed in range(COUNT):
            self.take(seed)
            self.assertLessEqual(self.chain().depth, chains.LIMIT)
        self.fill(COUNT)
        self.check_bytes()
        full = self.used()
        order = list(self.seeds)
        self.chance.shuffle(order)
        for number, snapshot in enumerate(order):
            self.driver.delete_snapshot(snapshot)
            del self.seeds[snapshot]
            self.driver.upkeep(self.pool.name)
            self.assertLessEqual(self.used(), full + 8 * SIZE)
            if number % 10 == 9:
                self.check_bytes()
        self.assertEqual(
            pattern(COUNT, SIZE),
            workbench.content(self.driver, self.volume),
        )
        self.wait_merged()
        self.assertLess(self.used(), full)

    def test_snapshot_waits_with_its_reason_for_what_will_be_merged(
        self,
    ) -> None:
        self.addCleanup(self.clear)
        self.driver.create(self.volume)
        taken = []
        while self.chain().depth < chains.LIMIT:
            taken.append(self.take(len(taken)))
        self.pause_merging(True)
        for snapshot in taken[5:10]:
            self.driver.delete_snapshot(snapshot)
            del self.seeds[snapshot]
        late = model.Snapshot(ids.new(), self.volume, SIZE)
        before = self.chain()
        with self.assertRaisesRegex(errors.Busy, 'merged by the server'):
            self.driver.snapshot(late)
        self.assertEqual(before, self.chain())
        self.pause_merging(False)
        deadline = time.monotonic() + MERGED_S
        while True:
            try:
                self.driver.snapshot(late)
                break
            except errors.Busy:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.1)
        self.seeds[late] = len(taken) - 1
        self.check_bytes()

    @proof
    def test_clone_at_the_limit_is_a_copy(self) -> None:
        self.addCleanup(self.clear)
        self.driver.create(self.volume)
        while self.chain().depth < chains.LIMIT:
            self.take(len(self.seeds))
        clone = model.Volume(ids.new(), self.pool.name, 2 * SIZE)
        self.addCleanup(self.driver.delete, clone)
        self.driver.clone(self.volume, clone)
        seed = len(self.seeds) - 1
        self.assertEqual(
            pattern(seed, SIZE) + bytes(SIZE),
            workbench.content(self.driver, clone),
        )
        self.check_bytes()

    def wait_merged(self) -> None:
        """Wait until the server has merged what can be."""
        deadline = time.monotonic() + MERGED_S
        while (chain := self.chain()).depth > 2:
            self.assertLess(time.monotonic(), deadline, str(chain))
            self.driver.upkeep(self.pool.name)
            time.sleep(0.1)


class NfsChainsTest(Chains, unittest.TestCase):
    """On files."""


@proof
class LvmChainsTest(Chains, unittest.TestCase):
    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return xensm.lvmoiscsi_sr(pool)


