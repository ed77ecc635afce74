# SPDX-License-Identifier: Apache-2.0
"""What clients are told of changes: ``event.from``, and what it replaced."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.state.values import Int32

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.registry import Session

# [I] Classes whose objects make no events.
SILENT: Final = frozenset({'session', 'secret', 'role'})
_TOKEN: Final = re.compile(r'(\d{1,20}),(\d{1,20})')
_LOOK_S: Final = 1.0

Event = dict[str, Any]


class Subscription:
    """Which objects someone wants to hear of."""

    def __init__(self, classes: Iterable[str]) -> None:
        self.all = False
        self.classes: set[str] = set()
        self.objects: set[tuple[str, str]] = set()
        for text in classes:
            self.add(text)

    def add(self, text: str) -> None:
        """Want one more: ``*``, ``vdi`` or ``vdi/OpaqueRef:…``."""
        cls, _, ref = text.partition('/')
        if text.count('/') > 1 or not cls or ('/' in text and not ref):
            raise Failure('EVENT_SUBSCRIPTION_PARSE_FAILURE', text)
        if text == '*':
            self.all = True
        elif ref:
            self.objects.add((cls.lower(), ref))
        else:
            self.classes.add(cls.lower())

    def remove(self, text: str) -> None:
        """Want one less."""
        cls, _, ref = text.partition('/')
        self.all = self.all and text != '*'
        self.objects.discard((cls.lower(), ref))
        self.classes.discard(text.lower())

    def wants(self, cls: str, ref: str) -> bool:
        """Say if an object is among them."""
        name = cls.lower()
        return cls not in SILENT and (
            self.all or name in self.classes or (name, ref) in self.objects
        )

    def wants_class(self, cls: str) -> bool:
        """Say if any object of a class is among them."""
        name = cls.lower()
        return cls not in SILENT and (
            self.all or name in self.classes
            or any(name == wanted for wanted, _ in self.objects)
        )


class Events:
    """The events of one pool; a change is kept once, with its number."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        # The old interface: session -> what it wants, and what it knows.
        self._registered: dict[str, tuple[Subscription, int]] = {}

    def token(self) -> str:
        """Return the token of now."""
        return _token(self._pool.rows.generation)

    def from_(
        self, session: Session, classes: list[str], token: str,
        timeout_s: float,
    ) -> dict[str, Any]:
        """Return what is newer than a token; wait for it if nothing is.

        Without a token everything is newer.
        """
        wanted = Subscription(classes)
        generation = _generation(token)
        events = self._await(session, wanted, generation, timeout_s)
        rows = self._pool.rows
        with rows.lock:
            # What changed while the batch was put together comes again.
            return {
                'events': events[0],
                'valid_ref_counts': {
                    cls.lower(): Int32(len(rows.all(cls)))
                    for cls in self._pool.model.classes
                    if wanted.wants_class(cls) and self._has_objects(cls)
                },
                'token': _token(events[1]),
            }

    def _await(
        self, session: Session, wanted: Subscription, generation: int,
        timeout_s: float,
    ) -> tuple[list[Event], int]:
        rows = self._pool.rows
        end = time.monotonic() + max(0.0, timeout_s)
        seen = generation
        while True:
            with rows.changed:
                newer = self._is_newer(wanted, seen)
                if not newer:
                    seen = max(seen, rows.generation)
                    left = end - time.monotonic()
                    if left > 0 and not self._pool.stopping.is_set():
                        rows.changed.wait(min(left, _LOOK_S))
            if newer:
                # Together what happens together, as the server does.
                if generation and self._pool.limits.event_batch_s:
                    time.sleep(self._pool.limits.event_batch_s)
                with rows.lock:
                    return list(
                        self._newer(wanted, generation),
                    ), rows.generation
            self._pool.sessions.get(session.ref)
            if left <= 0 or self._pool.stopping.is_set():
                return [], max(seen, generation)

    def _has_objects(self, cls: str) -> bool:
        # A class of plain records (``sr_stat``) has none to count.
        return f'{cls}.get_all' in self._pool.model.messages()

    def _is_newer(self, wanted: Subscription, generation: int) -> bool:
        return any(
            wanted.wants(cls, ref)
            for _, cls, ref in self._pool.rows.since(generation)
        )

    def _newer(
        self, wanted: Subscription, generation: int,
    ) -> Iterator[Event]:
        rows = self._pool.rows
        for operation, cls, ref in rows.since(generation):
            if wanted.wants(cls, ref):
                event: Event = {
                    'id': str(rows.generation),
                    'timestamp': '0.0',
                    'class': cls.lower(),
                    'operation': operation,
                    'ref': ref,
                }
                if operation != 'del':
                    event['snapshot'] = rows.get(cls, ref)
                yield event

    def inject(self, cls: str, ref: str) -> str:
        """Make an event of an object; return a token from before it."""
        rows = self._pool.rows
        name = next((
            name for name in self._pool.model.classes
            if name.lower() == cls.lower()
        ), cls)
        with rows.lock:
            if not rows.exists(name, ref):
                raise Failure('HANDLE_INVALID', cls, ref)
            token = self.token()
            rows.touch(name, ref)
            return token

    # -- before 2010: one queue for each session --------------------------

    def register(self, session: str, classes: list[str]) -> None:
        """Have a session hear of some classes from now on."""
        with self._lock:
            wanted, known = self._registered.get(session, (None, -1))
            if wanted is None:
                wanted = Subscription(())
                known = self._pool.rows.generation
            for text in classes:
                wanted.add(text)
            self._registered[session] = wanted, known

    def unregister(self, session: str, classes: list[str]) -> None:
        """Have a session hear less."""
        with self._lock:
            if session in self._registered:
                for text in classes:
                    self._registered[session][0].remove(text)

    def next(self, session: Session) -> list[Event]:
        """Wait for events of what the session registered."""
        with self._lock:
            if session.ref not in self._registered:
                raise Failure('SESSION_NOT_REGISTERED', session.ref)
            wanted, known = self._registered[session.ref]
        if self._pool.rows.is_lost(known):
            with self._lock:
                self._registered.pop(session.ref)
            raise Failure('EVENTS_LOST')
        events: list[Event] = []
        while not events and not self._pool.stopping.is_set():
            events, known = self._await(session, wanted, known, 30.0)
        with self._lock:
            if session.ref in self._registered:
                self._registered[session.ref] = wanted, known
        return events


def _token(generation: int) -> str:
    return f'{generation:020d},{0:020d}'


def _generation(token: str) -> int:
    if not token:
        return 0
    found = _TOKEN.fullmatch(token)
    if found is None:
        raise Failure('EVENT_FROM_TOKEN_PARSE_FAILURE', token)
    return int(found[1])
