# SPDX-License-Identifier: Apache-2.0
"""Volumes over iSCSI, served by the kernel of the node (LIO).

Each attachment has a target, whose one list admits one host; its one LUN is
the volume's backstore. A target is made before its backstore, enabled last,
and removed after everything in it: whatever breaks off between leaves a
target, and by its name ``unexport`` finds the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from volume import errors
from volume import model
from volume.exports import iscsi
from volume.exports import lio_store
from volume.exports.base import Abilities
from volume.exports.base import Export
from volume.exports.configfs import ConfigfsExporter
from volume.exports.configfs import Found
from volume.exports.configfs import Names
from volume.exports.lio_store import CORE
from volume.exports.lio_store import HBAS
from volume.exports.lio_target import alias_question
from volume.exports.lio_target import emptying
from volume.exports.lio_target import group
from volume.exports.lio_target import ISCSI
from volume.exports.lio_target import LUN
from volume.exports.lio_target import removing
from volume.exports.lio_target import Target
from volume.machine.ops import Op
from volume.node import Node

LOG = logging.getLogger(__name__)


class LioExporter(ConfigfsExporter[Target]):
    """iSCSI targets of the node's kernel; they outlive our service."""

    options = iscsi.OPTIONS
    forms: ClassVar[frozenset[model.Form]] = frozenset({
        model.Form.BLOCK, model.Form.FILE,
    })
    abilities: ClassVar[Abilities] = Abilities(
        auth=('chap', 'mutual-chap', 'initiator'), multi_portal=True,
        online_resize=True, remote_node=True,
    )
    directory = ISCSI
    modules = (
        'target_core_mod', 'target_core_iblock', 'target_core_file',
        'iscsi_target_mod',
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        self.wants = iscsi.WANTS[conf.chap]

    @property
    def prefix(self) -> str:
        return str(self.conf.iscsi_target_prefix)

    def check(self) -> None:
        iscsi.check(self.conf)
        self.load_modules()
        self.node.configure([
            Op.mkdir(ISCSI), *(Op.mkdir(f'{CORE}/{each}') for each in HBAS)
        ])
        self.remove_restored()

    def grow(self, wanted: Export) -> None:
        if ops := lio_store.of(wanted, self.prefix).grow():
            self.node.configure(ops)

    def target(self, wanted: Export, name: str) -> Target:
        return Target(
            name, wanted, iscsi.initiator(wanted.host),
            iscsi.check(self.conf), iscsi.credentials(wanted, self.wants),
            lio_store.of(wanted, self.prefix),
        )

    def make(
        self, targets: Sequence[Target], known: Mapping[str, Found]
    ) -> None:
        ops = []
        made: set[str] = set()
        for each in targets:
            ops += each.begin()
            store = each.store
            if store.path in made or store.is_whole(known[each.name]):
                ops += store.grow()
            else:
                ops += store.make()
            made.add(store.path)
            ops += each.make()
        self.node.configure(ops)
        limits = self.ask({
            each.name: [each.store.limit_question()] for each in targets
        })
        self.node.configure([
            op for each in targets for op in (
                *each.store.let_discard(limits[each.name]), each.enable(),
            )
        ])

    def renew(
        self, targets: Sequence[Target], known: Mapping[str, Found]
    ) -> None:
        self.node.configure([
            op for each in targets for op in each.renew(known[each.name])
        ])

    def connections(
        self, targets: Sequence[Target]
    ) -> dict[str, model.Connection]:
        discards = self.ask({
            each.name: [each.store.discard_question()] for each in targets
        })
        return {
            each.wanted.attachment_id: iscsi.connection(
                each.name, each.portals, LUN, each.wanted, each.secrets,
                discards[each.name] == ['1'],
            )
            for each in targets
        }

    def state(self, name: str, volume_id: str) -> list[Op]:
        store = lio_store.name(self.prefix, volume_id)
        return [
            Op.get(f'{group(name)}/enable'), alias_question(name, store),
        ]

    def works(self, found: Found) -> bool:
        enabled, alias = found
        return enabled == '1' and alias == lio_store.ALIAS

    def remove(self, name: str, names: Names) -> None:
        """Remove a target, and the backstore after the volume's last one."""
        volume_id, attachment_id = names[name]
        store = lio_store.name(self.prefix, volume_id)
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

    def remove_rest(self) -> None:
        # A target is made before its backstore: so one that had none when
        # the backstores were listed already is not on its way.
        stores = lio_store.ours(self.node, self.prefix)
        if not stores:
            return
        used = {volume_id for volume_id, _ in self.names().values()}
        for path, volume_id in stores.items():
            if volume_id not in used:
                LOG.warning('%s has lost its targets: removed', path)
                self._remove_store(path)

    def remove_restored(self) -> None:
        names = self.names()
        for name, found in self.states(names).items():
            if found[0] == '1' and not self.works(found):
                LOG.warning('%s was not made by this service: removed', name)
                self.remove(name, names)
        for path in lio_store.restored(self.node, self.prefix):
            self._remove_store(path)
        self.remove_rest()

    def _remove_store(self, path: str) -> None:
        try:
            self.node.configure([Op.rmdir(path)])
        except errors.Busy as busy:
            LOG.warning('a target that is not ours has it: %s', busy)
