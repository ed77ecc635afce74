# SPDX-License-Identifier: Apache-2.0
"""What lies in a pool of the qcow driver and is not ours, and taking it in.

Foreign are the plain files right in the pool's directory, if they have its
format, and the volumes that were let go. Other people's files are read
warily: a header that names another file is refused before QEMU sees it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re

from volume import errors
from volume import ids
from volume import model
from volume.drivers import qcow_layers
from volume.drivers.qcow_layers import FORMATS
from volume.drivers.qcow_pool import PoolDirectory
from volume.drivers.qcow_tree import Tree
from volume.node import CommandFailed
from volume.node import Limits

CHECK_MAX_S = 600.0
OURS = re.compile(r'(volumes|snapshots)/[0-9a-f@-]+')


def foreign(
    pool: PoolDirectory, tree: Tree, extension: str
) -> list[model.Found]:
    """Return the plain files of the pool's format. The pool is locked."""
    ours = {layer.inode for layer in tree.layers.values()}
    found = []
    for name in pool.node.list(pool.directory):
        path = pool.path(name)
        if not _is_plain(name) or not pool.node.is_file(path):
            continue
        with contextlib.suppress(errors.Corrupt, OSError):
            inode, header = pool.node.blocking(functools.partial(
                _look, path, extension
            ))
            if inode in ours:
                continue  # half adopted: it is a layer already
            found.append(model.Found(name, header.size_bytes))
    return found


def take(
    pool: PoolDirectory, handle: str, pointer: str, extension: str
) -> None:
    """Make what the handle means the volume of a pointer.

    :raises NotFound: there is no such thing
    :raises Conflict: it is ours, or the volume exists
    :raises Invalid: it cannot be a volume, and why
    """
    is_file = _is_plain(handle) and pool.node.exists(pool.path(handle))
    if is_file:
        _check(pool, handle, extension)
    with pool.lock():
        if is_file:
            _take_file(pool, handle, pointer, extension)
        else:
            _take_pointer(pool, handle, pointer)


def _is_plain(handle: str) -> bool:
    """Say whether it may be the name of a file right in the pool."""
    return (
        bool(handle) and not handle.startswith('.') and '/' not in handle
        and '\0' not in handle
    )


def _look(path: str, extension: str) -> tuple[int, qcow_layers.Header]:
    """Return the inode and the header of a file."""
    header = qcow_layers.read_header(path, extension)
    return os.lstat(path).st_ino, header


def _check(pool: PoolDirectory, handle: str, extension: str) -> None:
    path = pool.path(handle)
    if not pool.node.is_file(path):
        raise errors.Invalid(f'{handle} is no plain file')
    try:
        _, header = pool.node.blocking(lambda: _look(path, extension))
        if header.backing:
            raise errors.Invalid(
                f'{handle} stands on another file: flatten it first'
            )
        if pool.node.blocking(lambda: qcow_layers.is_used(path)):
            raise errors.Busy(f'{handle} is open: close it first')
        if extension in ('qcow2', 'vmdk'):
            pool.qemu_img(
                'check', '-q', '-f', FORMATS[extension].driver, path,
                limits=Limits(cpu_s=int(CHECK_MAX_S)), timeout_s=CHECK_MAX_S,
            )
    except errors.Corrupt as odd:
        raise errors.Invalid(str(odd)) from odd
    except CommandFailed as failed:
        raise errors.Invalid(
            f'{handle} is damaged ({failed}): repair it with qemu-img check '
            '-r all'
        ) from failed
    except OSError as failed:
        raise errors.Invalid(
            f'{handle} cannot be read: {os.strerror(failed.errno or 0)}'
        ) from failed


def _take_file(
    pool: PoolDirectory, handle: str, pointer: str, extension: str
) -> None:
    """Make a foreign file a layer: it has both names for a moment.

    A sweep in between removes the layer's name, and never the bytes.
    """
    path = pool.path(handle)
    active = pool.target(pointer)
    if active is None:
        active = qcow_layers.new_name(extension)
        pool.link(path, active)
        pool.point(pointer, active)
    elif not pool.is_same_file(path, active):
        raise errors.Conflict(
            f'{pool.path(pointer)} exists: {handle} cannot become it'
        )
    pool.node.unlink(path)


def _take_pointer(pool: PoolDirectory, handle: str, pointer: str) -> None:
    is_disowned = handle.startswith('disowned/') and ids.is_id(
        handle.partition('/')[2]
    )
    is_known = is_disowned or OURS.fullmatch(handle) is not None
    if is_known and handle != pointer and pool.target(handle):
        if not is_disowned:
            raise errors.Conflict(f'{handle} is ours already')
        if pool.target(pointer):
            raise errors.Conflict(
                f'{pool.path(pointer)} exists: {handle} cannot become it'
            )
        pool.node.rename(pool.path(handle), pool.path(pointer))
    elif pool.target(pointer):
        return  # a repeated call
    elif is_known or _is_plain(handle):
        raise errors.NotFound(f'pool {pool.name} has no {handle}')
    else:
        raise errors.Invalid(
            f'{handle!r:.200} is not the plain name of a file in the pool'
        )
