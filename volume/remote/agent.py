# SPDX-License-Identifier: Apache-2.0
"""The agent of a node: does on its machine what a service asks for.

It reads requests on its standard input and answers on its standard output,
many at once; argv comes as lists, and there is no shell. sshd starts it, as
the command that a key is bound to. It ends with its connection, and so do
the commands that it runs; only what was asked to last (``start``) stays.

It needs Python and this package, and nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import os
import select
import shutil
import sys
import threading
import time
import traceback
from _queue import SimpleQueue
from collections.abc import Callable, Sequence
from typing import Any

from volume import errors
from volume import locks
from volume.commands import KILLED_S
from volume.endings import TERM_S
from volume.machine.opened import Opened
from volume.node import held
from volume.node import Node
from volume.node import Op
from volume.node import Process
from volume.node import ReplyLength
from volume.remote import wire
from volume.remote.tickets import check_name
from volume.remote.tickets import Tickets
from volume.remote.tickets import Turn

STATE_PATH = '/var/lib/volume-node'
THREADS_MAX = 64
END_S = TERM_S + KILLED_S + 1.0  # for all commands to be ended
SWEEP_S = 86400.0
FILE_VERBS = {
    'size': 'size', 'pread_into': 'read', 'pwrite': 'write',
    'truncate': 'truncate', 'punch': 'punch', 'zero_out': 'zero',
    'find': 'find', 'begin_sync': 'begin to sync', 'sync': 'sync',
    'close': 'close',
}
# What these do ends nothing and waits for nothing: done at once, in order.
INLINE = frozenset({'ping', 'cancel', 'release'})


class Ended(errors.Unknown):
    """The request was cancelled, or nobody is left to hear of it."""


class Request:
    """What was asked, while it is being done."""

    def __init__(self, header: wire.Header, payload: bytearray) -> None:
        self.id: int = header.get('id', -1)
        self.do: str = header.get('do', '')
        self.args: list[Any] = header.get('args', [])
        self.options: dict[str, Any] = header.get('options', {})
        self.holds: list[int] = header.get('holds', [])
        self.payload = payload
        self.is_begun = False
        self.is_cancelled = False
        for value, kind in (
            (self.id, int), (self.do, str), (self.args, list),
            (self.options, dict), (self.holds, list),
        ):
            if not isinstance(value, kind):
                raise wire.Broken(f'a request with {value!r:.40}')
        if not all(isinstance(each, int) for each in self.holds):
            raise wire.Broken('a lock without a number')
        if self.id < 0 or not self.do:
            raise wire.Broken('a request without a number or a name')


current: contextvars.ContextVar[Request] = contextvars.ContextVar('current')


class AgentNode(Node):
    """This machine; its commands end with the connection."""

    def __init__(self, state_dir: str, is_over: threading.Event) -> None:
        super().__init__(state_dir)
        self._is_over = is_over
        # The kernel's own belt, should this process be killed. Whoever wants
        # the lock kills what does not heed it.
        self._belt = ['setpriv', '--pdeathsig=TERM'] if (
            shutil.which('setpriv')
        ) else []

    def _run(self, argv: Sequence[str], *args: Any) -> str:
        return super()._run([*self._belt, *argv], *args)

    def _tick(self) -> None:
        if self._is_over.is_set() or current.get().is_cancelled:
            raise Ended('the command was ended, as nobody waits for it')


class Agent:
    """One connection, and all that was asked through it."""

    def __init__(
        self, state_dir: str, source: int, target: int, silence_s: float
    ) -> None:
        self._source = source
        self._target = target
        self._silence_s = silence_s
        self._sending = threading.Lock()
        self._is_over = threading.Event()
        self._node = AgentNode(state_dir, self._is_over)
        self._tickets = Tickets(self._node.lock_dir)
        self._guard = threading.Lock()
        self._numbers = 0
        self._files: dict[int, tuple[Opened, str]] = {}
        self._turns: dict[int, tuple[Turn, contextlib.ExitStack]] = {}
        self._borrowed: set[int] = set()
        self._requests: dict[Any, Request] = {}
        self._work: SimpleQueue[Request] = SimpleQueue()
        self._idle = 0
        self._threads = 0
        self._swept_at = 0.0

    def serve(self) -> None:
        """Answer until nobody asks any more, and end all that was begun."""
        os.write(self._target, wire.MAGIC)
        self._send({
            'hello': wire.VERSION, 'state_dir': self._node.state_dir,
            'lock_dir': self._node.lock_dir,
        })
        try:
            while frame := wire.receive(self._read_into):
                self._take(*frame)
        except (wire.Broken, OSError) as failed:
            _say(f'volume-node-agent ends: {failed}')
        self._is_over.set()
        deadline = time.monotonic() + END_S
        while self._requests and time.monotonic() < deadline:
            time.sleep(0.02)

    def _read_into(self, buffer: memoryview) -> int:
        # Whoever is there says something from time to time.
        if not select.select([self._source], [], [], self._silence_s)[0]:
            raise wire.Broken(f'silence for {self._silence_s:g} s')
        return os.readv(self._source, [buffer])

    def _send(self, header: wire.Header, payload: Any = b'') -> None:
        beginning, rest = wire.pack(header, payload)
        with self._sending:
            try:
                for view in memoryview(beginning), rest:
                    while view:
                        view = view[os.write(self._target, view):]
            except OSError:
                self._is_over.set()  # nobody hears us; its input ends, too

    # Requests on their way.

    def _take(self, header: wire.Header, payload: bytearray) -> None:
        request = Request(header, payload)
        if request.do in INLINE:
            self._at_once(request)
            return
        with self._guard:
            is_refused = len(self._requests) >= wire.REQUESTS_MAX
            # All the threads may wait for the lock that its caller has.
            is_alone = not self._borrowed.isdisjoint(request.holds)
            if not is_refused:
                self._requests[request.id] = request
                if is_alone:
                    threading.Thread(
                        target=self._see_to, args=(request,), daemon=True
                    ).start()
                elif self._idle:
                    self._idle -= 1
                elif self._threads < THREADS_MAX:
                    self._threads += 1
                    threading.Thread(target=self._help, daemon=True).start()
        if is_refused:
            self._send({
                'id': request.id, 'error': 'Unavailable',
                'message': 'the node has too many requests already',
            })
        elif not is_alone:
            self._work.put(request)

    def _at_once(self, request: Request) -> None:
        number = request.args[0] if request.args else 0
        if not isinstance(number, int):
            raise wire.Broken(f'{number!r:.40} in the place of a number')
        if request.do == 'ping':
            self._send({'pong': True})
        elif request.do == 'release':
            with self._guard:
                _, stack = self._turns.pop(number, (None, None))
                self._borrowed.discard(number)
            if stack is not None:
                stack.close()
        else:
            self._cancel(number)

    def _cancel(self, number: int) -> None:
        """End what is under way; what waits for a thread never begins."""
        with self._guard:
            request = self._requests.get(number)
            if request is None or request.is_cancelled:
                return
            request.is_cancelled = True
        if not request.is_begun:
            self._send({
                'id': number, 'error': 'Unavailable',
                'message': 'it was cancelled before the node began it: '
                'nothing was done',
            })

    def _help(self) -> None:
        while True:
            self._see_to(self._work.get())
            with self._guard:
                self._idle += 1

    def _see_to(self, request: Request) -> None:
        if self._begin(request):
            contextvars.copy_context().run(self._answer, request)
        with self._guard:
            self._requests.pop(request.id, None)

    def _begin(self, request: Request) -> bool:
        with self._guard:
            request.is_begun = not request.is_cancelled
            return request.is_begun

    def _answer(self, request: Request) -> None:
        """Do it and answer, whatever comes: somebody waits for the answer."""
        current.set(request)
        try:
            self._check_turns(request)
            self._give(request, *wire.encode(self._do(request)))
        except errors.VolumeError as failed:
            self._send({'id': request.id, **wire.tell(failed)})
        except Exception as bug:
            self._send({
                'id': request.id, 'error': 'Unknown',
                'message': f'the agent failed in {request.do:.40}: '
                f'{type(bug).__name__}',
            })
            _say(traceback.format_exc())

    def _give(self, request: Request, result: Any, payload: Any) -> None:
        """Send the answer, in parts.

        :raises Invalid: it is too large to send, and nothing was changed
        :raises Unknown: it is too large to send
        """
        view = memoryview(payload).cast('B')
        while len(view) > wire.PART_BYTES:
            self._send({'id': request.id, 'part': True},
                       view[:wire.PART_BYTES])
            view = view[wire.PART_BYTES:]
        try:
            self._send({'id': request.id, 'result': result}, view)
        except errors.Invalid as large:
            if request.do in wire.QUESTIONS:
                raise
            raise errors.Unknown(
                f'{request.do} was done, but its answer is lost: {large}'
            ) from large

    def _check_turns(self, request: Request) -> None:
        """Refuse what is asked under a lock that is another's by now."""
        descriptors: tuple[int, ...] = ()
        for number in request.holds:
            with self._guard:
                turn, _ = self._turns.get(number, (None, None))
            if turn is None:
                raise errors.Unavailable(
                    'the lock was given back: nothing was done'
                )
            turn.check()
            descriptors += turn.descriptors
        held.set(descriptors)

    # What can be asked.

    def _do(self, request: Request) -> Any:
        verb, args = request.do, request.args
        if verb in wire.BY_NAME:
            if request.options.get('payload'):
                args = [*args, request.payload]
            return self._node._by_name(wire.BY_NAME[verb], *args)
        if verb.startswith('file.') and verb[5:] in FILE_VERBS:
            return self._do_file(verb[5:], request)
        if verb in VERBS:
            return VERBS[verb](self, request, *args)
        raise errors.Unsupported(f'the node\'s agent knows no {verb!r:.40}')

    def _open(self, request: Request, path: str, mode: str) -> list[Any]:
        opened = self._node._file_act(
            'open', path, lambda: Opened(path, mode)
        )
        with self._guard:
            self._numbers += 1
            self._files[self._numbers] = opened, path
            return [self._numbers, opened.readable, opened.writable]

    def _do_file(self, verb: str, request: Request) -> Any:
        number, *args = request.args
        take = self._files.pop if verb == 'close' else self._files.get
        with self._guard:
            opened, path = take(number, (None, ''))
        if opened is None:
            raise errors.Unavailable('the file was closed: nothing was done')
        if verb == 'pread_into':
            length, offset = args
            buffer = bytearray(min(length, wire.PAYLOAD_BYTES_MAX))
            count = self._node._file_act(
                'read', path, lambda: opened.pread_into(buffer, offset)
            )
            return memoryview(buffer)[:count]
        if verb == 'pwrite':
            args = [request.payload, *args]
        return self._node._file_act(
            FILE_VERBS[verb], path, lambda: getattr(opened, verb)(*args)
        )

    def _run(
        self,
        request: Request,
        argv: list[str],
        timeout_s: float,
        output_bytes_max: int,
        is_watched: bool,
    ) -> bytes:
        told = 0.0

        def watch(percent: float) -> None:
            nonlocal told
            if percent != told:
                told = percent
                self._send({'id': request.id, 'percent': percent})

        return self._node._run(
            argv, timeout_s, bytes(request.payload), output_bytes_max, (),
            watch if is_watched else None,
        ).encode()

    def _configure(
        self, request: Request, wanted: list[list[str]]
    ) -> Sequence[Any]:
        return self._node.configure([Op(*each) for each in wanted])

    def _talk(
        self,
        request: Request,
        path: str,
        timeout_s: float,
        reply_bytes_max: int,
        length: list[int] | None,
    ) -> bytes:
        return self._node.talk(
            path, bytes(request.payload), timeout_s, reply_bytes_max,
            ReplyLength(*length) if length else None,
        )

    def _start(
        self, request: Request, argv: list[str], log_path: str
    ) -> list[Any]:
        process = self._node.start(argv, log_path)
        return [process.pid, process.started]

    def _is_running(
        self, request: Request, pid: int, started: str
    ) -> bool:
        return self._node.is_running(Process(pid, started))

    def _end(
        self, request: Request, pid: int, started: str, timeout_s: float
    ) -> None:
        self._node.end(Process(pid, started), timeout_s)

    def _look(self, request: Request, names: list[str]) -> dict[str, str]:
        now = time.monotonic()
        if now - self._swept_at > SWEEP_S or not self._swept_at:
            self._swept_at = now
            self._tickets.sweep()
        return self._tickets.look([check_name(name) for name in names])

    def _hold(
        self,
        request: Request,
        seen: dict[str, str],
        exclusive: list[str],
        grace_s: float,
    ) -> int | None:
        wanted = {check_name(name): seen[name] for name in seen}
        if not set(exclusive) <= wanted.keys():
            raise errors.Invalid('a lock is wanted that was not looked at')
        with contextlib.ExitStack() as stack:
            turn = stack.enter_context(self._tickets.hold(
                wanted, exclusive, grace_s, self._node._tick
            ))
            return self._keep(turn, stack) if turn else None

    def _borrow(self, request: Request, path: str, wait_s: float) -> int:
        with contextlib.ExitStack() as stack:
            descriptor = stack.enter_context(
                locks.borrow(path, wait_s, self._node._tick)
            )
            number = self._keep(Turn({path: descriptor}, {}), stack)
        with self._guard:
            self._borrowed.add(number)
        return number

    def _keep(self, turn: Turn, stack: contextlib.ExitStack) -> int:
        """Hold this until it is released."""
        with self._guard:
            self._numbers += 1
            self._turns[self._numbers] = turn, stack.pop_all()
            return self._numbers


