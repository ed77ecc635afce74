# SPDX-License-Identifier: Apache-2.0
"""Processes that outlive who started them, known again by their start.

A number alone may be another process's by now; with the boot and the moment
of its start it never is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import subprocess
from collections.abc import Sequence

from volume import concurrency
from volume import errors
from volume.commands import ENVIRONMENT
from volume.commands import meaning

BOOT_ID = '/proc/sys/kernel/random/boot_id'
KILL_S = 5.0

# Ours that were not seen to have ended; so no number is another's by now.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """A process of a node; ``started`` tells it from others of its number."""

    pid: int
    started: str


def start(argv: Sequence[str], log_path: str) -> Process:
    """Start it in a session of its own; its output is added to the log.

    It inherits nothing, no lock of ours either.

    :raises Unavailable: it is not installed
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        log = os.open(log_path, flags, 0o600)
    except OSError as failed:
        raise meaning(failed, f'open {log_path}') from failed
    try:
        child = concurrency.popen(
            argv, env=ENVIRONMENT, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )
    except FileNotFoundError as missing:
        raise errors.Unavailable(f'{argv[0]} is not installed') from missing
    except OSError as failed:
        raise meaning(failed, f'start {argv[0]}') from failed
    finally:
        os.close(log)
    if (former := _children.pop(child.pid, None)) is not None:
        # Somebody else has waited for that one. When it goes, Python would
        # wait for it by its number, which is the new one's now.
        former.returncode = 0
    _children[child.pid] = child
    # If it has ended already it is a zombie, and still has its start.
    return Process(child.pid, _started(child.pid))


def is_running(process: Process) -> bool:
    """Say whether this very process runs."""
    try:
        if _started(process.pid) != process.started:
            return False
        state = _state(process.pid)
        # A thread that writes may outlive the first one, which is shown.
        if state != 'X' and (state != 'Z' or _threads(process.pid) > 1):
            return True
    except (FileNotFoundError, ProcessLookupError):
        return False
    # One of our own that has ended is let go of.
    if process.pid in _children:
        _children.pop(process.pid).wait()
    return False


def end(process: Process, timeout_s: float) -> None:
    """Ask it to end, and kill it if it has not in that time.

    :raises Unavailable: it does not end, or may not be ended from here
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # The number is its own for as long as the descriptor is open.
        if not is_running(process):
            return
        for number, wait_s in (
            (signal.SIGTERM, timeout_s), (signal.SIGKILL, KILL_S),
        ):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
            if _ends(fd, wait_s):
                is_running(process)
                return
    except PermissionError as failed:
        raise errors.Unavailable(
            f'process {process.pid} is another user\'s: end it yourself'
        ) from failed
    finally:
        os.close(fd)
    raise errors.Unavailable(
        f'process {process.pid} does not end: it hangs in the kernel, '
        'perhaps in its storage'
    )


def _ends(fd: int, wait_s: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(wait_s))


def start_of(boot_id: str, stat: str) -> str:
    """Return what ``Process.started`` is, by what the kernel says of it."""
    return f'{boot_id.strip()} {_fields(stat)[19]}'


def _started(pid: int) -> str:
    with open(BOOT_ID, encoding='ascii') as f:
        return start_of(f.read(), _stat(pid))


def _state(pid: int) -> str:
    return _fields(_stat(pid))[0]


def _threads(pid: int) -> int:
    return len(os.listdir(f'/proc/{pid}/task'))


def _stat(pid: int) -> str:
    with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as f:
        return f.read()


def _fields(stat: str) -> list[str]:
    # Its name may have anything in it, up to the last bracket.
    return stat.rpartition(')')[2].split()
