# SPDX-License-Identifier: Apache-2.0
"""An array outside of all pools: its volumes, their bytes, what they take.

The box of an array is a directory of the world: ``state.json`` and one
sparse file for each volume. Pools share it, threads and processes as well;
each change is made under a lock and replaces the state as a whole.

A snapshot is a copy of the file, but it is charged as an array charges it:
with the pages that were overwritten since. A page belongs to the newest
snapshot that needs it, and goes to the next older one when that is deleted.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from volume import errors
from volume.sim.xapi.world import Array
from volume.sim.xapi.world import name_of
from volume.sim.xapi.world import World

PAGE_BYTES = 1 << 20
COPY_BYTES = 16 << 20


@dataclasses.dataclass
class Lun:
    """A volume of an array, or a snapshot that is one."""

    uuid: str
    sr_uuid: str
    pool: str
    size_bytes: int
    container: int = 0
    is_thick: bool = True
    is_snapshot: bool = False
    origin: str = ''
    number: int = 0
    name: str = ''
    description: str = ''
    reserve_percent: int = 0
    depletion: str = ''
    is_offline: bool = False
    sm_config: dict[str, str] = dataclasses.field(default_factory=dict)
    # Of a snapshot: the pages of its origin that were written since.
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def snapshot_bytes(self) -> int:
        return len(self.pages) * PAGE_BYTES


@dataclasses.dataclass
class State:
    """What the array knows."""

    repositories: dict[str, dict[str, Any]] = dataclasses.field(
        default_factory=dict)
    luns: dict[str, Lun] = dataclasses.field(default_factory=dict)
    last_number: int = 0

    def of(self, sr_uuid: str) -> list[Lun]:
        """Return the volumes and snapshots of one SR, oldest first."""
        return sorted(
            (lun for lun in self.luns.values() if lun.sr_uuid == sr_uuid),
            key=lambda lun: lun.number,
        )

    def snapshots(self, uuid: str) -> list[Lun]:
        """Return the snapshots of a volume, oldest first."""
        return sorted(
            (
                lun for lun in self.luns.values()
                if lun.is_snapshot and lun.origin == uuid
            ),
            key=lambda lun: lun.number,
        )


class Box:
    """The inside of one array."""

    _lock = threading.RLock()

    def __init__(self, world: World, array: Array) -> None:
        self.array = array
        self.directory = (
            world.directory / 'arrays' / array.kind / name_of(array.address)
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._seen: tuple[int, State] = (-1, State())

    # -- what it knows ----------------------------------------------------

    def look(self) -> State:
        """Return what it knows now; to be read only."""
        path = self.directory / 'state.json'
        changed_ns = path.stat().st_mtime_ns if path.exists() else 0
        if changed_ns != self._seen[0]:
            self._seen = (changed_ns, self._load())
        return self._seen[1]

    def _load(self) -> State:
        path = self.directory / 'state.json'
        if not path.exists():
            return State()
        found = json.loads(path.read_text())
        return State(
            repositories=found['repositories'],
            luns={
                uuid: Lun(**lun) for uuid, lun in found['luns'].items()
            },
            last_number=found['last_number'],
        )

    @contextlib.contextmanager
    def changing(self) -> Iterator[State]:
        """Give what it knows to be changed, and keep it at the end."""
        with self._lock, open(self.directory / '.lock', 'w') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            state = self._load()
            yield state
            path = self.directory / 'state.json'
            draft = path.with_suffix('.new')
            draft.write_text(json.dumps(dataclasses.asdict(state)))
            draft.replace(path)

    # -- bytes ------------------------------------------------------------

    def file(self, uuid: str) -> Path:
        """Return the file of a volume or snapshot."""
        return self.directory / 'luns' / uuid

    def make_file(self, uuid: str, size_bytes: int) -> None:
        """Make a volume's file; it is sparse and reads zero."""
        path = self.file(uuid)
        path.parent.mkdir(exist_ok=True)
        with open(path, 'wb') as file:
            file.truncate(size_bytes)

    def copy_file(self, source: str, target: str) -> None:
        """Copy a volume's bytes; holes stay holes."""
        draft = self.file(target + '.draft')
        copy_sparse(self.file(source), draft)
        draft.replace(self.file(target))

    def remove_file(self, uuid: str) -> None:
        self.file(uuid).unlink(missing_ok=True)

    # -- room -------------------------------------------------------------

    def size_bytes(self, pool: str) -> int:
        """Return the size of an aggregate or storage pool."""
        return int(self.array.pools[pool]['size'])

    def used_bytes(self, state: State, pool: str) -> int:
        """Return what volumes of all pools have taken of it."""
        return sum(
            self.charge(state, lun) for lun in state.luns.values()
            if lun.pool == pool
        ) + sum(
            int(repository.get('management_bytes', 0))
            for repository in state.repositories.values()
            if repository['pool'] == pool
        )

    def free_bytes(self, state: State, pool: str) -> int:
        return self.size_bytes(pool) - self.used_bytes(state, pool)

    def charge(self, state: State, lun: Lun) -> int:
        """Return what one volume or snapshot takes of its pool.

        A reserve for snapshots is charged with the volume; what is beyond
        it with the snapshots.
        """
        if lun.is_snapshot:
            origin = state.luns.get(lun.origin)
            if origin is not None and origin.reserve_percent:
                return 0
            return lun.snapshot_bytes
        own = lun.size_bytes if lun.is_thick else self.stored_bytes(lun.uuid)
        return own + reserve_bytes(lun)

    def stored_bytes(self, uuid: str) -> int:
        """Return what the file really takes."""
        try:
            return self.file(uuid).stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    # -- snapshots --------------------------------------------------------

    def written(self, uuid: str, offset: int, length: int) -> None:
        """Charge the newest snapshot of a volume with what is overwritten.

        :raises NoSpace: the reserve is used up, and the volume is to go
            offline rather than lose a snapshot
        """
        snapshots = self.look().snapshots(uuid)
        if not snapshots or not length:
            return
        pages = range(
            offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES + 1
        )
        if set(pages) <= set(snapshots[-1].pages):
            return
        fits = True
        with self.changing() as state:
            snapshots = state.snapshots(uuid)
            if snapshots:
                newest = snapshots[-1]
                newest.pages = sorted({*newest.pages, *pages})
                fits = self._deplete(state, state.luns[uuid])
        if not fits:
            raise errors.NoSpace(
                f'volume {uuid} went offline: its snapshots have used up '
                'their reserve'
            )

    def _deplete(self, state: State, lun: Lun) -> bool:
        """Make the snapshots fit into their reserve, or say that it is full.

        The oldest are deleted, unless the volume asked to go offline.
        """
        if not lun.reserve_percent:
            return True
        room = reserve_bytes(lun)
        snapshots = state.snapshots(lun.uuid)
        while sum(one.snapshot_bytes for one in snapshots) > room:
            if lun.depletion != 'delete-oldest':
                lun.is_offline = True
                return False
            self.forget(state, snapshots.pop(0))
        return True

    def settle(self, state: State, uuid: str) -> None:
        """Bring a volume back whose snapshots fit again."""
        lun = state.luns.get(uuid)
        if lun is not None and lun.is_offline:
            lun.is_offline = False
            self._deplete(state, lun)

    def forget(self, state: State, lun: Lun) -> None:
        """Remove a volume or a snapshot, and the pages that it had."""
        if lun.is_snapshot:
            older = [
                one for one in state.snapshots(lun.origin)
                if one.number < lun.number
            ]
            if older:
                older[-1].pages = sorted({*older[-1].pages, *lun.pages})
        del state.luns[lun.uuid]
        self.remove_file(lun.uuid)


def reserve_bytes(lun: Lun) -> int:
    """Return the room that a volume keeps for its snapshots."""
    return lun.size_bytes * lun.reserve_percent // 100


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file; what is a hole in one is a hole in the other."""
    with open(source, 'rb') as reader, open(target, 'wb') as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            end = os.lseek(reader.fileno(), at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(
                    reader.fileno(), min(COPY_BYTES, end - at), at
                )
                os.pwrite(writer.fileno(), data, at)
                at += len(data)
