# SPDX-License-Identifier: Apache-2.0
"""What becomes of the work of a manager that is no longer heard of.

Of a neighbour in our lock domain we can prove that it has ended, by ending
it: then its jobs are anybody's. Of any other only an operator knows, who
says so by ``volume-manage node fence``; a manager that finds itself fenced
ends at once, with all that works for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterable

from sqlalchemy import exists
from sqlalchemy import select

from volume import errors
from volume.blockd import Blockd
from volume.core import Core
from volume.db import jobs
from volume.db import models
from volume.exports.base import Exporter
from volume.guarded import guarded
from volume.lockdomain import LockDomain
from volume.node import Node

LOG = logging.getLogger(__name__)


class Neighbours:
    """Looks after the other members of a lock domain, again and again."""

    def __init__(
        self,
        core: Core,
        node: Node,
        domain: LockDomain,
        *,
        silent_s: float,
        gap_s: float,
    ) -> None:
        """``gap_s`` is more than ever passes between two looks."""
        self._core = core
        self._node = node
        self._domain = domain
        self._silent_s = silent_s
        self._gap_s = gap_s
        self._looked_at = self._patient_until = 0.0
        self._ended: set[str] = set()

    def look(self) -> int:
        """End silent neighbours; release what they hold, say how much.

        One that was heard of is left alone: what it does not run itself it
        finds by itself. After we were away ourselves, perhaps with the
        database, everybody gets the time to be heard of again.
        """
        now = self._core.db.clock()
        silent = self._silent(now)
        if now - self._looked_at > self._gap_s:
            self._patient_until = now + self._silent_s
        self._looked_at = now
        if now < self._patient_until:
            return 0
        count = 0
        for row, has_work in silent:
            if row.owner in self._ended and not has_work:
                continue
            try:
                count += self._end(row)
            except errors.VolumeError as failed:
                LOG.error(
                    'jobs of %s are not taken over: %s', row.host, failed
                )
        return count

    def _silent(self, now: float) -> list[tuple[models.Service, bool]]:
        services, work = models.Service, models.Job
        if not self._domain.id:
            return []
        return self._core.db.read(lambda s: [
            (row, bool(has_work)) for row, has_work in s.execute(
                select(services, exists().where(
                    work.owner == services.owner, work.state == 'open',
                )).where(
                    services.domain == self._domain.id,
                    services.host != self._core.owner_host,
                    services.heard_at < now - self._silent_s,
                )
            )
        ])

    def _end(self, row: models.Service) -> int:
        state_dir = self._domain.end(row.host, row.owner)
        # Its readers and writers were its own; its exports to hosts go on.
        Blockd(self._node, os.path.join(state_dir, 'blockd')).end_private()
        count = self._core.db.write(lambda s: jobs.release(s, row.owner))
        self._ended.add(row.owner)
        LOG.warning(
            '%s was not heard of for %d s and has ended; its %d jobs go on '
            'elsewhere, but for those of volumes that are attached there',
            row.host, self._core.db.clock() - row.heard_at, count,
        )
        return count


def end_all(node: Node, exporters: Iterable[Exporter]) -> None:
    """End all that works for this process, and what it has exported.

    The exporters are those of this machine.
    """
    end_children()
    if node.blockd is not None:
        guarded('the end of the storage daemon', node.blockd.stop)
    for exporter in exporters:
        guarded('the end of what is exported', exporter.abandon)
    # This process worked on until now, and may have started others.
    end_children()


def end_children() -> None:
    """Kill the commands that this process runs."""
    for pid in _children():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _children() -> list[int]:
    found: list[int] = []
    for thread in os.listdir('/proc/self/task'):
        with contextlib.suppress(OSError):
            with open(f'/proc/self/task/{thread}/children') as f:
                found += map(int, f.read().split())
    return found
