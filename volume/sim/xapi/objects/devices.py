# SPDX-License-Identifier: Apache-2.0
"""What a VM's block devices are called: numbers, and names for guests."""

from __future__ import annotations

import re
from collections.abc import Iterable

COUNT = 255  # a VM has no more of them
AUTODETECT = 'autodetect'
# The fourth is a CD drive by custom: who asks for any gets another.
CD = 3

_NAMED = re.compile(r'(?:sd|xvd|hd)([a-p])(\d*)')
_FLOPPY = re.compile(r'fd[ab](\d*)')


def is_valid(device: str, kind: str) -> bool:
    """Say if a userdevice has a form that a server takes."""
    if device == AUTODETECT or _NAMED.fullmatch(device):
        return True
    if _FLOPPY.fullmatch(device):
        return True
    return kind != 'Floppy' and number(device) is not None


def number(device: str) -> int | None:
    """Return the number that a userdevice stands for."""
    named = _NAMED.fullmatch(device)
    if named:
        return ord(named[1]) - ord('a')
    return int(device) if re.fullmatch(r'\d{1,6}', device) else None


def name(device: str) -> str:
    """Return what a guest with Xen's drivers calls a userdevice."""
    at = number(device)
    if at is None:
        return device
    letters = ''
    at += 1
    while at:
        at, rest = divmod(at - 1, 26)
        letters = chr(ord('a') + rest) + letters
    return f'xvd{letters}'


def free(used: Iterable[str]) -> list[str]:
    """Return the numbers that are not taken, in ascending order."""
    taken = {number(device) for device in used}
    return [str(at) for at in range(COUNT) if at not in taken and at != CD]


def is_taken(device: str, used: Iterable[str]) -> bool:
    """Say if a userdevice is one of those in use, by any of its names."""
    return device in used or (
        number(device) is not None
        and number(device) in {number(other) for other in used}
    )
