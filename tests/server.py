# SPDX-License-Identifier: Apache-2.0
"""What the private database servers have in common.

A server listens on a unix socket alone, runs as an ordinary user in a
directory of its own, is ended by pid, and leaves nothing behind; one that
the machine has already is neither used nor disturbed.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time

from sqlalchemy import create_engine
from sqlalchemy import exc
from sqlalchemy import pool

from tests.halt import halt

START_S = 90.0
END_S = 30.0
NOBODY = 65534


class Server(abc.ABC):
    """A database server; ``start`` it, then ``create`` databases."""

    binary = ''
    end_signal = signal.SIGTERM

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix='vtdb', dir='/tmp')
        # Services that run as another user come in by the socket.
        os.chmod(self.directory, 0o755)
        self.data = os.path.join(self.directory, 'data')
        self.password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        if os.getuid() == 0:
            os.chown(self.directory, NOBODY, NOBODY)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @abc.abstractmethod
    def url(self, name: str) -> str:
        """Return what the option ``database`` says."""

    @abc.abstractmethod
    def lay_out(self) -> None:
        """Make the data directory."""

    @abc.abstractmethod
    def argv(self) -> list[str]:
        """Return the command of the server, in the foreground."""

    def start(self) -> None:
        """Return when it answers."""
        try:
            if not os.path.isdir(self.data):
                self.lay_out()
            with open(os.path.join(self.directory, 'output'), 'ab') as output:
                self._process = subprocess.Popen(
                    self.argv(), stdin=subprocess.DEVNULL, stdout=output,
                    stderr=output, start_new_session=True, **self._as_nobody()
                )
            self._await()
        except BaseException:
            self.remove()
            raise

    def freeze(self) -> None:
        """Stop every process of it, as an overloaded machine does."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                halt(pid)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once; what was committed is there at the next start."""
        if self._process is None:
            return
        # Stopped first, that it forks no more.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            halt(self.pid)
        pids = self._pids()
        self._signal(signal.SIGKILL)
        self._process.wait(END_S)
        # The next start is refused while one of them has the memory.
        late = time.monotonic() + END_S
        while any(map(_lives, pids)) and time.monotonic() < late:
            time.sleep(0.01)
        self._process = None

    def _signal(self, number: int) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _pids(self) -> list[int]:
        """Return it and what it has forked; those have other groups."""
        assert self._process is not None
        return [self.pid, *children(self.pid)]

    def stop(self) -> None:
        """End it in good order; what it stored stays."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.thaw()
            self._process.send_signal(self.end_signal)
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def remove(self) -> None:
        """End it, and leave nothing behind."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def create(self) -> str:
        """Return the URL of a new, empty database."""
        name = f'vt{next(self._numbers)}'
        self.execute(f'CREATE DATABASE {name}')
        return self.url(name)

    @abc.abstractmethod
    def drop(self, url: str) -> None:
        """Remove a database, whoever is connected to it."""

    def execute(self, statement: str) -> None:
        """Run a statement as the administrator, in no transaction."""
        engine = create_engine(
            self.url(self.home), poolclass=pool.NullPool,
            isolation_level='AUTOCOMMIT',
        )
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    home = ''

    def run(self, argv: list[str]) -> None:
        """Run a tool of the server as its user."""
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=START_S, cwd=self.directory, **self._as_nobody(),
        )
        if done.returncode:
            raise AssertionError(
                f'{argv[0]}: {done.stdout[-1000:]}{done.stderr[-1000:]}'
            )

    def write(self, name: str, text: str) -> str:
        """Write a file that the server alone may read."""
        path = os.path.join(self.directory, name)
        with open(path, 'w', opener=_private) as f:
            f.write(text)
        if os.getuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        return path

    def _as_nobody(self) -> dict[str, object]:
        environment = {
            'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'LC_ALL': 'C.UTF-8',
            'HOME': self.directory, 'TMPDIR': self.directory,
        }
        if os.getuid() != 0:
            return {'env': environment, 'cwd': self.directory}
        return {
            'env': environment, 'user': NOBODY, 'group': NOBODY,
            'extra_groups': [],
        }

    def _await(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                return self.execute('SELECT 1')
            except exc.DBAPIError:
                time.sleep(0.05)
        with open(os.path.join(self.directory, 'output'), 'rb') as f:
            words = f.read()[-2000:].decode(errors='replace')
        raise AssertionError(f'{self.binary} did not start: {words}')


def _lives(pid: int) -> bool:
    """Say whether a process has anything left, as a zombie has not."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rpartition(')')[2].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """Return the processes that a process has forked."""
    try:
        with open(f'/proc/{pid}/task/{pid}/children') as f:
            return [int(each) for each in f.read().split()]
    except FileNotFoundError:
        return []


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
