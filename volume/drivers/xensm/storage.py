# SPDX-License-Identifier: Apache-2.0
"""One SR is one pool: what the driver does, for one SR.

``driver.XenSmDriver`` finds the ``Storage`` by the pool's name and calls its
method of the contract's name. A family of SRs is a class that is put
together from parts, each of which implements some of the methods on what
stands here (see the end of ``driver``)::

    class _Vhd(Copies, Streams, Access): ...

What no part implements is ``Unsupported``, and ``features()`` leaves it out;
so it does with what the type of SR cannot do in this pool.

Who changes the SR does it by ``self.task()`` (or within ``self.turn()``), so
that there is one queue for each SR; who reads asks ``self.link`` at once.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers.xensm import chains
from volume.drivers.xensm import vdis
from volume.drivers.xensm.fifo import Queue
from volume.drivers.xensm.vdis import Thing
from volume.drivers.xensm.vdis import Vdi
from volume.node import Node
from volume.xenapi import failures
from volume.xenapi import handlers
from volume.xenapi import kinds
from volume.xenapi import srs
from volume.xenapi import tasks
from volume.xenapi.kinds import Kind
from volume.xenapi.link import Link
from volume.xenapi.options import Settings
from volume.xenapi.srs import Sr

LOG = logging.getLogger(__name__)

# What the server's storage driver must have for a feature of ours. (With
# VDI_CLONE a snapshot becomes a volume; a clone of a volume needs no more.)
NEEDS: Mapping[str, frozenset[str]] = {
    'Snapshots': frozenset({'VDI_SNAPSHOT', 'VDI_DELETE'}),
    'Clone': frozenset({'VDI_CLONE'}),
    'Revert': frozenset({'VDI_CLONE'}),
    'Flatten': frozenset({'VDI_CREATE'}),
    'Resize': frozenset({'VDI_RESIZE'}),
}

SERVED_S = 5.0
LOOK_S = 30.0
REPAIR_S = 60.0
# How a storage driver says that what it has plugged in is not there.
AWAY = ('SR_BACKEND_FAILURE_46', 'SR_BACKEND_FAILURE_47')
COUNT_PART = 50.0  # listing all VDIs may take a fiftieth of the time

WATCH = Callable[[float], None]
NOT_TRIED = (
    'nothing was tried: the service plugs it in when it starts, if repair is '
    'true, and so does "volume-manage xensm BACKEND repair"'
)


class Storage:
    """An SR."""

    def __init__(
        self, link: Link, settings: Settings, node: Node, name: str,
        kind: Kind, sr_uuid: str,
    ) -> None:
        self.link = link
        self.settings = settings
        self.node = node
        self.name = name
        """The pool's name."""
        self.kind = kind
        self.sr_uuid = sr_uuid
        self.sr_ref = ''
        """Kept between calls; a pool that was restored gives another."""
        self.queue = Queue(settings.per_sr, f'SR {sr_uuid}')
        self.abilities: frozenset[str] = frozenset()
        """What the pool's storage driver of this type says it can do."""
        self.formats: frozenset[str] = frozenset()
        """The image formats that it says it knows; none is: not known."""
        self._served_at = -SERVED_S
        self._looked_at = -LOOK_S
        self._count_at = 0.0
        self._repair_at = 0.0
        self._hidden_bytes = 0
        self._guard = threading.Lock()
        self._locks: dict[str, _Counted] = {}

    # What parts build on.

    def sr(self) -> Sr:
        """Return the SR as it is now.

        :raises Unavailable: the pool does not know it
        """
        try:
            if self.sr_ref:
                return srs.get(self.link, self.sr_ref)
        except errors.NotFound:
            LOG.info('SR %s has another reference now', self.sr_uuid)
        found = srs.by_uuid(self.link, self.sr_uuid)
        if found is None:
            self.sr_ref = ''
            raise errors.Unavailable(
                f'the pool knows no SR {self.sr_uuid}: introduce it, or give '
                'sr_type and device_config, so that the service does'
            )
        self.sr_ref = found.ref
        return found

    def ref(self) -> str:
        """Return the SR's reference without asking, if it is known."""
        return self.sr_ref or self.sr().ref

    def find(self, thing: Thing) -> Vdi | None:
        """Return the VDI of a volume or snapshot, or nothing.

        Nothing is said only of an SR that could tell: a record is removed
        by a scan of an SR whose storage is away.

        :raises Unavailable: the SR is not plugged in
        """
        found = vdis.find(self.link, thing)
        if found is None and (
            time.monotonic() - self._served_at > SERVED_S
        ):
            self.need_served()
        return found

    def need(self, thing: Thing) -> Vdi:
        """Return the VDI of a volume or snapshot.

        :raises NotFound: there is none
        """
        found = self.find(thing)
        if found is None:
            kind = type(thing).__name__.lower()
            raise errors.NotFound(
                f'no VDI of SR {self.sr_uuid} holds {kind} {thing.id}'
            )
        return found

    def need_served(self) -> Sr:
        """Return the SR, if it can be worked on now.

        :raises Unavailable: it is plugged nowhere that matters
        """
        started = time.monotonic()
        sr = self.sr()
        if not srs.is_served(self.link, sr, srs.pbds(self.link, sr)):
            raise errors.Unavailable(
                f'SR {self.sr_uuid} is not plugged in'
                + (' on the master' if sr.shared else '')
                + ': "volume-manage xensm repair" says why'
            )
        if sr.total_bytes <= 0:
            raise errors.Unavailable(
                f'the pool has not looked at SR {self.sr_uuid} yet'
            )
        self.was_served(started)
        return sr

    def was_served(self, at: float) -> None:
        """Remember that the SR could be worked on at a time."""
        self._served_at = at

    def turn(self) -> AbstractContextManager[None]:
        """Have one's turn in changing the SR."""
        return self.queue.turn()

    def task(
        self, method: str, *args: Any, label: str,
        deadline_s: float = tasks.DEADLINE_S, watch: WATCH | None = None,
    ) -> str:
        """Change the SR by a long call, in turn; return its result.

        For copies of bytes, which do not lock the SR, call ``tasks.run``.
        """
        with self.turn():
            return tasks.run(
                self.link, method, args, label, deadline_s, watch
            )

    def patient_task(
        self, method: str, vdi: Vdi, *args: Any, label: str
    ) -> str:
        """Change a VDI once the server itself has let go of it.

        :raises Busy: a VM has it plugged in, or the server keeps it
        """
        def work() -> str:
            return self.task(method, vdi.ref, *args, label=label)

        try:
            return work()
        except errors.Busy:
            self.refuse_plugged(vdis.get(self.link, vdi.ref), 'change')
        done: str = handlers.patiently(work)
        return done

    @contextlib.contextmanager
    def locked(self, uuid: str) -> Iterator[None]:
        """Be alone, in this service, with one VDI and what is made of it."""
        with self._guard:
            lock = self._locks.setdefault(uuid, _Counted())
            lock.count += 1
        try:
            with lock.lock:
                yield
        finally:
            with self._guard:
                lock.count -= 1
                if not lock.count:
                    del self._locks[uuid]

    def refuse_plugged(self, vdi: Vdi, verb: str) -> None:
        """:raises Busy: a VM has it plugged in, or is having it"""
        if vdis.guests(self.link, vdi):
            raise errors.Busy(
                f'cannot {verb} {vdi.name or vdi.uuid}: a VM has it plugged '
                'in; detach it first'
            )

    def rounded(self, size_bytes: int) -> int:
        """Return how large the server makes what is asked for."""
        grain = self.kind.granularity_bytes
        return -(-size_bytes // grain) * grain

    def destroy(self, vdi: Vdi) -> None:
        """Destroy a VDI; one that is gone is no trouble.

        One that was just read or written may still be plugged into the
        server's own domain: that ends by itself, and is waited for.

        :raises Busy: a VM uses it
        """
        try:
            self.patient_task('VDI.destroy', vdi, label=vdi.name or vdi.uuid)
        except errors.NotFound:
            LOG.debug('VDI %s is gone already', vdi.uuid)

    # The pool.

    def check(self) -> None:
        """Find the SR, and plug it in where it should be and is not.

        :raises Unavailable: the SR cannot be worked on now
        """
        sr = self.sr()
        there = srs.pbds(self.link, sr)
        was_served = srs.is_served(self.link, sr, there)
        troubles = self._repair(sr, there, was_served)
        if troubles is not None:
            sr = self.sr()
            there = srs.pbds(self.link, sr)
        if not srs.is_served(self.link, sr, there):
            raise errors.Unavailable(
                f'SR {self.sr_uuid} is not plugged in'
                + (' on the master' if sr.shared else '')
                + f': {"; ".join(troubles or ()) or NOT_TRIED}'
            )
        if not was_served or sr.total_bytes <= 0:
            self._scan(sr)
        self.abilities, self.formats = srs.abilities(
            self.link, self.kind.type
        )

    def _repair(
        self, sr: Sr, there: Sequence[srs.Pbd], is_served: bool
    ) -> list[str] | None:
        """Plug the SR in where it should be; say where that failed.

        A host that matters is tried at every check. Another one may be down
        or be worked on: it is tried now and then. ``None`` is not tried.
        """
        started = time.monotonic()
        if not self.settings.repair:
            return None
        if is_served and started < self._repair_at:
            return None
        self._repair_at = started + REPAIR_S
        troubles = srs.repair(
            self.link, sr, self.settings.device_config, only_enabled=True,
        )
        for trouble in troubles if is_served else ():
            LOG.info('SR %s: %s', self.sr_uuid, trouble)
        return troubles

    def _scan(self, sr: Sr) -> None:
        """Let the server look, unless it is busy with something else.

        :raises Unavailable: what the SR lies on is away
        """
        self._looked_at = time.monotonic()
        try:
            with self.queue.turn(1.0):
                srs.scan(self.link, sr)
        except errors.VolumeError as failed:
            if failures.code(failed) in AWAY:
                self._looked_at = -LOOK_S  # look at once the next time
                raise errors.Unavailable(
                    f'SR {self.sr_uuid} is plugged in, and its storage is '
                    f'away: {failed}'
                ) from failed
            LOG.info('SR %s was not scanned: %s', self.sr_uuid, failed)

    def _count(self, sr: Sr) -> None:
        """Learn what is stored for nobody by name, if that is not dear.

        That is what the server will merge: hidden VDIs with one child.
        """
        started = time.monotonic()
        if started < self._count_at:
            return
        everything = vdis.all_of(self.link, sr.ref)
        children = collections.Counter(
            vdi.sm_config.get(chains.PARENT, '') for vdi in everything
        )
        self._hidden_bytes = sum(
            max(vdi.used_bytes, 0) for vdi in everything
            if not vdi.managed and children[vdi.uuid] == 1
        )
        ended = time.monotonic()
        self._count_at = ended + max(LOOK_S, COUNT_PART * (ended - started))

    def pool(self) -> model.Pool:
        """Return the pool as it is now.

        :raises Unavailable: the SR is not there
        """
        sr = self.need_served()
        if time.monotonic() - self._looked_at > LOOK_S and (
            sr.keys.get('auto-scan') != 'true'
        ):
            self._scan(sr)
            sr = self.sr()
        self._count(sr)
        return model.Pool(
            self.name,
            total_bytes=max(sr.total_bytes, 0),
            free_bytes=self.free_bytes(sr),
            thin=self.is_thin(sr),
            features=self.features(),
            granularity_bytes=self.kind.granularity_bytes,
            max_volume_bytes=self.max_volume_bytes(),
            hidden_bytes=self._hidden_bytes,
            device=f'sr:{self.sr_uuid}',
        )

    def free_bytes(self, sr: Sr) -> int:
        """Return what can be written yet.

        What was deleted counts as used until the server has given it back,
        which may take it minutes: so says the server, and so do we.
        """
        return max(0, min(sr.total_bytes, sr.total_bytes - sr.used_bytes))

    def max_volume_bytes(self) -> int:
        """Return the size of the largest volume."""
        if 'qcow2' in self.formats:
            return kinds.QCOW2_MAX_BYTES
        return self.kind.max_volume_bytes

    def is_thin(self, sr: Sr) -> bool:
        """Say whether a volume takes only what is written to it."""
        return self.kind.thin or sr.sm_config.get('allocation') in (
            'thin', 'xlvhd', 'dynamic'
        )

    def features(self) -> frozenset[str]:
        """Return the contract's features that this SR has."""
        return frozenset(
            interface.__name__ for interface in base.FEATURES
            if self._has(interface)
            and NEEDS.get(interface.__name__, frozenset()) <= self.abilities
        )

    def _has(self, interface: type) -> bool:
        """Say whether this class implements a feature's methods."""
        names = [
            name for name, method in vars(interface).items()
            if getattr(method, '__isabstractmethod__', False)
        ]
        return bool(names) and all(
            getattr(type(self), name, None)
            not in (None, getattr(Storage, name, None))
            for name in names
        )

    # The contract, by volumes of this pool. What a family cannot do is
    # refused here, and nowhere else.

    def create(self, volume: model.Volume) -> str:
        self._refuse('create')

    def delete(self, volume: model.Volume) -> None:
        self._refuse('delete')

    def inspect(self, volume: model.Volume) -> model.Found:
        self._refuse('inspect')

    def scan(self) -> Iterator[model.Found]:
        self._refuse('scan')

    def reader(self, source: Thing) -> AbstractContextManager[base.Reader]:
        self._refuse('reader')

    def writer(
        self, volume: model.Volume
    ) -> AbstractContextManager[base.Writer]:
        self._refuse('writer')

    def adopt(self, handle: str, volume: model.Volume) -> str:
        self._refuse('adopt')

    def disown(self, volume: model.Volume) -> None:
        self._refuse('disown')

    def clone(self, source: Thing, volume: model.Volume) -> str:
        self._refuse('clone')

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        self._refuse('describe')

    def extents(
        self, source: Thing, since: model.Snapshot | None
    ) -> Iterator[model.Extent]:
        self._refuse('extents')

    def flatten(
        self, volume: model.Volume, watch: Callable[[float], None]
    ) -> str:
        self._refuse('flatten')

    def move(self, volume: model.Volume, target: Storage) -> str:
        """As in the contract; the pool is another ``Storage`` here."""
        self._refuse('move')

    def grant(
        self, volume: model.Volume, host: model.Host, access: model.Access
    ) -> model.Connection:
        self._refuse('grant')

    def revoke(self, volume: model.Volume, host: model.Host) -> None:
        self._refuse('revoke')

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        self._refuse('resize')

    def revert(self, snapshot: model.Snapshot) -> str:
        self._refuse('revert')

    def snapshot(self, snapshot: model.Snapshot) -> str:
        self._refuse('snapshot')

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        self._refuse('delete_snapshot')

    def upkeep(self) -> bool:
        return False

    def _refuse(self, verb: str) -> NoReturn:
        raise errors.Unsupported(
            f'an SR of type {self.kind.type} has no {verb} '
            f'(pool {self.name})'
        )


def make(
    families: Mapping[str, type[Storage]], link: Link, settings: Settings,
    node: Node, name: str, sr: Sr,
) -> Storage:
    """Return the storage of an SR.

    :raises Invalid: volumes cannot lie on an SR of its type
    """
    kind = kinds.find(sr.type)
    made = families[kind.family](
        link, settings, node, name, kind, sr.uuid
    )
    made.sr_ref = sr.ref
    return made


class _Counted:
    """A lock, and how many have it or wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
