# SPDX-License-Identifier: Apache-2.0
"""Every flow survives every fault of every call.

For each scenario and driver the n-th call to the machine is refused, loses
its reply, or is where the process dies, before and after its effect; n
grows until the fault no longer comes up. Then a new process recovers.

With ``VOLUME_PROOF=1`` each call gets all six faults. Without it the process
dies in each state of storage and database in which it can, and of the other
four faults a call gets one, in turn: another at the next call, in the next
scenario and with the next driver, and the same in each run.
"""

from __future__ import annotations

import abc
import contextlib
import os
import re
import shutil
import tempfile
import unittest
from collections.abc import Iterator

import sqlalchemy

from tests.fault import scenarios
from tests.fault.world import CALLER
from tests.fault.world import World
from volume.blockd import Blockd
from volume.db import models
from volume.node import Node
from volume.testing import faults
from volume.testing import fixtures
from volume.verbs import attachments
from volume.verbs import snapshots
from volume.verbs import volumes

PROOF = bool(os.environ.get('VOLUME_PROOF'))
LOOKS = re.compile(
    '(exists|is_file|size|allocated|space|list|read|readlink|probe) '
    r'|qmp (connect|query-|x-debug-query-)'
    r'|xapi (\w+\.get_|event\.|nbd|session\.|GET )|rbd ask '
)


def chosen(
    trace: list[str], written: set[int], turn: int, is_all: bool = PROOF
) -> Iterator[faults.Fault]:
    """Yield the faults that are played; in a proof run these are all.

    A call that only looks has no effect to come before or after: one refusal
    stands for all six, and to die at it is to die before or after another.
    """
    effect = 0
    for nth, what in enumerate(trace, 1):
        every = [*faults.every(nth)]
        if is_all:
            yield from every
        elif LOOKS.match(what):
            yield faults.Fault('refused', nth, False)
        else:
            replies = [fault for fault in every if fault.kind != 'crash']
            yield replies[(nth + turn) % len(replies)]
            # Rows were written since the last effect, or nothing was done
            # yet: else to die now is to have died after that.
            if not effect or written & {*range(effect, nth)}:
                yield faults.Fault('crash', nth, False)
            yield faults.Fault('crash', nth, True)
            effect = nth


class ChosenTest(unittest.TestCase):
    """What a run that is no proof leaves out."""

    TRACE = ['size a', 'write a', 'sync a', 'exists b', 'write b']

    @unittest.skipIf(PROOF, 'all are played')
    def test_the_process_dies_once_in_each_state(self):
        for written, deaths in (
            (set(), [(2, False), (2, True), (3, True), (5, True)]),
            ({2}, [(2, False), (2, True), (3, False), (3, True), (5, True)]),
            ({4}, [(2, False), (2, True), (3, True), (5, False), (5, True)]),
        ):
            self.assertEqual(deaths, [
                (fault.nth, fault.is_late)
                for fault in chosen(self.TRACE, written, 0)
                if fault.kind == 'crash'
            ])

    @unittest.skipIf(PROOF, 'all are played')
    def test_in_four_turns_each_call_gets_each_other_fault(self):
        played = [
            fault for turn in range(7, 11)
            for fault in chosen(self.TRACE, set(), turn)
            if fault.kind != 'crash'
        ]
        for nth in 2, 3, 5:
            self.assertEqual(
                {each for each in faults.every(nth) if each.kind != 'crash'},
                {each for each in played if each.nth == nth},
            )
        for nth in 1, 4:
            self.assertIn(faults.Fault('refused', nth, False), played)


@contextlib.contextmanager
def noting_writes(world: World, after: set[int]) -> Iterator[None]:
    """Add the numbers of calls to the node after which rows were written."""
    def note(connection: sqlalchemy.Connection) -> None:
        if connection.get_execution_options()['volume_write']:
            after.add(world.node.calls)

    sqlalchemy.event.listen(world.db.engine, 'commit', note)
    try:
        yield
    finally:
        sqlalchemy.event.remove(world.db.engine, 'commit', note)


