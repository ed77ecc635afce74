# SPDX-License-Identifier: Apache-2.0
"""Disks over plain HTTP: ``/import_raw_vdi`` and ``/export_raw_vdi``.

As on a real server, the status of 200 comes before the first byte of data:
how it went stands in the task, and the connection is closed. What fails
after the 200 may be found inside the body, as a second head.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.cookies
import logging
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING

from volume import errors
from volume.sim.xapi import pool as pools
from volume.sim.xapi.disk import deltas
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.qcow2_disk import Qcow2
from volume.sim.xapi.failure import Cancelled
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import Hangup
from volume.sim.xapi.failure import internal
from volume.sim.xapi.faults import AFTER
from volume.sim.xapi.faults import BEFORE
from volume.sim.xapi.faults import DELAY
from volume.sim.xapi.faults import DROP
from volume.sim.xapi.faults import KILL_MASTER
from volume.sim.xapi.faults import LOSE_REPLY
from volume.sim.xapi.faults import REFUSE
from volume.sim.xapi.net import qcow2_send
from volume.sim.xapi.net import receiving
from volume.sim.xapi.net import sending
from volume.sim.xapi.net import wires
from volume.sim.xapi.objects import vms
from volume.sim.xapi.objects.guests import guests
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.registry import route
from volume.sim.xapi.registry import Session
from volume.sim.xapi.state.tasks import Task
from volume.sim.xapi.state.tasks import value

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

LOG = logging.getLogger(__name__)

ROLE = 'vm-admin'
FORMATS = {
    'raw': 'application/octet-stream',
    'vhd': 'application/vhd',
    'tar': 'application/x-tar',
    'qcow2': 'application/x-qemu-disk',
}
REASONS = {
    200: 'OK', 302: 'Found', 400: 'Bad Request', 401: 'Unauthorised',
    403: 'Forbidden', 404: 'Not Found', 500: 'Internal Server Error',
}
KINDS = frozenset({REFUSE, DELAY, DROP, KILL_MASTER})


class Answer(Exception):
    """A status to end a request with, before any data."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers


@route('PUT', '/import_raw_vdi')
def put(
    pool: Pool, host: str, request: BaseHTTPRequestHandler,
    query: dict[str, str],
) -> None:
    """Write what a client sends into a VDI."""
    _Request(pool, host, request, query, 'import_raw_vdi').run(_take_in)


@route('GET', '/export_raw_vdi')
def get(
    pool: Pool, host: str, request: BaseHTTPRequestHandler,
    query: dict[str, str],
) -> None:
    """Send a VDI to a client."""
    _Request(pool, host, request, query, 'export_raw_vdi').run(_send_out)


