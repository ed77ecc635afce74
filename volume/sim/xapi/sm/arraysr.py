# SPDX-License-Identifier: Apache-2.0
"""What ``netapp`` and ``equal`` share: every VDI is a volume of an array.

Modelled on the administrator's guides of XenServer 5.6 and 6.0 and on what
their management client asked for; the drivers' own source was never
published. What the guides leave open is marked [I].
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import xml.dom.minidom
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TYPE_CHECKING

from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.raw_disk import Raw
from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm import arraybox
from volume.sim.xapi.sm.arraydisk import ArrayDisk
from volume.sim.xapi.sm.base import Info
from volume.sim.xapi.sm.base import Manager
from volume.sim.xapi.sm.base import Sizes
from volume.sim.xapi.world import Array

if TYPE_CHECKING:
    from volume.sim.xapi.world import World

SECTOR_BYTES = 512


class ArraySr(Manager):
    """What both kinds of arrays share."""

    family = 'array'
    # The key of device_config that names the pool on the array, and the
    # error of one that is missing.
    pool_key: ClassVar[str]
    pool_missing: ClassVar[int]
    management_bytes: ClassVar[int] = 0

    # -- the repository ---------------------------------------------------

    def create(self) -> None:
        array = self.login()
        name = self.device_config.get(self.pool_key, '')
        if not name:
            raise fault(self.pool_missing, xml=self.describe_pools(array))
        self.check_new(array, name)
        with self.changing() as (box, state):
            if box.free_bytes(state, name) < self.management_bytes:
                raise fault(44)
            state.repositories[self.sr_uuid] = {
                'pool': name,
                'management_bytes': self.management_bytes,
                **self.facts(),
            }

    def delete(self) -> None:
        with self.changing() as (_, state):
            if state.of(self.sr_uuid):
                raise fault(39)
            state.repositories.pop(self.sr_uuid, None)

    def attach(self, host_ref: str) -> None:
        self.assert_online()
        with self.session() as box:
            if self.sr_uuid not in box.look().repositories:
                raise fault(47)
        if not self.attached:
            self.world.take(self._what, self.pool.uuid)
        self.attached.add(host_ref)

    def detach(self, host_ref: str) -> None:
        self.attached.discard(host_ref)
        if not self.attached:
            self.world.give_back(self._what, self.pool.uuid)

    def scan(self) -> list[Info]:
        self.assert_online()
        with self.session() as box:
            state = box.look()
            return [
                self.info(box, state, lun)
                for lun in state.of(self.sr_uuid)
            ]

    def sizes(self) -> Sizes:
        box = self.box()
        state = box.look()
        repository = state.repositories.get(self.sr_uuid)
        if repository is None:
            return Sizes(0, 0, 0)
        name = repository['pool']
        return Sizes(
            box.size_bytes(name),
            box.used_bytes(state, name),
            sum(lun.size_bytes for lun in state.of(self.sr_uuid)),
        )

    def inspect(self, uuid: str) -> Info | None:
        box = self.box()
        state = box.look()
        lun = state.luns.get(uuid)
        return None if lun is None else self.info(box, state, lun)

    # -- its disks --------------------------------------------------------

    def make(
        self, uuid: str, size_bytes: int, sm_config: dict[str, str],
        name: str = '',
    ) -> Info:
        self.assert_online()
        size_bytes = -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        if size_bytes <= 0:
            raise fault(79, 'the size is not a positive number')
        with self.changing() as (box, state):
            lun = self.new_lun(state, uuid, size_bytes, sm_config)
            lun.name = name
            self.add(box, state, lun)
            box.make_file(uuid, size_bytes)
            return self.info(box, state, lun)

    def remove(self, uuid: str) -> None:
        with self.changing() as (box, state):
            lun = state.luns.get(uuid)
            if lun is None:
                return
            for snapshot in state.snapshots(uuid):
                snapshot.origin = ''  # [I] it outlives its volume
            box.forget(state, lun)
            box.settle(state, lun.origin)

    def resize(self, uuid: str, size_bytes: int) -> Info:
        self.assert_online()
        size_bytes = -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        with self.changing() as (box, state):
            lun = self.lun(state, uuid)
            if size_bytes < lun.size_bytes:
                raise fault(79, 'shrinking not allowed')
            before = box.charge(state, lun)
            grown = dataclasses.replace(lun, size_bytes=size_bytes)
            more = box.charge(state, grown) - before
            if more > self.room(box, state, lun.pool):
                raise fault(44)
            with open(box.file(uuid), 'r+b') as file:
                file.truncate(size_bytes)
            lun.size_bytes = size_bytes
            return self.info(box, state, lun)

    def snapshot(self, uuid: str, new_uuid: str) -> list[Info]:
        return self._copy(uuid, new_uuid, is_snapshot=True)

    def clone(self, uuid: str, new_uuid: str) -> list[Info]:
        return self._copy(uuid, new_uuid, is_snapshot=False)

    def rename(self, uuid: str, name: str, description: str = '') -> None:
        with self.changing() as (_, state):
            lun = self.lun(state, uuid)
            lun.name, lun.description = name, description

    def open_disk(self, uuid: str, writable: bool) -> Disk:
        with self.session() as box:
            lun = self.lun(box.look(), uuid)
            if lun.is_offline:
                raise fault(46)
            if not writable:
                return Raw().open(str(box.file(uuid)))
            self.assert_free(uuid)
            return ArrayDisk(box, uuid, self.world, self.pool.uuid)

    # -- what the kinds differ in -----------------------------------------

    @staticmethod
    @abc.abstractmethod
    def enter(world: World, device_config: dict[str, str]) -> Array:
        """Return the array that lets us in, or say why it does not."""

    def check_new(self, array: Array, name: str) -> None:
        """Refuse a new SR that the array cannot hold."""

    def facts(self) -> dict[str, Any]:
        """Return what the array keeps of a new SR."""
        return {}

    @abc.abstractmethod
    def describe_pools(self, array: Array) -> str:
        """Return the XML that helps to choose a pool on the array."""

    @abc.abstractmethod
    def new_lun(
        self, state: arraybox.State, uuid: str, size_bytes: int,
        sm_config: dict[str, str],
    ) -> arraybox.Lun:
        """Return a volume that is not yet there, or refuse it."""

    def check_copy(
        self, state: arraybox.State, lun: arraybox.Lun, is_snapshot: bool,
    ) -> None:
        """Refuse a snapshot or a clone that the array cannot make."""

    def assert_free(self, uuid: str) -> None:
        """Refuse a volume that another pool writes to."""

    # -- smaller parts ----------------------------------------------------

    def login(self) -> Array:
        """Let the array check who we are.

        :raises Failure: the kind's own errors
        """
        return self.enter(self.world, self.device_config)

    def box(self) -> arraybox.Box:
        """Return the inside of the array, without a session of its own."""
        return arraybox.Box(self.world, self.login())

    @contextlib.contextmanager
    def session(self) -> Iterator[arraybox.Box]:
        """Be logged in for the time of one operation."""
        yield arraybox.Box(self.world, self.login())

    @contextlib.contextmanager
    def changing(
        self,
    ) -> Iterator[tuple[arraybox.Box, arraybox.State]]:
        """Be logged in, and change what the array knows."""
        with self.session() as box, box.changing() as state:
            yield box, state

    def repository(self, state: arraybox.State) -> dict[str, Any]:
        """Return what the array keeps of this SR."""
        found = state.repositories.get(self.sr_uuid)
        if found is None:
            raise fault(47)
        return found

    def lun(self, state: arraybox.State, uuid: str) -> arraybox.Lun:
        """Return a volume.

        :raises Failure: VDI_MISSING
        """
        found = state.luns.get(uuid)
        if found is None:
            raise fault(46, f'no volume {uuid} on the array')
        return found

    def room(
        self, box: arraybox.Box, state: arraybox.State, pool: str,
    ) -> int:
        """Return what is left of a pool, or what a test leaves of it."""
        left = self.pool.faults.room(self.sr_uuid)
        free = box.free_bytes(state, pool)
        return free if left is None else min(free, left)

    def is_thick(self, sm_config: dict[str, str]) -> bool:
        """Whether a volume takes its whole size at once."""
        wanted = sm_config.get('allocation') or self.device_config.get(
            'allocation') or 'thick'
        return wanted != 'thin'

    def add(
        self, box: arraybox.Box, state: arraybox.State, lun: arraybox.Lun,
    ) -> None:
        """Put a volume among the others, if it has room.

        :raises Failure: 44
        """
        if box.charge(state, lun) > self.room(box, state, lun.pool):
            raise fault(44)
        state.last_number += 1
        lun.number = state.last_number
        state.luns[lun.uuid] = lun

    def info(
        self, box: arraybox.Box, state: arraybox.State, lun: arraybox.Lun,
    ) -> Info:
        used = lun.snapshot_bytes if lun.is_snapshot else (
            lun.size_bytes if lun.is_thick else box.stored_bytes(lun.uuid)
        )
        return Info(
            uuid=lun.uuid,
            location=lun.uuid,
            size_bytes=lun.size_bytes,
            used_bytes=used,
            sm_config=dict(lun.sm_config),
            name=lun.name,
            description=lun.description,
            is_a_snapshot=lun.is_snapshot,
            snapshot_of=lun.origin,
        )

    def _copy(
        self, uuid: str, new_uuid: str, is_snapshot: bool,
    ) -> list[Info]:
        self.assert_online()
        with self.taps.paused([uuid]), self.changing() as (box, state):
            source = self.lun(state, uuid)
            self.check_copy(state, source, is_snapshot)
            lun = dataclasses.replace(
                source, uuid=new_uuid, is_snapshot=is_snapshot,
                origin=uuid if is_snapshot else '', pages=[],
                sm_config=dict(source.sm_config),
            )
            box.copy_file(uuid, new_uuid)
            try:
                self.add(box, state, lun)
            except BaseException:
                box.remove_file(new_uuid)
                raise
            return [
                self.info(box, state, lun), self.info(box, state, source),
            ]

    @property
    def _what(self) -> str:
        return f'array/{self.kind}/{self.sr_uuid}'


def want(
    device_config: dict[str, str], wanted: Iterable[tuple[str, int]],
) -> None:
    for key, code in wanted:
        if not device_config.get(key):
            raise fault(code)


def knows(array: Array, device_config: dict[str, str]) -> bool:
    return (array.username, array.password) == (
        device_config['username'], device_config['password'],
    )


def elements(root: str, name: str, rows: list[dict[str, Any]]) -> str:
    """Return rows as the XML that drivers print."""
    document = xml.dom.minidom.Document()
    top = document.appendChild(document.createElement(root))
    for row in rows:
        element = top.appendChild(document.createElement(name))
        for key, value in row.items():
            child = element.appendChild(document.createElement(key))
            child.appendChild(document.createTextNode(str(value)))
    return document.toprettyxml()
