# SPDX-License-Identifier: Apache-2.0
"""A lock that is handed over in the order in which it was asked for."""

from __future__ import annotations

import collections
import threading
from types import TracebackType
from typing import Any


class FifoLock:
    """First come, first served; far fairer than SQLite's busy wait.

    ``threads`` is the module whose threads share it: under eventlet those of
    ``threading`` are green, and wait for no native one.
    """

    def __init__(self, threads: Any = threading) -> None:
        self._threads = threads
        self._guard = threads.Lock()
        self._waiting: collections.deque[Any] = collections.deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            turn = self._threads.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # a signal's: nobody may wait for us
            with self._guard:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    raise
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
