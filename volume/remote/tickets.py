# SPDX-License-Identifier: Apache-2.0
"""Who has a lock of this node that several services share.

A lock file tells by its *ticket* whose turn it is. A service looks at the
ticket, then proves to itself, in the database, that it still has the lease,
and only then asks for the lock: by the ticket that it has seen. Whoever got
the lease later has taken another ticket meanwhile, or will; so a service
that was suspended anywhere on this way is refused, and never ends the
processes of its successor. Each request under a lock is checked against the
ticket again.

A ticket is random: none comes a second time, whatever was lost or removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from volume import errors
from volume import ids
from volume import locks

MUTEX = '.tickets'
TICKET_BYTES = 36
OLD_S = 7 * 86400.0


class Tickets:
    """The lock directory of a node."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, 0o700, exist_ok=True)

    def look(self, wanted: Sequence[str]) -> dict[str, str]:
        """Return the tickets of these locks now; none is the empty text."""
        with self._mutex():
            return {name: self._read(name) for name in wanted}

    @contextlib.contextmanager
    def hold(
        self,
        seen: Mapping[str, str],
        exclusive: Sequence[str],
        grace_s: float,
        check: Callable[[], None],
    ) -> Iterator[Turn | None]:
        """Hold the locks of all that was ``seen``; None if one has changed.

        ``check`` is called while it waits, and ends that by raising.

        :raises Unavailable: a holder could not be ended, or a later owner
            has one of them
        """
        with self._mutex():
            if any(self._read(name) != seen[name] for name in seen):
                yield None
                return
            ours = dict(seen)
            for name in exclusive:
                ours[name] = self._write(name, ids.new())

        @contextlib.contextmanager
        def may_end() -> Iterator[None]:
            # A later owner takes his ticket first, and cannot while we look:
            # so nobody who holds the lock here came after us.
            with self._mutex():
                self._check(ours)
                check()
                yield

        shared = sorted(seen.keys() - set(exclusive))
        with locks.hold(
            self.directory, exclusive, shared, grace_s=grace_s,
            may_end=may_end,
        ) as descriptors:
            turn = Turn(descriptors, ours)
            turn.check()
            yield turn

    def sweep(self) -> None:
        """Remove lock files that nobody has used for a week."""
        before = time.time() - OLD_S
        for name in os.listdir(self.directory):
            path = os.path.join(self.directory, name)
            with contextlib.suppress(FileNotFoundError):
                if name == MUTEX or os.stat(path).st_mtime > before:
                    continue
                with self._mutex(), open(path, 'rb') as f:
                    try:
                        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    os.unlink(path)

    @contextlib.contextmanager
    def _mutex(self) -> Iterator[None]:
        # No command inherits it, and nobody waits for anything in here.
        path = os.path.join(self.directory, MUTEX)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _check(self, ours: Mapping[str, str]) -> None:
        for name, ticket in ours.items():
            if self._read(name) != ticket:
                raise overtaken(name)

    def _read(self, name: str) -> str:
        try:
            with open(os.path.join(self.directory, name), 'rb') as f:
                return f.read(TICKET_BYTES).decode(errors='replace')
        except FileNotFoundError:
            return ''

    def _write(self, name: str, ticket: str) -> str:
        """Write it in place: the file is the lock, and stays what it is."""
        path = os.path.join(self.directory, name)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, ticket.encode(), 0)
        finally:
            os.close(fd)
        return ticket


class Turn:
    """Locks that are held, until a later owner takes one of their tickets.

    Those that other programs go by have none.
    """

    def __init__(
        self, descriptors: Mapping[str, int], tickets: Mapping[str, str]
    ) -> None:
        self.descriptors = tuple(descriptors.values())
        self._kept = [
            (name, fd, tickets[name].encode())
            for name, fd in descriptors.items() if name in tickets
        ]

    def check(self) -> None:
        """Refuse to go on for an owner who is none any more.

        :raises Unavailable: another has the lock's ticket
        """
        for name, fd, ticket in self._kept:
            if os.pread(fd, TICKET_BYTES, 0) != ticket:
                raise overtaken(name)


def overtaken(name: str) -> errors.Unavailable:
    """Return what an owner is told whose time is over."""
    return errors.Unavailable(
        f'{name} has a later owner on this node: nothing was done'
    )


def check_name(name: object) -> str:
    """Return the name of a lock, if it is one.

    :raises Invalid: it is none
    """
    if not isinstance(name, str) or not (
        0 < len(name) <= 200 and name.isascii() and '/' not in name
        and name.isprintable() and name[0] != '.'
    ):
        raise errors.Invalid(f'{name!r:.90} is no name of a lock')
    return name
