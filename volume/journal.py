# SPDX-License-Identifier: Apache-2.0
"""Workflows that survive a crash: a list of steps, each with its undo.

A step is recorded before it runs, and every step may be run again. What a
step has to say to the database it returns as an *effect*, a function of a
session; the effect, the record of the next step and the renewal of the lease
are one transaction, fenced by the job's token. After a crash the job goes on
from its step, or is undone; there is no third way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.orm import Session

from volume import errors
from volume import model
from volume import progress
from volume.core import Settings
from volume.db import models
from volume.db.engine import Database
from volume.node import Node
from volume.notify import Notify

if TYPE_CHECKING:
    from volume.backends import Backend

LOG = logging.getLogger(__name__)

Effect = Callable[[Session], None]
Ended = Callable[['Job'], None]
BUSY_RETRY_S = 10.0
GRACE_S = 5.0  # for a neighbour's process to let go of what it has done
BACKOFF_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PROGRESS_S = 1.0
# What a record changes of the job's row, here and in the database at once.
RECORDED = (
    'state', 'direction', 'step', 'backend', 'args', 'owner', 'owner_host',
    'expires_at', 'due_at', 'give_up_at', 'attempts', 'error_kind', 'error',
    'cancel', 'ended_at',
)
# Where a job is; only who holds its token changes that.
PLACE = ('token', 'state', 'direction', 'step')


class LeaseLost(errors.VolumeError):
    """Another manager has taken the job over; this one must not go on."""


class Stopped(errors.VolumeError):
    """The service is stopping; the job is left for the next to go on with."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One thing to do, and how to undo it if a later one fails.

    A step that fails is undone itself as well: it may have happened.
    ``is_late`` says that what was asked for has been done before, and only
    tidying up is left: it is too late to cancel.
    """

    do: Callable[[Job], Effect | None]
    undo: Callable[[Job], Effect | None] | None = None
    is_late: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Flow:
    """The steps of one kind of job, and what its rows say when it fails.

    ``failed`` gives the effect of a failure; ``job.undone`` says whether
    every step was undone. ``again`` may place the job anew instead, within
    the same transaction. ``ended`` is told of the end, after it is durable.
    """

    kind: str
    steps: tuple[Step, ...]
    failed: Callable[[Job, errors.VolumeError], Effect]
    again: Callable[[Job, errors.VolumeError, Session], bool] | None = None
    ended: Ended | None = None


@dataclasses.dataclass(slots=True)
class Job:
    """A job while this process runs it.

    ``answer`` is what a waiting caller gets; ``known`` holds the rows that
    the accepting verb had read, so that they are not read again.
    ``is_heir`` says that an earlier or another process may have begun it,
    and left helpers that still write.
    """

    row: models.Job
    flow: Flow
    backend: Backend
    db: Database
    node: Node
    settings: Settings
    notify: Notify
    spool_directory: str
    source_for: Callable[[str], Any]
    backend_of: Callable[[str], Backend]
    rate_bytes_per_s: int = 0
    is_stopping: Callable[[], bool] = lambda: False
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    answer: dict[str, Any] = dataclasses.field(default_factory=dict)
    undone: bool = False
    is_heir: bool = False
    _told_at: float = 0.0
    _heard_at: float = dataclasses.field(default_factory=time.monotonic)
    _started_at: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def args(self) -> Mapping[str, Any]:
        """What the verb has written down for the steps."""
        return self.row.args

    def volume_row(self, volume_id: str | None = None) -> models.Volume:
        """Return the row of the job's volume, or of another.

        :raises NotFound: it is gone
        """
        wanted = volume_id or self.row.volume_id
        row = self.known.get(wanted or '')
        if row is None:
            row = self.db.read(lambda s: s.get(models.Volume, wanted))
        if row is None:
            raise errors.NotFound(f'volume {wanted} has no row')
        self.known[row.id] = row
        return row

    def snapshot_row(self, snapshot_id: str | None = None) -> models.Snapshot:
        """Return the row of the job's snapshot, or of another."""
        wanted = snapshot_id or self.row.snapshot_id
        row = self.known.get(wanted or '')
        if row is None:
            row = self.db.read(lambda s: s.get(models.Snapshot, wanted))
        if row is None:
            raise errors.NotFound(f'snapshot {wanted} has no row')
        self.known[row.id] = row
        return row

    def volume(self, volume_id: str | None = None) -> model.Volume:
        """Return the volume as drivers know it."""
        return noun(self.volume_row(volume_id))

    def snapshot(self, snapshot_id: str | None = None) -> model.Snapshot:
        """Return the snapshot as drivers know it."""
        row = self.snapshot_row(snapshot_id)
        return model.Snapshot(
            row.id, self.volume(row.volume_id), row.size_bytes, row.handle
        )

    def watch(self, done_bytes: int, total_bytes: int) -> None:
        """Report progress; called often, written once a second.

        :raises Cancelled: a person has asked for it to stop, and it is not
            being undone
        :raises Stopped: the service is stopping
        :raises LeaseLost: another manager has the job
        """
        if self.is_stopping():
            raise Stopped(f'job {self.row.id} is left for the next start')
        now = time.monotonic()
        if now - self._told_at < PROGRESS_S:
            return
        self._told_at = now
        rate = int(done_bytes / max(now - self._started_at, 0.001))

        def tell(session: Session) -> bool:
            self.fenced(
                session, done_bytes=done_bytes, total_bytes=total_bytes,
                rate_bytes_per_s=rate,
            )
            row = session.get(models.Job, self.row.id)
            return bool(row and row.cancel)

        try:
            is_cancelled = self.db.write(tell)
        except (errors.Unavailable, errors.Unknown):
            # Until the lease runs out nobody else can have the job; the
            # database may be found again before that.
            if time.monotonic() - self._heard_at > self.settings.lease_s:
                raise
            return
        self._heard_at = now
        step = self.flow.steps[self.row.step]
        if is_cancelled and self.row.direction == 'do' and not step.is_late:
            raise errors.Cancelled(f'job {self.row.id} was cancelled')

    def fenced(self, session: Session, **values: Any) -> None:
        """Change the job's row, if it is still ours.

        :raises LeaseLost: it is not
        """
        now = self.db.clock()
        done = session.execute(
            update(models.Job)
            .where(
                models.Job.id == self.row.id,
                models.Job.token == self.row.token,
                models.Job.state == 'open',
                # A commit whose reply was lost is not recorded twice.
                models.Job.direction == self.row.direction,
                models.Job.step == self.row.step,
            )
            .values(**{
                'updated_at': now,
                'expires_at': now + self.settings.lease_s,
                **values,
            })
            .execution_options(synchronize_session=False)
        )
        if not done.rowcount:  # type: ignore[attr-defined]
            raise LeaseLost(f'job {self.row.id} was taken over')
        for key, value in values.items():
            setattr(self.row, key, value)


