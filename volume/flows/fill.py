# SPDX-License-Identifier: Apache-2.0
"""Bytes into a volume, from an image or from another volume.

Free functions that know drivers and sources, and nothing of jobs. Each may
be called again after a crash: unless the caller knows that the volume is
``fresh``, what it holds is taken for a predecessor's leavings and made zero
wherever the image has zeros. Nothing is filled before ``commit``: whoever
gets an error has a volume to fill again or to delete.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from volume import errors
from volume import model
from volume import progress
from volume import sizes
from volume.drivers import base
from volume.flows.image_out import upload as upload
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
from volume.transfer import vhd
from volume.transfer.base import ImageStat
from volume.transfer.base import Opened
from volume.transfer.base import Source
from volume.transfer.dial import masked


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of an image before a byte of it is stored."""

    stat: ImageStat
    format: str
    virtual_size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Filled:
    """What a volume was filled with."""

    format: str
    virtual_size_bytes: int
    image_size_bytes: int
    version: str


def describe_image(
    source: Source, url: str, declared_format: str | None
) -> ImageFacts:
    """Say how large the image and the disk in it are.

    Only its first and last bytes are read.

    :raises Invalid: the image is refused, and why
    """
    formats.check_name(declared_format)
    stat = source.stat(url)
    name = f'image {masked(url)}'
    if stat.size_bytes is None:
        raise errors.Invalid(
            f'the server of {name} does not say how large it is; put it on '
            'one that does'
        )
    if stat.path is not None:
        with source.open(stat) as image:
            info = formats.inspect(image, declared_format, name)
        return ImageFacts(stat, info.format, info.virtual_size_bytes)
    head = _read(source, stat, 0, formats.HEAD_BYTES)
    tail = None
    if len(head) == stat.size_bytes:
        tail = head[-formats.TAIL_BYTES:]
    elif stat.can_resume:
        start = stat.size_bytes - formats.TAIL_BYTES
        tail = _read(source, stat, max(start, 0), formats.TAIL_BYTES)
    info = formats.inspect_parts(
        head, tail, stat.size_bytes, declared_format, name
    )
    return ImageFacts(stat, info.format, info.virtual_size_bytes)


def fill_from_image(
    driver: base.Driver,
    volume: model.Volume,
    source: Source,
    url: str,
    *,
    declared_format: str | None = None,
    checksum: str | None = None,
    spool_directory: str,
    token: str,
    node: Node,
    watch: copy.Watch | None = None,
    rate_bytes_per_s: int | None = None,
    fresh: bool = False,
    free_bytes: int | None = None,
) -> Filled:
    """Fill a volume with the disk that is in an image.

    ``free_bytes`` is what the pool can store now, if known. ``token`` names
    what is spooled; ``watch`` is called with bytes done and
    in all, and what it raises (say, ``Cancelled``) ends the work.

    :raises Invalid: the image is refused, too large, or its checksum wrong
    :raises Conflict: it changed on the way
    :raises NoSpace: the pool, or the spool, cannot store it now
    """
    wanted = copy.checksum(checksum)
    facts = describe_image(source, url, declared_format)
    name = f'image {masked(url)}'
    check_fits(facts.virtual_size_bytes, volume, name)
    _check_room(facts, name, node, spool_directory, free_bytes)
    way = Way(node, token, spool_directory, watch, rate_bytes_per_s)
    fill = _Fill(driver, volume, way, wanted, fresh, name)
    if facts.stat.path is not None:
        with source.open(facts.stat) as image:
            info = fill.from_file(image, declared_format)
            # Somebody may have written to it all the while.
            with source.open(facts.stat):
                pass
    elif facts.format == 'raw':
        with source.open(facts.stat) as image:
            info = fill.from_stream(image, facts.stat.size_bytes or 0)
    else:
        info = fill.from_spool(source, facts)
    return Filled(
        info.format, info.virtual_size_bytes, facts.stat.size_bytes or 0,
        facts.stat.version,
    )


