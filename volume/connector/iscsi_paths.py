# SPDX-License-Identifier: Apache-2.0
"""An iSCSI connection_info as it must be: what to log in to, and as whom.

The form is Cinder's: one portal, or lists of portals, names and numbers.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from volume import errors
from volume import ids
from volume import model
from volume.connector.base import field

# What open-iscsi takes, and what may stand in a path of ours.
_NAME = re.compile(r'(iqn|eui|naa)\.[a-z0-9][a-z0-9.:-]{0,218}', re.I)
_PORTAL = re.compile(
    r'(\[[0-9a-f:.]+\]|[a-z0-9][a-z0-9.-]*):(\d{1,5})', re.I
)
_SECRET = re.compile(r'[\x21-\x7e]{1,255}')


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """One portal of one target, and the number that the volume has there."""

    target: str
    portal: str
    lun: int


class Asked:
    """A connection of iSCSI, or ``Invalid``."""

    def __init__(self, connection: model.Connection) -> None:
        self.volume_id = ids.check(
            field(connection, 'iscsi', 'volume_id'), 'volume id'
        )
        self._fields = connection.fields
        self.ways = self._ways()
        self.settings = _proof(connection)
        self.is_read_only = self._fields.get('access_mode') == 'ro'
        size = self._fields.get('size_bytes')
        self.size_bytes = size if isinstance(size, int) else 0

    @property
    def targets(self) -> set[str]:
        return {way.target for way in self.ways}

    def _ways(self) -> list[Way]:
        many: list[list[Any]] = []
        for name in ('target_iqns', 'target_portals', 'target_luns'):
            value = self._fields.get(name)
            many.append(value if isinstance(value, list) else [])
        if not all(many):
            many = [[self._fields.get(name)] for name in (
                'target_iqn', 'target_portal', 'target_lun'
            )]
        if len({len(each) for each in many}) != 1:
            raise errors.Invalid(
                f'the connection of volume {self.volume_id} has not as many '
                'targets as portals and LUNs'
            )
        found = [
            _way(target, portal, lun, self.volume_id)
            for target, portal, lun in zip(*many, strict=True)
        ]
        return list(dict.fromkeys(found))


def _way(target: Any, portal: Any, lun: Any, volume_id: str) -> Way:
    match = _PORTAL.fullmatch(portal) if isinstance(portal, str) else None
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise errors.Invalid(
            f'the connection of volume {volume_id} has the portal '
            f'{portal!r:.80}, which is no address with a port'
        )
    if not isinstance(target, str) or not _NAME.fullmatch(target):
        raise errors.Invalid(
            f'the connection of volume {volume_id} has the target '
            f'{target!r:.240}, which is no iSCSI name'
        )
    if not isinstance(lun, int) or not 0 <= lun < 1 << 14:
        raise errors.Invalid(
            f'the connection of volume {volume_id} has the LUN {lun!r:.40}, '
            'which is none'
        )
    return Way(target, portal, lun)


def _proof(connection: model.Connection) -> dict[str, str]:
    """Return the lines of a node record by which the host proves itself."""
    given = {**connection.fields, **connection.credentials}
    method = given.get('auth_method') or ''
    if not method:
        return {'node.session.auth.authmethod': 'None'}
    if method != 'CHAP':
        raise errors.Unsupported(
            f'the target wants {method!r:.40}; this host can do CHAP'
        )
    found = {'node.session.auth.authmethod': 'CHAP'}
    for name, line, is_needed in (
        ('auth_username', 'username', True),
        ('auth_password', 'password', True),
        ('auth_mutual_username', 'username_in', False),
        ('auth_mutual_password', 'password_in', False),
    ):
        value = given.get(name)
        if value is None and not is_needed:
            continue
        if not isinstance(value, str) or not _SECRET.fullmatch(value):
            raise errors.Invalid(
                f'the connection has no usable {name}: ask the service for '
                'it again, as who connects'
            )
        found[f'node.session.auth.{line}'] = value
    return found
