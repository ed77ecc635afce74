# SPDX-License-Identifier: Apache-2.0
"""What the error numbers of librados and librbd mean: one table.

A number that may come when the work was done in part, or wholly, is
``Unknown`` after an act and ``Unavailable`` after a question.
"""

from __future__ import annotations

import errno

from volume import errors

TABLE: dict[int, tuple[type[errors.VolumeError], str]] = {
    errno.ENOENT: (errors.NotFound, 'it is not there'),
    errno.EEXIST: (errors.Conflict, 'it exists already'),
    errno.EBUSY: (errors.Busy, 'it is in use'),
    errno.ENOTEMPTY: (errors.Busy, 'it has snapshots'),
    errno.ENOSPC: (errors.NoSpace, 'the cluster or pool is full'),
    errno.EDQUOT: (errors.NoSpace, 'the quota of the pool is reached'),
    errno.EPERM: (errors.Denied, 'the capabilities of the user forbid it'),
    errno.EACCES: (errors.Denied, 'the user or its key is refused'),
    errno.EROFS: (
        errors.Unsupported,
        'the image is read-only: a mirror, or a snapshot'),
    errno.EINVAL: (errors.Invalid, 'it is not valid'),
    errno.EDOM: (errors.Invalid, 'a value is out of range'),
    errno.ENAMETOOLONG: (errors.Invalid, 'a name is too long'),
    errno.EFBIG: (errors.Invalid, 'it is too large'),
    errno.ENOSYS: (errors.Unsupported, 'the cluster cannot'),
    errno.EOPNOTSUPP: (errors.Unsupported, 'the cluster cannot'),
    errno.ENOEXEC: (
        errors.Unsupported, 'the image has a feature that librbd lacks'),
    errno.EILSEQ: (errors.Corrupt, 'the bytes fail their checksum'),
}

# It may have happened.
OPEN: dict[int, str] = {
    errno.ETIMEDOUT: 'the cluster did not answer in time',
    errno.ESHUTDOWN: 'this client was put on the list of blocked ones',
    errno.ENOTCONN: 'this client is not connected',
    errno.EIO: 'the storage has failed',
    errno.EAGAIN: 'the cluster asks to try again',
    errno.EINTR: 'the call was interrupted',
    errno.ECANCELED: 'the work was cancelled',
}

# The connection is of no use any more.
LOST = frozenset({errno.ESHUTDOWN, errno.ENOTCONN})


def code(failed: BaseException) -> int:
    """Return the error number; the two libraries differ in its sign."""
    found = getattr(failed, 'errno', None)
    return abs(found) if isinstance(found, int) else 0


def mean(
    what: str, failed: BaseException, is_act: bool
) -> errors.VolumeError:
    """Return the failure as one of our errors, with itself as the cause."""
    number = code(failed)
    told: errors.VolumeError
    if number in TABLE:
        kind, words = TABLE[number]
        told = kind(f'{what}: {words}')
    else:
        words = OPEN.get(number) or f'{type(failed).__name__} {number}'
        told = (errors.Unknown if is_act else errors.Unavailable)(
            f'{what}: {words}'
        )
    told.__cause__ = failed
    return told


def no_connection(
    who: str, failed: BaseException
) -> errors.VolumeError:
    """Say why there is no connection, and what to do."""
    number = code(failed)
    if number in (errno.EPERM, errno.EACCES):
        return errors.Denied(
            f'the cluster refuses {who}: make the user, and see that its '
            'keyring is the one that the file names'
        )
    if number == errno.ENOENT:
        return errors.Unavailable(
            f'cannot connect as {who}: the file, or the keyring that it '
            'names, is not there'
        )
    words = OPEN.get(number) or f'{type(failed).__name__} {number}'
    return errors.Unavailable(f'cannot connect as {who}: {words}')
