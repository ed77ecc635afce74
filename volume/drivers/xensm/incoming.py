# SPDX-License-Identifier: Apache-2.0
"""Bytes into a VDI: one PUT, forward only, proved by reading back.

How it is sent is decided at the first byte. A VDI that nobody has written to
(``is_fresh``) takes a VHD without its empty blocks, if the caller has said
what to expect; one that holds something takes raw bytes, for the caller has
promised to leave no gap. Where nothing was said the disk is put together in a
sparse file of this node first, on top of its old bytes if there are any, and
sent when it is whole: what a writer skips stays as it was.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base
from volume.drivers import generic
from volume.drivers.xensm.samples import Samples
from volume.node import File
from volume.node import Node
from volume.transfer import copy
from volume.transfer import vhd_layout
from volume.transfer import vhd_write

LOG = logging.getLogger(__name__)

PIECE_BYTES = model.MIB
ZEROS = memoryview(bytes(PIECE_BYTES))


class Upload(Protocol):
    """A PUT that is going on."""

    def send(self, view: memoryview) -> None: ...

    def finish(self) -> None:
        """Wait for the server's word that it has all of it."""

    def abandon(self) -> None: ...


class Vdi(Protocol):
    """What a writer must know and do about its VDI."""

    name: str
    size_bytes: int
    is_fresh: bool

    def put(self, format: str, length_bytes: int) -> Upload: ...

    def reader(self) -> AbstractContextManager[base.Reader]: ...

    def prove(self, samples: Samples) -> None:
        """Read back what was sent.

        :raises Corrupt: the bytes are others
        """

    def spoil(self) -> None:
        """Note durably that it is not fresh any more."""


class VdiWriter(base.Writer):
    """Fills one VDI; once a write has failed it can never be committed."""

    def __init__(self, node: Node, vdi: Vdi) -> None:
        self._node = node
        self._vdi = vdi
        self._position = 0
        self._failed = False
        self._image: vhd_write.Dynamic | None = None
        self._is_whole = False
        self._sink: _Sink | None = None
        self._samples = Samples()
        self.size_bytes = vdi.size_bytes

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = generic.moved(
            self._position, self.size_bytes, offset, whence)
        return self._position

    def expect(self, extents: Iterable[model.Extent]) -> None:
        self._is_whole = True
        if self._vdi.is_fresh:
            self._image = _image(self.size_bytes, extents)

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast('B')
        at = self._position
        generic.check_run(self._vdi.name, at, len(view), self.size_bytes)
        if view:
            self._try('vdi write', lambda: self._begun().write(at, view))
        self._position += len(view)
        return len(view)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        generic.check_run(
            self._vdi.name, offset_bytes, length_bytes, self.size_bytes)
        if length_bytes:
            self._try('vdi zero', lambda: self._begun().zero(
                offset_bytes, length_bytes))

    def commit(self) -> None:
        if self._failed:
            raise errors.Unknown(
                f'an earlier write to {self._vdi.name} failed; fill it again'
            )
        sink = self._sink
        if sink is None:
            return  # nothing was sent, and what is there is durable
        self._try('vdi commit', sink.finish)
        self._sink, self._image, self._is_whole = None, None, False
        self._vdi.prove(self._samples)

    def close(self) -> None:
        if not self.closed and self._sink is not None:
            sink, self._sink = self._sink, None
            sink.abandon()
        super().close()

    def _begun(self) -> _Sink:
        if self._sink is None:
            self._sink = self._begin()
        return self._sink

    def _begin(self) -> _Sink:
        if not self._is_whole:
            return _Spool(self._node, self._vdi, self._samples)
        return _direct(self._vdi, self._image, self._samples)

    def _try(self, what: str, effect: Callable[[], None]) -> None:
        try:
            if isinstance(self._sink, _Spool):
                effect()  # the acts are those of its file
            else:
                self._node.act(what, effect)
        except BaseException:
            self._failed = True
            raise


class _Sink(abc.ABC):
    """Where the bytes go."""

    @abc.abstractmethod
    def write(self, at: int, view: memoryview) -> None: ...

    @abc.abstractmethod
    def zero(self, at: int, length: int) -> None: ...

    @abc.abstractmethod
    def finish(self) -> None: ...

    @abc.abstractmethod
    def abandon(self) -> None: ...


def _direct(
    vdi: Vdi, image: vhd_write.Dynamic | None, samples: Samples
) -> _Sink:
    """Begin to send."""
    was_fresh = vdi.is_fresh
    if was_fresh:
        # Before the first byte: nobody may ever take it for empty again.
        vdi.spoil()
    if image is not None:
        return _Vhd(vdi, image, samples)
    return _Raw(vdi, samples, gaps_are_zero=was_fresh)


def _image(
    size_bytes: int, extents: Iterable[model.Extent]
) -> vhd_write.Dynamic | None:
    """Return how an empty VDI is filled by a VHD, if that saves anything."""
    if size_bytes > vhd_layout.DISK_BYTES_MAX:
        return None
    image = vhd_write.Dynamic(size_bytes, extents, uuid=ids.new())
    return image if image.length_bytes < size_bytes else None


