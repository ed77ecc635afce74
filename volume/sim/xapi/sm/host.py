# SPDX-License-Identifier: Apache-2.0
"""All managers of a pool: which SR is plugged, and by whom it is served."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from volume import errors
from volume.sim.xapi import registry
from volume.sim.xapi.disk.gc import Collector
from volume.sim.xapi.disk.gc import Policy
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.sm import probes
from volume.sim.xapi.sm import sync
from volume.sim.xapi.sm import types
from volume.sim.xapi.sm.base import Change
from volume.sim.xapi.sm.base import Manager
from volume.sim.xapi.sm.base import Unimplemented

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

SECRET = '_secret'


class SmHost:
    """The managers of the plugged SRs, and their collectors."""

    def __init__(self, pool: Pool) -> None:
        """Nothing is opened yet: an SR is served from its first call on."""
        self._pool = pool
        self._lock = threading.RLock()
        self._managers: dict[str, Manager] = {}
        self._collectors: dict[str, Collector[Change]] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._is_ending = False

    # -- managers ---------------------------------------------------------

    def fresh(
        self, kind: str, sr_uuid: str, device_config: dict[str, str],
        sm_config: dict[str, str], host: str,
    ) -> Manager:
        """Return a manager that is attached nowhere; secrets are resolved.

        :raises Failure: the device_config is incomplete
        """
        manager = types.manager_for(kind)(
            self._pool, kind, sr_uuid, self.in_clear(device_config),
            dict(sm_config), host)
        probes.check(self._pool, kind, host, manager.device_config)
        return manager

    def manager(self, sr: str) -> Manager:
        """Return who serves a plugged SR.

        :raises Failure: SR_HAS_NO_PBDS: it is not plugged where it is used
        """
        hosts = self.hosts(sr)
        if not hosts:
            raise Failure('SR_HAS_NO_PBDS', sr)
        with self._lock:
            manager = self._managers.get(sr)
            if manager is None:
                # The server was started again; the SR is still plugged.
                manager = self._new(sr, hosts[0])
                for host in hosts:
                    manager.attach(host)
                self._managers[sr] = manager
            manager.host_ref = hosts[0]
            return manager

    @contextlib.contextmanager
    def serving(self, sr: str) -> Iterator[Manager]:
        """Give the manager of an SR, while no one else writes its rows."""
        manager = self.manager(sr)
        with manager.lock, mapped():
            yield manager

    def hosts(self, sr: str) -> list[str]:
        """Return the hosts that an SR is served on, the acting one first.

        A shared SR is served by the master alone: unplugged there, it is
        not served.
        """
        rows = self._pool.rows
        hosts = [
            str(rows.field('PBD', pbd, 'host'))
            for pbd in rows.find('PBD', SR=sr)
            if rows.field('PBD', pbd, 'currently_attached')
        ]
        if rows.field('SR', sr, 'shared'):
            master = self._pool.master
            if master not in hosts:
                return []
            hosts.remove(master)
            hosts.insert(0, master)
        return hosts

    def in_clear(self, device_config: dict[str, str]) -> dict[str, str]:
        """Return a device_config with its secrets in it."""
        rows = self._pool.rows
        found = {}
        for key, value in device_config.items():
            if key.endswith(SECRET):
                refs = rows.find('secret', uuid=value)
                if refs:
                    key = key.removesuffix(SECRET)
                    value = rows.field('secret', refs[0], 'value')
            found[key] = value
        return found

    # -- plugging ---------------------------------------------------------

    def plug(self, pbd: str) -> None:
        """Attach an SR on the host of a PBD, and write that down."""
        rows = self._pool.rows
        row = rows.get('PBD', pbd)
        sr, host = row['SR'], row['host']
        with self._lock, mapped():
            manager = self._managers.get(sr)
            fresh = manager or self._new(sr, host)
            fresh.attach(host)
            self._managers[sr] = fresh
            rows.update('PBD', pbd, currently_attached=True)

    def unplug(self, pbd: str) -> None:
        """Detach an SR on the host of a PBD; the last one ends its work."""
        rows = self._pool.rows
        row = rows.get('PBD', pbd)
        sr = row['SR']
        if self._is_last(sr, pbd):
            self.stop_collecting(sr)
        with self._lock, mapped():
            manager = self._managers.get(sr)
            if manager is None:
                with contextlib.suppress(Failure):
                    manager = self.manager(sr)
            if manager is not None:
                manager.detach(row['host'])
                if not manager.attached:
                    self._managers.pop(sr, None)
            rows.update('PBD', pbd, currently_attached=False)

    def forget(self, sr: str) -> None:
        """Drop what is known of an SR that is no more."""
        self.stop_collecting(sr)
        with self._lock:
            self._managers.pop(sr, None)

    def _new(self, sr: str, host: str) -> Manager:
        rows = self._pool.rows
        row = rows.get('SR', sr)
        pbd = rows.find('PBD', SR=sr, host=host)[0]
        return self.fresh(
            row['type'], row['uuid'],
            rows.field('PBD', pbd, 'device_config'), row['sm_config'], host)

    def _is_last(self, sr: str, pbd: str) -> bool:
        rows = self._pool.rows
        return not any(
            rows.field('PBD', other, 'currently_attached')
            for other in rows.find('PBD', SR=sr) if other != pbd)

    # -- the collector ----------------------------------------------------

    def kick(self, sr: str) -> None:
        """Say that an SR may have something to collect."""
        with self._lock:
            if self._is_ending:
                return
            collector = self._collectors.get(sr)
            if collector is None:
                collector = self._collectors[sr] = Collector(
                    functools.partial(self._work, sr),
                    functools.partial(self._has_work, sr),
                    functools.partial(self._report, sr),
                    self._delay_s)
            if self._pool.faults.gc_paused:
                collector.pause()
        collector.kick()

    def gc_changed(self) -> None:
        """Look again whether collecting is paused, and at its delay."""
        with self._lock:
            collectors = list(self._collectors.values())
        for collector in collectors:
            if self._pool.faults.gc_paused:
                collector.pause()
            else:
                collector.resume()
                collector.wake()

    def collect(self, sr: str) -> None:
        """Do one pass over an SR now, whatever the delay."""
        for change in self._work(sr, lambda: self._is_ending):
            self._report(sr, change)

    def wait_collected(self, sr: str, timeout_s: float = 60.0) -> bool:
        """Return whether the collector of an SR came to an end in time."""
        with self._lock:
            collector = self._collectors.get(sr)
        return collector is None or collector.wait(timeout_s)

    def stop_collecting(self, sr: str) -> None:
        """End the collector of an SR, wherever it is."""
        with self._lock:
            collector = self._collectors.pop(sr, None)
        if collector is not None:
            collector.abort()

    def stop(self) -> None:
        """End all that works here; what is plugged stays plugged."""
        with self._lock:
            self._is_ending = True
            refs = list(self._collectors)
        for sr in refs:
            self.stop_collecting(sr)
        with self._lock:
            managers = [*self._managers.values()]
            self._managers.clear()
        for manager in managers:
            manager.close()

    def _delay_s(self) -> float:
        by_order = self._pool.faults.gc_delay_s
        return self._pool.limits.gc_delay_s if by_order is None else by_order

    def _work(
        self, sr: str, aborted: Callable[[], bool],
    ) -> Iterator[Change]:
        with unavailable():
            policy = self._policy(sr)
            if policy is not None:
                # One pass at a time, whoever asked for it.
                with self._lock:
                    turn = self._turns.setdefault(sr, threading.Lock())
                with turn:
                    yield from self.manager(sr).collect(aborted, policy)

    def _has_work(self, sr: str) -> bool:
        with unavailable():
            policy = self._policy(sr)
            return policy is not None and (
                self.manager(sr).needs_collect(policy))

    def _policy(self, sr: str) -> Policy | None:
        """Return what an SR allows, None if nothing."""
        rows = self._pool.rows
        if not rows.exists('SR', sr) or not self.hosts(sr):
            return None
        config = rows.field('SR', sr, 'other_config')
        if config.get('gc') == 'false':
            return None
        return Policy(
            coalesce=config.get('coalesce') != 'false',
            leaf_coalesce=config.get('leaf-coalesce') != 'false',
            may_leaf=functools.partial(self._may_leaf, sr),
            room=self.manager(sr).free_bytes,
            told=functools.partial(self._told, sr),
        )

    def _may_leaf(self, sr: str, uuid: str) -> bool:
        rows = self._pool.rows
        for ref in rows.find('VDI', uuid=uuid):
            row = rows.get('VDI', ref)
            return (
                row['on_boot'] != 'reset' and not row['allow_caching']
                and row['other_config'].get('leaf-coalesce') != 'false')
        return False  # no row knows it yet: a scan will find it

    def _told(self, sr: str, code: int, uuid: str, length: int) -> None:
        if code == 44:
            with self._pool.rows.change('SR', sr, 'sm_config') as config:
                config['gc_no_space'] = str(length)

    def _report(self, sr: str, change: Change) -> None:
        """Write a step into the rows, as the files are by now."""
        pool = self._pool
        if not pool.rows.exists('SR', sr):
            return
        with unavailable(), self.serving(sr) as manager:
            for uuid in (*change.changed, *change.gone):
                info = manager.inspect(uuid)
                found = pool.rows.find('VDI', uuid=uuid, SR=sr)
                if info is None:
                    for ref in found:
                        pool.rows.delete('VDI', ref)
                elif found or not info.managed:
                    sync.put(pool, sr, info)
            sync.sizes(pool, sr, manager)
            with pool.rows.change('SR', sr, 'sm_config') as config:
                config.pop('gc_no_space', None)


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Tell what a driver cannot do at all as the server tells it."""
    try:
        yield
    except Unimplemented as refused:
        raise Failure(
            'INTERNAL_ERROR', f'Storage_error.Unimplemented({refused})',
        ) from None


@contextlib.contextmanager
def unavailable() -> Iterator[None]:
    """Tell a driver's refusal as the collector takes it: it tries later."""
    try:
        yield
    except Failure as refused:
        raise errors.Unavailable(str(refused)) from refused


@registry.daemon
def _start(pool: Pool) -> registry.Stop:
    return pool.sm.stop
