# SPDX-License-Identifier: Apache-2.0
"""Names to ids. A name need not be unique: then nothing is guessed."""

from __future__ import annotations

from volume import errors
from volume import ids
from volume.cli.client import Client
from volume.cli.values import Usage

SHOWN = 10


def volume(client: Client, text: str) -> str:
    """Return the id of the volume of this id or name.

    :raises NotFound: no volume has the name
    :raises Conflict: several have it
    """
    return _find(client, 'volume', text)


def snapshot(client: Client, text: str, volume_id: str | None = None) -> str:
    """Return the id of the snapshot of this id or name.

    :raises NotFound: no snapshot has the name
    :raises Conflict: several have it
    """
    try:
        return _find(client, 'snapshot', text, volume_id=volume_id)
    except errors.NotFound:
        if volume_id is None:
            raise
        others = list(client.pages('/snapshots/detail', 'snapshots', 1,
                                   name=text))
        if not others:
            raise
        raise errors.NotFound(
            f'snapshot {text!r:.255} is of volume {others[0]["volume_id"]}, '
            f'and volume {volume_id} has none of that name'
        ) from None


def _find(
    client: Client, noun: str, text: str, volume_id: str | None = None
) -> str:
    if not text:
        raise Usage(f'the name of the {noun} is empty')
    if ids.is_id(text.lower()):
        return text.lower()
    found = list(client.pages(
        f'/{noun}s', f'{noun}s', SHOWN + 1, name=text, volume_id=volume_id
    ))
    if not found:
        raise errors.NotFound(
            f'there is no {noun} {text!r:.255}; see "volume '
            f'{"snapshot list" if noun == "snapshot" else "list"}"'
        )
    if len(found) > 1:
        shown = ', '.join(str(each['id']) for each in found[:SHOWN])
        number = len(found) if len(found) <= SHOWN else f'over {SHOWN}'
        raise errors.Conflict(
            f'{number} {noun}s are called {text!r:.255}; say which by its '
            f'id: {shown}'
        )
    return str(found[0]['id'])
