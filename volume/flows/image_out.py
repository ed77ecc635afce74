# SPDX-License-Identifier: Apache-2.0
"""Bytes out of a volume, into an image."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from volume import errors
from volume import ids
from volume.drivers import base
from volume.flows.way import fd_path
from volume.flows.way import opener
from volume.flows.way import readable_node
from volume.flows.way import scratch
from volume.flows.way import Stored
from volume.flows.way import Way
from volume.node import File
from volume.node import Node
from volume.transfer import convert
from volume.transfer import copy
from volume.transfer import formats
from volume.transfer import vhd_write
from volume.transfer.base import Opened
from volume.transfer.base import Source

STORE_BYTES = 16 << 20  # stored together while the next are written


class Uploaded(TypedDict):
    """An image that was made: how large its file is, and its digest."""

    size_bytes: int
    sha256: str


def upload(
    driver: base.Driver,
    source: Stored,
    target: Source,
    url: str,
    *,
    format: str,
    spool_directory: str,
    token: str,
    node: Node,
    watch: copy.Watch | None = None,
    rate_bytes_per_s: int | None = None,
) -> Uploaded:
    """Make an image of a volume or snapshot.

    An image that is there already is the same upload, made by an earlier
    try, if its disk has the same bytes.

    :raises Conflict: another image is there
    :raises Invalid: the format cannot hold it
    """
    formats.check_name(format)
    way = Way(node, token, spool_directory, watch, rate_bytes_per_s)
    try:
        with target.put(url) as image:
            if format == 'raw':
                return _upload_raw(driver, source, image, way)
            if format == 'vhd' and opener(driver, node) is not node:
                return _upload_vhd(driver, source, image, way)
            return _upload_as(driver, source, image, format, url, way)
    except errors.Conflict:
        made = _uploaded_before(driver, source, target, url, format, way)
        if made is None:
            raise
        return made


def _upload_raw(
    driver: base.Driver, source: Stored, image: Opened, way: Way
) -> Uploaded:
    size_bytes = source.size_bytes
    # What is skipped in a new file is a hole; elsewhere zeros are sent.
    sent = _target(image)
    with driver.reader(source) as reader:
        digest = copy.copy(
            reader, sent, size_bytes, extents=reader.extents(),
            zero=sent.zero if isinstance(sent, _Sent) else None,
            algorithm='sha256', rate_bytes_per_s=way.rate_bytes_per_s,
            watch=way.watch,
        )
    if image.seekable():
        image.truncate(size_bytes)
    return Uploaded(size_bytes=size_bytes, sha256=digest)


def _upload_vhd(
    driver: base.Driver, source: Stored, image: Opened, way: Way
) -> Uploaded:
    """Make it while it is read: what is empty is not even looked at."""
    sent = _target(image)
    with driver.reader(source) as reader:
        made = vhd_write.Dynamic(
            source.size_bytes, reader.extents(), uuid=ids.new())
        digest = copy.copy(
            _Chunks(made.chunks(reader), reader), sent, made.length_bytes,
            zero=sent.zero if isinstance(sent, _Sent) else None,
            algorithm='sha256', rate_bytes_per_s=way.rate_bytes_per_s,
            watch=way.watch,
        )
    if image.seekable():
        image.truncate(made.length_bytes)
    return Uploaded(size_bytes=made.length_bytes, sha256=digest)


def _upload_as(
    driver: base.Driver,
    source: Stored,
    image: Opened,
    image_format: str,
    url: str,
    way: Way,
) -> Uploaded:
    """Convert, in place if the target is a file, else by way of one."""
    with contextlib.ExitStack() as stack:
        file: Opened = image
        if not image.seekable():
            file = stack.enter_context(scratch(way, '.upload'))
        with _readable(driver, source, way) as disk:
            convert.write_image(
                way.node, disk, fd_path(file), image_format,
                source.size_bytes, watch=way.watch,
                rate_bytes_per_s=way.rate_bytes_per_s,
            )
        if image_format == 'vmdk':
            formats.name_vmdk_extent(file, posixpath.basename(url))
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file is image:
            digest = copy.digest_of(file, size_bytes, 'sha256')
        else:
            sent = _Sent(image)
            digest = copy.copy(
                file, sent, size_bytes, zero=sent.zero, algorithm='sha256',
                rate_bytes_per_s=way.rate_bytes_per_s,
            )
    return Uploaded(size_bytes=size_bytes, sha256=digest)


def _uploaded_before(
    driver: base.Driver,
    source: Stored,
    target: Source,
    url: str,
    image_format: str,
    way: Way,
) -> Uploaded | None:
    """Return what is there, if its disk has the bytes that it must have."""
    try:
        stat = target.stat(url)
        if stat.path is None:
            return None
        with target.open(stat) as image:
            info = formats.inspect(image, image_format)
            if info.virtual_size_bytes != source.size_bytes:
                return None
            theirs = convert.image_node(fd_path(image), image_format)
            with _readable(driver, source, way) as disk:
                ours = {
                    'driver': 'raw', 'size': source.size_bytes, 'file': disk
                }
                if not convert.compare(
                    way.node, theirs, ours, source.size_bytes
                ):
                    return None
            size_bytes = stat.size_bytes or 0
            digest = copy.digest_of(
                image, size_bytes, 'sha256', way.watch
            )
            return Uploaded(size_bytes=size_bytes, sha256=digest)
    except (errors.Invalid, errors.NotFound):
        return None


@contextlib.contextmanager
def _readable(
    driver: base.Driver, source: Stored, way: Way
) -> Iterator[Mapping[str, Any]]:
    """Return how qemu-img reads a volume, by a raw copy if it must."""
    if opener(driver, way.node) is way.node:
        with readable_node(driver, source, way.node) as disk:
            yield disk
        return
    with scratch(way, '.raw') as raw:
        with driver.reader(source) as reader:
            copy.copy(
                reader, raw, source.size_bytes, extents=reader.extents(),
                rate_bytes_per_s=way.rate_bytes_per_s, watch=way.watch,
            )
        raw.truncate(source.size_bytes)
        yield convert.image_node(fd_path(raw), 'raw')


def _target(image: Opened) -> _Stored | _Sent:
    if isinstance(image, File):
        return _Stored(image)
    return _Sent(image)


class _Chunks(io.RawIOBase):
    """What is made in chunks, to be read once and forward."""

    def __init__(
        self, chunks: Iterator[memoryview], reader: base.Reader
    ) -> None:
        self._chunks = chunks
        self._reader = reader
        self._left = memoryview(b'')

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast('B')
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = chunk
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def abort(self) -> None:
        """Stop a read that is waiting, from another thread."""
        abort = getattr(self._reader, 'abort', None)
        if abort is not None:
            abort()


class _Stored:
    """A new file, which goes to the disk while it is being written."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._written = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def write(self, data: Any, /) -> int:
        count = self._file.write(data)
        before, self._written = self._written, self._written + count
        if before // STORE_BYTES != self._written // STORE_BYTES:
            self._file.begin_sync()
        return count


class _Sent:
    """A target that only goes forward, and gets every zero."""

    def __init__(self, target: Opened) -> None:
        self._target = target
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        assert offset == self._at, 'a stream has no way back'
        return offset

    def write(self, data: Any, /) -> int:
        count = self._target.write(data) or 0
        self._at += count
        return count

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        end = self.seek(offset_bytes) + length_bytes
        while self._at < end:
            self.write(copy.ZEROS[:end - self._at])
