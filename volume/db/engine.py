# SPDX-License-Identifier: Apache-2.0
"""The one way into the database: ``read(fn)`` and ``write(fn)``.

Each runs the whole function in one transaction, and runs it again if the
database says that it lost a race, or has lost the connection. The function
does nothing but SQL: no I/O, no RPC, no waiting; locks are held meanwhile.

A COMMIT whose reply was lost may have been done. It is looked for before the
function runs again: what it has inserted is there, or never will be.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NoReturn, TypeVar

import sqlalchemy
from sqlalchemy import event
from sqlalchemy import exc
from sqlalchemy import insert
from sqlalchemy.orm import Session

from volume import concurrency
from volume import errors
from volume.db import dialects
from volume.db import green
from volume.db.fifo import FifoLock

LOG = logging.getLogger(__name__)

T = TypeVar('T')
Clock = Callable[[], float]

TIMEOUT_S = 10.0
CONNECTIONS = 30
SQLITE_PATIENCE_S = 60.0  # a backup or another process may hold the lock
PAUSE_MAX_S = 0.5

# The database in whose transaction this thread, or greenthread, is.
_inside: contextvars.ContextVar[object] = contextvars.ContextVar(
    'inside', default=None
)


class Database:
    """A database by its URL; ``clock`` gives the time that rows carry.

    ``timeout_s`` is how long a statement may take, and how long lost races
    and lost connections are tried again; ``None`` is for migrations, which
    may take long. Under eventlet a database is shared by greenthreads, or,
    ``for_native``, by native threads: they cannot wait for one another.

    :raises Invalid: the URL is wrong, or its driver is not installed
    """

    def __init__(
        self,
        url: str,
        clock: Clock = time.time,
        *,
        timeout_s: float | None = TIMEOUT_S,
        connections: int = CONNECTIONS,
        for_native: bool = False,
    ) -> None:
        self.url = url
        self.clock = clock
        parsed = dialects.parse(url)
        self.kind = parsed.get_backend_name()
        self.is_sqlite = self.kind == 'sqlite'
        self.engine = dialects.make_engine(
            parsed, timeout_s, connections, for_native
        )
        self._patience_s = SQLITE_PATIENCE_S if self.is_sqlite else (
            timeout_s or TIMEOUT_S
        )
        threads = concurrency.native() if for_native else threading
        self._writing: contextlib.AbstractContextManager[None] = (
            FifoLock(threads) if self.is_sqlite else contextlib.nullcontext()
        )
        # Who has lost a race goes again in turn: of many that want the same
        # row each would else lose to another for ever.
        self._losers = FifoLock(threads)

    def read(self, fn: Callable[[Session], T]) -> T:
        """Return what ``fn`` reads, all of one moment.

        :raises Unavailable: the database does not answer
        """
        return self._attempt(_Work(fn, write=False))

    def write(
        self,
        fn: Callable[[Session], T],
        happened: Callable[[Session], bool] | None = None,
    ) -> T:
        """Return ``fn``'s result once what it wrote is durable.

        ``happened`` says, where ``fn`` inserts nothing, whether it was done
        already; it must lock what it looks at. Without it ``fn`` is asked
        again, which must be harmless.

        :raises Unavailable: the database does not answer; nothing was done
        :raises Unknown: it may have been done
        """
        return self._attempt(_Work(fn, write=True, happened=happened))

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _attempt(self, work: _Work[T]) -> T:
        if _inside.get() is self:
            raise AssertionError('a transaction is open on this thread')
        until = time.monotonic() + self._patience_s
        turn: contextlib.AbstractContextManager[None] = (
            contextlib.nullcontext()
        )
        while True:
            work.attempts += 1
            try:
                with turn:
                    return self._once(work)
            except exc.TimeoutError as failed:
                work.give_up('all connections to it are in use', failed)
            except exc.DBAPIError as failed:
                is_again, turn = self._judge(work, failed)
                if not is_again or time.monotonic() > until:
                    work.give_up(dialects.words(failed), failed)
            # Spread those who lost one race, so that they do not meet
            # again; nothing depends on the number drawn.
            time.sleep(min(
                random.uniform(0, 0.01 * 2 ** min(work.attempts, 10)),
                PAUSE_MAX_S,
            ))

    def _judge(
        self, work: _Work[Any], failed: exc.DBAPIError
    ) -> tuple[bool, contextlib.AbstractContextManager[None]]:
        """Say whether to go again, and in whose turn."""
        if dialects.is_race(failed):
            return True, (
                contextlib.nullcontext() if self.is_sqlite else self._losers
            )
        if isinstance(failed, exc.IntegrityError):
            # Of two that insert the same row, the second finds it when it is
            # asked again.
            if work.has_collided:
                raise failed
            work.has_collided = True
            return True, contextlib.nullcontext()
        if dialects.is_too_old(failed):
            raise errors.Invalid(
                'the database is not MariaDB 10.6.18, 10.11.8 or newer; '
                'MySQL is not supported'
            ) from failed
        if isinstance(failed, exc.DataError):
            raise errors.Invalid(
                'the database does not take a value: '
                f'{dialects.words(failed)}'
            ) from failed
        return dialects.is_away(failed), contextlib.nullcontext()

    def _once(self, work: _Work[T]) -> T:
        with self._writing if work.write else contextlib.nullcontext():
            if self.is_sqlite:
                return green.SQLITE.run(lambda: self._alone(work))
            return self._alone(work)

    def _alone(self, work: _Work[T]) -> T:
        token = _inside.set(self)
        try:
            if work.unheard is not None and work.unheard.made:
                if all(map(self._is_there, work.unheard.made)):
                    return work.unheard.result
                # Its rows could be inserted: it has failed for good.
                work.unheard = None
            return self._transact(work)
        except errors.VolumeError as refused:
            if work.unheard is not None and work.happened is None:
                raise errors.Unknown(
                    f'{UNHEARD}; asked again it says: {refused}'
                ) from refused
            raise
        finally:
            _inside.reset(token)

    def _transact(self, work: _Work[T]) -> T:
        options = {'volume_write': work.write}
        with self.engine.connect().execution_options(**options) as connection:
            transaction = connection.begin()
            try:
                with _Session(
                    connection, autoflush=False, expire_on_commit=False,
                ) as session:
                    result = work.run(session)
                    session.flush()
                    made = session.made
            except BaseException:
                if transaction.is_active:
                    with contextlib.suppress(exc.DBAPIError):
                        transaction.rollback()
                raise
            try:
                transaction.commit()
            except exc.DBAPIError as failed:
                if work.write and dialects.is_unheard(failed):
                    work.unheard = work.unheard or _Unheard(result, made)
                raise
            return result

    def _is_there(self, row: Any) -> bool:
        """Say whether a row of ours was committed; it never will be if not.

        While the transaction that has made it goes on somewhere, the
        insertion waits for its end.
        """
        mapper = sqlalchemy.inspect(row).mapper
        values = {
            each.columns[0]: getattr(row, each.key)
            for each in mapper.column_attrs
        }
        with self.engine.connect() as connection:
            transaction = connection.begin()
            try:
                connection.execute(
                    insert(mapper.local_table).values(values)
                )
            except exc.IntegrityError:
                return True
            finally:
                if transaction.is_active:
                    transaction.rollback()
            return False


UNHEARD = (
    'the database was lost while it was told to commit: it may have been '
    'done; look before asking again'
)


@dataclasses.dataclass(slots=True)
class _Unheard(Generic[T]):
    """A COMMIT without a reply: what it would return, and has inserted."""

    result: T
    made: list[Any]


@dataclasses.dataclass(slots=True)
class _Work(Generic[T]):
    """A function on its way into the database."""

    fn: Callable[[Session], T]
    write: bool
    happened: Callable[[Session], bool] | None = None
    attempts: int = 0
    has_collided: bool = False
    unheard: _Unheard[T] | None = None

    def run(self, session: Session) -> T:
        """Do it, if it was not done already."""
        if self.unheard is not None and self.happened is not None:
            if self.happened(session):
                return self.unheard.result
        return self.fn(session)

    def give_up(self, why: str, failed: Exception) -> NoReturn:
        """Tell the caller, and say which of the two it is."""
        if self.unheard is not None:
            raise errors.Unknown(f'{UNHEARD}: {why}') from failed
        raise errors.Unavailable(
            f'the database does not answer, nothing was done: {why}'
        ) from failed


class _Session(Session):
    """Remembers what it has inserted."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.made: list[Any] = []


@event.listens_for(_Session, 'after_flush')
def _note(session: _Session, flushed: Any) -> None:
    session.made.extend(session.new)


@contextlib.contextmanager
def statements(engine: sqlalchemy.Engine) -> Iterator[list[str]]:
    """Collect the SQL statements of all threads, without BEGIN and COMMIT."""
    seen: list[str] = []

    def note(
        connection: Any, cursor: Any, statement: str, *rest: Any
    ) -> None:
        if not statement.startswith('BEGIN'):
            seen.append(statement)

    event.listen(engine, 'before_cursor_execute', note)
    try:
        yield seen
    finally:
        event.remove(engine, 'before_cursor_execute', note)