def noun(row: models.Volume) -> model.Volume:
    """Return a volume as drivers know it."""
    return model.Volume(row.id, row.pool, row.size_bytes, row.handle)


def run(job: Job) -> bool:
    """Run a job, under its lease and locks, as far as it goes now.

    Return whether it has ended; if not, it is due again later.

    :raises LeaseLost: another manager has it
    :raises Stopped: the service is stopping; the lease was given back
    """
    LOG.info(
        'job %s %s of %s begins on %s%s', job.row.id, job.row.kind,
        _about(job), job.row.backend,
        f', at {job.row.direction} step {job.row.step}'
        if job.row.step or job.row.direction == 'undo' else '',
    )
    try:
        with job.node.hold(
            job.row.exclusive, job.row.shared,
            grace_s=0.0 if job.is_heir else GRACE_S,
        ), _Elsewhere(job) as elsewhere:
            while job.row.state == 'open':
                if job.is_stopping():
                    raise Stopped(f'job {job.row.id} is left for later')
                if not _advance(job, elsewhere):
                    return False
    except Stopped:
        _give_back(job, job.db.clock())
        raise
    except (errors.Unavailable, errors.Unknown) as failed:
        # The database or the lock did not answer; nothing is lost: the job
        # stays open, and its lease runs out or is given back.
        LOG.warning('job %s waits: %s', job.row.id, failed)
        _give_back(job, job.db.clock() + BACKOFF_S[3])
        return False
    LOG.info(
        'job %s %s of %s is %s after %.3f s%s', job.row.id, job.row.kind,
        _about(job), job.row.state, job.db.clock() - job.row.created_at,
        f': {job.row.error}' if job.row.error else '',
    )
    if job.flow.ended:
        job.flow.ended(job)
    return True


def fail(job: Job, bug: BaseException) -> None:
    """Let go of a job that a bug of ours has stopped.

    It is tried again like one whose outcome is unknown, and has the same
    end: nothing stays in a transitional status for ever.

    :raises LeaseLost: another manager has it
    """
    if job.row.state != 'open':
        return
    unknown = errors.Unknown(
        f'job {job.row.id} met a bug in {job.row.kind}: {type(bug).__name__}'
    )
    if _handle(job, unknown) and job.row.state == 'open':
        _release(job, job.db.clock())
    elif job.row.state != 'open' and job.flow.ended:
        job.flow.ended(job)


