# SPDX-License-Identifier: Apache-2.0
"""Whether the user of a section may do what the section asks for.

Told once, when the service starts, and not by the first volume that fails.
Each call that is refused later names the role that it needs (``failures``).
"""

from __future__ import annotations

import logging

from volume import errors
from volume.xenapi import calls
from volume.xenapi.link import Link
from volume.xenapi.options import Settings

LOG = logging.getLogger(__name__)

# By a few calls that only a role can make the role is known.
SIGNS = {
    calls.ADMIN: ('VDI.create', 'VDI.destroy', 'VBD.plug'),
    calls.POWER: ('SR.scan',),
    calls.POOL: ('PBD.plug', 'SR.create', 'pool.add_to_other_config'),
}


def check(link: Link, settings: Settings) -> None:
    """Say what the user may not do; refuse what cannot work without.

    :raises Denied: a role is missing, and which
    """
    lacking = _lacking(link)
    whole = 'SRs for each volume need' if settings.sr_per_volume else (
        'whole LUNs need' if settings.luns else '')
    for role, what in (
        (calls.ADMIN, 'every volume needs'),
        (calls.POOL, whole),
    ):
        if what and role in lacking:
            raise errors.Denied(
                f'user {settings.username} of the pool has not the role '
                f'{role}, which {what} (it may not call {lacking[role]}): '
                'give it that role, or name another user'
            )
    for role, what in (
        (calls.POWER, 'capacity is as old as the server\'s last own scan'),
        (calls.POOL, 'what a host has lost is not plugged in again'
         if settings.repair else ''),
    ):
        if what and role in lacking:
            LOG.warning(
                'user %s of the pool has not the role %s: %s',
                settings.username, role, what,
            )


def _lacking(link: Link) -> dict[str, str]:
    """Return the roles that the user has not, each with a refused call."""
    ref = link.session().ref
    try:
        if link.call('session.get_is_local_superuser', ref):
            return {}
        names = link.call('session.get_rbac_permissions', ref)
    except errors.NotFound:
        return {}  # the session was renewed meanwhile
    allowed = {str(name).lower() for name in names}
    if not allowed:
        return {}  # nobody knows
    return {
        role: missing[0] for role, signs in SIGNS.items()
        if (missing := [
            call for call in signs if call.lower() not in allowed
        ])
    }
