# SPDX-License-Identifier: Apache-2.0
"""Locks on this node that live as long as the last writer.

A database token fences rows, and nothing else: a ``qemu-img`` whose parent
was killed goes on writing. So whoever changes a volume holds an flock on the
volume's lock file, and every helper inherits its descriptor.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator, Sequence

from volume import errors

WAIT_S = 10.0


@contextlib.contextmanager
def hold(
    directory: str,
    exclusive: Sequence[str],
    shared: Sequence[str],
    wait_s: float = WAIT_S,
) -> Iterator[tuple[int, ...]]:
    """Hold the locks of all names, taken in order; yield the descriptors.

    :raises Unavailable: a holder could not be ended
    """
    os.makedirs(directory, 0o700, exist_ok=True)
    modes = {name: fcntl.LOCK_SH for name in shared}
    modes.update({name: fcntl.LOCK_EX for name in exclusive})
    with contextlib.ExitStack() as stack:
        yield tuple(
            _take(stack, os.path.join(directory, name), modes[name], wait_s)
            for name in sorted(modes)
        )


def forget(directory: str, name: str) -> None:
    """Remove the lock file of what no longer exists."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, name))


@contextlib.contextmanager
def alone(path: str, what: str) -> Iterator[None]:
    """Hold a lock for this process's life; nobody is killed for it.

    :raises Busy: another process has it
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            raise errors.Busy(
                f'{what} is in use by another process; end it first, or use '
                'another state_path'
            ) from taken
        yield
    finally:
        os.close(fd)


def _take(
    stack: contextlib.ExitStack, path: str, mode: int, wait_s: float
) -> int:
    deadline = time.monotonic() + wait_s
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            if time.monotonic() > deadline:
                raise errors.Unavailable(
                    f'{path} is still locked by {_holders(path)}'
                ) from None
            _end_holders(path)
            time.sleep(0.01)
            continue
        if _is_current(fd, path):
            stack.callback(os.close, fd)
            return fd
        os.close(fd)


def _is_current(fd: int, path: str) -> bool:
    """Say whether the name still means the file that we locked."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _holders(path: str) -> list[int]:
    """Return the processes other than this one that have the file open."""
    target = os.path.realpath(path)
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        if int(pid) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(f'/proc/{pid}/fd'):
                if os.readlink(f'/proc/{pid}/fd/{fd}') == target:
                    found.append(int(pid))
                    break
    return found


def _end_holders(path: str) -> None:
    for pid in _holders(path):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
