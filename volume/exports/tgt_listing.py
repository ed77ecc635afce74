# SPDX-License-Identifier: Apache-2.0
"""What tgtd says of its targets, as ``tgtadm --op show`` prints it.

A host that is let in chooses a text of the listing, its alias, and may put
lines into it. So what bears one of our names counts only under a number that
follows from the attachment in it (``numbers``): a host can lie about itself
alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator

TARGET = re.compile(r'^Target (\d+): (\S+)$', re.MULTILINE)
SECTION = re.compile(r' {4}(\S.*) information:')
ENTRY = re.compile(r' {8}(\S.*)')
FIELD = re.compile(r' {12}([^:]+): (.*)')
OFFLINE = '        State: offline'
NUMBERS = 8
NUMBER_BITS = 27


@dataclasses.dataclass(slots=True)
class Target:
    """One target; what stands of its LUN is that of number 1."""

    tid: int
    name: str
    is_ready: bool = True
    """Whether it takes logins and commands at all."""
    has_lun: bool = False
    lun: dict[str, str] = dataclasses.field(default_factory=dict)
    accounts: list[str] = dataclasses.field(default_factory=list)
    bound: list[str] = dataclasses.field(default_factory=list)
    """Initiators and addresses that are let in; without one, nobody is."""

    @property
    def path(self) -> str:
        return self.lun.get('Backing store path', '')

    @property
    def is_read_only(self) -> bool:
        return self.lun.get('Readonly') == 'Yes'


def numbers(attachment_id: str) -> Iterator[int]:
    """Yield the numbers that a target may have, in the order to try.

    They are the attachment's own, so that no number is soon that of another:
    a login that had begun at the former one would go on at the new one.
    They are above those that people choose; and below 2**28, since the
    daemon makes a world wide name of the number, whose first digit must
    stay free.
    """
    digest = hashlib.sha256(attachment_id.encode()).digest()
    for index in range(NUMBERS):
        part = int.from_bytes(digest[index * 4:index * 4 + 4], 'big')
        yield (1 << NUMBER_BITS) | (part % (1 << NUMBER_BITS))


def parse(listing: str, containing: str = '') -> Iterator[Target]:
    """Yield the targets of a listing; those whose part contains a text."""
    starts = [match.start() for match in TARGET.finditer(listing)]
    for start, end in itertools.pairwise([*starts, len(listing)]):
        part = listing[start:end]
        if containing in part:
            yield _target(part.split('\n'))


def _target(lines: list[str]) -> Target:
    head = TARGET.fullmatch(lines[0])
    assert head is not None  # found by it
    target, section, lun = Target(int(head[1]), head[2]), '', ''
    sections = 0
    for line in lines[1:]:
        if match := SECTION.fullmatch(line):
            section = match[1]
            sections += 1
        elif sections == 1 and line == OFFLINE:
            target.is_ready = False  # before anything that a host says
        elif section == 'LUN':
            lun = _lun(target, line, lun)
        elif match := ENTRY.fullmatch(line):
            if section == 'Account':
                target.accounts.append(match[1].removesuffix(' (outgoing)'))
            elif section == 'ACL':
                target.bound.append(match[1])
    return target


def _lun(target: Target, line: str, lun: str) -> str:
    """Take in a line of a LUN; return whose the next one is."""
    if line.startswith('        LUN: '):
        lun = line.removeprefix('        LUN: ')
        target.has_lun |= lun == '1'
    elif lun == '1' and (match := FIELD.fullmatch(line)):
        target.lun[match[1]] = match[2]
    return lun
