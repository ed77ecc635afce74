# SPDX-License-Identifier: Apache-2.0
"""Names of targets that are of this service's form."""

from __future__ import annotations

import re

from volume import ids

_TARGET = re.compile(r'(?:iqn|nqn)\..*volume-([0-9a-f-]{36})\.([0-9a-f-]{36})')


def parts(target: str) -> tuple[str, str] | None:
    """Return volume and attachment of a target; None of another form."""
    match = _TARGET.fullmatch(target)
    if match is None or not all(ids.is_id(part) for part in match.groups()):
        return None
    return match[1], match[2]
