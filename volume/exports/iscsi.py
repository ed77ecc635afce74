# SPDX-License-Identifier: Apache-2.0
"""What all iSCSI exporters share: names, portals, CHAP, connections.

There is one target per attachment, named as ``naming`` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from volume import errors
from volume import model
from volume.exports.base import Export
from volume.exports.naming import NAME_BYTES_MAX
from volume.exports.naming import parts as parts
from volume.exports.naming import PREFIX_BYTES_MAX
from volume.exports.naming import target as target
from volume.exports.portals import parse
from volume.exports.portals import Portal

PORT = 3260
_PREFIX = re.compile(r'iqn\.\d{4}-\d\d\.[a-z0-9.-]+(:[a-z0-9.:-]*)?')
_INITIATOR = re.compile(
    r'iqn\.\d{4}-\d\d\.[a-z0-9][a-z0-9._:-]*'
    r'|eui\.[0-9a-f]{16}|naa\.[0-9a-f]{16}(?:[0-9a-f]{16})?'
)
# What LIO and tgt take as names and secrets without quoting.
# LIO takes one that begins with NULL for none.
_SECRET = re.compile(r'(?!NULL)[A-Za-z0-9._-]{1,223}')
SECRET_CHARS_MIN = 12  # RFC 7143, 12.1.3: 96 bits, which letters stand for

ONE_WAY = ('username', 'password')
MUTUAL = ('mutual_username', 'mutual_password')
WANTS: Mapping[str, tuple[str, ...]] = {
    'off': (), 'one-way': ONE_WAY, 'mutual': ONE_WAY + MUTUAL,
}

OPTIONS: tuple[cfg.Opt, ...] = (
    cfg.ListOpt(
        'iscsi_portals', required=True,
        help='Addresses of this node on which hosts find targets.\n\n'
        'Each one address or address:port (3260 if it is left out), IPv6 in '
        'brackets. With several, hosts have several paths to each volume.',
    ),
    cfg.StrOpt(
        'iscsi_target_prefix', default='iqn.2010-10.org.openstack:',
        help='What the names of targets begin with.\n\n'
        'Targets are called <prefix>volume-<volume>.<attachment>. Those '
        'with this prefix and this form are the service\'s own: do not '
        'change it while volumes are attached.',
    ),
    cfg.StrOpt(
        'chap', choices=tuple(WANTS), default='one-way',
        help='How hosts and targets prove who they are.\n\n'
        'one-way: the host knows a secret. mutual: the target knows another '
        'one as well. off: the host\'s name is enough, which anybody on the '
        'network can give. The secrets are made for each attachment.',
    ),
)


def check(conf: Any) -> tuple[Portal, ...]:
    """Return the portals of the options.

    :raises Invalid: an option is wrong
    """
    prefix = conf.iscsi_target_prefix
    if not _PREFIX.fullmatch(prefix) or len(prefix) > PREFIX_BYTES_MAX:
        raise errors.Invalid(
            f'iscsi_target_prefix {prefix!r:.80} is wrong: write it as '
            'iqn.YYYY-MM.reversed.domain:, in lower case, at most '
            f'{PREFIX_BYTES_MAX} characters'
        )
    return parse(conf.iscsi_portals, 'iscsi_portals', PORT)


# Names.


def initiator(host: model.Host) -> str:
    """Return the host's iSCSI name, in lower case as it is compared.

    :raises Invalid: it has none, or what is none
    """
    name = (host.iqn or '').lower()
    if not name:
        raise errors.Invalid(
            f'host {host.name} has no iSCSI name: give its connector an '
            'initiator (it stands in /etc/iscsi/initiatorname.iscsi)'
        )
    if not _INITIATOR.fullmatch(name) or len(name) > NAME_BYTES_MAX:
        raise errors.Invalid(
            f'host {host.name} calls itself {name!r:.80}, which is no iSCSI '
            'name: it must be iqn.…, eui.… or naa.…'
        )
    return name


# Secrets.


def credentials(wanted: Export, wants: tuple[str, ...]) -> dict[str, str]:
    """Return the secrets of an attachment, checked; no more than are wanted.

    One that was made before the options wanted them is restored without.

    :raises Invalid: one is missing, or cannot be given to a target
    """
    found = {
        name: wanted.credentials.get(name, '')
        for pair in (ONE_WAY, MUTUAL) for name in pair
        if name in wants and set(pair) & set(wanted.credentials)
    }
    for name, value in found.items():
        if not _SECRET.fullmatch(value) or (
            name.endswith('password') and len(value) < SECRET_CHARS_MIN
        ):
            raise errors.Invalid(
                f'the {name} of attachment {wanted.attachment_id} is '
                'missing, too short, or has other characters than letters, '
                'digits, ".", "_" and "-"'
            )
    return found


# Connections.


def connection(
    name: str,
    portals: tuple[Portal, ...],
    lun: int,
    wanted: Export,
    secrets: Mapping[str, str],
    discard: bool = False,
) -> model.Connection:
    """Return how the host connects, in the form that Cinder's clients know.

    Theirs is one secret; those of mutual CHAP are ``auth_mutual_username``
    and ``auth_mutual_password``, by which the target proves who it is.
    """
    count = len(portals)
    fields: dict[str, object] = {
        'target_discovered': False,
        'target_portal': str(portals[0]),
        'target_iqn': name,
        'target_lun': lun,
        'target_portals': [str(portal) for portal in portals],
        'target_iqns': [name] * count,
        'target_luns': [lun] * count,
        'volume_id': wanted.volume_id,
        'access_mode': wanted.access.value,
        'discard': discard,
    }
    proof: dict[str, str] = {}
    if secrets:
        proof['auth_method'] = 'CHAP'
        proof |= {f'auth_{key}': value for key, value in secrets.items()}
    return model.Connection('iscsi', fields, credentials=proof)
