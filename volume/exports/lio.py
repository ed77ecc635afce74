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
from collections.abc import Mapping, Sequence
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
from volume.exports.lio_store import Store
from volume.exports.lio_target import emptying
from volume.exports.lio_target import ISCSI
from volume.exports.lio_target import LUN
from volume.exports.lio_target import removing
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
        for start in range(0, len(targets), AT_ONCE):
            found |= self._export_some(targets[start:start + AT_ONCE])
        return found

    def unexport(self, attachment_id: str) -> None:
        attachment = ids.check(attachment_id, 'attachment')
        names = self._names()
        for name, (_, each) in names.items():
            if each == attachment:
                self._remove(name, names)

    def exported(self) -> set[str]:
        return {attachment for _, attachment in self._names().values()}

    def grow(self, wanted: Export) -> None:
        store = lio_store.of(wanted, self.conf.iscsi_target_prefix)
        if ops := store.grow():
            self.node.configure(ops)

    # Ours alone.

    def _names(self) -> dict[str, tuple[str, str]]:
        """Return volume and attachment of each target of ours, by name."""
        (names,) = self.node.configure([Op.list(ISCSI)])
        found = {}
        for name in names if isinstance(names, list) else []:
            if parts := iscsi.parts(self.conf.iscsi_target_prefix, name):
                found[name] = parts
        return found

    def _target(
        self, wanted: Export, there: Mapping[str, tuple[str, str]]
    ) -> Target:
        prefix = self.conf.iscsi_target_prefix
        name = iscsi.target(prefix, wanted.volume_id, wanted.attachment_id)
        target = Target(
            name, wanted, iscsi.initiator(wanted.host),
            iscsi.check(self.conf), iscsi.credentials(wanted, self.wants),
            lio_store.of(wanted, prefix),
        )
        for other, (volume_id, attachment_id) in there.items():
            if attachment_id == wanted.attachment_id and other != name:
                raise errors.Conflict(
                    f'attachment {attachment_id} is of volume {volume_id}, '
                    f'not of {wanted.volume_id}: end it first'
                )
        return target

    # Making.

    def _export_some(
        self, targets: Sequence[Target]
    ) -> dict[str, model.Connection | errors.VolumeError]:
        """Export them together; one by one if anything fails."""
        found: dict[str, model.Connection | errors.VolumeError] = {}
        with contextlib.suppress(errors.VolumeError):
            return dict(self._export_together(targets))
        for target in targets:
            try:
                found |= self._export_together([target])
            except errors.VolumeError as failed:
                found[target.attachment_id] = failed
        return found

    def _export_together(
        self, targets: Sequence[Target]
    ) -> dict[str, model.Connection]:
        ...
