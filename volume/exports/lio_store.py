# SPDX-License-Identifier: Apache-2.0
"""A volume as a backstore of the kernel's SCSI target.

All attachments of a volume share one, so that what they tell the kernel
(reservations, caches) meets in one place. Ours stand in HBAs of their own
number, where no other tool puts any, and bear our alias: what another tool
has restored from its own records has the name, and not the alias.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from volume import errors
from volume import identity
from volume import ids
from volume import model
from volume.exports.base import Export
from volume.exports.configfs import texts
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import Node

CORE = '/sys/kernel/config/target/core'
HBA_NUMBER = 2026
KINDS = ('iblock', 'fileio')
FOREIGN_HBA = re.compile('(iblock|fileio)_[0-9]+')
HBAS = tuple(f'{kind}_{HBA_NUMBER}' for kind in KINDS)
ALIAS = 'volume-service'
PRODUCT = 'volume-service'


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """The backstore of one volume, and what it is to be."""

    name: str
    volume_id: str
    device: model.Device
    size_bytes: int

    @property
    def hba(self) -> str:
        return f'{CORE}/{HBAS[0 if self.device.is_block else 1]}'

    @property
    def path(self) -> str:
        return f'{self.hba}/{self.name}'

    def questions(self) -> list[Op]:
        """Return what ``is_whole`` has to know."""
        return [
            Op.get(f'{self.path}/enable'),
            Op.get(f'{self.path}/udev_path'),
        ]

    def is_whole(self, found: Sequence[Result]) -> bool:
        """Say whether it is there and works.

        :raises Conflict: it is, and holds something else
        """
        enabled, path = found[:2]
        if enabled != '1':
            return False
        if path != self.device.path:
            raise errors.Conflict(
                f'volume {self.volume_id} is exported from {path}, not from '
                f'{self.device.path}: end that first'
            )
        return True

    def make(self) -> list[Op]:
        """Return how it is made; nothing of it may be enabled yet."""
        return [
            Op.mkdir(self.hba),
            Op.mkdir(self.path),
            Op.put(f'{self.path}/control', self._control()),
            Op.put(f'{self.path}/udev_path', self.device.path),
            Op.put(f'{self.path}/alias', ALIAS),
            Op.put(
                f'{self.path}/wwn/vpd_unit_serial',
                identity.scsi_serial(self.volume_id),
            ),
            Op.put(f'{self.path}/wwn/product_id', PRODUCT),
            Op.put(f'{self.path}/enable', '1'),
            # A host that may copy between LUNs in the target names them by
            # their WWN, and not by what it was let in to.
            Op.put(f'{self.path}/attrib/emulate_3pc', '0'),
        ]

    def limit_question(self) -> Op:
        """Ask how many blocks may be discarded at once; zero if none."""
        return Op.get(f'{self.path}/attrib/max_unmap_lba_count')

    def let_discard(self, limit: Sequence[Result]) -> list[Op]:
        """Let the host discard, if the device can."""
        if limit == ['0']:
            return []
        return [Op.put(f'{self.path}/attrib/emulate_tpu', '1')]

    def discard_question(self) -> Op:
        return Op.get(f'{self.path}/attrib/emulate_tpu')

    def grow(self) -> list[Op]:
        """Return what tells the kernel that there is more.

        A block device's size is asked each time; a file's is told.
        """
        if self.device.is_block:
            return []
        return [Op.put(f'{self.path}/control', f'fd_dev_size={self._size()}')]

    # Ours alone.

    def _control(self) -> str:
        if self.device.is_block:
            return f'udev_path={self.device.path}'
        # Through the page cache, as others of this node read it, and with a
        # write cache that the host is told of, and flushes.
        return (
            f'fd_dev_name={self.device.path},fd_dev_size={self._size()},'
            'fd_buffered_io=1'
        )

    def _size(self) -> int:
        if self.size_bytes <= 0 or self.size_bytes % model.SECTOR_BYTES:
            raise errors.Invalid(
                f'volume {self.volume_id} has {self.size_bytes} bytes, no '
                f'whole sectors of {model.SECTOR_BYTES}'
            )
        return self.size_bytes


def of(wanted: Export, prefix: str) -> Store:
    """Return the backstore that an export needs.

    :raises Unsupported: the kernel cannot read the source
    :raises Invalid: its path cannot be told to the kernel
    """
    source = wanted.source
    if not isinstance(source, model.Device) or source.format != 'raw':
        raise errors.Unsupported(
            f'volume {wanted.volume_id} is no raw device of its node, and '
            'the kernel reads no other format: use the nbd exporter'
        )
    if any(each in ',\\' or not each.isprintable() for each in source.path):
        raise errors.Invalid(
            f'{source.path!r:.200} has a comma or another character that '
            'the kernel\'s target does not take in a path'
        )
    return Store(
        name(prefix, wanted.volume_id), wanted.volume_id, source,
        wanted.size_bytes,
    )


def name(prefix: str, volume_id: str) -> str:
    return f'{prefix}volume-{volume_id}'


def ours(node: Node, prefix: str) -> dict[str, str]:
    """Return the volumes of our backstores, by their paths."""
    return _in(node, prefix, [f'{CORE}/{each}' for each in HBAS])


def restored(node: Node, prefix: str) -> list[str]:
    """Return backstores with names of ours that stand elsewhere."""
    return list(_in(node, prefix, [
        f'{CORE}/{each}' for each in texts(*node.configure([Op.list(CORE)]))
        if FOREIGN_HBA.fullmatch(each) and each not in HBAS
    ]))


def _in(node: Node, prefix: str, hbas: Sequence[str]) -> dict[str, str]:
    """Return the volumes of backstores with names of ours in some HBAs."""
    listed = node.configure([Op.list(each) for each in hbas]) if hbas else []
    start = name(prefix, '')
    return {
        f'{hba}/{each}': each.removeprefix(start)
        for hba, names in zip(hbas, listed, strict=True)
        for each in texts(names)
        if each.startswith(start) and ids.is_id(each.removeprefix(start))
    }
