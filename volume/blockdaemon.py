# SPDX-License-Identifier: Apache-2.0
"""The process of the block daemon: start it, find it again, end it.

It has a session of its own, so that it outlives us; its pid is recorded with
its start time, so that nobody else's process is ever taken for it. It is
started outside of every lock that the caller holds: a daemon that inherited
a volume's lock would be killed by the volume's next owner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import logging
import os
import resource
import signal
import subprocess
import time
import urllib.parse
from collections.abc import Iterator

from volume import errors
from volume import qmp
from volume.node import ENVIRONMENT
from volume.node import Node

LOG = logging.getLogger(__name__)

PROGRAM = 'qemu-storage-daemon'
FILES_WANTED = 65_536
FILES_MIN = 4_096
SOCKET_PATH_BYTES_MAX = 107  # sun_path, and its zero byte
START_S = 15.0
# One start in some ten thousand is deaf: QEMU loses the wake-up of who answers
# its monitors. Nobody has anything of a daemon that has just begun.
ANSWER_S, STARTS = 5.0, 3
STOP_S = 10.0
LOCK_S = 40.0
LOG_BYTES_MAX = 1 << 20

# Those that this process started, to be reaped when they have ended: they
# are the process's children, whichever object started them.
_children: list[subprocess.Popen[bytes]] = []


class _Deaf(errors.Unavailable):
    """It runs, and its monitors answer nobody."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What ``daemon.json`` says: the address, and who was started."""

    address: str
    pid: int = 0
    start: int = 0


