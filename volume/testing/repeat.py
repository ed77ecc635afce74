# SPDX-License-Identifier: Apache-2.0
"""The driver fault suite: spoil every act of every method, then repeat it.

For each method of a driver, for each act of it on the machine, for each
fault: run the method, let the fault come up, call the method again; after a
crash by a new driver on the same storage. Then everything must be as if
nothing had happened: the same volumes and snapshots with the same bytes, and
nothing left once they are deleted. A second pass deletes at once, as a
flow's undo does.

A driver author subclasses ``DriverFaultSuite`` with ``unittest.TestCase``
and says how a driver is made over a given node; there is nothing else to
write.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base
from volume.testing import faults
from volume.testing import workbench
from volume.testing.workbench import fill
from volume.testing.workbench import pattern

Deed = Callable[[Any], object]

ACTS_MAX = 400

# Acts that only ask.
QUESTIONS = (
    'about ', 'allocated ', 'exists ', 'find ', 'is_block ', 'is_file ',
    'list ', 'probe ', 'rbd ask ', 'read ', 'readlink ', 'size ', 'space ',
    'run dmsetup status', 'run lvm ', 'run pvs ', 'run udevadm ',
    'qmp connect', 'qmp query-',
    'qmp x-debug-query-', 'xapi GET ', 'xapi event.', 'xapi nbd',
    'xapi session.', *(
        f'xapi {name}.get_' for name in (
            'PBD', 'SM', 'SR', 'VBD', 'VDI', 'VM', 'host', 'pool', 'task',
        )
    ),
)


class DriverFaultSuite(workbench.Case):
    """Every method of a driver may fail anywhere, and be called again."""

    size_bytes: ClassVar[int] = 2 * workbench.CHUNK_BYTES
    pool_name: ClassVar[str | None] = None

    is_thorough: ClassVar[bool] = True
    """Whether faults are tried that can hardly differ from their neighbours.

    To die before an act is to die after the one before it, and a question
    changes nothing: every other one is refused, and none is more. Of a lost
    reply, a death and a repetition, and a death and an undo, each act gets
    two in turn. That leaves a fifth of the runs: for drivers whose acts are
    slow.
    """

    @abc.abstractmethod
    def make_driver(self, node: faults.FaultyNode) -> base.Driver:
        """Return a driver over the node; the storage is always the same."""

    @abc.abstractmethod
    def make_node(self) -> faults.FaultyNode:
        """Return a node without a fault; its state directory is the same."""

    def leftovers(self) -> object:
        """Return what lies on the storage, beyond what ``scan`` shows.

        It must be equal before and after each run.
        """
        return None

    def setUp(self) -> None:
        super().setUp()
        driver: Any = self.start()
        pools = {pool.name: pool for pool in driver.pools()}
        self.pool = pools[self.pool_name or next(iter(pools))]
        grain = self.pool.granularity_bytes
        self.size = -(-self.size_bytes // grain) * grain
        self.bystander = self.new_volume()
        self.volume, self.other = self.new_volume(), self.new_volume()
        self.larger = self.new_volume(2 * self.size)
        self.snapshots = [
            model.Snapshot(ids.new(), self.volume, self.size)
            for _ in range(3)
        ]
        driver.create(self.bystander)
        fill(driver, self.bystander, pattern(99, self.size))
        self.empty = self.describe(driver), self.leftovers()
        self.addCleanup(lambda: self.start().delete(self.bystander))

    # The scenes: what there is, and what is done to it.

    def test_check(self) -> None:
        self.spoil(
            lambda d: self.make(d, self.volume, 1), lambda d: d.check()
        )

    def test_create(self) -> None:
        self.spoil(lambda d: None, lambda d: d.create(self.volume))

    def test_fill(self) -> None:
        self.spoil(
            lambda d: d.create(self.volume),
            lambda d: self.fill(d, self.volume, 2),
        )

    def test_read(self) -> None:
        self.spoil(
            lambda d: self.make(d, self.volume, 1),
            lambda d: workbench.content(d, self.volume),
        )

    def test_delete(self) -> None:
        self.spoil(
            lambda d: self.make(d, self.volume, 1),
            lambda d: d.delete(self.volume),
        )

    def test_inspect_scan_and_pools(self) -> None:
        self.spoil(
            lambda d: self.make(d, self.volume, 1),
            lambda d: (
                d.inspect(self.volume), list(d.scan(self.pool.name)),
                [pool.name for pool in d.pools()],
            ),
        )

    def test_adopt(self) -> None:
        self.need(base.Adopt)

        def prepare(driver: Any) -> None:
            self.make(driver, self.volume, 1)
            self.handle = self.disown(driver)

        self.spoil(prepare, lambda d: d.adopt(self.handle, self.other))

    def test_disown(self) -> None:
        self.need(base.Adopt)
        self.spoil(
            lambda d: self.make(d, self.volume, 1),
            lambda d: d.disown(self.volume),
        )

    def test_clone_of_a_volume(self) -> None:
        self.need(base.Clone)
        self.spoil(
            lambda d: self.make(d, self.volume, 1),
            lambda d: d.clone(self.volume, self.other),
        )

    def test_larger_clone_of_a_snapshot(self) -> None:
        self.need(base.Clone, base.Snapshots)
        self.spoil(
            self.two_snapshots,
            lambda d: d.clone(self.snapshots[0], self.larger),
        )

    def test_delete_of_a_clone_s_origin(self) -> None:
        self.need(base.Clone)

        def prepare(driver: Any) -> None:
            self.make(driver, self.volume, 1)
            driver.clone(self.volume, self.other)

        self.spoil(prepare, lambda d: d.delete(self.volume))

    def test_describe(self) -> None:
        self.need(base.Describe)
        self.spoil(
            lambda d: self.make(d, self.volume, 1),
            lambda d: d.describe(self.volume, {'name': 'new'}),
        )

    def test_flatten(self) -> None:
        self.need(base.Flatten, base.Clone)

        def prepare(driver: Any) -> None:
            self.make(driver, self.volume, 1)
            driver.clone(self.volume, self.larger)

        self.spoil(
            prepare, lambda d: d.flatten(self.larger, lambda percent: None)
        )

    def test_map_and_unmap(self) -> None:
        self.need(base.LocalDevice)

        def work(driver: Any) -> None:
            driver.map(self.volume, model.Access.WRITE)
            driver.unmap(self.volume)

        self.spoil(lambda d: self.make(d, self.volume, 1), work)

    def test_resize(self) -> None:
        self.need(base.Resize)
        self.spoil(
            lambda d: self.make(d, self.volume, 1),
            lambda d: d.resize(self.volume, 2 * self.size),
        )

    def test_revert(self) -> None:
        self.need(base.Revert, base.Snapshots)
        self.spoil(
            self.two_snapshots, lambda d: d.revert(self.snapshots[0])
        )

    def test_revert_that_died_is_whole_or_says_that_it_is_not(self) -> None:
        self.need(base.Revert, base.Snapshots)
        grows = 'Resize' in self.pool.features
        volume = self.larger if grows else self.volume
        snapshot = model.Snapshot(
            ids.new(), dataclasses.replace(volume, size_bytes=self.size),
            self.size)
        before = pattern(3, volume.size_bytes)
        after = pattern(1, self.size).ljust(volume.size_bytes, b'\0')

        def play(fault: faults.Fault | None) -> list[str]:
            driver: Any = self.start()
            driver.create(snapshot.volume)
            self.fill(driver, snapshot.volume, 1)
            driver.snapshot(snapshot)
            if grows:
                driver.resize(volume, volume.size_bytes)
            fill(driver, volume, before)
            node = self.make_node()
            driver = self.make_driver(node)
            driver.check()
            node.arm(fault)
            with contextlib.suppress(faults.Crash):
                driver.revert(snapshot)
            driver = self.start()
            is_torn = driver.inspect(volume).is_torn
            self.assertFalse(is_torn and fault is None, 'it has ended')
            if not is_torn:
                self.assertTrue(
                    workbench.content(driver, volume) in (
                        (before, after) if fault else (after,)),
                    f'{fault}: the volume is neither as before nor reverted')
            driver.delete_snapshot(snapshot)
            self.clear(f'{fault}')
            return node.trace

        for nth, act in enumerate(play(None), 1):
            if not act.startswith(QUESTIONS):
                play(faults.Fault('crash', nth, is_late=True))

    def test_snapshot(self) -> None:
        self.need(base.Snapshots)
        self.spoil(
            self.two_snapshots, lambda d: d.snapshot(self.snapshots[2])
        )

    def test_delete_snapshot(self) -> None:
        self.need(base.Snapshots)

        def prepare(driver: Any) -> None:
            self.two_snapshots(driver)
            if 'Clone' in self.pool.features:
                driver.clone(self.snapshots[0], self.other)

        for snapshot in self.snapshots[:2]:
            with self.subTest(snapshot=self.snapshots.index(snapshot)):
                def delete(driver: Any, which: Any = snapshot) -> None:
                    driver.delete_snapshot(which)

                self.spoil(prepare, delete)

    def test_upkeep(self) -> None:
        self.need(base.Upkeep)

        def prepare(driver: Any) -> None:
            if {'Snapshots', 'Clone'} <= self.pool.features:
                self.two_snapshots(driver)
                driver.clone(self.snapshots[1], self.other)
                for snapshot in self.snapshots[:2]:
                    driver.delete_snapshot(snapshot)

        self.spoil(
            prepare, lambda d: workbench.tend(d, self.pool.name)
        )

    # How a scene is played.

    def spoil(self, prepare: Deed, deed: Deed) -> None:
        """Do the deed with each fault, repeat it, and compare."""
        node = self.make_node()
        driver = self.make_driver(node)
        driver.check()
        prepare(driver)
        node.arm(None)
        deed(driver)
        acts = node.trace
        self.assert_durable(acts)
        wanted = self.describe(driver)
        self.clear('undisturbed')
        for nth in range(1, ACTS_MAX):
            if self.is_idle(nth, acts):
                continue
            came_up = ''
            for fault in faults.every(nth):
                if self.is_worth(fault, came_up):
                    came_up = self.play(fault, prepare, deed, wanted)
            if not came_up:
                self.assertGreater(nth, 1, 'the deed does not use the node')
                return
        self.fail(f'over {ACTS_MAX} acts')

    def is_worth(self, fault: faults.Fault, act: str) -> bool:
        """Say whether to try a fault of this act; the first always is."""
        if self.is_thorough or not act:
            return True
        if fault.kind == 'refused' or act.startswith(QUESTIONS):
            return False
        return fault.is_late and (fault.kind, fault.nth % 3) != ('lost', 0)

    def is_idle(self, nth: int, acts: list[str]) -> bool:
        """Say whether to pass over an act: every other question."""
        return (
            not self.is_thorough and nth % 2 == 0 and nth < len(acts)
            and acts[nth - 1].startswith(QUESTIONS)
        )

    def ways(self, fault: faults.Fault) -> list[bool]:
        """Return how the scene goes on: repeated (False), undone (True)."""
        if fault.kind != 'crash':
            return [False]
        if self.is_thorough or fault.nth % 3 == 0:
            return [False, True]
        return [fault.nth % 3 == 1]

    def play(
        self, fault: faults.Fault, prepare: Deed, deed: Deed, wanted: object
    ) -> str:
        """Play the scene once with a repetition, and once with an undo.

        Return the act that was spoilt; nothing if the deed ended before.
        """
        for is_undone in self.ways(fault):
            prepare(self.start())
            node = self.make_node()
            driver = self.make_driver(node)
            driver.check()
            node.arm(fault)
            with contextlib.suppress(faults.Crash, errors.VolumeError):
                deed(driver)
            words = f'{fault}, acts {node.trace}, undone: {is_undone}'
            act = node.trace[fault.nth - 1] if node.fired else ''
            if not is_undone:
                if fault.kind == 'crash':
                    driver = self.start()
                node.arm(None)
                try:
                    deed(driver)
                except errors.VolumeError as failed:
                    raise AssertionError(f'{words}: {failed!r}') from failed
                self.assertEqual(wanted, self.describe(driver), words)
            self.clear(words)
        return act

    def assert_durable(self, trace: list[str]) -> None:
        """Fail if a file was written and never synced."""
        opened, unsynced = set(), set()
        for verb, _, name in (act.partition(' ') for act in trace):
            if verb == 'open':
                opened.add(name)  # what was not is written whole, durably
            elif verb in ('write', 'truncate', 'punch'):
                unsynced |= {name} & opened
            elif verb in ('sync', 'unlink'):
                unsynced.discard(name)
                if verb == 'unlink':
                    opened.discard(name)  # it goes with its descriptor
        self.assertEqual(set(), unsynced, f'not durable: {trace}')

    def start(self) -> Any:
        """Return a driver as it is after the service has started anew."""
        driver = self.make_driver(self.make_node())
        driver.check()
        return driver

    def clear(self, words: str) -> None:
        """Delete all but the bystander; nothing else may be left."""
        driver = self.start()
        known = {
            found.handle for found in driver.scan(self.pool.name)
            if found.id is None
        }
        for handle in known:
            volume = self.new_volume()
            driver.adopt(handle, volume)
            driver.delete(volume)
        for snapshot in self.snapshots:
            if isinstance(driver, base.Snapshots):
                driver.delete_snapshot(snapshot)
        for volume in self.larger, self.other, self.volume:
            if isinstance(driver, base.LocalDevice):
                driver.unmap(volume)
            driver.delete(volume)
        workbench.tend(driver, self.pool.name)
        left = self.describe(driver), self.leftovers()
        self.assertEqual(self.empty, left, words)

    def describe(self, driver: Any) -> list[tuple[Any, ...]]:
        """Return all that a user can know of the pool, with the bytes."""
        return sorted(
            (
                found.id or '', found.snapshot_of or '', found.size_bytes,
                sorted(found.sidecar.items()), self.bytes_of(driver, found),
            )
            for found in driver.scan(self.pool.name)
        )

    def bytes_of(self, driver: Any, found: model.Found) -> int:
        """Return a figure that differs if the bytes do."""
        if found.id is None:
            return 0
        volume = model.Volume(
            found.snapshot_of or found.id, self.pool.name, found.size_bytes
        )
        source: workbench.Source = volume
        if found.snapshot_of:
            source = model.Snapshot(found.id, volume, found.size_bytes)
        return hash(workbench.content(driver, source))

    # What scenes are made of.

    def need(self, *features: type) -> None:
        for feature in features:
            if feature.__name__ not in self.pool.features:
                self.skipTest(f'no {feature.__name__}')

    def new_volume(self, size_bytes: int | None = None) -> model.Volume:
        return model.Volume(ids.new(), self.pool.name, size_bytes or self.size)

    def make(self, driver: Any, volume: model.Volume, seed: int) -> None:
        driver.create(volume)
        self.fill(driver, volume, seed)

    def fill(self, driver: Any, volume: model.Volume, seed: int) -> None:
        fill(driver, volume, pattern(seed, volume.size_bytes))

    def two_snapshots(self, driver: Any) -> None:
        """Make the volume with two snapshots, each of other bytes."""
        for seed, snapshot in enumerate(self.snapshots[:2], 1):
            if seed == 1:
                driver.create(self.volume)
            self.fill(driver, self.volume, seed)
            driver.snapshot(snapshot)
        self.fill(driver, self.volume, 3)

    def disown(self, driver: Any) -> str:
        driver.disown(self.volume)
        handle, = (
            found.handle for found in driver.scan(self.pool.name)
            if found.id is None
        )
        return str(handle)
