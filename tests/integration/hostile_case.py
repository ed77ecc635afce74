# SPDX-License-Identifier: Apache-2.0
"""What is kept of a service, and what hostile requests are made of."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from typing import Any

from sqlalchemy import func
from sqlalchemy import select

from tests.integration import serving
from volume.core import Core
from volume.db import models

# Rows of these are what a caller can make; the rest reports itself.
KEPT = (models.Volume, models.Snapshot, models.Attachment, models.Job)

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 512, 1 << 20, 1 << 40, 1.5, 1e308, -0.0,
    2**31, 2**53, 2**62, 2**63 - 1, 2**63, -2**63, 2**70, '', ' ', 'x', '0',
    '-1', '1', '1e3', '2Gb', '²', 'a' * 255, 'a' * 256, 'a' * 10000, 'é',
    '\U0001f4be', '\n', 'a\r\nb', '\x00', '\x1b[2J', '\x85', '\x9b2J', '%00',
    '%s%n', '{0}', '"', "'", '`id`', '$(id)', "'; DROP TABLE volumes; --",
    '../../etc/passwd', '/dev/null', 'file:///etc/shadow', 'file:///',
    'http://127.0.0.1:1/x', 'http://[::1', 'gopher://x/', 'json:{}',
    'nbd://127.0.0.1/', '\u202e', '\ufeff', 'NaN', 'null', [], [[]], [None],
    ['x'] * 200, {}, {'': ''}, {'a': None}, {'a': {'a': {'a': 1}}},
    {'host': 'h'}, {'host': []}, {'k' * 300: 'v'}, {'k\n': 'v'},
    {f'k{number}': 'v' for number in range(200)},
    '00000000-0000-0000-0000-000000000000',
    '00000000-0000-4000-8000-00000000000G',
)


def kept(core: Core) -> dict[str, Any]:
    """Return all that callers have made, and what was promised for it."""

    def look(session: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            table.__tablename__: session.execute(
                select(table.__table__).order_by(table.id)
            ).all()
            for table in KEPT
        }
        for table in models.Pool, models.Device:
            found[table.__tablename__] = session.scalar(
                select(func.sum(table.claimed_bytes))
            )
        return found

    return core.db.read(look)


def files(*directories: str) -> dict[str, int]:
    """Return the names and sizes of all files below some directories."""
    found = {}
    for directory in directories:
        for root, _, names in os.walk(directory):
            for name in names:
                path = os.path.join(root, name)
                found[path] = os.lstat(path).st_size
    return found


def quiet(core: Core) -> None:
    """Wait until no job is open."""
    serving.until(
        lambda: core.db.read(lambda s: s.scalar(
            select(func.count()).where(models.Job.state == 'open')
        )),
        lambda count: count == 0,
    )


def resident_bytes() -> int:
    """Return how much memory this process has."""
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGESIZE')


def spoil(chance: random.Random, good: Any) -> Any:
    """Return a value that was good, with something wrong in it."""
    spoilt = copy.deepcopy(good)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(spoilt))
        bad = copy.deepcopy(chance.choice(VALUES))
        if not places:
            return bad
        inside, key = chance.choice(places)
        way = chance.randrange(5)
        if way == 0 and isinstance(inside, dict):
            del inside[key]
        elif way == 1 and isinstance(inside, dict):
            inside[chance.choice(
                ('x', 'id', 'size', 'status', '', 'a' * 300, '\x00', key)
            )] = bad
        elif way == 2:
            inside[key] = [inside[key]]
        else:
            inside[key] = bad
    return spoilt


def garble(chance: random.Random, good: Any) -> bytes:
    """Return the bytes of a body that is no body any more."""
    raw = bytearray(json.dumps(good).encode())
    way = chance.randrange(5)
    if way == 0:
        return chance.randbytes(chance.randrange(200))
    if way == 1:
        return bytes(raw[:chance.randrange(len(raw) + 1)])
    if way == 2:
        depth = chance.choice((10, 13, 1000, 50000))
        return b'[' * depth + b']' * depth
    if way == 3:
        return bytes(raw) * chance.randrange(2, 5)
    for _ in range(chance.randrange(1, 6)):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return bytes(raw)


def seed(name: str) -> int:
    """Return the seed of a run, and say it: one may be given again."""
    chosen = int(os.environ.get('VOLUME_SEED') or 0) or (
        time.time_ns() % 1_000_000 if os.environ.get('VOLUME_PROOF')
        else 20250607
    )
    print(f'{name}: VOLUME_SEED={chosen}', flush=True)
    return chosen


def _places(value: Any) -> Any:
    """Yield each container in a value with each of its keys."""
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, (dict, list)):
            for key in each if isinstance(each, dict) else range(len(each)):
                yield each, key
                todo.append(each[key])
