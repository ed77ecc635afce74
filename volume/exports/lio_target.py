# SPDX-License-Identifier: Apache-2.0
"""An attachment as a target of the kernel's iSCSI server.

Ours has one portal group, one list entry (the host) and one LUN. What it is
to be, what has to be asked to know how it is, and the operations that make
or remove it; who does them is ``lio``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from volume import errors
from volume import model
from volume.exports.lio_store import ALIAS
from volume.exports.lio_store import Store
from volume.exports.portals import Portal
from volume.machine.ops import Op
from volume.machine.ops import Result

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
    attachment_id: str
    initiator: str
    is_read_only: bool
    portals: tuple[Portal, ...]
    secrets: Mapping[str, str] = dataclasses.field(repr=False)
    store: Store

    @property
    def group(self) -> str:
        return group(self.name)

    def questions(self) -> list[Op]:
        """Return what ``is_whole`` has to know, the store's first."""
        at = self.group
        return [
            *self.store.questions(),
            Op.get(f'{at}/enable'),
            Op.get(f'{at}/lun/lun_{LUN}/{self.store.name}/alias'),
            Op.list(f'{at}/acls'),
            Op.get(f'{self._admitted}/lun_{LUN}/write_protect'),
            Op.list(f'{at}/np'),
        ]

    def is_whole(self, found: Sequence[Result]) -> bool:
        """Say whether it is enabled, by us, and as it is to be.

        :raises Conflict: it is, and is somebody else's, or other
        """
        enabled, alias, admitted, protected, _ = found[-5:]
        if enabled != '1' or alias != ALIAS:
            return False
        access = 'ro' if protected == '1' else 'rw'
        if admitted != [self.initiator]:
            raise errors.Conflict(
                f'attachment {self.attachment_id} is exported to '
                f'{", ".join(_names(admitted)) or "nobody"}, not to '
                f'{self.initiator}: end it first'
            )
        if (protected == '1') != self.is_read_only:
            raise errors.Conflict(
                f'attachment {self.attachment_id} is exported as {access}: '
                'end it first'
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
        """Return what may be changed while hosts work: secrets, portals."""
        wanted = {str(each) for each in self.portals}
        there = set(_names(found[-1]))
        at = f'{self.group}/np'
        return [
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
        texts = {
            AUTH[name]: self.secrets.get(name, absent) for name in AUTH
        }
        return [
            Op.put(f'{self._admitted}/auth/{name}', text)
            for name, text in texts.items() if text
        ]


def group(name: str) -> str:
    return f'{ISCSI}/{name}/tpgt_1'


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """What stands in a target that is to be removed, whoever filled it."""

    name: str
    is_enabled: bool
    admitted: tuple[str, ...]
    luns: tuple[str, ...]
    portals: tuple[str, ...]

    @classmethod
    def questions(cls, name: str) -> list[Op]:
        at = group(name)
        return [
            Op.get(f'{at}/enable'), Op.list(f'{at}/acls'),
            Op.list(f'{at}/lun'), Op.list(f'{at}/np'),
        ]

    @classmethod
    def of(cls, name: str, found: Sequence[Result]) -> Contents:
        enabled, *lists = found
        admitted, luns, portals = (tuple(_names(each)) for each in lists)
        return cls(name, enabled == '1', admitted, luns, portals)

    def link_questions(self) -> list[Op]:
        at = group(self.name)
        return [
            *(Op.list(f'{at}/acls/{each}') for each in self.admitted),
            *(Op.list(f'{at}/lun/{each}') for each in self.luns),
        ]

    def mapped(self, found: Sequence[Result]) -> list[str]:
        """Return where hosts' LUNs are, of the answers about links."""
        return [
            f'{group(self.name)}/acls/{host}/{name}'
            for host, names in zip(self.admitted, found, strict=False)
            for name in _names(names) if name.startswith('lun_')
        ]

    def unmake(
        self, links: Iterable[str], mapped: Iterable[str]
    ) -> list[Op]:
        """Return how all in it is removed, hosts' sessions with it.

        The kernel returns from the removal of a host when its last session
        has ended, and not before.
        """
        at = group(self.name)
        return [
            *([Op.put(f'{at}/enable', '0')] if self.is_enabled else []),
            *(Op.unlink(each) for each in links if '/acls/' in each),
            *(Op.rmdir(each) for each in mapped),
            *(Op.rmdir(f'{at}/acls/{each}') for each in self.admitted),
            *(Op.rmdir(f'{at}/np/{each}') for each in self.portals),
            *(Op.unlink(each) for each in links if '/lun/' in each),
            *(Op.rmdir(f'{at}/lun/{each}') for each in self.luns),
        ]

    def remove(self) -> list[Op]:
        """Return how the target itself goes, at last."""
        return [Op.rmdir(group(self.name)), Op.rmdir(f'{ISCSI}/{self.name}')]


def is_link(name: str, store: str) -> bool:
    """Say whether a name beside a LUN's attributes is that of its link."""
    return name in (MAPPED, store) or OTHER_LINK.fullmatch(name) is not None


def access_of(is_read_only: bool) -> model.Access:
    return model.Access.READ if is_read_only else model.Access.WRITE


def _names(found: Result) -> list[str]:
    return found if isinstance(found, list) else []