class _Request:
    """One request, from its credentials to the end of its task."""

    def __init__(
        self, pool: Pool, host: str, request: BaseHTTPRequestHandler,
        query: dict[str, str], name: str,
    ) -> None:
        self.pool = pool
        self.host = host
        self.http = request
        self.name = name
        cookies = http.cookies.SimpleCookie(request.headers.get('Cookie'))
        self.query = {
            **{key: morsel.value for key, morsel in cookies.items()}, **query,
        }
        self.is_mute = False
        self.task: Task
        self.ctx: Ctx
        self.vdi = ''

    def run(self, work: Callable[[_Request], str]) -> None:
        """Answer it; ``work`` returns the result of the task."""
        self.http.close_connection = True
        try:
            with self._credentials() as session:
                self.vdi = self._named('vdi')
                self._redirect()
                self._begin(session)
                self._work(work)
        except Answer as answer:
            self.answer(answer.status, **answer.headers)
        except wires.Cut:
            raise Hangup from None

    def _work(self, work: Callable[[_Request], str]) -> None:
        """Do it, and let the task tell how it went."""
        tasks, task = self.pool.tasks, self.task
        try:
            # The 200 comes first, so it is there that an answer is lost.
            self.is_mute = bool(self.pool.faults.take(
                self.name, AFTER, kinds=frozenset({LOSE_REPLY})))
            self._hurt(BEFORE)
            result = work(self)
            self._hurt(AFTER)
            tasks.succeed(task, result)
            if self.is_mute:
                raise wires.Cut
        except Answer:
            tasks.fail(task, internal('Unknown format or encoding'))
            raise
        except Cancelled as failure:
            tasks.fail(task, failure)
            raise wires.Cut from None
        except wires.Cut:
            tasks.fail(task, _io_error())  # unless it is over
            raise
        except Failure as failure:
            tasks.fail(task, failure)
            raise Answer(500) from None
        except (errors.VolumeError, OSError) as failed:
            LOG.warning('%s: %s', self.name, failed)
            tasks.fail(task, _io_error())
            raise Answer(500) from None
        except Hangup:
            raise
        finally:
            self.pool.rows.flush()

    def _hurt(self, when: str) -> None:
        for fault in self.pool.faults.take(self.name, when, kinds=KINDS):
            if fault.kind == REFUSE:
                if when == BEFORE:
                    self.begin_data('text/plain')
                raise Failure(*map(str, fault.params))
            if fault.kind == DELAY:
                self.pool.stopping.wait(float(fault.params[0]))
            elif fault.kind == KILL_MASTER:
                self.pool.kill_master()
                raise Hangup
            else:
                raise wires.Cut

    # -- who, what and where ------------------------------------------------

    @contextlib.contextmanager
    def _credentials(self) -> Iterator[Session]:
        """Give the session of who asks; of a password one for this alone."""
        pool, login = self.pool, ''
        ref = self.query.get('session_id', '')
        try:
            if not ref:
                user, password = self._basic()
                ref = login = pool.sessions.login(self.host, user, password)
            session = pool.sessions.get(ref)
        except Failure:
            raise Answer(
                401, www_authenticate='Basic realm="xapi"') from None
        try:
            pools.check_role(session, f'http/put_{self.name}', ROLE)
            yield session
        except Failure as refused:
            if refused.code == 'RBAC_PERMISSION_DENIED':
                raise Answer(403) from None
            raise Answer(500) from None
        finally:
            if login:
                pool.sessions.logout(login)

    def _basic(self) -> tuple[str, str]:
        kind, _, text = self.http.headers.get(
            'Authorization', '').partition(' ')
        try:
            user, colon, password = base64.b64decode(
                text, validate=True).decode().partition(':')
        except (binascii.Error, UnicodeDecodeError):
            raise Answer(401) from None
        if kind.lower() != 'basic' or not colon:
            raise Answer(401, www_authenticate='Basic realm="xapi"')
        return user, password

    def _named(self, key: str) -> str:
        """Return the reference of a VDI named by reference or uuid."""
        name = self.query.get(key, '')
        if not name:
            return ''
        if self.pool.rows.exists('VDI', name):
            return name
        found = self.pool.rows.find('VDI', uuid=name)
        if not found:
            raise Answer(404)
        return found[0]

    def base(self) -> str:
        """Return the VDI that a delta is to be made against, or nothing."""
        return self._named('base')

    def sr(self) -> str:
        """Return the SR that the request is about.

        :raises Answer: it names none
        """
        rows = self.pool.rows
        if self.vdi:
            return str(rows.field('VDI', self.vdi, 'SR'))
        ref = self.query.get('sr_id', '')
        if rows.exists('SR', ref):
            return ref
        found = rows.find('SR', uuid=self.query.get('sr_uuid', ''))
        if not found:
            raise Answer(400)
        return found[0]

    def _redirect(self) -> None:
        """Send who came to a host that does not see the SR to one that does.

        The task of a request that goes elsewhere is left alone.
        """
        pool, sr = self.pool, self.sr()
        if vms.sees(pool, self.host, sr):
            return
        for host in pool.hosts:
            if pool.is_up(host) and vms.sees(pool, host, sr):
                raise Answer(
                    302, location=f'{pool.url(host)}{self.http.path}')

    def _begin(self, session: Session) -> None:
        given = self.pool.tasks.get(self.query.get('task_id', ''))
        self.task = given or self.pool.tasks.create(
            self.name, host=self.host)
        self.task.set_cancellable(True)
        self.ctx = Ctx(session, self.host, self.task.ref, self.task)
        if not vms.sees(self.pool, self.host, self.sr()):
            self.pool.tasks.fail(self.task, Failure('NO_HOSTS_AVAILABLE'))
            raise Answer(500)

    def format(self) -> str:
        """Return the format that is wanted.

        :raises Answer: there is none of that name
        """
        name = self.query.get('format', 'raw').lower()
        known = {*FORMATS}
        if not self.pool.switch('qcow2'):
            known.discard('qcow2')
        if name not in known:
            self.pool.tasks.fail(
                self.task, internal(f'Unknown format {name}'))
            raise Answer(404)
        return name

    # -- the answer ---------------------------------------------------------

    def answer(self, status: int, **headers: str) -> None:
        """Send a head, be it inside the body of another."""
        if self.is_mute:
            return
        lines = [
            f'HTTP/1.1 {status} {REASONS[status]}', 'connection: close',
            'cache-control: no-cache, no-store',
            *(f'{key.replace("_", "-")}: {text}'
              for key, text in headers.items()),
        ]
        if status != 200:
            lines.append('content-length: 0')
        with contextlib.suppress(OSError):
            self.http.connection.settimeout(self.pool.limits.connection_s)
            self.http.wfile.write('\r\n'.join([*lines, '', '']).encode())

    def begin_data(self, kind: str, **headers: str) -> None:
        """Say that all is well, which nobody knows yet."""
        self.answer(
            200, task_id=self.task.ref, content_type=kind, **headers)

    @contextlib.contextmanager
    def opened(self, vdi: str, mode: str) -> Iterator[Disk]:
        """Plug a VDI into this host's dom0.

        :raises Failure: it cannot be plugged
        """
        rows = self.pool.rows
        row = rows.get('VDI', vdi)
        if row['type'] == 'cbt_metadata':
            raise Failure('VDI_INCOMPATIBLE_TYPE', vdi, row['type'])
        if not row['managed']:
            raise Failure('VDI_NOT_MANAGED', vdi)
        if mode == 'RW' and row['read_only']:
            raise Failure('VDI_READONLY', vdi)
        self.pool.operations.wait(self.ctx, 'VDI', vdi, 'plug')
        with guests(self.pool).in_dom0(
            vdi, mode, self.host, self.task.ref
        ) as disk:
            yield disk

    def look(self, total: int) -> Callable[[int], None]:
        """Return what is told how many bytes have passed."""
        def look(done: int) -> None:
            self.task.check_cancelled()
            if self.pool.stopping.is_set() or not self.pool.is_up(self.host):
                raise Hangup
            self.task.progress(done / total if total else 0.0)
        return look


