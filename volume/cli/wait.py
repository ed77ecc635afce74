# SPDX-License-Identifier: Apache-2.0
"""Follow the job that a request has started, until it has ended.

A job is known by the request that started it, so that nobody waits for
somebody else's. The wait outlives a restart of the service: what was
accepted goes on by itself, and so does the looking.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TypeVar

from volume import errors
from volume.cli import meter
from volume.cli.client import Client
from volume.cli.client import Json

T = TypeVar('T')

PAUSE_S = 0.05
PAUSE_MAX_S = 0.5
PAUSE_GROWTH = 1.5
METER_S = 1.0
SILENCE_S = 60.0  # how long the service may be away while we wait
UNSETTLED = frozenset({'creating', 'downloading'})
# The kinds of jobs that the service lets be cancelled.
CANCELLABLE = frozenset({
    'create', 'create_filled', 'upload', 'flatten', 'snapshot', 'adopt',
    'attach', 'restore', 'delete', 'delete_snapshot',
})


class Failed(errors.VolumeError):
    """The work has begun and has failed, or was cancelled."""


class Late(errors.Unknown):
    """The time that the caller gave is over; the work goes on."""


class Interrupted(errors.Unknown):
    """The person stopped to wait; the work goes on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """How to reach the service, and how its user wants to be answered.

    ``late`` is when the user waits no more, by the monotonic clock; 0 is
    never.
    """

    client: Client
    format: str
    wait: bool = True
    late: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Ticket:
    """Marks one request, so that its job is found again."""

    request_id: str = dataclasses.field(
        default_factory=lambda: f'req-{uuid.uuid4()}'
    )

    @property
    def headers(self) -> Mapping[str, str]:
        return {'X-Openstack-Request-Id': self.request_id}


def follow(
    session: Session, ticket: Ticket, volume_id: str, what: str
) -> bool:
    """Wait for a request's job; say whether it had started one.

    ``what`` is the work in a few words, like ``creating volume x``.

    :raises Failed: the job has failed, or was cancelled
    :raises Late: the caller's time is over
    :raises Interrupted: the person's patience is
    """
    job = None
    try:
        # A job and what it works for are accepted at once: if it is not
        # there now, there is none.
        job = _patiently(
            lambda: _find(session.client, ticket, volume_id), what
        )
        if job is None:
            return False
        job = _watch(session, job, what)
    except KeyboardInterrupt:
        raise Interrupted(_goes_on(f'{what} goes on', job)) from None
    if job['state'] == 'cancelled':
        raise Failed(f'{what} was cancelled; job {job["id"]}')
    if job['state'] != 'done':
        raise Failed(
            f'{what} failed: {job["error"] or "it is not said why"}; '
            f'job {job["id"]}'
        )
    return True


def job(session: Session, job_id: str, what: str) -> Json:
    """Wait for a job that is known, and return it as it has ended."""
    found = _look(session.client, job_id)
    try:
        return _watch(session, found, what)
    except KeyboardInterrupt:
        raise Interrupted(_goes_on(f'{what} goes on', found)) from None


def settled(session: Session, look: Callable[[], Json], what: str) -> Json:
    """Return a thing once nobody makes it any more.

    Needed where a request was repeated, and an earlier one has the job.
    """
    pause_s = PAUSE_S
    while (thing := look())['status'] in UNSETTLED:
        if session.late and time.monotonic() > session.late:
            raise Late(f'{what} is not done yet')
        time.sleep(pause_s)
        pause_s = min(pause_s * PAUSE_GROWTH, PAUSE_MAX_S)
    return thing


def _find(client: Client, ticket: Ticket, volume_id: str) -> Json | None:
    for found in client.pages(
        '/os-volume-jobs', 'jobs', volume_id=volume_id
    ):
        if found['request_id'] == ticket.request_id:
            return found
    return None


def _look(client: Client, job_id: str) -> Json:
    found: Json = client.get(f'/os-volume-jobs/{job_id}')['job']
    return found


def _watch(session: Session, job: Json, what: str) -> Json:
    job_id, begun, late = job['id'], time.monotonic(), session.late
    pause_s = PAUSE_S
    shown = None
    try:
        while job['state'] == 'open':
            now = time.monotonic()
            if late and now >= late:
                raise Late(_goes_on(f'{what} is not done yet', job))
            # What is done at once needs no bar.
            if shown is None and now > begun + METER_S:
                shown = meter.make(what)
            if shown is not None:
                shown.show(job)
            time.sleep(min(pause_s, late - now) if late else pause_s)
            pause_s = min(pause_s * PAUSE_GROWTH, PAUSE_MAX_S)
            job = _patiently(lambda: _look(session.client, job_id), what)
    finally:
        if shown is not None:
            shown.close()
    return job


def _patiently(look: Callable[[], T], what: str) -> T:
    """Return what is seen, even if the service is away for a while."""
    heard = time.monotonic()
    while True:
        try:
            return look()
        except (errors.Unavailable, errors.Unknown) as silent:
            if time.monotonic() - heard > SILENCE_S:
                raise errors.Unavailable(
                    f'{what} was accepted, but {silent}'
                ) from None
        time.sleep(PAUSE_MAX_S)


def _goes_on(words: str, job: Json | None) -> str:
    if job is None:
        return words
    words = f'{words}; look with "volume jobs show {job["id"]}"'
    if job['kind'] in CANCELLABLE:
        words += f', or end it with "volume jobs cancel {job["id"]}"'
    return words
