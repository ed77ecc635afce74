# SPDX-License-Identifier: Apache-2.0
"""What every copy of bytes needs: where, how fast, watched by whom."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from volume import errors
from volume import ids
from volume import model
from volume.blockd import PRIVATE
from volume.drivers import base
from volume.node import File
from volume.node import Node
from volume.transfer import convert
from volume.transfer import copy
from volume.transfer.base import Opened

TOKEN = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}')
Stored = model.Volume | model.Snapshot


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """How a copy is made: where, under which name, how fast, watched.

    ``token`` names drafts, so that a job's next try takes over its own.
    ``watch`` is called with bytes done and in all; what it raises (say,
    ``Cancelled``) ends the copy.
    """

    node: Node
    token: str
    spool_directory: str
    watch: copy.Watch | None = None
    rate_bytes_per_s: int | None = None

    def part(self, before: int, total: int) -> Way:
        """Return the way of one part, told as part of the whole."""
        watch = self.watch
        if watch is None:
            return self

        def told(done: int, _: int) -> None:
            watch(before + done, total)

        return dataclasses.replace(self, watch=told)

    @property
    def spool(self) -> str:
        if TOKEN.fullmatch(self.token) is None:
            raise errors.Invalid(f'{self.token!r:.90} is not a token')
        return os.path.join(self.spool_directory, f'{self.token}.spool')


def opener(driver: base.Driver, here: Node) -> Node | None:
    """Return the machine whose QEMU can open what the driver stores.

    ``None`` if none can. What one machine has, qemu-img copies there; what
    another has is read and written.
    """
    if not isinstance(driver, base.BlockNode):
        return None
    node = getattr(driver, 'node', here)
    return node if node.is_remote else here


@contextlib.contextmanager
def readable_node(
    driver: base.Driver, source: Stored, node: Node
) -> Iterator[Mapping[str, Any]]:
    """Return how qemu-img opens a volume, also one that is attached."""
    assert isinstance(driver, base.BlockNode)
    blocknode = driver.blocknode(source)
    blockd = node.blockd
    path = _top_file(blocknode)
    if blockd is None or path is None or not blockd.is_open(path):
        yield _read_only(blocknode)
        return
    # The daemon has the lock, and knows what is not in the file yet.
    with blockd.private(f'{PRIVATE}{ids.new()}', blocknode, False) as uri:
        yield convert.nbd_node(uri)


@contextlib.contextmanager
def scratch(way: Way, suffix: str) -> Iterator[File]:
    """Have a file in the spool directory for a while."""
    path = way.spool.removesuffix('.spool') + suffix + '.spool'
    way.node.make_directory(way.spool_directory)
    try:
        with way.node.open(path, 'w+b') as file:
            yield file
    finally:
        way.node.unlink(path)


def fd_path(file: Opened) -> str:
    """Return a path to what is open, whatever its name means now."""
    return f'/proc/{os.getpid()}/fd/{file.fileno()}'


def _read_only(blocknode: Mapping[str, Any]) -> dict[str, Any]:
    """Return how it is opened by many readers at once.

    Opened for writing it would have QEMU's lock, and refuse the others.
    """
    below = blocknode.get('file')
    file = {'file': _read_only(below)} if isinstance(below, Mapping) else {}
    return {**blocknode, **file, 'read-only': True}


def _top_file(blocknode: Mapping[str, Any]) -> str | None:
    """Return the file of the uppermost layer, if it is one."""
    at: Any = blocknode
    while isinstance(at, Mapping):
        if 'filename' in at:
            return str(at['filename'])
        at = at.get('file')
    return None
