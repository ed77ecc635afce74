# SPDX-License-Identifier: Apache-2.0
"""Raw files: a disk as it is, with holes where nothing was written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from volume import errors
from volume.model import Extent
from volume.model import SECTOR_BYTES as SECTOR
from volume.sim.xapi.disk import disks


class RawDisk(disks.Disk):
    """A file whose bytes are the disk's; a LUN, too."""

    def __init__(
        self,
        path: str,
        writable: bool = False,
        kernel: disks.Kernel = disks.KERNEL,
    ) -> None:
        self.path = path
        self.is_writable = writable
        self._kernel = kernel
        self._file: BinaryIO = open(
            path, 'r+b' if writable else 'rb', buffering=0)
        self._fd = self._file.fileno()
        self.size_bytes = self._file.seek(0, os.SEEK_END)

    def pread_into(self, buffer: Any, offset: int) -> None:
        view = memoryview(buffer).cast('B')
        self.check('read', offset, len(view))
        disks.read_whole(self._fd, view, offset, self.path)

    def pwrite(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast('B')
        self.check('write', offset, len(view))
        self._kernel.write(self._fd, [view], offset)

    def zero(self, offset: int, length: int) -> None:
        self.check('zero', offset, length)
        if length:
            self._kernel.punch(self._fd, offset, length)

    def flush(self) -> None:
        if self.is_writable:
            os.fdatasync(self._fd)

    def extents(self) -> Iterator[Extent]:
        return disks.runs(self._runs())

    def allocated(self) -> Iterator[Extent]:
        return self.extents()

    def close(self) -> None:
        self._file.close()

    def _runs(self) -> Iterator[tuple[int, int, bool]]:
        # The position of a descriptor is everybody's; ask with one's own.
        with open(self.path, 'rb', buffering=0) as file:
            at, end = 0, self.size_bytes
            while at < end:
                low = end
                with contextlib.suppress(OSError):  # ENXIO: holes to the end
                    low = min(end, os.lseek(file.fileno(), at, os.SEEK_DATA))
                yield at, low, True
                at = low
                if at < end:
                    high = min(
                        end, os.lseek(file.fileno(), at, os.SEEK_HOLE))
                    yield at, high, False
                    at = high


class Raw(disks.Format):
    """Raw files; they have no parents, and nothing to be marked by."""

    name = 'raw'
    suffix = '.raw'
    has_parents = False
    granularity_bytes = SECTOR
    size_bytes_max = (1 << 63) - SECTOR

    def create(
        self, path: str, size_bytes: int, parent: str | None = None
    ) -> None:
        if parent:
            raise self._refused(path)
        draft = f'{path}.draft'
        with open(draft, 'wb') as file:
            self.kernel.truncate(file.fileno(), size_bytes)
        self.kernel.rename(draft, path)

    def look(self, path: str) -> disks.Facts:
        size = os.path.getsize(path)
        return disks.Facts(size, size)

    def open(
        self,
        path: str,
        writable: bool = False,
        parents: Sequence[str] = (),
        claim: Callable[[int], None] = disks.endless,
    ) -> disks.Disk:
        if parents:
            raise self._refused(path)
        return RawDisk(path, writable, self.kernel)

    def merge(
        self,
        path: str,
        parent: str,
        stop: Callable[[], bool] = disks.never,
    ) -> None:
        raise self._refused(path)

    def extra_bytes(self, path: str, parent: str) -> int:
        raise self._refused(path)

    def relink(self, path: str, parent: str) -> None:
        raise self._refused(path)

    def hide(self, path: str, is_hidden: bool) -> None:
        raise self._refused(path)

    def grow(self, path: str, size_bytes: int) -> None:
        with open(path, 'r+b') as file:
            if file.seek(0, os.SEEK_END) < size_bytes:
                self.kernel.truncate(file.fileno(), size_bytes)

    def _refused(self, path: str) -> errors.Unsupported:
        return errors.Unsupported(
            f'{os.path.basename(path)} is raw: it has no parent and no mark')
