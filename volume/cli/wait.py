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

from volume import errors
from volume.cli import meter
from volume.cli.client import Client
from volume.cli.client import Json

PAUSE_S = 0.05
PAUSE_MAX_S = 1.0
PAUSE_GROWTH = 1.5
SILENCE_S = 60.0  # how long the service may be away while we wait
UNSETTLED = frozenset({'creating', 'downloading'})


class Late(errors.Unknown):
    """The time that the caller gave is over; the work goes on."""


class Interrupted(errors.Unknown):
    """The person stopped to wait; the work goes on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """How to reach the service, and how its user wants to be answered."""

    client: Client
    format: str
    wait: bool = True
    timeout_s: float | None = None


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

    :raises VolumeError: the job has failed, or was cancelled
    :raises Late: the caller's time is over
    :raises Interrupted: the person's patience is
    """
    job = None
    try:
        # A job and what it works for are accepted at once: if it is not
        # there now, there is none.
        job = _find(session.client, ticket, volume_id)
        if job is None:
            return False
        job = _watch(session, job, what)
    except KeyboardInterrupt:
        raise Interrupted(_goes_on(f'{what} goes on', job)) from None
    if job['state'] == 'cancelled':
        raise errors.VolumeError(f'{what} was cancelled; job {job["id"]}')
    if job['state'] != 'done':
        raise errors.VolumeError(
            f'{what} failed: {job["error"] or "it is not said why"}; '
            f'job {job["id"]}'
        )
    return True


def job(session: Session, job_id: str, what: str) -> Json:
    """Wait for a job that is known, and return it as it has ended."""
    client = session.client
    found: Json = client.get(f'/os-volume-jobs/{job_id}')['job']
    try:
        return _watch(session, found, what)
    except KeyboardInterrupt:
        raise Interrupted(_goes_on(f'{what} goes on', found)) from None


def settled(session: Session, look: Callable[[], Json], what: str) -> Json:
    """Return a thing once nobody makes it any more.

    Needed where a request was repeated, and an earlier one has the job.
    """
    late = _deadline(session)
    pause_s = PAUSE_S
    while (thing := look())['status'] in UNSETTLED:
        if late and time.monotonic() > late:
            raise Late(_goes_on(f'{what} is not done yet', None))
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


def _watch(session: Session, job: Json, what: str) -> Json:
    client, late = session.client, _deadline(session)
    heard = time.monotonic()
    pause_s = PAUSE_S
    shown = None
    try:
        while job['state'] == 'open':
            now = time.monotonic()
            if late and now >= late:
                raise Late(_goes_on(f'{what} is not done yet', job))
            time.sleep(min(pause_s, late - now) if late else pause_s)
            pause_s = min(pause_s * PAUSE_GROWTH, PAUSE_MAX_S)
            try:
                job = client.get(f'/os-volume-jobs/{job["id"]}')['job']
                heard = time.monotonic()
            except (errors.Unavailable, errors.Unknown) as silent:
                if time.monotonic() - heard > SILENCE_S:
                    raise errors.Unavailable(_goes_on(
                        f'{what} was accepted, but {silent}', job
                    )) from None
            # What is done at once needs no bar.
            if shown is None and pause_s == PAUSE_MAX_S:
                shown = meter.make(what)
            if shown is not None:
                shown.show(job)
    finally:
        if shown is not None:
            shown.close()
    return job


def _deadline(session: Session) -> float:
    if session.timeout_s is None:
        return 0.0
    return time.monotonic() + session.timeout_s


def _goes_on(words: str, job: Json | None) -> str:
    if job is None:
        return words
    return (
        f'{words}; look with "volume jobs show {job["id"]}", or end it with '
        f'"volume jobs cancel {job["id"]}"'
    )
