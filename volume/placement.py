# SPDX-License-Identifier: Apache-2.0
"""Choose a pool: filters by table, then cost, then free space. Pure.

What is chosen here is only proposed; the claim in the accepting transaction
decides, and if it fails, ``choose`` is asked again without that pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from volume import errors


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A pool as the database knows it, with its backend's settings."""

    backend: str
    name: str
    is_up: bool = True
    is_heard: bool = True
    enabled: bool = True
    tags: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    projects: frozenset[str] = frozenset()
    cluster: str = ''
    role: str = ''
    cost: int = 0
    unclaimed_bytes: int = 0
    free_bytes: int = 0
    max_volume_bytes: int = 1 << 62
    granularity_bytes: int = 512
    thin: bool = True
    device: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """What a new volume needs of its pool; empty means no matter."""

    size_bytes: int
    tags: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    project_id: str = ''
    cluster: str = ''
    role: str = ''
    backend: str = ''
    pool: str = ''


# Each filter is a question about one pool, and what a person is told of the
# pools whose answer is no.
FILTERS = (
    ('down or disabled', lambda pool, wish: pool.is_up and pool.enabled),
    ('not heard of lately', lambda pool, wish: pool.is_heard),
    ('of another backend', lambda pool, wish:
        wish.backend in ('', pool.backend)),
    ('of another name', lambda pool, wish: wish.pool in ('', pool.name)),
    ('for other projects', lambda pool, wish:
        not pool.projects or wish.project_id in pool.projects),
    ('without the tags', lambda pool, wish: wish.tags <= pool.tags),
    ('without the features', lambda pool, wish:
        wish.features <= pool.features),
    ('of another role', lambda pool, wish: wish.role in ('', pool.role)),
    ('of another cluster', lambda pool, wish:
        pool.cluster in ('', wish.cluster)),
    ('for smaller volumes only', lambda pool, wish:
        claim_bytes(pool, wish) <= pool.max_volume_bytes),
    ('without room for it', lambda pool, wish:
        claim_bytes(pool, wish) <= pool.unclaimed_bytes),
)


def claim_bytes(pool: Candidate, wish: Wish) -> int:
    """Return what the volume will have: what is wished, in whole granules.

    The pool makes no other, and a host that attaches it sees all of it; so
    this is the size of the volume from then on, also for those who copy it.
    """
    granule = pool.granularity_bytes
    return -(-wish.size_bytes // granule) * granule


def choose(pools: Iterable[Candidate], wish: Wish) -> Candidate:
    """Return the cheapest pool that fits, then the emptiest.

    :raises NoSpace: none fits; the message counts what each filter took out
    """
    left = list(pools)
    if not left:
        raise errors.NoSpace(
            'no pool fits: there is none; see "volume backends"'
        )
    trace = []
    for words, fits in FILTERS:
        kept = [pool for pool in left if fits(pool, wish)]
        if len(kept) < len(left):
            trace.append(f'{len(left) - len(kept)} {words}')
        left = kept
    if not left:
        raise errors.NoSpace(
            f'no pool fits: {", ".join(trace)}; see "volume pools"'
        )
    return min(left, key=lambda p: (p.cost, -p.unclaimed_bytes, p.name))
