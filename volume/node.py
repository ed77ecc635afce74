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
import io
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, TYPE_CHECKING, TypeVar

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
from volume.machine import names
from volume.machine import ops
from volume.machine import processes
from volume.machine import qemulocks
from volume.machine import talk
from volume.machine import users
from volume.machine.names import About as About
from volume.machine.names import Space as Space
from volume.machine.opened import Opened
from volume.machine.ops import Op as Op
from volume.machine.processes import Process as Process
from volume.machine.talk import ReplyLength as ReplyLength

if TYPE_CHECKING:
    from volume.blockd import Blockd

LOG = logging.getLogger(__name__)

T = TypeVar('T')
P = ParamSpec('P')

held: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar(
    'held', default=()
)
"""Descriptors of the locks that a command inherits."""


class Node:
    """This machine."""

    is_remote: bool = False
    """Whether several services may reach it, from other machines."""

    address = ''
    """Where it is, if it is another machine than this."""

    def __init__(self, state_dir: str, lock_dir: str = '') -> None:
        self._state_dir = state_dir
        self._lock_dir = lock_dir or os.path.join(state_dir, 'locks')
        self.blockd: Blockd | None = None
        self.neighbours: dict[Any, Node] = {}
        """Other machines that this one works on, each with one connection."""

    @property
    def state_dir(self) -> str:
        """A directory of this node, for what must be known after a restart."""
        return self._state_dir

    @property
    def lock_dir(self) -> str:
        return self._lock_dir

    def close(self) -> None:
        """Let go of a connection, if there is one; it is made again."""

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
                lambda: self._run(
                    full, timeout_s, input_bytes, output_bytes_max, secrets,
                    watch,
                ),
            )
        finally:
            if LOG.isEnabledFor(logging.DEBUG):
                LOG.debug(
                    'ran %s in %.3f s', mask(shlex.join(argv), secrets),
                    time.monotonic() - started,
                )

    def _run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        input_bytes: bytes,
        output_bytes_max: int,
        secrets: Sequence[str],
        watch: Callable[[float], None] | None,
    ) -> str:
        return commands.run(
            list(argv), held.get(), timeout_s, input_bytes, output_bytes_max,
            secrets, watch, self._tick,
        )

    def _tick(self) -> None:
        """End a running command by raising; called a few times a second."""

    # Files.

    def open(self, path: str, mode: str = 'rb') -> File:
        """Open a file unbuffered; each write of it is an act of its own."""
        return self._file_act(
            'open', path, lambda: File(self, path, self._open(path, mode))
        )

    def _open(self, path: str, mode: str) -> Opened:
        return Opened(path, mode)

    def about(self, path: str) -> About | None:
        """Return what bears the name, a link as one; None if nothing does."""
        return self._by_name(names.about, path)

    def exists(self, path: str) -> bool:
        """Say whether the name is there; a dangling link is."""
        return self._by_name(names.exists, path)

    def is_file(self, path: str) -> bool:
        """Say whether the name is a plain file, and not a link to one."""
        return self._by_name(names.is_file, path)

    def is_block(self, path: str) -> bool:
        """Say whether the name is a block device, or a link to one."""
        return self._by_name(names.is_block, path)

    def size(self, path: str) -> int:
        """Return the size of the file or block device in bytes.

        :raises NotFound: there is none
        """
        return self._by_name(names.size, path)

    def allocated_bytes(self, path: str) -> int:
        """Return how much of the file is stored; zero if it is gone."""
        return self._by_name(names.allocated, path)

    def space(self, path: str) -> Space:
        """Return the capacity of the file system that holds a path."""
        return self._by_name(names.space, path)

    def list(self, path: str) -> list[str]:
        """Return the names in a directory, sorted."""
        return self._by_name(names.list_, path)

    def older(
        self, path: str, age_s: float, others: Sequence[str]
    ) -> Sequence[str]:
        """Return which of these names beside a path are so much older.

        By the clock of their file system alone: no two are compared.
        """
        return self._by_name(names.older, path, age_s, [*others])

    def make_directory(self, path: str) -> None:
        """Make a directory for this user alone, durably; its parents too."""
        self._by_name(names.mkdir, path)

    def read(self, path: str, bytes_max: int = 1 << 20) -> bytes:
        """Return a small file's bytes.

        :raises NotFound: there is none
        :raises Invalid: it is larger than ``bytes_max``
        """
        return self._by_name(names.read, path, bytes_max)

    def write(self, path: str, data: bytes) -> None:
        """Put a small file there, whole or not at all, durably."""
        self._by_name(names.write, path, data)

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, durably; an existing target is replaced.

        Never for a file that a daemon has open (a test holds us to that).
        """
        self._by_name(names.rename, target, source)

    def link(self, draft: str, path: str) -> None:
        """Give a draft its name, unless something has it already."""
        self._by_name(names.link, path, draft)

    def hard_link(self, source: str, path: str) -> None:
        """Give a file a second name; it keeps its own.

        :raises Unsupported: its file system has no hard links
        """
        self._by_name(names.hard_link, path, source)

    def unlink(self, path: str) -> None:
        """Remove a file or link, durably; return at once if it is gone."""
        self._by_name(names.unlink, path)

    def readlink(self, path: str) -> str:
        """Return what a link points to.

        :raises NotFound: there is no link
        """
        return self._by_name(names.readlink, path)

    def point(self, path: str, target: str) -> None:
        """Make ``path`` a link to ``target``, replacing it in one step."""
        self._by_name(names.point, path, target)

    def clone_file(self, source: str, target: str) -> None:
        """Make ``target`` share the bytes of ``source`` (reflink), durably.

        :raises Unsupported: the file system cannot
        """
        self._by_name(names.clone, target, source)

    def is_open_in_qemu(self, path: str) -> bool:
        """Say whether a QEMU has the file open; one that is gone nobody has.
        """
        return self._by_name(qemulocks.probe, path)

    def users(self, path: str, known: Sequence[int] = ()) -> Sequence[str]:
        """Say who uses a file or block device, each in a few words.

        Ask as root: of the processes of others nobody else sees anything.
        Of a file whose server may be dead say what is ``known``, its device
        and its inode: then the server is not asked.
        """
        return self._by_name(users.users, path, [*known])

    def _by_name(
        self,
        function: Callable[Concatenate[str, P], T],
        path: str,
        *args: P.args,
        **options: P.kwargs,
    ) -> T:
        return self._file_act(
            function.__name__.rstrip('_'), path,
            lambda: function(path, *args, **options),
        )

    def _file_act(self, verb: str, path: str, effect: Callable[[], T]) -> T:
        return self.act(
            f'{verb} {os.path.basename(path)}',
            lambda: self._file_look(verb, path, effect),
        )

    def _file_look(self, verb: str, path: str, effect: Callable[[], T]) -> T:
        """As an act, for what nothing depends on if it fails."""

        def mapped() -> T:
            try:
                return effect()
            except OSError as failed:
                raise meaning(failed, f'{verb} {path}') from failed

        return self.blocking(mapped)

    # The kernel's settings, daemons and lasting processes.

    def load_modules(self, *modules: str) -> None:
        """Have modules of the kernel; those that are there are not loaded.

        :raises Unsupported: it has none such, or nothing can load it
        """
        missing = [
            each for each in modules
            if not self.exists(f'/sys/module/{each.replace("-", "_")}')
        ]
        if not missing:
            return
        what = f'module {", ".join(missing)} of the kernel'
        where = f'machine {self.address or socket.gethostname()}'
        try:
            self.run('modprobe', '-a', *missing)
        except CommandFailed as failed:
            raise errors.Unsupported(
                f'{where} cannot load {what} ({failed}): install a kernel '
                'that has it; in a container, load it outside'
            ) from failed
        except errors.Unavailable as failed:
            places = ENVIRONMENT['PATH'].split(':')
            if any(self.exists(f'{each}/modprobe') for each in places):
                raise
            raise errors.Unsupported(
                f'{where} has no modprobe to load {what} with: install kmod '
                'there; in a container, load it outside'
            ) from failed

    def configure(self, wanted: Sequence[Op]) -> Sequence[ops.Result]:
        """Do small operations on configfs or sysfs, in order.

        Return what each has found: a text or None for ``get``, names or
        None for ``list``, a truth for ``exists``, else None. The first that
        fails ends it, and is named in the error; those before it are done.
        What is put into a file stands in no message.
        """
        return [self._configure(op) for op in wanted]

    def _configure(self, op: Op) -> ops.Result:
        return self.act(
            f'{op.verb} {os.path.basename(op.path)}',
            lambda: self.blocking(lambda: ops.run(op)),
        )

    def talk(
        self,
        socket_path: str,
        request: bytes,
        timeout_s: float = 30.0,
        reply_bytes_max: int = 1 << 20,
        length: ReplyLength | None = None,
    ) -> bytes:
        """Have one exchange with a daemon; return its reply.

        The reply ends where ``length`` finds that it says so; without one,
        where the daemon hangs up.

        :raises Unavailable: nobody listens there; nothing happened
        :raises Unknown: it was sent, and the reply is not whole
        """
        return self.act(
            f'talk {os.path.basename(socket_path)}',
            lambda: talk.exchange(
                socket_path, request, timeout_s, reply_bytes_max, length
            ),
        )

    def start(self, argv: Sequence[str], log_path: str) -> Process:
        """Start a process that outlives us, in a session of its own.

        It inherits nothing, no lock either; what it prints is added to the
        log.

        :raises Unavailable: it is not installed
        """
        return self.act(
            f'start {os.path.basename(argv[0])}',
            lambda: processes.start(argv, log_path),
        )

    def is_running(self, process: Process) -> bool:
        """Say whether this very process runs, and no other of its number."""
        return self.act(
            f'look at {process.pid}', lambda: processes.is_running(process)
        )

    def end(self, process: Process, timeout_s: float = 10.0) -> None:
        """Ask a process to end, and kill it if it has not in that time.

        :raises Unavailable: it does not end, or may not be ended from here
        """
        self.act(
            f'end {process.pid}', lambda: processes.end(process, timeout_s)
        )

    # Locks.

    @contextlib.contextmanager
    def hold(
        self,
        exclusive: Sequence[str] = (),
        shared: Sequence[str] = (),
        grace_s: float = 0.0,
        prove: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """Hold the locks of these objects, here and in every helper started.

        The lock lives as long as the last process that inherited it. Whoever
        asks has the lease already, so a holder that is left is a stalled
        predecessor or its orphan: it is ended after ``grace_s``, and waited
        for. A node that others share as well calls ``prove``, which raises
        if the lease is lost, before it takes anything from anyone.

        :raises Unavailable: the holder could not be ended
        """
        with locks.hold(
            self.lock_dir, exclusive, shared, grace_s=grace_s
        ) as descriptors:
            token = held.set((*held.get(), *descriptors.values()))
            try:
                yield
            finally:
                held.reset(token)

    @contextlib.contextmanager
    def borrow(self, path: str, wait_s: float) -> Iterator[None]:
        """Hold a lock file (flock) that another program goes by.

        Here and in every command started meanwhile. Nobody is ended for it.

        :raises Unavailable: it is still held after that time, or cannot be
            had
        """
        with locks.borrow(path, wait_s, self._tick) as descriptor:
            token = held.set((*held.get(), descriptor))
            try:
                yield
            finally:
                held.reset(token)

    def forget_locks(self, names: Sequence[str]) -> None:
        """Remove the lock files of what no longer exists."""
        for name in names:
            locks.forget(self.lock_dir, name)


class File(io.RawIOBase):
    """A file or block device of the node, unbuffered.

    What changes it is an act; it is used by a position, or by offsets.
    """

    def __init__(self, node: Node, path: str, opened: Opened) -> None:
        self._node = node
        self._path = path
        self._opened = opened
        self._position = 0

    def fileno(self) -> int:
        """Return the descriptor, which is there on this machine alone."""
        return self._opened.fileno()

    def readable(self) -> bool:
        return self._opened.readable

    def writable(self) -> bool:
        return self._opened.writable

    def seekable(self) -> bool:
        return True

    @property
    def size_bytes(self) -> int:
        """How large the file or block device is now."""
        return self._look('size', self._opened.size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        if start is None:
            start = self.size_bytes
        if start + offset < 0:
            raise errors.Invalid(f'cannot seek to {offset} in {self._path}')
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        count = self.pread_into(buffer, self._position)
        self._position += count
        return count

    def pread_into(self, buffer: Any, offset_bytes: int) -> int:
        """Read from an offset, and leave the position where it is.

        What one call of the kernel brings; nothing at the end.
        """
        return self._look(
            'read', lambda: self._opened.pread_into(buffer, offset_bytes)
        )

    def write(self, data: Any, /) -> int:
        count = self.pwrite(data, self._position)
        self._position += count
        return count

    def pwrite(self, data: Any, offset_bytes: int) -> int:
        """Write all of it at an offset; the position stays where it is."""
        return self._act(
            'write', lambda: self._opened.pwrite(data, offset_bytes)
        )

    def truncate(self, size: int | None = None, /) -> int:
        size_bytes = self._position if size is None else size
        self._act('truncate', lambda: self._opened.truncate(size_bytes))
        return size_bytes

    def punch(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a run read as zeros, and free what it stored."""
        self._act(
            'punch', lambda: self._opened.punch(offset_bytes, length_bytes)
        )

    def zero_out(
        self, offset_bytes: int, length_bytes: int, may_free: bool = False
    ) -> bool:
        """Make a run read as zeros, by the quickest way that there is.

        With ``may_free`` what it stored may be given back; without, it
        stays allocated where the storage allows it. Say whether it was
        freed, and nothing was written.

        It is one request, which nobody can stop: ask for a large run in
        pieces.
        """
        return self._act('zero', lambda: self._opened.zero_out(
            offset_bytes, length_bytes, may_free
        ))

    def find(self, offset_bytes: int, is_data: bool) -> int:
        """Return where the next data (or the next hole) begins, or the size.
        """
        return self._look(
            'find', lambda: self._opened.find(offset_bytes, is_data)
        )

    def begin_sync(self) -> None:
        """Have it begin to store what was written; wait for nothing."""
        # Waits for nothing, so a write that fails is told by ``sync`` alone.
        self._look('begin to sync', self._opened.begin_sync)

    def sync(self) -> None:
        """Make everything written so far durable."""
        self._act('sync', self._opened.sync)

    def close(self) -> None:
        self._opened.close()
        super().close()

    def _act(self, verb: str, effect: Callable[[], T]) -> T:
        return self._node._file_act(verb, self._path, effect)

    def _look(self, verb: str, effect: Callable[[], T]) -> T:
        return self._node._file_look(verb, self._path, effect)


class Reading(io.FileIO):
    """A file that was opened otherwise, to be read as a node's is."""

    def readinto(self, buffer: Any, /) -> int | None:
        read = super().readinto
        return concurrency.blocking(lambda: read(buffer))
