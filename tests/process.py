# SPDX-License-Identifier: Apache-2.0
"""The real service as a process of its own, and a small REST client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import sqlalchemy

from tests import CONCURRENCY
from tests import database
from volume.backends import Backend
from volume.blockd import Blockd
from volume.node import Node

BIN = os.path.dirname(sys.executable)
START_S = 60
CHECKED_S = 30
UNCHECKED = Backend.reason
FAST = """
lease_wait_s = 20
sweep_interval_s = 0.5
stats_interval_s = 2
upkeep_interval_s = 0.5
"""


class Refused(Exception):
    """The API said no; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(f'{status}: {message}')


class ServiceProcess:
    """``volume-service`` in a fresh directory; ``sections`` are backends.

    ``{root}`` in the sections is the directory; each of ``directories`` is
    made in it first.
    """

    def __init__(
        self,
        test: Any,
        sections: str,
        *,
        directories: tuple[str, ...] = ('pool',),
        extra: str = '',
        backends: str = 'b',
        path: str = '',
        concurrency: str = CONCURRENCY,
    ) -> None:
        self.concurrency = concurrency
        self.environment = os.environ | ({'PYTHONPATH': path} if path else {})
        self.root = tempfile.mkdtemp(prefix='vs', dir='/tmp')
        test.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        self.state = os.path.join(self.root, 's')
        os.mkdir(self.state)
        for name in directories:
            os.mkdir(os.path.join(self.root, name))
        self.conf_file = os.path.join(self.root, 'volume.conf')
        # A service of a chosen kind keeps it when it is configured again.
        self._database = database.option(test, extra)
        if not self._database and 'database =' not in extra:
            database.copy(f'sqlite:///{self.state}/volume.sqlite')
        self.configure(sections, extra=extra, backends=backends)
        self.process: subprocess.Popen[str] | None = None
        self.log = os.path.join(self.root, 'log')
        test.addCleanup(
            Blockd(Node(self.state), self.state + '/blockd').stop
        )
        test.addCleanup(self.kill)

    def configure(
        self, sections: str, *, extra: str = '', backends: str = 'b'
    ) -> None:
        # No section and no option may stand twice.
        api = '' if '[api]' in sections else '[api]\nport = 0\n'
        database = '' if 'database =' in extra else self._database
        fast = ''.join(
            f'{line}\n' for line in FAST.splitlines()
            if line.partition(' ')[0] not in extra
        )
        with open(self.conf_file, 'w') as f:
            f.write(
                f'[DEFAULT]\nconcurrency = {self.concurrency}\n'
                f'enabled_backends = {backends}\n'
                f'state_path = {self.state}\n{fast}{extra}\n'
                f'{database}{api}'
                f'{sections.format(root=self.root)}\n'
            )

    def start(self) -> None:
        with open(self.log, 'a') as log:
            self.process = subprocess.Popen(
                [f'{BIN}/volume-service', '--config-file', self.conf_file],
                stdout=subprocess.PIPE, stderr=log, text=True,
                env=self.environment,
            )
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(START_S):
                raise AssertionError(f'it did not start: {self.tail()}')
        line = self.process.stdout.readline()
        if 'serving' not in line:
            raise AssertionError(f'it did not start: {self.tail()}')
        self.url = line.split()[-1]
        self._await_checks()

    def _await_checks(self) -> None:
        """Wait until every backend was looked at.

        One that is slow at first is down until the service's next look.
        """
        late = time.monotonic() + CHECKED_S
        with contextlib.suppress(Refused, OSError):
            while time.monotonic() < late and any(
                each.get('reason') == UNCHECKED for each in
                self.call('GET', '/os-volume-backends')['backends']
            ):
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, as a power cut does it."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        self.process.wait(120)
        self.process.stdout.close()
        self.process = None

    @property
    def database_url(self) -> str:
        with open(self.conf_file) as f:
            named = re.search('^database = (.*)$', f.read(), re.MULTILINE)
        return named[1] if named else (
            f'sqlite:///{self.state}/volume.sqlite'
        )

    def sql(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        """Run a statement on the service's database, beside the service."""
        engine = sqlalchemy.create_engine(
            self.database_url, poolclass=sqlalchemy.NullPool
        )
        with engine.begin() as connection:
            found = connection.execute(sqlalchemy.text(statement), values)
            if not found.returns_rows:
                return []
            return [tuple(row) for row in found]

    def tail(self) -> str:
        with open(self.log) as f:
            return f.read()[-3000:]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON that the API answers.

        :raises Refused: the API says no
        :raises OSError: it is not there
        """
        host = self.url.split('/')[2]
        connection = http.client.HTTPConnection(host, timeout=90)
        with contextlib.closing(connection):
            headers = {'OpenStack-API-Version': 'volume 3.54'}
            data = None
            if body is not None:
                headers['Content-Type'] = 'application/json'
                data = json.dumps(body)
            connection.request(method, f'/v3{path}', data, headers)
            answer = connection.getresponse()
            text = answer.read()
        if answer.status >= 400:
            raise Refused(answer.status, text.decode()[:500])
        return json.loads(text) if text else None

    def create(self, **wish: Any) -> str:
        return self.call('POST', '/volumes', {'volume': wish})['volume']['id']

    def volume(self, volume_id: str) -> dict[str, Any]:
        return self.call('GET', f'/volumes/{volume_id}')['volume']

    def volumes(self) -> dict[str, dict[str, Any]]:
        found = self.call('GET', '/volumes/detail?limit=1000')['volumes']
        return {row['id']: row for row in found}

    def snapshots(self) -> dict[str, dict[str, Any]]:
        found = self.call('GET', '/snapshots/detail?limit=1000')['snapshots']
        return {row['id']: row for row in found}

    def action(self, volume_id: str, name: str, body: Any = None) -> Any:
        return self.call(
            'POST', f'/volumes/{volume_id}/action', {name: body}
        )

    def wait(
        self,
        volume_id: str,
        *statuses: str,
        kind: str = 'volume',
        timeout_s: float = 120,
    ) -> dict[str, Any] | None:
        """Return the row once its status is one of these; ``gone`` is 404."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                row = self.call('GET', f'/{kind}s/{volume_id}')[kind]
            except Refused as refused:
                if refused.status == 404 and 'gone' in statuses:
                    return None
                raise
            if row['status'] in statuses:
                return row
            if time.monotonic() > deadline:
                raise AssertionError(
                    f'{kind} {volume_id} is {row["status"]}, not '
                    f'{statuses}: {self.tail()}'
                )
            time.sleep(0.02)

    def manage(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [f'{BIN}/volume-manage', '--config-file', self.conf_file, *argv],
            capture_output=True, text=True, timeout=120,
            env=self.environment,
        )
