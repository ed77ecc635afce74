# SPDX-License-Identifier: Apache-2.0
"""The collector comes when it should, stops when told, and says what it did.

That it keeps every byte is told in test_xapi_chains.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tests.integration import hostile_case
from tests.unit import test_xapi_chains
from tests.vhds import MIB
from volume import errors
from volume.sim.xapi.disk import gc
from volume.sim.xapi.disk import vhd_disk

WAIT_S = 30.0


class Asked:
    """Knows what is paused, and when."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.all: set[str] = set()
        self.relinked: list[bool] = []

    def opened(self) -> list[str]:
        return []

    @contextlib.contextmanager
    def paused(self, uuids: Iterable[str]) -> Iterator[None]:
        self.held = {*uuids}
        self.all |= self.held
        yield
        self.held = set()


class Passes(unittest.TestCase):
    def setUp(self) -> None:
        directory = self.enterContext(tempfile.TemporaryDirectory())
        self.world = test_xapi_chains.World(
            directory, random.Random(hostile_case.seed(self.id())))

    def chain(self, depth: int) -> tuple[str, list[str]]:
        """Return a disk and its snapshots, the oldest first."""
        disk, made = self.world.create(), []
        for _ in range(depth - 1):
            self.world.write(disk)
            made.append(self.world.snapshot(disk))
        self.world.write(disk)
        return disk, made

    def test_a_pass_tells_what_is_gone_and_what_differs(self) -> None:
        world = self.world
        disk, (old, young) = self.chain(3)
        top, bottom = (node.uuid for node in world.chains.parents(disk))
        self.assertFalse(gc.Pass(world.chains).has_work())
        self.assertEqual([], world.collect())
        world.remove(old)
        self.assertTrue(gc.Pass(world.chains).has_work())
        (step,) = world.collect()
        self.assertEqual((top,), step.gone)
        told = {node.uuid: node.parent for node in step.changed}
        self.assertEqual({bottom: '', disk: bottom, young: bottom}, told)
        world.check(self)
        world.remove(young)
        (step,) = world.collect()
        self.assertEqual((bottom,), step.gone)
        (node,) = step.changed
        self.assertEqual(
            (disk, '', False), (node.uuid, node.parent, node.is_hidden))
        world.remove(disk)
        self.assertEqual([], world.collect())
        self.assertEqual([], os.listdir(world.directory))

    def test_what_nobody_needs_is_removed_from_the_top(self) -> None:
        world = self.world
        disk, made = self.chain(4)
        for which in (*made, disk):
            world.remove(which)
        self.assertEqual(3, len(world.chains.nodes()))
        gone = [uuid for step in world.collect() for uuid in step.gone]
        self.assertEqual(3, len(gone))
        self.assertEqual([], os.listdir(world.directory))

    def test_what_is_switched_off_is_left(self) -> None:
        world = self.world
        disk, (old, young) = self.chain(3)
        world.remove(old)
        world.remove(young)
        self.assertEqual([], world.collect(coalesce=False))
        world.collect(leaf_coalesce=False)
        self.assertEqual(2, world.chains.depth(disk))
        self.assertEqual([], world.collect(
            may_leaf=lambda uuid: uuid != disk))
        self.assertEqual(2, world.chains.depth(disk))
        world.collect()
        self.assertEqual(1, world.chains.depth(disk))
        world.check(self)

    def test_without_room_nothing_is_merged_and_it_is_told(self) -> None:
        world = self.world
        disk = world.create()
        world.remove(world.snapshot(disk))
        (base,) = world.chains.parents(disk)
        with world.taps.open(disk, True) as tap:
            tap.pwrite(3 * MIB, b'x')
            world.model[disk][3 * MIB] = ord('x')
        told: list[Any] = []
        extra = vhd_disk.Vhd().extra_bytes(
            world.chains.node(disk).path, base.path)
        self.assertGreater(extra, 0)
        world.collect(
            room=lambda: extra - 1,
            told=lambda *words: told.append(words))
        self.assertEqual([(44, disk, extra)], told)
        self.assertEqual(2, world.chains.depth(disk))
        world.collect(room=lambda: extra)
        self.assertEqual(1, world.chains.depth(disk))
        world.check(self)

    def test_a_large_disk_is_merged_by_rounds(self) -> None:
        world = self.world
        disk, (old,) = self.chain(2)
        world.remove(old)
        with world.taps.open(disk, True):
            steps = world.collect(live_bytes_max=1 << 16)
        self.assertEqual(1, world.chains.depth(disk))
        self.assertTrue(any(len(step.changed) == 2 for step in steps))
        world.check(self)

    def test_a_disk_that_only_grows_is_left_alone(self) -> None:
        world = self.world
        disk, (old,) = self.chain(2)
        world.remove(old)
        told: list[Any] = []
        policy = gc.Policy(
            live_bytes_max=1 << 16, told=lambda *words: told.append(words))
        for count, step in enumerate(gc.Pass(world.chains, policy).steps()):
            self.assertLess(count, 50)
            if not step.gone:
                # Its user writes more than was merged.
                with world.taps.open(disk, True) as tap:
                    data = bytes([count + 1]) * (4 * MIB)
                    tap.pwrite(0, data)
                    world.model[disk][:] = data
        self.assertEqual([(204, disk)], [words[:2] for words in told])
        world.check(self)

    def test_a_merge_that_is_stopped_is_done_the_next_time(self) -> None:
        world = self.world
        disk, made = self.chain(3)
        world.remove(made[0])
        asked = 0

        def aborted() -> bool:
            nonlocal asked
            asked += 1
            return asked > 2

        self.assertEqual([], [*gc.Pass(
            world.chains, aborted=aborted).steps()])
        self.assertEqual([], world.chains.journals())
        self.assertEqual(3, world.chains.depth(disk))
        world.check(self)
        world.collect()
        self.assertEqual(2, world.chains.depth(disk))
        world.check(self)

    def test_nobody_opens_a_disk_whose_chain_is_changed(self) -> None:
        """It could find a parent that is just removed."""
        world = self.world
        disk, made = self.chain(4)
        world.remove(made[0])
        users = Asked()
        world.chains.users = users

        class Watched(vhd_disk.Vhd):
            def relink(self, path: str, parent: str) -> None:
                users.relinked.append(
                    os.path.basename(path)[:36] in users.held)
                super().relink(path, parent)

        world.chains.formats['vhd'] = Watched()
        self.assertEqual(1, len(world.collect()))
        self.assertEqual([True, True], users.relinked)
        self.assertLess({*made[1:], disk}, users.all)

    def test_a_base_copy_that_is_open_is_not_touched(self) -> None:
        world = self.world
        disk, made = self.chain(3)
        world.remove(made[0])
        (top, bottom) = world.chains.parents(disk)
        for node in top, bottom:
            with world.taps.open(node.uuid, False):
                self.assertEqual([], world.collect())
        self.assertEqual(1, len(world.collect()))


