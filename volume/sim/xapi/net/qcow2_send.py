# SPDX-License-Identifier: Apache-2.0
"""A disk on its way out as qcow2: laid out before its first byte.

Header, the table of tables, the reference counts, the tables, and then the
clusters that hold data in the order of the disk. Version 3, clusters of
64 KiB. A delta has a backing file by name, which is its base; what became
zero since is there as zeros.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Iterable, Iterator

from volume.model import Extent
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.disks import PIECE_BYTES

BITS = 16
CLUSTER = 1 << BITS
ENTRIES = CLUSTER // 8  # of a table: 512 MiB of the disk
COUNTS = CLUSTER // 2  # in a cluster of 16-bit reference counts
COPIED = 1 << 63
HEADER = struct.Struct('>4sIQIIQIIQQIIQQQQII')
HEADER_BYTES = 104
BACKING_FORMAT = 0xE2792ACA
VERSION = 3


class Image:
    """A qcow2 file to be sent."""

    def __init__(
        self, disk: Disk, extents: Iterable[Extent], backing: str = ''
    ) -> None:
        """Lay it out; what is zero in ``extents`` is not sent.

        With ``backing`` the extents tell what has changed since then, and
        all of that is sent.
        """
        self._disk = disk
        self._backing = backing
        self._runs = [*_clusters(extents)]
        self._tables = [*_tables(self._runs)]
        data = sum(end - start for start, end in self._runs)
        self._l1_entries = -(-disk.size_bytes // (CLUSTER * ENTRIES))
        l1 = _clusters_of(self._l1_entries * 8)
        fixed = 1 + l1 + len(self._tables) + data
        blocks = index = 0
        while True:
            total = fixed + blocks + index
            wanted = -(-total // COUNTS)
            if (wanted, _clusters_of(wanted * 8)) == (blocks, index):
                break
            blocks, index = wanted, _clusters_of(wanted * 8)
        self._index, self._blocks = index, blocks
        self._total = total
        self._l1_at = 1
        self._index_at = 1 + l1
        self._blocks_at = self._index_at + index
        self._tables_at = self._blocks_at + blocks
        self._data_at = self._tables_at + len(self._tables)
        self.length_bytes = total * CLUSTER

    def chunks(self) -> Iterator[memoryview]:
        """Yield it from its first byte to its last."""
        yield memoryview(self._header())
        yield memoryview(self._l1())
        yield from self._reference_counts()
        yield from self._l2()
        yield from self._data()

    def _header(self) -> bytes:
        name = self._backing.encode()
        extensions = b''
        if name:
            extensions = struct.pack('>II', BACKING_FORMAT, 5) + b'qcow2\0\0\0'
        extensions += bytes(8)
        at = HEADER_BYTES + len(extensions) if name else 0
        data = HEADER.pack(
            b'QFI\xfb', VERSION, at, len(name), BITS, self._disk.size_bytes,
            0, self._l1_entries, self._l1_at * CLUSTER,
            self._index_at * CLUSTER, self._index, 0, 0, 0, 0, 0, 4,
            HEADER_BYTES,
        )
        return (data + extensions + name).ljust(CLUSTER, b'\0')

    def _l1(self) -> bytes:
        entries = array.array('Q', [0]) * self._l1_entries
        for index, table in enumerate(self._tables):
            entries[table] = COPIED | (self._tables_at + index) * CLUSTER
        return _whole(entries)

    def _reference_counts(self) -> Iterator[memoryview]:
        yield memoryview(_whole(array.array('Q', (
            (self._blocks_at + block) * CLUSTER
            for block in range(self._blocks)
        ))))
        for block in range(self._blocks):
            used = min(COUNTS, self._total - block * COUNTS)
            yield memoryview((b'\0\1' * used).ljust(CLUSTER, b'\0'))

    def _l2(self) -> Iterator[memoryview]:
        at, runs = self._data_at, iter(self._runs)
        start, end = next(runs, (0, 0))
        for table in self._tables:
            entries = array.array('Q', [0]) * ENTRIES
            low, high = table * ENTRIES, (table + 1) * ENTRIES
            while low <= start < end and start < high:
                stop = min(end, high)
                for cluster in range(start, stop):
                    entries[cluster - low] = COPIED | at * CLUSTER
                    at += 1
                start = stop
                if start == end:
                    start, end = next(runs, (0, 0))
            yield memoryview(_whole(entries))

    def _data(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(PIECE_BYTES))
        size = self._disk.size_bytes
        for first, last in self._runs:
            end = last * CLUSTER
            for at in range(first * CLUSTER, end, PIECE_BYTES):
                piece = buffer[:min(PIECE_BYTES, end - at)]
                inside = min(len(piece), size - at)
                self._disk.pread_into(piece[:inside], at)
                piece[inside:] = bytes(len(piece) - inside)
                yield piece


def _clusters(extents: Iterable[Extent]) -> Iterator[tuple[int, int]]:
    """Yield runs of clusters with data, joined."""
    start = end = 0
    for extent in extents:
        if extent.is_zero or not extent.length_bytes:
            continue
        low = extent.offset_bytes // CLUSTER
        high = -(-(extent.offset_bytes + extent.length_bytes) // CLUSTER)
        if low > end or end == start:
            if end > start:
                yield start, end
            start = low
        end = max(end, high)
    if end > start:
        yield start, end


def _tables(runs: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Yield which tables of the disk there must be."""
    free = 0
    for start, end in runs:
        last = (end - 1) // ENTRIES
        yield from range(max(free, start // ENTRIES), last + 1)
        free = last + 1


def _clusters_of(length_bytes: int) -> int:
    return -(-length_bytes // CLUSTER)


def _whole(entries: array.array[int]) -> bytes:
    if sys.byteorder == 'little':
        entries.byteswap()
    data = entries.tobytes()
    return data.ljust(_clusters_of(len(data)) * CLUSTER, b'\0')
