# SPDX-License-Identifier: Apache-2.0
"""Tasks: calls that a client does not wait for, and how they went."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from volume.sim.xapi.failure import Cancelled
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.net import wire
from volume.sim.xapi.state.values import DateTime
from volume.sim.xapi.state.values import EPOCH

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

FINISHED = frozenset({'success', 'failure', 'cancelled'})
# A fraction that differs by less is nobody's event.
STEP = 0.01


class Task:
    """One task while it runs; its row outlives it."""

    def __init__(self, tasks: Tasks, ref: str) -> None:
        self.ref = ref
        self._tasks = tasks
        self._cancelled = threading.Event()
        self._progress = 0.0

    def progress(self, fraction: float) -> None:
        """Say how far it is, from 0 to 1."""
        fraction = min(max(fraction, 0.0), 1.0)
        if abs(fraction - self._progress) >= STEP or fraction == 1.0:
            self._progress = fraction
            self._tasks.update(self.ref, progress=fraction)

    @contextlib.contextmanager
    def cancellable(self) -> Iterator[None]:
        """Accept ``task.cancel`` for a while, if it was not anyway."""
        before = self._tasks.allowed(self.ref)
        self.set_cancellable(True)
        try:
            yield
        finally:
            if not before and not self.is_cancelled:
                self.set_cancellable(False)

    def set_cancellable(self, yes: bool) -> None:
        """Say if ``task.cancel`` is accepted from now on."""
        self._tasks.update(
            self.ref, allowed_operations=['cancel'] if yes else [],
        )

    @property
    def is_cancelled(self) -> bool:
        """Say if it was cancelled, or its host died."""
        return self._cancelled.is_set()

    def check_cancelled(self) -> None:
        """End what runs if it was cancelled.

        :raises Cancelled: it was
        """
        if self.is_cancelled:
            raise Cancelled(self.ref)

    def cancel(self) -> None:
        """Have it end where it next looks."""
        self._cancelled.set()


class Tasks:
    """The tasks of one pool, and when their rows are collected."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._running: dict[str, Task] = {}
        self._owners: dict[str, str] = {}
        self._lock = threading.Lock()

    def create(
        self, label: str, description: str = '', host: str = '',
        cancellable: bool = False, owner: str = '',
    ) -> Task:
        """Make a task that is pending."""
        ref = self._pool.rows.new(
            'task', name_label=label, name_description=description,
            created=self._pool.now(), finished=EPOCH, status='pending',
            resident_on=host or self._pool.master, type='<none/>',
            allowed_operations=['cancel'] if cancellable else [],
        )
        task = Task(self, ref)
        with self._lock:
            self._running[ref] = task
            self._owners[ref] = owner
        return task

    def get(self, ref: str) -> Task | None:
        """Return a task that is not finished."""
        with self._lock:
            return self._running.get(ref)

    def owner(self, ref: str) -> str:
        """Return who made a task, empty if nobody knows any more."""
        with self._lock:
            return self._owners.get(ref, '')

    @property
    def pending(self) -> list[str]:
        """Return the references of the tasks that are not finished."""
        with self._lock:
            return list(self._running)

    def update(self, ref: str, **fields: object) -> None:
        """Change a task's row, if the client has not destroyed it."""
        rows = self._pool.rows
        with rows.lock:
            if rows.exists('task', ref):
                rows.update('task', ref, **fields)

    def allowed(self, ref: str) -> list[str]:
        """Return what a client may do to a task now."""
        rows = self._pool.rows
        with rows.lock:
            if not rows.exists('task', ref):
                return []
            return list(rows.field('task', ref, 'allowed_operations'))

    def succeed(self, task: Task, result: str = '') -> None:
        """Finish well; ``result`` is XML already (``value``)."""
        self._finish(
            task, status='success', result=result, progress=1.0,
        )

    def fail(self, task: Task, failure: Failure) -> None:
        """Finish with what went wrong."""
        cancelled = task.is_cancelled and failure.code == 'TASK_CANCELLED'
        self._finish(
            task, status='cancelled' if cancelled else 'failure',
            error_info=failure.description,
        )

    def _finish(self, task: Task, **fields: object) -> None:
        with self._lock:
            self._running.pop(task.ref, None)
        with self._pool.rows.lock:
            if not self.is_finished(task.ref):
                self.update(
                    task.ref, finished=self._pool.now(),
                    allowed_operations=['destroy'], **fields,
                )

    def is_finished(self, ref: str) -> bool:
        """Say if a task's row says how it went, or is gone."""
        rows = self._pool.rows
        with rows.lock:
            return not rows.exists('task', ref) or (
                rows.field('task', ref, 'status') in FINISHED
            )

    def cancel(self, ref: str) -> None:
        """Ask a task to end.

        :raises Failure: OPERATION_NOT_ALLOWED, it cannot be asked to
        """
        rows = self._pool.rows
        with rows.lock:
            row = rows.get('task', ref)
            if 'cancel' not in row['allowed_operations']:
                raise Failure(
                    'OPERATION_NOT_ALLOWED', 'Task cannot be cancelled',
                )
            rows.update(
                'task', ref, status='cancelling', allowed_operations=[],
            )
        task = self.get(ref)
        if task is not None:
            task.cancel()

    def orphan(self, host: str) -> None:
        """End the tasks of a host that is dead, or was restarted.

        Their rows say cancelled, as a real pool's do once the host's tasks
        are given up; how far the work came is not known.
        """
        rows = self._pool.rows
        for ref in rows.find('task', resident_on=host):
            if self.is_finished(ref):
                continue
            with self._lock:
                task = self._running.pop(ref, None)
            self.update(
                ref, status='cancelled', finished=self._pool.now(),
                allowed_operations=['destroy'],
                error_info=['TASK_CANCELLED', ref],
            )
            if task is not None:
                task.cancel()

    def abandon(self, ref: str) -> None:
        """Take a task for finished, whatever still runs for it."""
        with self._lock:
            self._running.pop(ref, None)

    def forget(self, ref: str) -> None:
        """Remove a task's row; what still runs for it goes on."""
        with self._lock:
            self._owners.pop(ref, None)
        self._pool.rows.delete('task', ref)

    def collect(self) -> None:
        """Forget old tasks, as the server does from time to time."""
        rows = self._pool.rows
        limits = self._pool.limits
        now = self._pool.clock()
        with rows.lock:
            done: list[tuple[float, str]] = []
            for ref in rows.all('task'):
                row = rows.get('task', ref)
                if row['status'] in FINISHED:
                    age = now - DateTime(row['finished']).seconds()
                    done.append((age, ref))
                elif now - DateTime(row['created']).seconds() > (
                    limits.pending_task_s
                ):
                    self.forget(ref)
            done.sort()
            for at, (age, ref) in enumerate(done):
                if age > limits.finished_task_s or at >= limits.tasks:
                    self.forget(ref)


def value(result: object) -> str:
    """Return a result as a task's row has it: XML in a string."""
    return '' if result is None else wire.element(result)
