# SPDX-License-Identifier: Apache-2.0
"""Bytes to and from the pool by its HTTP handlers, each with a task.

The handler may send us to the member that has the SR; that one's certificate
is checked like any other's. Whether it went well is said by the task alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode
from urllib.parse import urljoin
from urllib.parse import urlsplit

from volume import errors
from volume.xenapi import failures
from volume.xenapi import tasks
from volume.xenapi.exchange import Exchange
from volume.xenapi.failures import Failure
from volume.xenapi.link import Link

IMPORT, EXPORT = '/import_raw_vdi', '/export_raw_vdi'
REDIRECTS_MAX = 4
STALL_S = 300.0
# How long a task may take to end after its last byte: the server flushes.
END_S = 900.0
# A VDI whose last export or import is just being let go of.
IN_USE_S = 60.0
IN_USE_PAUSE_S = 0.05
MOVED = (301, 302, 303, 307, 308)


class Upload:
    """A PUT that is going on."""

    def __init__(
        self, link: Link, task: str, exchange: Exchange, what: str
    ) -> None:
        self._link = link
        self._task = task
        self._exchange = exchange
        self._what = what
        self._ended = False

    def send(self, view: memoryview) -> None:
        """Send bytes.

        :raises VolumeError: the server hung up, for the reason that it gave
        """
        try:
            self._exchange.send(view)
        except errors.Unknown:
            # It has hung up because the task has failed: that says more.
            self._end()
            raise

    def finish(self) -> None:
        """Wait until the server says that it has all of it.

        :raises VolumeError: it has not, and why
        """
        self._end()

    def abandon(self) -> None:
        """Break off; what was sent may or may not be there."""
        if self._ended:
            return
        self._ended = True
        self._exchange.abort()
        self._exchange.close()
        tasks.cancel(self._link, self._task)
        tasks.destroy(self._link, self._task)

    def _end(self) -> None:
        self._ended = True
        deadline = time.monotonic() + END_S
        try:
            record = tasks.follow(
                self._link, self._task, self._what, deadline)
            tasks.result(self._link, self._what, record)
        finally:
            self._exchange.close()
            tasks.destroy(self._link, self._task)


class Download:
    """A GET that is going on; a reader of it goes forward only."""

    def __init__(
        self, link: Link, task: str, exchange: Exchange, what: str
    ) -> None:
        self._link = link
        self._task = task
        self._exchange = exchange
        self._what = what
        self._closed = False

    def readinto(self, buffer: Any, /) -> int:
        """Read some of it; nothing at its end."""
        count = self._exchange.readinto(buffer)
        if not count and len(memoryview(buffer)):
            self._check()
        return count

    def abort(self) -> None:
        """Stop a read that is waiting, from another thread."""
        self._exchange.abort()

    def close(self) -> None:
        """End it, whether all was read or not."""
        if self._closed:
            return
        self._closed = True
        self._exchange.abort()
        self._exchange.close()
        with contextlib.suppress(errors.VolumeError):
            record = self._link.call('task.get_record', self._task)
            if record['status'] in tasks.OPEN:
                tasks.cancel(self._link, self._task)
        tasks.destroy(self._link, self._task)

    def _check(self) -> None:
        """See that the server takes it for whole, too."""
        record = tasks.follow(
            self._link, self._task, self._what, time.monotonic() + END_S)
        tasks.result(self._link, self._what, record)


def put(
    link: Link, vdi: str, format: str, length_bytes: int, what: str
) -> Upload:
    """Begin to send bytes into a VDI.

    :raises Busy: it is in use
    """
    query = {'vdi': vdi, 'format': format}
    task, exchange = _open(
        link, 'PUT', IMPORT, query, length_bytes, f'import into {what}')
    return Upload(link, task, exchange, f'import into {what}')


def get(
    link: Link, vdi: str, format: str, what: str, base: str = ''
) -> Download:
    """Begin to read a VDI; ``base`` leaves out what is in another VDI.

    :raises Busy: it is in use
    """
    query = {'vdi': vdi, 'format': format}
    if base:
        query['base'] = base
    task, exchange = _open(
        link, 'GET', EXPORT, query, None, f'export of {what}')
    return Download(link, task, exchange, f'export of {what}')


def patiently(
    effect: Callable[[], Any], wait_s: float = IN_USE_S
) -> Any:
    """Return what it returns, once the server has let go of a VDI.

    After an import or export the VDI stays plugged into the server's own
    domain for a moment, beyond the end of the task.
    """
    deadline = time.monotonic() + wait_s
    pause_s = IN_USE_PAUSE_S
    while True:
        try:
            return effect()
        except errors.Busy as busy:
            if failures.code(busy) != 'VDI_IN_USE' or (
                time.monotonic() + pause_s > deadline
            ):
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 4.0)


def _open(
    link: Link, method: str, path: str, query: dict[str, str],
    length_bytes: int | None, what: str,
) -> tuple[str, Exchange]:
    task: str = link.call(
        'task.create', f'volume-service: {what}', 'bytes of a volume')
    try:
        return task, link.node.act(
            f'xapi {method} {path}',
            lambda: _follow(
                link, method, path, {**query, 'task_id': task},
                length_bytes, what, task,
            ),
        )
    except BaseException:
        tasks.destroy(link, task)
        raise


def _follow(
    link: Link, method: str, path: str, query: dict[str, str],
    length_bytes: int | None, what: str, task: str,
) -> Exchange:
    """Ask the master, and then whom it names."""
    session = link.session()
    url, is_renewed = session.url, False
    target = f'{path}?{urlencode({"session_id": session.ref, **query})}'
    for _ in range(REDIRECTS_MAX):
        with _connected(link, url) as exchange:
            exchange.ask(method, target, length_bytes)
            if exchange.status == 200:
                return exchange
            if exchange.status in MOVED:
                url, target = _elsewhere(
                    url, target, exchange.headers.get('location', ''), what)
            elif exchange.status == 401 and not is_renewed:
                is_renewed = True
                link.renew(session)
                session = link.session()
                url = session.url
                target = f'{path}?' + urlencode(
                    {'session_id': session.ref, **query})
            else:
                raise _refused(link, exchange, what, task)
            exchange.close()
    raise errors.Unavailable(
        f'{what}: the members of the pool send us around in a circle')


@contextlib.contextmanager
def _connected(link: Link, url: str) -> Iterator[Exchange]:
    connection = link.open_http(url, STALL_S)
    assert connection.sock is not None
    exchange = Exchange(connection.sock, urlsplit(url).netloc)
    try:
        yield exchange
    except BaseException:
        exchange.close()
        raise


def _elsewhere(
    url: str, target: str, location: str, what: str
) -> tuple[str, str]:
    """Return where a redirect leads; never from TLS to no TLS.

    :raises Unavailable: nowhere
    """
    parts = urlsplit(urljoin(url + target, location))
    if not location or parts.scheme not in ('http', 'https') or (
        url.startswith('https:') and parts.scheme != 'https'
    ):
        raise errors.Unavailable(
            f'{what}: the pool sends us to a place without TLS, or to none')
    return (
        f'{parts.scheme}://{parts.netloc}',
        parts.path + (f'?{parts.query}' if parts.query else ''),
    )


def _refused(
    link: Link, exchange: Exchange, what: str, task: str
) -> errors.VolumeError:
    """Return why a handler refused: its task knows best."""
    with contextlib.suppress(errors.NotFound):
        record = link.call('task.get_record', task)
        if record['status'] == 'failure' and record['error_info']:
            info = [link.clean(each) for each in record['error_info']]
            return failures.mean(what, Failure(*info))
    kinds: dict[int, type[errors.VolumeError]] = {
        401: errors.Denied, 403: errors.Denied, 404: errors.Unsupported,
        400: errors.Unsupported,
    }
    kind = kinds.get(exchange.status, errors.Unavailable)
    return kind(f'{what}: the server answers HTTP {exchange.status}')
