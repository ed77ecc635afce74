# SPDX-License-Identifier: Apache-2.0
"""A VDI on its way in: raw, in chunks, VHD, tar, qcow2.

All but qcow2 are read forward once and written as they come. What of a
stream is not there is left as it is on a disk that is known to be new, and
made zero where the storage hands out old bytes; a delta leaves it always.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from volume import errors
from volume.model import Extent
from volume.model import MIB
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.disks import PIECE_BYTES
from volume.sim.xapi.net import sending
from volume.transfer import vhd_layout
from volume.transfer import vhd_stream

# Of their own framing: where, how much; a length of zero ends it.
CHUNK = struct.Struct('<QI')
CHUNK_BYTES_MAX = 64 * MIB
HEAD_BYTES_MAX = 64 * MIB
# What makes a qcow2 dangerous: backing file, cipher, features.
QCOW2 = struct.Struct('>4sIQ16xI36xQ')
QCOW2_DIRTY = 1


class Incoming(Protocol):
    """What comes over the wire, until it ends or was cut off."""

    def readinto(self, buffer: Any, /) -> int | None: ...


def raw(disk: Disk, source: Incoming, length: int) -> None:
    """Write so many bytes from the start of a disk.

    :raises Invalid: they came short, or are more than there is room for
    """
    buffer = memoryview(bytearray(PIECE_BYTES))
    at = 0
    while at < length:
        piece = buffer[:min(PIECE_BYTES, length - at)]
        _fill(source, piece)
        disk.pwrite(at, piece[:disk.size_bytes - at])
        at += len(piece)
        if at > disk.size_bytes:
            raise errors.Invalid(
                f'{length} bytes do not fit into {disk.size_bytes}')


def chunked(disk: Disk, source: Incoming) -> None:
    """Write chunks where each says that it belongs.

    :raises Invalid: the stream is cut off or leaves the disk
    """
    head = bytearray(CHUNK.size)
    while True:
        _fill(source, memoryview(head))
        offset, length = CHUNK.unpack(head)
        if not length:
            return
        if length > CHUNK_BYTES_MAX:
            raise errors.Invalid(f'a chunk of {length} bytes is too long')
        data = memoryview(bytearray(length))
        _fill(source, data)
        disk.pwrite(offset, data)


def vhd(
    disk: Disk, source: Incoming, length: int, is_dirty: bool
) -> None:
    """Write what is in a VHD, its blocks in any order.

    A differencing one is laid over what is there, whatever its parent.

    :raises Invalid: it is damaged, cut off, or larger than the disk
    """
    head = _Head(source)
    # Of a delta every parent is right: nobody here knows their uuids.
    image = _Every(
        head, length_bytes=length, parent_uuid=head.parent, name='the image')
    if image.size_bytes > disk.size_bytes:
        raise errors.Invalid(
            f'a disk of {image.size_bytes} bytes does not fit into '
            f'{disk.size_bytes}'
        )
    at = 0
    written: list[tuple[int, int]] = []
    for offset, data in image.runs():
        disk.pwrite(offset, data)
        if is_dirty and head.parent is None:
            written.append((offset, offset + len(data)))
    if head.parent is None and image.facts and not image.facts.header:
        # A fixed one: its reader leaves out a first sector of zeros.
        if not any(head.first):
            disk.zero(0, min(len(head.first), image.size_bytes))
    elif is_dirty and head.parent is None:
        for start, end in sorted(written):
            disk.zero(at, start - at)
            at = end
        disk.zero(at, image.size_bytes - at)


def tar(disk: Disk, source: Incoming, is_dirty: bool) -> None:
    """Write the blocks of a tar, and check each against its SHA-1.

    :raises Invalid: it is damaged, cut off, or larger than the disk
    """
    at, digest = 0, ''
    try:
        file = io.BufferedReader(_Raw(source), PIECE_BYTES)
        with tarfile.open(fileobj=file, mode='r|') as archive:
            for member in archive:
                stem, _, kind = member.name.rpartition('/')[2].partition('.')
                body = archive.extractfile(member)
                if body is None or member.size > sending.TAR_BLOCK_BYTES:
                    raise errors.Invalid(f'{member.name!r} is no block')
                data = body.read()
                if kind:
                    if kind == 'checksum' and data.decode() != digest:
                        raise errors.Invalid(f'block {stem} is damaged')
                    continue
                offset = int(stem) * sending.TAR_BLOCK_BYTES
                if is_dirty and offset > at:
                    disk.zero(at, offset - at)
                disk.pwrite(offset, data)
                at = offset + len(data)
                digest = hashlib.sha1(data).hexdigest()
    except (tarfile.TarError, ValueError, OSError) as failed:
        raise errors.Invalid(f'the tar is damaged: {failed}') from failed


def qcow2(
    disk: Disk,
    source: Incoming,
    length: int,
    is_dirty: bool,
    directory: str,
    spool: Callable[[str], Disk],
) -> None:
    """Write what is in a qcow2, which is first stored as a whole.

    :raises Invalid: it is damaged, cut off, or larger than the disk
    """
    with tempfile.NamedTemporaryFile(dir=directory, suffix='.qcow2') as file:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for at in range(0, length, PIECE_BYTES):
            piece = buffer[:min(PIECE_BYTES, length - at)]
            _fill(source, piece)
            file.write(piece)
        file.flush()
        _check_qcow2(file.name)
        with spool(file.name) as image:
            if image.size_bytes > disk.size_bytes:
                raise errors.Invalid(
                    f'a disk of {image.size_bytes} bytes does not fit into '
                    f'{disk.size_bytes}'
                )
            copy(image, disk, image.extents(), is_dirty)


def copy(
    source: Disk,
    target: Disk,
    extents: Iterator[Extent],
    is_dirty: bool,
    told: Callable[[int], None] = lambda count: None,
) -> None:
    """Copy runs; zeros are written only if the target may hold other bytes.

    ``told`` is told of each piece's length as it is done, and may raise.
    """
    buffer = bytearray(PIECE_BYTES)
    for extent in extents:
        if extent.is_zero:
            if is_dirty:
                target.zero(extent.offset_bytes, extent.length_bytes)
            told(extent.length_bytes)
            continue
        for at, length in sending.pieces(extent, PIECE_BYTES):
            view = memoryview(buffer)[:length]
            source.pread_into(view, at)
            if not buffer.startswith(_ZEROS[:length]):
                target.pwrite(at, view)
            elif is_dirty:
                target.zero(at, length)
            told(length)


def _check_qcow2(path: str) -> None:
    """Refuse an image that leads to other files, before anyone opens it.

    :raises Invalid: it does, or it is none
    """
    with open(path, 'rb') as file:
        head = file.read(QCOW2.size)
    if len(head) < QCOW2.size:
        raise errors.Invalid('the image is no qcow2')
    magic, version, backing_at, crypt, features = QCOW2.unpack(head)
    if magic != b'QFI\xfb' or version not in (2, 3):
        raise errors.Invalid('the image is no qcow2')
    if backing_at or crypt or (version == 3 and features & ~QCOW2_DIRTY):
        raise errors.Invalid(
            'the qcow2 needs another file, a key or what is not known here')


class _Every(vhd_stream.Stream):
    """A stream of which zeros that were sent are written, too."""

    def _data(
        self, at: int, start: int, end: int
    ) -> Iterator[tuple[int, memoryview]]:
        yield at + start, memoryview(self._buffer)[start:end]


class _Head(io.RawIOBase):
    """The head of a VHD, looked at before it is read again."""

    def __init__(self, source: Incoming) -> None:
        super().__init__()
        self._source = source
        self._read = bytearray()
        self._at = 0
        self.parent: str | None = None
        self.first = bytes(self._take(vhd_layout.FOOTER_BYTES))
        if not self.first.startswith(vhd_layout.COOKIE):
            return
        footer = vhd_layout.Footer.parse(self.first, 'the image')
        if footer.kind != vhd_layout.DIFFERENCING:
            return
        start = footer.header_offset_bytes
        if start > HEAD_BYTES_MAX:
            raise errors.Invalid('its header is far from its start')
        data = self._take(start + vhd_layout.HEADER_BYTES)[start:]
        header = vhd_layout.Header.parse(
            bytes(data), footer.size_bytes, 'the image')
        self.parent = header.parent_uuid

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        left = memoryview(self._read)[self._at:]
        if not left:
            return self._source.readinto(buffer) or 0
        count = min(len(left), len(buffer))
        buffer[:count] = left[:count]
        self._at += count
        return count

    def _take(self, end: int) -> bytearray:
        """Return the first bytes, up to an end."""
        piece = memoryview(bytearray(max(0, end - len(self._read))))
        _fill(self._source, piece)
        self._read += piece
        return self._read[:end]


class _Raw(io.RawIOBase):
    def __init__(self, source: Incoming) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._source.readinto(buffer) or 0


def _fill(source: Incoming, view: memoryview) -> None:
    have = 0
    while have < len(view):
        count = source.readinto(view[have:])
        if not count:
            raise errors.Invalid('the stream was cut off')
        have += count


_ZEROS = bytes(PIECE_BYTES)
