# SPDX-License-Identifier: Apache-2.0
"""Faults at the one door to the machine: refused, reply lost, died.

``FaultyNode`` counts what a driver does to the world and spoils the n-th of
it. A test runs with n = 1, 2, 3 … until the run ends without the fault
having come up: so every place is tried, without any knowledge of the code.

    for nth in itertools.count(1):
        node = faults.FaultyNode(state_dir, faults.Fault('crash', nth, late))
        with contextlib.suppress(faults.Crash, errors.VolumeError):
            work(node)
        recover_and_compare()
        if not node.fired:
            break
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from volume import errors
from volume.node import Node

T = TypeVar('T')


class Crash(BaseException):
    """The process died here; no handler of errors may catch this."""


KINDS: dict[str, type[BaseException]] = {
    'refused': errors.Unavailable,
    'lost': errors.Unknown,
    'crash': Crash,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong at the ``nth`` act, before or after its effect.

    ``only`` counts nothing but acts that start with this word (``rename``,
    ``run``). It prints as the line by which a test can be repeated.
    """

    kind: str
    nth: int
    is_late: bool
    only: str = ''

    def error(self, what: str) -> BaseException:
        return KINDS[self.kind](f'injected at act {self.nth}: {what}')


def every(nth: int) -> Iterator[Fault]:
    """Yield all six faults of one act."""
    for kind, is_late in itertools.product(KINDS, (False, True)):
        yield Fault(kind, nth, is_late)


class FaultyNode(Node):
    """A node that spoils one act; after a crash it does nothing more.

    ``calls`` counts the acts since it was armed, ``trace`` names them,
    ``fired`` says whether the fault came up.
    """

    def __init__(self, state_dir: str, fault: Fault | None = None) -> None:
        super().__init__(state_dir)
        self._mutex = threading.Lock()
        self.arm(fault)

    def arm(self, fault: Fault | None) -> None:
        """Count from here; no fault is to count only."""
        self.fault = fault
        self.calls = 0
        self.trace: list[str] = []
        self.fired = False
        self.is_dead = False

    def act(self, what: str, effect: Callable[[], T]) -> T:
        with self._mutex:
            if self.is_dead:
                raise Crash(f'the process is dead: {what}')
            fault = self._count(what)
        if fault is None:
            return effect()
        try:
            if fault.is_late:
                effect()
        except errors.VolumeError:
            pass  # its reply is lost like any other
        raise fault.error(what)

    def _count(self, what: str) -> Fault | None:
        """Note the act; return the fault if this is the one to spoil."""
        fault = self.fault
        if fault and not what.startswith(fault.only):
            return None
        self.calls += 1
        self.trace.append(what)
        if fault is None or self.calls != fault.nth:
            return None
        self.fired = True
        self.is_dead = fault.kind == 'crash'
        return fault
