# SPDX-License-Identifier: Apache-2.0
"""What people type, made exact: sizes, times, pairs, names.

A size has a unit, because a bare number is bytes to one tool and GiB to the
next; and a unit that means two things is refused.
"""

from __future__ import annotations

import argparse
import decimal
import re

from volume import errors
from volume import ids
from volume import model
from volume.sizes import UNITS

SECONDS = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}

_SIZE = re.compile(r'([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)')
_TIME = re.compile(r'([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd]?)')


class Usage(errors.Invalid):
    """The command line, or a file that it names, is wrong."""


def size(text: str) -> int:
    """Return bytes from a text like 10G, 512M or 1.5T."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise _wrong(f'size {text!r} is not like 10G, 512M or 1.5T')
    number, unit = decimal.Decimal(found[1]), found[2].upper()
    if not number:
        raise _wrong(f'size {text!r} must be greater than 0')
    if not unit:
        raise _wrong(
            f'size {text!r} has no unit; write {text}G for GiB, or {text}M '
            'for MiB'
        )
    letter = unit.removesuffix('IB') if unit != 'B' else 'B'
    if letter not in UNITS:
        if unit[0] in UNITS and unit[1:] == 'B':
            raise _wrong(
                f'size {text!r} is 1000 or 1024 to the power of some; write '
                f'{found[1]}{unit[0]}, which counts by 1024'
            )
        raise _wrong(
            f'size {text!r} has an unknown unit; K, M, G, T and P are known'
        )
    size_bytes = number * UNITS[letter]
    if size_bytes >= 1 << 62:
        raise _wrong(f'size {text!r} is over every limit')
    if size_bytes % model.SECTOR_BYTES:
        raise _wrong(
            f'size {text!r} is not a whole number of {model.SECTOR_BYTES} '
            'bytes; write it in a smaller unit'
        )
    return int(size_bytes)


def name(text: str) -> str:
    """Return a name that a thing is to have."""
    if not text.strip():
        raise _wrong('the name is empty')
    return text


def pair(text: str) -> tuple[str, str]:
    """Return a key and its value from a text like owner=backup."""
    key, found, value = text.partition('=')
    if not found or not key:
        raise _wrong(f'{text!r} is not like key=value')
    return key, value


def duration(text: str) -> float:
    """Return seconds from a text like 30, 90s, 10m or 2h."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise _wrong(f'time {text!r} is not like 30s, 10m or 2h')
    return float(found[1]) * SECONDS[found[2] or 's']


def count(text: str) -> int:
    """Return a whole number greater than 0."""
    if not text.isascii() or not text.isdigit() or not 0 < len(text) < 10 or (
        int(text) < 1
    ):
        raise _wrong(f'{text!r} is not a whole number greater than 0')
    return int(text)


def id(text: str) -> str:
    """Return an id that the caller has minted."""
    if not ids.is_id(text.lower()):
        raise _wrong(f'{text!r} is not a UUID')
    return text.lower()


def checksum(text: str) -> str:
    """Return a checksum like sha256:9f86…."""
    kind, _, digits = text.partition(':')
    if kind != 'sha256' or not re.fullmatch('[0-9a-fA-F]{64}', digits):
        raise _wrong(
            f'checksum {text!r} is not sha256: and 64 hexadecimal digits'
        )
    return f'{kind}:{digits.lower()}'


def yes(text: str) -> bool:
    """Return whether the answer is yes."""
    if text not in ('yes', 'no'):
        raise _wrong(f'{text!r} is neither yes nor no')
    return text == 'yes'


def _wrong(message: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(message)
