# SPDX-License-Identifier: Apache-2.0
"""How a VHD is laid out: every field, where it stands, what it may be.

A fixed VHD is the disk's bytes and a footer. The others are: a copy of the
footer, a header, a table that says where each block of the disk lies, the
blocks, and the footer. A block is a bitmap, one bit a sector, and the
sectors. A sector whose bit is not set was never written: it is zero, or the
parent's in a differencing VHD, whatever the file holds in its place.

The inspector, the readers and the writer all take their fields from here.
Nothing is believed: each number is checked where it is read. How large the
disk is, is said by the footer's current size and never by its cylinders.
"""

from __future__ import annotations

import array
import dataclasses
import heapq
import os
import struct
import sys
import uuid as uuids
from collections.abc import Iterator
from typing import Self

from volume import errors
from volume.model import GIB
from volume.model import MIB
from volume.model import SECTOR_BYTES as SECTOR
from volume.transfer.base import Opened

COOKIE = b'conectix'
HEADER_COOKIE = b'cxsparse'
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
KINDS = (FIXED, DYNAMIC, DIFFERENCING)
VERSION = 0x00010000
FEATURES = 2  # a bit that is always set
UNUSED = 0xFFFFFFFF
NOWHERE = (1 << 64) - 1
NO_PARENT = str(uuids.UUID(int=0))
# Who wrote it: one of the few names for which QEMU believes the current
# size. For any other it reckons the size from the cylinders.
CREATOR, CREATOR_VERSION, CREATOR_HOST = b'qem2', 0x00050003, b'Wi2k'

FOOTER_BYTES = SECTOR
HEADER_BYTES = 1024
BLOCK_BYTES = 2 * MIB
DISK_BYTES_MAX = 2040 * GIB
TABLE_ENTRIES_MAX = 1 << 22  # 2 TiB in blocks of 512 KiB
LOCATORS = 8
NAME_BYTES = 512
MAC_URL = b'MacX'  # the platform code of a parent's file:// URL
SORTED = 1 << 16  # blocks that are put in order at a time

FOOTER = struct.Struct('>8sIIQI4sI4sQQHBBII16sB')
HEADER = struct.Struct('>8sQQIIII16sII512s')
LOCATOR = struct.Struct('>4sIIIQ')
FOOTER_SUM_AT, HEADER_SUM_AT, LOCATORS_AT = 64, 36, 576


@dataclasses.dataclass(frozen=True, slots=True)
class Footer:
    """What stands at the end, and in the others at the start as well."""

    kind: int
    size_bytes: int
    uuid: str
    timestamp: int = 0  # seconds since 2000
    header_offset_bytes: int = NOWHERE

    @classmethod
    def parse(cls, data: bytes, name: str) -> Self:
        """Read it.

        :raises Invalid: it is damaged, or not of a kind that is known
        """
        if len(data) != FOOTER_BYTES or not data.startswith(COOKIE):
            raise _refused(name, 'has no footer, as if it were cut off')
        if checksum(data, FOOTER_SUM_AT) != sum_in(data, FOOTER_SUM_AT):
            raise errors.Invalid(
                f'{name} is refused: the checksum of its vhd header is wrong'
            )
        (
            _, _, version, header_at, timestamp, _, _, _, _, size_bytes,
            _, _, _, kind, _, uuid, _,
        ) = FOOTER.unpack_from(data)
        if version >> 16 != VERSION >> 16:
            raise _refused(name, f'has version {version:#x}, not 1.0')
        if kind not in KINDS:
            raise errors.Invalid(
                f'{name} is refused: vhd type {kind} is not supported'
            )
        return cls(
            kind, size_bytes, str(uuids.UUID(bytes=uuid)), timestamp,
            header_at,
        )

    def pack(self) -> bytes:
        """Return its 512 bytes."""
        data = bytearray(FOOTER_BYTES)
        FOOTER.pack_into(
            data, 0, COOKIE, FEATURES, VERSION, self.header_offset_bytes,
            self.timestamp, CREATOR, CREATOR_VERSION, CREATOR_HOST,
            self.size_bytes, self.size_bytes, *geometry(self.size_bytes),
            self.kind, 0, uuids.UUID(self.uuid).bytes, 0,
        )
        return _summed(data, FOOTER_SUM_AT)


