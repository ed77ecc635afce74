# SPDX-License-Identifier: Apache-2.0
"""Sessions: who is logged in, with which role, and for how long."""

from __future__ import annotations

import dataclasses
import hmac
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final, TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.published.datamodel import ROLES
from volume.sim.xapi.registry import Session
from volume.sim.xapi.state.values import DateTime

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

ROOT: Final = 'root'
# last_active is written so seldom, as each call changes it.
_ACTIVE_STEP_S: Final = 60.0


@dataclasses.dataclass(frozen=True)
class User:
    """Someone who may log in; only ``root`` is local to the hosts."""

    password: str = dataclasses.field(repr=False)
    role: str = ROLES[-1]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(
                f'no role {self.role!r}; there are {", ".join(ROLES)}'
            )


class Sessions:
    """The sessions of one pool. They are rows, and outlive a restart."""

    def __init__(self, pool: Pool, users: Mapping[str, User]) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._users = dict(users)
        self._active: dict[str, float] = {}
        self._local: dict[str, Session] = {}  # of hosts without a master

    def login(
        self, host: str, user: str, password: str, originator: str = '',
    ) -> str:
        """Return the reference of a new session.

        :raises Failure: SESSION_AUTHENTICATION_FAILED, after a while
        """
        known = self._authenticate(user, password)
        rows = self._pool.rows
        now = self._pool.now()
        with self._lock:
            ref = rows.new(
                'session', this_host=host, last_active=now,
                validation_time=now, is_local_superuser=user == ROOT,
                auth_user_sid='' if user == ROOT else f'sid-{user}',
                auth_user_name='' if user == ROOT else user,
                originator=originator,
                other_config={'role': known.role},
            )
            self._active[ref] = self._pool.clock()
            self._limit(user, originator)
        return ref

    def local_login(self, user: str, password: str) -> str:
        """Return a session of one host alone, for emergencies."""
        self._authenticate(user, password)
        ref = f'OpaqueRef:{uuid.uuid4()}'
        self._local[ref] = Session(ref, ROLES[-1], user, user == ROOT)
        return ref

    def _authenticate(self, user: str, password: str) -> User:
        known = self._users.get(user)
        right = '' if known is None else known.password
        same = hmac.compare_digest(right.encode(), password.encode())
        if known is None or not same:
            time.sleep(self._pool.limits.auth_delay_s)
            raise Failure(
                'SESSION_AUTHENTICATION_FAILED', user,
                'Authentication failure',
            )
        return known

    def _limit(self, user: str, originator: str) -> None:
        limits, rows = self._pool.limits, self._pool.rows
        if originator:
            most = limits.sessions_per_originator
            same = rows.find('session', originator=originator)
        elif user != ROOT:
            most = limits.sessions_per_user
            same = rows.find('session', auth_user_name=user, originator='')
        else:
            most = limits.sessions
            same = rows.find('session', auth_user_name='', originator='')
        same.sort(key=self._last_active)
        for ref in same[:max(0, len(same) - most)]:
            self._end(ref)

    def get(self, ref: str, *, local: bool = False) -> Session:
        """Return a session, which is thereby used.

        :raises Failure: SESSION_INVALID
        """
        if local and ref in self._local:
            return self._local[ref]
        rows = self._pool.rows
        now = self._pool.clock()
        with self._lock:
            if not rows.exists('session', ref):
                raise Failure('SESSION_INVALID', ref)
            if now - self._last_active(ref) > self._pool.limits.session_s:
                self._end(ref)
                raise Failure('SESSION_INVALID', ref)
            row = rows.get('session', ref)
            self._active[ref] = now
            if now - DateTime(row['last_active']).seconds() > _ACTIVE_STEP_S:
                rows.update('session', ref, last_active=DateTime.at(now))
        return Session(
            ref, self.role(row), row['auth_user_name'] or ROOT,
            row['is_local_superuser'], row['originator'],
        )

    def is_local(self, ref: str) -> bool:
        """Say if a session is of one host alone."""
        return ref in self._local

    def role(self, row: Mapping[str, Any]) -> str:
        """Return the role of a session's user."""
        known = self._users.get(row['auth_user_name'] or ROOT)
        return known.role if known else str(row['other_config']['role'])

    def _last_active(self, ref: str) -> float:
        found = self._active.get(ref)
        if found is None:
            row = self._pool.rows.get('session', ref)
            found = DateTime(row['last_active']).seconds()
        return found

    def logout(self, ref: str) -> None:
        """End a session; one that is over already is no error."""
        with self._lock:
            self._local.pop(ref, None)
            if self._pool.rows.exists('session', ref):
                self._end(ref)

    def _end(self, ref: str) -> None:
        self._active.pop(ref, None)
        self._pool.rows.delete('session', ref)

    def collect(self) -> None:
        """Forget those that were not used for long."""
        oldest = self._pool.clock() - self._pool.limits.session_s
        with self._lock:
            for ref in self._pool.rows.all('session'):
                if self._last_active(ref) < oldest:
                    self._end(ref)