class Process:
    """One qemu-storage-daemon and the directory that it lives in."""

    def __init__(self, node: Node, directory: str, tcp: str | None) -> None:
        self._node = node
        self._directory = directory
        self._tcp = tcp
        if tcp is not None:
            _loopback(tcp)

    def uri(self, name: str) -> str:
        """Return the NBD URI of an export."""
        if self._tcp is not None:
            return f'nbd://{self._tcp}/{name}'
        socket_path = urllib.parse.quote(self._path('nbd'), safe='/')
        return f'nbd+unix:///{name}?socket={socket_path}'

    def bring_up(self) -> None:
        """Adopt the daemon that runs, or start one.

        :raises Unavailable: it does not start, or does not answer
        """
        self._check_paths()
        with self._locked():
            try:
                with qmp.conversation(
                    self._node, self._directory
                ) as monitor:
                    pid = monitor.pid
            except qmp.NotRunning:
                self.check_gone()
                self._start()
            else:
                self._adopt(pid)

    def take_news(self) -> bool:
        """Say whether it was started since this was last asked."""
        marker = self._path('started')
        if not self._node.exists(marker):
            return False
        self._node.unlink(marker)
        return True

    def check_gone(self) -> None:
        """Make sure that a daemon whose sockets are gone is gone too.

        :raises Unavailable: it still runs, and may have files open
        """
        record = self._record()
        if record and _runs(record):
            raise errors.Unavailable(
                f'the block daemon, process {record.pid}, runs but does not '
                f'listen in {self._directory}: it is ending, or its sockets '
                'were removed; wait, or end it'
            )

    def stop(self) -> None:
        """End the daemon; return at once if it is not running.

        :raises Unavailable: it did not end
        """
        if not os.path.isdir(self._directory):
            return
        with self._locked():
            record = self._running()
            if record:
                self._node.act(
                    f'stop {PROGRAM}', lambda: self._end(record)
                )
            _reap()

    # Ours alone.

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    @property
    def _address(self) -> str:
        return self._tcp or self._path('nbd')

    def _running(self) -> Record | None:
        """Return who runs, by the record or by whom the monitor names."""
        record = self._record()
        if record and _runs(record):
            return record
        try:
            with qmp.conversation(self._node, self._directory) as monitor:
                pid = monitor.pid
        except qmp.NotRunning:
            return None
        return Record(self._address, pid, _start_time(pid) or 0)

    def _adopt(self, pid: int) -> None:
        record = self._record()
        if record and record.address != self._address:
            raise errors.Unavailable(
                f'the block daemon that runs serves {record.address}, not '
                f'{self._address}: stop it when nothing is attached, or set '
                'the address back'
            )
        found = Record(self._address, pid, _start_time(pid) or 0)
        if found != record:
            self._keep(found)
        _raise_files(pid)

    def _check_paths(self) -> None:
        longest = max(
            (*qmp.paths(self._directory), self._path('nbd')), key=len
        )
        if len(os.fsencode(longest)) > SOCKET_PATH_BYTES_MAX:
            raise errors.Invalid(
                f'{longest} is over {SOCKET_PATH_BYTES_MAX} bytes, the most '
                'a unix socket may have; use a shorter state_path'
            )

    def _start(self) -> None:
        log = self._path('log')
        if (
            self._node.exists(log)
            and self._node.size(log) > LOG_BYTES_MAX
        ):
            self._node.rename(log, f'{log}.old')
        self._node.write(self._path('started'), b'')
        self._keep(Record(self._address))
        pid = self._node.act(f'start {PROGRAM}', self._spawn)
        self._keep(Record(self._address, pid, _start_time(pid) or 0))

    def _spawn(self) -> int:
        for _ in range(STARTS - 1):
            with contextlib.suppress(_Deaf):
                return self._spawn_one()
            LOG.warning('%s answers nobody: started anew', PROGRAM)
        return self._spawn_one()

    def _spawn_one(self) -> int:
        argv = self._argv()
        fd = os.open(
            self._path('log'), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        try:
            from_bytes = os.fstat(fd).st_size
            # No pass_fds: it inherits no lock. A session of its own: no
            # signal of ours reaches it.
            child = subprocess.Popen(
                argv, env=ENVIRONMENT, cwd='/', umask=0o077,
                stdin=subprocess.DEVNULL, stdout=fd, stderr=fd,
                start_new_session=True,
            )
        except FileNotFoundError as missing:
            raise errors.Unavailable(
                f'{argv[0]} is not installed'
            ) from missing
        finally:
            os.close(fd)
        _children.append(child)
        try:
            self._await(child, from_bytes)
            _raise_files(child.pid)
        except BaseException:
            child.kill()
            child.wait()
            raise
        return child.pid

    def _argv(self) -> list[str]:
        files = _files()
        argv = ['prlimit', f'--nofile={files}:{files}', PROGRAM]
        for index, path in enumerate(qmp.paths(self._directory)):
            argv += [
                '--chardev',
                f'socket,id=c{index},path={_quoted(path)},'
                'server=on,wait=off',
                '--monitor', f'chardev=c{index}',
            ]
        if self._tcp is None:
            server = f'addr.type=unix,addr.path={_quoted(self._path("nbd"))}'
        else:
            host, port = _loopback(self._tcp)
            server = f'addr.type=inet,addr.host={host},addr.port={port}'
        return [
            *argv, '--nbd-server', server,
            # QEMU locks it: a second daemon in this directory ends at once.
            '--pidfile', self._path('pid'),
        ]

    def _await(self, child: subprocess.Popen[bytes], from_bytes: int) -> None:
        """Wait until the last monitor answers, or the daemon has ended.

        :raises _Deaf: it has set up all, and does not answer
        """
        deadline = time.monotonic() + START_S
        while not self._wrote_pid(child.pid):
            if child.poll() is not None:
                raise errors.Unavailable(
                    f'{PROGRAM} does not start: {self._said(from_bytes)}'
                )
            if time.monotonic() > deadline:
                raise errors.Unavailable(
                    f'{PROGRAM} was not ready within {START_S:g} s: '
                    f'{self._said(from_bytes)}'
                )
            time.sleep(0.002)
        ready = qmp.paths(self._directory)[-1]
        if not qmp.answers(self._node, ready, ANSWER_S):
            raise _Deaf(
                f'{PROGRAM} does not answer within {ANSWER_S:g} s: '
                f'{self._said(from_bytes)}'
            )

    def _wrote_pid(self, pid: int) -> bool:
        """Say whether it has: it does so when all else is set up."""
        try:
            with open(self._path('pid'), 'rb') as f:
                return f.read(20).strip() == str(pid).encode()
        except FileNotFoundError:
            return False

    def _said(self, from_bytes: int) -> str:
        with open(self._path('log'), 'rb') as f:
            f.seek(from_bytes)
            lines = f.read(4096).decode(errors='replace').splitlines()
        return lines[-1] if lines else 'it said nothing'

    def _record(self) -> Record | None:
        try:
            found = json.loads(self._node.read(self._path('daemon.json')))
            return Record(
                str(found['address']), int(found['pid']), int(found['start'])
            )
        except (errors.NotFound, ValueError, KeyError, TypeError):
            return None

    def _keep(self, record: Record) -> None:
        self._node.write(
            self._path('daemon.json'),
            json.dumps(dataclasses.asdict(record)).encode(),
        )

    def _end(self, record: Record) -> None:
        try:
            fd = os.pidfd_open(record.pid)
        except ProcessLookupError:
            return
        try:
            # The descriptor is of the process whose start we check now; a
            # pid alone could mean another one a moment later.
            for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGKILL):
                if not _runs(record):
                    return
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, number)
                if number != signal.SIGTERM:
                    self._await_end(record)
            if _runs(record):
                raise errors.Unavailable(
                    f'the block daemon, process {record.pid}, does not end; '
                    'it hangs in the storage'
                )
        finally:
            os.close(fd)
            _reap()

    def _await_end(self, record: Record) -> None:
        deadline = time.monotonic() + STOP_S
        while _runs(record) and time.monotonic() < deadline:
            _reap()
            time.sleep(0.005)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one start or stop at a time happen, in any process."""
        self._node.make_directory(self._directory)
        if os.stat(self._directory).st_mode & 0o077:
            self._node.act(
                'chmod blockd', lambda: os.chmod(self._directory, 0o700)
            )
        fd = os.open(
            self._path('lock'), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        deadline = time.monotonic() + LOCK_S
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise errors.Unavailable(
                            'another process starts or stops the block '
                            f'daemon for over {LOCK_S:g} s'
                        ) from None
                    time.sleep(0.005)
            yield
        finally:
            os.close(fd)


def files_of(node: Node, pid: int) -> frozenset[str]:
    """Return the paths of files that a process has open, if we may look.

    One that was closed and opened anew meanwhile may be missing.
    """
    directory = f'/proc/{pid}/fd'

    def look() -> frozenset[str]:
        found = set()
        with contextlib.suppress(OSError):
            for name in os.listdir(directory):
                with contextlib.suppress(OSError):
                    path = os.readlink(f'{directory}/{name}')
                    found.add(path.removesuffix(' (deleted)'))
        return frozenset(found)

    return node.act(f'look at files of {PROGRAM}', look)


def _loopback(tcp: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[host]:port``.

    :raises Invalid: it is no such thing, or not loopback
    """
    host, _, port = tcp.rpartition(':')
    try:
        address = ipaddress.ip_address(host.strip('[]'))
        if not (port.isdecimal() and 0 < int(port) < 1 << 16):
            raise ValueError('no port')
        if (address.version == 6) != host.startswith('['):
            raise ValueError('brackets are for IPv6')
    except ValueError as failed:
        raise errors.Invalid(
            f'{tcp!r:.80} is no NBD address: say 127.0.0.1:PORT ({failed})'
        ) from failed
    if not address.is_loopback:
        raise errors.Invalid(
            f'the NBD server may not listen on {host}: it would let anybody '
            'who reaches it use every volume; use a loopback address'
        )
    return str(address), int(port)


