# SPDX-License-Identifier: Apache-2.0
"""How what runs a command is ended: it is asked, and then it is killed.

LVM heeds SIGTERM only where it can stop: it finishes what it has in hand.
Killed in the middle of it, it leaves devices suspended and metadata half
changed. So no command is killed before it was asked and had ``TERM_S`` to
end; most end at once.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Iterable, Iterator
from typing import IO

from volume import concurrency

TERM_S = 5.0
"""From SIGTERM to SIGKILL."""


def end_group(
    leader: int, pipes: Iterable[IO[bytes]], term_s: float = TERM_S
) -> None:
    """End a process of ours with all of its group that it has started.

    ``pipes`` have its output, which is thrown away: nobody who finishes
    what he has in hand may be stopped by a pipe that is full.
    """
    try:
        with contextlib.suppress(OSError):
            os.killpg(leader, signal.SIGTERM)
            _await(leader, pipes, time.monotonic() + term_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def _await(
    leader: int, pipes: Iterable[IO[bytes]], deadline: float
) -> None:
    """Wait until the group has ended, or the time is over."""
    known: set[int] = set()
    with contextlib.ExitStack() as stack, _selector(pipes) as selector:
        # What ends may have started something just before.
        while new := concurrency.blocking(
            lambda: set(_members(leader))
        ) - known:
            known |= new
            left = 0
            for pid in new:
                with contextlib.suppress(OSError):
                    fd = os.pidfd_open(pid)
                    stack.callback(os.close, fd)
                    selector.register(fd, selectors.EVENT_READ)
                    left += 1
            while left:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                left -= _hear(selector, left_s)


@contextlib.contextmanager
def _selector(
    pipes: Iterable[IO[bytes]],
) -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ, pipe)
        yield selector


def _hear(selector: selectors.BaseSelector, wait_s: float) -> int:
    """Wait for something to happen; return how many processes have ended."""
    count = 0
    for key, _ in selector.select(wait_s):
        pipe: IO[bytes] | None = key.data
        if pipe is None or not pipe.read(1 << 16):
            selector.unregister(key.fileobj)
            count += pipe is None
    return count


def _members(leader: int) -> Iterator[int]:
    """Yield the processes of a group, those that nobody waited for too."""
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError), open(
            f'/proc/{pid}/stat', encoding='utf-8', errors='replace'
        ) as f:
            # Its name may have anything in it, up to the last bracket.
            if f.read().rpartition(')')[2].split()[2] == str(leader):
                yield int(pid)
