# SPDX-License-Identifier: Apache-2.0
"""Long work below a flow: how far it is, whether it may go on, how fast.

A method of a driver that has bytes to write for hours (zeros over a disk)
says ``tell`` and ``pace`` as it goes, wherever in the call it is. The flow
has put a watch around the call with ``watching``; what the watch raises comes
out of ``tell`` and ends the work. Nobody watches in a test, or in ``check``:
then both do nothing.

The watch is found by a context variable, so that no signature has to carry
it. It is seen within ``node.blocking``. A thread that the driver starts
itself sees it only if it is started with ``contextvars.copy_context().run``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import time
from collections.abc import Callable, Iterator

from volume import concurrency

Watch = Callable[[int, int], None]
"""Called with bytes done and bytes in all; what it raises ends the work."""

TELL_S = 0.2
CREDIT_S = 1.0  # who was slower than the rate may catch up with so much


@contextlib.contextmanager
def watching(
    watch: Watch | None, rate_bytes_per_s: int = 0
) -> Iterator[None]:
    """Watch what is done in here, and let it go no faster than the rate.

    ``None`` watches nothing, also where an outer one would; 0 is no limit.
    """
    token = _current.set(_Watched(watch, rate_bytes_per_s))
    try:
        yield
    finally:
        _current.reset(token)


def tell(done_bytes: int, total_bytes: int) -> None:
    """Say how far the work is, as often as you like.

    What is raised here (that the job is cancelled, the service stops,
    another manager has it) is not to be caught: leave things so that the
    method can be called again.
    """
    watched = _current.get()
    if watched is not None:
        watched.done_bytes, watched.total_bytes = done_bytes, total_bytes
        watched.tell()


def pace(moved_bytes: int) -> None:
    """Wait as long as so many bytes, just written, must take.

    Raises what ``tell`` does. Small pieces are told and stopped sooner.
    """
    watched = _current.get()
    if watched is not None:
        watched.pace(moved_bytes)


class _Watched:
    """One watch and its rate."""

    def __init__(self, watch: Watch | None, rate_bytes_per_s: int) -> None:
        self.done_bytes = 0
        self.total_bytes = 0
        self._watch = watch
        self._rate = rate_bytes_per_s
        self._told_at = -TELL_S
        self._due_at = 0.0

    def tell(self) -> None:
        watch, now = self._watch, time.monotonic()
        if watch is None or now - self._told_at < TELL_S:
            return
        self._told_at = now
        done_bytes, total_bytes = self.done_bytes, self.total_bytes
        concurrency.waiting(lambda: watch(done_bytes, total_bytes))

    def pace(self, moved_bytes: int) -> None:
        if not self._rate:
            return
        self._due_at = moved_bytes / self._rate + max(
            self._due_at, time.monotonic() - CREDIT_S
        )
        while (left_s := self._due_at - time.monotonic()) > 0:
            concurrency.waiting(
                functools.partial(time.sleep, min(left_s, TELL_S)))
            if self.total_bytes:
                self.tell()


_current: contextvars.ContextVar[_Watched | None] = contextvars.ContextVar(
    'watched', default=None
)