def _files() -> int:
    """Return how many files the daemon may have open.

    :raises Unavailable: too few for a service
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = FILES_WANTED
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if files < FILES_MIN:
        raise errors.Unavailable(
            f'this process may have {files} files open, the block daemon '
            f'needs {FILES_MIN}: raise LimitNOFILE, or ulimit -Hn'
        )
    return files


def _raise_files(pid: int) -> None:
    """Check the limit that a running daemon has, and raise it if needed.

    :raises Unavailable: it is too low and cannot be raised
    """
    try:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        if FILES_MIN <= soft or soft == resource.RLIM_INFINITY:
            return
        wanted = _files()
        resource.prlimit(
            pid, resource.RLIMIT_NOFILE, (wanted, max(wanted, hard))
        )
    except (OSError, ValueError) as failed:
        raise errors.Unavailable(
            f'the block daemon, process {pid}, has too low a limit of open '
            f'files, and it cannot be raised: {failed}'
        ) from failed


def _start_time(pid: int) -> int | None:
    """Return when a process started, in ticks; none if it has ended."""
    try:
        with open(f'/proc/{pid}/stat', 'rb') as f:
            # The name in parentheses may hold anything, parentheses too.
            fields = f.read(4096).rpartition(b')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A thread that writes may outlive the first one, which is shown.
    if fields[0] == b'X' or (fields[0] == b'Z' and _threads(pid) < 2):
        return None
    return int(fields[19])


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f'/proc/{pid}/task'))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _reap() -> None:
    """Take note of the daemons of ours that have ended."""
    _children[:] = [child for child in _children if child.poll() is None]


def _runs(record: Record) -> bool:
    return record.pid > 0 and _start_time(record.pid) == record.start


def _quoted(path: str) -> str:
    """Return a path for QEMU's ``key=value,…``: a comma is said twice."""
    return path.replace(',', ',,')
