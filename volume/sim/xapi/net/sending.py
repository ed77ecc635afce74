# SPDX-License-Identifier: Apache-2.0
"""A VDI on its way out: raw, VHD, tar, and what goes into each.

A stream is made of views that are used before the next is asked for. Bytes
are read in large pieces, and runs that were never written are not read.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator

from volume.model import Extent
from volume.model import MIB
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.disks import PIECE_BYTES
from volume.sim.xapi.failure import Failure
from volume.transfer import vhd_layout
from volume.transfer import vhd_write

TAR_BLOCK_BYTES = MIB


class Source:
    """A disk as the writer of VHDs wants it."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._at = 0

    def seek(self, offset: int, whence: int = 0, /) -> int:
        assert whence == 0
        self._at = offset
        return offset

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(len(buffer), self._disk.size_bytes - self._at)
        self._disk.pread_into(buffer[:count], self._at)
        self._at += count
        return count


def raw(disk: Disk) -> Iterator[memoryview]:
    """Yield every byte of a disk."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    for extent in disk.extents():
        for at, length in pieces(extent, PIECE_BYTES):
            if extent.is_zero:
                yield _ZEROS[:length]
            else:
                disk.pread_into(buffer[:length], at)
                yield buffer[:length]


def vhd(disk: Disk, uuid: str, vdi: str) -> vhd_write.Image:
    """Return a whole disk as a VHD.

    :raises Failure: VDI_TOO_LARGE
    """
    _assert_fits(disk, vdi)
    return vhd_write.Dynamic(disk.size_bytes, disk.extents(), uuid=uuid)


def vhd_delta(
    disk: Disk, changed: Iterable[Extent], uuid: str, base: str, vdi: str
) -> vhd_write.Image:
    """Return what has changed since ``base`` as a VHD whose parent it is.

    Its parent is named by the uuid of the VDI [I], and its time is zero, as
    a server writes it.

    :raises Failure: VDI_TOO_LARGE
    """
    _assert_fits(disk, vdi)
    parent = vhd_write.Parent(base, path=f'{base}.vhd')
    return vhd_write.Differencing(
        disk.size_bytes, changed, parent, uuid=uuid)


def tar(disk: Disk) -> Iterator[memoryview]:
    """Yield a disk as a tar of its blocks, each followed by its SHA-1.

    Blocks of zeros are left out, but for the first and the last: so the
    size of the disk can be told.
    """
    buffer = memoryview(bytearray(TAR_BLOCK_BYTES))
    last = (disk.size_bytes - 1) // TAR_BLOCK_BYTES
    for index in _blocks(disk, last):
        at = index * TAR_BLOCK_BYTES
        data = buffer[:min(TAR_BLOCK_BYTES, disk.size_bytes - at)]
        disk.pread_into(data, at)
        if index in (0, last) or data != _ZEROS[:len(data)]:
            yield from _member(f'{index:08d}', data)
            digest = hashlib.sha1(data).hexdigest().encode()
            yield from _member(f'{index:08d}.checksum', memoryview(digest))
    yield _ZEROS[:2 * tarfile.BLOCKSIZE]


def pieces(extent: Extent, size: int) -> Iterator[tuple[int, int]]:
    """Yield a run as pieces that do not cross borders of that size."""
    at = extent.offset_bytes
    end = at + extent.length_bytes
    while at < end:
        length = min(end - at, size - at % size)
        yield at, length
        at += length


def _blocks(disk: Disk, last: int) -> Iterator[int]:
    """Yield the blocks that may hold data, the first and the last."""
    free = 0
    for extent in disk.extents():
        if extent.is_zero:
            continue
        end = extent.offset_bytes + extent.length_bytes - 1
        for index in range(
            max(free, extent.offset_bytes // TAR_BLOCK_BYTES),
            end // TAR_BLOCK_BYTES + 1,
        ):
            if free == 0 and index > 0:
                yield 0
            yield index
            free = index + 1
    if free == 0:
        yield 0
        free = 1
    if free <= last:
        yield last


def _member(name: str, data: memoryview) -> Iterator[memoryview]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    yield memoryview(info.tobuf(tarfile.USTAR_FORMAT))
    yield data
    if len(data) % tarfile.BLOCKSIZE:
        yield _ZEROS[:-len(data) % tarfile.BLOCKSIZE]


def _assert_fits(disk: Disk, vdi: str) -> None:
    if disk.size_bytes > vhd_layout.DISK_BYTES_MAX:
        raise Failure(
            'VDI_TOO_LARGE', vdi, str(vhd_layout.DISK_BYTES_MAX))


_ZEROS = memoryview(bytes(PIECE_BYTES))
