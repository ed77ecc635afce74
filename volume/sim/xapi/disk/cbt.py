# SPDX-License-Identifier: Apache-2.0
"""Changed-block tracking: a log beside each VDI that has it.

A log is a bitmap, one bit for 64 KiB, of what was written since the log
before it ended, and knows the logs before and after it. A snapshot takes the
log of its origin, which begins a new one; the blocks that changed between
two snapshots are those of the logs from behind the first up to the second.

A log of a disk that is written to is marked open; one that is found open
when the server starts has lost bits and is worth nothing, as a real server
takes it. Logs lie in the state of the pool, not in the SR [I]: an SR that
moves to another pool leaves them behind.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from volume.sim.xapi.failure import sm_failure

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

BLOCK_BYTES = 64 << 10
NONE = ''


@dataclasses.dataclass
class Log:
    """One log; ``parent`` and ``child`` are uuids of VDIs, or empty."""

    size_bytes: int
    bits: bytearray
    parent: str = NONE
    child: str = NONE
    is_open: bool = False

    @classmethod
    def empty(cls, size_bytes: int) -> Log:
        """Return a log of a disk of that size in which nothing changed."""
        return cls(size_bytes, bytearray(bitmap_bytes(size_bytes)))

    def mark(self, offset: int, length: int) -> None:
        """Note that a run was written; the first block is the highest bit."""
        if length <= 0:
            return
        first = offset // BLOCK_BYTES
        last = (offset + length - 1) // BLOCK_BYTES
        bits = self.bits
        while first <= last and first % 8:
            bits[first // 8] |= 0x80 >> first % 8
            first += 1
        while first + 7 <= last:
            bits[first // 8] = 0xFF
            first += 8
        for block in range(first, last + 1):
            bits[block // 8] |= 0x80 >> block % 8

    def resize(self, size_bytes: int) -> None:
        """Follow the disk; what is new in it has not changed yet."""
        self.size_bytes = size_bytes
        self.bits.extend(bytes(bitmap_bytes(size_bytes) - len(self.bits)))

    def join(self, other: Log) -> None:
        """Add what changed in another log."""
        if other.size_bytes > self.size_bytes:
            self.resize(other.size_bytes)
        for index, byte in enumerate(other.bits):
            self.bits[index] |= byte


def logs(pool: Pool) -> Logs:
    """Return the logs of a pool."""
    return pool.part(_of)


def _of(pool: Pool) -> Logs:
    return Logs(pool.directory / 'cbt')


def bitmap_bytes(size_bytes: int) -> int:
    """Return the length of the bitmap of a disk."""
    return -(-size_bytes // (8 * BLOCK_BYTES))


class Logs:
    """All logs of a pool, each a file that is replaced as a whole."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._open: dict[str, Log] = {}

    def __contains__(self, vdi: str) -> bool:
        return self._path(vdi).exists()

    def enable(
        self, vdi: str, size_bytes: int, is_written: bool = False
    ) -> None:
        """Begin to track a VDI; it may be written to already."""
        with self._lock:
            if vdi not in self:
                log = Log.empty(size_bytes)
                log.is_open = is_written
                self._store(vdi, log)
                if is_written:
                    self._open[vdi] = log

    def disable(self, vdi: str) -> None:
        """Forget a VDI's log; what is linked to it is linked no more."""
        with self._lock:
            self._open.pop(vdi, None)
            log = self._load(vdi)
            if log is None:
                return
            self._path(vdi).unlink()
            for other, field in ((log.parent, 'child'), (log.child, 'parent')):
                self._link(other, field, vdi, NONE)

    def opened(self, vdi: str) -> Log | None:
        """Return the log of a disk that is about to be written.

        :return: nothing if it is not tracked, or tracked no more since its
            log was left open
        """
        with self._lock:
            log = self._load(vdi)
            if log is None:
                return None
            if log.is_open and vdi not in self._open:
                self.disable(vdi)
                return None
            log.is_open = True
            self._store(vdi, log)
            self._open[vdi] = log
            return log

    def drop_broken(self) -> list[str]:
        """Forget the logs that were left open; return whose they were."""
        with self._lock:
            found = [
                path.stem for path in self._directory.glob('*.cbtlog')
                if path.stem not in self._open
                and (log := self._load(path.stem)) and log.is_open
            ]
            for vdi in found:
                self.disable(vdi)
            return sorted(found)

    def written(self, vdi: str, offset: int, length: int) -> None:
        """Note a write to a disk whose log is open."""
        with self._lock:
            log = self._open.get(vdi)
            if log is not None:
                log.mark(offset, length)

    def closed(self, vdi: str) -> None:
        """Store the log of a disk that is written no more."""
        with self._lock:
            log = self._open.pop(vdi, None)
            if log is not None:
                log.is_open = False
                self._store(vdi, log)

    def snapshot(self, vdi: str, snapshot: str) -> bool:
        """Hand a VDI's log to its snapshot; say if there was one."""
        with self._lock:
            log = self._load(vdi)
            if log is None:
                return False
            fresh = Log.empty(log.size_bytes)
            fresh.parent, fresh.child = snapshot, log.child
            if self._open.pop(vdi, None) is not None:
                fresh.is_open = True
                self._open[vdi] = fresh
            log.child, log.is_open = vdi, False
            self._link(log.parent, 'child', vdi, snapshot)
            self._store(snapshot, log)
            self._store(vdi, fresh)
            return True

    def delete(self, vdi: str) -> None:
        """Follow the end of a VDI: its changes become those of its child."""
        with self._lock:
            self._open.pop(vdi, None)
            log = self._load(vdi)
            if log is None:
                return
            child = self._load(log.child) if log.child else None
            if child is not None:
                child.join(log)
                child.parent = log.parent
                self._keep(log.child, child)
            self._link(log.parent, 'child', vdi, log.child)
            self._path(vdi).unlink()

    def resize(self, vdi: str, size_bytes: int) -> None:
        """Follow a VDI that has grown."""
        with self._lock:
            log = self._open.get(vdi) or self._load(vdi)
            if log is not None:
                log.resize(size_bytes)
                self._keep(vdi, log)

    def changed(self, source: str, target: str) -> str:
        """Return which blocks differ between two VDIs, as a client sees it.

        :raises Failure: one does not come from the other
        """
        with self._lock:
            merged: Log | None = None
            at, seen = source, {source}
            log = self._load(at)
            while log is not None and log.child and log.child not in seen:
                at = log.child
                seen.add(at)
                log = self._load(at)
                if log is None:
                    break
                if merged is None:
                    merged = Log.empty(log.size_bytes)
                merged.join(log)
                if at == target:
                    return base64.b64encode(merged.bits).decode()
        raise sm_failure(
            460, 'Failed to calculate changed blocks for given VDIs',
            'Source and target VDI are unrelated',
        )

    def _keep(self, vdi: str, log: Log) -> None:
        known = self._open.get(vdi)
        if known is not None and known is not log:
            known.size_bytes, known.bits = log.size_bytes, log.bits
            known.parent, known.child = log.parent, log.child
            log = known
        self._store(vdi, log)

    def _link(self, vdi: str, field: str, was: str, now: str) -> None:
        log = self._load(vdi) if vdi else None
        if log is not None and getattr(log, field) == was:
            setattr(log, field, now)
            self._keep(vdi, log)

    def _path(self, vdi: str) -> Path:
        return self._directory / f'{vdi}.cbtlog'

    def _load(self, vdi: str) -> Log | None:
        known = self._open.get(vdi)
        if known is not None:
            return known
        try:
            head, _, bits = self._path(vdi).read_bytes().partition(b'\n')
        except FileNotFoundError:
            return None
        return Log(bits=bytearray(bits), **json.loads(head))

    def _store(self, vdi: str, log: Log) -> None:
        head = {
            'size_bytes': log.size_bytes, 'parent': log.parent,
            'child': log.child, 'is_open': log.is_open,
        }
        draft = self._path(vdi).with_suffix('.new')
        draft.write_bytes(json.dumps(head).encode() + b'\n' + log.bits)
        draft.replace(self._path(vdi))

