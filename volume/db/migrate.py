# SPDX-License-Identifier: Apache-2.0
"""Bring the database's schema to a version, up or down."""

from __future__ import annotations

import os

import sqlalchemy
from alembic import command
from alembic import config
from alembic import script
from alembic.runtime import migration

from volume import errors
from volume.db.engine import Database

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'alembic')


def current(database: Database) -> str | None:
    """Return the schema's version; ``None`` for an empty database."""
    with database.engine.connect() as connection:
        context = migration.MigrationContext.configure(connection)
        version: str | None = context.get_current_revision()
    return version


def newest() -> str:
    """Return the version that this code is written for."""
    head = _scripts().get_current_head()
    assert head is not None
    return str(head)


def upgrade(database: Database, version: str = 'head') -> None:
    """Bring the schema up to a version, by default the newest."""
    _run(database, lambda settings: command.upgrade(settings, version))


def downgrade(database: Database, version: str) -> None:
    """Bring the schema down to a version; ``base`` removes everything."""
    _run(database, lambda settings: command.downgrade(settings, version))


def require(database: Database) -> None:
    """Check that the schema is the one that this code is written for.

    :raises Invalid: it is older, or newer than this code knows
    """
    found, wanted = current(database), newest()
    if found == wanted:
        return
    known = {revision.revision for revision in _scripts().walk_revisions()}
    if found is not None and found not in known:
        raise errors.Invalid(
            f'the database has version {found}, which this release does not '
            'know: it is newer; start the release that made it'
        )
    raise errors.Invalid(
        f'the database has version {found}, this release needs {wanted}: '
        'run "volume-manage db upgrade"'
    )


def _settings() -> config.Config:
    settings = config.Config()
    settings.set_main_option('script_location', HERE.replace('%', '%%'))
    return settings


def _scripts() -> script.ScriptDirectory:
    return script.ScriptDirectory.from_config(_settings())


def _run(database: Database, order: object) -> None:
    settings = _settings()

    def go(session: sqlalchemy.orm.Session) -> None:
        settings.attributes['connection'] = session.connection()
        order(settings)  # type: ignore[operator]

    database.write(go)