def _take_in(request: _Request) -> str:
    """Do an import; return the task's result."""
    pool, query = request.pool, request.query
    format = request.format()
    if request.http.headers.get('Transfer-Encoding'):
        raise Answer(404)
    length = _length(request)
    is_chunked = 'chunked' in query
    if is_chunked and format != 'raw':
        raise Answer(400)
    if request.vdi:
        if length is None and not is_chunked:
            raise Answer(400)
        _write(request, request.vdi, format, length, is_chunked)
        return ''
    if format != 'raw' or is_chunked or length is None:
        raise Answer(400)
    vdi = pool.call(request.ctx, 'VDI.create', {
        'name_label': 'Imported VDI', 'name_description': '',
        'SR': request.sr(), 'virtual_size': length, 'type': 'user',
        'sharable': False, 'read_only': False, 'other_config': {},
        'xenstore_data': {}, 'sm_config': {}, 'tags': [],
    })
    try:
        _write(request, vdi, format, length, False)
    except BaseException:
        guests(pool).wait_left(vdi, 10.0)
        with contextlib.suppress(Failure):
            pool.call(request.ctx, 'VDI.destroy', vdi)
        raise
    return value(vdi)


def _write(
    request: _Request, vdi: str, format: str, length: int | None,
    is_chunked: bool,
) -> None:
    pool = request.pool
    with request.opened(vdi, 'RW') as disk:
        request.begin_data('application/octet-stream')
        total = 1 << 62 if length is None else length
        body = wires.Body(
            request.http, total, request.look(length or disk.size_bytes),
            pool.limits.connection_s, pool.faults.partial(request.name),
        )
        is_dirty = keeps_old_bytes(pool, vdi)
        if is_chunked:
            receiving.chunked(disk, body)
        elif format == 'vhd':
            receiving.vhd(disk, body, total, is_dirty)
        elif format == 'tar':
            receiving.tar(disk, body, is_dirty)
        elif format == 'qcow2':
            receiving.qcow2(
                disk, body, total, is_dirty, str(pool.directory),
                Qcow2().open,
            )
        else:
            receiving.raw(disk, body, total)


