# SPDX-License-Identifier: Apache-2.0
"""What an empty qcow2 image of a size looks like, as qemu-img made it.

An empty image is a function of its size and options alone: there is neither
a time nor an identity in it. To start qemu-img costs several milliseconds of
processor time, so the first image of a size is qemu-img's, and the next ones
are the same bytes. Nothing of the format is known here.
"""

from __future__ import annotations

import collections
import dataclasses
import threading

from volume.node import Node

BLOCK_BYTES = 4096
# An image of 1 TiB has 264 KiB; what is larger is left to qemu-img.
LENGTH_MAX = 1 << 20
SIZES_MAX = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Blank:
    """A file's length, and its blocks that are not zeros."""

    length_bytes: int
    blocks: tuple[tuple[int, bytes], ...]


class Blanks:
    """The empty images that one pool has seen, the latest sizes first."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._guard = threading.Lock()
        self._known: collections.OrderedDict[int, Blank] = (
            collections.OrderedDict()
        )

    def write(self, path: str, size_bytes: int) -> bool:
        """Make a new file the empty image of a size, durably, if known."""
        with self._guard:
            blank = self._known.get(size_bytes)
            if blank is None:
                return False
            self._known.move_to_end(size_bytes)
        with self._node.open(path, 'rb+') as f:
            f.truncate(blank.length_bytes)
            for offset, data in blank.blocks:
                f.seek(offset)
                f.write(data)
            f.sync()
        return True

    def learn(self, path: str, size_bytes: int) -> None:
        """Remember the empty image that qemu-img has just made."""
        if self._node.size(path) > LENGTH_MAX:
            return
        data = self._node.read(path, LENGTH_MAX)
        blocks = tuple(
            (at, block)
            for at in range(0, len(data), BLOCK_BYTES)
            if any(block := data[at:at + BLOCK_BYTES])
        )
        with self._guard:
            self._known[size_bytes] = Blank(len(data), blocks)
            if len(self._known) > SIZES_MAX:
                self._known.popitem(last=False)
