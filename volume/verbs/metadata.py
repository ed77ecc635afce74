# SPDX-License-Identifier: Apache-2.0
"""Change the metadata of a volume or snapshot, whole or key by key.

What was there is read and what shall be there is written in one
transaction, so that of two callers neither loses the other's key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.orm import Session

from volume import errors
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.verbs import checks
from volume.verbs import rows

Find = Callable[[Session, Caller, str], models.Volume | models.Snapshot]
Guard = Callable[[Mapping[str, str]], None]
UNMADE = frozenset({'creating', 'downloading', 'managing'})


def merge(
    core: Core, caller: Caller, find: Find, row_id: str, items: object
) -> dict[str, str]:
    """Set these keys, keep the others, and return all."""
    new = checks.metadata(items)
    return _change(core, caller, find, row_id, lambda old: {**old, **new})


def replace(
    core: Core,
    caller: Caller,
    find: Find,
    row_id: str,
    items: object,
    guard: Guard | None = None,
) -> dict[str, str]:
    """Set these keys and no others; ``guard`` may refuse what it replaces."""
    new = checks.metadata(items)

    def change(old: dict[str, str]) -> dict[str, str]:
        if guard is not None:
            guard(old)
        return new

    return _change(core, caller, find, row_id, change)


def remove(
    core: Core, caller: Caller, find: Find, row_id: str, key: str
) -> None:
    """Remove a key.

    :raises NotFound: it is not there
    """

    def change(old: dict[str, str]) -> dict[str, str]:
        if key not in old:
            raise errors.NotFound(
                f'{row_id} has no metadata {key!r:.80}'
            )
        return {name: old[name] for name in old if name != key}

    _change(core, caller, find, row_id, change)


def describe_image(
    core: Core,
    caller: Caller,
    volume_id: str,
    items: Mapping[str, str | None],
) -> models.Volume:
    """Say of a volume's image what these items say; ``None`` takes one away.

    They are words about it, for those who boot from it, and no more: what it
    was made from stays as it was recorded.

    :raises Invalid: the volume is being made: its job still needs the record
    """
    given = checks.metadata({
        key: value or '' for key, value in items.items()
    })
    said = {
        key: None if items[key] is None else value
        for key, value in given.items()
    }

    def accept(session: Session) -> models.Volume:
        row = rows.volume(session, caller, volume_id)
        if row.status in UNMADE:
            raise errors.Invalid(
                f'volume {row.id} is {row.status}: its image can be '
                'described once it has been made'
            )
        image = dict(row.image or {})
        image['metadata'] = {**image.get('metadata', {}), **said}
        if len(image['metadata']) > checks.METADATA_ITEMS_MAX:
            raise errors.Invalid(
                f'the image of volume {row.id} would have '
                f'{len(image["metadata"])} items of metadata; '
                f'{checks.METADATA_ITEMS_MAX} are allowed'
            )
        row.image = image
        row.updated_at = core.db.clock()
        return row

    return core.db.write(accept)


def _change(
    core: Core,
    caller: Caller,
    find: Find,
    row_id: str,
    change: Callable[[dict[str, str]], dict[str, str]],
) -> dict[str, str]:
    def accept(session: Session) -> dict[str, str]:
        row: Any = find(session, caller, row_id)
        row.meta = checks.metadata(change(dict(row.meta)))
        row.updated_at = core.db.clock()
        return dict(row.meta)

    return core.db.write(accept)
