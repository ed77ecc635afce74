# SPDX-License-Identifier: Apache-2.0
"""What differs between SQLite, PostgreSQL and MariaDB, and nothing else.

Everywhere a transaction sees one moment, and one that would change what
another has changed since is told so, and run again: SQLite lets one write at
a time, PostgreSQL has it at REPEATABLE READ, MariaDB there with
``innodb_snapshot_isolation``. No statement waits for ever, and a transaction
whose process hangs does not keep its locks for ever either.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy import exc
from sqlalchemy import URL

from volume import errors
from volume.db import green

# What is in front of ://, and the driver that is used for it.
DRIVERS = {
    'sqlite': 'sqlite', 'sqlite+pysqlite': 'sqlite',
    'postgresql': 'postgresql+psycopg2',
    'postgresql+psycopg2': 'postgresql+psycopg2',
    'mysql': 'mariadb+pymysql', 'mysql+pymysql': 'mariadb+pymysql',
    'mariadb': 'mariadb+pymysql', 'mariadb+pymysql': 'mariadb+pymysql',
}
EXTRAS = {'postgresql': 'postgresql', 'mariadb': 'mariadb'}
# Another transaction was faster, or holds what this one needs: PostgreSQL's
# serialization_failure, deadlock_detected and lock_not_available; MariaDB's
# "record has changed", lock wait timeout and deadlock.
RACES = frozenset({'40001', '40P01', '55P03', 1020, 1205, 1213})
# The server ends, begins, is full, or has ended this connection.
AWAY = frozenset({
    '57P01', '57P02', '57P03', '53300', '25P03',
    1040, 1053, 1203, 1927, 2002, 2003, 2006, 2013, 2055, 4031,
})
# MariaDB's other errors quote the statement, and the values in it.
SPEAKS_OF_NONE = AWAY | RACES | {1044, 1045, 1049, 1146, 1264, 1406}
LOCK_WAIT_S = 5
UNKNOWN_VARIABLE = 1193
# Texts compare exactly: no case is folded, no trailing space is dropped.
MARIADB_COLLATION = 'utf8mb4_nopad_bin'
MARIADB_SESSION = (
    "sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,"
    "ERROR_FOR_DIVISION_BY_ZERO', innodb_snapshot_isolation=ON, "
    "tx_isolation='REPEATABLE-READ'"
)


def parse(url: str) -> URL:
    """Return the URL with the driver that is used.

    :raises Invalid: it is no URL, or of a database that was not tried
    """
    try:
        found = sqlalchemy.make_url(url)
    except exc.ArgumentError as wrong:
        raise errors.Invalid(
            'option database is no URL, such as '
            'postgresql://user:password@host/volume'
        ) from wrong
    if found.drivername not in DRIVERS:
        raise errors.Invalid(
            f'option database names {found.drivername!r:.60}; it can be '
            'sqlite, postgresql or mariadb'
        )
    return found.set(drivername=DRIVERS[found.drivername])


def make_engine(
    url: URL, timeout_s: float | None, connections: int,
    for_native: bool = False,
) -> sqlalchemy.Engine:
    """Return an engine; without ``timeout_s`` a statement may take long.

    Connections stay open when they are given back: a new one costs several
    round trips and, with TLS, more than a transaction. Under eventlet it is
    for greenthreads, or ``for_native`` threads alone.
    """
    green.prepare()
    if url.get_backend_name() == 'sqlite':
        return _sqlite(url, connections)
    make = _mariadb if url.get_backend_name() == 'mariadb' else _postgresql
    pool: dict[str, Any] = {
        'pool_size': connections, 'max_overflow': 0,
        'pool_timeout': timeout_s,
        **(green.pool_arguments() if for_native else {}),
    } if timeout_s else {'poolclass': sqlalchemy.NullPool}
    try:
        return sqlalchemy.create_engine(
            url, hide_parameters=True, **pool, **make(url, timeout_s),
            # Every transaction is ended by name (engine.py); another
            # ROLLBACK for each would be a round trip for nothing.
            pool_reset_on_return=None,
        )
    except ImportError as missing:
        extra = EXTRAS[url.get_backend_name()]
        raise errors.Invalid(
            f'the database\'s driver {missing.name} is not installed: '
            f'pip install "volume-service[{extra}]"'
        ) from missing


def code_of(failed: exc.DBAPIError) -> Any:
    """Return what the database calls the failure; ``None`` is unknown."""
    original: Any = failed.orig
    code = getattr(original, 'pgcode', None)
    if code is None and getattr(original, 'args', None):
        code = original.args[0]
    return code


def is_race(failed: exc.DBAPIError) -> bool:
    """Say whether another transaction was in the way."""
    if isinstance(failed.orig, sqlite3.OperationalError):
        text = str(failed.orig)
        return 'locked' in text or 'busy' in text
    return code_of(failed) in RACES


def is_away(failed: exc.DBAPIError) -> bool:
    """Say whether it is the connection that failed, not the statement."""
    if failed.connection_invalidated or code_of(failed) in AWAY:
        return True
    # libpq gives no code to a connection that could not be made.
    return (
        isinstance(failed, exc.OperationalError)
        and getattr(failed.orig, 'pgcode', '') is None
    )


def is_too_old(failed: exc.DBAPIError) -> bool:
    """Say whether a server lacks what a session of ours sets."""
    return bool(code_of(failed) == UNKNOWN_VARIABLE)


def words(failed: exc.DBAPIError) -> str:
    """Return what the database says, in one line, without our values."""
    original: Any = failed.orig
    said = getattr(getattr(original, 'diag', None), 'message_primary', None)
    code = code_of(failed)
    if said is None and isinstance(code, int) and code not in SPEAKS_OF_NONE:
        said = f'MariaDB\'s error {code}'
    return f'{" ".join(str(said or original or failed).split()):.300}'


def is_unheard(failed: exc.DBAPIError) -> bool:
    """Say whether a COMMIT that failed so may have been done all the same."""
    if isinstance(failed.orig, sqlite3.OperationalError):
        return 'disk I/O error' in str(failed.orig)
    return is_away(failed)


@contextlib.contextmanager
def alone(
    connection: sqlalchemy.Connection, name: str, number: int, wait_s: int
) -> Iterator[None]:
    """Hold a lock of the whole database for a transaction of migrations.

    :raises Busy: another had it for so long
    """
    kind = connection.dialect.name
    if kind == 'postgresql':
        # Ends with the transaction.
        connection.exec_driver_sql(f'SELECT pg_advisory_xact_lock({number})')
    if kind != 'mariadb':  # SQLite's transaction is one already
        yield
        return
    if connection.exec_driver_sql(
        f"SELECT GET_LOCK('{name}', {wait_s})"
    ).scalar() != 1:
        raise errors.Busy(
            f'another migration of this database has run for {wait_s} s'
        )
    try:
        yield
    finally:
        with contextlib.suppress(exc.DBAPIError):
            connection.exec_driver_sql(f"SELECT RELEASE_LOCK('{name}')")


def _sqlite(url: URL, connections: int) -> sqlalchemy.Engine:
    path = url.database
    if path and path != ':memory:':
        os.makedirs(os.path.dirname(path) or '.', 0o700, exist_ok=True)
    engine = sqlalchemy.create_engine(
        url, pool_size=connections, max_overflow=40, hide_parameters=True,
        connect_args={'timeout': 30, 'check_same_thread': False},
        **green.pool_arguments(),
    )
    event.listen(engine, 'connect', _prepare_sqlite)
    event.listen(engine, 'begin', _begin_sqlite)
    return engine


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


def _mariadb(url: URL, timeout_s: float | None) -> dict[str, Any]:
    session = [MARIADB_SESSION]
    arguments: dict[str, Any] = {
        'charset': 'utf8mb4', 'collation': MARIADB_COLLATION,
        'connect_timeout': 10,
    }
    if timeout_s:
        session += [
            f'innodb_lock_wait_timeout={LOCK_WAIT_S}',
            f'idle_transaction_timeout={max(1, round(timeout_s))}',
        ]
        arguments |= {
            'connect_timeout': max(1, round(timeout_s)),
            'read_timeout': timeout_s, 'write_timeout': timeout_s,
        }
    arguments['init_command'] = f'SET SESSION {", ".join(session)}'
    is_near = url.host in ('localhost', '127.0.0.1', '::1', None)
    if is_near and not any(key.startswith('ssl') for key in url.query):
        # Not for this machine alone: each new connection would read all the
        # certificates of the system first.
        arguments['ssl_disabled'] = True
    return {'connect_args': arguments}


def _postgresql(url: URL, timeout_s: float | None) -> dict[str, Any]:
    settings = 'lock_timeout=0'
    if timeout_s:
        settings = (
            f'lock_timeout={LOCK_WAIT_S}s '
            f'-c idle_in_transaction_session_timeout={timeout_s * 1000:.0f}'
        )
    given = url.query.get('options', '')
    # A migration has waited for its turn, and must see what came before.
    level = 'REPEATABLE READ' if timeout_s else 'READ COMMITTED'
    return {'isolation_level': level, 'connect_args': {
        'connection_factory': _connection_class(timeout_s),
        'options': f'{given} -c {settings}'.strip(),
        'application_name': 'volume',
    }}


def _connection_class(timeout_s: float | None) -> Any:
    """Return a class of connections that wait no longer than this.

    libpq has no time limit of its own: a server that was stopped while its
    kernel still answers would be waited for until it goes on.
    """
    extensions = importlib.import_module('psycopg2.extensions')
    extensions.set_wait_callback(_wait)
    made: Any = type(
        'Connection', (extensions.connection,), {'timeout_s': timeout_s}
    )
    return made


def _wait(connection: Any) -> None:
    """Wait until the server has answered; psycopg2 calls this.

    Whatever is raised here closes the connection.
    """
    limit_s: float | None = getattr(connection, 'timeout_s', None)
    deadline = None if limit_s is None else time.monotonic() + limit_s
    while state := connection.poll():  # 0: done, 1: read, 2: write
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            psycopg2 = importlib.import_module('psycopg2')
            raise psycopg2.OperationalError(
                f'it has not answered within {limit_s:g} s'
            )
        _await(connection.fileno(), state == 1, left_s)


def _await(descriptor: int, is_read: bool, left_s: float | None) -> None:
    # Green threads have select alone, and theirs knows no limit of 1024.
    if not hasattr(select, 'poll'):
        wanted = [descriptor]
        select.select(
            wanted if is_read else (), () if is_read else wanted, (), left_s
        )
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN if is_read else select.POLLOUT)
    with contextlib.suppress(InterruptedError):
        poll.poll(None if left_s is None else left_s * 1000)
