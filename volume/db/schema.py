# SPDX-License-Identifier: Apache-2.0
"""Which version of the schema this code is written for.

A service looks here first: if the database has that version, as it nearly
always has, alembic (a tenth of a second of a start) is never loaded.
"""

from __future__ import annotations

import sqlalchemy
from sqlalchemy.orm import Session

from volume.db.engine import Database

REVISION = '0004'
TABLE = 'alembic_version'


def ensure(database: Database) -> None:
    """Return if this code can work on the database; an empty one is filled.

    :raises Invalid: its schema is older, or newer and too different
    """
    if database.read(_version) == REVISION:
        return
    from volume.db import migrate

    if migrate.current(database) is None:
        migrate.upgrade(database)
    migrate.require(database)


def _version(session: Session) -> str | None:
    if not sqlalchemy.inspect(session.connection()).has_table(TABLE):
        return None
    found: str | None = session.scalar(
        sqlalchemy.text(f'SELECT version_num FROM {TABLE}')
    )
    return found
