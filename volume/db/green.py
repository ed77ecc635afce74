# SPDX-License-Identifier: Apache-2.0
"""The database under eventlet, and the native threads that use it.

SQLite waits for the disk inside C, and would stop every greenthread. So a
transaction as a whole is one call into a native thread, and the pool of
connections has locks that work between native threads. The lock that makes
writers queue stays with the greenthreads: at most one of them is in here to
write, and the others read.

PyMySQL and psycopg2 wait where eventlet can see it, and need none of this.

Heartbeat and leases are in native threads from the start; whatever database
it is, theirs has native locks alone. And SQLAlchemy's own, which all share,
must not be eventlet's: of two native threads that meet at one, one fails, or
both wait for ever.
"""

from __future__ import annotations

import itertools
from typing import Any

import sqlalchemy
from sqlalchemy.orm import configure_mappers
from sqlalchemy.orm import loading
from sqlalchemy.orm import session
from sqlalchemy.util import _collections
from sqlalchemy.util import queue

from volume import concurrency

SQLITE = concurrency.Lane('sqlite', 8)
# Functions that return the next number; each Session and each query asks one.
COUNTERS = ((session, '_new_sessionid'), (loading, '_new_runid'))


def prepare() -> None:
    """Take eventlet's locks out of SQLAlchemy's counters and caches.

    All threads of the process share them. Nothing waits while it holds one,
    so native ones do no harm between greenthreads. A test looks for those
    that a release of SQLAlchemy may add.
    """
    if not concurrency.is_green():
        return
    for module, name in COUNTERS:
        if hasattr(module, name):
            # Goes on where it is; one step of it is done in C, and so alone.
            numbers = itertools.count(getattr(module, name)())
            setattr(module, name, numbers.__next__)
    # Of the caches that are made from now on.
    vars(_collections)['threading'] = concurrency.native()
    # Done on first use otherwise, under a lock of greenthreads.
    configure_mappers()


def pool_arguments() -> dict[str, Any]:
    """Return what ``create_engine`` needs to know for native threads."""
    return {'poolclass': _NativePool} if concurrency.is_green() else {}


class _NativeQueue(queue.Queue[Any]):
    """SQLAlchemy's queue, between native threads."""

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        super().__init__(maxsize, use_lifo)
        threads = concurrency.native()
        self.mutex = threads.RLock()
        self.not_empty = threads.Condition(self.mutex)
        self.not_full = threads.Condition(self.mutex)


class _NativePool(sqlalchemy.QueuePool):
    """SQLAlchemy's pool, between native threads."""

    __module__ = sqlalchemy.QueuePool.__module__  # and its log's name

    _queue_class = _NativeQueue

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._overflow_lock = concurrency.native().Lock()
        self._first_lock = concurrency.native().Lock()
        self._is_begun = False

    def connect(self) -> sqlalchemy.PoolProxiedConnection:
        if self._is_begun:
            return super().connect()
        # The dialect looks at the first connection, under a lock that no
        # other native thread may be found waiting for.
        with self._first_lock:
            made = super().connect()
            self._is_begun = True
            return made
