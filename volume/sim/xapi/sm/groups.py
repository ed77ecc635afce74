# SPDX-License-Identifier: Apache-2.0
"""LVM volume groups of the world: who made one, its volumes, its room.

A group lies on disks of one host or on a LUN. Its directory has a label,
``volumes/`` with the bytes, and ``group.db`` with what LVM's metadata and
the SR's management volume would have: the size of each volume, which is what
it takes of the group, whatever its file takes on this disk.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from volume.sim.xapi.world import World

EXTENT_BYTES = 4 << 20
SIGNATURE_AT = 512
SIGNATURE = b'LABELONE'  # where LVM has it: in the second sector
TABLE = '''
CREATE TABLE IF NOT EXISTS volume (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, facts TEXT NOT NULL)
'''


def round_up(size_bytes: int, unit: int = EXTENT_BYTES) -> int:
    """Return the size in whole units."""
    return -(-size_bytes // unit) * unit


def on_device(world: World, host: str, path: str) -> str:
    """Return the uuid of the SR that a host's disk was made for, or ''."""
    return labelled(world, device_name(host, path))


def on_lun(world: World, scsi_id: str) -> str:
    """Return the uuid of the SR whose group is on a LUN, or ''."""
    return labelled(world, scsi_id)


def device_name(host: str, path: str) -> str:
    """Return what a disk of a host is called in ``groups/``."""
    return f'{host}:{path}'


def label(
    world: World, names: list[str], sr_uuid: str, kind: str,
) -> None:
    """Write on disks or LUNs that they belong to an SR from now on."""
    for name in names:
        directory = world.group_directory(name)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / 'label.json').write_text(json.dumps(
            {'sr_uuid': sr_uuid, 'kind': kind, 'first': names[0]}))
        if world.lun(name):
            _sign(world.lun_file(name), SIGNATURE)


def unlabel(world: World, names: list[str]) -> None:
    """Take the label away, and what lies below it."""
    for name in names:
        directory = world.group_directory(name)
        for path in sorted(directory.rglob('*'), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if directory.exists():
            directory.rmdir()
        if world.lun(name):
            _sign(world.lun_file(name), bytes(len(SIGNATURE)))


@dataclasses.dataclass(slots=True)
class Volume:
    """A logical volume: its size in the group, and what the SR keeps of it."""

    name: str
    size_bytes: int
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Group:
    """An open volume group. Each change is whole, also when killed."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        """Open the group in a directory that has a label."""
        self.volumes_directory = directory / 'volumes'
        self.volumes_directory.mkdir(parents=True, exist_ok=True)
        self.size_bytes = size_bytes // EXTENT_BYTES * EXTENT_BYTES
        self._lock = threading.Lock()
        self._base = sqlite3.connect(
            directory / 'group.db', check_same_thread=False,
            isolation_level=None, timeout=30)
        self._base.execute('PRAGMA journal_mode = WAL')
        self._base.execute('PRAGMA synchronous = OFF')
        self._base.execute(TABLE)
        self._volumes = {
            name: Volume(name, size, json.loads(facts))
            for name, size, facts in
            self._base.execute('SELECT name, size, facts FROM volume')
        }
        self._used = sum(v.size_bytes for v in self._volumes.values())

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            self._base.close()

    @property
    def used_bytes(self) -> int:
        return self._used

    @property
    def free_bytes(self) -> int:
        return max(0, self.size_bytes - self._used)

    def resize(self, size_bytes: int) -> None:
        """Follow the disks, which may have grown."""
        self.size_bytes = size_bytes // EXTENT_BYTES * EXTENT_BYTES

    def all(self) -> list[Volume]:
        """Return every volume."""
        with self._lock:
            return list(self._volumes.values())

    def get(self, name: str) -> Volume | None:
        """Return one volume."""
        return self._volumes.get(name)

    def set(self, name: str, size_bytes: int, /, **facts: Any) -> Volume:
        """Make a volume or change it: its size, its facts.

        That there is room for it has been asked before.
        """
        with self._lock:
            was = self._volumes.get(name)
            size = round_up(size_bytes)
            more = size - (was.size_bytes if was else 0)
            kept = was.facts if was else {}
            volume = Volume(name, size, {**kept, **facts})
            if volume == was:
                return volume
            self._base.execute(
                'INSERT OR REPLACE INTO volume VALUES (?, ?, ?)',
                (name, size, json.dumps(volume.facts)))
            self._volumes[name] = volume
            self._used += more
            return volume

    def keep(self, volume_name: str, /, **facts: Any) -> None:
        """Change facts of a volume that is there."""
        volume = self._volumes.get(volume_name)
        if volume is not None:
            self.set(volume_name, volume.size_bytes, **facts)

    def remove(self, name: str) -> None:
        """Remove a volume; one that is gone is no error."""
        with self._lock:
            self._base.execute('DELETE FROM volume WHERE name = ?', (name,))
            gone = self._volumes.pop(name, None)
            self._used -= gone.size_bytes if gone else 0


def labelled(world: World, name: str) -> str:
    """Return the uuid of the SR that a disk or LUN belongs to, or ''."""
    path = world.group_directory(name) / 'label.json'
    if not path.exists():
        return ''
    return str(json.loads(path.read_text())['sr_uuid'])


def _sign(path: Path, data: bytes) -> None:
    with open(path, 'r+b') as file:
        file.seek(SIGNATURE_AT)
        file.write(data)