def check_fits(
    virtual_size_bytes: int, volume: model.Volume, name: str
) -> None:
    """Refuse what a volume cannot hold.

    :raises Invalid: the volume is too small
    """
    if virtual_size_bytes > volume.size_bytes:
        gib = -(-virtual_size_bytes // model.GIB)
        raise errors.Invalid(
            f'{name} has a disk of {sizes.exact(virtual_size_bytes)}, and '
            f'volume {volume.id} has {sizes.exact(volume.size_bytes)}; make '
            f'it {gib} GiB or more'
        )


def copy_volume(
    source_driver: base.Driver,
    source: Stored,
    target_driver: base.Driver,
    volume: model.Volume,
    *,
    node: Node,
    watch: copy.Watch | None = None,
    rate_bytes_per_s: int | None = None,
    fresh: bool = False,
) -> None:
    """Fill a volume with the bytes of another, or of a snapshot."""
    check_fits(source.size_bytes, volume, f'source {source.id}')
    there = opener(target_driver, node)
    way = Way(there or node, '', '', watch, rate_bytes_per_s)
    if there is not None and opener(source_driver, node) is there:
        with readable_node(source_driver, source, there) as disk:
            _convert_into(
                target_driver, volume, disk, source.size_bytes, way, fresh
            )
        return
    with source_driver.reader(source) as reader:
        _copy_into(
            target_driver, volume, reader, source.size_bytes, way, fresh,
            extents=reader.extents,
        )


def _check_room(
    facts: ImageFacts,
    name: str,
    node: Node,
    spool_directory: str,
    free_bytes: int | None,
) -> None:
    """Refuse before the first byte what cannot be stored now.

    A raw image may be mostly zeros, which take no room; of the other
    formats the file's size says how much data there is, at least.
    """
    if facts.format == 'raw':
        return
    size_bytes = facts.stat.size_bytes or 0
    if free_bytes is not None and size_bytes > free_bytes:
        raise errors.NoSpace(
            f'{name} holds {sizes.exact(size_bytes)}, and the pool has '
            f'{sizes.human(free_bytes)} free'
        )
    if facts.stat.path is None:
        node.make_directory(spool_directory)
        room_bytes = node.space(spool_directory).free_bytes
        if size_bytes > room_bytes:
            raise errors.NoSpace(
                f'{name} has {sizes.exact(size_bytes)}, and the directory '
                f'where it is spooled has {sizes.human(room_bytes)} free'
            )


class _Fill:
    """One volume being filled from one image."""

    def __init__(
        self,
        driver: base.Driver,
        volume: model.Volume,
        way: Way,
        wanted: copy.Checksum | None,
        fresh: bool,
        name: str,
    ) -> None:
        self.driver = driver
        self.volume = volume
        self.way = way
        self.wanted = wanted
        self.fresh = fresh
        self.name = name
        # An image is here: can QEMU write into the volume from here?
        self.is_opened = opener(driver, way.node) is way.node

    def from_file(
        self, image: Opened, declared_format: str | None
    ) -> formats.ImageInfo:
        """Fill from a file on this node, without a copy of it."""
        info = formats.inspect(image, declared_format, self.name)
        check_fits(info.virtual_size_bytes, self.volume, self.name)
        size_bytes = image.seek(0, os.SEEK_END)
        # With a checksum one pass is enough; without one QEMU is quicker.
        if info.format == 'raw' and (self.wanted or not self.is_opened):
            image.seek(0)
            _copy_into(
                self.driver, self.volume, image, size_bytes, self.way,
                self.fresh,
                extents=lambda: copy.file_extents(
                    image.fileno(), size_bytes),
                wanted=self.wanted, name=self.name,
            )
            return info
        way = self.way
        if self.wanted is not None:
            total = size_bytes + info.virtual_size_bytes
            self._check_sum(image, size_bytes, way.part(0, total))
            way = way.part(size_bytes, total)
        self._convert(image, info, way)
        return info

    def from_stream(
        self, image: Opened, size_bytes: int
    ) -> formats.ImageInfo:
        """Fill from a raw image while it arrives."""
        # The server has been asked before; it may answer otherwise now.
        head = _read_up_to(image, min(size_bytes, formats.HEAD_BYTES))
        info = formats.inspect_parts(
            head, None, size_bytes, 'raw', self.name
        )
        whole = _Whole(head, image)
        _copy_into(
            self.driver, self.volume, whole, size_bytes, self.way,
            self.fresh, wanted=self.wanted, name=self.name,
            accept=lambda: self._check_tail(whole.tail, size_bytes),
        )
        return info

    def from_spool(
        self, source: Source, facts: ImageFacts
    ) -> formats.ImageInfo:
        """Fill from an image that has to be whole before it is read."""
        node, spool = self.way.node, self.way.spool
        size_bytes = facts.stat.size_bytes or 0
        total = size_bytes + facts.virtual_size_bytes
        node.make_directory(self.way.spool_directory)
        try:
            with node.open(spool, 'w+b') as file:
                self._arrive(source, facts.stat, file, total)
                info = formats.inspect(file, facts.format, self.name)
                check_fits(info.virtual_size_bytes, self.volume, self.name)
                self._convert(file, info, self.way.part(size_bytes, total))
        finally:
            node.unlink(spool)
        return info

    def _arrive(
        self, source: Source, stat: ImageStat, spool: File, total: int
    ) -> None:
        size_bytes = stat.size_bytes or 0
        way = self.way.part(0, total)
        with source.open(stat) as image:
            digest = copy.copy(
                image, spool, size_bytes,
                algorithm=self.wanted.algorithm if self.wanted else None,
                rate_bytes_per_s=way.rate_bytes_per_s, watch=way.watch,
            )
        if self.wanted is not None:
            self.wanted.check(digest, self.name)
        spool.truncate(size_bytes)

    def _convert(
        self, image: Opened, info: formats.ImageInfo, way: Way
    ) -> None:
        """Convert from what was inspected, whatever its name means now."""
        if info.format == 'vhd':
            # QEMU takes no notice of which sectors a VHD says are unwritten,
            # and would copy what happens to lie there.
            image.seek(0)
            disk = vhd.Disk([image], name=self.name)
            _copy_into(
                self.driver, self.volume, disk, info.virtual_size_bytes, way,
                self.fresh, extents=disk.extents,
            )
            return
        node = convert.image_node(fd_path(image), info.format)
        size_bytes = info.virtual_size_bytes
        convert.check(way.node, node, info.format, size_bytes)
        if self.is_opened:
            _convert_into(
                self.driver, self.volume, node, size_bytes, way, self.fresh
            )
            return
        # Not by the daemon that serves everybody: this one is a stranger's.
        with scratch(way, '.raw') as raw:
            convert.write_image(
                way.node, node, fd_path(raw), 'raw', size_bytes,
                watch=way.watch, rate_bytes_per_s=way.rate_bytes_per_s,
            )
            _copy_into(
                self.driver, self.volume, raw, size_bytes, way, self.fresh,
                extents=lambda: copy.file_extents(raw.fileno(), size_bytes),
            )

    def _check_sum(
        self, image: Opened, size_bytes: int, way: Way
    ) -> None:
        assert self.wanted is not None
        digest = copy.digest_of(
            image, size_bytes, self.wanted.algorithm, way.watch
        )
        self.wanted.check(digest, self.name)

    def _check_tail(self, tail: bytes, size_bytes: int) -> None:
        if formats.has_vhd_footer(tail, size_bytes):
            raise errors.Invalid(
                f'{self.name} is a fixed vhd image, not raw; declare it vhd'
            )


class _Whole(io.RawIOBase):
    """A stream whose head was read already; keeps its last bytes."""

    def __init__(self, head: bytes, rest: Opened) -> None:
        self._head = memoryview(head)
        self._rest = rest
        self.tail = b''

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast('B')
        if self._head:
            count = min(len(view), len(self._head))
            view[:count] = self._head[:count]
            self._head = self._head[count:]
        else:
            count = self._rest.readinto(view) or 0
        last = view[max(0, count - formats.SECTOR):count]
        self.tail = (self.tail + bytes(last))[-formats.SECTOR:]
        return count

    def abort(self) -> None:
        abort = getattr(self._rest, 'abort', None)
        if abort is not None:
            abort()


def _convert_into(
    driver: base.Driver,
    volume: model.Volume,
    source: Mapping[str, Any],
    size_bytes: int,
    way: Way,
    fresh: bool,
) -> None:
    """Convert into a volume, and see to it that all of it is durable."""
    assert isinstance(driver, base.BlockNode)
    if not fresh:
        with driver.writer(volume) as writer:
            writer.zero(0, writer.size_bytes)
            writer.commit()
    disk = {'driver': 'raw', 'size': size_bytes, 'file': source}
    grown = volume.size_bytes + volume.size_bytes // 8 + convert.SLACK_BYTES
    convert.convert(
        way.node, disk, driver.blocknode(volume), size_bytes,
        target_is_zero=True, file_bytes=grown, watch=way.watch,
        rate_bytes_per_s=way.rate_bytes_per_s,
    )
    # qemu-img was told not to flush, for it would not say if that failed:
    # the driver does it, and does.
    with driver.writer(volume) as writer:
        writer.commit()


def _copy_into(
    driver: base.Driver,
    volume: model.Volume,
    source: Opened,
    size_bytes: int,
    way: Way,
    fresh: bool,
    *,
    extents: Callable[[], Iterator[model.Extent]] | None = None,
    wanted: copy.Checksum | None = None,
    name: str = '',
    accept: Callable[[], None] | None = None,
) -> None:
    """Copy into a volume, and commit if the bytes are those wanted.

    ``extents`` may be called more than once.
    """
    with driver.writer(volume) as writer:
        known = extents() if extents else [model.Extent(0, size_bytes, False)]
        writer.expect(_expected(known, size_bytes, writer.size_bytes))
        # The copy tells how far it is; a run of zeros knows of itself alone.
        with progress.watching(None, way.rate_bytes_per_s or 0):
            digest = copy.copy(
                source, writer, size_bytes,
                extents=extents() if extents else None,
                zero=None if fresh else writer.zero,
                algorithm=wanted.algorithm if wanted else None,
                rate_bytes_per_s=way.rate_bytes_per_s, watch=way.watch,
            )
        if not fresh and size_bytes < writer.size_bytes:
            writer.zero(size_bytes, writer.size_bytes - size_bytes)
        if wanted is not None:
            wanted.check(digest, name)
        if accept is not None:
            accept()
        writer.commit()


def _expected(
    extents: Iterable[model.Extent], size_bytes: int, whole_bytes: int
) -> Iterator[model.Extent]:
    """Yield what a volume will hold, of which a source fills the start."""
    at = 0
    for run in extents:
        length = min(run.length_bytes, size_bytes - at)
        if length > 0:
            yield model.Extent(at, length, run.is_zero)
        at += length
    if at < whole_bytes:
        yield model.Extent(at, whole_bytes - at, True)


def _read(
    source: Source, stat: ImageStat, offset_bytes: int, length: int
) -> bytes:
    length = min(length, (stat.size_bytes or 0) - offset_bytes)
    with source.open(stat, offset_bytes) as image:
        return _read_up_to(image, length)


def _read_up_to(image: Opened, length: int) -> bytes:
    pieces = []
    while length > 0 and (piece := image.read(length)):
        pieces.append(piece)
        length -= len(piece)
    return b''.join(pieces)
