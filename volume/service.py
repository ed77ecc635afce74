# SPDX-License-Identifier: Apache-2.0
"""A process that serves: start, periodic work, reload, drain, stop.

Consumers come first and recovery runs beside them: one backend's or one
volume's trouble never keeps the others waiting. One process, no fork.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from oslo_config import cfg
from sqlalchemy import select
from sqlalchemy.orm import Session

import volume
from volume import backends
from volume import concurrency
from volume import conf as options
from volume import errors
from volume import ids
from volume import locks
from volume import logs
from volume import memory
from volume import periodic
from volume import rpc
from volume import takeover
from volume import vault
from volume.api import app
from volume.api import auth
from volume.api import server
from volume.blockd import Blockd
from volume.core import Core
from volume.core import Settings
from volume.db import models
from volume.db import schema
from volume.db.engine import Clock
from volume.db.engine import Database
from volume.exports.base import Exporter
from volume.guarded import guarded
from volume.hints import Hints
from volume.lockdomain import LockDomain
from volume.manager import VolumeManager
from volume.node import Node
from volume.notifier import notifier
from volume.runner import Runner
from volume.transfer.sources import Sources

LOG = logging.getLogger(__name__)
END_S = 10.0  # for a thread that does something again and again
GIVEN_UP = 3  # exit code
PULSES = 2  # heartbeat and leases


class Service:
    """The API, the manager, or both, in this process."""

    check_wait_s = 1.0
    """What the start waits for backends; the slow ones are reported later."""
    give_up_s = 60.0
    """What a service that was fenced takes at most to end what it has."""

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        *,
        reload: Callable[[], cfg.ConfigOpts] | None = None,
        clock: Clock = time.time,
        node: Node | None = None,
    ) -> None:
        self.conf = conf
        self.owner = ids.new()
        self.address = ''
        self._reload = reload
        self._stop = threading.Event()
        self._stop_pulse = concurrency.native().Event()
        self._threads: list[threading.Thread] = []
        self._pulses: list[threading.Thread] = []
        self._strangers: set[str] = set()
        self._node_id = ''
        self._stack = contextlib.ExitStack()
        state = os.path.abspath(conf.state_path)
        self.node = node or Node(state, os.path.abspath(conf.lock_path))
        self.domain = LockDomain(self.node.lock_dir)
        self._has_name = False
        self._grace_s = conf.graceful_shutdown_timeout_s
        self.node.blockd = self.node.blockd or Blockd(
            self.node, os.path.join(state, 'blockd'),
            tcp=conf.nbd_listen or None,
        )
        url = options.database_url(conf)
        limits = options.database_limits(conf)
        self.db = Database(url, clock, **limits)
        self._pulse_db = self._pulse_database(limits)
        self._notifier = notifier(conf)
        self.runner = self._make_runner(state)
        self._exporters: dict[tuple[str, type[Exporter]], Exporter] = {}
        self._note_exporters()
        self.hints = Hints(
            conf, self.db, self.runner,
            silent_s=self.runner.settings.service_down_s,
        ) if rpc.is_remote(conf) else None
        self.core = Core(
            db=self.db, hint=self.hints or self.runner.hint,
            wait=self.runner.wait,
            settings=self.runner.settings, owner=self.owner,
            owner_host=conf.host, runs=self.runner.runs,
            notify=self.runner.notify,
        )
        self.neighbours = takeover.Neighbours(
            self.core, self.node, self.domain, silent_s=conf.lease_s,
            gap_s=conf.lease_s / 2 + conf.sweep_interval_s,
        )
        self.endpoint = VolumeManager(self.core)

    def start(self) -> None:
        """Serve; recovery goes on in the background when this returns.

        :raises Busy: another process uses the state directory
        :raises Invalid: the database's version, or an option, is wrong
        """
        try:
            self._start()
        except BaseException:
            # What has begun must not work on in a process that should end.
            self._grace_s = 0.0
            self.stop()
            raise

    def stop(self) -> None:
        """Drain: the doors close, running steps end, leases go back."""
        self._stop.set()
        self.runner.wake()
        self._stack.close()
        for thread in self._threads:
            thread.join(timeout=END_S)
        for node in self.node.neighbours.values():
            node.close()

    def reload(self) -> None:
        """Read the configuration again and swap the table of backends.

        A backend that is unchanged in name keeps its jobs; one that is gone
        finishes those that run.
        """
        if self._reload is None:
            return
        try:
            conf = self._reload()
        except (cfg.Error, SystemExit) as wrong:
            LOG.error('the configuration is kept as it was: %s', wrong)
            return
        table = backends.load(conf, self.node)
        self.runner.backends = table
        self._note_exporters()
        self.conf = conf
        guarded('stats', self._refresh)
        LOG.info('backends now: %s', ', '.join(table) or 'none')

    # Ours alone.

    def _start(self) -> None:
        if 'api' in self.conf.roles:
            auth.check_binding(self.conf.api.auth, self.conf.api.listen)
        state = self.node.state_dir
        os.makedirs(state, 0o700, exist_ok=True)
        self._stack.enter_context(locks.alone(
            os.path.join(state, 'service.lock'), f'state_path {state}'
        ))
        schema.ensure(self.db)
        # What is entered last ends first: the doors, then the work.
        self._stack.callback(self.db.close)
        self._stack.callback(self._pulse_db.close)
        self._stack.callback(self._notifier.stop)
        self._stack.callback(self._forget_service)
        # Who still works keeps its leases, and hears that it was fenced.
        self._stack.callback(self._end_pulse)
        self._stack.callback(lambda: self.runner.drain(self._grace_s))
        if self.hints is not None:
            self.hints.start()
            self._stack.callback(self.hints.stop)
        if 'manager' in self.conf.roles:
            self._start_manager()
        if 'api' in self.conf.roles:
            self._start_api()

    def _note_exporters(self) -> None:
        """Keep in mind what may serve hosts on this machine.

        Also for a section that a reload has taken away: its exports stay,
        and end with the others when the service is fenced.
        """
        self._exporters = self._exporters | {
            (each.name, type(each.exporter)): each.exporter
            for each in self.runner.backends.values()
            if each.exporter and not (each.node and each.node.is_remote)
        }

    def _make_key(self) -> None:
        """Have a key for secrets, unless one has sealed some already.

        Another key would open none of them, and hide that theirs is gone.
        """
        path = os.path.abspath(self.conf.secrets_key_file)
        if os.path.exists(path):
            return
        table = models.Attachment
        if self.db.read(lambda s: s.scalar(
            select(table.id).where(table.credentials.is_not(None)).limit(1)
        )):
            LOG.error(
                'there is no %s, and secrets in the database need it: put a '
                'copy there; until then nothing that has them can be '
                'attached', path,
            )
            return
        vault.make_key(path)

    def _make_runner(self, state: str) -> Runner:
        conf = self.conf
        settings = Settings(
            lease_wait_s=conf.lease_wait_s,
            lease_s=conf.lease_s,
            job_retry_s=conf.job_retry_s,
            call_timeout_s=conf.call_timeout_s,
            service_down_s=max(
                conf.service_down_s, 3 * conf.stats_interval_s
            ),
            availability_zone=conf.availability_zone,
            image_url_template=conf.image_url_template,
            secrets_key_file=os.path.abspath(conf.secrets_key_file),
        )
        serves = 'manager' in conf.roles
        return Runner(
            self.db, self.node,
            backends.load(conf, self.node) if serves else {},
            owner=self.owner, host=conf.host, settings=settings,
            notify=self._notifier,
            spool_directory=os.path.join(state, 'spool'),
            source_for=Sources(conf, self.node).find,
            rate_bytes_per_s=conf.image_rate_bytes_per_s,
        )

    def _start_manager(self) -> None:
        spool = os.path.join(self.node.state_dir, 'spool')
        self.node.make_directory(spool)
        periodic.sweep_spool(self.node, spool)
        self._make_key()
        self._claim_name()
        self.runner.void_earlier()
        periodic.end_private_exports(self.node)
        self.domain.join(self.conf.host, self.owner, self.node.state_dir)
        self._beat()
        self._refresh(self.check_wait_s)
        conf = self.conf
        third = conf.lease_s / 3
        self._every('renew', third, lambda: (
            self.runner.renew(self._pulse_db)
        ), pulse=True)
        self._every('heartbeat', min(third, 10.0), self._beat, pulse=True)
        self._every('sweep', conf.sweep_interval_s, self._sweep, now=True)
        self._every('exports', conf.stats_interval_s, self._exports, now=True)
        self._every('stats', conf.stats_interval_s, self._refresh)
        self._every('upkeep', conf.upkeep_interval_s, lambda: (
            periodic.upkeep(
                self.runner.backends.values(), conf.image_rate_bytes_per_s
            )
        ))
        self._every('history', 600.0, self._tidy, now=True)
        if rpc.is_remote(conf):
            consumer = rpc.Server(conf, self.endpoint, conf.host)
            consumer.start()
            self._stack.callback(consumer.stop)

    def _start_api(self) -> None:
        group = self.conf.api
        web = server.Server(
            app.make_app(
                self.core, auth.load(self.conf),
                public_url=group.public_url or '',
                upload_url=_upload_url(self.conf),
            ),
            listen=group.listen, port=group.port, threads=group.threads,
            tls_certificate=group.tls_certificate, tls_key=group.tls_key,
        )
        self.address = web.start()
        self._stack.callback(web.stop)

    def _refresh(self, wait_s: float = periodic.CHECK_S) -> None:
        periodic.refresh(
            self.core, self.runner.backends.values(), self.conf.host, wait_s,
            socket.gethostname(),
        )

    def _sweep(self) -> None:
        self.neighbours.look()
        self.runner.sweep()
        periodic.end_stale_reservations(
            self.core, self.conf.reservation_timeout_s
        )

    def _exports(self) -> None:
        periodic.end_orphan_exports(
            self.core, self.runner.backends, self._strangers
        )
        periodic.restore_exports(self.core, self.runner.backends)

    def _tidy(self) -> None:
        # The files first: afterwards nothing tells that they are nobody's.
        periodic.sweep_locks(self.core, self.node)
        periodic.end_left_exports(self.node)
        periodic.forget(self.core, self.conf.retention_s)

    def _claim_name(self) -> None:
        """Make sure that no other state directory uses our host's name.

        Leases of a host's earlier process are void at once, because its
        state directory is locked; a twin with another directory is alive.

        :raises Busy: it was heard of a moment ago
        """
        path = os.path.join(self.node.state_dir, 'node-id')
        if not self.node.exists(path):
            self.node.write(path, ids.new().encode())
        self._node_id = ids.check(self.node.read(path).decode(), 'node id')
        row = self.db.read(lambda s: s.get(models.Service, self.conf.host))
        if row is None or row.node_id in ('', self._node_id):
            return
        if self.db.clock() - row.heard_at < self.conf.lease_s:
            raise errors.Busy(
                f'another service with the name {self.conf.host} and another '
                'state_path uses this database; give one of them another '
                'option host'
            )

    def _beat(self) -> None:
        now = self.db.clock()
        is_first = not self._has_name

        def beat(session: Session) -> str:
            row = session.get(models.Service, self.conf.host)
            if row is None or (is_first and row.owner != self.owner):
                row = session.merge(models.Service(
                    host=self.conf.host, owner=self.owner,
                    roles=list(self.conf.roles),
                    version=volume.__version__, started_at=now,
                    heard_at=now, is_fenced=False, node_id=self._node_id,
                    domain=self.domain.id,
                ))
            if row.owner != self.owner:
                return 'another service has taken its name meanwhile'
            if row.is_fenced:
                return 'an operator has fenced it (volume-manage node fence)'
            row.heard_at = now
            return ''

        over = self._pulse_db.write(beat)
        if over:
            self._give_up(over)
        self._has_name = True

    def _give_up(self, why: str) -> None:
        """End at once: what this process does may be done by another now.

        A disk, or somebody with a lock, may keep what is to be ended: that
        is left then, and what goes on in this process ends all the same.
        """
        late = concurrency.native().Timer(self.give_up_s, _exit)
        late.daemon = True
        with contextlib.suppress(RuntimeError):  # no more threads
            late.start()
        LOG.critical(
            'service %s ends, for %s: its jobs and attachments may be '
            'another node\'s now; started again, it begins anew',
            self.conf.host, why,
        )
        try:
            takeover.end_all(self.node, self._exporters.values())
        finally:
            os._exit(GIVEN_UP)

    def _pulse_database(self, limits: dict[str, Any]) -> Database:
        """Return where heartbeat and leases are written.

        On a server by connections that nobody else can use up. Of SQLite's
        one writer at a time all wait in one line, which is fair; whatever
        keeps eventlet's greenthreads busy, these go on, in native threads
        that share nothing with them.
        """
        if self.db.is_sqlite and not concurrency.is_green():
            return self.db
        own = {**limits, 'connections': PULSES}
        return Database(
            self.db.url, self.db.clock, **own,
            for_native=concurrency.is_green(),
        )

    def _end_pulse(self) -> None:
        self._stop_pulse.set()
        for thread in self._pulses:
            thread.join(timeout=END_S)

    def _forget_service(self) -> None:
        def forget(session: Session) -> None:
            row = session.get(models.Service, self.conf.host)
            if row is not None and row.owner == self.owner:
                session.delete(row)

        with contextlib.suppress(errors.VolumeError):
            self.db.write(forget)

    def _every(
        self,
        name: str,
        interval_s: float,
        work: Callable[[], object],
        now: bool = False,
        pulse: bool = False,
    ) -> None:
        """Do something again and again in a thread of its own.

        A ``pulse`` has a native thread, and takes no lock of the others.
        """
        is_sweep = name == 'sweep'
        stop = self._stop_pulse if pulse else self._stop

        def loop() -> None:
            is_due = now
            while not stop.is_set():
                if is_due:
                    guarded(name, work)
                is_due = True
                if is_sweep:
                    self.runner.idle(self.db.clock() + interval_s)
                else:
                    stop.wait(interval_s)

        threads = concurrency.native() if pulse else threading
        thread = threads.Thread(target=loop, name=name, daemon=True)
        thread.start()
        (self._pulses if pulse else self._threads).append(thread)


def _exit() -> None:
    try:
        takeover.end_children()
    finally:
        os._exit(GIVEN_UP)


class _Signals:
    """Signals in their order, for a thread or a greenthread to wait for.

    The handlers do nothing: under eventlet they run in the middle of its
    hub, where nothing may be woken. The interpreter writes the numbers into
    a socket.
    """

    def __init__(self, *numbers: int) -> None:
        self._socket, self._kernel = socket.socketpair()
        self._kernel.setblocking(False)
        signal.set_wakeup_fd(
            self._kernel.fileno(), warn_on_full_buffer=False
        )
        for number in numbers:
            signal.signal(number, lambda number, frame: None)

    def wait(self) -> int:
        return self._socket.recv(1)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``volume-service`` until it is told to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.umask(0o077)
    memory.use_few_heaps()
    try:
        conf = options.load(arguments)
        logs.set_up(conf.log_level, conf.log_format)
        concurrency.check(conf.concurrency)
        service = Service(conf, reload=lambda: options.load(arguments))
        signals = _Signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        service.start()
    except (errors.VolumeError, cfg.Error, OSError, ValueError) as wrong:
        print(f'volume-service: {wrong}', file=sys.stderr)
        return 1
    if service.address:
        print(f'volume-service: serving {service.address}/v3', flush=True)
    while (number := signals.wait()) == signal.SIGHUP:
        guarded('reload', service.reload)
    LOG.info(
        'service %s was told to end (%s), and drains', conf.host,
        signal.Signals(number).name,
    )
    service.stop()
    LOG.info('service %s has ended', conf.host)
    return 0


def _upload_url(conf: cfg.ConfigOpts) -> str:
    """Return where images go that are named without a URL, if anywhere."""
    for directory in conf.image_upload_directories:
        return pathlib.Path(directory).as_uri()
    return ''
