# SPDX-License-Identifier: Apache-2.0
"""What lies in the backends' directories, and whose it is.

The headers of layers are read here, by code of our own: what a driver
believes is what is being examined.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator

from crash_rows import Rows

ID = r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}'
# A probe that was cut off is swept when it is a minute old.
OWN = re.compile(r'\.volume-pool|\.lock|\.probe.*')
HEADER = struct.Struct('>4sIQI')


def strangers(directory: str, rows: Rows) -> Iterator[str]:
    """Yield the paths that nothing accounts for."""
    yield from _plain(os.path.join(directory, 'plain'), rows)
    yield from _tree(os.path.join(directory, 'tree'), rows)
    for place, known in (
        ('spool', set()),
        ('locks', {
            f'{noun}-{row_id}' for noun in ('volume', 'snapshot')
            for row_id in rows.live(noun)
        }),
    ):
        path = os.path.join(directory, 'state', place)
        for name in sorted(os.listdir(path)):
            # With a dot begin those of the directory itself.
            if name not in known and not name.startswith('.'):
                yield os.path.join(path, name)


def _plain(directory: str, rows: Rows) -> Iterator[str]:
    known = set()
    for row_id in rows.live('volume'):
        known |= {f'{row_id}.raw', f'{row_id}.json'}
    for row_id, row in rows.live('snapshot').items():
        known.add(f'{row["volume_id"]}@{row_id}.raw')
    for name in sorted(os.listdir(directory)):
        if name not in known and not OWN.fullmatch(name):
            yield os.path.join(directory, name)


def _tree(directory: str, rows: Rows) -> Iterator[str]:
    volumes = set(rows.live('volume'))
    known = {
        'volumes': volumes,
        'mapped': volumes,
        'notes': {f'{each}.json' for each in volumes},
        'snapshots': {
            f'{row["volume_id"]}@{row_id}'
            for row_id, row in rows.live('snapshot').items()
        },
        'layers': set(_needed(directory)),
    }
    # A merge that goes on is a link of a layer to one of its own.
    known['merges'] = known['layers']
    for kind in sorted(os.listdir(directory)):
        path = os.path.join(directory, kind)
        if not os.path.isdir(path):
            if not OWN.fullmatch(kind):
                yield path
            continue
        for name in sorted(os.listdir(path)):
            if name not in known.get(kind, ()):
                yield os.path.join(path, name)


def _needed(directory: str) -> Iterator[str]:
    """Yield each layer that a pointer names, and all below it."""
    seen = set()
    for kind in 'volumes', 'snapshots':
        where = os.path.join(directory, kind)
        for name in os.listdir(where):
            at: str | None = os.path.basename(
                os.readlink(os.path.join(where, name))
            )
            while at and at not in seen:
                seen.add(at)
                yield at
                at = _below(os.path.join(directory, 'layers', at))


def _below(path: str) -> str | None:
    """Return the layer that a qcow2 file stands on."""
    with open(path, 'rb') as f:
        magic, _, offset, length = HEADER.unpack(f.read(HEADER.size))
        if magic != b'QFI\xfb' or not offset:
            return None
        f.seek(offset)
        return os.path.basename(f.read(length).decode())
