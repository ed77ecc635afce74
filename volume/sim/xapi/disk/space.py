# SPDX-License-Identifier: Apache-2.0
"""The room of a directory: a file system of a size, without a mount.

What a file takes is what it takes on the disk (``st_blocks``), as statvfs of
a real one would count it. Only files that changed are looked at again; a
``measure`` counts all, also what others wrote.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

BLOCK = 512  # the unit of st_blocks, on every file system


class Space:
    """How much of a directory's size is taken. Safe for threads."""

    def __init__(self, root: Path, size_bytes: int = 0) -> None:
        """Count below ``root``; a size of 0 is that of the disk below."""
        self.root = root
        self.size_bytes = size_bytes
        self._lock = threading.Lock()
        self._taken: dict[str, int] | None = None
        self._sum = 0

    def total(self) -> int:
        """Return the size of it."""
        if self.size_bytes:
            return self.size_bytes
        found = os.statvfs(self.root)
        return found.f_blocks * found.f_frsize

    def used(self) -> int:
        """Return what is taken of it."""
        if not self.size_bytes:
            found = os.statvfs(self.root)
            return (found.f_blocks - found.f_bfree) * found.f_frsize
        with self._lock:
            if self._taken is None:
                self._count()
            return self._sum

    def free(self) -> int:
        """Return what is left of it."""
        return max(0, self.total() - self.used())

    def measure(self) -> None:
        """Count all files, whoever wrote them."""
        with self._lock:
            self._count()

    def note(self, path: str | os.PathLike[str]) -> None:
        """Look again at a file that was written, made or removed."""
        with self._lock:
            if self._taken is None:
                return
            name = os.fspath(path)
            taken = _taken(name)
            self._sum += taken - self._taken.get(name, 0)
            self._taken[name] = taken

    def want(self, size_bytes: int) -> None:
        """Refuse bytes that have no room, as a full file system does.

        :raises OSError: ENOSPC
        """
        if self.size_bytes and self.free() < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _count(self) -> None:
        self._taken = {}
        for top, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(top, name)
                self._taken[path] = _taken(path)
        self._sum = sum(self._taken.values())


def _taken(path: str) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_blocks * BLOCK
    except FileNotFoundError:
        return 0
