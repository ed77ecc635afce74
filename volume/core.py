# SPDX-License-Identifier: Apache-2.0
"""What every verb needs: the database, the limits, and a way to wake work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from volume import errors
from volume.db.engine import Database
from volume.notify import Notify
from volume.notify import silent

T = TypeVar('T')


class LeaseTaken(errors.Busy):
    """Another job works on it now; it will be free when that has ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a job has ended; ``answer`` is there if this process ran it."""

    state: str
    error_kind: str = ''
    error: str = ''
    answer: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The options that verbs obey; ``conf.py`` fills them in."""

    lease_wait_s: float = 10.0
    lease_s: float = 30.0
    job_retry_s: float = 3600.0
    call_timeout_s: float = 55.0
    service_down_s: float = 60.0
    size_bytes_max: int = 1 << 56
    availability_zone: str = 'nova'
    image_url_template: str = ''
    secrets_key_file: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Core:
    """The service as its doors see it.

    ``runs`` says whether this process may run a backend's jobs itself: then
    a job is born leased to ``owner``. ``hint`` wakes whoever runs the job,
    with the rows that the verb has just read; ``wait`` says how the job has
    ended, or raises ``Unknown`` after the given seconds.
    """

    db: Database
    hint: Callable[..., None]
    wait: Callable[[str, float], Ended]
    settings: Settings = Settings()
    owner: str = ''
    owner_host: str = ''
    runs: Callable[[str], bool] = lambda backend: False
    notify: Notify = silent

    def heard_after(self) -> float:
        """Return since when a manager must have reported to count as up."""
        return self.db.clock() - self.settings.service_down_s

    def when_free(self, accept: Callable[[], T]) -> T:
        """Return what ``accept`` returns once no other job is in its way.

        :raises Busy: the other job took longer than ``lease_wait_s``
        """
        deadline = time.monotonic() + self.settings.lease_wait_s
        pause_s = 0.005
        while True:
            try:
                return accept()
            except LeaseTaken:
                if time.monotonic() + pause_s > deadline:
                    raise
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 0.1)
