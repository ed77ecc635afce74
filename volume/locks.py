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
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from volume import concurrency
from volume import errors
from volume.endings import TERM_S

WAIT_S = 10.0
PAUSE_S = 0.01
LOOK_S = 0.1
"""Between two looks at who holds a lock, which take a while."""
FLAGS = re.compile(r'^flags:\s*([0-7]+)$', re.MULTILINE)

MayEnd = Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def hold(
    directory: str,
    exclusive: Sequence[str],
    shared: Sequence[str],
    wait_s: float = WAIT_S,
    grace_s: float = 0.0,
    may_end: MayEnd = contextlib.nullcontext,
) -> Iterator[dict[str, int]]:
    """Hold the locks of all names, taken in order; yield the descriptors.

    The last is of an exclusive lock, if there is one: a command may keep no
    other (``commands.run``), and one that is shared stops few.

    Another process that holds one is ended, after ``grace_s``: a neighbour
    that has just ended its job is about to let go by itself. ``may_end`` is
    entered whenever somebody is to be ended, and raises if nobody may be.

    :raises Unavailable: a holder could not be ended, ``wait_s`` after that
    """
    os.makedirs(directory, 0o700, exist_ok=True)
    modes = {name: fcntl.LOCK_SH for name in shared}
    modes.update({name: fcntl.LOCK_EX for name in exclusive})
    with contextlib.ExitStack() as stack:
        taken = {
            name: _take(
                stack, modes[name], wait_s, grace_s,
                _Holders(os.path.join(directory, name), may_end),
            )
            for name in sorted(modes)
        }
        yield {
            name: taken[name]
            for name in sorted(taken, key=lambda name: name in exclusive)
        }


@contextlib.contextmanager
def borrow(
    path: str, wait_s: float, check: Callable[[], None]
) -> Iterator[int]:
    """Hold the lock file of another program; yield the descriptor.

    Nobody is ended for it. ``check`` is called while it waits, and ends
    that by raising.

    :raises Unavailable: it is still held after that time, or cannot be had
    """
    late = time.monotonic() + wait_s
    try:
        while (fd := _try(path, fcntl.LOCK_EX)) is None:
            check()
            if time.monotonic() > late:
                raise errors.Unavailable(
                    f'{path} is still locked by {_told(_holders(path))}'
                )
            time.sleep(PAUSE_S)
    except OSError as failed:
        raise errors.Unavailable(
            f'{path} cannot be locked: {failed.strerror}'
        ) from failed
    try:
        yield fd
    finally:
        os.close(fd)


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


class _Holders:
    """Who keeps us waiting for a lock, and is to end.

    A command is asked first, and finishes what it has in hand: we wait, and
    begin nothing beside it. Whoever has taken the lock himself is a service
    or an agent, whose time is over: he is killed at once, and so is what is
    stopped, as it would never hear.
    """

    def __init__(self, path: str, may_end: MayEnd) -> None:
        self.path = path
        self._may_end = may_end
        self._looked_at = -LOOK_S
        self._asked: dict[int, float] = {}

    def end(self) -> None:
        """Ask those that were not asked, and kill those that had time."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        with self._may_end():
            for pid, has_inherited in _holders(self.path).items():
                with contextlib.suppress(OSError):
                    asked_at = self._asked.get(pid)
                    if not has_inherited or _is_stopped(pid) or (
                        asked_at is not None and now - asked_at >= TERM_S
                    ):
                        os.kill(pid, signal.SIGKILL)
                    elif asked_at is None:
                        self._asked[pid] = now
                        os.kill(pid, signal.SIGTERM)


def _take(
    stack: contextlib.ExitStack,
    mode: int,
    wait_s: float,
    grace_s: float,
    holders: _Holders,
) -> int:
    path = holders.path
    grace_ends_at = time.monotonic() + grace_s
    while (fd := _try(path, mode)) is None:
        now = time.monotonic()
        if now > grace_ends_at + wait_s:
            raise errors.Unavailable(
                f'{path} is still locked by {_told(_holders(path))}'
            )
        if now >= grace_ends_at:
            concurrency.blocking(holders.end)
        time.sleep(PAUSE_S)
    stack.callback(os.close, fd)
    return fd


def _try(path: str, mode: int) -> int | None:
    """Return the descriptor of the lock, or None if others hold it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
            if _is_current(fd, path):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_current(fd: int, path: str) -> bool:
    """Say whether the name still means the file that we locked."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _holders(path: str) -> dict[int, bool]:
    """Return the processes other than this one that hold the lock.

    And whether each has inherited it. Who has the file open without holding
    it is a neighbour that waits, too.
    """
    target = os.path.realpath(path)
    found: dict[int, bool] = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        if int(pid) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(f'/proc/{pid}/fd'):
                if os.readlink(f'/proc/{pid}/fd/{fd}') != target:
                    continue
                with open(f'/proc/{pid}/fdinfo/{fd}', encoding='utf-8') as f:
                    text = f.read()
                if 'FLOCK' in text:
                    # What is inherited has survived an exec.
                    found[int(pid)] = found.get(int(pid), True) and not (
                        int(FLAGS.findall(text)[0], 8) & os.O_CLOEXEC
                    )
    return found


def _is_stopped(pid: int) -> bool:
    with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as f:
        return f.read().rpartition(')')[2].split()[0] in 'Tt'


def _told(holders: Mapping[int, bool]) -> str:
    pids = ', '.join(map(str, holders))
    return f'process {pids}' if pids else 'another job of this process'
