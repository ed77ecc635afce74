# SPDX-License-Identifier: Apache-2.0
"""Migrations on MariaDB: what was done before a crash is not done again.

PostgreSQL and SQLite run a migration in one transaction. MariaDB commits
with every statement that changes a table, so a migration that was killed has
been done in part, and its version is not recorded. Run again, it finds here
what there is already. Statements that change rows must be repeatable by
themselves.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy
from alembic.ddl import mysql
from sqlalchemy import Column
from sqlalchemy import Index
from sqlalchemy import Table

from volume import errors
from volume.db.dialects import MARIADB_COLLATION


class RepeatableImpl(mysql.MariaDBImpl):
    """Looks before it makes or removes a table, a column or an index."""

    __dialect__ = 'mariadb'

    def create_table(self, table: Table, **kw: Any) -> None:
        """Make a table, whose texts compare exactly."""
        if self._look().has_table(table.name):
            there = {each['name'] for each in self._columns(table.name)}
            if there == {column.name for column in table.columns}:
                for index in table.indexes:
                    self.create_index(index)
                return
            raise errors.Invalid(
                f'the database has another table {table.name}; give the '
                'service a database of its own'
            )
        table.kwargs.update(
            mariadb_engine='InnoDB', mariadb_default_charset='utf8mb4',
            mariadb_collate=MARIADB_COLLATION,
        )
        super().create_table(table, **kw)

    def drop_table(self, table: Table, **kw: Any) -> None:
        """Remove a table if it is there."""
        if self._look().has_table(table.name):
            super().drop_table(table, **kw)

    def add_column(
        self, table_name: str, column: Column[Any], **kw: Any
    ) -> None:
        """Add a column if it is missing."""
        if column.name not in self._names(table_name):
            super().add_column(table_name, column, **kw)

    def drop_column(
        self, table_name: str, column: Column[Any], **kw: Any
    ) -> None:
        """Remove a column if it is there."""
        if column.name in self._names(table_name):
            super().drop_column(table_name, column, **kw)

    def create_index(self, index: Index, **kw: Any) -> None:
        """Make an index if it is missing."""
        if not self._has_index(index):
            super().create_index(index, **kw)

    def drop_index(self, index: Index, **kw: Any) -> None:
        """Remove an index if it is there."""
        if self._has_index(index):
            super().drop_index(index, **kw)

    def _look(self) -> Any:
        assert self.connection is not None
        # Made anew: an inspector remembers what it has seen.
        return sqlalchemy.inspect(self.connection)

    def _columns(self, table_name: str) -> list[Any]:
        found: list[Any] = self._look().get_columns(table_name)
        return found

    def _names(self, table_name: str) -> set[str]:
        """Return a table's columns; a table that is gone has none."""
        if not self._look().has_table(table_name):
            return set()
        return {each['name'] for each in self._columns(table_name)}

    def _has_index(self, index: Index) -> bool:
        assert index.table is not None
        look = self._look()
        return look.has_table(index.table.name) and index.name in {
            each['name'] for each in look.get_indexes(index.table.name)
        }
