# SPDX-License-Identifier: Apache-2.0
"""How a process does several things at once: threads, or eventlet.

The tree is written for threads. Under eventlet the same code runs in
greenthreads of one native thread, and one thing is added: what the kernel,
a C library or the processor keeps busy for long goes through ``blocking``,
into a native thread, so that it stops nobody else. With threads that is a
plain call.

A function that runs in a native thread must not wait for a greenthread: no
lock, event, queue, socket or sleep of the patched kind. One that does fails
at once, and does not hang for ever; it takes what must wait back among the
greenthreads with ``waiting``. eventlet's own ``tpool`` is not used: it
has one pool for everything, so that a slow disk would stop the database, and
an exception that is no ``Exception`` leaves its caller waiting.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import importlib
import logging
import os
import socket
import subprocess
import threading
import warnings
from _queue import SimpleQueue  # the C one, also under eventlet
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from volume import errors

T = TypeVar('T')

THREADS = 'threads'
EVENTLET = 'eventlet'
MODES = (THREADS, EVENTLET)

FILE_THREADS_MAX = 128
NAME_THREADS_MAX = 8

_world: _Greens | None = None
_popen = subprocess.Popen  # as it is before anything was patched


def start(mode: str) -> None:
    """Set the mode of this process, before anything else is imported.

    :raises Unavailable: eventlet is asked for, and not installed
    """
    global _world
    if mode == EVENTLET and _world is None:
        _world = _Greens(_patch())
        _make_logging_native()
        _look_names_up_natively()


def is_green() -> bool:
    """Say whether this process runs under eventlet."""
    return _world is not None


def check(mode: str) -> None:
    """Refuse to go on in another mode than the one that is configured.

    :raises Invalid: it is too late for eventlet
    """
    if mode == EVENTLET and not is_green():
        raise errors.Invalid(
            'concurrency = eventlet has to be known before anything else is '
            'imported: start the service by its command, volume-service'
        )


def native() -> Any:
    """Return the module ``threading`` as the operating system has it."""
    return threading if _world is None else _world.threading


def popen(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process, with plain pipes in both modes.

    eventlet's wait for ever where nobody reads. Look with ``selectors``
    before a read; ``wait`` lets others go on.
    """
    return _popen(*words, **options)


def blocking(effect: Callable[[], T]) -> T:
    """Return what ``effect`` returns, and stop nobody else meanwhile.

    It sees the context of its caller (the locks that helpers inherit).
    """
    return FILES.run(effect)


def waiting(effect: Callable[[], T]) -> T:
    """Return what ``effect`` returns; it may wait as green code does.

    The way back from ``blocking``: from a native thread it goes to a
    greenthread, with its caller's context. With threads, and in a
    greenthread, it is a plain call.
    """
    if _world is None or _world.is_green():
        return effect()
    return _world.ask(effect)


