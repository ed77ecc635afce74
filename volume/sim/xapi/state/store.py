# SPDX-License-Identifier: Apache-2.0
"""Rows on disk: what a killed server knows when it comes back."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from volume.sim.xapi.state.values import DateTime

_TIME = '\x00time:'
_TABLES = (
    'CREATE TABLE IF NOT EXISTS rows (ref TEXT PRIMARY KEY, class TEXT, '
    'created INTEGER, modified INTEGER, fields TEXT)',
    'CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)',
)

Saved = tuple[str, str, int, int, dict[str, Any]]


class Store:
    """One SQLite file, written in batches.

    It has to outlive the process, not the power of the machine: a
    simulator's state is nobody's data.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(
            path, check_same_thread=False, isolation_level=None,
        )
        self._database.execute('PRAGMA journal_mode=WAL')
        self._database.execute('PRAGMA synchronous=OFF')
        for table in _TABLES:
            self._database.execute(table)

    def load(self) -> Iterator[Saved]:
        """Yield ref, class, created, modified and fields of each row."""
        for ref, cls, created, modified, fields in self._database.execute(
            'SELECT ref, class, created, modified, fields FROM rows '
            'ORDER BY created',
        ):
            yield ref, cls, created, modified, {
                name: _time(value)
                for name, value in json.loads(fields).items()
            }

    def fact(self, name: str, default: str = '') -> str:
        """Return a fact that is no row."""
        found = self._database.execute(
            'SELECT value FROM facts WHERE name = ?', (name,),
        ).fetchone()
        return str(found[0]) if found else default

    def save(
        self, rows: Iterable[Saved], gone: Iterable[str],
        facts: dict[str, str],
    ) -> None:
        """Write a batch, wholly or not at all."""
        with self._lock, self._database as database:
            database.execute('BEGIN IMMEDIATE')
            database.executemany(
                'DELETE FROM rows WHERE ref = ?', ((ref,) for ref in gone),
            )
            database.executemany(
                'INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)',
                (
                    (ref, cls, created, modified, json.dumps(
                        {name: _text(part) for name, part in fields.items()},
                    )) for ref, cls, created, modified, fields in rows
                ),
            )
            database.executemany(
                'INSERT OR REPLACE INTO facts VALUES (?, ?)', facts.items(),
            )

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()


def _text(value: Any) -> Any:
    return _TIME + value if isinstance(value, DateTime) else value


def _time(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_TIME):
        return DateTime(value.removeprefix(_TIME))
    return value
