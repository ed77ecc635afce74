# SPDX-License-Identifier: Apache-2.0
"""Free functions a driver may call: readers and writers ready to use.

``file_reader`` and ``file_writer`` serve plain raw files and block devices;
``nbd_reader`` and ``nbd_writer`` serve whatever QEMU can open, through a
private export of the block daemon. Nothing here is a base class: a driver
calls what suits its storage, or brings its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from volume import errors
from volume import ids
from volume import model
from volume import progress
from volume.blockd import PRIVATE
from volume.drivers.base import Reader
from volume.drivers.base import Writer
from volume.nbd import NbdClient
from volume.node import File
from volume.node import Node

T = TypeVar('T')

ZERO_BYTES_MAX = 32 * model.MIB


def open_device(node: Node, path: str, mode: str) -> File:
    """Open a block device that was mapped for this.

    :raises Unavailable: its name is not there, which says nothing of the
        volume: only what knows the storage's volumes can say that one is gone
    """
    try:
        return node.open(path, mode)
    except errors.NotFound as missing:
        raise errors.Unavailable(
            f'the device {path} is not there any more, or not yet'
        ) from missing


@contextlib.contextmanager
def file_reader(
    node: Node, path: str, is_mapped: bool = False
) -> Iterator[Reader]:
    """Open a raw file, or a block device that was mapped, for reading.

    :raises NotFound: there is no such file
    :raises Unavailable: there is no such device now
    """
    with _opened(node, path, 'rb', is_mapped) as file:
        reader = _FileReader(file, path)
        try:
            yield reader
        finally:
            reader.close()


@contextlib.contextmanager
def file_writer(
    node: Node, path: str, size_bytes: int, is_mapped: bool = False
) -> Iterator[Writer]:
    """Open a raw file, or a block device that was mapped, to be filled.

    It has ``size_bytes`` already (or more, for a device): a writer never
    makes a volume longer.

    :raises NotFound: there is no such file
    :raises Unavailable: there is no such device now
    :raises Invalid: it is shorter than ``size_bytes``
    """
    with _opened(node, path, 'rb+', is_mapped) as file:
        there_bytes = file.size_bytes
        if there_bytes < size_bytes:
            raise errors.Invalid(
                f'{path} has {there_bytes} bytes, not {size_bytes}; make it '
                'that long before it is filled'
            )
        writer = _FileWriter(file, path, size_bytes)
        try:
            yield writer
        finally:
            writer.close()


@contextlib.contextmanager
def nbd_reader(
    node: Node, blocknode: Mapping[str, Any]
) -> Iterator[Reader]:
    """Open what QEMU can open for reading.

    :raises NotFound: one of its files is not there
    :raises Busy: another process writes to one of its files
    """
    with _private(node, blocknode, writable=False) as client:
        reader = NbdReader(client)
        try:
            yield reader
        finally:
            reader.close()


@contextlib.contextmanager
def nbd_writer(
    node: Node, blocknode: Mapping[str, Any], path: str = ''
) -> Iterator[Writer]:
    """Open what QEMU can open, and nobody else uses, to be filled.

    ``path`` is the file that takes the bytes, if they go into one. QEMU
    flushes nothing that it has not written itself; with the path a commit
    makes durable what another process wrote before, too.

    :raises NotFound: one of its files is not there
    :raises Busy: another process uses one of its files
    """
    with _private(node, blocknode, writable=True) as client:
        writer = _NbdWriter(node, client, path)
        try:
            yield writer
        finally:
            writer.close()


def moved(
    position: int, size_bytes: int, offset: int, whence: int
) -> int:
    """Return where a seek leads.

    :raises Invalid: before the beginning
    """
    start = {os.SEEK_SET: 0, os.SEEK_CUR: position, os.SEEK_END: size_bytes}
    if whence not in start or start[whence] + offset < 0:
        raise errors.Invalid(f'cannot seek to {offset} from {whence}')
    return start[whence] + offset


def check_run(what: str, offset: int, length: int, size_bytes: int) -> None:
    """Refuse a run that is not inside the volume.

    :raises Invalid: it is not
    """
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise errors.Invalid(
            f'cannot write {length} bytes at {offset} of {what}: it ends at '
            f'{size_bytes}'
        )


def _opened(node: Node, path: str, mode: str, is_mapped: bool) -> File:
    if is_mapped:
        return open_device(node, path, mode)
    return node.open(path, mode)


def _pieces(length_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield where each piece of a run begins, and its length; tell of each.

    One request for all of it might take hours, and nobody could stop it.
    """
    for done in range(0, length_bytes, ZERO_BYTES_MAX):
        count = min(ZERO_BYTES_MAX, length_bytes - done)
        yield done, count
        progress.tell(done + count, length_bytes)


