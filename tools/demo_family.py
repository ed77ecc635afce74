# SPDX-License-Identifier: Apache-2.0
"""Every process that descends from this one, and no other.

A service that is killed leaves children behind, and its block daemon is made
to outlive it. This process takes in what is orphaned below it (as init would
otherwise), so that at the end it can end all of them, each by its pid.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from demo_screen import Failed

PR_SET_CHILD_SUBREAPER = 36
REAP_INTERVAL_S = 0.1
TERM_S = 10.0
KILL_S = 10.0
COMMAND_S = 300.0
# Tools of /usr/sbin are not on an ordinary user's path.
ENVIRONMENT = {
    **os.environ,
    'LC_ALL': 'C.UTF-8',
    'PATH': f'{os.environ.get("PATH", "")}:/usr/sbin:/sbin',
}


class Family:
    """Starts processes, reaps orphans, and ends whatever is left."""

    def __init__(self) -> None:
        # Between a fork and the note of its pid nothing may be reaped: the
        # exit code of a child of ours would be lost.
        self._lock = threading.Lock()
        self._ours: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._reap, daemon=True)

    def __enter__(self) -> Family:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise Failed('this kernel does not let a process adopt orphans')
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        ended = (
            self._all_end(signal.SIGTERM, TERM_S)
            or self._all_end(signal.SIGKILL, KILL_S)
        )
        self._stop.set()
        self._thread.join()
        if not ended:
            left = ', '.join(map(str, descendants(os.getpid())))
            raise Failed(f'processes that do not end: {left}')

    def start(
        self,
        *argv: str,
        stdout: IO[bytes] | int = subprocess.PIPE,
        stderr: IO[bytes] | int = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own: Ctrl-C is for us alone.

        :raises Failed: it is not installed
        """
        try:
            with self._lock:
                child = subprocess.Popen(
                    argv, env=ENVIRONMENT, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                )
                self._ours.add(child.pid)
        except FileNotFoundError:
            raise Failed(f'{argv[0]} is not installed') from None
        return child

    def run(
        self, *argv: str, codes: Sequence[int] = (0,)
    ) -> tuple[int, str]:
        """Run a command; return its exit code and all that it said.

        :raises Failed: the exit code is none of those
        """
        child = self.start(*argv, stderr=subprocess.STDOUT)
        output, _ = child.communicate(timeout=COMMAND_S)
        said = output.decode(errors='replace').strip()
        if child.returncode not in codes:
            raise Failed(
                f'{" ".join(argv)}: exit code {child.returncode}\n{said}'
            )
        return child.returncode, said

    # Ours alone.

    def _reap(self) -> None:
        me = os.getpid()
        while not self._stop.wait(REAP_INTERVAL_S):
            with self._lock:
                for pid, parent, state in _processes():
                    if parent == me and state == 'Z':
                        self._reap_orphan(pid)

    def _reap_orphan(self, pid: int) -> None:
        if pid not in self._ours:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _all_end(self, number: signal.Signals, limit_s: float) -> bool:
        """Send a signal to every descendant; say if they ended by it."""
        deadline = time.monotonic() + limit_s
        told: set[int] = set()
        while alive := set(descendants(os.getpid())):
            for pid in alive - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            told |= alive
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def descendants(ancestor: int) -> Iterator[int]:
    """Yield the pids of all that a process has started, and they have."""
    children: dict[int, list[int]] = {}
    for pid, parent, state in _processes():
        if state != 'Z':
            children.setdefault(parent, []).append(pid)
    left = list(children.get(ancestor, ()))
    while left:
        pid = left.pop()
        yield pid
        left += children.get(pid, ())


def _processes() -> Iterator[tuple[int, int, str]]:
    """Yield pid, parent and state of each process."""
    for name in os.listdir('/proc'):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            with open(f'/proc/{name}/stat', 'rb') as f:
                # The second field is a name in brackets, and may hold any.
                fields = f.read().rpartition(b')')[2].split()
            yield int(name), int(fields[1]), fields[0].decode()
