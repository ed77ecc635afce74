# SPDX-License-Identifier: Apache-2.0
"""The services that are measured: their configuration, start and end.

As a command it starts or ends what a directory holds, for a benchmark that
wants to see a start: ``bench_service.py start|stop DIRECTORY``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from demo_screen import Failed

BIN = os.path.dirname(sys.executable)
START_S = 60.0
STOP_S = 90.0
POLL_S = 0.005
PLAN = 'plan.json'


class Stack:
    """One or more service processes in a directory of their own."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.pids = os.path.join(directory, 'pids')

    def configure(self, files: Mapping[str, str], port: int) -> None:
        """Write the configuration file of each process."""
        os.makedirs(self.pids, exist_ok=True)
        for name, words in files.items():
            with open(self._path(f'{name}.conf'), 'w') as f:
                f.write(words)
        with open(self._path(PLAN), 'w') as f:
            json.dump({'processes': list(files), 'port': port}, f)

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self._plan()["port"]}/v3'

    def start(self) -> None:
        """Return when every process runs and the API listens."""
        for name in self._plan()['processes']:
            with open(self._path(f'{name}.log'), 'ab') as log:
                child = subprocess.Popen(
                    [os.path.join(BIN, 'volume-service'), '--config-file',
                     self._path(f'{name}.conf')],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )
            with open(os.path.join(self.pids, f'{name}.pid'), 'w') as f:
                f.write(str(child.pid))
        deadline = time.monotonic() + START_S
        port = int(self._plan()['port'])
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(('127.0.0.1', port), 1).close()
                return
            time.sleep(POLL_S)
        raise Failed(f'no service listens on port {port}: {self.log()}')

    def stop(self) -> None:
        """End every process, the first to start last."""
        for name in reversed(self._plan()['processes']):
            path = os.path.join(self.pids, f'{name}.pid')
            with contextlib.suppress(FileNotFoundError):
                with open(path) as f:
                    _end(int(f.read()))
                os.unlink(path)

    def log(self) -> str:
        """Return the end of what the processes have said."""
        said = ''
        for name in self._plan()['processes']:
            with contextlib.suppress(FileNotFoundError):
                with open(self._path(f'{name}.log'), errors='replace') as f:
                    said += f'{name}: {f.read()[-1000:]}\n'
        return said

    def _plan(self) -> dict[str, Any]:
        with open(self._path(PLAN)) as f:
            plan: dict[str, Any] = json.load(f)
        return plan

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as end:
        end.bind(('127.0.0.1', 0))
        return int(end.getsockname()[1])


def _end(pid: int) -> None:
    deadline = time.monotonic() + STOP_S
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    while _lives(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _lives(pid: int) -> bool:
    # Ours, or an orphan that somebody else reaps: a zombie has ended.
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    with contextlib.suppress(FileNotFoundError):
        with open(f'/proc/{pid}/stat', 'rb') as f:
            return f.read().rpartition(b')')[2].split()[0] != b'Z'
    return False


if __name__ == '__main__':
    stack = Stack(sys.argv[2])
    {'start': stack.start, 'stop': stack.stop}[sys.argv[1]]()
