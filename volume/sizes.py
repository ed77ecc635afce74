# SPDX-License-Identifier: Apache-2.0
"""Sizes as a person reads them; counted by 1024. Pure."""

from __future__ import annotations

UNITS = {letter: 1024 ** n for n, letter in enumerate('BKMGTP')}


def human(size_bytes: int | None) -> str:
    """Return a size for people; only whole ones look whole."""
    if size_bytes is None:
        return ''
    letter = 'B'
    for each, unit in UNITS.items():
        if size_bytes >= unit:
            letter = each
    if letter == 'B':
        return f'{size_bytes} B'
    number = size_bytes / UNITS[letter]
    whole = size_bytes % UNITS[letter] == 0
    return f'{number:.0f} {letter}iB' if whole else f'{number:.1f} {letter}iB'


def exact(size_bytes: int) -> str:
    """Return the same, with the bytes where they do not follow from it."""
    text = human(size_bytes)
    unit = max(each for each in UNITS.values() if each <= max(size_bytes, 1))
    return text if size_bytes % unit == 0 else f'{text} ({size_bytes} bytes)'
