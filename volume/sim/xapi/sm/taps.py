# SPDX-License-Identifier: Apache-2.0
"""The way to a VDI's bytes while its files change below: pause and resume.

A guest, an import and an NBD client hold a ``Tap``. All taps of one VDI
share one open disk. A snapshot and the collector pause it, which closes the
files; the next read or write opens what is there then. That is what tapdisk
does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextlib import ExitStack
from typing import Any, TYPE_CHECKING

from volume.sim.xapi.disk.disks import Disk

if TYPE_CHECKING:
    from volume.model import Extent

Open = Callable[[str, bool], Disk]
Written = Callable[[str, int, int], None]


class _Shared:
    """One VDI that is open: its disk, or None while it is paused."""

    def __init__(self, uuid: str, opener: Open) -> None:
        self.uuid = uuid
        self.lock = threading.RLock()
        self.taps: set[Tap] = set()
        self._opener = opener
        self._disk: Disk | None = None
        self._is_writable = False

    def disk(self) -> Disk:
        """Return the disk; the lock is held by who calls."""
        wanted = any(tap.is_writable for tap in self.taps)
        if self._disk is not None and wanted and not self._is_writable:
            self.pause()
        if self._disk is None:
            self._disk = self._opener(self.uuid, wanted)
            self._is_writable = wanted
        return self._disk

    def pause(self) -> None:
        """Close the files; the lock is held by who calls."""
        disk, self._disk = self._disk, None
        if disk is not None:
            if self._is_writable:
                disk.flush()
            disk.close()


class Tap(Disk):
    """A VDI that somebody holds open."""

    def __init__(
        self, taps: Taps, shared: _Shared, is_writable: bool,
    ) -> None:
        self._taps = taps
        self._shared = shared
        self.is_writable = is_writable
        self.path = ''
        self.size_bytes = 0

    def start(self) -> None:
        """Open the files, so that what is wrong with them is told here."""
        with self._shared.lock:
            disk = self._shared.disk()
            self.path, self.size_bytes = disk.path, disk.size_bytes

    def pread_into(self, buffer: Any, offset: int) -> None:
        with self._shared.lock:
            self._shared.disk().pread_into(buffer, offset)

    def pwrite(self, offset: int, data: Any) -> None:
        self.check('write', offset, len(data))
        with self._shared.lock:
            self._shared.disk().pwrite(offset, data)
            self._taps.tell(self._shared.uuid, offset, len(data))

    def zero(self, offset: int, length: int) -> None:
        self.check('zero', offset, length)
        with self._shared.lock:
            self._shared.disk().zero(offset, length)
            self._taps.tell(self._shared.uuid, offset, length)

    def flush(self) -> None:
        with self._shared.lock:
            self._shared.disk().flush()

    def extents(self) -> Iterator[Extent]:
        with self._shared.lock:
            return iter(list(self._shared.disk().extents()))

    def allocated(self) -> Iterator[Extent]:
        with self._shared.lock:
            return iter(list(self._shared.disk().allocated()))

    def close(self) -> None:
        self._taps.drop(self, self._shared)


class Taps:
    """All VDIs of one SR that are open."""

    def __init__(self, opener: Open) -> None:
        """Open disks by ``opener(uuid, writable)``."""
        self._opener = opener
        self._lock = threading.Lock()
        self._shared: dict[str, _Shared] = {}
        self.written: list[Written] = []  # told of each write, VDI by VDI

    def open(self, uuid: str, writable: bool) -> Tap:
        """Open a VDI once more."""
        with self._lock:
            shared = self._shared.get(uuid)
            if shared is None:
                shared = self._shared[uuid] = _Shared(uuid, self._opener)
            tap = Tap(self, shared, writable)
            shared.taps.add(tap)
        try:
            tap.start()
        except BaseException:
            tap.close()
            raise
        return tap

    def drop(self, tap: Tap, shared: _Shared) -> None:
        """Forget a tap; the last one closes the files."""
        with shared.lock:
            with self._lock:
                if tap not in shared.taps:
                    return
                shared.taps.remove(tap)
                is_last = not shared.taps
            if is_last:
                # Who comes meanwhile waits for this one's lock, and so until
                # the files are closed: some formats are opened by one only.
                shared.pause()
                self._forget(shared)

    def tell(self, uuid: str, offset: int, length: int) -> None:
        """Tell the listeners what was written, before anyone may read it."""
        for written in self.written:
            written(uuid, offset, length)

    def is_open(self, uuid: str) -> bool:
        """Whether somebody holds a VDI."""
        return uuid in self.opened()

    def opened(self) -> list[str]:
        """Return the VDIs that somebody holds."""
        with self._lock:
            return sorted(
                uuid for uuid, shared in self._shared.items() if shared.taps)

    @contextmanager
    def paused(self, uuids: Iterable[str]) -> Iterator[None]:
        """Close the files of these VDIs and hold back who wants them.

        Nobody opens one of them meanwhile, either.
        """
        with ExitStack() as stack:
            for uuid in sorted(set(uuids)):
                with self._lock:
                    shared = self._shared.get(uuid)
                    if shared is None:
                        shared = self._shared[uuid] = _Shared(
                            uuid, self._opener)
                stack.enter_context(shared.lock)
                stack.callback(self._forget, shared)
                shared.pause()
            yield

    def close(self) -> None:
        """Close the files of who did not; they open them again if used."""
        with self._lock:
            left = list(self._shared.values())
        for shared in left:
            with shared.lock:
                shared.pause()

    def _forget(self, shared: _Shared) -> None:
        """Leave no trace of a VDI that was paused and that nobody holds."""
        with self._lock:
            if not shared.taps and self._shared.get(shared.uuid) is shared:
                del self._shared[shared.uuid]
