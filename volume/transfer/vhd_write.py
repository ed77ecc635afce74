# SPDX-License-Identifier: Apache-2.0
"""Making a VHD for a wire: its length is known before its first byte.

Which blocks there will be is told first, by the extents of the source; then
the table, and the blocks in the order of the disk. What is known to be empty
does not travel.
"""

from __future__ import annotations

import abc
import array
import bisect
import dataclasses
import uuid as uuids
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from volume import errors
from volume.model import Extent
from volume.model import MIB
from volume.model import SECTOR_BYTES as SECTOR
from volume.transfer import vhd_layout as layout

PIECE_BYTES = MIB
BLOCK_BYTES = (MIB // 2, 2 * MIB)  # what others read
# Footer, header, and one sector for the parent's path: as XenAPI servers
# lay it out.
HEADER_AT, PATH_AT, TABLE_AT = 512, 1536, 2048
# A change is told in whole bytes of the bitmap: by the bit, libvhdi takes up
# to seven sectors behind a run to be in the file that are in the parent.
GRAIN_BYTES = 8 * SECTOR
RUNS_MAX = 1 << 20


class Seekable(Protocol):
    """Where the disk's bytes come from; a driver's ``Reader`` is one."""

    def seek(self, offset: int, whence: int = ..., /) -> int: ...

    def readinto(self, buffer: memoryview, /) -> int | None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Parent:
    """What a differencing VHD is made against; ``path`` is a hint."""

    uuid: str
    timestamp: int = 0
    path: str = ''


class Image(abc.ABC):
    """A VHD to be sent."""

    length_bytes: int

    @abc.abstractmethod
    def chunks(self, source: Seekable) -> Iterator[memoryview]:
        """Yield it from its first byte to its last.

        A chunk is to be used before the next is asked for.

        :raises Corrupt: the source has fewer bytes
        """


class Fixed(Image):
    """All bytes of the disk, and a footer."""

    def __init__(
        self, size_bytes: int, *, uuid: str, timestamp: int = 0
    ) -> None:
        layout.check_size(size_bytes, 'the volume')
        self._footer = layout.Footer(
            layout.FIXED, size_bytes, uuid, timestamp)
        self.length_bytes = size_bytes + layout.FOOTER_BYTES

    def chunks(self, source: Seekable) -> Iterator[memoryview]:
        yield from _read(source, 0, self._footer.size_bytes)
        yield memoryview(self._footer.pack())


class _Sparse(Image):
    """Footer, header, path, table, blocks, footer."""

    def __init__(
        self,
        footer: layout.Footer,
        blocks: Iterable[int],
        block_bytes: int,
        parent: Parent | None = None,
    ) -> None:
        entries = -(-footer.size_bytes // block_bytes)
        path = b''
        if parent is not None and parent.path:
            path = layout.encode(f'file://{parent.path}', 'utf-8', SECTOR)
        self._footer = footer
        self._path = path.ljust(SECTOR, b'\0')
        self._header = header = layout.Header(
            TABLE_AT, entries, block_bytes,
            parent.uuid if parent else layout.NO_PARENT,
            parent.timestamp if parent else 0,
            parent.path if parent else '',
            (layout.Locator(layout.MAC_URL, SECTOR, len(path), PATH_AT),)
            if path else (),
        )
        self._table = array.array('I', [layout.UNUSED]) * (
            header.table_bytes // 4)
        at = TABLE_AT + header.table_bytes
        for block in blocks:
            self._table[block] = at // SECTOR
            at += header.bitmap_bytes + block_bytes
        self.length_bytes = at + layout.FOOTER_BYTES

    def chunks(self, source: Seekable) -> Iterator[memoryview]:
        yield from self._head()
        for block, entry in enumerate(self._table):
            if entry != layout.UNUSED:
                yield from self._block(source, block)
        yield memoryview(self._footer.pack())

    def _head(self) -> Iterator[memoryview]:
        yield memoryview(self._footer.pack())
        yield memoryview(self._header.pack() + self._path)
        yield memoryview(layout.pack_table(self._table))

    def _block(self, source: Seekable, block: int) -> Iterator[memoryview]:
        start = block * self._header.block_bytes
        length = layout.block_length(self._footer, self._header, block)
        at = start
        yield memoryview(self._bitmap(start, start + length))
        for low, high in self._runs(start, start + length):
            yield from _zeros(low - at)
            yield from _read(source, low, high)
            at = high
        yield from _zeros(start + self._header.block_bytes - at)

    @abc.abstractmethod
    def _bitmap(self, start: int, end: int) -> bytes:
        """Return the bitmap of a block of the disk."""

    @abc.abstractmethod
    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what of a block is to be read."""


class Dynamic(_Sparse):
    """A whole disk, without the blocks that are known to be zero."""

    def __init__(
        self,
        size_bytes: int,
        extents: Iterable[Extent],
        *,
        uuid: str,
        timestamp: int = 0,
        block_bytes: int = layout.BLOCK_BYTES,
    ) -> None:
        """Lay it out by extents that cover the disk in ascending order.

        :raises Corrupt: the extents do not
        """
        footer = _footer(
            layout.DYNAMIC, size_bytes, uuid, timestamp, block_bytes)
        super().__init__(
            footer, _written(extents, size_bytes, block_bytes), block_bytes)

    def _bitmap(self, start: int, end: int) -> bytes:
        # All of it is there. Many a reader does not look.
        return b'\xff' * self._header.bitmap_bytes

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        yield start, end


class Feed:
    """A dynamic VHD whose disk is written to, instead of being read.

    Offsets ascend. What is left out of a block that is sent is zero.
    """

    def __init__(
        self, image: Dynamic, send: Callable[[memoryview], None]
    ) -> None:
        """Send all that comes before the first block."""
        self._image = image
        self._send = send
        self._block_bytes = image._header.block_bytes
        self._size_bytes = image._footer.size_bytes
        self._at = 0
        for chunk in image._head():
            send(chunk)

    def write(self, at: int, view: memoryview) -> None:
        """Send bytes of the disk.

        :raises Conflict: they were to be zero
        :raises Unsupported: bytes behind them were sent already
        """
        if at < self._at:
            raise errors.Unsupported(
                f'a vhd on its way cannot go back from {self._at} to {at}')
        self._zeros_to(at)
        while view:
            length = min(
                len(view), self._block_bytes - self._at % self._block_bytes)
            if not self._is_open():
                raise errors.Conflict(
                    f'the source was zero at {self._at}, and has bytes there '
                    'now; something writes to it'
                )
            self._send(view[:length])
            self._at += length
            view = view[length:]

    def finish(self) -> None:
        """Send the rest of it."""
        self._zeros_to(self._size_bytes)
        short = -self._size_bytes % self._block_bytes
        if self._is_used(self._size_bytes - 1):
            for zeros in _zeros(short):
                self._send(zeros)
        self._send(memoryview(self._image._footer.pack()))

    def _zeros_to(self, end: int) -> None:
        while self._at < end:
            block_end = self._at - self._at % self._block_bytes
            until = min(end, block_end + self._block_bytes)
            if self._is_open():
                for zeros in _zeros(until - self._at):
                    self._send(zeros)
            self._at = until

    def _is_open(self) -> bool:
        """Say if this block is sent; begin it if this is its first byte."""
        if not self._is_used(self._at):
            return False
        if self._at % self._block_bytes == 0:
            self._send(memoryview(self._image._bitmap(0, 0)))
        return True

    def _is_used(self, at: int) -> bool:
        table = self._image._table
        return table[at // self._block_bytes] != layout.UNUSED


class Differencing(_Sparse):
    """What has changed since a parent was as it is."""

    def __init__(
        self,
        size_bytes: int,
        changed: Iterable[Extent],
        parent: Parent,
        *,
        uuid: str,
        timestamp: int = 0,
        block_bytes: int = layout.BLOCK_BYTES,
        runs_max: int = RUNS_MAX,
    ) -> None:
        """Lay it out by what has changed, in ascending order.

        What became zero has changed. More than ``runs_max`` runs are not
        kept in mind: what lies between near ones is then sent with them.

        :raises Corrupt: the extents do not ascend, or leave the disk
        """
        footer = _footer(
            layout.DIFFERENCING, size_bytes, uuid, timestamp, block_bytes)
        parent = dataclasses.replace(
            parent, uuid=str(uuids.UUID(parent.uuid)))
        if parent.uuid == footer.uuid:
            raise errors.Invalid(f'vhd {uuid} cannot be its own parent')
        self._changes = changes = _Changes(runs_max)
        at = 0
        for extent in changed:
            _check_extent(extent, at, size_bytes)
            at = extent.offset_bytes + extent.length_bytes
            if extent.length_bytes:
                changes.add(extent.offset_bytes // GRAIN_BYTES,
                            -(-at // GRAIN_BYTES))
        super().__init__(
            footer, changes.blocks(block_bytes), block_bytes, parent)

    def _bitmap(self, start: int, end: int) -> bytes:
        bits = self._header.bitmap_bytes * 8
        bitmap = 0
        for low, high in self._runs(start, end):
            sectors = (high - low) // SECTOR
            left = bits - (high - start) // SECTOR
            bitmap |= ((1 << sectors) - 1) << left
        return bitmap.to_bytes(self._header.bitmap_bytes, 'big')

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        return self._changes.within(start, end)


class _Changes:
    """Runs of grains, ascending; only so many, at the price of length."""

    def __init__(self, runs_max: int) -> None:
        self._runs_max = runs_max
        self._gap = 0
        self._starts = array.array('Q')
        self._ends = array.array('Q')

    def add(self, start: int, end: int) -> None:
        if self._ends and start <= self._ends[-1] + self._gap:
            self._ends[-1] = max(end, self._ends[-1])
            return
        self._starts.append(start)
        self._ends.append(end)
        while len(self._starts) > self._runs_max:
            self._gap = max(1, 2 * self._gap)
            starts, ends = self._starts, self._ends
            self._starts, self._ends = array.array('Q'), array.array('Q')
            for low, high in zip(starts, ends, strict=True):
                self.add(low, high)

    def blocks(self, block_bytes: int) -> Iterator[int]:
        """Yield which blocks they touch."""
        grains, free = block_bytes // GRAIN_BYTES, 0
        for start, end in zip(self._starts, self._ends, strict=True):
            last = (end - 1) // grains
            yield from range(max(free, start // grains), last + 1)
            free = last + 1

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what of them lies in a run of bytes."""
        index = bisect.bisect_right(self._ends, start // GRAIN_BYTES)
        while (
            index < len(self._starts)
            and (low := self._starts[index] * GRAIN_BYTES) < end
        ):
            yield max(low, start), min(self._ends[index] * GRAIN_BYTES, end)
            index += 1


def _footer(
    kind: int, size_bytes: int, uuid: str, timestamp: int, block_bytes: int
) -> layout.Footer:
    layout.check_size(size_bytes, 'the volume')
    if block_bytes not in BLOCK_BYTES:
        raise errors.Invalid(
            f'a vhd with blocks of {block_bytes} bytes is not made; use one '
            f'of {BLOCK_BYTES}'
        )
    return layout.Footer(
        kind, size_bytes, str(uuids.UUID(uuid)), timestamp, HEADER_AT)


def _written(
    extents: Iterable[Extent], size_bytes: int, block_bytes: int
) -> Iterator[int]:
    """Yield the blocks that are not known to be zero."""
    at = free = 0
    for extent in extents:
        if extent.offset_bytes != at:
            raise errors.Corrupt(
                f'the source tells of a run at {extent.offset_bytes}, not at '
                f'{at}'
            )
        _check_extent(extent, at, size_bytes)
        at += extent.length_bytes
        if extent.length_bytes and not extent.is_zero:
            first = max(free, extent.offset_bytes // block_bytes)
            free = max(free, (at - 1) // block_bytes + 1)
            yield from range(first, free)
    if at != size_bytes:
        raise errors.Corrupt(
            f'the source tells of {at} bytes, not of {size_bytes}')


def _check_extent(extent: Extent, at: int, size_bytes: int) -> None:
    end = extent.offset_bytes + extent.length_bytes
    if (
        extent.offset_bytes < at or extent.length_bytes < 0
        or end > size_bytes
    ):
        raise errors.Corrupt(
            f'the source tells of a run from {extent.offset_bytes} to {end}, '
            f'after {at}, in a disk of {size_bytes}'
        )


def _read(source: Seekable, at: int, end: int) -> Iterator[memoryview]:
    """Yield a run of the source, in pieces."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(0, end - at))))
    while at < end:
        source.seek(at)
        want = buffer[:min(PIECE_BYTES, end - at)]
        have = 0
        while have < len(want):
            count = source.readinto(want[have:])
            if not count:
                raise errors.Corrupt(
                    f'the source ended at byte {at + have}, before {end}')
            have += count
        yield want
        at += have


def _zeros(length: int) -> Iterator[memoryview]:
    while length > 0:
        part = min(length, PIECE_BYTES)
        yield _ZEROS[:part]
        length -= part


_ZEROS = memoryview(bytes(PIECE_BYTES))
