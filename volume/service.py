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
import sys
import threading
import time
from collections.abc import Callable, Sequence

from oslo_config import cfg
from sqlalchemy.orm import Session

import volume
from volume import backends
from volume import conf as options
from volume import errors
from volume import ids
from volume import locks
from volume import logs
from volume import periodic
from volume import rpc
from volume import rpcapi
from volume.api import app
from volume.api import auth
from volume.api import server
from volume.blockd import Blockd
from volume.core import Core
from volume.core import Settings
from volume.db import migrate
from volume.db import models
from volume.db.engine import Clock
from volume.db.engine import Database
from volume.manager import VolumeManager
from volume.node import Node
from volume.notifier import notifier
from volume.runner import Runner
from volume.transfer.sources import Sources

LOG = logging.getLogger(__name__)
CHECK_WAIT_S = 1.0


class Service:
    """The API, the manager, or both, in this process."""

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
        self._threads: list[threading.Thread] = []
        self._strangers: set[str] = set()
        self._node_id = ''
        self._stack = contextlib.ExitStack()
        state = os.path.abspath(conf.state_path)
        self.node = node or Node(state)
        self.node.blockd = self.node.blockd or Blockd(
            self.node, os.path.join(state, 'blockd'),
            tcp=conf.nbd_listen or None,
        )
        self.db = Database(options.database_url(conf), clock)
        self._notifier = notifier(conf)
        self.runner = self._make_runner(state)
        self.core = Core(
            db=self.db, hint=self._hint(), wait=self.runner.wait,
            settings=self.runner.settings, owner=self.owner,
            owner_host=conf.host, runs=self.runner.runs,
            notify=self.runner.notify,
        )
        self.endpoint = VolumeManager(self.core)

    def start(self) -> None:
        """Serve; recovery goes on in the background when this returns.

        :raises Busy: another process uses the state directory
        :raises Invalid: the database's version, or an option, is wrong
        """
        if 'api' in self.conf.roles:
            auth.check_binding(self.conf.api.auth, self.conf.api.listen)
        state = self.node.state_dir
        os.makedirs(state, 0o700, exist_ok=True)
        self._stack.enter_context(locks.alone(
            os.path.join(state, 'service.lock'), f'state_path {state}'
        ))
        if migrate.current(self.db) is None:
            migrate.upgrade(self.db)
        migrate.require(self.db)
        # What is entered last ends first: the doors, then the work.
        self._stack.callback(self.db.close)
        self._stack.callback(self._notifier.stop)
        self._stack.callback(self._forget_service)
        self._stack.callback(
            self.runner.drain, self.conf.graceful_shutdown_timeout_s
        )
        if 'manager' in self.conf.roles:
            self._start_manager()
        if 'api' in self.conf.roles:
            self._start_api()

    def stop(self) -> None:
        """Drain: the doors close, running steps end, leases go back."""
        self._stop.set()
        self.runner.wake()
        self._stack.close()
        for thread in self._threads:
            thread.join(timeout=10)

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
        self.conf = conf
        periodic.refresh(self.core, table.values(), conf.host)
        LOG.info('backends now: %s', ', '.join(table) or 'none')

    # Ours alone.

    def _make_runner(self, state: str) -> Runner:
        conf = self.conf
        settings = Settings(
            lease_wait_s=conf.lease_wait_s,
            lease_s=conf.lease_s,
            job_retry_s=conf.job_retry_s,
            call_timeout_s=conf.call_timeout_s,
            availability_zone=conf.availability_zone,
            image_url_template=conf.image_url_template,
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

    def _hint(self) -> Callable[..., None]:
        """Return how work is started: here, or by a word to its manager."""
        if 'manager' in self.conf.roles or not rpc.is_remote(self.conf):
            return self.runner.hint
        bus = rpcapi.VolumeAPI.connect(self.conf)
        self._stack.callback(bus.close)

        def wake(job: models.Job, *known: object) -> None:
            # A hint that is lost costs one sweep's interval, no more.
            with contextlib.suppress(errors.VolumeError):
                backend = self.db.read(
                    lambda s: s.get(models.Backend, job.backend)
                )
                bus.wake(
                    periodic.SYSTEM, job.id,
                    host=backend.host if backend else '',
                )

        return wake

    def _start_manager(self) -> None:
        spool = os.path.join(self.node.state_dir, 'spool')
        self.node.make_directory(spool)
        periodic.sweep_spool(self.node, spool)
        self._claim_name()
        self.runner.void_earlier()
        periodic.end_private_exports(self.node)
        self._beat()
        periodic.refresh(
            self.core, self.runner.backends.values(), self.conf.host,
            CHECK_WAIT_S,
        )
        conf = self.conf
        third = conf.lease_s / 3
        self._every('renew', third, self.runner.renew)
        self._every('heartbeat', min(third, 10.0), self._beat)
        self._every('sweep', conf.sweep_interval_s, self._sweep, now=True)
        self._every('exports', conf.stats_interval_s, self._exports, now=True)
        self._every('stats', conf.stats_interval_s, lambda: periodic.refresh(
            self.core, self.runner.backends.values(), self.conf.host
        ))
        self._every('upkeep', conf.upkeep_interval_s, lambda: (
            periodic.upkeep(self.runner.backends.values())
        ))
        self._every('history', 600.0, lambda: periodic.forget(
            self.core, conf.retention_s
        ), now=True)
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

    def _sweep(self) -> None:
        self.runner.sweep()
        periodic.end_stale_reservations(
            self.core, self.conf.reservation_timeout_s
        )

    def _exports(self) -> None:
        periodic.end_orphan_exports(
            self.core, self.runner.backends, self._strangers
        )
        periodic.restore_exports(self.core, self.runner.backends)

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

        def beat(session: Session) -> None:
            row = session.get(models.Service, self.conf.host)
            if row is None or row.owner != self.owner:
                row = session.merge(models.Service(
                    host=self.conf.host, owner=self.owner,
                    roles=list(self.conf.roles),
                    version=volume.__version__, started_at=now,
                    heard_at=now, is_fenced=False, node_id=self._node_id,
                ))
            row.heard_at = now

        self.db.write(beat)

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
    ) -> None:
        """Do something again and again in a thread of its own."""
        is_sweep = name == 'sweep'

        def loop() -> None:
            is_due = now
            while not self._stop.is_set():
                if is_due:
                    try:
                        work()
                    except errors.VolumeError as failed:
                        LOG.error('%s: %s', name, failed)
                    except Exception:
                        # A bug here must not end the sweep or the leases.
                        LOG.exception('%s failed by a bug', name)
                is_due = True
                if is_sweep:
                    self.runner.idle(self.db.clock() + interval_s)
                else:
                    self._stop.wait(interval_s)

        thread = threading.Thread(target=loop, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``volume-service`` until it is told to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.umask(0o077)
    try:
        conf = options.load(arguments)
        logs.set_up(conf.log_level)
        service = Service(conf, reload=lambda: options.load(arguments))
        told = threading.Event()
        wanted: list[int] = []

        def tell(number: int, frame: object) -> None:
            wanted.append(number)
            told.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, tell)
        service.start()
    except (errors.VolumeError, cfg.Error, ValueError) as wrong:
        print(f'volume-service: {wrong}', file=sys.stderr)
        return 1
    if service.address:
        print(f'volume-service: serving {service.address}/v3', flush=True)
    while True:
        told.wait()
        told.clear()
        while wanted:
            if wanted.pop(0) != signal.SIGHUP:
                service.stop()
                return 0
            service.reload()


def _upload_url(conf: cfg.ConfigOpts) -> str:
    """Return where images go that are named without a URL, if anywhere."""
    for directory in conf.image_upload_directories:
        return pathlib.Path(directory).as_uri()
    return ''
