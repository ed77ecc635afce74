# SPDX-License-Identifier: Apache-2.0
"""What is remembered of bytes that were sent, to be compared afterwards.

The server says that all is well before it has the bytes, and its task may
end well although a host of the pool lost some. A few pieces, spread over the
whole disk, are read back; the last that was sent is always one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from volume import errors
from volume.model import Extent

SAMPLE_BYTES = 4096
SAMPLES = 16


class Source(Protocol):
    """What is read back."""

    def seek(self, offset: int, whence: int = ..., /) -> int: ...

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class Samples:
    """Up to ``SAMPLES`` pieces, as far from each other as possible."""

    def __init__(self) -> None:
        self._stride = 0
        self._next = 0
        self._kept: list[tuple[int, bytes]] = []
        self._last: tuple[int, bytes] | None = None

    def note(self, at: int, view: memoryview) -> None:
        """Hear of bytes; offsets ascend."""
        if not view:
            return
        end = max(0, len(view) - SAMPLE_BYTES)
        self._last = at + end, bytes(view[end:])
        if at + len(view) <= self._next:
            return
        start = max(0, self._next - at)
        self._keep(at + start, bytes(view[start:start + SAMPLE_BYTES]))

    def note_zeros(self, at: int, length: int) -> None:
        """Hear of a run of zeros."""
        start = max(at, self._next)
        if start < at + length:
            self._keep(start, bytes(min(SAMPLE_BYTES, at + length - start)))

    def check(
        self, source: Source, what: str, near_bytes: int | None = None
    ) -> None:
        """Read them back, all or those near the beginning.

        :raises Corrupt: the bytes are others
        """
        for at, wanted in self:
            if near_bytes is not None and at >= near_bytes:
                break
            found = bytearray(len(wanted))
            view, have = memoryview(found), 0
            source.seek(at)
            while have < len(found):
                count = source.readinto(view[have:])
                if not count:
                    break
                have += count
            if found[:have] != wanted:
                raise errors.Corrupt(
                    f'{what} was filled, and its bytes at {at} are not those '
                    'that were sent; do not use it, and look at the storage '
                    'of the pool'
                )

    def check_places(self, runs: Iterable[Extent], what: str) -> None:
        """See that nothing is told to be zero where there must be bytes.

        :raises Corrupt: something is
        """
        left = [at for at, wanted in self if any(wanted)]
        for run in runs:
            end = run.offset_bytes + run.length_bytes
            while left and left[0] < end:
                at = left.pop(0)
                if run.is_zero and at >= run.offset_bytes:
                    raise errors.Corrupt(
                        f'{what} was filled, and the server has nothing at '
                        f'{at}; do not use it, and look at the storage of '
                        'the pool'
                    )

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        kept = dict(self._kept)
        if self._last is not None:
            kept[self._last[0]] = self._last[1]
        return iter(sorted(kept.items()))

    def _keep(self, at: int, data: bytes) -> None:
        self._kept.append((at, data))
        if len(self._kept) == SAMPLES:
            self._kept = self._kept[::2]
            self._stride = max(self._stride * 2, SAMPLE_BYTES)
            span = self._kept[-1][0] - self._kept[0][0]
            self._stride = max(self._stride, span // len(self._kept))
        self._next = at + max(len(data), self._stride)
