# SPDX-License-Identifier: Apache-2.0
"""SIGKILL for one process in the middle of its work.

It is found by descent, ended by its pid, and by nothing else: other services
may run on the machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Collection

from crash_report import Kill
from crash_rows import Row
from demo_family import descendants
from service_process import ServiceProcess

TARGETS = ('service', 'daemon', 'helper')
# All three in one moment, as when a machine dies; but what was written stays
# in the kernel's cache.
ALL = 'all'
ENDS_SERVICE = frozenset({'service', ALL})
ENDS_DAEMON = frozenset({'daemon', ALL})
# As the kernel keeps their names: fifteen bytes.
NAMES = {'daemon': 'qemu-storage-daemon'[:15], 'helper': 'qemu-img'}
FIND_S = 30.0
PROVOKE_S = 2.0
LOOK_S = 0.01


def plan(chance: random.Random, kills: int) -> list[str]:
    """Return whom to kill, in order: everybody has a turn."""
    targets = list(TARGETS)
    chance.shuffle(targets)
    targets = targets[:kills] + [
        chance.choice((*TARGETS, ALL)) for _ in range(kills - len(TARGETS))
    ]
    chance.shuffle(targets)
    return targets


def kill(
    target: str,
    service: ServiceProcess,
    chance: random.Random,
    provoke: Callable[[], None],
    open_jobs: Callable[[], list[Row]],
) -> Kill | None:
    """Kill one; ``provoke`` gives it something to do if it is not there.

    Return None if it did not come.
    """
    if target in ENDS_SERVICE:
        done = Kill(target, time.time(), service.pid, 'volume-service')
        service.kill()
        if target == ALL:
            for pid in descendants(os.getpid()):
                _kill_pid(pid, _name(pid), NAMES.values())
    else:
        found = _kill_one(NAMES[target], chance, provoke)
        if found is None:
            return None
        done = Kill(target, *found)
    jobs = [
        row for row in open_jobs() if row['created_at'] <= done.at
    ]
    done.jobs = [row['id'] for row in jobs]
    done.in_flight = [row['kind'] for row in jobs]
    return done


def _kill_one(
    name: str, chance: random.Random, provoke: Callable[[], None]
) -> tuple[float, int, str] | None:
    deadline = time.monotonic() + FIND_S
    provoked_at = -PROVOKE_S
    while time.monotonic() < deadline:
        pids = [
            pid for pid in descendants(os.getpid()) if _name(pid) == name
        ]
        if not pids:
            # A helper may live shorter than it takes us to look.
            if time.monotonic() - provoked_at >= PROVOKE_S:
                provoke()
                provoked_at = time.monotonic()
            time.sleep(LOOK_S)
            continue
        copies = [pid for pid in pids if 'convert' in _words(pid)]
        # What copies has more to lose than what makes an empty file.
        likely = copies if copies and chance.random() < 0.8 else pids
        pid = chance.choice(likely)
        words = _words(pid)
        at = time.time()
        if _kill_pid(pid, name, [name]):
            return at, pid, words
    return None


def _kill_pid(pid: int, name: str, names: Collection[str]) -> bool:
    """Kill a process of one of these names; say whether it was there."""
    if name not in names:
        return False
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            # The number could be another's by now; the descriptor not.
            if _name(pid) == name:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                return True
        finally:
            os.close(fd)
    return False


def _name(pid: int) -> str:
    try:
        with open(f'/proc/{pid}/comm') as f:
            return f.read().strip()
    except OSError:
        return ''


def _words(pid: int) -> str:
    """Return what it was started for."""
    try:
        with open(f'/proc/{pid}/cmdline', 'rb') as f:
            words = f.read().split(b'\0')[:2]
    except OSError:
        return ''
    return b' '.join(words).decode(errors='replace')
