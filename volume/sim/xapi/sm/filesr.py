# SPDX-License-Identifier: Apache-2.0
"""SRs whose VDIs are files of a file system: exports, disks, directories.

They are thin. A VDI takes what its file is long; the SR takes what the file
system below says, so that others' files count as well.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from volume import errors
from volume.sim.xapi.disk.chains import Node
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.space import Space
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm import groups
from volume.sim.xapi.sm import probes
from volume.sim.xapi.sm.base import Info
from volume.sim.xapi.sm.base import Sizes
from volume.sim.xapi.sm.base import Unimplemented
from volume.sim.xapi.sm.chained import ChainManager
from volume.sim.xapi.sm.chained import MIB
from volume.sim.xapi.sm.chained import VHD_MAX_MIB
from volume.sim.xapi.world import Share

BLOCK_BYTES = 2 * MIB  # of a VHD
BITMAP_BYTES = 4096
# A new VHD's header, table and map of the table, for the largest disk.
EMPTY_BYTES = 3072 + VHD_MAX_MIB // 2 * 4 + VHD_MAX_MIB // 2 // 8


class FileSr(ChainManager):
    """What all of them share; a type says where its directory is."""

    family = 'file'

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self._written: set[str] = set()

    # -- where it is ------------------------------------------------------

    @abc.abstractmethod
    def place(self) -> tuple[Path, Path, int]:
        """Return the SR's directory, the file system's top and its size.

        :raises Failure: it cannot be mounted
        """

    @property
    def space(self) -> Space:
        """The room that there is, also for others."""
        _, top, size_bytes = self.place()
        return self.world.space(top, size_bytes)

    @property
    def owned(self) -> str:
        """What a pool takes that plugs this SR."""
        return str(self.place()[0].relative_to(self.world.directory))

    # -- the repository ---------------------------------------------------

    def create(self) -> None:
        self.assert_online()
        directory, _, _ = self.place()
        if directory.exists() and any(directory.iterdir()):
            raise fault(42)
        directory.mkdir(parents=True, exist_ok=True)

    def delete(self) -> None:
        """Remove the directory; what is no VDI must not be in it."""
        self.assert_online()
        directory, _, _ = self.place()
        for uuid, node in self.chains.nodes().items():
            if not node.is_hidden:
                raise fault(39)
            self.remove_file(node)
            self.forgotten(uuid)
        for name in os.listdir(directory):
            if not name.startswith('.'):
                raise fault(63, f'Directory not empty: {name}')
            os.unlink(directory / name)
        self._remove_directory(directory)

    def _remove_directory(self, directory: Path) -> None:
        directory.rmdir()

    def attach(self, host_ref: str) -> None:
        self.assert_online()
        directory, _, _ = self.place()
        if not directory.is_dir():
            raise self._absent(directory)
        if not self.attached:
            self.world.take(self.owned, self.pool.uuid)
            self.start(directory)
            self.space.measure()
        self.attached.add(host_ref)

    def _absent(self, directory: Path) -> Exception:
        return fault(47, f'no such directory {directory.name}')

    def detach(self, host_ref: str) -> None:
        self.attached.discard(host_ref)
        if not self.attached:
            self.stop()
            with contextlib.suppress(Failure):
                # The storage may be gone; then nothing is to be let go.
                self.world.give_back(self.owned, self.pool.uuid)

    def scan(self) -> list[Info]:
        found = super().scan()
        self.space.measure()
        return found

    def open(self, uuid: str, writable: bool = False) -> Disk:
        if writable:
            self._written.add(uuid)
        return super().open(uuid, writable)

    def sizes(self) -> Sizes:
        total, free = self.space.total(), self.free_bytes()
        return Sizes(total, total - free, self.virtual_allocation())

    # -- room -------------------------------------------------------------

    def claim(self, size_bytes: int) -> None:
        free = self.free_bytes()
        if free < size_bytes:
            raise errors.NoSpace(
                f'SR {self.sr_uuid} has {free} bytes left, {size_bytes} are '
                'needed')

    def room_to_make(self, uuid: str, format: str, size_bytes: int) -> None:
        if format != 'raw':
            self._want(EMPTY_BYTES // 4 if format == 'qcow2'
                       else EMPTY_BYTES)

    def room_to_split(
        self, uuid: str, base: str, new: str, is_clone: bool,
    ) -> None:
        self._want(2 * EMPTY_BYTES)

    def room_to_grow(self, node: Node, size_bytes: int) -> None:
        if node.format == 'raw':
            raise Unimplemented('raw files do not grow')

    def room_changed(self, *uuids: str) -> None:
        space = self.space
        for uuid in uuids:
            for format in self.chains.formats:
                space.note(self.chains.path(uuid, format))

    def _want(self, size_bytes: int) -> None:
        if self.free_bytes() < size_bytes:
            raise fault(44)

    def free_bytes(self) -> int:
        """Return what is left, or what the test has left of it."""
        self._count_open()
        by_order = self.pool.faults.room(self.sr_uuid)
        free = self.space.free()
        return free if by_order is None else min(free, by_order)

    def _count_open(self) -> None:
        """Count what is written to, once more after it was closed."""
        for uuid in [*self._written]:
            if not self.taps.is_open(uuid):
                self._written.discard(uuid)
            self.room_changed(uuid)


class ShareSr(FileSr):
    """``nfs``, ``smb``, ``cephfs``, ``glusterfs``, ``moosefs``."""

    def place(self) -> tuple[Path, Path, int]:
        share, path = self._share()
        below = path[len(share.path.rstrip('/')):]
        if self.sm_config.get('nosubdir') != 'true':
            below += f'/{self.sr_uuid}'
        top = self.world.share_directory(share)
        return (
            self.world.share_directory(share, below), top, share.size_bytes)

    def create(self) -> None:
        if self.kind == 'smb' and not self.pool.switch('smb_licence'):
            raise fault(454)
        share, _ = self._share()
        if share.is_read_only:
            raise fault(461)
        super().create()

    def attach(self, host_ref: str) -> None:
        share, _ = self._share()
        if share.is_read_only:
            raise fault(461)
        super().attach(host_ref)

    def _absent(self, directory: Path) -> Exception:
        code = 73 if self.kind == 'nfs' else 111
        return fault(code, 'mount failed with return code 32')

    def _share(self) -> tuple[Share, str]:
        server, path = probes.where(self.kind, self.device_config)
        share = probes.mounted(
            self.pool, self.kind, server, path, self.device_config)
        return share, path

    def _remove_directory(self, directory: Path) -> None:
        if self.sm_config.get('nosubdir') != 'true':
            directory.rmdir()


class DeviceSr(FileSr):
    """``ext``, ``xfs``, ``largeblock``: a file system on disks of a host."""

    def place(self) -> tuple[Path, Path, int]:
        size_bytes = 0
        for path in self._paths():
            device = self.world.device(self.host_uuid(), path)
            if device is None:
                raise fault(91, f'path is {path}')
            size_bytes += device.size_bytes
        top = self.world.group_directory(self._names()[0]) / 'files'
        return top, top, size_bytes

    def create(self) -> None:
        self.assert_online()
        self.place()
        assert_free(self)
        host = self.host_uuid()
        if self.kind == 'largeblock':
            for path in self._paths():
                device = self.world.device(host, path)
                if device is not None and device.sector_bytes == 512:
                    raise fault(5010, 'Use EXT instead')
        groups.unlabel(self.world, self._names())
        groups.label(self.world, self._names(), self.sr_uuid, self.kind)
        self.place()[0].mkdir(parents=True)
        self.sm_config['devserial'] = ','.join(self._paths())

    def attach(self, host_ref: str) -> None:
        assert_same_host(self, host_ref)
        for path in self._paths():
            found = groups.on_device(self.world, self.host_uuid(), path)
            if found != self.sr_uuid:
                raise fault(47, f'no such volume group {self.sr_uuid}')
        super().attach(host_ref)

    def _remove_directory(self, directory: Path) -> None:
        groups.unlabel(self.world, self._names())

    def _paths(self) -> list[str]:
        return self.device_config['device'].split(',')

    def _names(self) -> list[str]:
        host = self.host_uuid()
        return [groups.device_name(host, path) for path in self._paths()]


class DirectorySr(FileSr):
    """``file`` and ``zfs``: a directory of a host."""

    def attach(self, host_ref: str) -> None:
        assert_same_host(self, host_ref)
        super().attach(host_ref)

    def place(self) -> tuple[Path, Path, int]:
        host = self.host_uuid()
        location = self.device_config['location']
        directory = self.world.host_directory(host, location)
        share = (
            self.world.share(self.kind, host, location)
            or self.world.share(self.kind, '*', location)
        )
        if share is None:
            if self.kind == 'zfs':
                raise fault(5000, f'Cannot create, "{location}" is not zfs')
            return directory, directory, 0
        top = self.world.host_directory(host, share.path)
        return directory, top, share.size_bytes


class LinstorSr(FileSr):
    """``linstor``: resources of a group, here files of a share.

    [I] Modelled on its facts, not on its driver: what it can do and its
    errors are its own, its bytes lie as those of a file type.
    """

    def place(self) -> tuple[Path, Path, int]:
        group = self.device_config['group-name']
        share = self.world.share('linstor', group, '/')
        if share is None or share.is_down:
            raise fault(5006, f'Could not find group {group}')
        top = self.world.share_directory(share)
        return top / self.sr_uuid, top, share.size_bytes

    def create(self) -> None:
        super().create()
        self.sm_config['provisioning'] = self.device_config.get(
            'provisioning', 'thin')


def assert_same_host(manager: ChainManager, host_ref: str) -> None:
    """Refuse to plug on a host what lies in another one.

    :raises Failure: SR_BACKEND_FAILURE_47
    """
    if manager.attached - {host_ref}:
        raise fault(47, f'no such volume group: {manager.sr_uuid}')


def assert_free(manager: ChainManager) -> None:
    """Refuse disks that another SR's PBD on this host has.

    :raises Failure: SR_DEVICE_IN_USE
    """
    rows = manager.pool.rows
    wanted = set(manager.device_config['device'].split(','))
    for ref in rows.find('PBD', host=manager.host_ref):
        pbd = rows.get('PBD', ref)
        taken = pbd['device_config'].get('device', '').split(',')
        if (
            wanted & set(taken)
            and rows.field('SR', pbd['SR'], 'uuid') != manager.sr_uuid
        ):
            raise fault(16)


MANAGERS: dict[str, Callable[..., FileSr]] = {
    **dict.fromkeys(
        ('nfs', 'smb', 'cephfs', 'glusterfs', 'moosefs'), ShareSr),
    **dict.fromkeys(('ext', 'xfs', 'largeblock'), DeviceSr),
    **dict.fromkeys(('file', 'zfs'), DirectorySr),
    'linstor': LinstorSr,
}
