# SPDX-License-Identifier: Apache-2.0
"""A migrated database for one test, and rows to put into it.

``VOLUME_TEST_DATABASE`` says on which database the suite runs: sqlite,
postgresql or mariadb. Without it that is SQLite, and what may differ from
one to another (classes marked ``on_all``) runs on all three.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import sys
import tempfile
import unittest
from typing import Any, TypeVar

import sqlalchemy

from tests.mariadb import Mariadb
from tests.postgres import Postgres
from tests.server import Server
from volume import ids
from volume.db import migrate
from volume.db import models
from volume.db.engine import Database
from volume.testing import fixtures

SERVERS = {'postgresql': Postgres, 'mariadb': Mariadb}
KINDS = ('sqlite', *SERVERS)
CHOICE = 'VOLUME_TEST_DATABASE'
NOW = 1_700_000_000.0
PATIENCE_S = 60.0  # a slow machine has many tests at once
GIB = 1 << 30


class Clock:
    """Time that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


Case = TypeVar('Case', bound=type[unittest.TestCase])


def kind(test: Any) -> str:
    """Return which database a test runs on."""
    found = getattr(test, 'database_kind', '') or (
        os.environ.get(CHOICE) or 'sqlite'
    )
    if found not in KINDS:
        raise AssertionError(f'{CHOICE} is one of {", ".join(KINDS)}')
    return found


def on_all(case: Case) -> Case:
    """Run a class on every database, if none was chosen for the suite."""
    if not os.environ.get(CHOICE):
        for name in SERVERS:
            made = f'{case.__name__}On{name.capitalize()}'
            setattr(sys.modules[case.__module__], made, type(made, (case,), {
                '__module__': case.__module__, 'database_kind': name,
            }))
    return case


def only_sqlite(case: Case) -> Case:
    """Mark a class that is about SQLite itself, or needs its file."""
    case.database_kind = 'sqlite'
    return case


@functools.cache
def server(name: str) -> Server:
    """Return the process's own server of a kind; it ends with the process.

    :raises SkipTest: it is not installed
    """
    made = SERVERS[name]()
    atexit.register(made.remove)
    made.start()
    return made


def url(test: Any) -> str:
    """Return the URL of a new, empty database, gone with the test."""
    if kind(test) == 'sqlite':
        return f'sqlite:///{fixtures.state_dir(test)}/volume.sqlite'
    made = server(kind(test)).create()
    test.addCleanup(server(kind(test)).drop, made)
    return made


def option(test: Any, settings: str = '') -> str:
    """Return the line of a service's file that names its database.

    With SQLite there is none, the service makes its own; nor if the other
    settings name one.
    """
    if kind(test) == 'sqlite' or 'database =' in settings:
        return ''
    return f'database = {url(test)}\n'


def lose(lost: str) -> None:
    """Lose a database, as a disk does; an empty one is in its place."""
    parsed = sqlalchemy.make_url(lost)
    if parsed.get_backend_name() == 'sqlite':
        for suffix in '', '-wal', '-shm':
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f'{parsed.database}{suffix}')
        return
    own = server(
        'mariadb' if parsed.get_backend_name() == 'mysql' else 'postgresql'
    )
    own.drop(lost)
    own.execute(f'CREATE DATABASE {parsed.database}')


def make(test: Any, clock: Any = None) -> Database:
    """Return an empty database of the newest version, closed with the test."""
    if kind(test) != 'sqlite':
        return _borrow(test, clock or Clock())
    made = url(test)
    copy(made)
    db = Database(made, clock or Clock())
    test.addCleanup(db.close)
    return db


@functools.cache
def template() -> str:
    """Return the path of an empty SQLite database of the newest version."""
    directory = tempfile.mkdtemp(prefix='vt', dir='/tmp')
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = os.path.join(directory, 'empty.sqlite')
    db = Database(f'sqlite:///{path}')
    migrate.upgrade(db)
    db.close()
    return path


def copy(made: str) -> None:
    """Put an empty database in the place of which there is the URL.

    A migration takes longer than most tests do; those of it, and those with
    several nodes, begin with nothing.
    """
    path = sqlalchemy.make_url(made).database
    assert path
    shutil.copyfile(template(), path)
    os.chmod(path, 0o600)


_free: dict[str, list[str]] = {name: [] for name in SERVERS}


def _borrow(test: Any, clock: Any) -> Database:
    """Return a database that others have used, and that was emptied since.

    To migrate one anew for each test would take longer than most tests do.
    """
    own, free = server(kind(test)), _free[kind(test)]
    db = Database(
        free.pop() if free else own.create(), clock, timeout_s=PATIENCE_S
    )
    migrate.upgrade(db)

    def give_back() -> None:
        db.close()
        empty(db)
        db.close()
        free.append(db.url)

    test.addCleanup(give_back)
    return db


def empty(db: Database) -> None:
    """Remove every row."""

    def remove(session: Any) -> None:
        for table in models.Base.metadata.sorted_tables:
            if table.name != models.Compatibility.__tablename__:
                session.execute(sqlalchemy.delete(table))

    db.write(remove)


def add(db: Database, *rows: Any) -> None:
    """Write rows."""
    db.write(lambda session: session.add_all(rows))


def get(db: Database, table: Any, key: Any) -> Any:
    """Return a row as it is now."""
    return db.read(lambda session: session.get(table, key))


def volume(**values: Any) -> models.Volume:
    """Return a volume's row: available, 1 GiB, in pool ``b#pool``."""
    return models.Volume(**{
        'id': ids.new(), 'project_id': 'p', 'user_id': 'u',
        'status': 'available', 'backend': 'b', 'pool': 'pool',
        'size_bytes': GIB, 'claimed_bytes': 0, 'created_at': NOW,
        'updated_at': NOW, **values,
    })


def snapshot(volume_id: str, **values: Any) -> models.Snapshot:
    """Return a snapshot's row: available, 1 GiB."""
    return models.Snapshot(**{
        'id': ids.new(), 'volume_id': volume_id, 'project_id': 'p',
        'user_id': 'u', 'status': 'available', 'backend': 'b',
        'pool': 'pool', 'size_bytes': GIB, 'created_at': NOW,
        'updated_at': NOW, **values,
    })


def job(**values: Any) -> models.Job:
    """Return an open job's row, leased to ``owner`` of ``node-1``."""
    return models.Job(**{
        'id': ids.new(), 'kind': 'test', 'backend': 'b', 'owner': 'owner',
        'owner_host': 'node-1', 'expires_at': NOW + 30, 'due_at': NOW,
        'give_up_at': NOW + 3600, 'created_at': NOW, 'updated_at': NOW,
        **values,
    })


def pool(**values: Any) -> models.Pool:
    """Return the row of pool ``b#pool``, which may promise 10 GiB."""
    return models.Pool(**{
        'backend': 'b', 'name': 'pool', 'is_up': True,
        'total_bytes': 10 * GIB, 'limit_bytes': 10 * GIB,
        'free_bytes': 10 * GIB, 'updated_at': NOW, **values,
    })


def backend(**values: Any) -> models.Backend:
    """Return the row of backend ``b``, which is up."""
    return models.Backend(**{
        'name': 'b', 'host': 'node-1', 'driver': 'file', 'is_up': True,
        'updated_at': NOW, **values,
    })
