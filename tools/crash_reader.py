# SPDX-License-Identifier: Apache-2.0
"""Every byte of what is stored, through the drivers, in this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from crash_check import Fill
from crash_rows import Row
from crash_rows import Rows
from demo_screen import Failed

from volume import backends
from volume import conf as options
from volume import model
from volume.blockd import Blockd
from volume.drivers.base import Reader
from volume.node import Node


class Storage:
    """The service's backends, opened by another process than the service."""

    def __init__(self, conf_path: str) -> None:
        conf = options.load([], [conf_path])
        state = os.path.abspath(conf.state_path)
        node = Node(state)
        node.blockd = Blockd(node, os.path.join(state, 'blockd'))
        self._backends = backends.load(conf, node)

    @contextlib.contextmanager
    def open(self, rows: Rows, row: Row) -> Iterator[Fill]:
        """Have a volume's or snapshot's bytes to be read."""
        backend = self._backends[row['backend']]
        if not backend.is_up:
            backend.check()
        volume_row = rows.volumes[row.get('volume_id') or row['id']]
        thing: model.Volume | model.Snapshot = _volume(volume_row)
        if 'volume_id' in row:
            thing = model.Snapshot(
                row['id'], _volume(volume_row), row['size_bytes'],
                row['handle'],
            )
        with backend.need().reader(thing) as reader:
            yield lambda buffer, offset: _fill(reader, buffer, offset)


def _fill(reader: Reader, buffer: bytearray, offset_bytes: int) -> None:
    reader.seek(offset_bytes)
    view, done = memoryview(buffer), 0
    while done < len(view):
        count = reader.readinto(view[done:])
        if not count:
            raise Failed(f'it ends at {offset_bytes + done}')
        done += count


def _volume(row: Row) -> model.Volume:
    return model.Volume(
        row['id'], row['pool'], row['size_bytes'], row['handle']
    )
