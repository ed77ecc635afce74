# SPDX-License-Identifier: Apache-2.0
"""Names of targets: they hold the ids of the volume and the attachment.

So what is exported is read from the names of the targets that there are; a
target with any other name is somebody else's.
"""

from __future__ import annotations

import re

from volume import ids

NAME_BYTES_MAX = 223  # of iSCSI and of NVMe
_ID = '[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}'
_TARGET = re.compile(rf'volume-({_ID})\.({_ID})')
PREFIX_BYTES_MAX = NAME_BYTES_MAX - len('volume-.') - 2 * 36


def target(prefix: str, volume_id: str, attachment_id: str) -> str:
    """Return the name of the target of an attachment."""
    volume = ids.check(volume_id, 'volume')
    return f'{prefix}volume-{volume}.{ids.check(attachment_id, "attachment")}'


def parts(prefix: str, name: str) -> tuple[str, str] | None:
    """Return volume and attachment of a target; ``None`` if it is foreign."""
    if not name.startswith(prefix):
        return None
    match = _TARGET.fullmatch(name, len(prefix))
    return (match[1], match[2]) if match else None
