# SPDX-License-Identifier: Apache-2.0
"""Who has an image open, by QEMU's own locks on the file.

QEMU locks bytes of an open image, whatever its format: from 100 on for what
it does, from 200 on for what it forbids others (block/file-posix.c). The
kernel tells of these locks whoever holds them; of a process of another user
/proc tells us nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from volume import errors

_LOCK = struct.Struct('@hhqqi4x')
_DONE_FIRST, _FORBIDDEN_FIRST, _KINDS = 100, 200, 64
_LOCKED_COUNT = _FORBIDDEN_FIRST + _KINDS - _DONE_FIRST
_WRITING = 101
_NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def probe(path: str) -> bool:
    """Say whether a QEMU has the file open; a file that is gone nobody has."""
    try:
        return is_used(path)
    except FileNotFoundError:
        return False


def is_used(path: str) -> bool:
    """Say whether a QEMU of any process has the file open."""
    return _is_locked(path, _DONE_FIRST, _LOCKED_COUNT)


def is_written(path: str) -> bool:
    """Say whether a QEMU of any process may write to the file."""
    return _is_locked(path, _WRITING, 1)


@contextlib.contextmanager
def keep_closed(path: str) -> Iterator[None]:
    """Let no QEMU open the file as long as the context lasts.

    :raises Busy: one has it open
    """
    with open(path, 'rb') as f:
        # As QEMU does: say what is forbidden, then look who does it.
        lock = _LOCK.pack(
            fcntl.F_RDLCK, os.SEEK_SET, _FORBIDDEN_FIRST, _KINDS, 0
        )
        try:
            fcntl.fcntl(f.fileno(), fcntl.F_OFD_SETLK, lock)
        except OSError as failed:
            if failed.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise _is_open(path) from failed
        if _has_lock(f.fileno(), _DONE_FIRST, _LOCKED_COUNT):
            raise _is_open(path)
        yield


def _is_open(path: str) -> errors.Busy:
    return errors.Busy(f'{os.path.basename(path)} is open: close it first')


def _is_locked(path: str, first: int, count: int) -> bool:
    with open(path, 'rb') as f:
        return _has_lock(f.fileno(), first, count)


def _has_lock(fd: int, first: int, count: int) -> bool:
    """Say whether another than this descriptor holds a lock there."""
    asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    except OSError as failed:
        if failed.errno in _NO_LOCKS:
            return False  # nobody's: QEMU does without them there as well
        raise
    return bool(_LOCK.unpack(answer)[0] != fcntl.F_UNLCK)
