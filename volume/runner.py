# SPDX-License-Identifier: Apache-2.0
"""Run jobs: bounded workers a backend, leases renewed, due ones swept.

A message is only a hint: what is due stands in the journal, and the sweep
finds it whatever was lost. In one process the hint is a function call.
"""

from __future__ import annotations

import collections
import concurrent.futures
import heapq
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from volume import errors
from volume import journal
from volume.backends import Backend
from volume.context import current_request
from volume.core import Ended
from volume.core import Settings
from volume.db import jobs
from volume.db import models
from volume.db.engine import Database
from volume.flows.kinds import FLOWS
from volume.node import Node
from volume.notify import Notify

LOG = logging.getLogger(__name__)

POLL_S = 0.02
LAST = frozenset({'delete', 'delete_snapshot', 'disown'})
ENDED_MAX = 1000  # answers kept for callers that have yet to ask


class Runner:
    """Runs the jobs of this process's backends."""

    def __init__(
        self,
        db: Database,
        node: Node,
        backends: Mapping[str, Backend],
        *,
        owner: str,
        host: str,
        settings: Settings,
        notify: Notify,
        spool_directory: str,
        source_for: Callable[[str], Any],
        rate_bytes_per_s: int = 0,
    ) -> None:
        self.owner = owner
        self.host = host
        self.backends = dict(backends)
        self._db = db
        self._node = node
        self.settings = settings
        self.notify = notify
        self._spool = spool_directory
        self._source_for = source_for
        self._rate = rate_bytes_per_s
        self._pools: dict[str, concurrent.futures.ThreadPoolExecutor] = {}
        self._guard = threading.Lock()
        self._taking = threading.Lock()
        self._active: dict[str, journal.Job] = {}
        self._waiting: dict[str, list[_Waiter]] = {}
        self._ended: collections.OrderedDict[str, Ended] = (
            collections.OrderedDict()
        )
        self._later: list[tuple[float, str]] = []
        self._wake = threading.Event()
        self._closed = False
        self._stopping = False

    # What doors need.

    def runs(self, backend: str) -> bool:
        """Say whether this process may run the backend's jobs now."""
        return backend in self.backends and not self._closed

    def hint(self, row: models.Job, *known: Any) -> None:
        """Run a job that was accepted here; leave others to the sweep."""
        if row.owner != self.owner:
            self._wake.set()
            return
        self._submit(row, {each.id: each for each in known if each})

    def wait(self, job_id: str, timeout_s: float) -> Ended:
        """Say how a job has ended.

        :raises Unknown: it has not, within the time given
        """
        waiter = _Waiter()
        with self._guard:
            if job_id in self._ended:
                return self._ended[job_id]
            self._waiting.setdefault(job_id, []).append(waiter)
            # What another process runs is looked at again and again.
            pause_s = 0.5 if job_id in self._active else 0.05
        deadline = time.monotonic() + timeout_s
        try:
            while not waiter.event.wait(
                min(pause_s, max(deadline - time.monotonic(), 0))
            ):
                # Another process may have run it.
                row = self._row(job_id)
                is_late = time.monotonic() >= deadline
                if waiter.ended is not None:
                    break  # he was told while we looked
                if row is not None and row.state != 'open' and (
                    is_late or not self._has_ended_here(row)
                ):
                    return Ended(row.state, row.error_kind, row.error)
                if is_late:
                    raise errors.Unknown(
                        f'job {job_id} goes on; it did not end within '
                        f'{timeout_s:g} s{self._why(row)}'
                    )
        finally:
            with self._guard:
                self._waiting.get(job_id, []).remove(waiter)
                if not self._waiting.get(job_id):
                    self._waiting.pop(job_id, None)
        assert waiter.ended is not None
        return waiter.ended

    def _has_ended_here(self, row: models.Job) -> bool:
        """Say whether it was this process that has ended a job.

        Then it is about to tell the answer, which no row has.
        """
        with self._guard:
            job = self._active.get(row.id)
            return row.id in self._ended or (
                job is not None and job.row.token == row.token
            )

    def _row(self, job_id: str) -> models.Job | None:
        """Return a job as the database has it, if that can be asked.

        If not, the job may go on all the same: who waits for it must not be
        told that nothing has happened.
        """
        try:
            return self._db.read(lambda s: s.get(models.Job, job_id))
        except errors.Unavailable as failed:
            LOG.warning('job %s cannot be looked at: %s', job_id, failed)
            return None

    def _why(self, row: models.Job | None) -> str:
        """Say what a job waits for, if another node alone can run it."""
        if row is None or row.owner or row.node in ('', self.host):
            return ''
        return (
            f'; its volume is open on node {row.node}: start volume-service '
            'there, or if that node is dead, run volume-manage node fence '
            f'{row.node}'
        )

    # What the service's own threads do.

    def renew(self, db: Database | None = None) -> None:
        """Keep the leases of all that runs or is queued here.

        What we hold and do not run (its acceptor died before its hint, or
        the database before its release) runs out, and the sweep finds it.

        Under eventlet a native thread calls this, with a database of its
        own. So it takes no lock; a copy is made in one step.
        """
        active = sorted(self._active.copy())
        until = self._db.clock() + self.settings.lease_s
        if active:
            (db or self._db).write(
                lambda s: jobs.renew(s, self.owner, active, until)
            )

    def void_earlier(self) -> None:
        """Void what an earlier process of this node has left leased."""
        self._db.write(
            lambda s: jobs.void_earlier(s, self.owner, self.host)
        )

    def sweep(self) -> int:
        """Take over what is due and nobody runs; return how much it was."""
        if self._closed:
            return 0
        now = self._db.clock()
        names = list(self.backends)
        found = self._db.read(lambda s: jobs.due(s, names, self.host, now))
        taken = 0
        for row in found:
            with self._taking:
                if self._closed:
                    break
                taken += self._take(row, now)
        return taken

    def idle(self, until: float) -> None:
        """Sleep until a job is due again, somebody hints, or the time."""
        with self._guard:
            if self._later:
                until = min(until, self._later[0][0])
        self._wake.wait(max(until - self._db.clock(), 0.0))
        self._wake.clear()
        with self._guard:
            while self._later and self._later[0][0] <= self._db.clock():
                heapq.heappop(self._later)

    def wake(self) -> None:
        """End ``idle`` now."""
        self._wake.set()

    def busy(self) -> int:
        """Return how many jobs run or are queued here."""
        with self._guard:
            return len(self._active)

    def drain(self, timeout_s: float) -> None:
        """Take no more jobs; let running steps end; give leases back.

        What takes longer than the time given is stopped at its next report
        of progress and goes on at the next start. Until then somebody else
        renews the leases, as ever.
        """
        with self._guard:
            self._closed = True
            pools = list(self._pools.values())
        deadline = time.monotonic() + timeout_s
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        while self.busy() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._stopping = True
        for pool in pools:
            pool.shutdown(wait=True)
        try:
            with self._taking:  # what a sweep has in hand is given back, too
                self._db.write(lambda s: jobs.release(s, self.owner))
        except errors.VolumeError as failed:
            LOG.warning('leases are left to run out: %s', failed)

    # Ours alone.

    def _take(self, row: models.Job, now: float) -> bool:
        """Take over a job that was due, unless another is faster."""
        with self._guard:
            if row.id in self._active:
                return False
        if row.kind not in FLOWS:
            LOG.error(
                'job %s is %s, which this release does not know', row.id,
                row.kind,
            )
            return False
        is_taken = self._db.write(
            lambda s: jobs.take(
                s, row, self.owner, self.host, now, self.settings.lease_s
            ),
            lambda s: jobs.is_held(s, row.id, self.owner, row.token + 1),
        )
        if is_taken:
            row.node = jobs.node_of(row.kind, row.node, self.host)
            heir = bool(row.owner_host)
            row.owner, row.owner_host = self.owner, self.host
            row.token += 1
            row.expires_at = now + self.settings.lease_s
            self._submit(row, {}, heir)
        return is_taken

    def _submit(
        self, row: models.Job, known: dict[str, Any], is_heir: bool = False
    ) -> None:
        with self._guard:
            backend = self.backends.get(row.backend)
            if row.id in self._active or backend is None or self._closed:
                return
            if row.expires_at <= self._db.clock():
                return  # it may be another's by now: the sweep will say
            job = self.job(row, backend, known)
            job.is_heir = is_heir
            self._active[row.id] = job
            pool = self._pools.get(row.backend)
            if pool is None:
                size = backend.conf.max_parallel if backend.conf else 1
                pool = concurrent.futures.ThreadPoolExecutor(
                    size, thread_name_prefix=f'job-{row.backend}'
                )
                self._pools[row.backend] = pool
            try:
                future = pool.submit(self._run, job)
            except RuntimeError as failed:  # the system has no more threads
                del self._active[row.id]
                LOG.error('job %s waits for a sweep: %s', row.id, failed)
                return
        future.add_done_callback(lambda done: self._after(job, done))

    def job(
        self, row: models.Job, backend: Backend, known: dict[str, Any]
    ) -> journal.Job:
        """Return the job ready to be run by ``journal.run``."""
        return journal.Job(
            row=row, flow=FLOWS[row.kind], backend=backend, db=self._db,
            node=self._node, settings=self.settings, notify=self.notify,
            spool_directory=self._spool, source_for=self._source_for,
            backend_of=self._backend_of, rate_bytes_per_s=self._rate,
            is_stopping=lambda: self._stopping, known=known,
        )

    def _backend_of(self, name: str) -> Backend:
        if name not in self.backends:
            raise errors.Unavailable(
                f'backend {name} is not served by {self.host}'
            )
        return self.backends[name]

    def _run(self, job: journal.Job) -> bool:
        with self._guard:
            if self._active.get(job.row.id) is not job:
                return False  # it was given up, and is left to the sweep
        current_request.set(job.row.request_id)
        return journal.run(job)

    def _after(
        self, job: journal.Job, done: concurrent.futures.Future[bool]
    ) -> None:
        """Tell who waits; a job that is due again is remembered."""
        try:
            self._look_at(
                job, None if done.cancelled() else done.exception()
            )
            if job.row.state != 'open':
                self._tell(job)
        finally:
            with self._guard:
                self._active.pop(job.row.id, None)
        if job.row.state == 'open':
            with self._guard:
                heapq.heappush(self._later, (job.row.due_at, job.row.id))
            self._wake.set()

    def _tell(self, job: journal.Job) -> None:
        if job.row.kind in LAST and job.row.state == 'done':
            self._node.forget_locks(job.row.exclusive)
        elif job.row.kind == 'upload':
            self._node.forget_locks([f'snapshot-{job.row.id}'])
        ended = Ended(
            job.row.state, job.row.error_kind, job.row.error, job.answer
        )
        with self._guard:
            self._ended[job.row.id] = ended
            if len(self._ended) > ENDED_MAX:
                self._ended.popitem(last=False)
            for waiter in self._waiting.get(job.row.id, ()):
                waiter.ended = ended
                waiter.event.set()

    def _look_at(
        self, job: journal.Job, failure: BaseException | None
    ) -> None:
        """See to a job that was not ended or let go of as it should be."""
        if isinstance(failure, journal.LeaseLost):
            LOG.warning('%s', failure)
            self._put_off(job.row)
        elif isinstance(failure, journal.Stopped):
            LOG.warning('%s', failure)
        elif failure is not None:
            LOG.error(
                'job %s failed by a bug', job.row.id, exc_info=failure
            )
            self._fail(job, failure)

    def _fail(self, job: journal.Job, bug: BaseException) -> None:
        """Have the bug's job tried again, or ended; never forgotten."""
        try:
            journal.fail(job, bug)
        except errors.VolumeError as failed:
            LOG.error('job %s waits for a sweep: %s', job.row.id, failed)

    def _put_off(self, row: models.Job) -> None:
        """Let go of a job that could not be recorded, if it is still ours."""
        row.due_at = self._db.clock() + journal.BACKOFF_S[-1]
        try:
            self._db.write(
                lambda s: jobs.put_off(s, row, self.owner, row.due_at)
            )
        except errors.VolumeError as failed:
            LOG.error('job %s waits for a sweep: %s', row.id, failed)


class _Waiter:
    """A caller that waits for a job."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.ended: Ended | None = None