class Threads(unittest.TestCase):
    """A collector of numbers: what it does is not its own matter."""

    def setUp(self) -> None:
        self.left: list[int] = []
        self.done: list[int] = []
        self.delay_s = 0.0
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails: Exception | None = None
        self.collector: gc.Collector[int] = gc.Collector(
            self.work, lambda: bool(self.left), self.done.append,
            lambda: self.delay_s)
        self.addCleanup(self.collector.abort)

    def work(self, aborted: Callable[[], bool]) -> Iterator[int]:
        if self.fails:
            raise self.fails
        while self.left and not aborted():
            self.entered.set()
            self.go_on.wait(WAIT_S)
            if aborted():
                return
            yield self.left.pop(0)

    def test_the_first_pass_comes_at_once_and_the_next_does_not(self) -> None:
        self.delay_s = 3600.0
        self.left = [1, 2]
        self.collector.kick()
        self.assertTrue(self.collector.wait(WAIT_S))
        self.assertEqual([1, 2], self.done)
        self.left = [3]
        self.collector.kick()
        late = time.monotonic() + WAIT_S
        while self.collector.state != 'waiting' and time.monotonic() < late:
            time.sleep(0.001)
        self.assertFalse(self.collector.wait(0.05))
        self.assertEqual('waiting', self.collector.state)
        self.assertEqual([1, 2], self.done)
        # The clock goes on.
        self.delay_s = 0.0
        self.collector.wake()
        self.assertTrue(self.collector.wait(WAIT_S))
        self.assertEqual([1, 2, 3], self.done)
        self.assertEqual('idle', self.collector.state)

    def test_without_work_there_is_no_thread(self) -> None:
        self.collector.kick()
        self.assertTrue(self.collector.wait(WAIT_S))
        self.left = [1]
        self.collector.kick()
        self.assertTrue(self.collector.wait(WAIT_S))
        self.assertEqual([1], self.done)

    def test_what_is_paused_goes_on_later(self) -> None:
        self.collector.pause()
        self.left = [1, 2]
        self.collector.kick()
        self.assertFalse(self.collector.wait(0.05))
        self.assertEqual([], self.done)
        self.go_on.clear()
        self.collector.resume()
        self.assertTrue(self.entered.wait(WAIT_S))
        self.collector.pause()
        self.go_on.set()
        self.assertFalse(self.collector.wait(0.05))
        self.assertEqual([], self.done)
        self.collector.resume()
        self.assertTrue(self.collector.wait(WAIT_S))
        self.assertEqual([1, 2], self.done)

    def test_an_abort_ends_a_pass_and_all_to_come(self) -> None:
        self.left = [1]
        self.go_on.clear()
        self.collector.kick()
        self.assertTrue(self.entered.wait(WAIT_S))
        with self.assertRaises(errors.Unavailable):
            self.collector.abort(0.05)
        self.go_on.set()
        self.collector.abort(WAIT_S)
        self.collector.kick()
        self.assertTrue(self.collector.wait(WAIT_S))
        self.assertEqual([], self.done)

    def test_an_abort_ends_the_wait_as_well(self) -> None:
        for how in 'delay', 'pause':
            self.setUp()
            if how == 'pause':
                self.collector.pause()
            else:
                self.collector.kick()
                self.assertTrue(self.collector.wait(WAIT_S))
                self.left = [1]
                self.collector.kick()
                self.assertTrue(self.collector.wait(WAIT_S))
                self.delay_s = 3600.0
            self.left = [2]
            self.collector.kick()
            self.collector.abort(WAIT_S)
            self.assertEqual([2], self.left)

    def test_what_fails_is_told_and_done_again_when_asked(self) -> None:
        self.left = [1]
        self.fails = OSError('the storage is gone')
        self.collector.kick()
        self.assertTrue(self.collector.wait(WAIT_S))
        self.assertEqual('the storage is gone', self.collector.last_error)
        self.fails = None
        self.collector.kick()
        self.assertTrue(self.collector.wait(WAIT_S))
        self.assertEqual([1], self.done)
        self.assertEqual('', self.collector.last_error)


if __name__ == '__main__':
    unittest.main()
