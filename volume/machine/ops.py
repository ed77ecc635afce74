# SPDX-License-Identifier: Apache-2.0
"""Small operations on configfs and sysfs, to be done in a row.

The kernel's settings are files that cannot be replaced: a directory that is
made is an object, what is written into an attribute is a command. Each
operation may be repeated. What ``put`` writes may be a secret, and stands in
no message.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Mapping

from volume import errors
from volume.commands import MEANING

GET_BYTES_MAX = 1 << 20

Result = str | bool | list[str] | None

# Here the kernel has refused, whatever it means elsewhere.
REFUSED: Mapping[int, type[errors.VolumeError]] = {
    errno.EINVAL: errors.Invalid,
    errno.ENOTEMPTY: errors.Busy,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """One operation: its verb, its path, and what it writes or points to."""

    verb: str
    path: str
    text: str = dataclasses.field(default='', repr=False)

    @classmethod
    def mkdir(cls, path: str) -> Op:
        """Make a directory; nothing, if it is there."""
        return cls('mkdir', path)

    @classmethod
    def rmdir(cls, path: str) -> Op:
        """Remove a directory; nothing, if it is gone."""
        return cls('rmdir', path)

    @classmethod
    def put(cls, path: str, text: str) -> Op:
        """Write into a file that is there, in one piece."""
        return cls('put', path, text)

    @classmethod
    def get(cls, path: str) -> Op:
        """Read a text, without its last newline; None if it is not there."""
        return cls('get', path)

    @classmethod
    def link(cls, path: str, target: str) -> Op:
        """Point to the target; nothing, if it does already."""
        return cls('link', path, target)

    @classmethod
    def unlink(cls, path: str) -> Op:
        """Remove a link or file; nothing, if it is gone."""
        return cls('unlink', path)

    @classmethod
    def exists(cls, path: str) -> Op:
        """Say whether the name is there."""
        return cls('exists', path)

    @classmethod
    def list(cls, path: str) -> Op:
        """Return the names in a directory, sorted; None if it is not there."""
        return cls('list', path)


def run(op: Op) -> Result:
    """Do it on this machine.

    :raises VolumeError: the kernel refused; the message has no secret
    """
    if op.verb not in VERBS:
        raise errors.Invalid(f'{op.verb!r:.40} is no operation')
    for path in (op.path, *([op.text] if op.verb == 'link' else [])):
        if not os.path.isabs(path) or '\0' in path:
            raise errors.Invalid(
                f'cannot {op.verb} {path!r:.400}: give it from the root'
            )
    try:
        return VERBS[op.verb](op)
    except OSError as failed:
        code = failed.errno or 0
        kind = REFUSED.get(code) or MEANING.get(code, errors.Unknown)
        raise kind(
            f'cannot {op.verb} {op.path}: {os.strerror(code)}'
        ) from failed


def _mkdir(op: Op) -> None:
    try:
        os.mkdir(op.path)
    except FileExistsError:
        if not os.path.isdir(op.path):
            raise


def _rmdir(op: Op) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(op.path)


def _put(op: Op) -> None:
    # Truncated as a shell does it; the kernel's attributes do not mind.
    fd = os.open(op.path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        data = op.text.encode()
        if os.write(fd, data) != len(data):
            raise OSError(errno.EIO, 'taken in part')
    finally:
        os.close(fd)


def _get(op: Op) -> str | None:
    try:
        with open(op.path, 'rb') as f:
            data = f.read(GET_BYTES_MAX + 1)
    except OSError as failed:
        # ENODEV: it goes as it is read.
        if failed.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return None
    if len(data) > GET_BYTES_MAX:
        raise errors.Invalid(f'{op.path} is over {GET_BYTES_MAX} bytes')
    return data.decode(errors='replace').removesuffix('\n')


def _link(op: Op) -> None:
    try:
        os.symlink(op.text, op.path)
    except FileExistsError:
        # configfs tells a relative way to what was given from the root.
        if os.path.realpath(op.path) != os.path.realpath(op.text):
            raise


def _unlink(op: Op) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(op.path)


def _exists(op: Op) -> bool:
    try:
        os.lstat(op.path)
    except FileNotFoundError:
        return False
    return True


def _list(op: Op) -> builtins.list[str] | None:
    try:
        return sorted(os.listdir(op.path))
    except FileNotFoundError:
        return None


VERBS: Mapping[str, Callable[[Op], Result]] = {
    'mkdir': _mkdir, 'rmdir': _rmdir, 'put': _put, 'get': _get,
    'link': _link, 'unlink': _unlink, 'exists': _exists, 'list': _list,
}
