# SPDX-License-Identifier: Apache-2.0
"""A migrated database for one test, and rows to put into it."""

from __future__ import annotations

import os
import unittest
from typing import Any

from volume import ids
from volume.db import migrate
from volume.db import models
from volume.db.engine import Database
from volume.testing import fixtures

NOW = 1_700_000_000.0
GIB = 1 << 30


class Clock:
    """Time that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def make(test: unittest.TestCase, clock: Clock | None = None) -> Database:
    """Return an empty database of the newest version, closed with the test."""
    path = os.path.join(fixtures.state_dir(test), 'volume.sqlite')
    db = Database(f'sqlite:///{path}', clock or Clock())
    test.addCleanup(db.close)
    migrate.upgrade(db)
    return db


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
