# SPDX-License-Identifier: Apache-2.0
"""A pool of hosts: what a call goes through before and after its work."""

from __future__ import annotations

import collections
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from volume.sim.xapi import registry
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import Fault
from volume.sim.xapi.failure import Hangup
from volume.sim.xapi.failure import internal
from volume.sim.xapi.faults import AFTER
from volume.sim.xapi.faults import ASYNC
from volume.sim.xapi.faults import BEFORE
from volume.sim.xapi.faults import DELAY
from volume.sim.xapi.faults import Faults
from volume.sim.xapi.faults import KILL_MASTER
from volume.sim.xapi.faults import OF_REQUEST
from volume.sim.xapi.faults import REFUSE
from volume.sim.xapi.net.server import Servers
from volume.sim.xapi.objects import bootstrap
from volume.sim.xapi.published import datamodel
from volume.sim.xapi.published import generic
from volume.sim.xapi.published import profiles
from volume.sim.xapi.published.datamodel import Message
from volume.sim.xapi.published.profiles import Profile
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.registry import Session
from volume.sim.xapi.sm.host import SmHost
from volume.sim.xapi.state.events import Events
from volume.sim.xapi.state.limits import Limits
from volume.sim.xapi.state.limits import NAMES
from volume.sim.xapi.state.operations import Operations
from volume.sim.xapi.state.rows import Rows
from volume.sim.xapi.state.sessions import ROOT
from volume.sim.xapi.state.sessions import Sessions
from volume.sim.xapi.state.sessions import User
from volume.sim.xapi.state.tasks import Task
from volume.sim.xapi.state.tasks import Tasks
from volume.sim.xapi.state.tasks import value
from volume.sim.xapi.state.values import DateTime
from volume.sim.xapi.world import World

T = TypeVar('T')
LOG = logging.getLogger(__name__)
_OF_CALL: Final = frozenset({REFUSE, DELAY, KILL_MASTER})


