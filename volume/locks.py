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
import pwd
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from volume import concurrency
from volume import errors

WAIT_S = 10.0


def end_holders(path: str) -> None:
    """End every other process that holds a lock."""
    for pid in _holders(path):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def hold(
    directory: str,
    exclusive: Sequence[str],
    shared: Sequence[str],
    wait_s: float = WAIT_S,
    grace_s: float = 0.0,
    end: Callable[[str], None] = end_holders,
) -> Iterator[tuple[int, ...]]:
    """Hold the locks of all names, taken in order; yield the descriptors.

    Another process that holds one is ended, after ``grace_s``: a neighbour
    that has just ended its job is about to let go by itself.

    :raises Unavailable: a holder could not be ended
    """
    os.makedirs(directory, 0o700, exist_ok=True)
    modes = {name: fcntl.LOCK_SH for name in shared}
    modes.update({name: fcntl.LOCK_EX for name in exclusive})
    with contextlib.ExitStack() as stack:
        yield tuple(
            _take(
                stack, os.path.join(directory, name), modes[name], wait_s,
                grace_s, end,
            )
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
    :raises Invalid: the directory is another user's, or cannot be written
    """
    check_owner(os.path.dirname(path))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as failed:
        raise errors.Invalid(
            f'{what} cannot be used: {path}: {failed.strerror}; see to its '
            'mount, its owner and its mode'
        ) from failed
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


def check_owner(directory: str) -> None:
    """Refuse to leave files in a directory whose owner could not use them.

    Above all: root's in that of the service's user.

    :raises Invalid: it belongs to another user
    """
    try:
        owner = os.stat(directory).st_uid
    except OSError:
        return  # there is none yet, or whoever uses it will say why not
    if owner == os.geteuid():
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f'#{owner}'
    raise errors.Invalid(
        f'{directory} belongs to user {name}, and this runs as another, '
        'whose files the service could not use: run it as that user, like '
        f'"runuser -u {name} -- volume-manage …"'
    )


def _take(
    stack: contextlib.ExitStack,
    path: str,
    mode: int,
    wait_s: float,
    grace_s: float,
    end: Callable[[str], None],
) -> int:
    started = time.monotonic()
    deadline = started + wait_s
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
            if time.monotonic() - started >= grace_s:
                concurrency.blocking(lambda: end(path))
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
    """Return the processes other than this one that hold the lock.

    Who has the file open without holding it is a neighbour that waits, too.
    """
    target = os.path.realpath(path)
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        if int(pid) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(f'/proc/{pid}/fd'):
                if os.readlink(f'/proc/{pid}/fd/{fd}') == target and (
                    _has_lock(f'/proc/{pid}/fdinfo/{fd}')
                ):
                    found.append(int(pid))
                    break
    return found


def _has_lock(fdinfo: str) -> bool:
    with open(fdinfo, encoding='utf-8') as f:
        return 'FLOCK' in f.read()
