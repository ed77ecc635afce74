# SPDX-License-Identifier: Apache-2.0
"""Where the parts of the server say what they do.

Every module of ``calls`` is imported once, by ``load``; a module states with
``@call('VDI.create')`` which message a function answers. It gets the pool,
the context of the call and the arguments as Python values, optional ones
only if they were sent (give them defaults).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TYPE_CHECKING, TypeVar

from volume.sim.xapi.failure import NULL

if TYPE_CHECKING:
    from http.server import BaseHTTPRequestHandler

    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.state.tasks import Task

F = TypeVar('F', bound=Callable[..., Any])
Stop = Callable[[], None]
Route = Callable[['Pool', str, 'BaseHTTPRequestHandler', dict[str, str]], None]

CALLS: dict[str, Call] = {}
ROUTES: dict[tuple[str, str], Route] = {}
COMPUTED: dict[tuple[str, str], Callable[..., Any]] = {}
DAEMONS: list[Callable[[Pool], Stop]] = []


@dataclasses.dataclass(frozen=True)
class Session:
    """Who calls: what was established at the login."""

    ref: str
    role: str
    user: str = 'root'
    is_local_root: bool = False
    originator: str = ''


@dataclasses.dataclass
class Ctx:
    """One call: who, where it arrived, and the task that it runs in.

    ``task`` is None in a call that is waited for. ``id`` is what stands in
    ``current_operations``: the task, or a reference of no object.
    """

    session: Session
    host: str
    id: str
    task: Task | None = None

    @property
    def task_ref(self) -> str:
        """Return the task's reference, or the null one."""
        return NULL if self.task is None else self.task.ref

    def progress(self, fraction: float) -> None:
        """Say how far the call is, if anyone can see it."""
        if self.task is not None:
            self.task.progress(fraction)

    def check_cancelled(self) -> None:
        """End the call if it was cancelled.

        :raises Cancelled: it was
        """
        if self.task is not None:
            self.task.check_cancelled()


@dataclasses.dataclass(frozen=True)
class Call:
    """A function that answers a message."""

    function: Callable[..., Any]
    cancellable: bool
    on_slave: bool


def call(
    name: str, *, cancellable: bool = False, on_slave: bool = False,
) -> Callable[[F], F]:
    """Have a function answer a message.

    :param cancellable: its task may be cancelled at any time; the function
        asks ``ctx.check_cancelled()`` where it can end
    :param on_slave: a host that is not the master answers it as well
    """
    def register(function: F) -> F:
        if name in CALLS:
            raise ValueError(f'{name} is answered twice')
        CALLS[name] = Call(function, cancellable, on_slave)
        return function
    return register


def route(method: str, path: str) -> Callable[[F], F]:
    """Have a function answer an HTTP request: ``f(pool, host_ref, request,
    query)``, with the request handler to read from and to write to."""
    def register(function: F) -> F:
        ROUTES[method, path] = function
        return function
    return register


def computed(cls: str, name: str) -> Callable[[F], F]:
    """Have a function compute a field: ``f(pool, ref, stored_row)``.

    It runs under the lock of the rows, and often: it must be quick.
    """
    def register(function: F) -> F:
        COMPUTED[cls, name] = function
        return function
    return register


def daemon(function: Callable[[Pool], Stop]) -> Callable[[Pool], Stop]:
    """Have a function called as a pool starts; what it returns stops it."""
    DAEMONS.append(function)
    return function


@functools.cache
def load() -> None:
    """Import every module that answers something."""
    package = importlib.import_module('volume.sim.xapi.calls')
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f'{package.__name__}.{module.name}')
