# SPDX-License-Identifier: Apache-2.0
"""What the commands of LVM say when they fail, and what it means.

First match wins. The words were taken from LVM 2.03. What stands nowhere
here may have happened or not: ``Unknown``. No failure means that something
is not there; only a report can say so.
"""

from __future__ import annotations

import re

from volume import errors
from volume.node import CommandFailed

GROUP_GONE = re.compile(r'[Vv]olume group "?[^" ]+"? not found')
MISSING = re.compile(
    r'while PVs are missing|is missing PV|Couldn.t find device|'
    r'Cannot (?:change|process) .* PVs are missing|of partial LV'
)

TABLE: tuple[tuple[re.Pattern[str], type[errors.VolumeError]], ...] = (
    (MISSING, errors.Unavailable),
    (GROUP_GONE, errors.Unavailable),
    (re.compile(r'duplicate PV devices|Multiple VGs found'),
     errors.Unavailable),
    (re.compile(r'with system ID|is exported|Failed to find sysid'),
     errors.Invalid),
    (re.compile(r'lvmlockd|lock type|Cannot access .*shared'),
     errors.Unsupported),
    (re.compile(r'already exists in volume group|already used by'),
     errors.Conflict),
    (re.compile(r'metadata too large|too large for circular buffer'),
     errors.NoSpace),
    (re.compile(r'[Ii]nsufficient (?:free|suitable)|[Nn]ot enough|'
                r'out of data space|thin pool \S+ reached threshold|'
                r'Maximum number of'), errors.NoSpace),
    (re.compile(r'needs[_ ]check|manual repair|transaction_id|'
                r'Check of (?:thin )?pool .* failed|Transaction id'),
     errors.Corrupt),
    (re.compile(r' in use\b|has open \d+ snapshot|used by another device|'
                r'only while inactive|[Dd]evice or resource busy|'
                r'is mounted'), errors.Busy),
    # By a pvmove, until that has ended.
    (re.compile(r'locked (?:logical volume|LV|volumes|devices|'
                r'(?:pool|origin) volume)\b'), errors.Busy),
    # It was there when we looked: somebody else is at it.
    (re.compile(r'Failed to find logical volume|not found in [Vv]olume '
                r'group'), errors.Unavailable),
    (re.compile(r'[Cc]an.t get lock|waiting for lock|File-based locking '
                r'initiali[sz]ation failed'), errors.Unavailable),
    # The kernel refused a part of it.
    (re.compile(r'device-mapper: .* ioctl '), errors.Unknown),
    (re.compile(r'too large|[Uu]pper limit|is unsupported|Invalid argument'),
     errors.Invalid),
    (re.compile(r'device-mapper driver|/dev/mapper/control|'
                r'must be root|[Pp]ermission denied|Running as a non-root'),
     errors.Unavailable),
)

NOISE = re.compile(r'\s*(?:WARNING:|File descriptor \d+ )')


def mean(failed: CommandFailed, doing: str) -> errors.VolumeError:
    """Return a command's failure as one of our errors."""
    lines = [
        line.strip() for line in failed.stderr.splitlines()
        if line.strip() and not NOISE.match(line)
    ]
    for words, kind in TABLE:
        if words.search('\n'.join(lines)):
            # The first line: the others follow from it.
            return kind(f'cannot {doing}: {lines[0]:.300}')
    return errors.Unknown(f'cannot {doing}: {failed}')
