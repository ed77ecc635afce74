# SPDX-License-Identifier: Apache-2.0
"""Copying bytes: sparse, hashed on the way, bounded, and stoppable.

One thread reads ahead, one hashes, and the caller's thread writes, in order;
between them are a handful of buffers and no more. Runs that the source knows
to be zero are not read, and runs that turn out to be zero are not written:
they are skipped in a target that is known to be zero, and made zero in any
other.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import errno
import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from volume import concurrency
from volume import errors
from volume.model import Extent
from volume.node import meaning
from volume.transfer.base import Opened

CHUNK_BYTES = 1 << 20
CHUNKS = 8
HASHING = 3  # of them may wait to be hashed while more is written
ZERO_BYTES = 1 << 16  # zeros are looked for in blocks of this size
ZEROS = bytes(ZERO_BYTES)
ZERO_RUN_BYTES_MAX = 32 << 20  # no longer, that it can be told and stopped
WATCH_S = 0.2
GRACE_S = 30.0

Watch = Callable[[int, int], None]
"""Called with bytes done and bytes in all; what it raises ends the work."""

DIGESTS = {'md5': 32, 'sha1': 40, 'sha256': 64, 'sha512': 128}


class Target(Protocol):
    """What can be filled; offsets ascend."""

    def seek(self, offset: int, whence: int = ..., /) -> int: ...

    def write(self, data: Any, /) -> int | None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Checksum:
    """What an image's bytes must add up to."""

    algorithm: str
    digest: str

    def check(self, digest: str, name: str) -> None:
        """Compare.

        :raises Invalid: the bytes are others
        """
        if digest != self.digest:
            raise errors.Invalid(
                f'{name} is not what was asked for: its {self.algorithm} is '
                f'{digest}, not {self.digest}'
            )


def checksum(text: str | None) -> Checksum | None:
    """Return the checksum that ``algorithm:digest`` names.

    A digest alone is told by its length.

    :raises Invalid: it is malformed
    """
    if not text:
        return None
    algorithm, _, digest = text.strip().lower().rpartition(':')
    if not algorithm:
        by_length = {length: name for name, length in DIGESTS.items()}
        algorithm = by_length.get(len(digest), '')
    if (
        algorithm not in DIGESTS
        or re.fullmatch('[0-9a-f]+', digest) is None
        or len(digest) != DIGESTS[algorithm]
    ):
        raise errors.Invalid(
            f'checksum {text!r:.140} is malformed; write algorithm:digest '
            'with one of ' + ', '.join(DIGESTS)
        )
    return Checksum(algorithm, digest)


def copy(
    source: Opened,
    target: Target,
    size_bytes: int,
    *,
    extents: Iterable[Extent] | None = None,
    zero: Callable[[int, int], None] | None = None,
    algorithm: str | None = None,
    rate_bytes_per_s: int | None = None,
    watch: Watch | None = None,
) -> str:
    """Copy ``size_bytes`` to the same offsets; return the digest.

    ``extents`` tells which runs of a seekable source are zero; without it
    the source is only ever read forward. ``zero`` makes a run of the target
    zero; without it such runs are skipped, and the target is zero there.

    :raises Corrupt: the source has fewer bytes
    """
    digest = _new(algorithm) if algorithm else None
    pace = _Pace(rate_bytes_per_s, watch, size_bytes)
    ahead = _Ahead(source, size_bytes, extents)
    ahead.start()
    pool = concurrent.futures.ThreadPoolExecutor(1, 'hash')
    hashing: collections.deque[_Hashing] = collections.deque()

    def hashed(job: _Hashing) -> None:
        job[0].result()
        ahead.give_back(job[1])

    try:
        while (chunk := ahead.next(pace.tick)) is not None:
            if digest is not None:
                hashing.append((pool.submit(_hash, digest, chunk), chunk))
            if chunk.buffer is None:
                if zero is not None:
                    zero(chunk.offset_bytes, chunk.length_bytes)
            else:
                _write(target, chunk, zero)
            if digest is None:
                ahead.give_back(chunk)
            elif len(hashing) > HASHING:
                hashed(hashing.popleft())
            pace.done(chunk.length_bytes, chunk.buffer is not None)
        while hashing:
            hashed(hashing.popleft())
    except OSError as failed:
        raise meaning(failed, 'copy') from failed
    finally:
        ahead.end()
        pool.shutdown()
    pace.tick(force=True)
    return digest.hexdigest() if digest is not None else ''


