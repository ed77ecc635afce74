# SPDX-License-Identifier: Apache-2.0
"""Conversations with QEMU's monitors (QMP).

A monitor serves one client at a time, and a stopped client would block its
successor. So a daemon has several; each is taken for one batch of commands,
under an flock, and the next one is tried if it is taken. Everything is
bounded: the wait for a monitor, for a reply, and the size of a reply.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from volume import errors
from volume.node import meaning
from volume.node import Node

LOG = logging.getLogger(__name__)

MONITORS = 4
WAIT_S = 15.0  # for a free monitor
GREETING_S = 5.0
REPLY_S = 60.0
REPLY_BYTES_MAX = 1 << 27  # 3,000 exports with their layers are 10 MiB
RECEIVE_BYTES = 1 << 16
Command = tuple[str, Mapping[str, Any]]
UCRED = struct.Struct('3i')  # pid, uid, gid


class Refused(errors.VolumeError):
    """The monitor answered with an error: the command did nothing."""


class NotRunning(errors.Unavailable):
    """Nobody listens: there is no daemon, so nothing can have happened."""


class Monitor:
    """One conversation; it ends with the batch, or with the first doubt."""

    def __init__(self, node: Node, sock: socket.socket) -> None:
        self._node = node
        self._sock = sock
        self._buffer = bytearray()
        self._serial = 0

    @property
    def pid(self) -> int:
        """The process that listens; the kernel's word, nobody else's."""
        credentials = self._sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size
        )
        pid: int = UCRED.unpack(credentials)[0]
        return pid

    def greet(self, timeout_s: float = GREETING_S) -> None:
        """Read the greeting and agree on no capabilities.

        :raises Unavailable: no greeting: somebody else has the monitor
        """
        deadline = time.monotonic() + timeout_s
        try:
            if 'QMP' not in self._receive(deadline):
                raise errors.Unavailable('what listens there is no QEMU')
            self._command('qmp_capabilities', {}, deadline)
        except (errors.Unknown, Refused) as failed:
            raise errors.Unavailable(
                f'the monitor does not answer: {failed}'
            ) from failed

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command that changes nothing.

        :raises Unavailable: no answer
        """
        try:
            return self.tell(command, **arguments)
        except errors.Unknown as failed:
            raise errors.Unavailable(str(failed)) from failed

    def tell(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returns.

        :raises Refused: the daemon's answer is an error
        :raises Unknown: the answer was lost
        """
        return self._node.act(
            f'qmp {command}',
            lambda: self._command(
                command, arguments, time.monotonic() + REPLY_S
            ),
        )

    def tell_all(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands one after another; return what each returned.

        A ``Refused`` stands where a command was refused: those behind it
        run all the same. All are sent at once, so that the daemon reads one
        while it runs another.

        :raises Unknown: an answer was lost; those before it are too
        """
        return self._node.act(
            'qmp batch',
            lambda: self._commands(commands, time.monotonic() + REPLY_S),
        )

    def wait(self, timeout_s: float) -> None:
        """Return when an event arrives, or after the time.

        It is a hint to ask again, never an answer.
        """
        with contextlib.suppress(errors.Unknown):
            self._receive(time.monotonic() + timeout_s)

    def _command(
        self, command: str, arguments: Mapping[str, Any], deadline: float
    ) -> Any:
        self._serial += 1
        line = _line(command, arguments, self._serial)
        self._send(command, line, deadline)
        reply = self._answer(command, self._serial, deadline)
        # No arguments: they may hold what is nobody's business.
        LOG.debug('qmp %s: done', command)
        return reply['return']

    def _commands(
        self, commands: Sequence[Command], deadline: float
    ) -> list[Any]:
        first = self._serial + 1
        self._serial += len(commands)
        lines = [
            _line(command, arguments, serial)
            for serial, (command, arguments) in enumerate(commands, first)
        ]
        self._send('batch', b''.join(lines), deadline)
        replies: list[Any] = []
        for serial, (command, _) in enumerate(commands, first):
            try:
                replies.append(
                    self._answer(command, serial, deadline)['return']
                )
            except Refused as refused:
                replies.append(refused)
        return replies

    def _send(self, what: str, lines: bytes, deadline: float) -> None:
        try:
            self._sock.settimeout(max(0.01, deadline - time.monotonic()))
            self._sock.sendall(lines)
        except OSError as failed:
            raise errors.Unknown(f'qmp {what}: {failed}') from failed

    def _answer(
        self, command: str, serial: int, deadline: float
    ) -> dict[str, Any]:
        """Return the reply to a command.

        :raises Refused: it is an error
        """
        while True:
            reply = self._receive(deadline)
            if reply.get('id') == serial:
                break
            # An event, or a stray line: not ours to answer.
        if 'error' in reply:
            raise Refused(
                f'qmp {command}: {reply["error"].get("desc", "")!s:.400}'
            )
        if 'return' not in reply:
            raise errors.Unknown(f'qmp {command}: no return, no error')
        return reply

    def _receive(self, deadline: float) -> dict[str, Any]:
        """Return the next JSON object, one a line."""
        seen = 0
        while (end := self._buffer.find(b'\n', seen)) < 0:
            seen = len(self._buffer)
            if seen > REPLY_BYTES_MAX:
                raise errors.Unknown(f'a line over {REPLY_BYTES_MAX} bytes')
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise errors.Unknown('no answer in time')
            self._sock.settimeout(left_s)
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except OSError as failed:
                raise errors.Unknown(f'no answer: {failed}') from failed
            if not data:
                raise errors.Unknown('the daemon hung up')
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 1]
        try:
            found = json.loads(line)
        except ValueError as failed:
            raise errors.Unknown(f'no JSON: {line!r:.80}') from failed
        if not isinstance(found, dict):
            raise errors.Unknown(f'no JSON object: {line!r:.80}')
        return found


