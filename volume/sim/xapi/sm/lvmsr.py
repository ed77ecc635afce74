# SPDX-License-Identifier: Apache-2.0
"""SRs whose VDIs are logical volumes: thick, in extents of 4 MiB.

A volume that is written to is as large as its VHD can become (*inflated*);
a hidden one, and a snapshot that nobody has open, as large as its VHD is
(*deflated*). A snapshot inflates the disk that goes on: it wants a whole
disk of room, and is refused without. What is deleted is only hidden; its
room comes back with the collector.

[I] A snapshot that is opened, to be read as well, is inflated for the time
of it.
"""

from __future__ import annotations

import abc
import contextlib
import os
from typing import Any

from volume import errors
from volume.sim.xapi.disk.chains import Node
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm import fabric
from volume.sim.xapi.sm import groups
from volume.sim.xapi.sm import probes
from volume.sim.xapi.sm.base import Info
from volume.sim.xapi.sm.base import Sizes
from volume.sim.xapi.sm.chained import ChainManager
from volume.sim.xapi.sm.chained import mapped
from volume.sim.xapi.sm.chained import MIB
from volume.sim.xapi.sm.chained import VHD_MAX_MIB
from volume.sim.xapi.sm.filesr import assert_free
from volume.sim.xapi.sm.filesr import assert_same_host
from volume.sim.xapi.sm.groups import EXTENT_BYTES
from volume.sim.xapi.sm.groups import Group
from volume.sim.xapi.sm.groups import round_up

