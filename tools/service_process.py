# SPDX-License-Identifier: Apache-2.0
"""The real service in a process of its own: start, ask, kill, start again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from demo_family import Family
from demo_screen import Failed

from volume.cli.client import Client

T = TypeVar('T')
Json = dict[str, Any]

START_S = 30.0
STOP_S = 30.0
WAIT_S = 120.0
LOOK_S = 0.02
LOG_LINES = 30


class ServiceProcess:
    """``volume-service`` in a directory, where each backend has its own."""

    def __init__(
        self,
        family: Family,
        directory: str,
        configuration: str,
        backends: tuple[str, ...],
    ) -> None:
        self.directory = directory
        self.url = ''
        self.client = Client()
        self._family = family
        self._process: subprocess.Popen[bytes] | None = None
        for name in backends:
            os.mkdir(self.path(name))
        with open(self.path('volume.conf'), 'w') as f:
            f.write(configuration)

    def path(self, *names: str) -> str:
        """Return the path of a file of the service's directory."""
        return os.path.join(self.directory, *names)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it serves.

        :raises Failed: it does not
        """
        with (
            open(self.path('service.out'), 'wb') as out,
            open(self.path('service.log'), 'ab') as log,
        ):
            self._process = self._family.start(
                command_path('volume-service'),
                '--config-file', self.path('volume.conf'),
                stdout=out, stderr=log,
            )
        process = self._process

        def address() -> str:
            if process.poll() is not None:
                raise Failed(
                    f'the service ended with code {process.returncode}'
                )
            with open(self.path('service.out')) as out:
                words = out.read()
            return words.split()[-1] if words.endswith('\n') else ''

        self.url = until(address, bool, 'the service to serve', START_S)
        self.client = Client(self.url)

    def kill(self) -> None:
        """End it by SIGKILL, as a crash or the kernel would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def is_alive(self) -> bool:
        """Say whether it runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> int:
        """Ask it to stop; return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise Failed(
                f'the service did not stop within {STOP_S:g} s'
            ) from None

    def run(self, *argv: str) -> str:
        """Run another command, and return what it says."""
        return self._family.run(*argv)[1]

    def manage(self, *words: str) -> list[Json]:
        """Return what ``volume-manage`` says; what it finds is no failure."""
        _, said = self._family.run(
            command_path('volume-manage'), '--format', 'json',
            '--config-file', self.path('volume.conf'), *words,
            codes=(0, 1),
        )
        found: list[Json] = parsed(f'volume-manage {" ".join(words)}', said)
        return found

    def log_tail(self, lines: int = LOG_LINES) -> str:
        """Return the last lines that the service has logged.

        The requests that went well are left out.
        """
        with contextlib.suppress(OSError):
            with open(self.path('service.log'), errors='replace') as f:
                said = [line for line in f if '" 20' not in line]
                return ''.join(said[-lines:])
        return ''


def until(
    look: Callable[[], T],
    is_right: Callable[[T], bool],
    what: str,
    limit_s: float = WAIT_S,
) -> T:
    """Return what ``look`` gives once it is right.

    :raises Failed: it never is
    """
    deadline = time.monotonic() + limit_s
    while not is_right(found := look()):
        if time.monotonic() > deadline:
            now = found['status'] if isinstance(found, dict) else found
            raise Failed(f'waited {limit_s:g} s for {what}; it is {now!r}')
        time.sleep(LOOK_S)
    return found


def parsed(command: str, said: str) -> Any:
    """Return the JSON that a command has printed.

    :raises Failed: it is none
    """
    try:
        return json.loads(said)
    except ValueError:
        raise Failed(f'{command}: {said}') from None


def command_path(name: str) -> str:
    """Return a command that was installed beside this Python."""
    path = os.path.join(os.path.dirname(sys.executable), name)
    if not os.path.exists(path):
        raise Failed(f'{path} is not there; call ./run')
    return path
