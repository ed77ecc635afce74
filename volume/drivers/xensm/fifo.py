# SPDX-License-Identifier: Apache-2.0
"""A queue for each SR: first come, first served, few in flight.

The server makes one change of an SR at a time, and lets whoever comes
meanwhile wait at random for up to twenty seconds a try. Waiting here is
shorter, in order, and ends when the caller's patience does.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator

from volume import errors


class Queue:
    """Lets ``limit`` through at once."""

    def __init__(self, limit: int, what: str) -> None:
        self._free = limit
        self._what = what
        self._guard = threading.Lock()
        self._waiting: collections.deque[threading.Event] = (
            collections.deque()
        )

    @contextlib.contextmanager
    def turn(self, wait_s: float = 600.0) -> Iterator[None]:
        """Wait for a turn, and have it within the context.

        :raises Unavailable: there was none in time
        """
        self._enter(wait_s)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, wait_s: float) -> None:
        with self._guard:
            if self._free and not self._waiting:
                self._free -= 1
                return
            mine = threading.Event()
            self._waiting.append(mine)
        if mine.wait(wait_s):
            return
        with self._guard:
            if mine.is_set():
                return  # it came at the last moment
            self._waiting.remove(mine)
        raise errors.Unavailable(
            f'{self._what}: other changes have kept it busy for '
            f'{wait_s:g} s'
        )

    def _leave(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()  # the turn is handed over
            else:
                self._free += 1
