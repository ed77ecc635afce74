# SPDX-License-Identifier: Apache-2.0
"""Who works on what: operations exclude one another by waiting.

A storage repository carries one operation at a time, plugging excepted; a
second waits, for up to two hours, and is not refused. So does a disk. What
goes on stands in ``current_operations``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TYPE_CHECKING

from volume.sim.xapi.failure import Failure

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.registry import Ctx

CLASSES: Final = ('SR', 'VDI', 'VBD', 'VM', 'PBD')
# (class, first, second): these go on beside each other.
_TOGETHER: Final = frozenset({
    ('SR', 'plug', 'plug'), ('SR', 'plug', 'unplug'),
    ('SR', 'unplug', 'plug'), ('SR', 'unplug', 'unplug'),
    ('VDI', 'mirror', 'mirror'),
})
# These go on beside what comes later: what it may not do it is refused for
# other reasons, such as the disk being plugged into dom0.
_LENIENT: Final = frozenset({('VDI', 'copy')})
_LOOK_S: Final = 0.5

Marks = dict[str, str]  # ctx.id -> operation


class Operations:
    """The marks of one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._marks: dict[tuple[str, str], Marks] = {}
        self._freed = threading.Condition()

    def compute(self, set_: Callable[..., None]) -> None:
        """Have the rows show the marks."""
        for cls in CLASSES:
            if 'current_operations' in self._pool.model.fields(cls):
                set_(cls, 'current_operations', self._shower(cls))

    def _shower(self, cls: str) -> Callable[[str, Any], Marks]:
        def show(ref: str, row: Any) -> Marks:
            return dict(self._marks.get((cls, ref), {}))
        return show

    @contextlib.contextmanager
    def sr(self, ctx: Ctx, ref: str, operation: str) -> Iterator[None]:
        """Mark a storage repository while something is done in it."""
        with self.mark(ctx, 'SR', ref, operation):
            yield

    @contextlib.contextmanager
    def vdi(self, ctx: Ctx, ref: str, operation: str) -> Iterator[None]:
        """Mark a disk while something is done to it."""
        with self.mark(ctx, 'VDI', ref, operation):
            yield

    def current(self, cls: str, ref: str) -> list[str]:
        """Return what is being done to an object."""
        # Without the lock: it is asked for under that of the rows, too.
        return list(self._marks.get((cls, ref), {}).values())

    @contextlib.contextmanager
    def mark(
        self, ctx: Ctx, cls: str, ref: str, operation: str,
    ) -> Iterator[None]:
        """Mark an object, waiting until nothing excludes it.

        A call that has marked the object already is not in its own way.

        :raises Failure: OTHER_OPERATION_IN_PROGRESS, after the longest wait
        :raises Failure: HANDLE_INVALID, the object went away meanwhile
        """
        key = (cls, ref)
        if ctx.id in self._marks.get(key, {}):
            yield
            return
        with self._in_turn(ctx, key, operation):
            self._marks.setdefault(key, {})[ctx.id] = operation
        self._pool.rows.touch(cls, ref)
        try:
            # What waited may have waited for the end of it.
            self._pool.rows.field(cls, ref, 'uuid')
            yield
        finally:
            with self._freed:
                del self._marks[key][ctx.id]
                if not self._marks[key]:
                    del self._marks[key]
                self._freed.notify_all()
            self._pool.rows.touch(cls, ref)

    def wait(self, ctx: Ctx, cls: str, ref: str, operation: str) -> None:
        """Wait until nothing excludes an operation, and mark nothing.

        :raises Failure: OTHER_OPERATION_IN_PROGRESS, after the longest wait
        """
        if ctx.id not in self._marks.get((cls, ref), {}):
            with self._in_turn(ctx, (cls, ref), operation):
                pass

    @contextlib.contextmanager
    def _in_turn(
        self, ctx: Ctx, key: tuple[str, str], operation: str,
    ) -> Iterator[None]:
        """Give a moment, under the lock, when nothing excludes it.

        What waits has done nothing yet: its task can be cancelled.
        """
        with contextlib.ExitStack() as stack:
            if ctx.task is not None and self._other(key, operation):
                stack.enter_context(ctx.task.cancellable())
            with self._freed:
                self._wait(ctx, key, operation)
                yield

    def _wait(self, ctx: Ctx, key: tuple[str, str], operation: str) -> None:
        end = time.monotonic() + self._pool.limits.operation_wait_s
        while (other := self._other(key, operation)) is not None:
            ctx.check_cancelled()
            left = end - time.monotonic()
            if left <= 0:
                cls, ref = key
                raise Failure(
                    'OTHER_OPERATION_IN_PROGRESS', cls, ref, other[1],
                    other[0],
                )
            self._freed.wait(min(left, _LOOK_S))
        # Whose host died while it waited does not begin.
        ctx.check_cancelled()

    def _other(
        self, key: tuple[str, str], operation: str,
    ) -> tuple[str, str] | None:
        for id_, name in list(self._marks.get(key, {}).items()):
            if (
                (key[0], name, operation) not in _TOGETHER
                and (key[0], name) not in _LENIENT
            ):
                return id_, name
        return None