class Lane:
    """Native threads for one kind of work, begun when they are needed.

    A kind that is stuck keeps no other kind waiting. ``run`` is a plain call
    with threads, and in a thread that is native already.
    """

    def __init__(self, name: str, threads_max: int) -> None:
        self.name = name
        self._threads_max = threads_max
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        # Both are touched by greenthreads alone, so they need no lock.
        self._count = 0
        self._busy = 0

    def run(self, effect: Callable[[], T]) -> T:
        """Return what ``effect`` returns."""
        world = _world
        if world is None or not world.is_here():
            return effect()
        call = _Call(effect)
        self._busy += 1
        try:
            if self._busy > self._count < self._threads_max:
                self._begin(world)
            self._calls.put(call)
            world.wait(call)
        finally:
            self._busy -= 1
        result: T = call.answer()
        return result

    def _begin(self, world: _Greens) -> None:
        thread = world.threading.Thread(
            target=self._work, args=(world,),
            name=f'{self.name}-{self._count + 1}', daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:  # the system has no more of them
            if not self._count:
                raise
        else:
            self._count += 1

    def _work(self, world: _Greens) -> None:
        world.forbid_waiting()
        while True:
            call = self._calls.get()
            call.work()
            world.give_back(call)
            del call  # its answer must not live until the next one


FILES = Lane('file', FILE_THREADS_MAX)
NAMES = Lane('name', NAME_THREADS_MAX)


class _Call:
    """A function on its way to a native thread and back."""

    def __init__(self, effect: Callable[[], Any]) -> None:
        self.effect: Callable[[], Any] | None = effect
        self.context = contextvars.copy_context()
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.waiter: Any = None

    def work(self) -> None:
        assert self.effect is not None
        try:
            self.result = self.context.run(self.effect)
        except BaseException as failed:
            self.error = failed
        self.effect = None

    def answer(self) -> Any:
        """Return or raise what became of it; once."""
        if self.error is None:
            return self.result
        error, self.error = self.error, None
        try:
            raise error
        finally:
            del error  # or its traceback would hold itself

    def resume(self) -> None:
        """Wake who waits, if he still does."""
        self.is_done = True
        if self.waiter is not None:
            self.waiter.switch()


class _Greens:
    """The native thread that has the greenthreads, seen from others."""

    def __init__(self, eventlet: Any) -> None:
        self.threading = eventlet.patcher.original('threading')
        self._hubs = eventlet.hubs
        self._current = eventlet.getcurrent
        self._thread_id = self.threading.get_ident()
        self._spawn = eventlet.spawn_n
        self._done: collections.deque[_Call] = collections.deque()
        self._asked: collections.deque[Callable[[], None]] = (
            collections.deque())
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        hub = self._hubs.get_hub()
        hub.add(hub.READ, self._fd, self._deliver, None, None)
        self._hub = hub

    def is_here(self) -> bool:
        """Say whether the caller is a greenthread, and so may wait."""
        return (
            self.is_green() and self._current() is not self._hub.greenlet
        )

    def is_green(self) -> bool:
        """Say whether the caller is in the thread of the greenthreads."""
        found: bool = self.threading.get_ident() == self._thread_id
        return found

    def wait(self, call: _Call) -> None:
        call.waiter = self._current()
        try:
            while not call.is_done:
                self._hub.switch()
        finally:
            call.waiter = None

    def give_back(self, call: _Call) -> None:
        """Tell the greenthreads that a call is done; for native threads."""
        self._done.append(call)
        os.eventfd_write(self._fd, 1)

    def ask(self, effect: Callable[[], T]) -> T:
        """Have a greenthread do something; for native threads."""
        call, ended = _Call(effect), self.threading.Event()

        def work() -> None:
            call.work()
            ended.set()

        self._asked.append(work)
        os.eventfd_write(self._fd, 1)
        ended.wait()
        result: T = call.answer()
        return result

    def forbid_waiting(self) -> None:
        """Have this native thread fail where it would wait as a green one."""
        self._hubs._threadlocal.hub = _NoHub()

    def _deliver(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        while self._done:
            call = self._done.popleft()
            self._hub.schedule_call_global(0, call.resume)
        while self._asked:
            self._spawn(self._asked.popleft())


class _NoHub:
    """What a lane's thread has in the place of a hub."""

    def mark_as_reopened(self, fd: int) -> None:
        """Let a file be opened: nobody waits for descriptors here."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(
            'a native thread would wait for a greenthread here: take that '
            f'out of blocking() (hub.{name})'
        )


def _patch() -> Any:
    """Patch the standard library; return eventlet."""
    # Its own resolver knows other sources of names than the system's.
    os.environ['EVENTLET_NO_GREENDNS'] = 'yes'
    import selectors

    epoll_selector = selectors.EpollSelector
    try:
        with warnings.catch_warnings():
            # It tells every user that it will retire.
            warnings.simplefilter('ignore')
            eventlet = importlib.import_module('eventlet')
            for name in 'hubs', 'patcher':
                importlib.import_module(f'eventlet.{name}')
    except ImportError as missing:
        raise errors.Unavailable(
            'concurrency = eventlet needs the package eventlet, which is not '
            'here: install volume-service[eventlet], or set concurrency = '
            f'threads ({missing})'
        ) from missing
    eventlet.monkey_patch()
    hubs = eventlet.hubs

    class Selector(epoll_selector):  # type: ignore[misc,valid-type]
        """Sees what is registered while it waits, as eventlet's does not."""

        def select(self, timeout: float | None = None) -> Any:
            if timeout is None or timeout > 0:
                with contextlib.suppress(eventlet.Timeout):
                    hubs.trampoline(self.fileno(), read=True, timeout=timeout)
            return super().select(0)

    selectors.DefaultSelector = Selector  # type: ignore[misc]
    return eventlet


def _make_logging_native() -> None:
    """Let native threads log: nothing in a handler waits as a green one."""
    own: Any = logging
    own.threading = native()
    own._lock = native().RLock()
    for reference in list(own._handlerList):
        handler = reference()
        if handler is not None:
            handler.createLock()


def _look_names_up_natively() -> None:
    """Ask the system for addresses in a native thread: it may take long."""
    # The patched socket module is one of two that must know.
    green = importlib.import_module('eventlet.green.socket')
    for name in (
        'getaddrinfo', 'gethostbyname', 'gethostbyname_ex', 'getnameinfo',
    ):
        found = _in_lane(getattr(socket, name))
        for module in socket, green:
            setattr(module, name, found)


def _in_lane(function: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> T:
        return NAMES.run(lambda: function(*args, **keywords))

    return call
