# SPDX-License-Identifier: Apache-2.0
"""The only door to this machine: run, open, rename, lock.

Whatever a driver or exporter does to the world goes through ``Node.act``, so
that the fault suite can refuse it, lose its reply, or let the process die
before or after it. Commands are run without a shell, with a time limit,
bounded output, and resource limits where they parse foreign bytes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import errno
import fcntl
import io
import logging
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TYPE_CHECKING, TypeVar

from volume import commands
from volume import concurrency
from volume import errors
from volume import locks
from volume.commands import CommandFailed as CommandFailed
from volume.commands import Endless as Endless
from volume.commands import ENVIRONMENT as ENVIRONMENT
from volume.commands import Limits as Limits
from volume.commands import mask as mask
from volume.commands import meaning as meaning

if TYPE_CHECKING:
    from volume.blockd import Blockd

LOG = logging.getLogger(__name__)

T = TypeVar('T')

FICLONE = 0x40049409  # linux/fs.h
BEGIN_WRITE = 2  # of sync_file_range

_held: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar(
    'held', default=()
)


@dataclasses.dataclass(frozen=True, slots=True)
class Space:
    """A file system's capacity; ``device`` is the same for the same one."""

    total_bytes: int
    free_bytes: int
    device: str


class Node:
    """This machine."""

    def __init__(self, state_dir: str, lock_dir: str = '') -> None:
        self.state_dir = state_dir
        self.lock_dir = lock_dir or os.path.join(state_dir, 'locks')
        self.blockd: Blockd | None = None

    def act(self, what: str, effect: Callable[[], T]) -> T:
        """Have an effect on the world; the one place to inject faults."""
        return effect()

    def blocking(self, effect: Callable[[], T]) -> T:
        """Return what ``effect`` returns; others go on meanwhile.

        For what keeps the kernel or the processor busy, such as a digest of
        much. Under eventlet it runs in a native thread, so it must not wait
        for a lock, a queue or a socket; see ``concurrency``.
        """
        return concurrency.blocking(effect)

    # Commands.

    def run(
        self,
        *argv: str,
        timeout_s: float = 60.0,
        limits: Limits | None = None,
        input_bytes: bytes = b'',
        output_bytes_max: int = 1 << 20,
        secrets: Sequence[str] = (),
        watch: Callable[[float], None] | None = None,
    ) -> str:
        """Run a command to its end and return what it printed.

        ``watch`` is called a few times a second with the percentage that
        the command last printed (``qemu-img -p``); what it raises ends the
        command. The command inherits the locks that its caller holds, and
        has a process group of its own.

        :raises CommandFailed: its exit code was not zero
        :raises Endless: it was killed for its time or its output
        :raises Unavailable: it is not installed
        """
        full = [*(limits.argv() if limits else ()), *argv]
        started = time.monotonic()
        try:
            return self.act(
                f'run {argv[0]}' + ''.join(f' {a}' for a in argv[1:2]),
                lambda: commands.run(
                    full, _held.get(), timeout_s, input_bytes,
                    output_bytes_max, secrets, watch,
                ),
            )
        finally:
            if LOG.isEnabledFor(logging.DEBUG):
                LOG.debug(
                    'ran %s in %.3f s', mask(shlex.join(argv), secrets),
                    time.monotonic() - started,
                )

    # Files.

    def open(self, path: str, mode: str = 'rb') -> File:
        """Open a file unbuffered; each write of it is an act of its own."""
        return self._file_act(
            'open', path, lambda: File(self, path, io.FileIO(path, mode))
        )

    def exists(self, path: str) -> bool:
        """Say whether the name is there; a dangling link is."""
        return self._file_act('exists', path, lambda: _mode(path) is not None)

    def is_file(self, path: str) -> bool:
        """Say whether the name is a plain file, and not a link to one."""
        return self._file_act(
            'is_file', path, lambda: stat.S_ISREG(_mode(path) or 0)
        )

    def size(self, path: str) -> int:
        """Return the size of the file in bytes.

        :raises NotFound: there is none
        """
        return self._file_act('size', path, lambda: os.stat(path).st_size)

    def allocated_bytes(self, path: str) -> int:
        """Return how much of the file is stored; zero if it is gone."""
        try:
            return self._file_act(
                'allocated', path, lambda: os.stat(path).st_blocks * 512
            )
        except errors.NotFound:
            return 0

    def space(self, path: str) -> Space:
        """Return the capacity of the file system that holds a path."""

        def ask() -> Space:
            fs = os.statvfs(path)
            return Space(
                fs.f_blocks * fs.f_frsize,
                fs.f_bavail * fs.f_frsize,
                f'fs:{os.stat(path).st_dev:x}',
            )

        return self._file_act('space', path, ask)

    def list(self, path: str) -> list[str]:
        """Return the names in a directory, sorted."""
        return self._file_act('list', path, lambda: sorted(os.listdir(path)))

    def make_directory(self, path: str) -> None:
        """Make a directory for this user alone, durably; its parents too."""

        def make() -> None:
            made = [path]
            while made[-1] and not os.path.isdir(made[-1]):
                made.append(os.path.dirname(made[-1]))
            os.makedirs(path, 0o700, exist_ok=True)
            for name in made[:-1]:
                _sync_directory(name)

        self._file_act('mkdir', path, make)

    def read(self, path: str, bytes_max: int = 1 << 20) -> bytes:
        """Return a small file's bytes.

        :raises NotFound: there is none
        :raises Invalid: it is larger than ``bytes_max``
        """

        def ask() -> bytes:
            with open(path, 'rb') as f:
                data = f.read(bytes_max + 1)
            if len(data) > bytes_max:
                raise errors.Invalid(f'{path} is over {bytes_max} bytes')
            return data

        return self._file_act('read', path, ask)

    def write(self, path: str, data: bytes) -> None:
        """Put a small file there, whole or not at all, durably."""
        draft = f'{path}.new'

        def put() -> None:
            with open(draft, 'wb') as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(draft, path)
            _sync_directory(path)

        self._file_act('write', path, put)

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, durably; an existing target is replaced.

        Never for a file that a daemon has open (a test holds us to that).
        """

        def move() -> None:
            os.replace(source, target)
            _sync_directory(target)
            if os.path.dirname(source) != os.path.dirname(target):
                _sync_directory(source)

        self._file_act('rename', target, move)

    def unlink(self, path: str) -> None:
        """Remove a file or link, durably; return at once if it is gone."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            _sync_directory(path)

        self._file_act('unlink', path, remove)

    def readlink(self, path: str) -> str:
        """Return what a link points to.

        :raises NotFound: there is no link
        """
        return self._file_act('readlink', path, lambda: os.readlink(path))

    def point(self, path: str, target: str) -> None:
        """Make ``path`` a link to ``target``, replacing it in one step."""
        draft = f'{path}.new'

        def switch() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
            os.symlink(target, draft)
            os.replace(draft, path)
            _sync_directory(path)

        self._file_act('point', path, switch)

    def clone_file(self, source: str, target: str) -> None:
        """Make ``target`` share the bytes of ``source`` (reflink), durably.

        :raises Unsupported: the file system cannot
        """

        def clone() -> None:
            with open(source, 'rb') as s, open(target, 'wb') as t:
                try:
                    fcntl.ioctl(t.fileno(), FICLONE, s.fileno())
                except OSError as failed:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(target)
                    if failed.errno in (
                        errno.EINVAL, errno.ENOTTY, errno.EXDEV,
                        errno.EOPNOTSUPP,
                    ):
                        raise errors.Unsupported(
                            f'{os.path.dirname(target)} has no reflink'
                        ) from failed
                    raise
                os.fsync(t.fileno())

        self._file_act('clone', target, clone)

    def _file_act(self, verb: str, path: str, effect: Callable[[], T]) -> T:
        def mapped() -> T:
            try:
                return effect()
            except OSError as failed:
                raise meaning(failed, f'{verb} {path}') from failed

        return self.act(
            f'{verb} {os.path.basename(path)}', lambda: self.blocking(mapped)
        )

    # Locks.

    @contextlib.contextmanager
    def hold(
        self,
        exclusive: Sequence[str] = (),
        shared: Sequence[str] = (),
        grace_s: float = 0.0,
    ) -> Iterator[None]:
        """Hold the locks of these objects, here and in every helper started.

        The lock lives as long as the last process that inherited it. Whoever
        asks has the lease already, so a holder that is left is a stalled
        predecessor or its orphan: it is killed after ``grace_s``, and waited
        for.

        :raises Unavailable: the holder could not be ended
        """
        with locks.hold(
            self.lock_dir, exclusive, shared, grace_s=grace_s
        ) as descriptors:
            token = _held.set((*_held.get(), *descriptors))
            try:
                yield
            finally:
                _held.reset(token)

    def forget_locks(self, names: Sequence[str]) -> None:
        """Remove the lock files of what no longer exists."""
        for name in names:
            locks.forget(self.lock_dir, name)


