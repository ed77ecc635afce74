# SPDX-License-Identifier: Apache-2.0
"""Long calls: an Async task, followed by its events, with our deadline.

A call that blocks says nothing for up to two hours. So it is made as a task,
``event.from`` waits for that task alone, and the time since the call, the
progress, and a wish to stop are ours to judge. What became of a task that
nobody knows any more is ``Unknown``: it is settled by looking.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from volume import errors
from volume.xenapi import failures
from volume.xenapi.failures import Failure
from volume.xenapi.link import Link

LOG = logging.getLogger(__name__)

Watch = Callable[[float], None]

VALUE = re.compile(r'<value>(?:<string>)?(.*?)(?:</string>)?</value>', re.S)
POLL_S = 20.0
CANCEL_S = 30.0
AGAIN_S = 1.0
OPEN = ('pending', 'cancelling')
DEADLINE_S = 900.0


def run(
    link: Link,
    method: str,
    args: tuple[Any, ...],
    label: str,
    deadline_s: float = DEADLINE_S,
    watch: Watch | None = None,
) -> str:
    """Make a call as a task, wait for it, and return its result.

    A result is a reference, or empty. ``label`` names the volume in errors.
    ``watch`` is told the percentage; what it raises cancels the task.

    :raises Unavailable: it was cancelled at its deadline; nothing happened
    :raises Unknown: nobody knows how it ended
    """
    started = time.monotonic()
    with link.tasks:
        task = link.call(f'Async.{method}', *args)
        try:
            record = follow(
                link, task, f'{method} of {label}',
                started + deadline_s, watch,
            )
        finally:
            destroy(link, task)
    return result(link, method, record)


def follow(
    link: Link, task: str, what: str, deadline: float,
    watch: Watch | None = None,
) -> Mapping[str, Any]:
    """Return a task's record once it has ended.

    :raises Unknown: it is gone, or goes on beyond the deadline
    """
    token = ''
    record: Mapping[str, Any] | None = None
    try:
        while True:
            token, record = _next(link, task, token, deadline)
            if record is None:
                raise errors.Unknown(f'{what}: the pool has lost the task')
            if record['status'] not in OPEN:
                return record
            if watch is not None:
                watch(100.0 * float(record['progress']))
            if time.monotonic() >= deadline:
                raise errors.Unavailable(
                    f'{what} takes longer than it may: it was cancelled'
                )
    except errors.VolumeError as stop:
        if record is None and not isinstance(stop, errors.Unknown):
            # The server goes on with it, for all that we know.
            raise errors.Unknown(f'{what}: {stop}') from stop
        if record is None or record['status'] not in OPEN:
            raise
        ended = cancel(link, task)
        if ended is None:
            raise errors.Unknown(
                f'{what} does not end, although it was cancelled'
            ) from stop
        if ended['status'] == 'success' and isinstance(
            stop, errors.Unavailable
        ):
            return ended  # just in time
        raise


def cancel(link: Link, task: str) -> Mapping[str, Any] | None:
    """Cancel a task; return its record if it has ended then."""
    with contextlib.suppress(errors.VolumeError):
        link.call('task.cancel', task)
    token, deadline = '', time.monotonic() + CANCEL_S
    while time.monotonic() < deadline:
        try:
            token, record = _next(link, task, token, deadline)
        except errors.VolumeError:
            return None
        if record is None or record['status'] not in OPEN:
            return record
    return None


def result(link: Link, method: str, record: Mapping[str, Any]) -> str:
    """Return the result of a task that has ended, or raise its failure."""
    if record['status'] == 'success':
        found = VALUE.search(record.get('result') or '')
        return found[1] if found else ''
    info = [link.clean(each) for each in record.get('error_info') or ()]
    failure = Failure(*(info or ['TASK_CANCELLED']))
    raise failures.mean(method, failure) from failure


def destroy(link: Link, task: str) -> None:
    """Remove the record of a task; it is only a record."""
    with contextlib.suppress(errors.VolumeError):
        link.call('task.destroy', task)


def _next(
    link: Link, task: str, token: str, deadline: float
) -> tuple[str, Mapping[str, Any] | None]:
    """Wait for news of a task; return the token and its record.

    The pool may be without a master for a while: the task is asked for
    until the deadline.
    """
    while True:
        left = deadline - time.monotonic()
        poll = min(POLL_S, link.settings.timeout_s / 2, max(left, 0.1))
        try:
            found = link.call('event.from', [f'task/{task}'], token, poll)
            for event in reversed(found['events']):
                if event['operation'] == 'del':
                    return '', None
                return found['token'], event['snapshot']
            # Nothing new, or nothing there: a task that was never seen by
            # this token would be waited for in vain.
            return found['token'], link.call('task.get_record', task)
        except errors.NotFound:
            return '', None
        except errors.VolumeError as failed:
            if failures.code(failed) == 'EVENT_FROM_TOKEN_PARSE_FAILURE':
                token = ''
            elif not isinstance(failed, errors.Unavailable) or left <= 0:
                raise
            LOG.info('task %s: %s', task, failed)
            time.sleep(AGAIN_S)
