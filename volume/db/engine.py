# SPDX-License-Identifier: Apache-2.0
"""The one way into the database: ``read(fn)`` and ``write(fn)``.

Each runs the whole function in one transaction, and runs it again if the
database says that it lost a race. The function does nothing but SQL: no
I/O, no RPC, no waiting; the write lock is held meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy import event
from sqlalchemy import exc
from sqlalchemy.orm import Session

from volume import errors
from volume.db.fifo import FifoLock

T = TypeVar('T')
Clock = Callable[[], float]

ATTEMPTS = 10
# PostgreSQL's serialization_failure and deadlock_detected; MariaDB's lock
# wait timeout and deadlock.
TRANSIENT_CODES = frozenset({'40001', '40P01', 1205, 1213})


class Database:
    """A database by its URL; ``clock`` gives the time that rows carry."""

    def __init__(self, url: str, clock: Clock = time.time) -> None:
        self.url = url
        self.clock = clock
        self.is_sqlite = url.startswith('sqlite')
        self._writing: contextlib.AbstractContextManager[None] = (
            FifoLock() if self.is_sqlite else contextlib.nullcontext()
        )
        self._inside = threading.local()
        self.engine = self._make_engine(url)

    def read(self, fn: Callable[[Session], T]) -> T:
        """Return what ``fn`` reads, all of one moment."""
        return self._attempt(lambda: self._once(fn, write=False))

    def write(self, fn: Callable[[Session], T]) -> T:
        """Return ``fn``'s result once what it wrote is durable.

        :raises Unavailable: the database does not answer
        """

        def locked() -> T:
            with self._writing:
                return self._once(fn, write=True)

        return self._attempt(locked)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _once(self, fn: Callable[[Session], T], write: bool) -> T:
        self._inside.one = True
        try:
            return self._transact(fn, write)
        finally:
            self._inside.one = False

    def _transact(self, fn: Callable[[Session], T], write: bool) -> T:
        options = {'volume_write': write}
        with self.engine.connect().execution_options(**options) as connection:
            with connection.begin():
                with Session(
                    connection, autoflush=False, expire_on_commit=False,
                ) as session:
                    result = fn(session)
                    session.flush()
                    return result

    def _attempt(self, once: Callable[[], T]) -> T:
        if getattr(self._inside, 'one', False):
            raise AssertionError('a transaction is open on this thread')
        for attempt in range(ATTEMPTS):
            try:
                return once()
            except exc.TimeoutError as failed:
                raise errors.Unavailable(
                    'all connections to the database are in use'
                ) from failed
            except exc.DBAPIError as failed:
                # Of two that insert the same row, the second finds it when
                # it is asked again.
                if isinstance(failed, exc.IntegrityError):
                    if attempt:
                        raise
                    continue
                if not is_transient(failed) or attempt == ATTEMPTS - 1:
                    raise errors.Unavailable(
                        'the database does not answer: '
                        f'{str(failed.orig or failed)!s:.300}'
                    ) from failed
                # Spread the losers of one race, so that they do not meet
                # again; nothing depends on the number drawn.
                time.sleep(random.uniform(0, 0.02 * 2**attempt))
        raise AssertionError('unreachable')

    def _make_engine(self, url: str) -> sqlalchemy.Engine:
        if not self.is_sqlite:
            return sqlalchemy.create_engine(
                url, pool_size=20, max_overflow=20, pool_pre_ping=True,
                isolation_level='REPEATABLE READ',  # see db/leases.py
                hide_parameters=True,
            )
        path = sqlalchemy.make_url(url).database
        if path and path != ':memory:':
            os.makedirs(os.path.dirname(path) or '.', 0o700, exist_ok=True)
        engine = sqlalchemy.create_engine(
            url, pool_size=20, max_overflow=40, hide_parameters=True,
            connect_args={'timeout': 30, 'check_same_thread': False},
        )
        event.listen(engine, 'connect', _prepare_sqlite)
        event.listen(engine, 'begin', _begin_sqlite)
        return engine


def is_transient(failed: exc.DBAPIError) -> bool:
    """Say whether the same transaction may succeed if run again."""
    original: Any = failed.orig
    if isinstance(original, sqlite3.OperationalError):
        return 'locked' in str(original) or 'busy' in str(original)
    code = getattr(original, 'pgcode', None) or getattr(
        original, 'sqlstate', None
    )
    if code is None and original is not None and original.args:
        code = original.args[0]
    return code in TRANSIENT_CODES or failed.connection_invalidated


@contextlib.contextmanager
def statements(engine: sqlalchemy.Engine) -> Iterator[list[str]]:
    """Collect the SQL statements of all threads, without BEGIN and COMMIT."""
    seen: list[str] = []

    def note(
        connection: Any, cursor: Any, statement: str, *rest: Any
    ) -> None:
        if not statement.startswith('BEGIN'):
            seen.append(statement)

    event.listen(engine, 'before_cursor_execute', note)
    try:
        yield seen
    finally:
        event.remove(engine, 'before_cursor_execute', note)


def _prepare_sqlite(connection: Any, record: Any) -> None:
    # We begin transactions ourselves: the driver's own BEGIN is deferred,
    # and a deferred transaction that reads, then writes, fails at once.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute('PRAGMA journal_mode=WAL')
    cursor.execute('PRAGMA synchronous=FULL')
    cursor.execute('PRAGMA foreign_keys=ON')
    cursor.execute('PRAGMA temp_store=MEMORY')
    cursor.close()


def _begin_sqlite(connection: sqlalchemy.Connection) -> None:
    write = connection.get_execution_options().get('volume_write', True)
    connection.exec_driver_sql('BEGIN IMMEDIATE' if write else 'BEGIN')
