# SPDX-License-Identifier: Apache-2.0
"""What lies outside a pool: exports, disks, LUNs, targets and arrays.

A world is a directory. Several simulators, also in several processes, may
share one, as pools share a filer. What is in it stands in ``world.json``;
the bytes lie beside it::

    nfs/<server>/<path>/          an export, likewise smb, cephfs, ...
    hosts/<host uuid>/<path>      what only one host has: disks, directories
    luns/<SCSIid>                 a LUN: a sparse file
    groups/<SCSIid or disk>/      the LVM group on a LUN or on a disk

Two pools that use one storage repository at a time corrupt it. A real array
lets them; here each takes what it uses, and who comes second while the first
still holds it is written down in ``violations``.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from volume.sim.xapi.disk.space import Space

Thing = TypeVar('Thing')
GIB = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """A directory that a file server exports.

    ``kind`` is nfs, smb, cephfs, glusterfs, moosefs or linstor. A size of 0
    means that of the file system below. ``is_down`` refuses connections.
    """

    kind: str
    server: str
    path: str
    size_bytes: int = 0
    versions: tuple[str, ...] = ('3', '4')
    access: str = '*'
    user: str = ''
    password: str = ''
    is_read_only: bool = False
    is_refused: bool = False
    is_down: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A disk of one host; ``host`` is its uuid, or '*': each host has one."""

    host: str
    path: str
    size_bytes: int
    sector_bytes: int = 512
    serial: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Lun:
    """A LUN of an array: of an iSCSI target (``iqn``) or on a fabric.

    ``adapter`` is FC, fcoe or SAS; empty for iSCSI alone. With ``pools``,
    only the pools of these uuids see it.
    """

    scsi_id: str
    size_bytes: int
    lun_id: int = 0
    vendor: str = 'SIM'
    serial: str = ''
    iqn: str = ''
    adapter: str = ''
    pools: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """An iSCSI portal and one name behind it; CHAP is wanted if set."""

    address: str
    iqn: str
    port: int = 3260
    chap_user: str = ''
    chap_password: str = ''
    incoming_user: str = ''
    incoming_password: str = ''
    is_down: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """A filer (``netapp``) or a group (``equal``) with its storage pools.

    ``pools`` maps an aggregate's or storage pool's name to its facts; a
    number of bytes stands under ``size``. ``facts`` are those of the array
    as a whole, its limits and licences (see ``sm/arraybox.py``).
    """

    kind: str
    address: str
    username: str
    password: str
    pools: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    is_down: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


KINDS: dict[str, type[Any]] = {
    'shares': Share,
    'devices': Device,
    'luns': Lun,
    'targets': Target,
    'arrays': Array,
}
KEYS = {  # what makes two things of a kind the same one
    'shares': ('kind', 'server', 'path'),
    'devices': ('host', 'path'),
    'luns': ('scsi_id',),
    'targets': ('address', 'port', 'iqn'),
    'arrays': ('kind', 'address'),
}


def name_of(text: str) -> str:
    """Return a text as one safe name of a file."""
    name = quote(text, safe=' :@,+=')
    return name.replace('.', '%2E') if not name.strip('.') else name


