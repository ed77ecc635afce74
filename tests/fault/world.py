# SPDX-License-Identifier: Apache-2.0
"""A whole service without threads, in which a process can die at any line.

Jobs run inline, on the thread that asks; the clock stands still until it is
told to move. ``restart`` is what a new process does: same state directory,
same database, a healthy node, and recovery until nothing is due.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from typing import Any

import sqlalchemy
from sqlalchemy import select

from tests import database
from volume import backends
from volume import conf as options
from volume import errors
from volume import ids
from volume import journal
from volume import model
from volume import periodic
from volume.blockd import Blockd
from volume.context import Caller
from volume.core import Core
from volume.core import Ended
from volume.core import Settings
from volume.db import jobs
from volume.db import models
from volume.db.engine import Database
from volume.drivers import base
from volume.flows.kinds import FLOWS
from volume.node import Node
from volume.testing import faults
from volume.transfer.sources import Sources

CALLER = Caller(project_id='p', user_id='u')
HOST = 'node-1'
# What a volume with its bytes may say; the last three wait for a host.
HELD = frozenset({
    'available', 'in-use', 'attaching', 'detaching', 'reserved',
})


class Shelf:
    """One database file a process, made empty again for each world.

    The engine stays, and with it SQLAlchemy's cache of compiled statements:
    a thousand worlds are made in a test run.
    """

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        atexit.register(shutil.rmtree, self._directory, ignore_errors=True)
        self._path = os.path.join(self._directory, 'volume.sqlite')
        self.db = Database(f'sqlite:///{self._path}')
        # Here processes die, and no machine: what was written is there.
        sqlalchemy.event.listen(
            self.db.engine, 'connect',
            lambda connection, record: connection.execute(
                'PRAGMA synchronous=OFF'
            ),
        )

    def fresh(self) -> Database:
        self.db.close()
        for suffix in ('', '-wal', '-shm'):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path + suffix)
        database.copy(self.db.url)
        return self.db


@functools.cache
def shelf() -> Shelf:
    return Shelf()


def open_jobs(rows: list[models.Job]) -> list[str]:
    """Say where those jobs are that have not ended."""
    return [
        f'{row.kind} {row.direction} {row.step}: {row.error}'
        for row in rows if row.state == 'open'
    ]


class World:
    """One node with one backend named ``b``, its pool, and its database."""

    def __init__(
        self, test: Any, section: str, *, blockd: bool = False,
        daemon: str = '',
    ) -> None:
        """``daemon`` is the directory of one that other worlds use too."""
        self.directory = tempfile.mkdtemp(prefix='vw', dir='/tmp')
        test.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.state = os.path.join(self.directory, 's')
        self.images = os.path.join(self.directory, 'images')
        for path in (self.state, self.images, self.state + '/spool'):
            os.mkdir(path)
        self._conf_file = os.path.join(self.directory, 'volume.conf')
        with open(self._conf_file, 'w') as f:
            f.write(
                '[DEFAULT]\nenabled_backends = b\n'
                f'state_path = {self.state}\n'
                f'image_allowed_directories = {self.images}\n'
                f'image_upload_directories = {self.images}\n'
                f'[b]\n{section}\n'
            )
        self.now = 1_700_000_000.0
        self._has_blockd = blockd
        self._daemon = daemon or self.state + '/blockd'
        if blockd and not daemon:
            test.addCleanup(Blockd(Node(self.state), self._daemon).stop)
        self.db = (
            shelf().fresh() if database.kind(test) == 'sqlite'
            else database.make(test)
        )
        self.db.clock = lambda: self.now
        self.boot(None)

    def boot(self, fault: faults.Fault | None) -> None:
        """Start a process; the fault is armed once it has started."""
        self.owner = ids.new()
        self.node = faults.FaultyNode(self.state)
        if self._has_blockd:
            self.node.blockd = Blockd(self.node, self._daemon)
        conf = options.load([], [self._conf_file])
        self.backends = backends.load(conf, self.node)
        self.sources = Sources(conf, self.node)
        self.settings = Settings(lease_wait_s=0.0)
        self.events: list[tuple[str, Any]] = []
        self.core = Core(
            db=self.db, hint=self.run, wait=self.wait,
            settings=self.settings, owner=self.owner, owner_host=HOST,
            runs=lambda backend: True,
            notify=lambda event, what: self.events.append((event, what)),
        )
        self.db.write(
            lambda s: jobs.void_earlier(s, self.owner, HOST)
        )
        periodic.refresh(self.core, self.backends.values(), HOST)
        assert self.backends['b'].is_up, self.backends['b'].reason
        self.node.arm(fault)

    def restart(self) -> None:
        """Come back after whatever happened, and recover everything."""
        self.boot(None)
        periodic.sweep_spool(self.node, self.state + '/spool')
        periodic.end_private_exports(self.node)
        self.recover()
        periodic.end_orphan_exports(self.core, self.backends, set())
        periodic.restore_exports(self.core, self.backends)
        self.recover()

    def recover(self) -> None:
        """Run what is due, letting time pass, until nothing is open."""
        for _ in range(200):
            due = self.db.read(
                lambda s: jobs.due(s, ['b'], HOST, self.now)
            )
            for row in due:
                if self.db.write(lambda s, r=row: jobs.take(
                    s, r, self.owner, HOST, self.now, 30.0
                )):
                    row.owner, row.owner_host = self.owner, HOST
                    row.token += 1
                    self.run(row)
            if not self.open_jobs():
                return
            self.now += 1.0
        raise AssertionError(f'jobs stay open: {self.open_jobs()}')

    def run(self, row: models.Job, *known: Any) -> None:
        """Run a job as far as it goes, on this thread."""
        if row.owner != self.owner:
            return
        job = journal.Job(
            row=row, flow=FLOWS[row.kind], backend=self.backends['b'],
            db=self.db, node=self.node, settings=self.settings,
            notify=self.core.notify, spool_directory=self.state + '/spool',
            source_for=self.sources.find,
            backend_of=self.backends.__getitem__,
            known={each.id: each for each in known if each},
        )
        self.answers = getattr(self, 'answers', {})
        journal.run(job)
        self.answers[row.id] = job.answer

    def wait(self, job_id: str, timeout_s: float) -> Ended:
        """Say how the job ended; time passes until it has."""
        row = self.db.read(lambda s: s.get(models.Job, job_id))
        if row.state == 'open':
            self.recover()
            row = self.db.read(lambda s: s.get(models.Job, job_id))
        return Ended(
            row.state, row.error_kind, row.error,
            self.answers.get(job_id, {}),
        )

    # What there is.

    def all(self, table: Any) -> list[Any]:
        return self.db.read(lambda s: list(s.scalars(select(table))))

    def live(self, table: Any) -> dict[str, Any]:
        return {
            row.id: row for row in self.all(table) if row.deleted_at is None
        }

    def open_jobs(self) -> list[str]:
        return open_jobs(self.all(models.Job))

    def driver(self) -> base.Driver:
        return self.backends['b'].need()

    def pool(self) -> str:
        return next(iter(self.backends['b'].pools))

    def stored(self) -> set[str]:
        """Return the ids of what the storage has, ours only."""
        return {
            found.id for found in self.driver().scan(self.pool())
            if found.id is not None
        }

    def content(self, thing: model.Volume | model.Snapshot) -> bytes:
        with self.driver().reader(thing) as reader:
            data = bytearray(reader.size_bytes)
            left = memoryview(data)
            while left:
                count = reader.readinto(left[:model.MIB])
                assert count, 'the reader ends early'
                left = left[count:]
            return bytes(data)

    def write(self, volume_id: str, offset: int, data: bytes) -> None:
        """Write into a detached volume, as an attached host would have."""
        with self.driver().writer(self.noun(volume_id)) as writer:
            writer.seek(offset)
            writer.write(data)
            writer.commit()

    def noun(self, volume_id: str) -> model.Volume:
        return journal.noun(self.live(models.Volume)[volume_id])

    def snapshot_noun(self, snapshot_id: str) -> model.Snapshot:
        row = self.live(models.Snapshot)[snapshot_id]
        return model.Snapshot(
            row.id, self.noun(row.volume_id), row.size_bytes, row.handle
        )

    def disagreements(self) -> list[str]:
        """Return what is wrong: rows, storage, claims, exports, leases."""
        wrong: list[str] = []
        every = self.db.read(lambda s: {
            table: list(s.scalars(select(table))) for table in (
                models.Volume, models.Snapshot, models.Pool, models.Device,
                models.Job, models.Attachment,
            )
        })
        rows = [*every[models.Volume], *every[models.Snapshot]]
        live = [row for row in rows if row.deleted_at is None]
        must = {row.id for row in live if row.status in HELD}
        stored = self.stored()
        if must - stored:
            wrong.append(f'not stored: {must - stored}')
        may = must | {
            row.id for row in live if row.status == 'error_deleting'
        }
        if stored - may:
            wrong.append(f'stored for nobody: {stored - may}')
        for row in live:
            if row.status in models.TRANSITIONAL - HELD:
                wrong.append(f'{row.id} stays {row.status}')
            if row.lease_shared:
                wrong.append(f'{row.id} stays shared {row.lease_shared}')
        claimed = sum(row.claimed_bytes for row in rows)
        for pool in every[models.Pool]:
            if pool.claimed_bytes != claimed:
                wrong.append(f'claims {pool.claimed_bytes} != {claimed}')
        for device in every[models.Device]:
            if device.claimed_bytes != claimed:
                wrong.append(f'device {device.claimed_bytes} != {claimed}')
        wrong += open_jobs(every[models.Job])
        exporter = self.backends['b'].exporter
        if exporter is not None:
            connected = {
                row.id for row in every[models.Attachment]
                if row.is_connected
            }
            exported = exporter.exported()
            if exported != connected:
                wrong.append(f'exports {exported} != {connected}')
        left = os.listdir(self.state + '/spool')
        if left:
            wrong.append(f'spool holds {left}')
        return wrong

    @contextlib.contextmanager
    def surviving(self) -> Any:
        """Let a fault pass: the death of the process, or a refusal."""
        with contextlib.suppress(faults.Crash, errors.VolumeError):
            yield