@contextlib.contextmanager
def _private(
    node: Node, blocknode: Mapping[str, Any], writable: bool
) -> Iterator[NbdClient]:
    if node.blockd is None:
        raise errors.Unavailable(
            'this node has no block daemon; what QEMU opens cannot be read '
            'or written'
        )
    export_id = f'{PRIVATE}{ids.new()}'
    with node.blockd.private(export_id, blocknode, writable) as uri:
        with contextlib.closing(NbdClient(uri)) as client:
            yield client


class _FileReader(Reader):
    """Reads by offset, so that asking for extents moves nothing."""

    def __init__(self, file: File, path: str) -> None:
        self._file = file
        self._path = path
        self._position = 0
        self.size_bytes = file.size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = moved(
            self._position, self.size_bytes, offset, whence
        )
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast('B')
        view = view[:max(0, self.size_bytes - self._position)]
        if not view:
            return 0
        count = self._file.pread_into(view, self._position)
        if not count:
            raise errors.Corrupt(
                f'{self._path} ended at {self._position} of '
                f'{self.size_bytes} bytes while it was read; something cut it'
            )
        self._position += count
        return count

    def extents(self) -> Iterator[model.Extent]:
        offset = 0
        while offset < self.size_bytes:
            data = self._find(offset, True)
            if data > offset:
                yield model.Extent(offset, data - offset, True)
            if data >= self.size_bytes:
                return
            offset = self._find(data, False)
            if offset > data:
                yield model.Extent(data, offset - data, False)

    def _find(self, offset: int, is_data: bool) -> int:
        return min(self._file.find(offset, is_data), self.size_bytes)


class _FileWriter(Writer):
    """Writes by offset; once a write has failed it can never be committed."""

    def __init__(self, file: File, path: str, size_bytes: int) -> None:
        self._file = file
        self._path = path
        self._position = 0
        self._failed = False
        self.size_bytes = size_bytes

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = moved(
            self._position, self.size_bytes, offset, whence
        )
        return self._position

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast('B')
        check_run(self._path, self._position, len(view), self.size_bytes)
        self._try(lambda: self._file.pwrite(view, self._position))
        self._position += len(view)
        return len(view)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        check_run(self._path, offset_bytes, length_bytes, self.size_bytes)
        for done, count in _pieces(length_bytes):
            if not self._zero_piece(offset_bytes + done, count):
                progress.pace(count)

    def _zero_piece(self, offset_bytes: int, length_bytes: int) -> bool:
        return self._try(lambda: self._file.zero_out(
            offset_bytes, length_bytes, may_free=True
        ))

    def commit(self) -> None:
        if self._failed:
            # The kernel reports a lost write once; a second fsync would
            # answer that all is well.
            raise errors.Unknown(
                f'an earlier write to {self._path} failed; fill it again'
            )
        self._try(self._file.sync)

    def _try(self, effect: Callable[[], T]) -> T:
        try:
            return effect()
        except BaseException:
            self._failed = True
            raise


class NbdReader(Reader):
    """Reads an export."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client
        self._position = 0
        self.size_bytes = client.size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = moved(
            self._position, self.size_bytes, offset, whence
        )
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast('B')
        view = view[:max(0, self.size_bytes - self._position)]
        self._client.pread_into(view, self._position)
        self._position += len(view)
        return len(view)

    def extents(self) -> Iterator[model.Extent]:
        return self._client.extents()


class _NbdWriter(Writer):
    """Writes through a private export; each request is an act."""

    def __init__(self, node: Node, client: NbdClient, path: str) -> None:
        self._node = node
        self._client = client
        self._path = path
        self._position = 0
        self._failed = False
        self.size_bytes = client.size_bytes

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = moved(
            self._position, self.size_bytes, offset, whence
        )
        return self._position

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast('B')
        at = self._position
        check_run('the volume', at, len(view), self.size_bytes)
        self._try('nbd write', lambda: self._client.pwrite_ahead(view, at))
        self._position += len(view)
        return len(view)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        check_run('the volume', offset_bytes, length_bytes, self.size_bytes)
        for done, count in _pieces(length_bytes):
            self._zero_piece(offset_bytes + done, count)

    def _zero_piece(self, offset_bytes: int, length_bytes: int) -> None:
        self._try(
            'nbd zero', lambda: self._client.zero(offset_bytes, length_bytes)
        )

    def commit(self) -> None:
        if self._failed:
            # As above: the error of a lost write is told once.
            raise errors.Unknown(
                'an earlier write to the volume failed; fill it again'
            )
        self._try('nbd flush', self._client.flush)
        if self._path:
            with self._node.open(self._path, 'rb+') as f:
                f.sync()

    def _try(self, what: str, effect: Callable[[], None]) -> None:
        try:
            self._node.act(what, effect)
        except BaseException:
            self._failed = True
            raise
