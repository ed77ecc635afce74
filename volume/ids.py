# SPDX-License-Identifier: Apache-2.0
"""Identifiers: UUIDs, minted by callers, checked before any use in a path."""

from __future__ import annotations

import re
import uuid

from volume import errors

_UUID = re.compile(
    r'[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}'
)


def new() -> str:
    """Return a fresh random id."""
    return str(uuid.uuid4())


def is_id(text: object) -> bool:
    """Say whether this is a UUID in lower case with hyphens."""
    return isinstance(text, str) and _UUID.fullmatch(text) is not None


def check(text: object, what: str = 'id') -> str:
    """Return the id in lower case.

    :raises Invalid: it is not a UUID
    """
    lower = text.lower() if isinstance(text, str) else text
    if not isinstance(lower, str) or _UUID.fullmatch(lower) is None:
        raise errors.Invalid(f'{what} {text!r:.80} is not a UUID')
    return lower
