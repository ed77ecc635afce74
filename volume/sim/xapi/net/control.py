# SPDX-License-Identifier: Apache-2.0
"""The control port: what a test does to a pool from outside of it.

HTTP with JSON, on the loopback address alone, without a password: it is for
tests, and whoever reaches it owns the pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, TYPE_CHECKING
from urllib.parse import parse_qsl
from urllib.parse import urlsplit

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.faults import ASYNC
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.faults import TRANSFERS
from volume.sim.xapi.objects.guests import guests

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

BODY_BYTES: Final = 64 << 20
Query = dict[str, str]
Verb = Callable[['Pool', list[str], Any], Any]


class Control:
    """The control port of one pool."""

    def __init__(self, pool: Pool, port: int = 0) -> None:
        self._server = _Server(('127.0.0.1', port), pool)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), daemon=True,
            name='xapi-control',
        )

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f'http://127.0.0.1:{self._server.server_address[1]}'

    def start(self) -> None:
        """Listen."""
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], pool: Pool) -> None:
        self.pool = pool
        super().__init__(address, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = 'HTTP/1.1'

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        words = [word for word in parts.path.split('/') if word]
        try:
            length = int(self.headers.get('Content-Length') or 0)
            if length > BODY_BYTES:
                self.close_connection = True
                raise ValueError(f'more than {BODY_BYTES} bytes at once')
            body = self.rfile.read(length)
            status, answer = self._do(words, body, dict(
                parse_qsl(parts.query),
            ))
        except LookupError as error:
            status, answer = HTTPStatus.NOT_FOUND, {'error': str(error)}
        except (Failure, ValueError, TypeError, OSError) as error:
            status, answer = HTTPStatus.BAD_REQUEST, {'error': str(error)}
        self._answer(status, answer)

    def _do(
        self, words: list[str], body: bytes, query: Query,
    ) -> tuple[HTTPStatus, Any]:
        pool = self.server.pool
        if words[:1] == ['guests'] and len(words) == 3:
            return HTTPStatus.OK, _guest(
                pool, self.command, words[1:], body, query,
            )
        verb = _VERBS.get((self.command, words[0] if words else ''))
        if verb is None:
            raise LookupError(f'{self.command} {self.path} is nothing')
        return HTTPStatus.OK, verb(
            pool, words[1:], json.loads(body) if body else {},
        )

    def _answer(self, status: HTTPStatus, answer: Any) -> None:
        raw = isinstance(answer, bytes)
        body = answer if raw else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header(
            'Content-Type',
            'application/octet-stream' if raw else 'application/json',
        )
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)


def _guest(
    pool: Pool, method: str, words: list[str], body: bytes, query: Query,
) -> Any:
    """Read or write as the guest of a VM does, on what it has plugged."""
    vm, device = words
    offset = int(query.get('offset', 0))
    if device == 'behaviour':
        return _behave(pool, vm, json.loads(body) if body else {})
    if method == 'PUT':
        guests(pool).write(vm, device, offset, body)
        return {'written': len(body)}
    length = int(query.get('length', 4096))
    if length > BODY_BYTES:
        raise ValueError(f'more than {BODY_BYTES} bytes at once')
    return guests(pool).read(vm, device, offset, length)


def _behave(pool: Pool, vm: str, body: Any) -> Any:
    """``{"refuses_detach": true}``: how a guest takes what is done to it."""
    pool.rows.by_uuid('VM', vm)
    behaviour = guests(pool).behaviour(vm)
    for name, wanted in body.items():
        if type(getattr(behaviour, name, None)) is not type(wanted):
            raise ValueError(f'a guest has no {name} = {wanted!r}')
        setattr(behaviour, name, wanted)
    return dataclasses.asdict(behaviour)


def _calls(pool: Pool, words: list[str], body: Any) -> Any:
    """How often each call came since the start, whoever made it."""
    return dict(pool.calls)


def _add_fault(pool: Pool, words: list[str], body: Any) -> Any:
    fault = Fault(**body)
    plain = fault.method.removeprefix(ASYNC)
    if plain not in ('*', *TRANSFERS) and pool.model.message(plain) is None:
        raise ValueError(
            f'there is no call {fault.method!r}; a fault names one, '
            f'{" or ".join(TRANSFERS)}, or *'
        )
    return dataclasses.asdict(pool.faults.add(fault))


def _clear_faults(pool: Pool, words: list[str], body: Any) -> Any:
    pool.faults.clear()
    return {}


def _set_master(pool: Pool, words: list[str], body: Any) -> Any:
    """``{"host": 1, "kill": true}``; without a host the next one."""
    if 'host' in body:
        pool.set_master(body['host'], kill=bool(body.get('kill')))
    else:
        pool.kill_master()
    return {'master': pool.url()}


def _switch_host(pool: Pool, words: list[str], body: Any) -> Any:
    number, what = words
    if what == 'stop':
        pool.stop_host(number)
    elif what == 'start':
        pool.start_host(number)
    else:
        raise LookupError(f'a host cannot {what}')
    return {'url': pool.url(number)}


def _switch_sr(pool: Pool, words: list[str], body: Any) -> Any:
    uuid, what = words
    if what != 'online' and not pool.rows.find('SR', uuid=uuid):
        raise LookupError(f'the pool has no SR {uuid}')
    if what == 'offline':
        pool.faults.put_sr_offline(uuid)
    elif what == 'online':
        pool.faults.put_sr_online(uuid)
    elif what == 'room':
        pool.faults.fill_sr(uuid, body.get('free_bytes'))
    else:
        raise LookupError(f'an SR cannot be {what}')
    return {}


def _gc(pool: Pool, words: list[str], body: Any) -> Any:
    """``{"paused": true}``, ``{"delay_s": 1}`` or ``{"sr": uuid}``: now."""
    unknown = body.keys() - {'paused', 'delay_s', 'sr'}
    if unknown:
        raise ValueError(f'the collector has no {", ".join(unknown)}')
    if 'paused' in body:
        pool.faults.gc_paused = bool(body['paused'])
    if 'delay_s' in body:
        delay_s = body['delay_s']
        pool.faults.gc_delay_s = None if delay_s is None else float(delay_s)
    pool.sm.gc_changed()
    if 'sr' in body:
        pool.gc(str(body['sr']))
    return {}


def _advance(pool: Pool, words: list[str], body: Any) -> Any:
    pool.advance(float(body['advance_s']))
    return {'now': pool.now()}


def _booting(pool: Pool, words: list[str], body: Any) -> Any:
    pool.booting = bool(body['booting'])
    return {}


def _state(pool: Pool, words: list[str], body: Any) -> Any:
    return {
        'name': pool.name,
        'uuid': pool.uuid,
        'profile': pool.profile.name,
        'master': pool.url(),
        'hosts': [
            {
                'uuid': pool.rows.field('host', host, 'uuid'),
                'url': pool.url(host),
                'up': pool.is_up(host),
                'master': host == pool.master,
            } for host in pool.hosts
        ],
        'faults': [dataclasses.asdict(f) for f in pool.faults.waiting],
        'happened': pool.faults.happened,
        'offline': pool.faults.offline,
        'gc_paused': pool.faults.gc_paused,
        'tasks': pool.tasks.pending,
        'violations': pool.world.violations,
        'now': pool.now(),
    }


_VERBS: Final[dict[tuple[str, str], Verb]] = {
    ('POST', 'faults'): _add_fault,
    ('DELETE', 'faults'): _clear_faults,
    ('POST', 'master'): _set_master,
    ('POST', 'hosts'): _switch_host,
    ('POST', 'srs'): _switch_sr,
    ('POST', 'gc'): _gc,
    ('POST', 'clock'): _advance,
    ('POST', 'booting'): _booting,
    ('GET', 'state'): _state,
    ('GET', 'calls'): _calls,
}