class _Elsewhere(contextlib.ExitStack):
    """The locks of a job on other machines, taken when they are needed.

    They are a part of a step: a machine that cannot be reached is like a
    storage that cannot, and the job is tried again, and undone in the end.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self._is_held = False

    def hold(self) -> None:
        """Hold them from now on.

        :raises Unavailable: a machine cannot be reached, or a lock not taken
        :raises LeaseLost: another manager has the job
        """
        if self._is_held:
            return
        job = self._job
        grace_s = 0.0 if job.is_heir else GRACE_S
        for node in self._nodes():
            self.enter_context(node.hold(
                job.row.exclusive, job.row.shared, grace_s, self._prove
            ))
        self._is_held = True

    def _prove(self) -> None:
        job = self._job
        job.db.write(lambda session: job.fenced(session))

    def _nodes(self) -> list[Node]:
        """Return the machines that the job works on, beside this one."""
        job = self._job
        if not job.node.neighbours:
            return []
        backends = [job.backend]
        for name in job.row.shared:
            what, _, row_id = name.partition('-')
            row = (
                job.volume_row(row_id) if what == 'volume'
                else job.snapshot_row(row_id)
            )
            # A source that this service does not serve is for the step to
            # tell of.
            with contextlib.suppress(errors.Unavailable):
                backends.append(job.backend_of(row.backend))
        found = {each.node for each in backends if each.node}
        return sorted(
            (each for each in found if each.is_remote),
            key=lambda each: each.address,
        )


def _advance(job: Job, elsewhere: _Elsewhere) -> bool:
    """Do or undo one step; say whether to go on at once."""
    step = job.flow.steps[job.row.step]
    work = step.do if job.row.direction == 'do' else step.undo
    LOG.debug(
        'job %s %s: %s step %d of %d, %s', job.row.id, job.row.kind,
        job.row.direction, job.row.step, len(job.flow.steps),
        getattr(work, '__name__', 'nothing'),
    )
    try:
        elsewhere.hold()
        if job.row.direction == 'do':
            if job.row.cancel and not step.is_late:
                raise errors.Cancelled(f'job {job.row.id} was cancelled')
            with progress.watching(job.watch, job.rate_bytes_per_s):
                effect = step.do(job)
            _forward(job, effect)
        else:
            # Told as well, and left when the service stops; never cancelled.
            with progress.watching(job.watch, job.rate_bytes_per_s):
                effect = step.undo(job) if step.undo else None
            _backward(job, effect)
    except (LeaseLost, Stopped):
        raise
    except errors.VolumeError as failed:
        return _handle(job, failed)
    # A job that was placed anew belongs to another backend's workers.
    return job.row.state != 'open' or job.row.owner is not None


def _forward(job: Job, effect: Effect | None) -> None:
    is_last = job.row.step + 1 == len(job.flow.steps)

    def record(session: Session) -> None:
        if is_last:
            _end(job, session, 'done', error_kind='', error='')
        else:
            job.fenced(session, step=job.row.step + 1, attempts=0)
            job.row.cancel = _is_cancelled(session, job)
        if effect:
            effect(session)

    _write(job, record)


def _backward(job: Job, effect: Effect | None) -> None:
    failure = errors.rebuild(job.row.error_kind, job.row.error)
    is_last = job.row.step == 0
    job.undone = is_last
    failed = job.flow.failed(job, failure) if is_last else None

    def record(session: Session) -> None:
        if not is_last:
            job.fenced(session, step=job.row.step - 1, attempts=0)
        elif job.flow.again and job.flow.again(job, failure, session):
            job.fenced(
                session, direction='do', step=0, attempts=0,
                backend=job.row.backend, args=dict(job.row.args),
                owner=None, expires_at=0.0, due_at=job.db.clock(),
            )
        else:
            state = 'failed' if job.row.error_kind != 'Cancelled' else (
                'cancelled'
            )
            _end(job, session, state)
        if effect:
            effect(session)
        if failed and job.row.state != 'open':
            failed(session)

    _write(job, record)


def _handle(job: Job, failed: errors.VolumeError) -> bool:
    """Decide what a failure means: again later, undo, or an end."""
    now = job.db.clock()
    row = job.row
    give_up_at = row.give_up_at or now
    if isinstance(failed, errors.Busy):
        begun_at = row.created_at if row.direction == 'do' else (
            give_up_at - job.settings.job_retry_s
        )
        give_up_at = min(give_up_at, begun_at + BUSY_RETRY_S)
    pause_s = BACKOFF_S[min(row.attempts, len(BACKOFF_S) - 1)]
    is_again = failed.retry and now < give_up_at
    LOG.warning(
        'job %s %s of %s: %s step %d: %s: %s; %s',
        row.id, row.kind, _about(job), row.direction, row.step, failed.kind,
        failed, f'tried again in {pause_s:g} s' if is_again else 'given up',
    )
    if is_again:
        _release(job, now + pause_s, row.attempts + 1, failed)
        return False
    if row.direction == 'do' and not isinstance(failed, errors.Corrupt):
        _write(job, lambda session: job.fenced(
            session, direction='undo', error_kind=failed.kind,
            error=str(failed), attempts=0,
            args={**job.args, 'failed_step': row.step},
            give_up_at=now + job.settings.job_retry_s,
        ))
        return True
    reason = str(failed) if row.direction == 'do' else (
        f'{row.error}; and it could not be undone: {failed}'
    )
    kind = failed.kind if row.direction == 'do' else row.error_kind
    ending = job.flow.failed(job, errors.rebuild(kind, reason))

    def end(session: Session) -> None:
        _end(job, session, 'failed', error_kind=kind, error=reason)
        ending(session)

    _write(job, end)
    return True


def failed_step(job: Job) -> int | None:
    """Return the step that has failed; none if the job has not."""
    if job.row.direction == 'do':
        return job.row.step
    step: int | None = job.args.get('failed_step')
    return step


def _end(job: Job, session: Session, state: str, **values: Any) -> None:
    now = job.db.clock()
    job.fenced(
        session, state=state, ended_at=now, owner=None, expires_at=0.0,
        **values,
    )
    unshare(session, job.row)


def unshare(session: Session, row: models.Job) -> None:
    """Give back the shared leases of a job that ends."""
    for name in row.shared:
        what, _, row_id = name.partition('-')
        table = models.Volume if what == 'volume' else models.Snapshot
        session.execute(
            update(table)
            .where(table.id == row_id, table.lease_shared > 0)
            .values(lease_shared=table.lease_shared - 1)
            .execution_options(synchronize_session=False)
        )


def _release(
    job: Job,
    due_at: float,
    attempts: int | None = None,
    failed: errors.VolumeError | None = None,
) -> None:
    """Let go of a job that is due again later."""
    values: dict[str, Any] = {
        'owner': None, 'owner_host': '', 'expires_at': 0.0, 'due_at': due_at,
    }
    if attempts is not None:
        values['attempts'] = attempts
    if failed is not None and job.row.direction == 'do':
        values['error_kind'] = failed.kind
        values['error'] = str(failed)
    _write(job, lambda session: job.fenced(session, **values))


def _give_back(job: Job, due_at: float) -> None:
    """Let go of a job, or leave that to the end of its lease."""
    try:
        _release(job, due_at)
    except (errors.Unavailable, errors.Unknown) as failed:
        job.row.due_at = job.db.clock() + job.settings.lease_s
        LOG.warning(
            'job %s is free again when its lease has run out: %s',
            job.row.id, failed,
        )


def _write(job: Job, record: Callable[[Session], None]) -> None:
    """Write a record whole; each attempt starts from the row as it was.

    What was not committed must not be believed either: a step that was not
    recorded is not done.
    """
    before = {field: getattr(job.row, field) for field in RECORDED}

    def restore() -> None:
        for field, value in before.items():
            setattr(job.row, field, value)

    def attempt(session: Session) -> None:
        restore()
        record(session)

    def happened(session: Session) -> bool:
        """Say whether the database is where the first attempt had led.

        Nobody else moves a job without taking it over, which changes its
        token; what leaves it where it was may be written twice.
        """
        there = session.execute(
            select(*(getattr(models.Job, name) for name in PLACE))
            .where(models.Job.id == job.row.id).with_for_update()
        ).one_or_none()
        meant = tuple(getattr(job.row, name) for name in PLACE)
        return there is not None and tuple(there) == meant != place

    place = tuple(getattr(job.row, name) for name in PLACE)
    try:
        job.db.write(attempt, happened)
    except BaseException:
        restore()
        raise


def _about(job: Job) -> str:
    """Return what a job is about, in words for the log."""
    row = job.row
    if row.snapshot_id:
        return f'snapshot {row.snapshot_id} of volume {row.volume_id}'
    if row.volume_id:
        return f'volume {row.volume_id}'
    # What was exported before a restart is restored all at once.
    count = len(row.args.get('attachments', ()))
    return f'{count} attachment{"" if count == 1 else "s"}'


def _is_cancelled(session: Session, job: Job) -> bool:
    """Say whether a person has asked for it to stop since it was taken."""
    return bool(session.scalar(
        select(models.Job.cancel).where(models.Job.id == job.row.id)
    ))