def _send_out(request: _Request) -> str:
    """Do an export; return the task's result."""
    pool, rows = request.pool, request.pool.rows
    format = request.format()
    if not request.vdi:
        raise Answer(400)
    row = rows.get('VDI', request.vdi)
    base = request.base()
    if base and format not in ('vhd', 'qcow2'):
        raise Answer(400)
    with request.opened(request.vdi, 'RO') as disk:
        base_uuid = rows.field('VDI', base, 'uuid') if base else ''
        with request.opened(base, 'RO') if base else contextlib.nullcontext():
            length, chunks = _stream(
                request, disk, format, row['uuid'], base_uuid)
        request.begin_data(
            FORMATS[format],
            content_disposition=(
                f'attachment; filename="{row["uuid"]}.{format}"'),
        )
        drain = wires.Drain(
            request.http, request.look(length), pool.limits.connection_s,
            pool.faults.partial(request.name),
        )
        for chunk in chunks:
            drain.send(chunk)
    return ''


def _stream(
    request: _Request, disk: Disk, format: str, uuid: str, base: str
) -> tuple[int, Iterator[memoryview]]:
    """Return how long a stream will be, about, and its bytes."""
    changed = []
    if base:
        manager = guests(request.pool).manager(request.vdi)
        changed = deltas.between(manager, base, uuid, request.vdi)
    if format == 'vhd':
        image = sending.vhd_delta(
            disk, changed, uuid, base, request.vdi,
        ) if base else sending.vhd(disk, uuid, request.vdi)
        return image.length_bytes, image.chunks(sending.Source(disk))
    if format == 'qcow2':
        backing = f'{base}.qcow2' if base else ''
        extents = changed if base else disk.extents()
        file = qcow2_send.Image(disk, extents, backing)
        return file.length_bytes, file.chunks()
    if format == 'tar':
        return disk.size_bytes, sending.tar(disk)
    return disk.size_bytes, sending.raw(disk)


def keeps_old_bytes(pool: Pool, vdi: str) -> bool:
    """Say if what is not written to a new VDI may not be zero.

    It is what the server believes, by the kind of SR: a raw disk in a
    volume group. Of all others it thinks that they are new, also of those
    that are not, such as a LUN that was used before [I].
    """
    if pool.switch('zeroes_unsent'):
        return True
    row = pool.rows.get('VDI', vdi)
    kind = str(pool.rows.field('SR', row['SR'], 'type'))
    is_raw = row['sm_config'].get('vdi_type') == 'aio' or (
        row['sm_config'].get('image-format') == 'raw')
    return kind.startswith('lvm') and is_raw


def _length(request: _Request) -> int | None:
    text = request.http.headers.get('Content-Length', '')
    return int(text) if text.isdigit() else None


def _io_error() -> Failure:
    return Failure('VDI_IO_ERROR', 'Device I/O errors')
