# SPDX-License-Identifier: Apache-2.0
"""One VHD file of a chain, read and written in place.

A file ends with its footer, always: before a block is put behind the last
one, the footer is written behind that place. The data follows, then the
block's bitmap, and the table's entry last. Whoever dies in between leaves a
VHD that is as it was, and perhaps longer.

Blocks are laid so that their data begins at whole pages, with the bitmap
before it, as XenServer does. Bits are set for 8 sectors at a time: by single
bits, libvhdi takes sectors to be in a file that are in its parent.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import os
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from volume import errors
from volume.model import SECTOR_BYTES as SECTOR
from volume.sim.xapi.disk import disks
from volume.transfer import vhd_layout as layout

PAGE_BYTES = 4096
GRAIN_BYTES = 8 * SECTOR
HEADER_AT, PATH_AT, TABLE_AT = 512, 1536, 2048
# blktap has this byte in the footer, behind "saved state".
HIDDEN_AT, SIZES_AT, GEOMETRY_AT = 85, 40, 56
BLOCK_BYTES_MAX = 32 << 20
STORE_BYTES = 16 << 20  # stored together while the next are written
MAPS = 4096  # kept; one is 4 KiB
SCANNED = 1 << 14  # bytes of a table that are looked at together
EPOCH = 946684800  # a VHD counts its seconds from 2000
UNSET, SET = b'0', b'1'
NEW_TABLE_PIECE = b'\xff' * (1 << 20)


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """What stands in a file beside its blocks."""

    footer: layout.Footer
    header: layout.Header
    is_hidden: bool
    file_bytes: int

    @property
    def parent(self) -> str:
        """The file name of the parent, or nothing."""
        if self.footer.kind != layout.DIFFERENCING:
            return ''
        return os.path.basename(self.header.parent_name)


def read_head(path: str) -> Head:
    """Read the head of a dynamic or differencing VHD.

    :raises Invalid: it is none, or damaged
    """
    with open(path, 'rb', buffering=0) as file:
        return head_of(file, path)


def head_of(file: Any, path: str) -> Head:
    """Read the head by the footer in the end, as blktap does.

    Its copy at the start may differ in size, if a resize was cut off.
    """
    name = os.path.basename(path)
    end = file.seek(0, os.SEEK_END)
    last = layout.read_at(file, max(0, end - SECTOR), SECTOR)
    footer = layout.Footer.parse(last, name)
    layout.check_size(footer.size_bytes, name)
    if footer.kind == layout.FIXED:
        raise errors.Invalid(
            f'{name} is refused: it is a fixed vhd; a storage repository has '
            'dynamic and differencing ones'
        )
    first = layout.Footer.parse(layout.read_at(file, 0, SECTOR), name)
    layout.check_twins(
        dataclasses.replace(first, size_bytes=footer.size_bytes), footer,
        name,
    )
    header = layout.Header.parse(
        layout.read_at(file, footer.header_offset_bytes, layout.HEADER_BYTES),
        footer.size_bytes, name,
    )
    if not GRAIN_BYTES <= header.block_bytes <= BLOCK_BYTES_MAX:
        raise errors.Invalid(
            f'{name} is refused: its vhd blocks have {header.block_bytes} '
            f'bytes; {GRAIN_BYTES} to {BLOCK_BYTES_MAX} are known'
        )
    return Head(footer, header, last[HIDDEN_AT] == 1, end)


def new_file(
    size_bytes: int, parent: Head | None, parent_name: str, uuid: str = ''
) -> Iterator[bytes]:
    """Yield a file without blocks."""
    kind = layout.DIFFERENCING if parent else layout.DYNAMIC
    footer = layout.Footer(
        kind, size_bytes, uuid or str(uuids.uuid4()),
        int(time.time()) - EPOCH, HEADER_AT,
    ).pack()
    header = layout.Header(
        TABLE_AT, -(-size_bytes // layout.BLOCK_BYTES), layout.BLOCK_BYTES)
    path = b''
    if parent is not None:
        path = path_of(parent_name)
        header = linked(header, parent, parent_name, PATH_AT)
    yield footer
    yield header.pack()
    yield path.ljust(SECTOR, b'\0')
    left = header.table_bytes
    while left > 0:
        yield NEW_TABLE_PIECE[:left]
        left -= len(NEW_TABLE_PIECE)
    yield footer


def path_of(name: str) -> bytes:
    """Return how the path of a parent in the same directory is written."""
    return layout.encode(f'file://./{name}', 'utf-8', SECTOR)


def linked(
    header: layout.Header, parent: Head, name: str, path_at: int | None
) -> layout.Header:
    """Return a header that names a parent, and where its path stands."""
    locators = () if path_at is None else (
        layout.Locator(
            layout.MAC_URL, SECTOR, len(path_of(name)), path_at),
    )
    return dataclasses.replace(
        header, parent_uuid=parent.footer.uuid,
        parent_timestamp=parent.footer.timestamp, parent_name=name,
        locators=locators,
    )


class Layer:
    """An open VHD without its parents; not for two threads at once.

    Its ends: data that is written lies in the file when ``write`` returns,
    and is found again by whoever opens it then.
    """

    def __init__(
        self,
        path: str,
        writable: bool = False,
        kernel: disks.Kernel = disks.KERNEL,
        claim: Callable[[int], None] = disks.endless,
    ) -> None:
        self.path = path
        self._kernel = kernel
        self._claim = claim
        self._file: BinaryIO = open(
            path, 'r+b' if writable else 'rb', buffering=0)
        try:
            self.head = head_of(self._file, path)
            table = table_of(self._file, self.head.header, path)
        except BaseException:
            self._file.close()
            raise
        self._fd = self._file.fileno()
        self.size_bytes = self.head.footer.size_bytes
        self.block_bytes = self.head.header.block_bytes
        self._bitmap_bytes = self.head.header.bitmap_bytes
        self._end = self.head.file_bytes - SECTOR
        self._footer = os.pread(self._fd, SECTOR, self._end)
        self._table = layout.table(table)
        count = -(-self.size_bytes // self.block_bytes)
        self._used = array.array('I', _used(table[:count * 4]))
        self._full = SET * (self.block_bytes // SECTOR)
        self._none = UNSET * (self.block_bytes // SECTOR)
        self._maps: dict[int, bytes] = {}
        self._unstored = 0

    def close(self) -> None:
        self._file.close()

    def run(self, at: int, end: int) -> tuple[int, int | None]:
        """Return until where bytes lie together, and where in the file.

        Without the latter they are not in this file.
        """
        if at >= self.size_bytes:
            return end, None
        end = min(end, self.size_bytes)
        block, inside = divmod(at, self.block_bytes)
        entry = self._table[block]
        if entry == layout.UNUSED:
            index = bisect.bisect_left(self._used, block)
            if index < len(self._used):
                end = min(end, self._used[index] * self.block_bytes)
            return end, None
        start = block * self.block_bytes
        end = min(end, start + self.block_bytes)
        bits = self._map(block)
        sector = inside // SECTOR
        is_set = bits[sector] == SET[0]
        if bits is not self._full:
            other = bits.find(UNSET if is_set else SET, sector)
            if other >= 0:
                end = min(end, start + other * SECTOR)
        if not is_set:
            return end, None
        return end, self._data(entry) + inside

    def used(self) -> Sequence[int]:
        """Return which blocks are in the file, in ascending order."""
        return self._used

    def read(self, offset: int, view: memoryview) -> None:
        """Fill a view from where ``run`` said."""
        disks.read_whole(self._fd, view, offset, self.path)

    def is_set(self, at: int, end: int) -> bool:
        """Say whether all of a part of a block is in this file."""
        block, inside = divmod(at, self.block_bytes)
        if self._table[block] == layout.UNUSED:
            return False
        low, high = inside // SECTOR, -(-(inside + end - at) // SECTOR)
        bits = self._map(block)
        return bits is self._full or bits.find(UNSET, low, high) < 0

    def write(self, at: int, parts: Sequence[Any]) -> None:
        """Write parts, one behind the other, into one block.

        Where a sector is not in the file yet, its whole grain is given.
        """
        length = sum(len(part) for part in parts)
        block, inside = divmod(at, self.block_bytes)
        entry = self._place(block)
        self._kernel.write(self._fd, parts, self._data(entry) + inside)
        self._mark(block, entry, inside, length)
        # A server writes past its cache: little is left for a flush.
        self._unstored += length
        if self._unstored >= STORE_BYTES:
            self._kernel.begin_sync(self._fd)
            self._unstored = 0

    def zero(self, at: int, end: int) -> None:
        """Make whole grains of one block zeros that are in this file."""
        block, inside = divmod(at, self.block_bytes)
        is_new = self._table[block] == layout.UNUSED
        entry = self._place(block)
        if not is_new:
            self._kernel.punch(
                self._fd, self._data(entry) + inside, end - at)
        self._mark(block, entry, inside, end - at)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def _data(self, entry: int) -> int:
        return entry * SECTOR + self._bitmap_bytes

    def _map(self, block: int) -> bytes:
        """Return a byte for each sector of a block that is in the file."""
        bits = self._maps.get(block)
        if bits is None:
            data = bytearray(self._bitmap_bytes)
            self.read(self._table[block] * SECTOR, memoryview(data))
            sectors = len(self._full)
            number = int.from_bytes(data, 'big') >> (len(data) * 8 - sectors)
            bits = self._keep(block, f'{number:0{sectors}b}'.encode())
        return bits

    def _keep(self, block: int, bits: bytes) -> bytes:
        if bits == self._full:
            bits = self._full
        if len(self._maps) >= MAPS and block not in self._maps:
            del self._maps[next(iter(self._maps))]
        self._maps[block] = bits
        return bits

    def _place(self, block: int) -> int:
        """Return where a block is, or will be once it is marked."""
        entry = self._table[block]
        if entry != layout.UNUSED:
            return entry
        # The footer that is there now stays in the gap before the bitmap:
        # it is never in the data, where some do not look at bitmaps.
        free = self._end + SECTOR + self._bitmap_bytes
        data = -(-free // PAGE_BYTES) * PAGE_BYTES
        end = data + self.block_bytes
        self._claim(end - self._end)
        self._kernel.write(self._fd, [self._footer], end)
        self._end = end
        return (data - self._bitmap_bytes) // SECTOR

    def _mark(self, block: int, entry: int, inside: int, length: int) -> None:
        """Say in the file that sectors of a block are in it."""
        low, high = inside // SECTOR, -(-(inside + length) // SECTOR)
        is_new = self._table[block] == layout.UNUSED
        old = self._none if is_new else self._map(block)
        if old is self._full or old.find(UNSET, low, high) < 0:
            return
        bits = self._full
        if high - low < len(bits):
            bits = old[:low] + self._full[low:high] + old[high:]
        packed = int(bits, 2).to_bytes(len(bits) // 8, 'big')
        self._kernel.write(self._fd, [packed], entry * SECTOR)
        if is_new:
            self._kernel.write(
                self._fd, [entry.to_bytes(4, 'big')],
                self.head.header.table_offset_bytes + block * 4,
            )
            self._table[block] = entry
            bisect.insort(self._used, block)
        self._keep(block, bits)


def table_of(file: Any, header: layout.Header, path: str) -> bytes:
    length = header.entries * 4
    data = layout.read_at(file, header.table_offset_bytes, length)
    if len(data) != length:
        raise errors.Invalid(
            f'{os.path.basename(path)} is refused: its vhd table is cut off')
    return data


def _used(table: bytes) -> Iterator[int]:
    """Yield which blocks a table has; what is empty is passed quickly."""
    empty = b'\xff' * SCANNED
    for at in range(0, len(table), SCANNED):
        piece = table[at:at + SCANNED]
        if piece != empty[:len(piece)]:
            for index, entry in enumerate(layout.table(piece), at // 4):
                if entry != layout.UNUSED:
                    yield index