VERBS: dict[str, Callable[..., Any]] = {
    'open': Agent._open, 'run': Agent._run, 'configure': Agent._configure,
    'talk': Agent._talk, 'start': Agent._start, 'end': Agent._end,
    'is_running': Agent._is_running, 'tickets': Agent._look,
    'hold': Agent._hold, 'borrow': Agent._borrow,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one connection on the standard streams."""
    parser = argparse.ArgumentParser(
        prog='volume-node-agent', description=str(__doc__).partition('\n')[0],
    )
    parser.add_argument(
        '--state-path', default=STATE_PATH,
        help='directory of this node, for locks and marks of pools '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--silence-s', type=float, default=wire.SILENCE_S,
        help='end when nothing was heard for so long (default: %(default)g)',
    )
    parser.add_argument(
        '--protocol', action='version', version=str(wire.VERSION),
        help='say which protocol it speaks: the same as the service must',
    )
    args = parser.parse_args(argv)
    if os.isatty(0):
        parser.error('a service starts this over ssh; see the manual')
    # Nothing that prints may come between the frames.
    source, target = os.dup(0), os.dup(1)
    with open(os.devnull, 'rb') as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    try:
        os.makedirs(args.state_path, 0o700, exist_ok=True)
        agent = Agent(args.state_path, source, target, args.silence_s)
    except OSError as failed:
        _say(
            f'volume-node-agent: {args.state_path} cannot be used: '
            f'{failed.strerror}; give another by --state-path'
        )
        return 1
    agent.serve()
    # Threads that hang in the kernel keep nobody waiting.
    os._exit(0)


def _say(words: str) -> None:
    """Tell whoever reads what ssh prints."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f'{words}\n')
        sys.stderr.flush()


if __name__ == '__main__':
    sys.exit(main())