class _Raw(_Sink):
    """All bytes of the disk."""

    def __init__(
        self, vdi: Vdi, samples: Samples, *, gaps_are_zero: bool
    ) -> None:
        self._vdi = vdi
        self._samples = samples
        self._gaps_are_zero = gaps_are_zero
        self._at = 0
        self._upload = vdi.put('raw', vdi.size_bytes)

    def write(self, at: int, view: memoryview) -> None:
        self._reach(at)
        self._samples.note(at, view)
        self._upload.send(view)
        self._at += len(view)

    def zero(self, at: int, length: int) -> None:
        self._reach(at)
        self._zeros_to(at + length)

    def finish(self) -> None:
        self._reach(self._vdi.size_bytes)
        self._upload.finish()

    def abandon(self) -> None:
        self._upload.abandon()

    def _reach(self, at: int) -> None:
        if at < self._at:
            raise errors.Unsupported(
                f'{self._vdi.name} is filled in one stream, which cannot go '
                f'back from {self._at} to {at}'
            )
        if at > self._at and not self._gaps_are_zero:
            raise errors.Invalid(
                f'nothing was written to {self._vdi.name} from {self._at} to '
                f'{at}, against what was promised'
            )
        self._zeros_to(at)

    def _zeros_to(self, end: int) -> None:
        if self._at < end:
            self._samples.note_zeros(self._at, end - self._at)
        while self._at < end:
            part = ZEROS[:end - self._at]
            self._upload.send(part)
            self._at += len(part)


class _Vhd(_Sink):
    """A VHD without the blocks that are expected to stay zero."""

    def __init__(
        self, vdi: Vdi, image: vhd_write.Dynamic, samples: Samples
    ) -> None:
        self._samples = samples
        self._at = 0
        self._upload = vdi.put('vhd', image.length_bytes)
        try:
            self._feed = vhd_write.Feed(image, self._upload.send)
        except BaseException:
            self._upload.abandon()
            raise

    def write(self, at: int, view: memoryview) -> None:
        self._feed.write(at, view)
        if at > self._at:
            self._samples.note_zeros(self._at, at - self._at)
        self._samples.note(at, view)
        self._at = at + len(view)

    def zero(self, at: int, length: int) -> None:
        if at < self._at:
            raise errors.Unsupported(
                f'a vhd on its way cannot go back from {self._at} to {at}')

    def finish(self) -> None:
        self._feed.finish()
        self._upload.finish()

    def abandon(self) -> None:
        self._upload.abandon()


class _Spool(_Sink):
    """The disk as it will be, in a file of this node."""

    def __init__(self, node: Node, vdi: Vdi, samples: Samples) -> None:
        self._vdi = vdi
        self._samples = samples
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_scratch(node, vdi.size_bytes))
            if not vdi.is_fresh:
                with vdi.reader() as reader:
                    for run in reader.extents():
                        if not run.is_zero:
                            _fetch(reader, self._file, run)
            self._stack = stack.pop_all()

    def write(self, at: int, view: memoryview) -> None:
        self._file.seek(at)
        while view:
            view = view[self._file.write(view):]

    def zero(self, at: int, length: int) -> None:
        # A hole, or zeros where the file system has none.
        try:
            self._file.punch(at, length)
            return
        except errors.VolumeError:
            LOG.debug('no hole in the spool')
        end = at + length
        while at < end:
            part = ZEROS[:end - at]
            self.write(at, part)
            at += len(part)

    def finish(self) -> None:
        vdi, size = self._vdi, self._vdi.size_bytes
        image = None
        if vdi.is_fresh:
            image = _image(size, self._extents())
        sink = _direct(vdi, image, self._samples)
        try:
            for run in self._extents():
                if run.is_zero:
                    sink.zero(run.offset_bytes, run.length_bytes)
                else:
                    self._send(sink, run)
            sink.finish()
        except BaseException:
            sink.abandon()
            raise
        self._stack.close()

    def _extents(self) -> Iterator[model.Extent]:
        return copy.file_extents(
            self._file.fileno(), self._vdi.size_bytes)

    def _send(self, sink: _Sink, run: model.Extent) -> None:
        buffer = memoryview(bytearray(min(PIECE_BYTES, run.length_bytes)))
        at, end = run.offset_bytes, run.offset_bytes + run.length_bytes
        while at < end:
            count = self._file.pread_into(buffer[:end - at], at)
            if not count:
                raise errors.Corrupt('the spool was cut off')
            sink.write(at, buffer[:count])
            at += count

    def abandon(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def _scratch(node: Node, size_bytes: int) -> Iterator[File]:
    """Have a sparse file that goes with its descriptor."""
    directory = os.path.join(node.state_dir, 'xensm')
    node.make_directory(directory)
    path = os.path.join(directory, f'{ids.new()}.spool')
    with node.open(path, 'w+b') as file:
        node.unlink(path)
        file.truncate(size_bytes)
        yield file


def _fetch(reader: base.Reader, file: File, run: model.Extent) -> None:
    buffer = memoryview(bytearray(min(PIECE_BYTES, run.length_bytes)))
    at, end = run.offset_bytes, run.offset_bytes + run.length_bytes
    reader.seek(at)
    while at < end:
        count = reader.readinto(buffer[:end - at])
        if not count:
            raise errors.Corrupt(f'a VDI ended at {at} while it was read')
        file.seek(at)
        view = buffer[:count]
        while view:
            view = view[file.write(view):]
        at += count
