# SPDX-License-Identifier: Apache-2.0
"""One thing at a time on this host, among threads and processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator

from volume import errors

LOCK_S = 120.0
POLL_S = 0.05

_threads: dict[str, threading.Lock] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def alone(directory: str, name: str, said: str) -> Iterator[None]:
    """Hold the lock of a name; the kernel lets go of it if we die.

    :raises Busy: another has it for too long; ``said`` is what it does
    """
    path = os.path.join(directory, name)
    with _guard:
        lock = _threads.setdefault(path, threading.Lock())
    if not lock.acquire(timeout=LOCK_S):
        raise _taken(said)
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        with open(path, 'wb') as f:
            _flock(f.fileno(), said)
            yield
    finally:
        lock.release()


def _flock(fd: int, said: str) -> None:
    """Wait for the lock of another process on this host."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _taken(said) from None
            time.sleep(POLL_S)
        else:
            return


def _taken(said: str) -> errors.Busy:
    return errors.Busy(f'{said} for {LOCK_S:g} s')
