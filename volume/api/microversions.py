# SPDX-License-Identifier: Apache-2.0
"""Which version of the API a request speaks, and the versions document."""

from __future__ import annotations

import re
from typing import Any

from volume.api.faults import Refused

HEADER = 'OpenStack-API-Version'
SERVICE = 'volume'
MIN = 0
MAX = 59  # 55 to 59 are about transfers, backups and groups alone
UPDATED = '2018-11-29T00:00:00Z'

_VERSION = re.compile(r'([1-9][0-9]{0,3})\.([1-9][0-9]{0,3}|0)')


def negotiate(header: str | None) -> int:
    """Return the minor version that is asked for; none means 3.0.

    :raises Refused: 400 if it is no version, 406 if there is no such one
    """
    wanted = None
    for item in (header or '').split(','):
        words = item.split()
        if words and words[0].lower() == SERVICE:
            wanted = ' '.join(words[1:])
    if wanted is None:
        return MIN
    if wanted.lower() == 'latest':
        return MAX
    found = _VERSION.fullmatch(wanted)
    if found is None:
        raise Refused(
            400,
            f'API version {wanted!r:.40} is of invalid format; it must be '
            'like 3.27, or latest',
        )
    major, minor = int(found[1]), int(found[2])
    if major != 3 or not MIN <= minor <= MAX:
        raise Refused(
            406,
            f'version {major}.{minor} is not supported by the API; minimum '
            f'is 3.{MIN} and maximum is 3.{MAX}',
        )
    return minor


def document(base_url: str) -> dict[str, Any]:
    """Return what discovery shows; anybody may read it."""
    return {'versions': [{
        'id': f'v3.{MIN}',
        'status': 'CURRENT',
        'version': f'3.{MAX}',
        'min_version': f'3.{MIN}',
        'updated': UPDATED,
        'links': [{'rel': 'self', 'href': f'{base_url}/v3/'}],
        'media-types': [{
            'base': 'application/json',
            'type': 'application/vnd.openstack.volume+json;version=3',
        }],
    }]}
