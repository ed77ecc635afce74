# SPDX-License-Identifier: Apache-2.0
"""What the clients believe to be there; the truth is elsewhere."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator, Mapping

from crash_bytes import block
from demo_web import ImageServer


@dataclasses.dataclass
class Known:
    """A volume, or a snapshot of one."""

    backend: str
    size_bytes: int
    volume_id: str = ''


@dataclasses.dataclass(frozen=True)
class Held:
    """A volume that a host has attached, and goes on to use."""

    attachment_id: str
    volume_id: str
    size_bytes: int
    uri: str


class Roster:
    """Shared by all clients of a run."""

    def __init__(self, server: ImageServer, images: dict[str, int]) -> None:
        self.images = images  # virtual sizes by file name
        self.volumes: dict[str, Known] = {}
        self.snapshots: dict[str, Known] = {}
        self.held: dict[str, Held] = {}
        self.cancelled: set[str] = set()  # jobs
        self.pinned: set[str] = set()  # attachments that are to stay
        self._server = server
        self._lock = threading.Lock()

    def url(self, chance: random.Random, image: str) -> str:
        """Return where an image is: a file, or on the web."""
        if chance.random() < 0.5:
            return f'file://{self._server.directory}/{image}'
        return self._server.url(image)

    def pick(
        self,
        chance: random.Random,
        things: Mapping[str, Known],
        is_right: Callable[[Known], bool] = lambda known: True,
    ) -> tuple[str, Known] | None:
        """Choose one of those that are believed to be there."""
        with self._lock:
            found = [
                each for each in things.items() if is_right(each[1])
            ]
        return chance.choice(found) if found else None

    def add_volume(self, volume_id: str, known: Known) -> None:
        with self._lock:
            self.volumes[volume_id] = known

    def add_snapshot(self, snapshot_id: str, known: Known) -> None:
        with self._lock:
            self.snapshots[snapshot_id] = known

    def drop(self, row_id: str) -> None:
        """Forget a volume with its snapshots, or a snapshot."""
        with self._lock:
            self.volumes.pop(row_id, None)
            self.snapshots.pop(row_id, None)
            for each in [
                key for key, known in self.snapshots.items()
                if known.volume_id == row_id
            ]:
                del self.snapshots[each]

    def hold(self, held: Held) -> None:
        with self._lock:
            self.held[held.attachment_id] = held

    def take_held(self, chance: random.Random) -> Held | None:
        """Take one of the attached volumes, so that nobody else works on it.

        What a host does to its disk has an order.
        """
        with self._lock:
            free = [each for each in self.held if each not in self.pinned]
            return self.held.pop(chance.choice(free)) if free else None

    def pin(self, chance: random.Random) -> bool:
        """Have one of the attached volumes stay; say whether there is one."""
        with self._lock:
            if self.held:
                self.pinned.add(chance.choice(list(self.held)))
            return bool(self.held)

    def correct(
        self, volumes: dict[str, Known], snapshots: dict[str, Known]
    ) -> None:
        """Believe what is true."""
        with self._lock:
            self.volumes, self.snapshots = volumes, snapshots
            self.cancelled.clear()
            self.pinned.clear()

    @staticmethod
    def runs(tokens: Mapping[int, int]) -> Iterator[tuple[int, bytes]]:
        """Yield first block and bytes of runs of blocks."""
        start, data = -1, bytearray()
        for number in sorted(tokens):
            if data and number == start + len(data) // len(block(0)):
                data += block(tokens[number])
                continue
            if data:
                yield start, bytes(data)
            start, data = number, bytearray(block(tokens[number]))
        if data:
            yield start, bytes(data)