def digest_of(
    source: Opened,
    size_bytes: int,
    algorithm: str,
    watch: Watch | None = None,
) -> str:
    """Return the digest of a file on this node."""
    runs = file_extents(source.fileno(), size_bytes)
    return copy(
        source, _Nowhere(), size_bytes, extents=runs, algorithm=algorithm,
        watch=watch,
    )


def file_extents(fd: int, size_bytes: int) -> Iterator[Extent]:
    """Yield the runs of a file, by what its file system says are holes."""
    def seek(at: int, whence: int) -> int:
        return concurrency.blocking(lambda: os.lseek(fd, at, whence))

    at = 0
    while at < size_bytes:
        try:
            data = min(seek(at, os.SEEK_DATA), size_bytes)
        except OSError as none_left:
            if none_left.errno != errno.ENXIO:
                raise
            data = size_bytes
        if data > at:
            yield Extent(at, data - at, True)
        if data >= size_bytes:
            return
        at = min(seek(data, os.SEEK_HOLE), size_bytes)
        yield Extent(data, at - data, False)


@dataclasses.dataclass(slots=True)
class _Chunk:
    """A run of bytes on its way; without a buffer it is zero."""

    offset_bytes: int
    length_bytes: int
    buffer: bytearray | None


_Hashing = tuple[concurrent.futures.Future[None], _Chunk]


class _Ahead(threading.Thread):
    """Reads ahead into a fixed number of buffers."""

    def __init__(
        self,
        source: Opened,
        size_bytes: int,
        extents: Iterable[Extent] | None,
    ) -> None:
        super().__init__(name='read ahead', daemon=True)
        self._source = source
        self._size_bytes = size_bytes
        self._extents = extents
        self._ready: queue.SimpleQueue[_Chunk | BaseException | None]
        self._ready = queue.SimpleQueue()
        self._free: queue.SimpleQueue[bytearray | None]
        self._free = queue.SimpleQueue()
        for _ in range(CHUNKS):
            self._free.put(bytearray(CHUNK_BYTES))
        self._ending = threading.Event()

    def run(self) -> None:
        try:
            self._read()
        except BaseException as failed:
            self._ready.put(failed)
        else:
            self._ready.put(None)

    def next(self, tick: Callable[[], None]) -> _Chunk | None:
        """Return the next chunk, or None after the last."""
        while True:
            try:
                item = self._ready.get(timeout=WATCH_S)
            except queue.Empty:
                tick()
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def give_back(self, chunk: _Chunk) -> None:
        if chunk.buffer is not None:
            self._free.put(chunk.buffer)

    def end(self) -> None:
        """End the thread; a source that can is told to stop waiting."""
        if self.is_alive():
            self._ending.set()
            self._free.put(None)
            abort = getattr(self._source, 'abort', None)
            if abort is not None:
                abort()
        self.join(GRACE_S)
        if self.is_alive():
            raise errors.Unknown(
                f'a read did not end within {GRACE_S:g} s of being stopped'
            )

    def _read(self) -> None:
        if self._extents is None:
            self._read_run(0, self._size_bytes)
            return
        at = 0
        for run in self._extents:
            if self._ending.is_set():
                return
            if run.offset_bytes != at:
                raise errors.Corrupt(
                    f'the source tells of a run at {run.offset_bytes}, not '
                    f'at {at}'
                )
            length = min(run.length_bytes, self._size_bytes - at)
            if run.is_zero:
                for start in range(at, at + length, ZERO_RUN_BYTES_MAX):
                    part = min(ZERO_RUN_BYTES_MAX, at + length - start)
                    self._ready.put(_Chunk(start, part, None))
            else:
                self._source.seek(at)
                self._read_run(at, length)
            at += length
            if at >= self._size_bytes:
                return
        raise errors.Corrupt(
            f'the source tells of {at} bytes, not of {self._size_bytes}'
        )

    def _read_run(self, at: int, length: int) -> None:
        end = at + length
        while at < end:
            buffer = self._free.get()
            if buffer is None or self._ending.is_set():
                return
            # Chunks stay aligned, so that blocks of zeros do, too.
            want = min(CHUNK_BYTES - at % CHUNK_BYTES, end - at)
            view = memoryview(buffer)
            have = 0
            while have < want:
                count = self._source.readinto(view[have:want])
                if not count:
                    raise errors.Corrupt(
                        f'the source ended at byte {at + have} of '
                        f'{self._size_bytes}'
                    )
                have += count
            view.release()
            self._ready.put(_Chunk(at, want, buffer))
            at += want


