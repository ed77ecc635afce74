# SPDX-License-Identifier: Apache-2.0
"""What the service's database says, read behind its back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from typing import Any

Row = dict[str, Any]
JSON_COLUMNS = {'args', 'exclusive', 'shared', 'connector', 'connection'}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Whole tables, of one moment, by id."""

    volumes: dict[str, Row]
    snapshots: dict[str, Row]
    attachments: dict[str, Row]
    jobs: dict[str, Row]
    pools: list[Row]
    devices: list[Row]

    def open_jobs(self) -> list[Row]:
        return [row for row in self.jobs.values() if row['state'] == 'open']

    def live(self, noun: str) -> dict[str, Row]:
        """Return those volumes or snapshots that are no tombstones."""
        rows = self.volumes if noun == 'volume' else self.snapshots
        return {
            row_id: row for row_id, row in rows.items()
            if row['deleted_at'] is None
        }


def read(path: str) -> Rows:
    """Read everything in one transaction."""
    with contextlib.closing(_connect(path, 'ro')) as connection:
        connection.execute('BEGIN')

        def table(name: str) -> list[Row]:
            return [
                _row(found)
                for found in connection.execute(f'SELECT * FROM {name}')
            ]

        def by_id(name: str) -> dict[str, Row]:
            return {row['id']: row for row in table(name)}

        return Rows(
            by_id('volumes'), by_id('snapshots'), by_id('attachments'),
            by_id('jobs'), table('pools'), table('devices'),
        )


def change(path: str, statement: str, *values: object) -> None:
    """Change rows behind the service's back, to see that it is found."""
    with contextlib.closing(_connect(path, 'rw')) as connection, connection:
        connection.execute(statement, values)


def _connect(path: str, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f'file:{path}?mode={mode}', 30.0, uri=True)
    connection.row_factory = sqlite3.Row
    return connection


def _row(found: sqlite3.Row) -> Row:
    return {
        name: json.loads(found[name])
        if name in JSON_COLUMNS and found[name] else found[name]
        for name in found.keys()
    }
