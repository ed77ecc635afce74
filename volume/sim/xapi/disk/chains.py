# SPDX-License-Identifier: Apache-2.0
"""The files of one storage repository: trees of disks, by their uuids.

A snapshot makes what was the disk a hidden *base copy* under another name,
and two new disks over it: one under the old name, one as the snapshot. Each
change is written down before it begins; ``recover`` ends what a dead process
has begun. ``lock`` is held for each change, and is that of the repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from volume import errors
from volume.sim.xapi.disk import disks

JOURNAL = '.journal-'
DRAFT = '.draft'
SETTLED_NS = 100_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One file: a disk, a snapshot, or a base copy that is hidden."""

    uuid: str
    format: str
    path: str
    size_bytes: int
    used_bytes: int
    parent: str  # a uuid, or empty
    is_hidden: bool


class Users(Protocol):
    """Who has disks open: ``sm.taps.Taps``.

    They open them by ``Chains.open_disk``.
    """

    def opened(self) -> list[str]:
        """Return which disks are open."""

    def paused(self, uuids: Iterable[str]) -> AbstractContextManager[None]:
        """Close disks and let nobody open them; their users wait."""


class _Nobody:
    def opened(self) -> list[str]:
        return []

    def paused(self, uuids: Iterable[str]) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class Chains:
    """All disks in a directory.

    ``names`` says how files are called: format to prefix and suffix.
    ``claim`` is asked before a file grows; it raises if there is no room.
    ``users`` open disks, by ``open_disk``; without them nobody does.
    """

    def __init__(
        self,
        directory: str,
        formats: Iterable[disks.Format],
        names: Mapping[str, tuple[str, str]] | None = None,
        claim: Callable[[int], None] = disks.endless,
        users: Users | None = None,
        kernel: disks.Kernel = disks.KERNEL,
    ) -> None:
        self.directory = directory
        self.lock = threading.RLock()
        self.formats = {each.name: each for each in formats}
        self.users: Users = users or _Nobody()
        self.kernel = kernel
        self._claim = claim
        self._names = {
            each: (names or {}).get(each, ('', found.suffix))
            for each, found in self.formats.items()
        }
        self._seen: dict[str, tuple[tuple[int, ...], Node]] = {}

    # What there is.

    def path(self, uuid: str, format: str) -> str:
        """Return where a disk of a format lies, or would lie."""
        prefix, suffix = self._names[format]
        return os.path.join(self.directory, f'{prefix}{uuid}{suffix}')

    def nodes(self) -> dict[str, Node]:
        """Look at all files; what is no disk of ours is left out."""
        with self.lock:
            found = {}
            for name in os.listdir(self.directory):
                with contextlib.suppress(
                    errors.Invalid, errors.NotFound
                ):
                    if node := self._look(name):
                        found[node.uuid] = node
            self._seen = {
                name: seen for name, seen in self._seen.items()
                if seen[1].uuid in found
            }
            return found

    def node(self, uuid: str) -> Node:
        """Look at one file.

        :raises NotFound: there is none
        :raises Invalid: it is damaged
        """
        for format in self.formats:
            with contextlib.suppress(errors.NotFound):
                name = os.path.basename(self.path(uuid, format))
                if node := self._look(name):
                    return node
        raise errors.NotFound(f'there is no disk {uuid}')

    def has(self, uuid: str) -> bool:
        """Say whether there is a disk."""
        return any(
            os.path.exists(self.path(uuid, format)) for format in self.formats
        )

    def parents(self, uuid: str) -> list[Node]:
        """Return what a disk stands upon, the nearest first."""
        found: list[Node] = []
        node = self.node(uuid)
        while node.parent:
            node = self.node(node.parent)
            if node.uuid in {uuid, *(each.uuid for each in found)}:
                raise errors.Invalid(f'the chain of disk {uuid} is a ring')
            found.append(node)
        return found

    def depth(self, uuid: str) -> int:
        """Return how many files a disk consists of: a fresh one of one."""
        return len(self.parents(uuid)) + 1

    def children(self, uuid: str) -> list[Node]:
        """Return what stands upon a disk, directly."""
        return [
            node for node in self.nodes().values() if node.parent == uuid
        ]

    def above(self, uuid: str) -> list[str]:
        """Return a disk and all that stands upon it."""
        children: dict[str, list[str]] = {}
        for node in self.nodes().values():
            children.setdefault(node.parent, []).append(node.uuid)
        found = [uuid]
        for each in found:
            found += children.get(each, [])
        return found

    # What is done.

    def create(self, uuid: str, size_bytes: int, format: str) -> Node:
        """Make a disk of zeros.

        :raises Conflict: there is one
        """
        with self.lock:
            path = self.path(uuid, format)
            if os.path.exists(path):
                raise errors.Conflict(f'disk {uuid} is there already')
            self.formats[format].create(path, size_bytes)
            return self.node(uuid)

    def remove(self, uuid: str) -> None:
        """Remove a disk; one that others need is hidden instead.

        :raises Busy: it is open
        """
        with self.lock:
            if uuid in self.users.opened():
                raise errors.Busy(f'disk {uuid} is open')
            try:
                node = self.node(uuid)
            except errors.NotFound:
                return
            if self.formats[node.format].has_parents and self.children(uuid):
                self.formats[node.format].hide(node.path, True)
            else:
                self.kernel.remove(node.path)

    def grow(self, uuid: str, size_bytes: int) -> Node:
        """Make a disk larger.

        :raises Invalid: it would be smaller
        """
        with self.lock:
            node = self.node(uuid)
            if size_bytes < node.size_bytes:
                raise errors.Invalid(
                    f'disk {uuid} has {node.size_bytes} bytes: shrinking is '
                    'not possible'
                )
            with self.journal('grow', uuid=uuid, size_bytes=size_bytes):
                with self.users.paused([uuid]):
                    self.formats[node.format].grow(node.path, size_bytes)
            return self.node(uuid)

    def snapshot(
        self, origin: str, base: str, new: Sequence[str] = ()
    ) -> list[Node]:
        """Let a disk, and new ones, stand upon what the disk was until now.

        Return the new ones, the base copy, and the disk. Whoever has the
        disk open goes on with it.

        :raises Unsupported: its format has no parents
        """
        with self.lock:
            node = self.node(origin)
            if not self.formats[node.format].has_parents:
                raise errors.Unsupported(
                    f'disk {origin} is {node.format}, which has no snapshots')
            asked: dict[str, Any] = {
                'origin': origin, 'base': base, 'new': [*new],
                'format': node.format,
            }
            # What is not hidden has nothing above it.
            above = self.above(origin) if node.is_hidden else [origin]
            with self.users.paused(above):
                with self.journal('snapshot', **asked):
                    self._snapshot(**asked)
            return [self.node(each) for each in (*new, base, origin)]

    def recover(self) -> None:
        """End what a dead process has begun, and remove its drafts."""
        with self.lock:
            for name, asked in self.journals():
                if name == 'snapshot':
                    self._snapshot(**asked)
                elif name == 'grow':
                    node = self.node(asked['uuid'])
                    self.formats[node.format].grow(
                        node.path, asked['size_bytes'])
                else:
                    continue
                self.end_journal(name)
            for name in os.listdir(self.directory):
                if name.endswith(DRAFT):
                    self.kernel.remove(os.path.join(self.directory, name))

    def open_disk(self, uuid: str, writable: bool = False) -> disks.Disk:
        """Open a disk and all that it stands upon; for ``users`` alone.

        It takes no lock: what changes beneath a disk pauses it before.

        :raises NotFound: it, or one that it needs, is not there
        """
        node = self.node(uuid)
        try:
            return self.formats[node.format].open(
                node.path, writable,
                [each.path for each in self.parents(uuid)], self._claim,
            )
        except FileNotFoundError as failed:
            raise errors.NotFound(f'there is no disk {uuid}') from failed

    # Journals.

    @contextlib.contextmanager
    def journal(self, name: str, **asked: Any) -> Iterator[None]:
        """Write down what is begun; what fails in here was undone by it."""
        self.kernel.store(
            self._journal_path(name), json.dumps(asked).encode())
        try:
            yield
        except (errors.VolumeError, OSError, disks.Stopped):
            self.end_journal(name)
            raise
        self.end_journal(name)

    def end_journal(self, name: str) -> None:
        """Say that what was begun is ended."""
        self.kernel.remove(self._journal_path(name))

    def journals(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what was begun and not ended."""
        found = []
        for name in sorted(os.listdir(self.directory)):
            if name.startswith(JOURNAL) and not name.endswith(DRAFT):
                path = os.path.join(self.directory, name)
                with open(path, 'rb') as file:
                    found.append((
                        name.removeprefix(JOURNAL), json.load(file)))
        return found

    def _journal_path(self, name: str) -> str:
        return os.path.join(self.directory, JOURNAL + name)

    # The steps of a snapshot: each may be done again.

    def _snapshot(
        self, origin: str, base: str, new: Sequence[str], format: str
    ) -> None:
        kind = self.formats[format]
        lower = self.path(base, format)
        upper = [self.path(each, format) for each in (origin, *new)]
        if not os.path.exists(lower):
            self.kernel.rename(upper[0], lower)
        try:
            kind.hide(lower, True)
            size_bytes = kind.look(lower).size_bytes
            for path in upper:
                if not os.path.exists(path):
                    kind.create(path, size_bytes, lower)
        except (errors.VolumeError, OSError):
            for path in upper[1:]:
                self.kernel.remove(path)
            kind.hide(lower, False)
            self.kernel.rename(lower, upper[0])
            raise

    def _look(self, name: str) -> Node | None:
        """Look at a file, unless it is as it was."""
        called = self._parse(name)
        if called is None:
            return None
        uuid, format = called
        path = os.path.join(self.directory, name)
        try:
            found = os.stat(path)
            mark = (found.st_ino, found.st_size, found.st_mtime_ns)
            seen = self._seen.get(name)
            if seen is not None and seen[0] == mark:
                return seen[1]
            facts = self.formats[format].look(path)
        except FileNotFoundError as failed:
            raise errors.NotFound(f'there is no disk {uuid}') from failed
        parent = self._parse(facts.parent) if facts.parent else None
        if facts.parent and parent is None:
            raise errors.Invalid(
                f'{name} is refused: its parent {facts.parent!r:.200} is no '
                'disk of this repository'
            )
        node = Node(
            uuid, format, path, facts.size_bytes, facts.used_bytes,
            parent[0] if parent else '', facts.is_hidden,
        )
        # A file that was just changed may change again at the same time.
        if time.time_ns() - found.st_mtime_ns > SETTLED_NS:
            self._seen[name] = mark, node
        return node

    def _parse(self, name: str) -> tuple[str, str] | None:
        """Return the uuid and the format that a file name tells."""
        for format, (prefix, suffix) in self._names.items():
            uuid = name.removeprefix(prefix).removesuffix(suffix)
            if (
                len(uuid) == 36
                and name == os.path.basename(self.path(uuid, format))
            ):
                return uuid, format
        return None
