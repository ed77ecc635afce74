# SPDX-License-Identifier: Apache-2.0
"""A service over a filled installation, and what one request costs it.

Costs are counted, never timed: SQL statements, and acts on the machine.
What the service's own threads ask for is not a request's.
"""

from __future__ import annotations

import contextlib
import json
import threading
import unittest
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import sqlalchemy
import webob
from sqlalchemy import event

from tests.integration import serving
from tools import fill
from volume import conf as options
from volume import service
from volume.api import app
from volume.api import auth
from volume.node import Node
from volume.testing import fixtures

T = TypeVar('T')

QUIET = """\
lease_s = 3000
sweep_interval_s = 3000
stats_interval_s = 3000
upkeep_interval_s = 3000
"""
PERIODIC = frozenset({
    'renew', 'heartbeat', 'sweep', 'exports', 'stats', 'upkeep', 'history',
})
LOOK = 'FROM jobs \nWHERE jobs.id = ?'
LARGE = fill.Size()
SMALL = fill.Size(
    volumes=10, snapshots=2, attachments=3, pools=4, history=10
)


class CountingNode(Node):
    """Notes what is done to the machine, but for the periodic threads."""

    def __init__(self, state_dir: str) -> None:
        super().__init__(state_dir)
        self.seen: list[str] = []

    def act(self, what: str, effect: Callable[[], T]) -> T:
        if threading.current_thread().name not in PERIODIC:
            self.seen.append(what)
        return effect()


class World:
    """A service of the given size, asked through its REST door."""

    def __init__(
        self, test: unittest.TestCase, size: fill.Size, driver: str = 'file'
    ) -> None:
        self.directory = fixtures.state_dir(test)
        path = fill.configure(
            self.directory, size.pools, driver, 'local', QUIET
        )
        fill.fill(path, size)
        self._path = path
        self.begin()
        test.addCleanup(lambda: self.service.stop())

    def begin(self) -> None:
        """Make a service; the first one is started as well."""
        is_first = not hasattr(self, 'service')
        conf = options.load([], [self._path])
        self.node = CountingNode(conf.state_path)
        self.service = service.Service(conf, node=self.node)
        self.service.check_wait_s = 60.0  # of all directories
        self.core = self.service.core
        self.engine = self.service.db.engine
        self._app = app.make_app(self.core, auth.NoAuth())
        if is_first:
            self.service.start()

    def start_again(self) -> Cost:
        """Stop the service, and return what its next start costs."""
        self.service.stop()
        self.begin()
        with self.watched() as cost:
            self.service.start()
        return cost

    def ask(
        self, method: str, path: str, body: Any = None,
        version: str = '3.54',
    ) -> Any:
        """Return the JSON of an answer, which must be a good one."""
        request = webob.Request.blank(f'/v3{path}', method=method)
        request.headers['OpenStack-API-Version'] = f'volume {version}'
        if body is not None:
            request.body = json.dumps(body).encode()
            request.headers['Content-Type'] = 'application/json'
        response = request.get_response(self._app)
        if response.status_int >= 300:
            raise AssertionError(f'{method} {path}: {response.text:.500}')
        return json.loads(response.body) if response.body else None

    def settle(self) -> None:
        """Wait until no job is open, without asking the database."""
        serving.until(
            self.service.runner.busy, lambda count: not count
        )

    @contextlib.contextmanager
    def watched(self) -> Iterator[Cost]:
        """Count what a request and its job cost."""
        self.settle()
        cost = Cost()

        def note(
            connection: Any, cursor: Any, statement: str, parameters: Any,
            context: Any, executemany: bool,
        ) -> None:
            # Who waits long looks at the job's row now and then.
            if threading.current_thread().name not in PERIODIC and (
                not statement.startswith('BEGIN')
                and not statement.endswith(LOOK)
            ):
                cost.statements.append((statement, parameters))

        begun = len(self.node.seen)
        event.listen(self.engine, 'before_cursor_execute', note)
        try:
            yield cost
            self.settle()
        finally:
            event.remove(self.engine, 'before_cursor_execute', note)
            cost.acts = [
                what.partition(' ')[0] for what in self.node.seen[begun:]
            ]

    def plans(self, cost: Cost) -> list[tuple[str, str]]:
        """Return how SQLite goes about each statement, step by step."""
        found = []
        with self.engine.connect() as connection:
            for statement, parameters in cost.statements:
                for step in connection.exec_driver_sql(
                    f'EXPLAIN QUERY PLAN {statement}', parameters
                ):
                    found.append((str(step[3]), statement))
        return found

    def one(self, query: sqlalchemy.Select[Any]) -> Any:
        return self.core.db.read(lambda session: session.scalar(query))


class Cost:
    """Statements with their parameters, and acts by their first word."""

    def __init__(self) -> None:
        self.statements: list[tuple[str, Any]] = []
        self.acts: list[str] = []