def _line(command: str, arguments: Mapping[str, Any], serial: int) -> bytes:
    """Return a command as it is sent, without a byte too many.

    QEMU reads its monitors byte by byte: 4 µs each, more than most commands
    take to run.
    """
    return json.dumps(
        {'execute': command, 'arguments': arguments, 'id': serial},
        separators=(',', ':'),
    ).encode() + b'\n'


def paths(directory: str) -> list[str]:
    """Return the monitors' socket paths."""
    return [os.path.join(directory, f'q{i}') for i in range(MONITORS)]


def answers(node: Node, path: str, timeout_s: float) -> bool:
    """Say whether a monitor answers there now; no act, a look."""
    with contextlib.suppress(errors.VolumeError), _dial(path) as sock:
        Monitor(node, sock).greet(timeout_s)
        return True
    return False


@contextlib.contextmanager
def conversation(node: Node, directory: str) -> Iterator[Monitor]:
    """Take a free monitor for one batch of commands.

    :raises NotRunning: there is no daemon
    :raises Unavailable: all monitors stay taken, or none answers
    """
    with contextlib.ExitStack() as stack:
        monitor = node.act(
            'qmp connect', lambda: _take(stack, node, directory)
        )
        yield monitor


def _take(
    stack: contextlib.ExitStack, node: Node, directory: str
) -> Monitor:
    deadline = time.monotonic() + WAIT_S
    pause_s = 0.001
    trouble = 'all monitors are taken'
    while True:
        for path in paths(directory):
            with contextlib.ExitStack() as attempt:
                try:
                    if not attempt.enter_context(_reserved(f'{path}.lock')):
                        continue
                    sock = attempt.enter_context(_dial(path))
                    monitor = Monitor(node, sock)
                    monitor.greet()
                except NotRunning:
                    raise
                except errors.Unavailable as failed:
                    # Held by a stranger, or half dead: the next may do.
                    trouble = str(failed)
                    continue
                stack.enter_context(attempt.pop_all())
                return monitor
        if time.monotonic() > deadline:
            raise errors.Unavailable(
                f'no monitor of the block daemon in {directory} could be '
                f'had within {WAIT_S:g} s: {trouble}'
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.05)


@contextlib.contextmanager
def _reserved(path: str) -> Iterator[bool]:
    """Hold a monitor's lock; say whether it was free."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as absent:
        raise NotRunning(f'{path}: no such directory') from absent
    except OSError as failed:
        raise meaning(failed, f'open {path}') from failed
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def _dial(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(GREETING_S)
    try:
        sock.connect(path)
    except OSError as failed:
        sock.close()
        if failed.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise NotRunning(
                f'no block daemon listens on {path}'
            ) from failed
        raise errors.Unavailable(f'{path}: {failed}') from failed
    return sock
