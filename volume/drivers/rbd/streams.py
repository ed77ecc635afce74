# SPDX-License-Identifier: Apache-2.0
"""The bytes of an image, read and written through librbd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers import generic
from volume.drivers.rbd import images
from volume.drivers.rbd import names
from volume.drivers.rbd.link import Image
from volume.drivers.rbd.link import Link
from volume.drivers.rbd.tending import Tending

READ_BYTES = 4 << 20
ZERO_BYTES = 1 << 30
# So much is asked about at a time: what changed in it is held in memory.
WINDOW_BYTES = 64 << 30

Source = model.Volume | model.Snapshot


class Streams:
    """Readers, writers, and what is known without reading."""

    def __init__(self, link: Link, tending: Tending) -> None:
        self.link = link
        self.tending = tending

    @contextlib.contextmanager
    def reader(self, source: Source) -> Iterator[base.Reader]:
        with self._open(source) as image:
            yield _Reader(image)

    @contextlib.contextmanager
    def writer(self, volume: model.Volume) -> Iterator[base.Writer]:
        name = names.image(volume)
        self.tending.release(volume.pool, name)
        with self.link.image(
            volume.pool, name, is_read_only=False
        ) as image:
            images.need_unused(image, 'fill')
            yield _Writer(image)

    def extents(
        self, source: Source, since: model.Snapshot | None
    ) -> Iterator[model.Extent]:
        with self._open(source) as image:
            if since is None:
                for run in _runs(image, None):
                    if not run.is_zero:
                        yield run
                return
            name = names.snapshot(since)
            if name not in image.snapshots():
                raise errors.NotFound(
                    f'{image.what} has no snapshot {since.id}'
                )
            yield from _runs(image, name)

    def _open(
        self, source: Source
    ) -> contextlib.AbstractContextManager[Image]:
        if isinstance(source, model.Volume):
            return self.link.image(source.pool, names.image(source))
        return self.link.image(
            source.volume.pool, names.image(source.volume),
            snapshot=names.snapshot(source),
        )


def _runs(image: Image, since: str | None) -> Iterator[model.Extent]:
    """Yield what is stored, and what is not any more, in order."""
    size_bytes = image.size()
    for start in range(0, size_bytes, WINDOW_BYTES):
        length = min(WINDOW_BYTES, size_bytes - start)
        found: list[tuple[int, int, bool]] = []

        def look(
            raw: Any, start: int = start, length: int = length,
            found: list[tuple[int, int, bool]] = found,
        ) -> None:
            raw.diff_iterate(
                start, length, since,
                lambda *run: found.append(run), include_parent=True,
                whole_object=True,
            )

        image.ask('diff', look)
        for offset, run_bytes, exists in sorted(found):
            end = min(offset + run_bytes, size_bytes)
            if offset < end:
                yield model.Extent(offset, end - offset, not exists)


class _Reader(base.Reader):
    """Reads an image that is open."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._position = 0
        self.size_bytes = image.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._position = generic.moved(
            self._position, self.size_bytes, offset, whence
        )
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast('B')
        count = min(
            len(view), READ_BYTES, max(0, self.size_bytes - self._position)
        )
        if count:
            at = self._position
            data = self._image.ask('read', lambda raw: raw.read(at, count))
            count = len(data)
            if not count:
                raise errors.Corrupt(
                    f'{self._image.what} ended at {at} of {self.size_bytes} '
                    'bytes while it was read; something cut it'
                )
            view[:count] = data
            self._position += count
        return count

    def extents(self) -> Iterator[model.Extent]:
        at = 0
        for run in _runs(self._image, None):
            if run.is_zero:
                continue
            if run.offset_bytes > at:
                yield model.Extent(at, run.offset_bytes - at, True)
            yield run
            at = run.offset_bytes + run.length_bytes
        if at < self.size_bytes:
            yield model.Extent(at, self.size_bytes - at, True)


class _Writer(base.Writer):
    """Writes into an image that nobody else has open; there is no cache."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._position = 0
        self._failed = False
        self.size_bytes = image.size()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._position = generic.moved(
            self._position, self.size_bytes, offset, whence
        )
        return self._position

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast('B')
        at = self._position
        generic.check_run(
            self._image.what, at, len(view), self.size_bytes)
        if view:
            self._try('write', lambda raw: raw.write(bytes(view), at))
        self._position += len(view)
        return len(view)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        generic.check_run(
            self._image.what, offset_bytes, length_bytes, self.size_bytes)
        end = offset_bytes + length_bytes
        for at in range(offset_bytes, end, ZERO_BYTES):
            count = min(ZERO_BYTES, end - at)
            # Not a discard, which may leave what is no whole grain.
            self._try('zero', lambda raw, at=at, count=count: (
                raw.write_zeroes(at, count)))

    def commit(self) -> None:
        if self._failed:
            raise errors.Unknown(
                f'an earlier write to {self._image.what} failed; fill it '
                'again'
            )
        self._try('flush', lambda raw: raw.flush())

    def _try(self, what: str, effect: Any) -> None:
        try:
            self._image.do(what, effect)
        except BaseException:
            self._failed = True
            raise