class _Pace:
    """Keeps to a rate, and tells how far the work is."""

    def __init__(
        self, rate: int | None, watch: Watch | None, size_bytes: int
    ) -> None:
        self._rate = rate
        self._watch = watch
        self._size_bytes = size_bytes
        self._done_bytes = 0
        self._moved_bytes = 0
        self._start = time.monotonic()
        self._told = 0.0

    def done(self, length: int, moved: bool) -> None:
        self._done_bytes += length
        self._moved_bytes += length if moved else 0
        self.tick()
        while self._rate:
            due = self._start + self._moved_bytes / self._rate
            left_s = due - time.monotonic()
            if left_s <= 0:
                break
            time.sleep(min(left_s, WATCH_S))
            self.tick()

    def tick(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._watch and (force or now - self._told >= WATCH_S):
            self._told = now
            self._watch(self._done_bytes, self._size_bytes)


class _Nowhere:
    """A target that keeps nothing."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return offset

    def write(self, data: Any, /) -> int:
        return len(data)


def _new(algorithm: str) -> Any:
    return hashlib.new(algorithm, usedforsecurity=False)


def _hash(digest: Any, chunk: _Chunk) -> None:
    concurrency.blocking(lambda: _update(digest, chunk))


def _update(digest: Any, chunk: _Chunk) -> None:
    if chunk.buffer is not None:
        digest.update(memoryview(chunk.buffer)[:chunk.length_bytes])
        return
    left = chunk.length_bytes
    while left:
        part = min(left, CHUNK_BYTES)
        digest.update(_MEGABYTE[:part])
        left -= part


_MEGABYTE = memoryview(bytes(CHUNK_BYTES))


def _write(
    target: Target, chunk: _Chunk, zero: Callable[[int, int], None] | None
) -> None:
    """Write what is not zero, in runs as long as possible."""
    assert chunk.buffer is not None
    view = memoryview(chunk.buffer)
    for start, end, is_zero in _runs(chunk.buffer, chunk.length_bytes):
        at = chunk.offset_bytes + start
        if is_zero:
            if zero is not None:
                zero(at, end - start)
            continue
        target.seek(at)
        while start < end:
            start += target.write(view[start:end]) or 0


def _runs(buffer: bytearray, length: int) -> Iterator[tuple[int, int, bool]]:
    start, was_zero = 0, False
    for at in range(0, length, ZERO_BYTES):
        size = min(ZERO_BYTES, length - at)
        zeros = ZEROS if size == ZERO_BYTES else ZEROS[:size]
        is_zero = buffer.startswith(zeros, at)
        if is_zero != was_zero:
            if at > start:
                yield start, at, was_zero
            start, was_zero = at, is_zero
    yield start, length, was_zero