@dataclasses.dataclass(frozen=True, slots=True)
class Locator:
    """Where in the file a parent's path is written; a hint, not followed."""

    platform: bytes
    space_bytes: int
    length_bytes: int
    offset_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What a dynamic or differencing VHD has beside its footer."""

    table_offset_bytes: int
    entries: int
    block_bytes: int
    parent_uuid: str = NO_PARENT
    parent_timestamp: int = 0
    parent_name: str = ''
    locators: tuple[Locator, ...] = ()

    @property
    def bitmap_bytes(self) -> int:
        """The length of the bitmap before each block's sectors."""
        return bitmap_bytes(self.block_bytes)

    @property
    def table_bytes(self) -> int:
        """The length of the table in whole sectors."""
        return -(-self.entries * 4 // SECTOR) * SECTOR

    @classmethod
    def parse(cls, data: bytes, size_bytes: int, name: str) -> Self:
        """Read the header of a disk of a size.

        :raises Invalid: it is damaged, or does not fit the disk
        """
        if len(data) < HEADER_BYTES or not data.startswith(HEADER_COOKIE):
            raise _refused(name, 'table is missing')
        if checksum(data, HEADER_SUM_AT) != sum_in(data, HEADER_SUM_AT):
            raise _refused(name, 'table has a header whose checksum is wrong')
        (
            _, _, table_at, version, entries, block_bytes, _, uuid,
            timestamp, _, parent_name,
        ) = HEADER.unpack_from(data)
        if version >> 16 != VERSION >> 16:
            raise _refused(name, f'table has version {version:#x}, not 1.0')
        if block_bytes < SECTOR or block_bytes & (block_bytes - 1):
            raise _refused(name, f'table has blocks of {block_bytes} bytes')
        if entries * block_bytes < size_bytes:
            raise _refused(name, 'table is smaller than its disk')
        if entries > TABLE_ENTRIES_MAX:
            raise _refused(name, f'table has {entries} entries')
        locators = []
        for index in range(LOCATORS):
            platform, space, length, _, at = LOCATOR.unpack_from(
                data, LOCATORS_AT + index * LOCATOR.size)
            if platform != bytes(4):
                # In sectors by the book, in bytes by most writers.
                space *= SECTOR if space < SECTOR else 1
                locators.append(Locator(platform, space, length, at))
        return cls(
            table_at, entries, block_bytes, str(uuids.UUID(bytes=uuid)),
            timestamp, decode(parent_name, 'utf-16-be'), tuple(locators),
        )

    def pack(self) -> bytes:
        """Return its 1024 bytes."""
        data = bytearray(HEADER_BYTES)
        HEADER.pack_into(
            data, 0, HEADER_COOKIE, NOWHERE, self.table_offset_bytes, VERSION,
            self.entries, self.block_bytes, 0,
            uuids.UUID(self.parent_uuid).bytes, self.parent_timestamp, 0,
            encode(self.parent_name, 'utf-16-be', NAME_BYTES),
        )
        for index, locator in enumerate(self.locators):
            LOCATOR.pack_into(
                data, LOCATORS_AT + index * LOCATOR.size, locator.platform,
                locator.space_bytes // SECTOR, locator.length_bytes, 0,
                locator.offset_bytes,
            )
        return _summed(data, HEADER_SUM_AT)


def check_size(size_bytes: int, name: str) -> None:
    """Refuse a disk that no VHD can hold.

    :raises Invalid: it is empty, too large, or not whole sectors
    """
    if not 0 < size_bytes <= DISK_BYTES_MAX or size_bytes % SECTOR:
        raise _refused(
            name, f'says that its disk has {size_bytes} bytes, which no disk '
            f'has in a vhd; it is 1 to {DISK_BYTES_MAX // SECTOR} sectors of '
            f'{SECTOR} bytes'
        )


def check_twins(first: Footer, last: Footer, name: str) -> None:
    """Refuse a file whose footer says other than the copy at its start.

    :raises Invalid: they differ in what matters
    """
    # Their times may differ: one of them may be written later.
    if dataclasses.replace(first, timestamp=last.timestamp) != last:
        raise errors.Invalid(
            f'{name} is refused: its vhd footer is missing or differs from '
            'its header, as if it were cut off'
        )


def table(data: bytes | bytearray) -> array.array[int]:
    """Return the entries of a table, or of a piece of one."""
    entries = array.array('I')
    entries.frombytes(data)
    if sys.byteorder == 'little':
        entries.byteswap()
    return entries


def pack_table(entries: array.array[int]) -> bytes:
    """Return the bytes of a table."""
    swapped = array.array('I', entries)
    if sys.byteorder == 'little':
        swapped.byteswap()
    return swapped.tobytes()


def placed(
    entries: array.array[int],
    footer: Footer,
    header: Header,
    end_bytes: int | None,
    name: str,
) -> Iterator[tuple[int, int]]:
    """Yield where each block lies, and which it is, in the file's order.

    ``end_bytes`` is where the last footer begins, if that is known. What the
    table has beyond the disk's end is not looked at.

    :raises Invalid: blocks lie over each other, over the table or the
        header, or beyond the end
    """
    taken = sorted((
        (0, FOOTER_BYTES),
        (footer.header_offset_bytes,
         footer.header_offset_bytes + HEADER_BYTES),
        (header.table_offset_bytes,
         header.table_offset_bytes + header.entries * 4),
    ))
    before = 0
    for start, end in taken:
        if start < before:
            raise _refused(name, 'table and header lie over each other')
        before = end
    if end_bytes is not None and before > end_bytes:
        raise _refused(name, 'table is cut off')
    free, last = 0, -1
    for entry, block in _in_order(entries, footer, header):
        at = entry * SECTOR
        if at < free:
            raise _refused(
                name, f'table has blocks {last} and {block} over each other')
        free = at + header.bitmap_bytes + block_length(footer, header, block)
        last = block
        if at < before and any(
            at < end and start < free for start, end in taken
        ):
            raise _refused(
                name, f'table has block {block} over itself or the header')
        if end_bytes is not None and free > end_bytes:
            raise _refused(
                name, 'table points beyond its end, as if it were cut off')
        yield at, block


def block_length(footer: Footer, header: Header, block: int) -> int:
    """Return how much of the disk is in a block; the last may be short."""
    return min(
        header.block_bytes, footer.size_bytes - block * header.block_bytes)


def bitmap_bytes(block_bytes: int) -> int:
    """Return the length of a block's bitmap: whole sectors."""
    return -(-block_bytes // SECTOR // 8 // SECTOR) * SECTOR


def geometry(size_bytes: int) -> tuple[int, int, int]:
    """Return the cylinders, heads and sectors that the format prescribes.

    Their product is less than the disk, or more: nobody may use it.
    """
    sectors = min(size_bytes // SECTOR, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    tracks, heads = sectors // 17, max(4, -(-(sectors // 17) // 1024))
    if tracks < heads * 1024 and heads <= 16:
        return tracks // heads, heads, 17
    tracks = sectors // 31
    if tracks < 16 * 1024:
        return tracks // 16, 16, 31
    return sectors // 63 // 16, 16, 63


def checksum(data: bytes | bytearray, at: int) -> int:
    """Return what a structure adds up to, without its sum at ``at``."""
    return ~(sum(data) - sum(data[at:at + 4])) & 0xFFFFFFFF


def sum_in(data: bytes | bytearray, at: int) -> int:
    """Return the sum that a structure says it adds up to."""
    return int.from_bytes(data[at:at + 4], 'big')


def decode(data: bytes, encoding: str) -> str:
    """Return a path as it was written, as far as it can be shown."""
    text = data[:len(data) // 2 * 2].decode(encoding, 'replace')
    return text.split('\0')[0]


def encode(text: str, encoding: str, room_bytes: int) -> bytes:
    """Return a path as it is written, or none if it does not fit."""
    data = text.encode(encoding, 'replace')
    return data if len(data) < room_bytes else b''


def read_at(file: Opened, offset: int, length: int) -> bytes:
    """Read as much of a run as there is, wherever a header has put it."""
    if offset >= file.seek(0, os.SEEK_END):
        return b''
    file.seek(offset)
    pieces = []
    while length > 0 and (piece := file.read(length)):
        pieces.append(piece)
        length -= len(piece)
    return b''.join(pieces)


def _in_order(
    entries: array.array[int], footer: Footer, header: Header
) -> Iterator[tuple[int, int]]:
    """Yield entry and block by entry, in little memory."""
    used = -(-footer.size_bytes // header.block_bytes)
    parts = []
    for start in range(0, used, SORTED):
        pairs = [
            entry << 32 | block for block, entry
            in enumerate(entries[start:min(start + SORTED, used)], start)
            if entry != UNUSED
        ]
        if pairs:
            parts.append(array.array('Q', sorted(pairs)))
    for pair in heapq.merge(*parts):
        yield pair >> 32, pair & 0xFFFFFFFF


def _summed(data: bytearray, at: int) -> bytes:
    data[at:at + 4] = checksum(data, at).to_bytes(4, 'big')
    return bytes(data)


def _refused(name: str, why: str) -> errors.Invalid:
    return errors.Invalid(f'{name} is refused: its vhd {why}')
