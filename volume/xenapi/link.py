# SPDX-License-Identifier: Apache-2.0
"""The pool: calls, over one session, to whichever member is the master.

``Link.call('VDI.get_record', ref)`` is the whole interface; the session is
left out. Members are tried one after the other, a slave names its master,
and each new connection has its certificate checked before it is told
anything. A session that has ended is renewed. What comes out is the value,
or one of our errors: ``Unavailable`` when the server did not get the call,
``Unknown`` when it may have; a call that only reads is made again instead.

A service has one session, with an originator of its own, so that others'
sessions cannot push it out; it ends with the link.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import http.client
import logging
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from volume import errors
from volume.node import Node
from volume.xenapi import calls
from volume.xenapi import failures
from volume.xenapi import options
from volume.xenapi import wire
from volume.xenapi.failures import Failure
from volume.xenapi.options import Settings

LOG = logging.getLogger(__name__)

BOOTING_S = 1.0
TASKS_MAX = 50  # of ours at once; the server forgets results beyond 200
TRIES = 4
LOGOUT_S = 5.0

Record = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """Where the master is, and what it knows us by."""

    url: str
    ref: str = dataclasses.field(repr=False)


class Link:
    """A pool of hosts, as one server."""

    def __init__(
        self,
        settings: Settings,
        node: Node,
        connect: wire.Connect = wire.XenWire,
    ) -> None:
        self.settings = settings
        self.node = node
        self.tasks = threading.BoundedSemaphore(TASKS_MAX)
        self.records: list[Record] = []
        self._state = _State(settings, connect)
        self._logging_in = threading.Lock()
        state = hashlib.sha256(node.state_dir.encode()).hexdigest()[:8]
        self.originator = f'volume-service {socket.gethostname()} {state}'
        _at_exit.add(self._state)
        # Whoever lets go of a link may be the collector of garbage, which
        # stops the thread that it happens to run in: it must not wait.
        weakref.finalize(self, _State.end_soon, self._state).atexit = False

    # Calls.

    def call(self, method: str, *args: Any) -> Any:
        """Return what the server answers.

        :raises Unavailable: nothing happened
        :raises Unknown: its reply was lost
        """
        for record in self.records:
            record(method)
        deadline = time.monotonic() + self.settings.timeout_s
        tries = 0
        while True:
            session = self.session()
            tries += 1
            try:
                return self._send(
                    session.url, method, (session.ref, *args)
                )
            except wire.NotSent as failed:
                self._forget(session)
                if tries >= TRIES:
                    raise errors.Unavailable(
                        f'{method}: the pool cannot be reached: '
                        f'{self.clean(failed)}'
                    ) from failed
            except wire.Lost as failed:
                self._forget(session)
                if not calls.is_read(method) or tries >= TRIES:
                    kind = errors.Unavailable if calls.is_read(method) else (
                        errors.Unknown)
                    raise kind(
                        f'{method}: its reply was lost: {self.clean(failed)}'
                    ) from failed
            except Failure as failure:
                self._settle(session, method, failure, tries, deadline)

    def session(self) -> Session:
        """Return the session, logged in if need be.

        :raises Unavailable: no member can be reached, or none is the master
        :raises Denied: user or password is wrong
        """
        found = self._state.session
        if found is not None:
            return found
        with self._logging_in:
            if self._state.session is None:
                self._state.session = self._log_in()
            return self._state.session

    def renew(self, session: Session) -> None:
        """Log in again at the next call: the server knows this one no more.

        For those who use ``session()`` outside of calls.
        """
        self._forget(session)

    def open_http(
        self, url: str, timeout_s: float | None = None
    ) -> http.client.HTTPConnection:
        """Return a connection to a member for bytes, certificate checked.

        :raises Unavailable: it cannot be reached, or is not who it must be
        """
        try:
            return wire.http_connection(
                url, self._state.context(url),
                timeout_s or self.settings.timeout_s,
            )
        except wire.NotSent as failed:
            raise errors.Unavailable(
                f'the member cannot be reached: {self.clean(failed)}'
            ) from failed

    def url_of(self, address: str) -> str:
        """Return the URL of a member by the address that the pool gives."""
        return _url_of(address, self.session().url)

    def clean(self, text: object) -> str:
        """Return a text without the secrets that it may hold."""
        session = self._state.session
        secrets = self.settings.secrets()
        return options.mask(
            str(text), [*secrets, session.ref] if session else secrets
        )

    def close(self) -> None:
        """End the session."""
        self._state.end()

    # Ours alone.

    def _settle(
        self, session: Session, method: str, failure: Failure, tries: int,
        deadline: float,
    ) -> None:
        """Prepare another try, or say what the answer means."""
        code = failure.code
        if code == 'SESSION_INVALID' and tries < TRIES:
            self._forget(session)
        elif code == 'HOST_IS_SLAVE' and tries < TRIES:
            self._forget(session, *failure.params[:1])
        elif code == 'HOST_STILL_BOOTING' and time.monotonic() < deadline:
            time.sleep(BOOTING_S)
        else:
            safe = Failure(code, *map(self.clean, failure.params))
            raise failures.mean(method, safe) from safe

    def _forget(self, session: Session, master: str = '') -> None:
        """Let the next call log in anew, unless another thread did."""
        with self._logging_in:
            if self._state.session is session:
                self._state.session = None
                self._state.drop(session.url)
                if master:
                    self._state.last_url = _url_of(master, session.url)

    def _log_in(self) -> Session:
        """Find the master and log in there."""
        state, deadline = self._state, (
            time.monotonic() + self.settings.timeout_s
        )
        urls = [u for u in (state.last_url, *self.settings.urls) if u]
        seen: set[str] = set()
        lost: set[str] = set()
        reasons: list[str] = []
        while urls:
            url = urls.pop(0)
            if url in seen:
                continue
            seen.add(url)
            try:
                ref = self._send(url, 'session.login_with_password', (
                    self.settings.username, self.settings.password, '1.0',
                    self.originator,
                ))
            except wire.NotSent as failed:
                reasons.append(self.clean(failed))
            except wire.Lost as failed:
                if url not in lost:
                    # A session that nobody uses is no harm.
                    seen.discard(url)
                    urls.insert(0, url)
                lost.add(url)
                reasons.append(self.clean(failed))
            except Failure as failure:
                if failure.code == 'HOST_IS_SLAVE' and failure.params:
                    reasons.append(f'{url}: a slave')
                    urls.insert(0, _url_of(failure.params[0], url))
                elif failure.code == 'HOST_STILL_BOOTING' and (
                    time.monotonic() < deadline
                ):
                    time.sleep(BOOTING_S)
                    seen.discard(url)
                    urls.insert(0, url)
                else:
                    who = f'login of {self.settings.username} at {url}'
                    raise failures.mean(who, Failure(
                        failure.code, *map(self.clean, failure.params)
                    )) from failure
            else:
                state.last_url = url
                return Session(url, str(ref))
        raise errors.Unavailable(
            f'no master of the pool can be reached: {"; ".join(reasons)}'
        )

    def _send(
        self, url: str, method: str, params: tuple[Any, ...]
    ) -> Any:
        def effect() -> Any:
            connection = self._state.take(url)
            try:
                found = connection.request(method, params)
            except Failure:
                self._state.put(url, connection)
                raise
            except BaseException:
                connection.close()
                raise
            self._state.put(url, connection)
            return found

        return self.node.act(f'xapi {method}', effect)


class _State:
    """Connections that lie idle, and the session: what outlives a call."""

    def __init__(self, settings: Settings, connect: wire.Connect) -> None:
        self.settings = settings
        self.session: Session | None = None
        self.last_url = ''
        self._connect = connect
        self._certificates = wire.Certificates(settings)
        self._guard = threading.Lock()
        self._idle: dict[str, list[wire.Wire]] = {}

    def context(self, url: str) -> ssl.SSLContext | None:
        return self._certificates.context(url)

    def take(self, url: str) -> wire.Wire:
        with self._guard:
            if self._idle.get(url):
                return self._idle[url].pop()
        return self._connect(
            url, self.context(url), self.settings.timeout_s
        )

    def put(self, url: str, connection: wire.Wire) -> None:
        with self._guard:
            self._idle.setdefault(url, []).append(connection)

    def drop(self, url: str) -> None:
        """Close what lies idle: its member may be another one now."""
        with self._guard:
            for connection in self._idle.pop(url, []):
                connection.close()

    def end_soon(self) -> None:
        """Log out in a thread of its own, or when the process ends."""
        if self.session is not None:
            # Under eventlet it may be collected where no greenthread can
            # be begun.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self.end, daemon=True).start()

    def end(self) -> None:
        """Log out, and close everything."""
        _at_exit.discard(self)
        session, self.session = self.session, None
        if session is not None:
            with contextlib.suppress(
                wire.NotSent, wire.Lost, Failure, errors.VolumeError
            ):
                connection = self._connect(
                    session.url, self.context(session.url), LOGOUT_S
                )
                connection.request('session.logout', (session.ref,))
                connection.close()
        for url in list(self._idle):
            self.drop(url)


# Whose sessions are still to be ended when the process ends.
_at_exit: set[_State] = set()


@atexit.register
def _end_all() -> None:
    for state in list(_at_exit):
        state.end()


def _url_of(address: str, like: str) -> str:
    """Return the URL of an address, with scheme and port of another."""
    parts = urlsplit(like)
    if address.count(':') > 1 and not address.startswith('['):
        address = f'[{address}]'  # IPv6
    if parts.port and urlsplit(f'//{address}').port is None:
        address = f'{address}:{parts.port}'
    return f'{parts.scheme}://{address}'
