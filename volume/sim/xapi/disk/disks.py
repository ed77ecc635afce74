# SPDX-License-Identifier: Apache-2.0
"""The bytes of one VDI, whatever kind of file they lie in.

A ``Format`` makes and changes files, a ``Disk`` is one that is open, with
the files that it needs. What changes a file goes through a ``Kernel``, so
that a test can let a process die at each change.
"""

from __future__ import annotations

import abc
import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

from volume import errors
from volume.model import Extent
from volume.model import MIB

PIECE_BYTES = 2 * MIB
PUNCH_HOLE, KEEP_SIZE = 2, 1
BEGIN_WRITE = 2  # of sync_file_range


class Stopped(Exception):
    """A long piece of work was told to stop; it may be done again."""


def never() -> bool:
    """Say that a long piece of work may go on."""
    return False


def endless(length_bytes: int) -> None:
    """Claim room where there is always enough."""


class Kernel:
    """What changes files. Each call is whole, or has not been."""

    def write(self, fd: int, parts: Sequence[Any], offset: int) -> None:
        """Write parts one behind the other."""
        views = [memoryview(part).cast('B') for part in parts if len(part)]
        while views:
            done = os.pwritev(fd, views, offset)
            offset += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]

    def begin_sync(self, fd: int) -> None:
        """Have it begin to store what was written; wait for nothing."""
        _LIBC.sync_file_range(
            fd, ctypes.c_int64(0), ctypes.c_int64(0), BEGIN_WRITE)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Make a run zeros, in a hole if the file system has holes."""
        if _fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
            return
        for at in range(0, length, PIECE_BYTES):
            part = _ZEROS[:min(PIECE_BYTES, length - at)]
            self.write(fd, [part], offset + at)

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def store(self, path: str, data: bytes) -> None:
        """Make a file appear with all its bytes, or replace it so."""
        draft = f'{path}.draft'
        with open(draft, 'wb') as file:
            file.write(data)
        self.rename(draft, path)

    def rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    def remove(self, path: str) -> None:
        """Remove a file; return at once if it is gone."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            return


KERNEL = Kernel()


class Disk(abc.ABC):
    """One open disk: bytes at offsets. For any number of threads."""

    path: str
    size_bytes: int
    is_writable: bool

    @abc.abstractmethod
    def pread_into(self, buffer: Any, offset: int) -> None:
        """Fill the whole buffer.

        :raises Invalid: beyond the end
        """

    @abc.abstractmethod
    def pwrite(self, offset: int, data: Any) -> None:
        """Write all of it.

        :raises Invalid: beyond the end, or it is open for reading only
        :raises NoSpace: the storage is full
        """

    @abc.abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Make a run read as zeros, without storing them if possible."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Return when what was written will outlive the machine."""

    @abc.abstractmethod
    def extents(self) -> Iterator[Extent]:
        """Yield runs that cover the disk; what is zero was never written."""

    @abc.abstractmethod
    def allocated(self) -> Iterator[Extent]:
        """Yield runs that cover the disk; what is zero is not in this file.

        It may be in one of its parents.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the files; once is enough."""

    def pread(self, offset: int, length: int) -> bytes:
        """Return bytes.

        :raises Invalid: beyond the end
        """
        self.check('read', offset, length)
        buffer = bytearray(length)
        self.pread_into(buffer, offset)
        return bytes(buffer)

    def check(self, verb: str, offset: int, length: int) -> None:
        """Refuse what does not lie in the disk."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise errors.Invalid(
                f'cannot {verb} {length} bytes at {offset}: the disk ends at '
                f'{self.size_bytes}'
            )
        if verb != 'read' and not self.is_writable:
            raise errors.Invalid(
                f'cannot {verb}: the disk is open for reading only')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Passed(Disk):
    """A disk that passes all on to another: a place to add something."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.path = disk.path
        self.size_bytes = disk.size_bytes
        self.is_writable = disk.is_writable

    def pread_into(self, buffer: Any, offset: int) -> None:
        self._disk.pread_into(buffer, offset)

    def pwrite(self, offset: int, data: Any) -> None:
        self._disk.pwrite(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._disk.zero(offset, length)

    def flush(self) -> None:
        self._disk.flush()

    def extents(self) -> Iterator[Extent]:
        return self._disk.extents()

    def allocated(self) -> Iterator[Extent]:
        return self._disk.allocated()

    def close(self) -> None:
        self._disk.close()


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of itself; ``parent`` is a file name, or empty."""

    size_bytes: int
    used_bytes: int
    parent: str = ''
    is_hidden: bool = False


class Format(abc.ABC):
    """One kind of file that a VDI can lie in."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    has_parents: ClassVar[bool] = True
    # Whether what is merged may be read meanwhile, through its children.
    merges_live: ClassVar[bool] = True
    granularity_bytes: ClassVar[int]
    size_bytes_max: ClassVar[int]

    def __init__(self, kernel: Kernel = KERNEL) -> None:
        self.kernel = kernel

    @abc.abstractmethod
    def create(
        self, path: str, size_bytes: int, parent: str | None = None
    ) -> None:
        """Make a disk of zeros, or of what a parent beside it has.

        ``parent`` is the parent's path as it will be. It appears whole.
        """

    @abc.abstractmethod
    def look(self, path: str) -> Facts:
        """Read what a file says of itself.

        :raises Invalid: it is not of this format
        """

    @abc.abstractmethod
    def open(
        self,
        path: str,
        writable: bool = False,
        parents: Sequence[str] = (),
        claim: Callable[[int], None] = endless,
    ) -> Disk:
        """Open a file and its parents, the nearest first.

        ``claim`` is asked before a file grows and raises NoSpace.
        """

    @abc.abstractmethod
    def merge(
        self, path: str, parent: str, stop: Callable[[], bool] = never
    ) -> None:
        """Write what is in a file into its parent; repeat it as you like.

        :raises Stopped: ``stop`` said so
        """

    @abc.abstractmethod
    def extra_bytes(self, path: str, parent: str) -> int:
        """Return how much the parent may grow when that is done."""

    @abc.abstractmethod
    def relink(self, path: str, parent: str) -> None:
        """Give a file another parent, which has the same bytes."""

    @abc.abstractmethod
    def hide(self, path: str, is_hidden: bool) -> None:
        """Mark a file as one that only its children need, or not."""

    @abc.abstractmethod
    def grow(self, path: str, size_bytes: int) -> None:
        """Make a disk larger; what is new is zero."""


def runs(found: Iterator[tuple[int, int, bool]]) -> Iterator[Extent]:
    """Yield runs of from, until and is-zero as extents, joined."""
    start = end = 0
    was_zero = True
    for low, high, is_zero in found:
        if is_zero != was_zero or low != end:
            if end > start:
                yield Extent(start, end - start, was_zero)
            start, was_zero = low, is_zero
        end = high
    if end > start:
        yield Extent(start, end - start, was_zero)


def read_whole(fd: int, view: memoryview, offset: int, path: str) -> None:
    """Fill a view from a file.

    :raises Corrupt: the file ends before
    """
    while view:
        done = os.preadv(fd, [view], offset)
        if not done:
            raise errors.Corrupt(f'{path} is cut off at {offset}')
        view = view[done:]
        offset += done


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Say whether the file system could."""
    result: int = _LIBC.fallocate(
        fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
    return result == 0


_ZEROS = memoryview(bytes(PIECE_BYTES))
_LIBC = ctypes.CDLL(None)
