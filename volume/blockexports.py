# SPDX-License-Identifier: Apache-2.0
"""What an export of the storage daemon is called, and what its id tells.

QEMU's id of an export must begin with a letter: it tells the access, and, by
a capital, that nothing lies below the image. So a restarted service, or one
that has thousands of exports, need not ask for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume import qmp
from volume.blockgraph import Layer

EXPORT_ID = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}')


def check(export_id: str) -> None:
    """:raises Invalid: it can be no export's id"""
    if not EXPORT_ID.fullmatch(export_id):
        raise errors.Invalid(f'{export_id!r:.120} is no export id')


def add(
    export_id: str, layer: Layer, writable: bool
) -> qmp.Command:
    """Return the command that exports a layer under its own name."""
    letter = 'w' if writable else 'r'
    if layer.backing is None:
        letter = letter.upper()
    return 'block-export-add', {
        'type': 'nbd', 'name': export_id, 'id': f'{letter}.{export_id}',
        'writable': writable, 'node-name': layer.name,
    }


def id_of(export: Mapping[str, Any]) -> str:
    """Return what we call an export."""
    return str(export['id'])[2:]


def is_writable(export: Mapping[str, Any]) -> bool:
    """Say whether hosts may write through it."""
    return str(export['id'])[0] in 'wW'


def is_alone(export: Mapping[str, Any]) -> bool:
    """Say whether its image was opened with nothing below it."""
    return str(export['id'])[0].isupper()


def find(
    monitor: qmp.Monitor, export_id: str
) -> Mapping[str, Any] | None:
    """Return an export as the daemon tells of it; None if it is gone."""
    for export in monitor.ask('query-block-exports'):
        if id_of(export) == export_id:
            found: Mapping[str, Any] = export
            return found
    return None
