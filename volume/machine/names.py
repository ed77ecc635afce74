# SPDX-License-Identifier: Apache-2.0
"""What can be done to a file by its name; each is one effect, or one look.

Plain functions whose first argument is a path, so that a node that is
another machine can name them in a request. What goes wrong is an OSError,
or one of our errors where the operating system's would say too little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import stat

from volume import errors

FICLONE = 0x40049409  # linux/fs.h
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
# What the kernel says of a file of its own whose device, client or process
# goes as it is opened or read.
GONE = (errno.ENODEV, errno.ENXIO, errno.ESRCH)
NO_REFLINK = (errno.EINVAL, errno.ENOTTY, errno.EXDEV, errno.EOPNOTSUPP)


@dataclasses.dataclass(frozen=True, slots=True)
class Space:
    """A file system's capacity; ``device`` is the same for the same one."""

    total_bytes: int
    free_bytes: int
    device: str


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What bears a name; a link is told of as one, and not followed."""

    kind: str
    """file, directory, link, block, or other."""
    size_bytes: int
    allocated_bytes: int
    modified_s: float
    device: str
    """Of a block device its own, ``major:minor``; else its file system's."""


KINDS = {
    stat.S_IFREG: 'file', stat.S_IFDIR: 'directory', stat.S_IFLNK: 'link',
    stat.S_IFBLK: 'block',
}


def about(path: str) -> About | None:
    """Return what bears the name; ``None`` if nothing does.

    Not by os.path.lexists: it takes any failure for absence, and "gone" is
    never guessed.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    kind = KINDS.get(stat.S_IFMT(found.st_mode), 'other')
    device = f'fs:{found.st_dev:x}'
    if kind == 'block':
        rdev = found.st_rdev
        device = f'{os.major(rdev)}:{os.minor(rdev)}'
    return About(
        kind, found.st_size, found.st_blocks * 512, found.st_mtime, device
    )


def exists(path: str) -> bool:
    return about(path) is not None


def is_file(path: str) -> bool:
    found = about(path)
    return found is not None and found.kind == 'file'


def is_block(path: str) -> bool:
    """Say whether the name is a block device, or a link to one."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def size(path: str) -> int:
    if not stat.S_ISBLK((found := os.stat(path)).st_mode):
        return found.st_size
    # A block device has no size there.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def space(path: str) -> Space:
    fs = os.statvfs(path)
    return Space(
        fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize,
        f'fs:{os.stat(path).st_dev:x}',
    )


def list_(path: str) -> list[str]:
    return sorted(os.listdir(path))


def older(path: str, age_s: float, others: list[str]) -> list[str]:
    """Return which names beside a path are older than it, by that much."""
    directory = os.path.dirname(path)
    oldest_s = os.lstat(path).st_mtime - age_s
    found = []
    for name in others:
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(os.path.join(directory, name)).st_mtime < oldest_s:
                found.append(name)
    return found


def mkdir(path: str) -> None:
    made = [path]
    while made[-1] and not os.path.isdir(made[-1]):
        made.append(os.path.dirname(made[-1]))
    os.makedirs(path, 0o700, exist_ok=True)
    for name in made[:-1]:
        sync_directory(name)


def read(path: str, bytes_max: int) -> bytes:
    try:
        with open(path, 'rb') as f:
            data = f.read(bytes_max + 1)
    except OSError as failed:
        if failed.errno not in GONE:
            raise
        raise FileNotFoundError(
            errno.ENOENT, os.strerror(errno.ENOENT), path) from failed
    if len(data) > bytes_max:
        raise errors.Invalid(f'{path} is over {bytes_max} bytes')
    return data


def write(path: str, data: bytes) -> None:
    draft = f'{path}.new'
    with open(draft, 'wb') as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(draft, path)
    sync_directory(path)


def rename(path: str, source: str) -> None:
    """Give ``source`` the name ``path``."""
    os.replace(source, path)
    sync_directory(path)
    if os.path.dirname(source) != os.path.dirname(path):
        sync_directory(source)


def unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sync_directory(path)


def readlink(path: str) -> str:
    return os.readlink(path)


def point(path: str, target: str) -> None:
    draft = f'{path}.new'
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)
    os.symlink(target, draft)
    os.replace(draft, path)
    sync_directory(path)


def link(path: str, draft: str) -> None:
    """Give ``draft`` its name, unless something has it already.

    It may lose its own: for what nobody uses yet.
    """
    try:
        os.link(draft, path)
    except (FileExistsError, FileNotFoundError):
        pass  # another was first, and may have swept the draft
    except OSError as failed:
        if failed.errno not in NO_LINKS:
            raise
        if not exists(path):
            os.rename(draft, path)


def hard_link(path: str, source: str) -> None:
    """Give a file that is in use a second name, unless something has it."""
    try:
        os.link(source, path)
    except FileExistsError:
        return
    except OSError as failed:
        if failed.errno not in NO_LINKS:
            raise
        raise errors.Unsupported(
            f'{os.path.dirname(path)} has no hard links: {failed.strerror}'
        ) from failed


def clone(path: str, source: str) -> None:
    """Make ``path`` share the bytes of ``source``."""
    with open(source, 'rb') as s, open(path, 'wb') as t:
        try:
            fcntl.ioctl(t.fileno(), FICLONE, s.fileno())
        except OSError as failed:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            if failed.errno in NO_REFLINK:
                raise errors.Unsupported(
                    f'{os.path.dirname(path)} has no reflink'
                ) from failed
            raise
        os.fsync(t.fileno())


def sync_directory(path: str) -> None:
    """Make durable which names the directory of a path has."""
    fd = os.open(os.path.dirname(path) or '.', os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
