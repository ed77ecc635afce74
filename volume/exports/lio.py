# SPDX-License-Identifier: Apache-2.0
"""Volumes over iSCSI, served by the kernel of the node (LIO).

Each attachment has a target, whose one list admits one host; its one LUN is
the volume's backstore. All of it is written as configfs, in few round trips,
and the kernel is asked what is there. A target is made before its backstore,
enabled last, and removed after everything in it: whatever breaks off between
leaves a target, and by its name ``unexport`` finds the rest.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from volume import errors
from volume import ids
from volume import model
from volume.exports import iscsi
from volume.exports import lio_store
from volume.exports.base import Abilities
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.lio_store import CORE
from volume.exports.lio_target import ISCSI
from volume.exports.lio_target import Target
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import CommandFailed
from volume.node import Node

MODULES = (
    'target_core_mod', 'target_core_iblock', 'target_core_file',
    'iscsi_target_mod',
)
AT_ONCE = 100  # exports in a round trip


class LioExporter(Exporter):
    """Targets of the node's kernel; they outlive our service."""

    options = iscsi.OPTIONS
    abilities: ClassVar[Abilities] = Abilities(
        auth=('chap', 'mutual-chap', 'initiator'), multi_portal=True,
        online_resize=True, remote_node=True,
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        self.wants = iscsi.WANTS[conf.chap]

    def check(self) -> None:
        iscsi.check(self.conf)
        try:
            self.node.run('modprobe', '-a', *MODULES)
        except CommandFailed as failed:
            raise errors.Unavailable(
                f'the kernel of the node has no iSCSI target ({failed}): '
                'install one with the modules ' + ', '.join(MODULES)
            ) from failed
        self.node.configure([
            Op.mkdir(ISCSI), *(Op.mkdir(f'{CORE}/{h}') for h in lio_store.HBAS)
        ])
        self._remove_restored()

    def export(self, wanted: Export) -> model.Connection:
        found = self.export_many([wanted])[wanted.attachment_id]
        if isinstance(found, errors.VolumeError):
            raise found
        return found

    def export_many(
        self, wanted: Sequence[Export]
    ) -> dict[str, model.Connection | errors.VolumeError]:
        found: dict[str, model.Connection | errors.VolumeError] = {}
        targets = []
        there = self._names()
        for each in wanted:
            try:
                targets.append(self._target(each, there))
            except errors.VolumeError as failed:
                found[each.attachment_id] = failed
        for some in itertools.batched(targets, AT_ONCE):
            found |= self._export_some(some)
        return found

    def unexport(self, attachment_id: str) -> None:
        attachment = ids.check(attachment_id, 'attachment')
        for name, (_, each) in self._names().items():
            if each == attachment:
                self._remove([name])

    def exported(self) -> set[str]:
        return {attachment for _, attachment in self._names().values()}

    def grow(self, wanted: Export) -> None:
        if ops := lio_store.of(wanted, self.conf.iscsi_target_prefix).grow():
            self.node.configure(ops)
