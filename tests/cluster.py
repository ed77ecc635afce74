# SPDX-License-Identifier: Apache-2.0
"""Several services on one database, one broker and one pool, as processes.

An API process that has no backends, and managers of one backend that have
their state and storage daemons for themselves.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from typing import Any

from tests import CONCURRENCY
from tests.process import ServiceProcess
from volume.blockd import Blockd
from volume.node import Node

BIN = os.path.dirname(sys.executable)
WAIT_S = 60.0
LEASE_S = 2.0
SECTION = """
[q]
driver = qcow
directories = {root}/layers
"""


class Cluster:
    """The processes ``api`` and one for each of ``managers``.

    With ``apart`` the managers do not share their locks, as if each had a
    machine of its own.
    """

    def __init__(
        self,
        test: unittest.TestCase,
        broker_url: str,
        *,
        managers: tuple[str, ...] = ('one', 'two'),
        apart: bool = False,
        extra: str = '',
        section: str = SECTION,
    ) -> None:
        self.test = test
        self.root = tempfile.mkdtemp(prefix='vc', dir='/tmp')
        test.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        for name in 'layers', 'images':
            os.mkdir(os.path.join(self.root, name))
        self.database = os.path.join(self.root, 'db')
        self._broker_url = broker_url
        self._apart = apart
        self._extra = extra
        self._section = section.format(root=self.root)
        self.managers = {
            name: Process(self, name, 'manager') for name in managers
        }
        self.api = Process(self, 'api', 'api')

    def start(self, *names: str) -> None:
        """Start the API and the managers, or those that are named."""
        for name in names or self.managers:
            self.managers[name].start()
        for name in names or self.managers:
            self.await_up(name)
        if self.api.process is None:
            self.api.start()

    def configure(self, name: str, role: str, extra: str = '') -> str:
        """Write the file of one process; return its path."""
        state = os.path.join(self.root, name)
        os.makedirs(state, exist_ok=True)
        locks = os.path.join(state if self._apart else self.root, 'locks')
        path = os.path.join(self.root, f'{name}.conf')
        settings = {
            'concurrency': CONCURRENCY,
            'host': name, 'roles': role, 'state_path': state,
            'lock_path': locks,
            'database': f'sqlite:///{self.database}',
            'transport_url': self._broker_url,
            'enabled_backends': 'q' if role == 'manager' else '',
            'lease_s': LEASE_S, 'lease_wait_s': 20, 'sweep_interval_s': 0.5,
            'stats_interval_s': 1, 'upkeep_interval_s': 0.5,
            'service_down_s': 4,
            'image_allowed_directories': f'{self.root}/images',
        }
        for line in filter(None, (self._extra + extra).splitlines()):
            key, _, value = line.partition('=')
            settings[key.strip()] = value.strip()
        with open(path, 'w') as f:
            f.write('[DEFAULT]\n')
            f.writelines(f'{k} = {v}\n' for k, v in settings.items())
            f.write('[oslo_messaging_rabbit]\n')
            f.write('kombu_reconnect_delay = 0.2\n')
            f.write(f'[api]\nport = 0\n{self._section}')
        return path

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Look into the database, beside all services."""
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            return db.execute(query, values).fetchall()

    def change(self, query: str, *values: Any) -> None:
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            db.execute('PRAGMA busy_timeout = 20000')
            db.execute(query, values)
            db.commit()

    def await_up(self, name: str) -> None:
        """Return when a manager has its backend up."""

        def is_up() -> bool:
            try:
                return bool(self.rows(
                    'SELECT 1 FROM services WHERE host = ? AND owner != ?'
                    ' AND backends LIKE ?',
                    name, self.managers[name].last_owner, '%"q": ""%',
                ))
            except sqlite3.OperationalError:
                return False

        self.until(is_up, f'manager {name} is up')
        self.managers[name].last_owner = self.rows(
            'SELECT owner FROM services WHERE host = ?', name
        )[0][0]

    def until(
        self, look: Callable[[], Any], what: str, timeout_s: float = WAIT_S
    ) -> Any:
        """Return what ``look`` gives once that is true."""
        deadline = time.monotonic() + timeout_s
        while not (found := look()):
            if time.monotonic() > deadline:
                raise AssertionError(
                    f'not seen that {what}: {self.tail()}'
                )
            time.sleep(0.02)
        return found

    def tail(self) -> str:
        return '\n'.join(
            f'--- {each.name}\n{each.said()[-2000:]}'
            for each in (*self.managers.values(), self.api)
        )

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return all that is said of volumes, their jobs and attachments."""
        return {
            table: self.rows(f'SELECT * FROM {table} ORDER BY id')
            for table in ('volumes', 'snapshots', 'attachments', 'jobs')
        }

    def idle(self) -> None:
        """Return when no job is open."""
        self.until(
            lambda: not self.rows("SELECT 1 FROM jobs WHERE state = 'open'"),
            'no job is open',
        )

    def job_of(self, volume_id: str, kind: str) -> dict[str, Any]:
        """Return the newest job of a kind on a volume."""
        names = 'id', 'state', 'owner', 'owner_host', 'token', 'step', 'node'
        rows = self.rows(
            f'SELECT {", ".join(names)} FROM jobs WHERE volume_id = ?'
            ' AND kind = ? ORDER BY created_at DESC', volume_id, kind,
        )
        return dict(zip(names, rows[0], strict=True)) if rows else {}


class Process(ServiceProcess):
    """One of a cluster's services."""

    def __init__(self, cluster: Cluster, name: str, role: str) -> None:
        self.cluster = cluster
        self.name = name
        self.role = role
        self.root = cluster.root
        self.state = os.path.join(cluster.root, name)
        self.log = os.path.join(cluster.root, f'{name}.log')
        self.environment = dict(os.environ)
        self.process: subprocess.Popen[str] | None = None
        self.last_owner = ''
        self.conf_file = cluster.configure(name, role)
        cluster.test.addCleanup(
            Blockd(Node(self.state), self.state + '/blockd').stop
        )
        cluster.test.addCleanup(self.end)

    def start(self) -> None:
        if self.role == 'api':
            super().start()
            return
        with open(self.log, 'a') as log:
            self.process = subprocess.Popen(
                [f'{BIN}/volume-service', '--config-file', self.conf_file],
                stdout=subprocess.PIPE, stderr=log, text=True,
                env=self.environment,
            )

    def end(self) -> None:
        """End the process, and whatever it has started and not waited for."""
        helpers = self.helpers()
        self.kill()
        for pid in helpers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def said(self) -> str:
        if not os.path.exists(self.log):
            return 'it was not started'
        with open(self.log) as f:
            return f.read()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def helpers(self, *words: str) -> list[int]:
        """Return the children that run qemu-img, with these words."""
        if self.process is None:
            return []
        found = []
        for task in glob_tasks(self.process.pid):
            with contextlib.suppress(OSError), open(task) as f:
                found += [
                    pid for pid in map(int, f.read().split())
                    if name_of(pid) == 'qemu-img'
                    and set(words) <= set(words_of(pid))
                ]
        return found


def glob_tasks(pid: int) -> list[str]:
    """Return the files that name the children of each thread."""
    with contextlib.suppress(OSError):
        return [
            f'/proc/{pid}/task/{thread}/children'
            for thread in os.listdir(f'/proc/{pid}/task')
        ]
    return []


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError), open(f'/proc/{pid}/comm') as f:
        return f.read().strip()
    return ''


def words_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError), open(f'/proc/{pid}/cmdline') as f:
        return f.read().split('\0')
    return []


def state_of(pid: int) -> str:
    """Return the kernel's letter for a process; empty if there is none."""
    with contextlib.suppress(OSError), open(f'/proc/{pid}/stat') as f:
        return re.sub(r'.*\) ', '', f.read())[0]
    return ''
