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
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from volume import errors
from volume import ids
from volume import model
from volume.exports import iscsi
from volume.exports import lio_store
from volume.exports import lio_target
from volume.exports.base import Abilities
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.lio_store import CORE
from volume.exports.lio_store import HBAS
from volume.exports.lio_target import emptying
from volume.exports.lio_target import group
from volume.exports.lio_target import ISCSI
from volume.exports.lio_target import LUN
from volume.exports.lio_target import removing
from volume.exports.lio_target import Target
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import CommandFailed
from volume.node import Node

LOG = logging.getLogger(__name__)

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
            Op.mkdir(ISCSI), *(Op.mkdir(f'{CORE}/{each}') for each in HBAS)
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
        """Export them together, and one by one if anything fails."""
        found: dict[str, model.Connection | errors.VolumeError] = {}
        if len(targets) > 1:
            with contextlib.suppress(errors.VolumeError):
                return found | self._export_together(targets)
        trouble: errors.VolumeError | None = None
        for each in targets:
            try:
                if trouble:
                    raise trouble
                found |= self._export_together([each])
            except errors.VolumeError as failed:
                found[each.attachment_id] = failed
                if isinstance(failed, errors.Unavailable):
                    trouble = failed  # the node's, so the next one's as well
        return found

    def _export_together(
        self, targets: Sequence[Target]
    ) -> dict[str, model.Connection]:
        known = self._look(targets)
        whole = [each for each in targets if each.is_whole(known[each.name])]
        new = [each for each in targets if each not in whole]
        self.node.configure([
            op for each in whole for op in each.renew(known[each.name])
        ])
        discards = {
            each.name: each.store.discards(known[each.name]) for each in whole
        }
        try:
            discards |= self._make(new, known)
        except errors.VolumeError:
            self._undo(new)
            raise
        return {
            each.attachment_id: iscsi.connection(
                each.name, each.portals, LUN, each.wanted, each.secrets,
                discards[each.name],
            )
            for each in targets
        }

    def _look(
        self, targets: Sequence[Target]
    ) -> dict[str, Sequence[Result]]:
        """Return how each is, when what is left of any is out of the way."""
        known = self._ask({each.name: each.questions() for each in targets})
        left = [
            each for each in targets if each.is_there(known[each.name])
            and not each.is_whole(known[each.name])
        ]
        if not left:
            return known
        self._remove_restored()
        for each in left:
            self._remove(each.name, self._names())
        return self._look(targets)

    def _make(
        self, targets: Sequence[Target], known: Mapping[str, Sequence[Result]]
    ) -> dict[str, bool]:
        """Make them all, and say which one's host may discard."""
        ops = []
        made: set[str] = set()
        for each in targets:
            ops += each.begin()
            store = each.store
            if store.path not in made and not store.is_whole(known[each.name]):
                ops += store.make()
            made.add(store.path)
            ops += each.make()
        self.node.configure(ops)
        limits = self._ask({
            each.name: [each.store.discard_question()] for each in targets
        })
        discards = {name: found != ['0'] for name, found in limits.items()}
        self.node.configure([
            op for each in targets for op in (
                *([each.store.let_discard()] if discards[each.name] else ()),
                each.enable(),
            )
        ])
        return discards

    def _undo(self, targets: Sequence[Target]) -> None:
        """Remove what was half made; it may not be there, or not yet."""
        for each in targets:
            try:
                self._remove(each.name, self._names())
            except errors.VolumeError as failed:
                LOG.warning('%s is left: %s', each.name, failed)
                return

    def _ask(
        self, questions: Mapping[str, list[Op]]
    ) -> dict[str, Sequence[Result]]:
        """Return the answers by name, in one round trip."""
        answers = iter(self.node.configure(
            [op for ops in questions.values() for op in ops]
        ))
        return {
            name: [next(answers) for _ in ops]
            for name, ops in questions.items()
        }

    # Unmaking.

    def _remove(
        self, name: str, names: Mapping[str, tuple[str, str]]
    ) -> None:
        """Remove a target, and the backstore after the volume's last one."""
        if name not in names:
            return
        volume_id, attachment_id = names[name]
        store = lio_store.name(self.conf.iscsi_target_prefix, volume_id)
        ops = emptying(self.node, name, store)
        if not any(
            of == volume_id and other != name
            for other, (of, _) in names.items()
        ):
            ops += [Op.rmdir(f'{CORE}/{hba}/{store}') for hba in HBAS]
        try:
            self.node.configure([*ops, *removing(name)])
        except errors.Busy as busy:
            raise errors.Busy(
                f'attachment {attachment_id} is not ended, for another '
                f'target of the node uses its volume ({busy}): take it out '
                'of that one'
            ) from busy

    def _remove_restored(self) -> None:
        """Remove what another tool has restored from its own records.

        Those know neither today's hosts nor today's secrets.
        """
        names, prefix = self._names(), self.conf.iscsi_target_prefix
        known = self._ask({
            name: [
                Op.get(f'{group(name)}/enable'),
                lio_target.alias_question(
                    name, lio_store.name(prefix, volume_id)
                ),
            ]
            for name, (volume_id, _) in names.items()
        })
        for name, (enabled, alias) in known.items():
            if enabled == '1' and alias != lio_store.ALIAS:
                LOG.warning('%s was not made by this service: removed', name)
                self._remove(name, names)
        for path in lio_store.restored(self.node, prefix):
            try:
                self.node.configure([Op.rmdir(path)])
            except errors.Busy as busy:
                LOG.warning('a target that is not ours has it: %s', busy)
