# SPDX-License-Identifier: Apache-2.0
"""Simulated XenAPI pools for tests, and independent clients of them."""

import http.client
import json
import pathlib
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from urllib.parse import urlsplit

import XenAPI

from volume.sim.xapi.pool import Pool
from volume.sim.xapi.state.sessions import User
from volume.sim.xapi.world import World

GIB = 1 << 30
PENDING_S = 30.0


def simulator(
    test, profile='xcp-ng-8.3', hosts=2, tls=False, world=None,
    password='secret', *, name='pool', users=None, directory=None, **switches,
):
    """Return a pool that runs in this process until the test is over.

    By then no task may be pending, and no pool may have written to what
    another one owns.
    """
    def fresh():
        made = tempfile.TemporaryDirectory(prefix='vtxapi', dir='/tmp')
        test.addCleanup(made.cleanup)
        return pathlib.Path(made.name)

    world = world or World(fresh())
    pool = Pool(
        directory or fresh(), world, profile, name, hosts, tls=tls,
        users={'root': User(password), **(users or {})},
        switches={'auth_delay_s': 0.0, **switches},
    )
    pool.start()
    test.addCleanup(_end, test, pool)
    return pool


def _end(test, pool):
    # An answer to an import comes before its end.
    deadline = time.monotonic() + PENDING_S
    while (pending := _pending(pool)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not pool.stopping.is_set():
        pool.stop()
    test.assertEqual([], pool.world.violations)
    test.assertEqual([], pending)


def _pending(pool):
    return [
        pool.rows.field('task', ref, 'name_label')
        for ref in pool.tasks.pending if pool.rows.exists('task', ref)
    ]


def login(
    test, pool, user='root', password='secret', originator='tests', host=None,
):
    """Return a session of PyPI's XenAPI, logged out with the test."""
    session = stranger(test, pool.url(host))
    session.login_with_password(user, password, '1.0', originator)
    return session


def stranger(test, url):
    """Return a client of PyPI's XenAPI that is not logged in yet."""
    session = XenAPI.Session(url, ignore_ssl=True)
    test.addCleanup(_leave, session)
    return session


def _leave(session):
    # The server may be down by now, or have ended the session.
    try:
        if session.last_login_method is not None:
            session.xenapi.session.logout()
    except (XenAPI.Failure, OSError, http.client.HTTPException):
        pass
    session('close')()


class Json:
    """A client of ``/jsonrpc`` that shares no code with anything of ours."""

    def __init__(self, test, url, version='2.0'):
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(
            parts.hostname, parts.port, timeout=60,
        )
        self._version = version
        self._calls = 0
        self.session = None
        test.addCleanup(self._connection.close)

    def login(self, user='root', password='secret', originator='json'):
        """Log in; each further call carries the session."""
        self.session = self.raw(
            'session.login_with_password', user, password, '1.0', originator,
        )['result']
        return self

    def raw(self, method, *args):
        """Return the whole answer to a call."""
        self._calls += 1
        call = {'method': method, 'params': list(args), 'id': self._calls}
        if self._version == '2.0':
            call['jsonrpc'] = '2.0'
        self._connection.request(
            'POST', '/jsonrpc', json.dumps(call),
            {'Content-Type': 'application/json'},
        )
        answer = json.load(self._connection.getresponse())
        if answer['id'] != self._calls:
            raise AssertionError(f'an answer to another call: {answer}')
        return answer

    def call(self, method, *args):
        """Return the value of a call; a refusal is an AssertionError."""
        answer = self.raw(method, self.session, *args)
        if answer.get('error'):
            raise AssertionError(answer['error'])
        return answer['result']


def nfs_sr(pool, server='filer', path='/export', size=100 * GIB, **more):
    """Make an SR on a new export, over the XenAPI; return its uuid."""
    pool.world.add_nfs(server, path, size_bytes=size)
    return make_sr(
        pool, 'nfs', {'server': server, 'serverpath': path, **more},
    )


def ext_sr(pool, path='/dev/sdb', size=100 * GIB, host=0):
    """Make a local file-based SR on one host; return its uuid."""
    return _local_sr(pool, 'ext', path, size, host)


def lvm_sr(pool, path='/dev/sdb', size=100 * GIB, host=0):
    """Make a local LVM SR on one host; return its uuid."""
    return _local_sr(pool, 'lvm', path, size, host)


def _local_sr(pool, kind, path, size, host):
    uuid = pool.rows.field('host', pool.host(host), 'uuid')
    pool.world.add_device(path, size, uuid)
    return make_sr(pool, kind, {'device': path}, shared=False, host=host)


def hba_sr(pool, *luns, adapter='FC'):
    """Make a LUN-per-VDI SR; ``luns`` are (SCSIid, size)."""
    for scsi_id, size in luns:
        pool.world.add_lun(scsi_id, size, adapter=adapter)
    return make_sr(pool, 'hba', {'type': adapter})


def make_sr(
    pool, kind, device_config, shared=True, host=0, name='', sm_config=None,
):
    """Make an SR as any client would; return its uuid."""
    session = XenAPI.Session(pool.url(), ignore_ssl=True)
    session.login_with_password('root', 'secret', '1.0', 'make-sr')
    try:
        xenapi = session.xenapi
        ref = xenapi.SR.create(
            pool.host(host), device_config, '0', name or f'{kind} storage',
            '', kind, 'user', shared, sm_config or {},
        )
        return xenapi.SR.get_uuid(ref)
    finally:
        session.xenapi.session.logout()
        session('close')()


class Process:
    """A pool as ``volume-xapi-sim`` runs it: killed, started, controlled."""

    START_S = 60

    def __init__(self, test, world=None, **config):
        self._root = pathlib.Path(tempfile.mkdtemp(prefix='vtxp', dir='/tmp'))
        test.addCleanup(shutil.rmtree, self._root, ignore_errors=True)
        self.world = World(world or self._root / 'world')
        self._config = self._root / 'sim.json'
        self._config.write_text(json.dumps({
            'directory': str(self._root / 'pool'),
            'world': str(self.world.directory),
            'users': {'root': {'password': 'secret'}},
            **config,
            'switches': {'auth_delay_s': 0, **config.get('switches', {})},
        }))
        self._process = None
        self.told = {}
        test.addCleanup(self.kill)

    def start(self):
        """Start it, and wait for the line that says where it listens."""
        with open(self._root / 'log', 'a') as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, '-c', 'from volume.sim.xapi.main '
                    'import main; raise SystemExit(main())',
                    '--config', str(self._config),
                ],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = selector.select(self.START_S) and (
                self._process.stdout.readline()
            )
        if not line:
            self.kill()
            raise AssertionError(self.log()[-4000:])
        self.told = json.loads(line)
        return self

    def url(self, host=None):
        """Return where a host listens; without one, the first master."""
        if host is None:
            return self.told['master']
        return self.told['urls'][host]

    def log(self):
        """Return what it has said on its error output."""
        return (self._root / 'log').read_text()

    def kill(self):
        """End it as a power cut does."""
        self._end(signal.SIGKILL)

    def stop(self):
        """End it cleanly; return its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number):
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(number)
        try:
            return process.wait(60)
        finally:
            process.stdout.close()

    def control(self, method, path, body=None):
        """Ask the control port; return its answer."""
        parts = urlsplit(self.told['control'])
        connection = http.client.HTTPConnection(
            parts.hostname, parts.port, timeout=60,
        )
        try:
            raw = isinstance(body, bytes)
            connection.request(
                method, path, body if raw or body is None
                else json.dumps(body),
            )
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise AssertionError(f'{method} {path}: {data!r}')
        if answer.headers['Content-Type'] == 'application/json':
            return json.loads(data)
        return data


def vdi(xenapi, sr, name='disk', size=GIB, **more):
    """Make a VDI in an SR, by its uuid; return the reference."""
    return xenapi.VDI.create({
        'name_label': name, 'SR': xenapi.SR.get_by_uuid(sr),
        'virtual_size': str(size), 'type': 'user', 'sharable': False,
        'read_only': False, 'other_config': {}, **more,
    })


def wait(xenapi, task, limit_s=60):
    """Wait for a task by its events; return its record."""
    token, end = '', time.monotonic() + limit_s
    while time.monotonic() < end:
        batch = getattr(xenapi.event, 'from')([f'task/{task}'], token, 5.0)
        token = batch['token']
        for event in batch['events']:
            if event['snapshot']['status'] not in ('pending', 'cancelling'):
                return event['snapshot']
    raise AssertionError(f'{task} did not end')
