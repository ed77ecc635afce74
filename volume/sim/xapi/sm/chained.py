# SPDX-License-Identifier: Apache-2.0
"""VDIs that are files of a directory, each with its chain of parents.

File types and LVM types share this; they differ in what a VDI takes of the
room (``room_*``). The files and their trees are ``chains``; here is what a
driver refuses, rounds and tells of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid as uuids
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from volume import errors
from volume.sim.xapi.disk.chains import Chains
from volume.sim.xapi.disk.chains import Node
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.disks import Format
from volume.sim.xapi.disk.disks import KERNEL
from volume.sim.xapi.disk.gc import Pass
from volume.sim.xapi.disk.gc import Policy
from volume.sim.xapi.disk.qcow2_disk import Qcow2
from volume.sim.xapi.disk.raw_disk import Raw
from volume.sim.xapi.disk.vhd_disk import Vhd
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import sm_failure
from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm.base import Change
from volume.sim.xapi.sm.base import Info
from volume.sim.xapi.sm.base import Manager
from volume.sim.xapi.sm.base import Unimplemented

MIB = 1 << 20
VHD_MAX_MIB = 2040 << 10
QCOW2_MAX_MIB = 16 << 20
DEPTH_MAX = 30


class ChainManager(Manager):
    """Disks in files with parents. ``chains`` is there once attached."""

    names: dict[str, tuple[str, str]] | None = None

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self._chains: Chains | None = None
        self._virtual: dict[str, int] | None = None

    @property
    def chains(self) -> Chains:
        """The files; who asks for them before a plug is told that."""
        if self._chains is None:
            raise fault(47, f'SR {self.sr_uuid} is not attached')
        return self._chains

    def start(self, directory: Path) -> None:
        """Have the files of a directory, and end what was begun in it."""
        formats: list[Format] = [Vhd(), Raw(), Qcow2()]
        self._chains = Chains(
            str(directory), formats, self.names, self.claim, self.taps)
        self._virtual = None
        with mapped(self, ''):
            Pass(self._chains).recover()

    def stop(self) -> None:
        """Have no files any more."""
        self._chains = None

    # -- room: what the two families do otherwise --------------------------

    def claim(self, size_bytes: int) -> None:
        """Refuse bytes that an open file has no room for.

        :raises NoSpace: there is none
        """

    def room_to_make(self, uuid: str, format: str, size_bytes: int) -> None:
        """Refuse a disk that has no room, or take it."""

    def room_to_split(
        self, uuid: str, base: str, new: str, is_clone: bool,
    ) -> None:
        """Refuse a split that has no room, or take it."""

    def room_to_grow(self, node: Node, size_bytes: int) -> None:
        """Refuse to grow without room, or take it."""

    def room_changed(self, *uuids: str) -> None:
        """Count again what these take."""

    def used_bytes(self, node: Node) -> int:
        """Return what ``physical_utilisation`` of a VDI says."""
        return os.stat(node.path).st_size

    def sm_config_of(self, node: Node) -> dict[str, str]:
        """Return what this family tells of a VDI."""
        return {}

    # -- formats ----------------------------------------------------------

    @property
    def knows_formats(self) -> bool:
        """Whether this server's driver knows ``image-format``."""
        return bool(
            self.pool.switch('qcow2')
            and 'qcow2' in self.pool.profile.sm[self.kind].image_formats
        )

    def choose(self, sm_config: dict[str, str], size_bytes: int) -> str:
        """Return the format of a new disk.

        :raises Failure: the format is unknown, or not allowed here
        """
        allowed = ['vhd']
        wanted = sm_config.get('type', '')
        if self.knows_formats:
            listed = self.device_config.get('preferred-image-formats', '')
            allowed = [
                name.strip() for name in (listed or 'vhd,qcow2').split(',')]
            wanted = sm_config.get('image-format') or wanted
        if wanted:
            if wanted not in allowed and wanted != 'raw':
                raise self.bad_type(wanted)
            return wanted
        if (
            allowed[0] == 'vhd' and 'qcow2' in allowed
            and size_bytes > VHD_MAX_MIB * MIB
        ):
            return 'qcow2'
        if allowed[0] not in ('vhd', 'qcow2', 'raw'):
            raise self.bad_type(allowed[0])
        return allowed[0]

    def bad_type(self, wanted: str) -> Failure:
        """Return how this family refuses a format."""
        return fault(66, f'Invalid VDI type {wanted}')

    def rounded(self, format: str, size_bytes: int) -> int:
        """Return the size that a disk will have.

        :raises Failure: SR_BACKEND_FAILURE_79
        """
        if format == 'raw':
            if size_bytes <= 0:
                raise fault(79, 'VDI size must be more than 0')
            return self.rounded_raw(size_bytes)
        limit = VHD_MAX_MIB if format == 'vhd' else QCOW2_MAX_MIB
        if not 0 <= size_bytes <= limit * MIB:
            raise fault(79, f'VDI size must be between 1 MB and {limit} MB')
        unit = self.chains.formats[format].granularity_bytes
        return max(unit, -(-size_bytes // unit) * unit)

    def rounded_raw(self, size_bytes: int) -> int:
        """Return the size that a raw disk will have."""
        return size_bytes

    # -- what is there ----------------------------------------------------

    def chain_depth(self, uuid: str) -> int:
        with mapped(self, uuid):
            return self.chains.depth(uuid)

    def info(self, node: Node) -> Info:
        """Return what the driver tells of a file."""
        sm_config = self.sm_config_of(node)
        if self.knows_formats:
            sm_config['image-format'] = node.format
        elif node.format == 'raw':
            sm_config['type'] = 'raw'
        if node.parent:
            sm_config['vhd-parent'] = node.parent
        return Info(
            node.uuid, node.uuid, node.size_bytes, self.used_bytes(node),
            sm_config, managed=not node.is_hidden,
            read_only=node.is_hidden,
            name='base copy' if node.is_hidden else '')

    def inspect(self, uuid: str) -> Info | None:
        try:
            node = self.chains.node(uuid)
            if node.is_hidden and not self.chains.children(uuid):
                return None  # it waits for the collector
            return self.info(node)
        except (errors.NotFound, errors.Invalid, FileNotFoundError):
            return None

    def scan(self) -> list[Info]:
        """Return what there is; hidden leaves wait for the collector."""
        self.assert_online()
        with mapped(self, ''):
            nodes = self.chains.nodes()
        needed = {node.parent for node in nodes.values()}
        found = []
        for node in nodes.values():
            if node.is_hidden and node.uuid not in needed:
                continue
            with contextlib.suppress(FileNotFoundError):
                found.append(self.info(node))
        self._virtual = {info.uuid: info.size_bytes for info in found}
        return found

    def virtual_allocation(self) -> int:
        """Return the sum of all sizes, hidden ones' too."""
        if self._virtual is None:
            self.scan()
        return sum([*(self._virtual or {}).values()])

    # -- the calls --------------------------------------------------------

    def make(
        self, uuid: str, size_bytes: int, sm_config: dict[str, str],
        name: str = '',
    ) -> Info:
        self.assert_online()
        format = self.choose(sm_config, size_bytes)
        size = self.rounded(format, size_bytes)
        self.room_to_make(uuid, format, size)
        with mapped(self, uuid):
            return self.known(self.chains.create(uuid, size, format))

    def remove(self, uuid: str) -> None:
        self.assert_online()
        chains = self.chains
        with chains.lock:
            if uuid in chains.users.opened():
                raise fault(24)
            with contextlib.suppress(errors.NotFound):
                self.remove_file(chains.node(uuid))
        self.forgotten(uuid)
        self.room_changed(uuid)

    def remove_file(self, node: Node) -> None:
        """Remove the file of a leaf."""
        KERNEL.remove(node.path)

    def resize(self, uuid: str, size_bytes: int) -> Info:
        self.assert_online()
        with mapped(self, uuid):
            node = self.chains.node(uuid)
            size = self.rounded(node.format, size_bytes)
            if size < node.size_bytes:
                raise fault(79, (
                    f'Current size {node.size_bytes}, requested '
                    f'{size_bytes}: shrinking not allowed'))
            if size > node.size_bytes:
                self.room_to_grow(node, size)
                node = self.chains.grow(uuid, size)
            return self.known(node)

    def snapshot(self, uuid: str, new_uuid: str) -> list[Info]:
        return self._split(uuid, new_uuid, is_clone=False)

    def clone(self, uuid: str, new_uuid: str) -> list[Info]:
        return self._split(uuid, new_uuid, is_clone=True)

    def open_disk(self, uuid: str, writable: bool) -> Disk:
        with mapped(self, uuid):
            return self.chains.open_disk(uuid, writable)

    def _split(self, uuid: str, new: str, is_clone: bool) -> list[Info]:
        """Hide what is there and put two leaves over it."""
        self.assert_online()
        base = str(uuids.uuid4())
        with mapped(self, uuid), self.chains.lock:
            node = self.chains.node(uuid)
            if not self.chains.formats[node.format].has_parents:
                raise Unimplemented(f'{node.format} VDIs have no snapshots')
            if self.chains.depth(uuid) >= DEPTH_MAX:
                raise fault(109)
            self.room_to_split(uuid, base, new, is_clone)
            try:
                nodes = self.chains.snapshot(uuid, base, [new])
            finally:
                self.room_changed(uuid, base, new)
            return [self.known(each) for each in nodes]

    def revert(self, uuid: str, snapshot_uuid: str) -> list[Info]:
        """Put a new leaf over the snapshot's bytes in the disk's place."""
        new = str(uuids.uuid4())
        with mapped(self, uuid), self.chains.lock:
            old = self.chains.node(uuid)
            _, base, snapshot = self._split(
                snapshot_uuid, new, is_clone=True)
            with self.taps.paused([uuid]):
                fresh = self.chains.node(new)
                target = self.chains.path(uuid, fresh.format)
                KERNEL.rename(fresh.path, target)
                if old.path != target:
                    KERNEL.remove(old.path)
            self.forgotten(new)
            self.room_changed(new)
            return [self.known(self.chains.node(uuid)), base, snapshot]

    # -- what is known of all ---------------------------------------------

    def known(self, node: Node) -> Info:
        """Return a VDI's facts, and keep its size in the sum."""
        self.room_changed(node.uuid)
        if self._virtual is not None:
            self._virtual[node.uuid] = node.size_bytes
        return self.info(node)

    def forgotten(self, uuid: str) -> None:
        """Leave a VDI out of the sum."""
        if self._virtual is not None:
            self._virtual.pop(uuid, None)

    # -- the collector ----------------------------------------------------

    def collect(
        self, aborted: Callable[[], bool], policy: Policy,
    ) -> Iterator[Change]:
        self.assert_online()
        for step in Pass(self.chains, policy, aborted).steps():
            for uuid in step.gone:
                self.room_changed(uuid)
                self.forgotten(uuid)
            for node in step.changed:
                with contextlib.suppress(FileNotFoundError):
                    self.known(node)  # unless it was removed since
            yield Change(
                tuple(node.uuid for node in step.changed), step.gone)

    def needs_collect(self, policy: Policy) -> bool:
        return Pass(self.chains, policy).has_work()


@contextlib.contextmanager
def mapped(manager: Manager, uuid: str) -> Iterator[None]:
    """Tell what goes wrong with files as the driver tells it."""
    try:
        yield
    except errors.NotFound:
        raise sm_failure(
            144, 'VDI could not be found', sr=manager.sr_uuid,
            vdi=uuid) from None
    except errors.NoSpace:
        raise fault(44) from None
    except errors.Busy:
        raise fault(24) from None
    except errors.Unsupported as refused:
        raise Unimplemented(str(refused)) from None
    except errors.Invalid as damaged:
        raise fault(65, str(damaged)) from None
    except OSError as failed:
        if failed.errno == errno.ENOSPC:
            raise fault(44) from None
        if failed.errno == errno.ENOENT and not os.path.isdir(
            os.path.dirname(failed.filename or '') or '/'
        ):
            raise fault(47, 'no such directory') from None
        raise
