# SPDX-License-Identifier: Apache-2.0
"""Bring the database's schema to a version, up or down.

A release that is one schema older may go on working while the managers are
upgraded one after another: if a migration only adds (its file says
``ONLY_ADDS = True``), code of the version before works on what it has made.
The table ``compatibility`` says in its one row which version code must have
at least; code that does not know the schema's version reads it there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import sqlalchemy
from alembic import command
from alembic import config
from alembic import script
from alembic.runtime import migration
from sqlalchemy.orm import Session

from volume import errors
from volume.db import dialects
from volume.db import models
from volume.db import repeatable
from volume.db.engine import Database

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'alembic')
# One migration at a time, whoever begins it.
LOCK_NAME, LOCK_NUMBER, LOCK_S = 'volume-migration', 0x766f6c75, 600
# MariaDB's migrations are repeatable by this class; alembic finds it.
assert repeatable.RepeatableImpl.__dialect__ == 'mariadb'


def current(database: Database) -> str | None:
    """Return the schema's version; ``None`` for an empty database."""
    return database.read(_version)


def newest() -> str:
    """Return the version that this code is written for."""
    head = _scripts().get_current_head()
    assert head is not None
    return str(head)


def oldest(version: str) -> str:
    """Return the oldest version whose code works on this version's schema."""
    scripts = _scripts()
    while True:
        revision = scripts.get_revision(version)
        if not getattr(revision.module, 'ONLY_ADDS', False):
            return version
        version = str(revision.down_revision)


def upgrade(database: Database, version: str = 'head') -> None:
    """Bring the schema up to a version, by default the newest.

    :raises Invalid: the database has tables that are not ours
    """
    wanted = newest() if version == 'head' else version

    def go(connection: sqlalchemy.Connection) -> None:
        _check_empty(connection)
        # First: whoever starts in the middle must not be let in.
        _note(connection, wanted)
        command.upgrade(_settings(connection), version)
        _note(connection, wanted)

    _run(database, go)


def downgrade(database: Database, version: str) -> None:
    """Bring the schema down to a version; ``base`` removes everything."""

    def go(connection: sqlalchemy.Connection) -> None:
        command.downgrade(_settings(connection), version)
        if version != 'base':
            _note(connection, version)

    _run(database, go)


def is_breaking(database: Database, version: str | None = None) -> bool:
    """Say whether the code of now could not work on after an upgrade."""
    found = current(database)
    wanted = newest() if version in (None, 'head') else str(version)
    if found is None or not _knows(found):
        return True
    return found not in _between(oldest(wanted), wanted)


def require(database: Database) -> None:
    """Check that this code can work on the schema.

    :raises Invalid: it is older, or newer and has changed what we rely on
    """
    found, wanted = current(database), newest()
    if found == wanted:
        return
    if found is None or _knows(found):
        raise errors.Invalid(
            f'the database has version {found}, this release needs {wanted}: '
            'run "volume-manage db upgrade"'
        )
    least = database.read(_least)
    if least is None or not _knows(least):
        raise errors.Invalid(
            f'the database has version {found}, which this release does not '
            'know: it is newer, and needs a release that knows '
            f'{least or found}; this one knows {wanted}. Start the release '
            'that made it, or take that to "volume-manage db downgrade"'
        )


def _version(session: Session) -> str | None:
    found: str | None = migration.MigrationContext.configure(
        session.connection()
    ).get_current_revision()
    return found


def _least(session: Session) -> str | None:
    if not _has(session.connection(), models.Compatibility.__tablename__):
        return None
    return session.scalar(sqlalchemy.select(models.Compatibility.oldest))


def _note(connection: sqlalchemy.Connection, version: str) -> None:
    """Write down which code may work on the schema."""
    table = models.Compatibility.__table__
    if not _has(connection, str(models.Compatibility.__tablename__)):
        return
    row = {'oldest': oldest(version)}
    if not connection.execute(
        sqlalchemy.update(models.Compatibility).values(row)
    ).rowcount:
        connection.execute(sqlalchemy.insert(table).values(row))  # type: ignore[arg-type]


def _check_empty(connection: sqlalchemy.Connection) -> None:
    """Refuse a database in which others have tables of our names.

    :raises Invalid: it has, and no migration has ever run here
    """
    there = set(sqlalchemy.inspect(connection).get_table_names())
    ours = there & set(models.Base.metadata.tables)
    if ours and 'alembic_version' not in there:
        raise errors.Invalid(
            f'the database has tables that the service has not made '
            f'({", ".join(sorted(ours)):.200}); give it a database of its own'
        )


def _has(connection: sqlalchemy.Connection, table: str) -> bool:
    return bool(sqlalchemy.inspect(connection).has_table(table))


def _knows(version: str) -> bool:
    return version in {
        each.revision for each in _scripts().walk_revisions()
    }


def _between(lower: str, upper: str) -> set[str]:
    """Return the versions from one to another, both included."""
    return {
        each.revision
        for each in _scripts().iterate_revisions(upper, lower, inclusive=True)
    }


def _settings(
    connection: sqlalchemy.Connection | None = None,
) -> config.Config:
    settings = config.Config()
    settings.set_main_option('script_location', HERE.replace('%', '%%'))
    settings.attributes['connection'] = connection
    return settings


def _scripts() -> script.ScriptDirectory:
    return script.ScriptDirectory.from_config(_settings())


def _run(
    database: Database, order: Callable[[sqlalchemy.Connection], None]
) -> None:
    """Do it alone, with as much time as it takes."""
    patient = database if database.is_sqlite else Database(
        database.url, database.clock, timeout_s=None
    )

    def go(session: Session) -> None:
        connection = session.connection()
        with dialects.alone(connection, LOCK_NAME, LOCK_NUMBER, LOCK_S):
            order(connection)

    try:
        patient.write(go)
    finally:
        if patient is not database:
            patient.close()
