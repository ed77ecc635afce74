# SPDX-License-Identifier: Apache-2.0
"""What a new volume is to be, where it goes, and what it is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from volume import errors
from volume import placement
from volume import sizes
from volume.context import Caller
from volume.core import Core
from volume.db import claims
from volume.db import models
from volume.verbs import checks
from volume.verbs import rows

Source = models.Volume | models.Snapshot


@dataclasses.dataclass(frozen=True, slots=True)
class NewVolume:
    """What a caller wants; ``id`` is minted by the caller, or by us.

    ``image`` is ``{'url', 'format'?, 'checksum'?: 'sha256:…'}``.
    ``size_bytes`` may be ``None`` with a source volume or snapshot: then it
    is the source's.
    """

    size_bytes: int | None = None
    id: str | None = None
    name: str | None = None
    description: str | None = None
    metadata: Mapping[str, Any] | None = None
    snapshot_id: str | None = None
    source_volume_id: str | None = None
    image: Mapping[str, Any] | None = None
    volume_type: str | None = None
    availability_zone: str | None = None
    multiattach: bool = False
    tags: frozenset[str] = frozenset()
    backend: str = ''
    pool: str = ''
    cluster: str = ''
    role: str = ''


def size(core: Core, new: NewVolume, source: Source | None) -> int:
    """Return the new volume's size: what was asked for, or the source's.

    :raises Invalid: it is none, or smaller than the source
    """
    size_bytes = new.size_bytes or (source.size_bytes if source else 0)
    size_bytes = checks.size(size_bytes, core.settings.size_bytes_max)
    if source and size_bytes < source.size_bytes:
        raise errors.Invalid(
            f'size {sizes.exact(size_bytes)} is smaller than the source: '
            f'{type(source).__name__.lower()} {source.id} has '
            f'{sizes.exact(source.size_bytes)}'
        )
    return size_bytes


def source(
    session: Session, caller: Caller, new: NewVolume
) -> Source | None:
    """Return the row that the volume is made from, if any.

    :raises NotFound: there is none that the caller may see
    """
    if new.snapshot_id:
        return rows.snapshot(session, caller, new.snapshot_id)
    if new.source_volume_id:
        return rows.volume(session, caller, new.source_volume_id)
    return None


def wish(
    caller: Caller,
    new: NewVolume,
    source: models.Volume | models.Snapshot | None,
    size_bytes: int,
) -> placement.Wish:
    backend, pool = new.backend or new.volume_type or '', new.pool
    if source and not backend and not new.tags:
        backend, pool = source.backend, source.pool
    return placement.Wish(
        size_bytes=size_bytes,
        tags=new.tags,
        project_id=caller.project_id,
        cluster=new.cluster,
        role=new.role,
        backend=backend,
        pool=pool,
    )


def claim(
    session: Session, core: Core, wish: placement.Wish
) -> placement.Candidate:
    """Choose and claim; a pool whose claim fails is chosen no more."""
    pools = claims.candidates(session, core.heard_after())
    while True:
        try:
            chosen = placement.choose(pools, wish)
        except errors.NoSpace:
            _need_backend(session, wish)
            raise
        if claims.claim(session, chosen, placement.claim_bytes(chosen, wish)):
            return chosen
        full = dataclasses.replace(chosen, unclaimed_bytes=-1)
        pools = [full if each is chosen else each for each in pools]


def _need_backend(session: Session, wish: placement.Wish) -> None:
    """Say so if none of the pools fits because of a name that none has."""
    if wish.backend and session.get(models.Backend, wish.backend) is None:
        raise errors.NoSpace(
            f'no pool fits: there is no backend {wish.backend!r:.80}; see '
            '"volume backends"'
        )


def is_native(
    chosen: placement.Candidate,
    source: models.Volume | models.Snapshot | None,
) -> bool:
    """Say whether the pool makes the clone itself, and nothing is copied.

    It is decided once: what the pool can do may read otherwise tomorrow.
    """
    return (
        source is not None
        and (chosen.backend, chosen.name) == (source.backend, source.pool)
        and 'Clone' in chosen.features
    )