class FlowFaults(abc.ABC):
    """One test a scenario; a driver adds its section."""

    exporter = 'nbd'
    daemon = ''
    turn = 0
    plays_all = PROOF

    @abc.abstractmethod
    def section(self) -> str:
        """Return the driver's lines of the configuration."""

    def world(self) -> World:
        return World(
            self, f'{self.section()}\nexporter = {self.exporter}',
            blockd=self.exporter == 'nbd', daemon=self.daemon,
        )

    def survive(self, scenario: type[scenarios.Scenario]) -> None:
        written: set[int] = set()
        trace = self.one(scenario, None, written)
        self.assertTrue(trace, 'no call of the node was counted')
        turn = scenarios.SCENARIOS.index(scenario) + self.turn
        for fault in chosen(trace, written, turn, self.plays_all):
            with self.subTest(fault=str(fault), at=trace[fault.nth - 1]):
                self.one(scenario, fault, set())

    def one(
        self, scenario: type[scenarios.Scenario], fault: faults.Fault | None,
        written: set[int],
    ) -> list[str]:
        """Run the scenario with a fault; return what the node did.

        After which of its calls rows were written is added to ``written``.
        """
        if scenario.exporter not in (None, self.exporter):
            self.skipTest(f'no exporter {scenario.exporter}')
        world = self.world()
        try:
            run = scenario(world)
            missing = scenario.needs - set(
                world.backends['b'].pools[world.pool()].features
            )
            if missing:
                self.skipTest(f'no {", ".join(sorted(missing))}')
            run.prepare()
            self.assertEqual([], world.disagreements())
            world.node.arm(fault)
            with noting_writes(world, written), world.surviving():
                run.act()
            trace = world.node.trace
            world.restart()
            where = f'{fault} in {trace}'
            self.assertEqual([], world.disagreements(), where)
            run.verify()
            self.assertEqual([], world.disagreements(), where)
            self.clean_up(world)
            return trace
        except BaseException:
            if world.node.blockd:
                world.node.arm(None)
                world.node.blockd.stop()
            raise
        finally:
            shutil.rmtree(world.directory, ignore_errors=True)

    def clean_up(self, world: World) -> None:
        """Delete everything, and find the storage empty."""
        for row in world.all(models.Attachment):
            attachments.delete(world.core, CALLER, row.id)
        for row in world.live(models.Snapshot).values():
            snapshots.delete(world.core, CALLER, row.id, force=True)
        for row in world.live(models.Volume).values():
            volumes.delete(world.core, CALLER, row.id, force=True)
        self.assertEqual({}, world.live(models.Volume))
        self.assertEqual(set(), world.stored())
        self.assertEqual([], world.disagreements())
        if world.node.blockd:
            self.assertEqual(frozenset(), world.node.blockd.open_files())


def _add_tests() -> None:
    for scenario in scenarios.SCENARIOS:
        words = ''.join(
            f'_{c.lower()}' if c.isupper() else c for c in scenario.__name__
        )

        def test(self, scenario=scenario) -> None:
            self.survive(scenario)

        test.__name__ = f'test{words}_survives_every_fault'
        setattr(FlowFaults, test.__name__, test)


_add_tests()


class FileFaults(FlowFaults, unittest.TestCase):
    """The file driver where the file system has reflink."""

    exporter = 'local'

    def section(self) -> str:
        directory = fixtures.reflink_directory(self)
        return f'driver = file\ndirectories = {directory}'


class PlainFileFaults(FlowFaults, unittest.TestCase):
    """The file driver without reflink: clones are copies."""

    exporter = 'local'
    turn = 1

    def section(self) -> str:
        directory = fixtures.plain_directory(self)
        return f'driver = file\ndirectories = {directory}'


class QcowFaults(FlowFaults, unittest.TestCase):
    """The qcow driver, attached through the storage daemon."""

    turn = 2

    @classmethod
    def setUpClass(cls) -> None:
        # One for all worlds; each leaves nothing open in it.
        state = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        cls.addClassCleanup(shutil.rmtree, state, ignore_errors=True)
        cls.daemon = os.path.join(state, 'blockd')
        cls.addClassCleanup(Blockd(Node(state), cls.daemon).stop)

    def section(self) -> str:
        directory = fixtures.plain_directory(self)
        return f'driver = qcow\ndirectories = {directory}'
