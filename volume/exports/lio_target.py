# SPDX-License-Identifier: Apache-2.0
"""An attachment as a target of the kernel's iSCSI server.

Ours has one portal group, one list entry (the host) and one LUN. What it is
to be, what has to be asked to know how it is, and the operations that make
or remove it; who does them is ``lio``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from volume import errors
from volume import model
from volume.exports.base import Export
from volume.exports.configfs import texts
from volume.exports.lio_store import ALIAS
from volume.exports.lio_store import Store
from volume.exports.portals import Portal
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import Node

ISCSI = '/sys/kernel/config/target/iscsi'
LUN = 0
MAPPED = 'volume'  # our name of the link from a host's LUN to the target's
# What another tool calls such links, where it has restored our target.
OTHER_LINK = re.compile('[0-9a-f]{10}')
AUTH = {
    'username': 'userid', 'password': 'password',
    'mutual_username': 'userid_mutual', 'mutual_password': 'password_mutual',
}
NO_SECRET = 'NULL'  # written, it takes one away


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What the target of an attachment is to be."""

    name: str
    wanted: Export
    initiator: str
    portals: tuple[Portal, ...]
    secrets: Mapping[str, str] = dataclasses.field(repr=False)
    store: Store

    @property
    def is_read_only(self) -> bool:
        return self.wanted.access is model.Access.READ

    @property
    def group(self) -> str:
        return group(self.name)

    def questions(self) -> list[Op]:
        """Return what has to be known of it, the store's first."""
        at = self.group
        return [
            *self.store.questions(),
            Op.get(f'{at}/enable'),
            alias_question(self.name, self.store.name),
            Op.list(f'{at}/acls'),
            Op.get(f'{self._admitted}/lun_{LUN}/write_protect'),
            Op.list(f'{at}/np'),
        ]

    def is_there(self, found: Sequence[Result]) -> bool:
        return found[-5] is not None

    def is_whole(self, found: Sequence[Result]) -> bool:
        """Say whether it is enabled, by us, and as it is to be.

        :raises Conflict: it is, and is somebody else's, or other
        """
        enabled, alias, admitted, protected, _ = found[-5:]
        if enabled != '1' or alias != ALIAS:
            return False
        if admitted != [self.initiator]:
            raise errors.Conflict(
                f'attachment {self.wanted.attachment_id} is exported to '
                f'{", ".join(texts(admitted)) or "nobody"}, not to '
                f'{self.initiator}: end it first'
            )
        if (protected == '1') != self.is_read_only:
            access = 'read-only' if protected == '1' else 'for writing'
            raise errors.Conflict(
                f'attachment {self.wanted.attachment_id} is exported '
                f'{access}: end it first'
            )
        return self.store.is_whole(found)

    def begin(self) -> list[Op]:
        """Return what comes first: by its name the rest is found."""
        return [Op.mkdir(f'{ISCSI}/{self.name}'), Op.mkdir(self.group)]

    def make(self) -> list[Op]:
        """Return how it is filled; its backstore is there."""
        lun = f'{self.group}/lun/lun_{LUN}'
        mapped = f'{self._admitted}/lun_{LUN}'
        return [
            *self._attributes(),
            Op.mkdir(lun),
            Op.link(f'{lun}/{self.store.name}', self.store.path),
            Op.mkdir(self._admitted),
            *self._auth(),
            Op.mkdir(mapped),
            Op.link(f'{mapped}/{MAPPED}', lun),
            Op.put(f'{mapped}/write_protect', str(int(self.is_read_only))),
            *(Op.mkdir(f'{self.group}/np/{each}') for each in self.portals),
        ]

    def enable(self) -> Op:
        return Op.put(f'{self.group}/enable', '1')

    def renew(self, found: Sequence[Result]) -> list[Op]:
        """Return what may be changed while hosts work."""
        wanted = {str(each) for each in self.portals}
        there = set(texts(found[-1]))
        at = f'{self.group}/np'
        return [
            *self.store.grow(),
            *self._attributes(),
            *self._auth(NO_SECRET),
            *(Op.mkdir(f'{at}/{each}') for each in sorted(wanted - there)),
            *(Op.rmdir(f'{at}/{each}') for each in sorted(there - wanted)),
        ]

    # Ours alone.

    @property
    def _admitted(self) -> str:
        return f'{self.group}/acls/{self.initiator}'

    def _attributes(self) -> list[Op]:
        at = f'{self.group}/attrib'
        return [
            Op.put(f'{at}/authentication', str(int(bool(self.secrets)))),
            # Nobody but who is on the list, who alone is told the name.
            Op.put(f'{at}/generate_node_acls', '0'),
            Op.put(f'{at}/demo_mode_write_protect', '1'),
            Op.put(f'{at}/demo_mode_discovery', '0'),
            # A host's LUN begins as this says: never writable for a moment.
            Op.put(
                f'{at}/prod_mode_write_protect', str(int(self.is_read_only))
            ),
        ]

    def _auth(self, absent: str = '') -> list[Op]:
        values = {
            AUTH[name]: self.secrets.get(name, absent) for name in AUTH
        }
        return [
            Op.put(f'{self._admitted}/auth/{name}', text)
            for name, text in values.items() if text
        ]


def group(name: str) -> str:
    return f'{ISCSI}/{name}/tpgt_1'


def alias_question(name: str, store: str) -> Op:
    """Ask for what a backstore of ours says through the target's LUN."""
    return Op.get(f'{group(name)}/lun/lun_{LUN}/{store}/alias')


def emptying(node: Node, name: str, store: str) -> list[Op]:
    """Return how all in a target is removed, hosts' sessions with it.

    The kernel is asked what is in it, for another tool may have filled it.
    It returns from the removal of a host when that one's last session has
    ended, and not before.
    """
    at = group(name)
    enabled, *lists = node.configure([
        Op.get(f'{at}/enable'), Op.list(f'{at}/acls'), Op.list(f'{at}/lun'),
        Op.list(f'{at}/np'),
    ])
    hosts, luns, portals = (
        [f'{at}/{kind}/{each}' for each in texts(names)]
        for kind, names in zip(('acls', 'lun', 'np'), lists, strict=True)
    )
    mapped = [
        each for each in _inside(node, hosts)
        if os.path.basename(each).startswith('lun_')
    ]
    return [
        *([Op.put(f'{at}/enable', '0')] if enabled == '1' else []),
        *_unlink(node, mapped, store),
        *map(Op.rmdir, (*mapped, *hosts, *portals)),
        *_unlink(node, luns, store),
        *map(Op.rmdir, luns),
    ]


def removing(name: str) -> list[Op]:
    """Return how an empty target goes."""
    return [Op.rmdir(group(name)), Op.rmdir(f'{ISCSI}/{name}')]


def _unlink(node: Node, luns: list[str], store: str) -> list[Op]:
    return [
        Op.unlink(each) for each in _inside(node, luns)
        if os.path.basename(each) in (MAPPED, store)
        or OTHER_LINK.fullmatch(os.path.basename(each))
    ]


def _inside(node: Node, directories: list[str]) -> list[str]:
    if not directories:
        return []
    return [
        f'{directory}/{name}'
        for directory, names in zip(
            directories, node.configure(list(map(Op.list, directories))),
            strict=True,
        )
        for name in texts(names)
    ]
