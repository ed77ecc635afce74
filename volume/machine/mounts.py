# SPDX-License-Identifier: Apache-2.0
"""Where an open file lies: told by its mount, without a look at the file.

A look at a file asks the server that it lies with, and one that is dead
never answers; nobody can end the wait. What ``/proc`` says of a descriptor
is known to the kernel itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection

NETWORK = frozenset({
    '9p', 'afs', 'beegfs', 'ceph', 'cifs', 'fuse', 'glusterfs', 'lustre',
    'ncpfs', 'nfs', 'nfs4', 'orangefs', 'smb3', 'smbfs', 'virtiofs',
})


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """A mount's file system; ``is_far`` if its files lie with a server."""

    device: int
    is_far: bool


class Mounts:
    """The mounts of all processes; each table is read when it is needed."""

    def __init__(self) -> None:
        self._known: dict[str, Mount] = {}
        self._read: set[tuple[str, str]] = set()

    def may_look(
        self, pid: str, fd: str, device: int | None, inodes: Collection[int]
    ) -> bool:
        """Say whether what a process has open can be looked at safely.

        And whether it is worth it: a file of a server only if it is of the
        file system that is asked about. A mount that is in no table was
        taken away while it was in use (as that of a dead server is), or is
        beyond the root of its process (as that of a daemon's devices may
        be): there only what has the number of one of ``inodes``.
        """
        try:
            if not os.readlink(f'/proc/{pid}/fd/{fd}').startswith('/'):
                return False  # a pipe, a socket and the like
        except OSError:
            return False  # closed meanwhile
        mount, inode = self._place(pid, fd)
        if mount is not None:
            return not mount.is_far or mount.device == device
        # Kernels before 5.14 do not tell it.
        return inode is None or inode in inodes

    def is_file(
        self, pid: str, fd: str, path: str, device: int, inode: int
    ) -> bool:
        """Say whether what a process has open is this file, without a look.

        By its number on its file system; and by its name, where the kernel
        does not tell both.
        """
        try:
            link = os.readlink(f'/proc/{pid}/fd/{fd}')
        except OSError:
            return False  # closed meanwhile
        mount, found = self._place(pid, fd)
        if not link.startswith('/') or found not in (None, inode):
            return False
        if mount is not None and mount.device != device:
            return False
        name = os.path.basename(link.removesuffix(' (deleted)'))
        is_told = mount is not None and found is not None
        return is_told or name == os.path.basename(path)

    def _place(self, pid: str, fd: str) -> tuple[Mount | None, int | None]:
        """Return on which mount an open file lies, and its number there.

        Each is None if nobody tells it.
        """
        info = dict(
            line.split(':', 1) for line in
            _text(f'/proc/{pid}/fdinfo/{fd}').splitlines() if ':' in line
        )
        inode = info.get('ino', '').strip()
        return (
            self._find(pid, info.get('mnt_id', '').strip()),
            int(inode) if inode else None,
        )

    def _find(self, pid: str, mount_id: str) -> Mount | None:
        if mount_id not in self._known:
            self._learn(pid)
        return self._known.get(mount_id)

    def _learn(self, pid: str) -> None:
        try:
            view = (os.readlink(f'/proc/{pid}/ns/mnt'),
                    os.readlink(f'/proc/{pid}/root'))
        except OSError:
            return
        if view in self._read:
            return
        self._read.add(view)
        for line in _text(f'/proc/{pid}/mountinfo').splitlines():
            about, _, rest = line.partition(' - ')
            fields, kind = about.split(' '), rest.split(' ')[0]
            major, _, minor = fields[2].partition(':')
            self._known[fields[0]] = Mount(
                os.makedev(int(major), int(minor)),
                kind in NETWORK or kind.startswith('fuse.'),
            )


def _text(path: str) -> str:
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            return f.read()
    except OSError:
        return ''