class Pool:
    """One pool. Everything of it lies in a directory, and survives."""

    def __init__(
        self,
        directory: str | Path,
        world: World,
        profile: str | Profile = 'xcp-ng-8.3',
        name: str = 'pool',
        hosts: int = 2,
        clock: Callable[[], float] = time.time,
        *,
        users: Mapping[str, User] | None = None,
        tls: bool = False,
        ports: Sequence[int] = (),
        switches: Mapping[str, Any] | None = None,
    ) -> None:
        """Make or load a pool; nothing runs before ``start``.

        :param switches: limits by their names, and how to behave where
            servers differ (``profiles.SWITCHES``)
        """
        registry.load()
        given = dict(switches or {})
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.world = world
        self.name = name
        self.profile = (
            profiles.find(profile) if isinstance(profile, str) else profile
        )
        self.limits = Limits(**{
            key: given.pop(key) for key in NAMES & given.keys()
        })
        unknown = given.keys() - profiles.SWITCHES.keys()
        if unknown:
            raise ValueError(
                f'no such limits or switches: {", ".join(sorted(unknown))}; '
                f'there are {", ".join(sorted(NAMES))}, '
                f'{", ".join(profiles.SWITCHES)}'
            )
        self._switches = given
        self._clock = clock
        self._ahead_s = 0.0
        self._parts: dict[type, Any] = {}
        self._making = threading.RLock()
        self._stops: list[registry.Stop] = []
        self.stopping = threading.Event()
        self.calls: collections.Counter[str] = collections.Counter()
        self._counting = threading.Lock()
        self.model = datamodel.load()
        self.rows = Rows(self.directory / 'rows.db', self.model)
        self.faults = Faults()
        self.operations = Operations(self)
        self._compute()
        self.tasks = Tasks(self)
        self.events = Events(self)
        self.sessions = Sessions(
            self, users or {ROOT: User('secret')},
        )
        if not self.rows.all('pool'):
            bootstrap.fill(self, name, hosts)
        self.booting = bool(self.switch('still_booting'))
        self._down: set[str] = set()
        for host in self.hosts:
            self.tasks.orphan(host)
        self.servers = Servers(self, tls=tls, ports=ports)
        self.rows.flush()

    def _compute(self) -> None:
        def shows(cls: str, name: str, function: Any) -> None:
            self.rows.compute(
                cls, name, lambda ref, row: function(self, ref, row),
            )
        for (cls, name), function in registry.COMPUTED.items():
            shows(cls, name, function)
        self.operations.compute(self.rows.compute)

    # -- what it is -------------------------------------------------------

    def clock(self) -> float:
        """Return the time in the pool, in seconds since 1970."""
        return self._clock() + self._ahead_s

    def advance(self, seconds: float) -> None:
        """Let time pass at once: what is too old is forgotten."""
        self._ahead_s += seconds
        self.collect()

    def now(self) -> DateTime:
        """Return the time in the pool as the wire has it."""
        return DateTime.at(self.clock())

    def switch(self, name: str, default: Any = None) -> Any:
        """Return how this server behaves where servers differ."""
        if name in self._switches:
            return self._switches[name]
        found = self.profile.switch(name)
        return default if found is None else found

    def part(self, kind: Callable[[Pool], T]) -> T:
        """Return this pool's one object of a kind, made when first used."""
        with self._making:
            key: Any = kind
            if key not in self._parts:
                self._parts[key] = kind(self)
            made: T = self._parts[key]
            return made

    @property
    def sm(self) -> SmHost:
        """Return the managers of the pool's storage repositories."""
        return self.part(SmHost)

    def gc(self, sr: str) -> None:
        """Do one pass of an SR's collector now; ``sr`` is a uuid or ref."""
        if sr not in self.rows.all('SR'):
            sr = self.rows.by_uuid('SR', sr)
        self.sm.collect(sr)
        self.rows.flush()

    @property
    def ref(self) -> str:
        """Return the reference of the pool object."""
        return self.rows.all('pool')[0]

    @property
    def uuid(self) -> str:
        """Return the uuid of the pool object."""
        return str(self.rows.field('pool', self.ref, 'uuid'))

    @property
    def hosts(self) -> list[str]:
        """Return the references of the hosts, in the order made."""
        return self.rows.all('host')

    @property
    def master(self) -> str:
        """Return the reference of the host that answers."""
        return str(self.rows.field('pool', self.ref, 'master'))

    def host(self, at: int | str) -> str:
        """Return a host's reference by its number, uuid or reference."""
        if isinstance(at, int) or at.isdigit():
            if not 0 <= int(at) < len(self.hosts):
                raise LookupError(
                    f'the pool has no host {at}; they count from 0 to '
                    f'{len(self.hosts) - 1}'
                )
            return self.hosts[int(at)]
        if at in self.hosts:
            return at
        return self.rows.by_uuid('host', at)

    def url(self, host: int | str | None = None) -> str:
        """Return where a host listens; without one, the master."""
        return self.servers.url(
            self.master if host is None else self.host(host),
        )

    # -- life -------------------------------------------------------------

    def start(self) -> None:
        """Listen, on every host."""
        self.servers.start()
        for host in self.hosts:
            self._show_live(host)
        self._stops = [start(self) for start in registry.DAEMONS]
        collector = threading.Thread(
            target=self._collect_on, name='xapi-collect', daemon=True,
        )
        collector.start()
        self._stops.append(collector.join)
        self.rows.flush()

    def stop(self) -> None:
        """End as on a clean shutdown."""
        self.stopping.set()
        with self.rows.changed:
            self.rows.changed.notify_all()
        self.servers.stop()
        for stop in reversed(self._stops):
            stop()
        self.rows.close()

    def _collect_on(self) -> None:
        while not self.stopping.wait(self.limits.collect_s):
            self.collect()

    def collect(self) -> None:
        """Forget tasks and sessions that are too old."""
        self.tasks.collect()
        self.sessions.collect()
        self.rows.flush()

    # -- hosts come and go ------------------------------------------------

    def is_up(self, host: str) -> bool:
        """Say if a host answers."""
        return host not in self._down

    def stop_host(self, at: int | str) -> None:
        """Let a host die: no answer, no connection, its tasks are lost."""
        host = self.host(at)
        self._down.add(host)
        self.servers.stop_host(host)
        self.tasks.orphan(host)
        self._show_live(host)
        self.rows.flush()

    def start_host(self, at: int | str) -> None:
        """Let a host come back; it is a slave unless it is the master."""
        host = self.host(at)
        self._down.discard(host)
        self.servers.start_host(host)
        self._show_live(host)
        self.rows.flush()

    def set_master(
        self, at: int | str, *, kill: bool = False, cut: bool = True,
    ) -> None:
        """Have another host answer; the old master is a slave, or dead.

        :param cut: the old master's tasks and connections end
        """
        host, old = self.host(at), self.master
        self.rows.update('pool', self.ref, master=host)
        if host != old:
            if kill:
                self.stop_host(old)
            else:
                if cut:
                    self.tasks.orphan(old)
                    self.servers.hang_up(old)
        self.rows.flush()

    def kill_master(self) -> None:
        """Let the master die; the next host that is up takes over."""
        old = self.master
        up = [h for h in self.hosts if h != old and self.is_up(h)]
        if up:
            self.set_master(up[0], kill=True)
        else:
            self.stop_host(old)

    def _show_live(self, host: str) -> None:
        metrics = str(self.rows.field('host', host, 'metrics'))
        self.rows.update('host_metrics', metrics, live=self.is_up(host))

    # -- calls ------------------------------------------------------------

    def invoke(self, host: str, method: str, args: Sequence[Any]) -> Any:
        """Do what a call to a host asks for, and return its value.

        :raises Failure: as the server refuses it
        :raises Fault: it is not a call
        :raises Hangup: the connection is to end without an answer
        """
        try:
            self._hurt(method, BEFORE, OF_REQUEST)
            result = self._invoke(host, method, list(args))
            self.rows.flush()
            self._hurt(method, AFTER, OF_REQUEST)
            return result
        except Failure:
            self.rows.flush()
            raise

    def _invoke(self, host: str, method: str, args: list[Any]) -> Any:
        if self.booting:
            raise Failure('HOST_STILL_BOOTING')
        if method in ('system.listMethods', 'system_listMethods'):
            return self.methods()
        is_async = method.startswith(ASYNC)
        plain = method.removeprefix(ASYNC)
        message = self.model.message(plain)
        if message is None:
            raise Failure('MESSAGE_METHOD_UNKNOWN', method)
        with self._counting:
            self.calls[method] += 1
        self.model.check_release(message, self.profile.release)
        if is_async and not message.is_async:
            raise Fault(f'No async mode for this operation (rpc: {method})')
        _check_count(message, len(args))
        session = self._session(host, message, args)
        values = self._check(message, session, args)
        function = self._answerer(message)
        if is_async:
            self._hurt(method, BEFORE, _OF_CALL)
            result = self._start(host, message, session, function, values)
            self._hurt(method, AFTER, _OF_CALL)
            return result
        ctx = Ctx(session, host, f'OpaqueRef:{uuid.uuid4()}')
        return self._run(ctx, message, function, values)

    def _session(
        self, host: str, message: Message, args: list[Any],
    ) -> Session:
        """Take the session from the arguments, and check it."""
        known = registry.CALLS.get(message.name)
        if not message.has_session:
            return Session('', datamodel.ROLES[0])
        ref = self.model.check_value('string', args.pop(0), 'session_id')
        is_local = self.sessions.is_local(ref)
        if host != self.master and not is_local:
            raise self.slave()
        if is_local and not (known and known.on_slave):
            raise Failure('SESSION_INVALID', ref)
        return self.sessions.get(ref, local=is_local)

    def slave(self) -> Failure:
        """Return what a host that is not the master answers."""
        return Failure(
            'HOST_IS_SLAVE',
            str(self.rows.field('host', self.master, 'address')),
        )

    def _check(
        self, message: Message, session: Session, args: list[Any],
    ) -> list[Any]:
        if message.has_session:
            check_role(session, message.name, message.role)
        return [
            self.model.check_value(param.type, arg, param.name)
            for param, arg in zip(message.params, args, strict=False)
        ]

    def _answerer(self, message: Message) -> Callable[..., Any]:
        known = registry.CALLS.get(message.name)
        if known is not None:
            return known.function
        function = generic.find(self.model, message)
        if function is None:
            raise Failure('NOT_IMPLEMENTED', message.name)
        return function

    def call(self, ctx: Ctx, method: str, *args: Any) -> Any:
        """Make a call from within another, without its faults and marks."""
        message = self.model.messages()[method]
        return self._answerer(message)(self, ctx, *args)

    def _run(
        self, ctx: Ctx, message: Message, function: Callable[..., Any],
        values: list[Any],
    ) -> Any:
        name = message.name
        self._hurt(name, BEFORE, _OF_CALL)
        try:
            result = function(self, ctx, *values)
        except Failure:
            raise
        except Exception as error:
            # A real server does the same with what nobody thought of.
            LOG.exception('%s failed in the simulator', name)
            raise internal(f'{type(error).__name__}({error})') from error
        self._hurt(name, AFTER, _OF_CALL)
        return result

    def _start(
        self, host: str, message: Message, session: Session,
        function: Callable[..., Any], values: list[Any],
    ) -> str:
        known = registry.CALLS.get(message.name)
        task = self.tasks.create(
            f'{ASYNC}{message.name}', '', host,
            cancellable=known is not None and known.cancellable,
            owner=session.user,
        )
        self.tasks.collect()
        ctx = Ctx(session, host, task.ref, task)
        threading.Thread(
            target=self._work, args=(ctx, task, message, function, values),
            name=f'xapi-{message.name}', daemon=True,
        ).start()
        return task.ref

    def _work(
        self, ctx: Ctx, task: Task, message: Message,
        function: Callable[..., Any], values: list[Any],
    ) -> None:
        try:
            result = self._run(ctx, message, function, values)
            self.tasks.succeed(task, value(result))
        except Failure as failure:
            self.tasks.fail(task, failure)
        except Hangup:
            LOG.info('task %s was lost with its host', task.ref)
        if not self.stopping.is_set():
            self.rows.flush()

    def _hurt(self, method: str, when: str, kinds: frozenset[str]) -> None:
        """Let go wrong what was ordered."""
        for fault in self.faults.take(method, when, kinds=kinds):
            if fault.kind == REFUSE:
                raise Failure(*map(str, fault.params))
            if fault.kind == DELAY:
                if self.stopping.wait(float(fault.params[0])):
                    raise Hangup
            elif fault.kind == KILL_MASTER:
                self.rows.flush()
                self.kill_master()
                raise Hangup
            else:
                raise Hangup

    def methods(self) -> list[str]:
        """Return the names of the calls of this release."""
        found = []
        for name, message in self.model.messages().items():
            try:
                self.model.check_release(message, self.profile.release)
            except Failure:
                continue
            found.append(name)
        return sorted(found)

    def missing(self) -> list[str]:
        """Return the calls that are published, and not simulated."""
        return generic.missing(self.model)


def check_role(session: Session, permission: str, role: str | None) -> None:
    """Refuse what needs a higher role than the session has.

    :raises Failure: RBAC_PERMISSION_DENIED
    """
    if session.is_local_root or role is None:
        return
    least = datamodel.ROLES.index(role)
    if datamodel.ROLES.index(session.role) < least:
        raise Failure(
            'RBAC_PERMISSION_DENIED', permission.lower(),
            'No permission in user session. (Roles with this permission: '
            f'{", ".join(datamodel.ROLES[least:])})',
        )


def _check_count(message: Message, received: int) -> None:
    # The session is counted neither as expected nor as received.
    received -= message.has_session
    if not message.required <= received <= len(message.params):
        raise Failure(
            'MESSAGE_PARAMETER_COUNT_MISMATCH', message.name,
            str(message.required), str(received),
        )