JOURNALS_BYTES = 2 * EXTENT_BYTES
EMPTY_BYTES = round_up(
    round_up(3072 + VHD_MAX_MIB // 2 * 4, 512) + VHD_MAX_MIB // 16)
MANAGEMENT = 'MGT'


def full_bytes(size_bytes: int) -> int:
    """Return the volume that a VHD of a size may need."""
    bitmaps = -(-size_bytes // (2 * MIB)) * 4096
    return round_up(size_bytes + EMPTY_BYTES + bitmaps)


class LvmSr(ChainManager):
    """What the four types share; a type says where its group is."""

    family = 'lvm'
    names = {'vhd': ('VHD-', ''), 'raw': ('LV-', ''), 'qcow2': ('QCOW2-', '')}

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self._group: Group | None = None
        self._inflated: set[str] = set()

    # -- where it is ------------------------------------------------------

    @abc.abstractmethod
    def place(self) -> tuple[list[str], int]:
        """Return the names of the disks in ``groups/``, and their size.

        :raises Failure: a disk is not there
        """

    @abc.abstractmethod
    def assert_unused(self) -> None:
        """Refuse disks that another SR of this pool has."""

    @property
    def group(self) -> Group:
        """The volume group, while it is attached."""
        if self._group is None:
            raise fault(47, f'SR {self.sr_uuid} is not attached')
        return self._group

    @property
    def is_thin(self) -> bool:
        """Whether volumes are made small and inflated when they are used."""
        return 'thin' in (
            self.sm_config.get('allocation'),
            self.device_config.get('allocation'))

    # -- the repository ---------------------------------------------------

    def create(self) -> None:
        self.assert_online()
        names, size_bytes = self.place()
        self.assert_unused()
        groups.unlabel(self.world, names)
        groups.label(self.world, names, self.sr_uuid, self.kind)
        group = Group(self.world.group_directory(names[0]), size_bytes)
        group.set(MANAGEMENT, EXTENT_BYTES)
        group.close()
        self.sm_config['use_vhd'] = 'true'
        self.sm_config['allocation'] = self.device_config.get(
            'allocation', 'thick')
        self.sm_config['devserial'] = ','.join(
            f'scsi-{name}' for name in names)

    def delete(self) -> None:
        self.assert_online()
        names, _ = self.place()
        for node in self.chains.nodes().values():
            if not node.is_hidden:
                raise fault(39)
        self.stop()
        self.group.close()
        self._group = None
        groups.unlabel(self.world, names)

    def attach(self, host_ref: str) -> None:
        self.assert_online()
        names, size_bytes = self.place()
        directory = self.world.group_directory(names[0])
        if groups.labelled(self.world, names[0]) != self.sr_uuid:
            raise fault(47, f'no such volume group: {self.sr_uuid}')
        if not self.attached:
            self.world.take(f'groups/{names[0]}', self.pool.uuid)
            self._group = Group(directory, size_bytes)
            self.start(self._group.volumes_directory)
            self._reconcile()
        self.attached.add(host_ref)

    def detach(self, host_ref: str) -> None:
        self.attached.discard(host_ref)
        if not self.attached:
            self.stop()
            if self._group is not None:
                self._group.close()
                self._group = None
            with contextlib.suppress(Failure):
                # The storage may be gone; then nothing is to be let go.
                names, _ = self.place()
                self.world.give_back(f'groups/{names[0]}', self.pool.uuid)

    def close(self) -> None:
        super().close()
        if self._group is not None:
            self._group.close()

    def sizes(self) -> Sizes:
        _, size_bytes = self.place()
        self.group.resize(size_bytes)
        total = self.group.size_bytes
        return Sizes(
            total, total - self.free_bytes(), self.virtual_allocation())

    # -- the calls that are otherwise than with files ---------------------

    def scan(self) -> list[Info]:
        self._reconcile()
        return super().scan()

    def remove_file(self, node: Node) -> None:
        """Hide it; the collector removes what is hidden."""
        self.group.keep(self._name(node), deleted=True)
        self.chains.formats[node.format].hide(node.path, True)

    def rename(self, uuid: str, name: str, description: str = '') -> None:
        with mapped(self, uuid):
            node = self.chains.node(uuid)
        self.group.keep(self._name(node), name=name, description=description)

    def open(self, uuid: str, writable: bool = False) -> Disk:
        self.assert_online()
        with mapped(self, uuid), self.chains.lock:
            self._inflate(self.chains.node(uuid))
            return super().open(uuid, writable)

    def info(self, node: Node) -> Info:
        info = super().info(node)
        volume = self.group.get(self._name(node))
        facts = volume.facts if volume else {}
        info.name = facts.get('name', '') or info.name
        info.description = facts.get('description', '')
        info.is_a_snapshot = bool(facts.get('snapshot_of'))
        info.snapshot_of = facts.get('snapshot_of', '')
        return info

    def sm_config_of(self, node: Node) -> dict[str, str]:
        kind = 'aio' if node.format == 'raw' else node.format
        return {'vdi_type': kind}

    def used_bytes(self, node: Node) -> int:
        volume = self.group.get(self._name(node))
        return volume.size_bytes if volume else 0

    def bad_type(self, wanted: str) -> Failure:
        return fault(78, 'bad type')

    def rounded_raw(self, size_bytes: int) -> int:
        return round_up(size_bytes)

    # -- room -------------------------------------------------------------

    def free_bytes(self) -> int:
        """Return what is left, or what the test has left of it."""
        self._deflate()
        by_order = self.pool.faults.room(self.sr_uuid)
        free = self.group.free_bytes
        return free if by_order is None else min(free, by_order)

    def ensure(self, size_bytes: int) -> None:
        """Refuse what has no room.

        :raises Failure: SR_BACKEND_FAILURE_44
        """
        if size_bytes > 0 and size_bytes > self.free_bytes():
            raise fault(44, f'{size_bytes} bytes are needed')

    def room_to_make(self, uuid: str, format: str, size_bytes: int) -> None:
        wanted = self._new_bytes(format, size_bytes)
        self.ensure(wanted)
        name = os.path.basename(self.chains.path(uuid, format))
        self.group.set(name, wanted)

    def room_to_split(
        self, uuid: str, base: str, new: str, is_clone: bool,
    ) -> None:
        node = self.chains.node(uuid)
        full = full_bytes(node.size_bytes)
        is_whole = self.taps.is_open(uuid) or not (
            self.is_thin or self._is_snapshot(node))
        origin_bytes = full if is_whole else EMPTY_BYTES
        new_bytes = full if is_clone and not self.is_thin else EMPTY_BYTES
        base_bytes = round_up(os.stat(node.path).st_size)
        self.ensure(
            origin_bytes + new_bytes + JOURNALS_BYTES
            - (self.used_bytes(node) - base_bytes))
        name = os.path.basename(self.chains.path(new, node.format))
        # Whoever dies now leaves a volume without a file: it is dropped.
        self.group.set(
            name, new_bytes, snapshot_of='' if is_clone else uuid)

    def room_to_grow(self, node: Node, size_bytes: int) -> None:
        wanted = self._new_bytes(node.format, size_bytes)
        more = wanted - self.used_bytes(node)
        if more > 0:
            self.ensure(more)
            self.group.set(self._name(node), wanted)

    def room_changed(self, *uuids: str) -> None:
        for uuid in uuids:
            try:
                node = self.chains.node(uuid)
            except (errors.NotFound, errors.Invalid):
                for format in self.chains.formats:
                    path = self.chains.path(uuid, format)
                    if not os.path.exists(path):
                        self.group.remove(os.path.basename(path))
            else:
                self.group.set(self._name(node), self._wanted_bytes(node))

    def _reconcile(self) -> None:
        """Count what is there, and drop volumes that have no file."""
        nodes = self.chains.nodes()
        there = {self._name(node): node for node in nodes.values()}
        for volume in self.group.all():
            if volume.name != MANAGEMENT and volume.name not in there:
                path = os.path.join(self.chains.directory, volume.name)
                if not os.path.exists(path):
                    self.group.remove(volume.name)
        for name, node in there.items():
            if self.group.get(name) is None:
                self.group.set(name, self._wanted_bytes(node))

    def _new_bytes(self, format: str, size_bytes: int) -> int:
        if format == 'raw':
            return round_up(size_bytes)
        return EMPTY_BYTES if self.is_thin else full_bytes(size_bytes)

    def _wanted_bytes(self, node: Node) -> int:
        """Return what a volume is to take of the group as it is now."""
        volume = self.group.get(self._name(node))
        if volume is not None and volume.facts.get('deleted'):
            return volume.size_bytes
        if node.format == 'raw':
            return round_up(node.size_bytes)
        length = round_up(os.stat(node.path).st_size)
        if node.is_hidden:
            return length
        is_small = self.is_thin or self._is_snapshot(node)
        if is_small and not self.taps.is_open(node.uuid):
            return max(EMPTY_BYTES, length)
        return max(full_bytes(node.size_bytes), length)

    def _is_snapshot(self, node: Node) -> bool:
        volume = self.group.get(self._name(node))
        return bool(volume and volume.facts.get('snapshot_of'))

    def _inflate(self, node: Node) -> None:
        """Give a volume that is opened its full size."""
        if node.format == 'raw' or node.is_hidden:
            return
        wanted = full_bytes(node.size_bytes)
        more = wanted - self.used_bytes(node)
        if more <= 0:
            return
        if more > self.free_bytes():
            raise fault(180)
        self.group.set(self._name(node), wanted)
        self._inflated.add(node.uuid)

    def _deflate(self) -> None:
        """Take back what was inflated and is closed since."""
        for uuid in [*self._inflated]:
            if not self.taps.is_open(uuid):
                self._inflated.discard(uuid)
                self.room_changed(uuid)

    def _name(self, node: Node) -> str:
        return os.path.basename(node.path)


class DiskLvmSr(LvmSr):
    """``lvm``: a group on disks of one host."""

    def place(self) -> tuple[list[str], int]:
        host, size_bytes, names = self.host_uuid(), 0, []
        for path in self.device_config['device'].split(','):
            device = self.world.device(host, path)
            if device is None:
                raise fault(91, f'path is {path}')
            size_bytes += device.size_bytes
            names.append(groups.device_name(host, path))
        return names, size_bytes

    def assert_unused(self) -> None:
        assert_free(self)

    def attach(self, host_ref: str) -> None:
        assert_same_host(self, host_ref)
        super().attach(host_ref)


class LunLvmSr(LvmSr):
    """``lvmoiscsi``, ``lvmohba``, ``lvmofcoe``: a group on a LUN."""

    def place(self) -> tuple[list[str], int]:
        probes.check(
            self.pool, self.kind, self.host_ref, self.device_config)
        lun = fabric.named(
            fabric.visible(
                self.pool, self.host_ref, self.kind, self.device_config),
            self.device_config['SCSIid'])
        return [lun.scsi_id], lun.size_bytes

    def assert_unused(self) -> None:
        scsi_id = self.device_config['SCSIid']
        if fabric.is_in_use(self.pool, scsi_id, self.sr_uuid):
            raise fault(16)


MANAGERS: dict[str, type[LvmSr]] = {
    'lvm': DiskLvmSr,
    **dict.fromkeys(('lvmoiscsi', 'lvmohba', 'lvmofcoe'), LunLvmSr),
}