class File(io.RawIOBase):
    """A file of the node, unbuffered; writes and syncs are acts."""

    def __init__(self, node: Node, path: str, raw: io.FileIO) -> None:
        self._node = node
        self._path = path
        self._raw = raw

    def fileno(self) -> int:
        return self._raw.fileno()

    def readable(self) -> bool:
        return self._raw.readable()

    def writable(self) -> bool:
        return self._raw.writable()

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._raw.seek(offset, whence)

    def readinto(self, buffer: Any, /) -> int | None:
        try:
            return self._node.blocking(lambda: self._raw.readinto(buffer))
        except OSError as failed:
            raise meaning(failed, f'read {self._path}') from failed

    def pread_into(self, buffer: Any, offset_bytes: int) -> int:
        """Read from an offset, and leave the position where it is."""
        return self._node.blocking(
            lambda: os.preadv(self._raw.fileno(), [buffer], offset_bytes)
        )

    def write(self, data: Any, /) -> int:
        def put() -> int:
            left = memoryview(data).cast('B')
            total = len(left)
            while left:
                left = left[self._raw.write(left) or 0:]
            return total

        return self._act('write', put)

    def truncate(self, size: int | None = None, /) -> int:
        return self._act('truncate', lambda: self._raw.truncate(size))

    def punch(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a run read as zeros, and free what it stored if possible."""

        def hole() -> None:
            # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE; Python has no
            # wrapper, and ctypes' libc call is what util-linux does as well.
            _fallocate(self.fileno(), 0x01 | 0x02, offset_bytes, length_bytes)

        self._act('punch', hole)

    def begin_sync(self) -> None:
        """Have it begin to store what was written; wait for nothing."""
        # Waits for nothing, so a write that fails is told by ``sync`` alone.
        self._node.blocking(lambda: _begin_sync(self._raw.fileno()))

    def sync(self) -> None:
        """Make everything written so far durable."""
        self._act('sync', lambda: os.fsync(self.fileno()))

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _act(self, verb: str, effect: Callable[[], T]) -> T:
        return self._node._file_act(verb, self._path, effect)


class Reading(io.FileIO):
    """A file that was opened otherwise, to be read as a node's is."""

    def readinto(self, buffer: Any, /) -> int | None:
        read = super().readinto
        return concurrency.blocking(lambda: read(buffer))


def _mode(path: str) -> int | None:
    """Return the mode of what bears the name; ``None`` if nothing does.

    Not by os.path.lexists: it takes any failure for absence, and "gone" is
    never guessed.
    """
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return None


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path) or '.', os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(
        ctypes.c_int(fd), ctypes.c_int(mode),
        ctypes.c_int64(offset), ctypes.c_int64(length),
    )
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _begin_sync(fd: int) -> None:
    import ctypes

    # A hint: where there is no such call, ``sync`` has more to do.
    ctypes.CDLL(None).sync_file_range(
        fd, ctypes.c_int64(0), ctypes.c_int64(0), BEGIN_WRITE)
