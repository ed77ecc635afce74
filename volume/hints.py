# SPDX-License-Identifier: Apache-2.0
"""Wake whoever can run a job: this process, or a manager by a message.

No request waits for the broker: a message is sent by a thread of its own,
once. A hint that is lost costs one interval of a sweep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import queue
import random
import threading
from typing import Any

from oslo_config import cfg
from sqlalchemy import select
from sqlalchemy.orm import Session

from volume import errors
from volume import periodic
from volume import rpcapi
from volume.context import current_request
from volume.db import models
from volume.db.engine import Database
from volume.guarded import guarded
from volume.runner import Runner

LOG = logging.getLogger(__name__)
WAITING_MAX = 10_000
END_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Word:
    """What is told of a job, and to whom; nobody named is anybody."""

    job_id: str
    request_id: str
    backend: str
    host: str


class Hints:
    """Callable like ``Runner.hint``, for work of all managers."""

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        db: Database,
        runner: Runner,
        *,
        silent_s: float,
    ) -> None:
        self._conf = conf
        self._db = db
        self._runner = runner
        self._silent_s = silent_s
        self._words: queue.Queue[_Word | None] = queue.Queue(WAITING_MAX)
        self._thread = threading.Thread(
            target=self._send, name='hints', daemon=True
        )

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Send what waits, if that is quick, and end."""
        with contextlib.suppress(queue.Full):
            self._words.put_nowait(None)
        self._thread.join(END_S)

    def __call__(self, job: models.Job, *known: Any) -> None:
        """Have a job run that was accepted, or is due again."""
        mine = '', self._runner.host
        if job.owner == self._runner.owner or (
            self._runner.runs(job.backend)
            and job.node in mine and job.owner_host in mine
        ):
            self._runner.hint(job, *known)
            return
        if self._runner.runs(job.backend):
            self._runner.wake()  # it may be ours to take all the same
        word = _Word(
            job.id, job.request_id, job.backend, job.node or job.owner_host
        )
        with contextlib.suppress(queue.Full):
            self._words.put_nowait(word)

    def _send(self) -> None:
        # Tried once: in a second try it would be older than the sweep.
        bus = rpcapi.VolumeAPI.connect(self._conf, retries=0)
        with contextlib.closing(bus):
            while (word := self._words.get()) is not None:
                current_request.set(word.request_id)
                guarded('hints', functools.partial(self._say, bus, word))

    def _say(self, bus: rpcapi.VolumeAPI, word: _Word) -> None:
        try:
            self._wake(bus, word)
        except errors.VolumeError as failed:
            LOG.info('job %s waits for a sweep: %s', word.job_id, failed)

    def _wake(self, bus: rpcapi.VolumeAPI, word: _Word) -> None:
        host = word.host or self._db.read(
            lambda s: self._anybody(s, word.backend)
        )
        if host:
            bus.wake(dataclasses.replace(
                periodic.SYSTEM, request_id=word.request_id
            ), word.job_id, host=host)

    def _anybody(self, session: Session, backend: str) -> str:
        """Return one of the managers whose backend is up; any is as good."""
        heard = self._db.clock() - self._silent_s
        hosts = [
            row.host for row in session.scalars(
                select(models.Service).where(
                    models.Service.heard_at >= heard,
                    models.Service.is_fenced.is_(False),
                )
            ) if (row.backends or {}).get(backend) == ''
        ]
        return random.choice(hosts) if hosts else ''
