# SPDX-License-Identifier: Apache-2.0
"""What must be stored: the service's own journal, played back on a model.

A request that was accepted has a job; the job says whether it was done, and
when it began and ended. Together with what hosts have written over NBD this
gives every byte. Where a write and a copy of the same volume ran at the same
time, or a write had no answer, a block may hold either.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable
from typing import Any

from crash_bytes import Content
from crash_bytes import Values

Row = dict[str, Any]


@dataclasses.dataclass
class Thing:
    """A volume, a snapshot or an image as it must be."""

    size_bytes: int
    content: Content


@dataclasses.dataclass
class Write:
    """What a host has written; durable if its flush was answered."""

    volume_id: str
    tokens: dict[int, int]
    began_at: float
    ended_at: float = math.inf
    is_flushed: bool = False
    before: dict[int, Values] = dataclasses.field(default_factory=dict)


class Model:
    """What was asked for, and what must have come of it."""

    def __init__(self, images: dict[str, Thing]) -> None:
        self.volumes: dict[str, Thing] = {}
        self.snapshots: dict[str, Thing] = {}
        self.uploads: dict[str, Thing] = {}  # by path
        # Cancelled when the image was there, or not yet: both are right.
        self.perhaps_uploads: dict[str, Thing] = {}
        # Those that were made and deleted again; none of them may be back.
        self.deleted: set[str] = set()
        self._images = images
        self._lock = threading.Lock()
        self._wishes: dict[str, tuple[int, str]] = {}
        self._writes: list[Write] = []
        self._written: list[Write] = []
        self._played: set[str] = set()

    # What clients tell.

    def wish(self, volume_id: str, size_bytes: int, image: str = '') -> None:
        """Note what a volume is to be, before it is asked for."""
        with self._lock:
            self._wishes[volume_id] = size_bytes, image

    def wrote(self, write: Write) -> None:
        """Note a write before it begins; its end is noted in it."""
        with self._lock:
            self._writes.append(write)

    # What the journal tells.

    def play(self, jobs: Iterable[Row]) -> None:
        """Do what ended jobs and writes have done, in their order.

        Nobody asks or writes meanwhile.
        """
        new = [
            row for row in jobs
            if row['state'] != 'open' and row['id'] not in self._played
        ]
        with self._lock:
            self._written, self._writes = self._writes, []
        events: list[tuple[float, Row | Write]] = [
            *((row['created_at'], row) for row in new),
            *((write.began_at, write) for write in self._written),
        ]
        for _, event in sorted(events, key=lambda each: each[0]):
            if isinstance(event, Write):
                self._write(event)
            else:
                self._played.add(event['id'])
                if event['state'] == 'done':
                    self._do(event)
                elif event['kind'] == 'upload':
                    self._upload(event, self.perhaps_uploads)

    def _write(self, write: Write) -> None:
        volume = self.volumes.get(write.volume_id)
        if volume is None:
            return
        for number in write.tokens:
            write.before[number] = volume.content.values(number)
        volume.content.write(write.tokens, write.is_flushed)

    def _do(self, job: Row) -> None:
        kind, args = job['kind'], job['args']
        volume_id, snapshot_id = job['volume_id'], job['snapshot_id']
        if kind in ('create', 'create_filled'):
            self._create(job)
        elif kind == 'delete':
            self._forget(volume_id, *args.get('snapshots', ()))
        elif kind == 'delete_snapshot':
            self._forget(snapshot_id)
        elif kind == 'extend':
            self.volumes[volume_id].size_bytes = args['size_bytes']
        elif kind == 'snapshot':
            self.snapshots[snapshot_id] = self._copy(volume_id, job)
        elif kind == 'revert':
            kept = self.snapshots[snapshot_id]
            self.volumes[volume_id].content = kept.content.copy()
        elif kind == 'upload':
            self._upload(job, self.uploads)

    def _upload(self, job: Row, uploads: dict[str, Thing]) -> None:
        path = job['args']['url'].removeprefix('file://')
        uploads[path] = self._copy(job['volume_id'], job)

    def _create(self, job: Row) -> None:
        volume_id = job['volume_id']
        size_bytes, image = self._wishes[volume_id]
        content = Content()
        if image:
            content = self._images[image].content.copy()
        elif job['kind'] == 'create_filled':
            source, = job['shared']
            what, _, source_id = source.partition('-')
            if what == 'snapshot':
                content = self.snapshots[source_id].content.copy()
            else:
                content = self._copy(source_id, job).content
        self.volumes[volume_id] = Thing(size_bytes, content)

    def _copy(self, volume_id: str, job: Row) -> Thing:
        """Return what a copy holds that was taken while the job ran."""
        volume = self.volumes[volume_id]
        content = volume.content.copy()
        for write in self._written:
            if (
                write.volume_id == volume_id
                and write.ended_at >= job['created_at']
                and write.began_at <= job['ended_at']
            ):
                for number, token in write.tokens.items():
                    content.allow(
                        number, (token, *write.before.get(number, ()))
                    )
        return Thing(volume.size_bytes, content)

    def _forget(self, *ids: str) -> None:
        for each in ids:
            self.volumes.pop(each, None)
            self.snapshots.pop(each, None)
            self.deleted.add(each)
