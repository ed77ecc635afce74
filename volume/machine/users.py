# SPDX-License-Identifier: Apache-2.0
"""Who uses a block device or a file: asked of the kernel, of all namespaces.

Used by is: a process that has it open, a mount, swap, a device that is built
on it (device-mapper, md, loop), and any of these on one of its partitions.
Only root sees it all. No file of a server is looked at but the one that is
asked about: another's may be dead, and its files keep who looks for ever.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence

from volume.machine.mounts import Mounts

# They keep devices open, or look into them, and use no byte of them.
WATCHERS = frozenset({
    'multipathd', 'systemd-udevd', '(udev-worker)', 'iscsid',
    # LVM and udev look for labels on every disk, and wait for dead ones.
    'pvs', 'pvscan', 'vgs', 'lvs', 'blkid',
})
BLOCK = '/sys/dev/block'
SHOWN_MAX = 8
DEAD = (errno.ENXIO, errno.ENODEV, errno.EIO, errno.ENOMEDIUM)


def users(path: str, known: Sequence[int] = ()) -> list[str]:
    """Say of each user what it is; nobody uses what is not there.

    With what is ``known`` of a file, its device and its inode, nothing is
    asked of the server that it lies with; the path has no links in it then.
    """
    if known:
        device, inode = known
        return _few([
            *_openers(path, device, inode), *_loops(path)
        ])
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return []
    if not stat.S_ISBLK(found.st_mode):
        key = (found.st_dev, found.st_ino)
        return _few([
            *_processes(set(), key, {found.st_ino}),
            *_loops(os.path.realpath(path)),
        ])
    devices = _with_partitions(found.st_rdev)
    named = [
        *_processes(devices, None, {found.st_ino, *_inodes(devices)}),
        *_mounts(devices), *_swaps(devices),
        *_holders(devices), *_loops_over(devices),
    ]
    # Asked last, and only said if nobody else could be named.
    if not named and _is_claimed(path):
        named = ['the kernel (it is mounted, or part of another device)']
    return _few(named)


def _few(named: list[str]) -> list[str]:
    # A mount has a line in each namespace that has it.
    return list(dict.fromkeys(named))[:SHOWN_MAX]


def _with_partitions(device: int, block: str = BLOCK) -> set[int]:
    found = {device}
    base = f'{block}/{_number(device)}'
    for name in _names(base):
        if os.path.exists(f'{base}/{name}/partition'):
            major, colon, minor = _text(f'{base}/{name}/dev').partition(':')
            if colon:  # else it has vanished meanwhile
                found.add(os.makedev(int(major), int(minor)))
    return found


def _inodes(devices: set[int]) -> Iterator[int]:
    """Yield the numbers of the files that stand for devices."""
    for device in devices:
        about = _text(f'{BLOCK}/{_number(device)}/uevent')
        for line in about.splitlines():
            name, _, value = line.partition('=')
            if name == 'DEVNAME':
                with contextlib.suppress(OSError):
                    yield os.stat(f'/dev/{value}').st_ino


def _processes(
    devices: set[int], file: tuple[int, int] | None, inodes: set[int]
) -> Iterator[str]:
    mounts, of = Mounts(), file[0] if file else None
    for pid in _pids():
        for fd in _names(f'/proc/{pid}/fd'):
            if not mounts.may_look(pid, fd, of, inodes):
                continue
            try:
                found = os.stat(f'/proc/{pid}/fd/{fd}')
            except OSError:
                continue  # closed meanwhile
            if stat.S_ISBLK(found.st_mode):
                is_it = found.st_rdev in devices
            else:
                is_it = (found.st_dev, found.st_ino) == file
            if is_it and (name := _text(f'/proc/{pid}/comm')) not in WATCHERS:
                yield f'{name or "a process"} (pid {pid})'
                break


def _openers(path: str, device: int, inode: int) -> Iterator[str]:
    mounts = Mounts()
    for pid in _pids():
        if any(
            mounts.is_file(pid, fd, path, device, inode)
            for fd in _names(f'/proc/{pid}/fd')
        ):
            yield f'{_text(f"/proc/{pid}/comm") or "a process"} (pid {pid})'


def _mounts(devices: set[int]) -> Iterator[str]:
    numbers = {_number(device) for device in devices}
    seen: set[str] = set()
    for pid in _pids():
        try:
            space = os.readlink(f'/proc/{pid}/ns/mnt')
        except OSError:
            continue
        if space in seen:
            continue
        seen.add(space)
        for line in _text(f'/proc/{pid}/mountinfo').splitlines():
            fields = line.split(' ')
            if len(fields) > 4 and fields[2] in numbers:
                yield f'mounted on {fields[4]}'


def _swaps(devices: set[int]) -> Iterator[str]:
    for line in _text('/proc/swaps').splitlines()[1:]:
        path, kind = line.split()[:2]
        if kind != 'partition':
            continue
        try:
            found = os.stat(path)
        except OSError:
            continue
        if stat.S_ISBLK(found.st_mode) and found.st_rdev in devices:
            yield f'swap on {path}'


def _holders(devices: set[int]) -> Iterator[str]:
    for device in sorted(devices):
        for name in _names(f'{BLOCK}/{_number(device)}/holders'):
            called = _text(f'/sys/block/{name}/dm/name')
            yield f'device {name}' + (f' ({called})' if called else '')


def _loops(path: str) -> Iterator[str]:
    for name, backing in _backing_files():
        if backing == path:
            yield f'device {name}'


def _loops_over(devices: set[int]) -> Iterator[str]:
    """Yield loop devices over any of these; they hold it as no other does.

    The kernel has no descriptor, no holder and no claim of it.
    """
    for name, backing in _backing_files():
        # No other file is looked at: its server may be dead.
        if backing.startswith('/dev/'):
            with contextlib.suppress(OSError):
                found = os.stat(backing)
                if stat.S_ISBLK(found.st_mode) and found.st_rdev in devices:
                    yield f'device {name}'


def _backing_files() -> Iterator[tuple[str, str]]:
    for name in _names('/sys/block'):
        if name.startswith('loop'):
            backing = _text(f'/sys/block/{name}/loop/backing_file')
            if backing:
                yield name, backing


def _is_claimed(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as failed:
        # The kernel looks for another's claim before it asks the device,
        # which may have nothing behind it any more.
        if failed.errno in DEAD:
            return False
        if failed.errno != errno.EBUSY:
            raise
        return True
    os.close(fd)
    return False


def _pids() -> list[str]:
    return [name for name in _names('/proc') if name.isdecimal()]


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _text(path: str) -> str:
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            return f.read().strip()
    except OSError:
        return ''


def _number(device: int) -> str:
    return f'{os.major(device)}:{os.minor(device)}'
