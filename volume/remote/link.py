# SPDX-License-Identifier: Apache-2.0
"""One connection to a node's agent, for many requests at once.

A request that was not sent whole has not happened: its frame is cut off,
and the agent does nothing with it. One that was sent and has no answer may
have. When the connection is lost the agent ends, and all that it runs.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from volume import concurrency
from volume import errors
from volume.commands import ENVIRONMENT
from volume.remote import wire

LOG = logging.getLogger(__name__)

HELLO_S = 60.0  # a slow machine needs seconds to start Python
CANCEL_S = 15.0  # for the agent to end a command
SLACK_S = 30.0  # between a command's own time and ours
TICK_S = 0.3
AT_ONCE_MAX = 128
STDERR_BYTES_MAX = 1 << 20
SAID_BYTES_MAX = 4096


class Call:
    """A request that waits for its answer."""

    def __init__(self, bytes_max: int) -> None:
        self.event = threading.Event()
        self.percent = 0.0
        self.header: wire.Header | None = None
        self.payload = bytearray()
        self.bytes_max = bytes_max

    def take(self, header: wire.Header, payload: bytearray) -> None:
        """Take a frame; the last one ends the waiting."""
        if 'percent' in header:
            self.percent = float(header['percent'])
            return
        self.payload += payload
        if len(self.payload) > self.bytes_max:
            raise wire.Broken('an answer that is larger than was asked for')
        if 'part' not in header:
            self.header = header
            self.event.set()


class Link:
    """A child process that is the connection; it is used once."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        explain: Callable[[str], str],
        silence_s: float = wire.SILENCE_S,
    ) -> None:
        self.name = name
        self.hello: wire.Header = {}
        self._argv = list(argv)
        self._explain = explain
        self._silence_s = silence_s
        self._ids = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._guard = threading.Lock()
        self._sending = threading.Lock()
        self._slots = threading.Semaphore(AT_ONCE_MAX)
        self._later: collections.deque[wire.Header] = collections.deque()
        self._lost = ''
        self._over = threading.Event()

    # From begin to end.

    def open(self) -> None:
        """Start it, and hear who is there.

        :raises Unavailable: nobody is, or one of another release
        """
        ours, theirs = socket.socketpair()
        # Under eventlet neither end is; a child expects that its is.
        os.set_blocking(theirs.fileno(), True)
        self._socket = ours
        # Not a pipe: nobody has to empty it.
        self._errors = os.memfd_create('ssh-stderr', os.MFD_CLOEXEC)
        try:
            self._child = concurrency.popen(
                self._argv, env=ENVIRONMENT, process_group=0,
                stdin=theirs, stdout=theirs, stderr=self._errors,
            )
        except OSError as failed:
            self._close()
            raise errors.Unavailable(
                f'node {self.name}: {self._argv[0]} cannot be started: '
                f'{failed.strerror}'
            ) from failed
        finally:
            theirs.close()
        try:
            self._greet()
        except (wire.Broken, OSError) as failed:
            self._end_child()
            said = self._said() or str(failed)
            self._close()
            raise errors.Unavailable(
                f'node {self.name}: {self._explain(said)}'
            ) from failed
        except BaseException:
            self._end_child()
            self._close()
            raise
        ours.settimeout(None)
        for work in self._listen, self._keep_alive:
            threading.Thread(
                target=work, name=f'node-{self.name}', daemon=True
            ).start()

    @property
    def is_lost(self) -> bool:
        return bool(self._lost)

    def close(self) -> None:
        """Hang up; what is under way there ends."""
        self._lose('the service has hung up')

    def _greet(self) -> None:
        self._socket.settimeout(HELLO_S)
        magic = bytearray(len(wire.MAGIC))
        wire.fill(self._socket.recv_into, magic)
        if magic != wire.MAGIC:
            raise wire.Broken(
                f'it says {bytes(magic)!r} in place of a greeting: is '
                'another command bound to the key'
            )
        frame = wire.receive(self._socket.recv_into)
        if frame is None:
            raise wire.Broken('it hung up')
        self.hello = frame[0]
        if self.hello.get('hello') != wire.VERSION:
            raise errors.Unavailable(
                f'node {self.name}: its agent speaks protocol '
                f'{str(self.hello.get("hello"))[:9]}, and this service '
                f'{wire.VERSION}: install the same release on both'
            )

    # Requests.

    def call(
        self,
        do: str,
        *args: Any,
        options: wire.Header | None = None,
        payload: Any = b'',
        holds: Sequence[int] = (),
        timeout_s: float = 600.0,
        bytes_max: int = wire.PAYLOAD_BYTES_MAX,
        watch: Callable[[float], None] | None = None,
        argv: Sequence[str] = ('',),
    ) -> tuple[Any, bytearray]:
        """Ask, and return the result and its bytes.

        ``watch`` is called while it waits; what it raises cancels the
        request, and is raised when that has ended.

        :raises Unavailable: it was not sent, or given up before it was
            begun; nothing happened
        :raises Unknown: it was sent, and there is no answer
        """
        header: wire.Header = {'do': do, 'args': args}
        if options:
            header['options'] = options
        if holds:
            header['holds'] = list(holds)
        call = Call(bytes_max)
        with self._slots:
            number = self._send(call, header, payload)
            is_late = True
            try:
                is_late = not self._hears(call, timeout_s, watch)
            finally:
                if is_late:
                    self._give_up(call, number, do)
                with self._guard:
                    self._calls.pop(number, None)
        told = call.header
        if is_late and not (told and told.get('error') == 'Unavailable'):
            raise errors.Unknown(
                f'node {self.name} did not answer within {timeout_s:g} s '
                f'when it was to {do}'
            )
        if told is None:
            if do in wire.QUESTIONS:
                raise errors.Unavailable(f'node {self.name}: {self._lost}')
            raise errors.Unknown(
                f'node {self.name}: {self._lost} while it was to {do}'
            )
        if 'error' in told:
            raise wire.rebuild(told, argv)
        return told.get('result'), call.payload

    def post(self, do: str, *args: Any) -> None:
        """Say something that has no answer, now."""
        with contextlib.suppress(errors.Unavailable):
            self._send(None, {'do': do, 'args': args}, b'')

    def post_later(self, do: str, *args: Any) -> None:
        """As ``post``, with whatever is said next; waits for nothing.

        So it may be called anywhere, also where an object is thrown away.
        """
        self._later.append({'do': do, 'args': args, 'id': 0})

    def _send(
        self, call: Call | None, header: wire.Header, payload: Any
    ) -> int:
        number = next(self._ids) if call else 0
        frame = wire.pack({**header, 'id': number}, payload)
        with self._sending:
            if call:
                with self._guard:
                    self._calls[number] = call
            try:
                if self._lost:
                    raise OSError(self._lost)
                while self._later:
                    beginning, _ = wire.pack(self._later.popleft())
                    self._socket.sendall(beginning)
                for part in frame:
                    if part:
                        self._socket.sendall(part)
            except OSError as failed:
                with self._guard:
                    self._calls.pop(number, None)
                self._lose('the connection was lost')
                raise errors.Unavailable(
                    f'node {self.name}: {self._lost}; nothing was done'
                ) from failed
        return number

    def _hears(
        self,
        call: Call,
        timeout_s: float,
        watch: Callable[[float], None] | None,
    ) -> bool:
        """Wait for the answer, and say whether it came in time."""
        deadline = time.monotonic() + timeout_s
        while not call.event.wait(
            min(TICK_S if watch else timeout_s,
                max(deadline - time.monotonic(), 0.0))
        ):
            if time.monotonic() >= deadline:
                return False
            if watch:
                watch(call.percent)
        if watch and call.header and 'error' not in call.header:
            watch(call.percent)
        return True

    def _give_up(self, call: Call, number: int, do: str) -> None:
        """Have a request ended; without an answer, the connection is.

        What it has brought all the same is given back: nobody knows of it.
        """
        if not call.event.is_set():
            self.post('cancel', number)
            is_answered = False
            try:
                is_answered = call.event.wait(CANCEL_S)
            finally:
                if not is_answered:
                    self._lose('it did not end what was cancelled')
        told = call.header
        if do in wire.OPPOSITES and told and told.get('result') is not None:
            found = told['result']
            self.post(
                wire.OPPOSITES[do],
                found[0] if isinstance(found, list) else found,
            )

    # What comes back.

    def _listen(self) -> None:
        why = 'the connection failed by a bug'
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._socket, selectors.EVENT_READ)

                def read_into(buffer: memoryview) -> int:
                    # Whoever is there answers to a ping. It is seen here and
                    # not by who pings: he waits for a sender that is stuck.
                    if not selector.select(self._silence_s):
                        raise wire.Broken(f'silence for {self._silence_s:g} s')
                    return self._socket.recv_into(buffer)

                while frame := wire.receive(read_into):
                    self._hear(*frame)
            why = 'the connection was lost'
        except (wire.Broken, OSError) as failed:
            why = f'the connection was lost ({failed})'
        finally:
            self._lose(why)
            self._end_child()
            LOG.warning('node %s: %s', self.name, self._said() or self._lost)
            self._close()

    def _hear(self, header: wire.Header, payload: bytearray) -> None:
        if 'pong' in header:
            if os.fstat(self._errors).st_size > STDERR_BYTES_MAX:
                os.ftruncate(self._errors, 0)
            return
        with self._guard:
            call = self._calls.get(header.get('id') or 0)
        if call is not None:
            call.take(header, payload)

    def _keep_alive(self) -> None:
        while not self._over.wait(min(wire.PING_S, self._silence_s / 6)):
            self.post('ping')

    # The end.

    def _lose(self, why: str) -> None:
        """Let everybody who waits know that no answer comes."""
        with self._guard:
            if self._lost:
                return
            self._lost = why
            calls = list(self._calls.values())
            # Whoever sends or listens wakes, and ssh hears that it is over.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._over.set()
        for call in calls:
            call.event.set()

    def _end_child(self) -> None:
        """Let ssh end by itself, for it may have something to say."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._child.wait(2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def _said(self) -> str:
        size = os.fstat(self._errors).st_size
        said = os.pread(
            self._errors, SAID_BYTES_MAX, max(size - SAID_BYTES_MAX, 0)
        )
        return said.decode(errors='replace').strip()

    def _close(self) -> None:
        """Close what is open; nobody may be about to use a descriptor."""
        self._over.set()
        with self._sending, self._guard:
            self._socket.close()
        os.close(self._errors)
