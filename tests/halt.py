# SPDX-License-Identifier: Apache-2.0
"""Processes that stand still, as on a machine that is overloaded."""

from __future__ import annotations

import os
import signal
import time

WAIT_S = 60.0


def halt(pid: int) -> None:
    """Stop a process, and return when none of its threads runs any more.

    The signal alone is only sent: a thread on another processor may answer
    one more request before it has seen it.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + WAIT_S
    while not _stands(pid):
        assert time.monotonic() < deadline, f'process {pid} does not stop'
        time.sleep(0.001)


def _stands(pid: int) -> bool:
    states = set()
    for thread in os.listdir(f'/proc/{pid}/task'):
        try:
            with open(f'/proc/{pid}/task/{thread}/stat') as f:
                states.add(f.read().rpartition(')')[2].split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return states <= set('TtZX')
