# SPDX-License-Identifier: Apache-2.0
"""Trees of disks keep every byte: split, merged, and killed in between."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import tempfile
import threading
import time
import unittest
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests import vhds
from tests.integration import hostile_case
from tests.vhds import MIB
from volume import errors
from volume.sim.xapi.disk import chains as chains_module
from volume.sim.xapi.disk import disks
from volume.sim.xapi.disk import gc
from volume.sim.xapi.disk import raw_disk
from volume.sim.xapi.disk import vhd_disk
from volume.sim.xapi.sm.taps import Taps
from volume.transfer import vhd

SIZE = 4 * MIB
LOOKED = 8 * MIB


class Killed(BaseException):
    """The process ends here."""


class Deadly(disks.Kernel):
    """A kernel under which the process dies at the n-th change."""

    def __init__(self) -> None:
        self.left = -1
        self.calls = 0
        self.is_late = False

    def die_at(self, nth: int, is_late: bool) -> None:
        self.left, self.is_late, self.calls = nth, is_late, 0

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        self.calls += 1
        self.left -= 1
        if self.left == 0 and not self.is_late:
            raise Killed
        yield
        if self.left == 0:
            raise Killed

    def write(self, fd: int, parts: Sequence[Any], offset: int) -> None:
        data = b''.join(bytes(part) for part in parts)
        if len(data) > 4096 and self.left == 1 and not self.is_late:
            # Data may be torn; what lies in one page is not.
            super().write(fd, [data[:len(data) // 2]], offset)
        with self._change():
            super().write(fd, parts, offset)

    def punch(self, fd: int, offset: int, length: int) -> None:
        with self._change():
            super().punch(fd, offset, length)

    def truncate(self, fd: int, length: int) -> None:
        with self._change():
            super().truncate(fd, length)

    def rename(self, source: str, target: str) -> None:
        with self._change():
            super().rename(source, target)

    def remove(self, path: str) -> None:
        with self._change():
            super().remove(path)


class World:
    """A directory of disks, and what must be in them."""

    def __init__(self, directory: str, chance: random.Random) -> None:
        self.directory = directory
        self.chance = chance
        self.kernel = Deadly()
        self.model: dict[str, bytearray] = {}
        self.sizes: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        self.kernel.left = -1
        # Whoever opens disks asks us: there are others then.
        self.taps = Taps(lambda uuid, writable: self.chains.open_disk(
            uuid, writable))
        self.chains = chains_module.Chains(
            self.directory,
            [vhd_disk.Vhd(self.kernel), raw_disk.Raw(self.kernel)],
            users=self.taps, kernel=self.kernel,
        )

    def restart(self) -> None:
        """Come back after a death."""
        self.start()
        gc.Pass(self.chains).recover()
        left = [name for name in os.listdir(self.directory)
                if name.startswith('.') or name.endswith('.draft')]
        assert not left, left

    def id(self) -> str:
        return str(uuid.UUID(int=self.chance.getrandbits(128), version=4))

    def create(self, size: int = SIZE) -> str:
        new = self.id()
        self.chains.create(new, size, 'vhd')
        self.model[new] = bytearray(size)
        self.sizes[new] = size
        return new

    def write(self, which: str, count: int = 3) -> None:
        model = self.model[which]
        with self.taps.open(which, True) as disk:
            for _ in range(count):
                at = self.chance.randrange(len(model))
                data = self.chance.randbytes(min(
                    self.chance.choice((100, 4096, 70_000)),
                    len(model) - at))
                disk.pwrite(at, data)
                model[at:at + len(data)] = data

    def snapshot(self, origin: str) -> str:
        new = self.id()
        self.chains.snapshot(origin, self.id(), [new])
        self.born(new, origin)
        return new

    def born(self, new: str, origin: str) -> None:
        self.model[new] = bytearray(self.model[origin])
        self.sizes[new] = self.sizes[origin]

    def remove(self, which: str) -> None:
        self.chains.remove(which)
        del self.model[which]

    def grow(self, which: str, size: int) -> None:
        self.chains.grow(which, size)
        self.grown(which, size)

    def grown(self, which: str, size: int) -> None:
        self.sizes[which] = size
        model = self.model[which]
        model += bytes(max(0, min(size, LOOKED) - len(model)))

    def collect(self, **policy: Any) -> list[gc.Step]:
        return [*gc.Pass(self.chains, gc.Policy(**policy)).steps()]

    def check(self, test: unittest.TestCase) -> None:
        """Each disk is there and has its bytes, by two readers."""
        nodes = self.chains.nodes()
        test.assertEqual({*self.model}, {
            key for key, node in nodes.items() if not node.is_hidden})
        for key, model in self.model.items():
            with self.chains.open_disk(key) as disk:
                test.assertEqual(self.sizes[key], disk.size_bytes)
                test.assertTrue(model == disk.pread(0, len(model)), key)
            with contextlib.ExitStack() as stack:
                files = [
                    stack.enter_context(open(node.path, 'rb')) for node
                    in (nodes[key], *self.chains.parents(key))
                ]
                test.assertTrue(
                    model == vhd.Disk(files).read(LOOKED), key)


class Trees(unittest.TestCase):
    def setUp(self) -> None:
        self.chance = random.Random(hostile_case.seed(self.id()))
        self.world = self.new_world()

    def new_world(self) -> World:
        directory = self.enterContext(tempfile.TemporaryDirectory())
        return World(directory, self.chance)

    def test_a_snapshot_makes_a_hidden_base_and_two_leaves(self) -> None:
        world = self.world
        disk = world.create()
        world.write(disk)
        base, new = world.id(), world.id()
        made = world.chains.snapshot(disk, base, [new])
        self.assertEqual([new, base, disk], [node.uuid for node in made])
        self.assertEqual(
            [(base, False), ('', True), (base, False)],
            [(node.parent, node.is_hidden) for node in made])
        world.born(new, disk)
        for which in disk, new:
            self.assertEqual(2, world.chains.depth(which))
            world.write(which)
        world.check(self)
        self.assertEqual(
            {disk, new},
            {node.uuid for node in world.chains.children(base)})

    def test_depth_is_one_more_with_each_snapshot(self) -> None:
        world = self.world
        disk = world.create()
        for depth in range(1, 31):
            self.assertEqual(depth, world.chains.depth(disk))
            world.write(disk, 1)
            if depth < 30:
                world.chains.snapshot(disk, world.id())
        world.check(self)
        if not vhds.Libvhdi.missing():
            reader = vhds.Libvhdi(type(self))
            files = [world.chains.node(disk), *world.chains.parents(disk)]
            answer = reader.ask(*(node.path for node in files))
            self.assertEqual(
                hashlib.sha256(world.model[disk]).hexdigest(),
                answer['digest'])
        # No snapshot needs the bases: all become one file again.
        world.collect()
        self.assertEqual(1, world.chains.depth(disk))
        self.assertEqual(1, len(world.chains.nodes()))
        world.check(self)

    def test_what_cannot_be_done_is_refused(self) -> None:
        world = self.world
        disk, raw = world.create(), world.id()
        world.chains.create(raw, MIB, 'raw')
        with self.assertRaises(errors.Unsupported):
            world.chains.snapshot(raw, world.id(), [world.id()])
        with self.assertRaises(errors.Conflict):
            world.chains.create(disk, SIZE, 'vhd')
        with self.assertRaises(errors.Invalid):
            world.chains.grow(disk, MIB)
        with self.assertRaises(errors.NotFound):
            world.chains.node(world.id())
        with world.taps.open(disk, False):
            with self.assertRaises(errors.Busy):
                world.chains.remove(disk)
        world.chains.remove(world.id())
        world.chains.remove(raw)
        world.check(self)

    def test_a_split_that_fails_is_as_if_it_never_was(self) -> None:
        world = self.world
        disk = world.create()
        world.write(disk)

        class Full(vhd_disk.Vhd):
            def create(
                self, path: str, size_bytes: int, parent: str | None = None
            ) -> None:
                if 'fffffff0' in path:
                    raise OSError(28, 'no space')
                super().create(path, size_bytes, parent)

        world.chains.formats['vhd'] = Full(world.kernel)
        with self.assertRaises(OSError):
            world.chains.snapshot(
                disk, world.id(), [world.id(), 'fffffff0' + disk[8:]])
        world.check(self)
        self.assertEqual([], world.chains.journals())
        self.assertEqual(1, len(world.chains.nodes()))

    def test_users_go_on_through_snapshots_and_merges(self) -> None:
        """A guest writes while its chain is changed beneath it."""
        world = self.world
        disk = world.create()
        ended = threading.Event()
        model = world.model[disk]
        chance = random.Random(7)

        def write(tap: disks.Disk) -> None:
            while not ended.is_set():
                at = chance.randrange(SIZE - 9000)
                data = chance.randbytes(9000)
                tap.pwrite(at, data)
                model[at:at + 9000] = data
                if tap.pread(at, 9000) != data:
                    raise AssertionError(at)
                time.sleep(0)  # a greenthread yields to nobody else

        with world.taps.open(disk, True) as tap:
            thread = threading.Thread(target=write, args=(tap,))
            thread.start()
            try:
                for _ in range(6):
                    for _ in range(self.chance.randrange(1, 4)):
                        world.chains.snapshot(disk, world.id())
                    world.collect(live_bytes_max=self.chance.choice(
                        (0, SIZE, 20 * MIB)))
                    time.sleep(0)
            finally:
                ended.set()
                thread.join()
        world.collect()
        world.check(self)
        self.assertEqual(1, world.chains.depth(disk))

    def test_random_trees_keep_their_bytes(self) -> None:
        world = self.world
        world.create()
        for _ in range(60):
            which = self.chance.choice(sorted(world.model))
            act = self.chance.random()
            if act < 0.3:
                world.write(which)
            elif act < 0.6:
                world.snapshot(which)
            elif act < 0.7:
                world.grow(which, world.sizes[which] + 2 * MIB)
            elif act < 0.9 and len(world.model) > 1:
                world.remove(which)
            else:
                world.collect(live_bytes_max=self.chance.choice(
                    (1 << 16, 1 << 30)))
                world.check(self)
        world.collect()
        world.check(self)
        for which in sorted(world.model)[1:]:
            world.remove(which)
        world.collect()
        world.check(self)
        self.assertEqual(1, len(world.chains.nodes()))


class Deaths(unittest.TestCase):
    """The process dies at each change in turn; the next one goes on."""

    def setUp(self) -> None:
        self.chance = random.Random(hostile_case.seed(self.id()))

    def die_everywhere(
        self,
        prepare: Callable[[World], Any],
        act: Callable[[World, Any], Any],
        settle: Callable[[World, Any], Any] = lambda world, asked: None,
    ) -> int:
        for is_late in False, True:
            for nth in itertools.count(1):
                with tempfile.TemporaryDirectory() as directory:
                    world = World(directory, self.chance)
                    asked = prepare(world)
                    world.kernel.die_at(nth, is_late)
                    with contextlib.suppress(Killed):
                        act(world, asked)
                    calls = world.kernel.calls
                    if self.chance.random() < 0.5:
                        # And once more, while it recovers.
                        world.kernel.die_at(
                            self.chance.randrange(1, 9), is_late)
                        with contextlib.suppress(Killed):
                            gc.Pass(world.chains).recover()
                    world.restart()
                    with self.subTest(nth=nth, is_late=is_late):
                        settle(world, asked)
                        world.check(self)
                        for which in sorted(world.model):
                            world.write(which, 1)
                        world.collect()
                        world.check(self)
                    if calls < nth:
                        break
        return calls

    def test_of_a_snapshot(self) -> None:
        def prepare(world: World) -> tuple[str, str]:
            disk = world.create(2 * MIB)
            world.write(disk)
            return disk, world.id()

        def act(world: World, asked: tuple[str, str]) -> None:
            world.chains.snapshot(asked[0], world.id(), [asked[1]])

        def settle(world: World, asked: tuple[str, str]) -> None:
            if world.chains.has(asked[1]):
                world.born(asked[1], asked[0])

        self.assertGreater(self.die_everywhere(prepare, act, settle), 5)

    def test_of_growing(self) -> None:
        def prepare(world: World) -> str:
            disk = world.create(2 * MIB)
            world.write(disk)
            return disk

        def act(world: World, disk: str) -> None:
            world.chains.grow(disk, 280 * MIB)

        def settle(world: World, disk: str) -> None:
            size = world.chains.node(disk).size_bytes
            self.assertIn(size, (2 * MIB, 280 * MIB))
            world.grown(disk, size)

        self.assertGreater(self.die_everywhere(prepare, act, settle), 5)

    def test_of_the_collector(self) -> None:
        """A base of a smaller size, two leaves over the middle, garbage."""

        def prepare(world: World) -> None:
            first = world.create(2 * MIB)
            world.write(first)
            dead = world.snapshot(first)
            world.write(first)
            world.grow(first, 4 * MIB)
            world.write(first)
            world.snapshot(first)
            world.write(first)
            world.remove(dead)
            other = world.create(2 * MIB)
            world.write(other)
            world.snapshot(other)
            world.remove(other)
            other = world.create(2 * MIB)
            world.remove(world.snapshot(other))
            world.remove(other)

        def act(world: World, _: None) -> None:
            self.assertEqual(3, len(world.collect()))

        self.assertGreater(self.die_everywhere(prepare, act), 25)

    def test_of_writing(self) -> None:
        """What was not answered may be there or not, sector by sector."""
        for is_late in False, True:
            for nth in itertools.count(1):
                with tempfile.TemporaryDirectory() as directory:
                    world = World(directory, self.chance)
                    disk = world.create()
                    world.write(disk)
                    at, data = 2 * MIB - 9_999, b'new' * 10_000
                    with world.taps.open(disk, True) as tap:
                        tap.pwrite(at, b'old' * 10_000)
                        world.model[disk][at:at + 30_000] = b'old' * 10_000
                    world.snapshot(disk)
                    old = bytes(world.model[disk])
                    world.kernel.die_at(nth, is_late)
                    with contextlib.suppress(Killed):
                        with world.chains.open_disk(disk, True) as tap:
                            tap.pwrite(at, data)
                            tap.zero(100, 5000)
                            tap.zero(at + 4000, 20_000)
                    calls = world.kernel.calls
                    world.restart()
                    with world.chains.open_disk(disk) as tap:
                        found = tap.pread(0, SIZE)
                    self.assertEqual(old[5100:at], found[5100:at])
                    self.assertEqual(
                        old[at + 30_000:], found[at + 30_000:])
                    self.assertFalse(any(
                        byte not in (before, after) and (
                            byte or not 4000 <= index < 24_000)
                        for index, (byte, before, after) in enumerate(zip(
                            found[at:], old[at:], data, strict=False))
                    ))
                    world.model[disk] = bytearray(found)
                    world.check(self)
                    if calls < nth:
                        break


if __name__ == '__main__':
    unittest.main()
