# SPDX-License-Identifier: Apache-2.0
"""What a logical volume is called, and by what we know it as ours.

Its name says what it is, and its tag whose: a logical volume is ours if it
has both, with one id. So the step from one state to the next is one rename,
which happens or does not; and what only happens to have such a name (a
volume of another service in the same group) is nobody's that we touch.

==================  ================================  =======================
``volume-<id>``     ``volume:<id>``                   a volume
``snap-<id>``       ``snapshot:<id>``, ``of:<id>``    a snapshot, and whose
``draft-<id>``      that of what it will be           not yet a volume, or
                                                      not yet a snapshot
``tail-<id>``       ``volume:<id>``                   by what it will grow
``reverted-<id>``   ``volume:<id>``                   what it will be
``deleted-<id>``    that of what it was,              to be wiped and removed
                    ``wiped:<bytes>``                 zero up to there
anything else                                         foreign
==================  ================================  =======================

A note stands in further tags, ``note:<n>:<part>``: JSON, compressed, in the
few characters that a tag may have.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterable, Mapping

_ID = r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}'
OURS = re.compile(rf'(volume|snap|draft|tail|reverted|deleted)-({_ID})')
PLAIN = re.compile(r'[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}')
NOTE = re.compile(r'note:([0-9]+):([A-Za-z0-9+/=]+)')
WIPED = re.compile(r'wiped:([0-9]{1,20})')
NOTE_PART = 900  # LVM takes tags of 1024 characters
NOTE_BYTES_MAX = 1 << 16
DISOWNED = 'disowned'

TAGS: Mapping[str, tuple[str, ...]] = {
    'volume': ('volume',), 'draft': ('volume', 'snapshot'),
    'tail': ('volume',), 'reverted': ('volume',), 'snap': ('snapshot',),
    'deleted': ('volume', 'snapshot'),
}


def role_of(name: str, tags: Iterable[str]) -> tuple[str, str]:
    """Return what it is and its id; two empty texts if it is foreign."""
    found = OURS.fullmatch(name)
    if found and any(
        f'{kind}:{found[2]}' in tags for kind in TAGS[found[1]]
    ):
        return found[1], found[2]
    return '', ''


def device(group: str, name: str) -> str:
    """Return the path of a logical volume: dashes are doubled in it."""
    parts = (part.replace('-', '--') for part in (group, name))
    return '/dev/mapper/' + '-'.join(parts)


def is_plain(name: str) -> bool:
    """Say whether LVM could have a logical volume of this name."""
    return PLAIN.fullmatch(name) is not None and name not in ('.', '..')


def wiped_tag(size_bytes: int) -> str:
    """Return the tag of what is zero from its beginning up to there."""
    return f'wiped:{size_bytes}'


def note_tags(note: Mapping[str, str]) -> list[str]:
    """Return the tags that hold a note; none for an empty one."""
    if not note:
        return []
    text = json.dumps(dict(note), sort_keys=True, separators=(',', ':'))
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return [
        f'note:{at // NOTE_PART}:{packed[at:at + NOTE_PART]}'
        for at in range(0, len(packed), NOTE_PART)
    ]


def note_of(tags: Iterable[str]) -> dict[str, str]:
    """Return the note; a broken one is none, for it is only a note."""
    parts = {
        int(found[1]): found[2]
        for found in map(NOTE.fullmatch, tags) if found
    }
    packed = ''.join(parts[number] for number in sorted(parts))
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(
            base64.b64decode(packed, validate=True), NOTE_BYTES_MAX
        )
        note = json.loads(text)
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        return {}
    if not isinstance(note, dict):
        return {}
    return {str(name): str(value) for name, value in note.items()}