class World:
    """All that pools may reach. Safe for threads and for processes."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Open the world in a directory, which is made if it is absent."""
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._things: dict[str, list[Any]] = {}
        self._read_ns = -1
        self._spaces: dict[Path, Space] = {}
        self._load()

    # -- what there is ----------------------------------------------------

    def add(self, thing: Share | Device | Lun | Target | Array) -> None:
        """Add a thing, or change one that has the same key."""
        kind = next(k for k, cls in KINDS.items() if isinstance(thing, cls))
        with self._changing() as things:
            key = _key(kind, thing)
            things[kind] = [
                one for one in things[kind] if _key(kind, one) != key]
            things[kind].append(thing)
        if isinstance(thing, Share):
            self.share_directory(thing).mkdir(parents=True, exist_ok=True)
        elif isinstance(thing, Lun):
            _stretch(self.lun_file(thing.scsi_id), thing.size_bytes)

    def remove(self, thing: Share | Device | Lun | Target | Array) -> None:
        """Take a thing away; its bytes stay where they are."""
        kind = next(k for k, cls in KINDS.items() if isinstance(thing, cls))
        with self._changing() as things:
            key = _key(kind, thing)
            things[kind] = [
                one for one in things[kind] if _key(kind, one) != key]

    def add_share(
        self, kind: str, server: str, path: str, size_bytes: int = 0,
        **facts: Any,
    ) -> Share:
        """Add an export of a file server."""
        share = Share(kind, server, path, size_bytes, **facts)
        self.add(share)
        return share

    def add_nfs(
        self, server: str, path: str, size_bytes: int = 0, **facts: Any,
    ) -> Share:
        """Add an NFS export."""
        return self.add_share('nfs', server, path, size_bytes, **facts)

    def add_device(
        self, path: str, size_bytes: int, host: str = '*', **facts: Any,
    ) -> Device:
        """Add a disk to one host, by its uuid, or one to each host."""
        device = Device(host, path, size_bytes, **facts)
        self.add(device)
        return device

    def add_lun(self, scsi_id: str, size_bytes: int, **facts: Any) -> Lun:
        """Add a LUN; its file is sparse and reads zero."""
        facts.setdefault('serial', scsi_id[-12:])
        lun = Lun(scsi_id, size_bytes, **facts)
        self.add(lun)
        return lun

    def add_target(self, address: str, iqn: str, **facts: Any) -> Target:
        """Add an iSCSI portal with a target; its LUNs name its iqn."""
        target = Target(address, iqn, **facts)
        self.add(target)
        return target

    def add_array(
        self, kind: str, address: str, username: str, password: str,
        pools: dict[str, dict[str, Any]], **facts: Any,
    ) -> Array:
        """Add a ``netapp`` filer or an ``equal`` group."""
        array = Array(kind, address, username, password, pools, **facts)
        self.add(array)
        return array

    def shares(self, kind: str, server: str) -> list[Share]:
        """Return what a file server exports, in the order of adding."""
        return [
            share for share in self._all('shares')
            if (share.kind, share.server) == (kind, server)
        ]

    def share(self, kind: str, server: str, path: str) -> Share | None:
        """Return the export that holds a path, the nearest one."""
        best = None
        for share in self.shares(kind, server):
            top = share.path.rstrip('/')
            if path.rstrip('/') == top or path.startswith(top + '/'):
                if best is None or len(top) > len(best.path.rstrip('/')):
                    best = share
        return best

    def devices(self, host: str) -> list[Device]:
        """Return the disks of a host, by its uuid."""
        own = [d for d in self._all('devices') if d.host == host]
        named = {device.path for device in own}
        return own + [
            dataclasses.replace(device, host=host)
            for device in self._all('devices')
            if device.host == '*' and device.path not in named
        ]

    def device(self, host: str, path: str) -> Device | None:
        """Return one disk of a host."""
        return next((d for d in self.devices(host) if d.path == path), None)

    def luns(self, pool: str = '', **equal: Any) -> list[Lun]:
        """Return LUNs, of one iqn or one adapter; seen by a pool's uuid."""
        return [
            lun for lun in self._all('luns')
            if (not pool or not lun.pools or pool in lun.pools)
            and all(getattr(lun, k) == v for k, v in equal.items())
        ]

    def lun(self, scsi_id: str) -> Lun | None:
        """Return one LUN."""
        return next(iter(self.luns(scsi_id=scsi_id)), None)

    def targets(self, address: str = '') -> list[Target]:
        """Return the targets behind an address."""
        return [
            target for target in self._all('targets')
            if not address or target.address == address
        ]

    def array(self, kind: str, address: str) -> Array | None:
        """Return a filer or a group by its address."""
        return next((
            array for array in self._all('arrays')
            if (array.kind, array.address) == (kind, address)
        ), None)

    def update(self, thing: Thing, **facts: Any) -> Thing:
        """Change facts of a thing, such as its size; return the new one."""
        changed = dataclasses.replace(thing, **facts)  # type: ignore[type-var]
        self.add(changed)  # type: ignore[arg-type]
        return changed

    # -- where its bytes are ----------------------------------------------

    def share_directory(self, share: Share, below: str = '') -> Path:
        """Return the directory of an export, or of a path below it."""
        top = self.directory / share.kind / name_of(share.server)
        for part in _parts(share.path) + _parts(below):
            top = top / name_of(part)
        return top

    def host_directory(self, host: str, path: str) -> Path:
        """Return where a path of one host lies, by the host's uuid."""
        top = self.directory / 'hosts' / name_of(host)
        for part in _parts(path):
            top = top / name_of(part)
        return top

    def lun_file(self, scsi_id: str) -> Path:
        """Return the file that holds a LUN's bytes."""
        return self.directory / 'luns' / name_of(scsi_id)

    def group_directory(self, where: str) -> Path:
        """Return where a volume group lies, by LUN or by disk's name."""
        return self.directory / 'groups' / name_of(where)

    def space(self, root: Path, size_bytes: int) -> Space:
        """Return the counted room of a directory; 0 means the disk's own."""
        with self._lock:
            space = self._spaces.get(root)
            if space is None:
                space = self._spaces[root] = Space(root, size_bytes)
            space.size_bytes = size_bytes
            return space

    # -- who uses what ----------------------------------------------------

    def take(self, what: str, pool: str) -> None:
        """Say that a pool uses a thing from now on.

        ``what`` names it, such as ``nfs/<server>/<path>/<sr uuid>``.
        """
        with self._locked():
            path = self._owner_path(what)
            owner = path.read_text() if path.exists() else ''
            if owner and owner != pool:
                with open(
                    self.directory / 'violations', 'a', encoding='utf-8',
                ) as file:
                    file.write(
                        f'pool {pool} uses {what} while pool {owner} does\n')
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pool)

    def give_back(self, what: str, pool: str) -> None:
        """Say that a pool uses a thing no more."""
        with self._locked():
            path = self._owner_path(what)
            if path.exists() and path.read_text() == pool:
                path.unlink()

    def owner(self, what: str) -> str:
        """Return the uuid of the pool that uses a thing, or ''."""
        path = self._owner_path(what)
        return path.read_text() if path.exists() else ''

    @property
    def violations(self) -> list[str]:
        """What two pools did to each other; a right run leaves it empty."""
        path = self.directory / 'violations'
        return path.read_text('utf-8').splitlines() if path.exists() else []

    def _owner_path(self, what: str) -> Path:
        return self.directory / 'owners' / quote(what, safe='')

    # -- the file ---------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock, open(self.directory / '.lock', 'w') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _changing(self) -> Iterator[dict[str, list[Any]]]:
        with self._locked():
            self._load()
            yield self._things
            path = self.directory / 'world.json'
            draft = path.with_suffix('.new')
            draft.write_text(json.dumps({
                kind: [dataclasses.asdict(one) for one in self._things[kind]]
                for kind in KINDS
            }, indent=1))
            draft.replace(path)
            self._read_ns = path.stat().st_mtime_ns

    def _load(self) -> None:
        path = self.directory / 'world.json'
        changed_ns = path.stat().st_mtime_ns if path.exists() else 0
        if changed_ns == self._read_ns:
            return
        found = json.loads(path.read_text()) if changed_ns else {}
        self._things = {
            kind: [_thing(cls, one) for one in found.get(kind, [])]
            for kind, cls in KINDS.items()
        }
        self._read_ns = changed_ns

    def _all(self, kind: str) -> list[Any]:
        with self._lock:
            self._load()
            return list(self._things[kind])


def _thing(cls: type[Any], found: dict[str, Any]) -> Any:
    """Make a thing of what JSON holds, which has no tuples."""
    return cls(**{
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
    })


def _key(kind: str, thing: Any) -> tuple[Any, ...]:
    return tuple(getattr(thing, name) for name in KEYS[kind])


def _parts(path: str) -> list[str]:
    return [part for part in path.replace('\\', '/').split('/') if part]


def _stretch(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab') as file:
        if file.tell() < size_bytes:
            file.truncate(size_bytes)
