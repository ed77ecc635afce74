# SPDX-License-Identifier: Apache-2.0
"""Another machine, reached over SSH; the same methods as this machine.

All requests of a service go through one connection, each one an act. It is
made when it is needed first, and again after it was lost; what was held
through the old one is lost with it, and whoever held it is told so at his
next request.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from volume import errors
from volume.commands import CommandFailed
from volume.commands import mask
from volume.locks import WAIT_S
from volume.machine import ops
from volume.machine.opened import Opened
from volume.node import Node
from volume.node import Op
from volume.node import Process
from volume.node import ReplyLength
from volume.remote import ssh
from volume.remote import wire
from volume.remote.link import Link
from volume.remote.link import SLACK_S
from volume.remote.opened import RemoteOpened

T = TypeVar('T')
P = ParamSpec('P')

PAUSE_S = 2.0  # after a connection that could not be made
HOLD_TRIES = 10
READ_SLACK_BYTES = 64 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class _Hold:
    """Locks that the agent holds for us; lost with the connection."""

    node: SshNode
    link: Link
    number: int


_holds: contextvars.ContextVar[tuple[_Hold, ...]] = contextvars.ContextVar(
    'holds', default=()
)


@contextlib.contextmanager
def _holding(held: _Hold) -> Iterator[None]:
    """Do everything under these locks, and give them back."""
    token = _holds.set((*_holds.get(), held))
    try:
        yield
    finally:
        _holds.reset(token)
        held.link.post('release', held.number)


class SshNode(Node):
    """A machine with an agent, at the other end of ssh."""

    is_remote = True

    def __init__(self, target: ssh.Target) -> None:
        super().__init__('', '')
        self.target = target
        self.address = target.address
        self._connecting = threading.Lock()
        self._link: Link | None = None
        self._refused_at = 0.0
        self._refusal = ''

    @property
    def state_dir(self) -> str:
        """The directory that the node's agent was given.

        :raises Unavailable: the node cannot be reached
        """
        return str(self._connected().hello['state_dir'])

    @property
    def lock_dir(self) -> str:
        return str(self._connected().hello['lock_dir'])

    def close(self) -> None:
        """Hang up; the next request connects again."""
        with self._connecting:
            if self._link is not None:
                self._link.close()
                self._link = None

    # Commands.

    def _run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        input_bytes: bytes,
        output_bytes_max: int,
        secrets: Sequence[str],
        watch: Callable[[float], None] | None,
    ) -> str:
        try:
            _, out = self._ask(
                'run', list(argv), timeout_s, output_bytes_max,
                watch is not None, payload=input_bytes, argv=argv,
                timeout_s=timeout_s + SLACK_S, watch=watch,
                # What is no UTF-8 takes more room as the agent sends it.
                bytes_max=3 * output_bytes_max,
            )
        except CommandFailed as failed:
            raise CommandFailed(
                argv, failed.code, mask(failed.stderr, secrets)
            ) from None
        return out.decode(errors='replace')

    # Files.

    def _open(self, path: str, mode: str) -> Opened:
        link, holds = self._at_hand()
        found, _ = link.call('open', path, mode, holds=holds)
        return RemoteOpened(link, holds, *found)

    def _by_name(
        self,
        function: Callable[Concatenate[str, P], T],
        path: str,
        *args: P.args,
        **options: P.kwargs,
    ) -> T:
        assert not options, 'arguments of a request have no names'
        verb = function.__name__
        payload = b''.join(a for a in args if isinstance(a, bytes))
        plain = [a for a in args if not isinstance(a, bytes)]
        # Only a read has a limit, and it is its own.
        bytes_max = READ_SLACK_BYTES + sum(
            a for a in plain if isinstance(a, int)
        )

        def ask() -> T:
            result, found = self._ask(
                verb, path, *plain, payload=payload, bytes_max=bytes_max,
                options={'payload': True} if len(plain) < len(args) else {},
            )
            answer: T = wire.decode(verb, result, found)
            return answer

        return self._file_act(verb.rstrip('_'), path, ask)

    def _file_act(self, verb: str, path: str, effect: Callable[[], T]) -> T:
        # It waits for a socket, as any greenthread may.
        return self.act(f'{verb} {os.path.basename(path)}', effect)

    def _file_look(self, verb: str, path: str, effect: Callable[[], T]) -> T:
        return self._file_act(verb, path, effect)

    # The kernel's settings, daemons and lasting processes.

    def configure(self, wanted: Sequence[Op]) -> Sequence[ops.Result]:
        if not wanted:
            return []
        verbs = ', '.join(dict.fromkeys(op.verb for op in wanted))
        result, _ = self.act(f'configure {verbs}', lambda: self._ask(
            'configure', [[op.verb, op.path, op.text] for op in wanted],
        ))
        return list(result)

    def talk(
        self,
        socket_path: str,
        request: bytes,
        timeout_s: float = 30.0,
        reply_bytes_max: int = 1 << 20,
        length: ReplyLength | None = None,
    ) -> bytes:
        _, reply = self.act(f'talk {socket_path}', lambda: self._ask(
            'talk', socket_path, timeout_s, reply_bytes_max,
            dataclasses.astuple(length) if length else None,
            payload=request, timeout_s=timeout_s + SLACK_S,
            bytes_max=reply_bytes_max,
        ))
        return bytes(reply)

    def start(self, argv: Sequence[str], log_path: str) -> Process:
        found, _ = self.act(
            f'start {argv[0]}',
            lambda: self._ask('start', list(argv), log_path),
        )
        return Process(*found)

    def is_running(self, process: Process) -> bool:
        found, _ = self.act(f'look at {process.pid}', lambda: self._ask(
            'is_running', process.pid, process.started
        ))
        return bool(found)

    def end(self, process: Process, timeout_s: float = 10.0) -> None:
        self.act(f'end {process.pid}', lambda: self._ask(
            'end', process.pid, process.started, timeout_s,
            timeout_s=timeout_s + SLACK_S,
        ))

    # Locks.

    @contextlib.contextmanager
    def hold(
        self,
        exclusive: Sequence[str] = (),
        shared: Sequence[str] = (),
        grace_s: float = 0.0,
        prove: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        wanted = sorted({*exclusive, *shared})
        if not wanted:
            yield
            return
        with _holding(self._take(wanted, list(exclusive), grace_s, prove)):
            yield

    @contextlib.contextmanager
    def borrow(self, path: str, wait_s: float) -> Iterator[None]:
        link, holds = self._at_hand()
        number, _ = self.act(f'borrow {os.path.basename(path)}', lambda: (
            link.call('borrow', path, wait_s, holds=holds,
                      timeout_s=wait_s + SLACK_S)
        ))
        with _holding(_Hold(self, link, int(number))):
            yield

    def forget_locks(self, names: Sequence[str]) -> None:
        # The agent removes those that nobody has used for a week: until
        # then they tell an owner who comes back that his time is over.
        pass

    def _take(
        self,
        wanted: Sequence[str],
        exclusive: Sequence[str],
        grace_s: float,
        prove: Callable[[], None] | None,
    ) -> _Hold:
        """Take the locks, by tickets that were seen before the proof."""
        link = self._connected()
        timeout_s = (grace_s + WAIT_S) * len(wanted) + SLACK_S
        for _ in range(HOLD_TRIES):
            seen, _ = self.act(
                'look at locks', lambda: link.call('tickets', wanted)
            )
            if prove is not None:
                prove()
            lock = functools.partial(
                link.call, 'hold', seen, exclusive, grace_s,
                timeout_s=timeout_s,
            )
            number, _ = self.act('lock', lock)
            if number is not None:
                return _Hold(self, link, int(number))
        raise errors.Unavailable(
            f'node {self.address}: the locks of {", ".join(wanted):.300} '
            'change hands all the time'
        )

    # The connection.

    def _ask(
        self, do: str, *args: Any, **options: Any
    ) -> tuple[Any, bytearray]:
        link, holds = self._at_hand()
        return link.call(do, *args, holds=holds, **options)

    def _at_hand(self) -> tuple[Link, tuple[int, ...]]:
        """Return the connection, and the locks that are held through it."""
        ours = [each for each in _holds.get() if each.node is self]
        for each in ours:
            if each.link.is_lost:
                raise errors.Unavailable(
                    f'node {self.address}: the connection was lost, and the '
                    'locks with it: nothing was done'
                )
        link = ours[0].link if ours else self._connected()
        return link, tuple(each.number for each in ours)

    def _connected(self) -> Link:
        """Return the connection, made anew if it was lost.

        :raises Unavailable: the node cannot be reached
        """
        with self._connecting:
            if self._link is not None and not self._link.is_lost:
                return self._link
            # Of many that wait here one tries, and the others hear of it.
            if time.monotonic() - self._refused_at < PAUSE_S:
                raise errors.Unavailable(self._refusal)
            try:
                self._link = self._connect()
            except errors.VolumeError as refused:
                self._refused_at = time.monotonic()
                self._refusal = str(refused)
                raise
            return self._link

    def _connect(self) -> Link:
        ssh.check_files(self.target)
        link = Link(self.address, self.target.argv(), self.target.explain)
        link.open()
        return link
