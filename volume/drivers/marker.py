# SPDX-License-Identifier: Apache-2.0
"""Knowing a pool's directory again: an empty mount point is no empty pool.

A random id stands in the directory (``.volume-pool``) and, outside of it, in
the node's state directory. Whoever remembers an id and finds none looks at a
mount point without its file system: every volume would seem to be gone, and
a deletion done.

The marker comes first and the record after it, so a crash in between leaves
a marker that the next check remembers. Neither is ever replaced: of two that
make one at once the first wins, and both remember what is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re

from volume import errors
from volume import ids
from volume.node import Node

NAME = '.volume-pool'


def check(node: Node, directory: str) -> None:
    """Refuse a directory that has lost its pool.

    :raises Invalid: a pool was there, and none or another is there now
    """
    record = _record(node, directory)
    remembered = _read(node, record)
    if remembered is None:
        return
    found = _read(node, os.path.join(directory, NAME))
    if found != remembered:
        now = f'has pool {found:.80} now' if found else 'has none now'
        raise errors.Invalid(
            f'directory {directory} had a pool with id {remembered:.80}, and '
            f'{now}: mount the right one; if it was emptied or replaced on '
            f'purpose, remove {record}'
        )


def keep(node: Node, directory: str) -> None:
    """Have the marker, and remember it.

    :raises Invalid: there is something else by its name
    """
    path = os.path.join(directory, NAME)
    # A full disk is no reason to serve nothing: the next check tries again.
    with contextlib.suppress(errors.NoSpace):
        if _read(node, path) is None:
            _place(node, path, ids.new())
        found = _read(node, path)
        if found is None or not ids.is_id(found):
            raise errors.Invalid(
                f'{path} holds no id of a pool: look at it, and remove it'
            )
        record = _record(node, directory)
        if _read(node, record) is None:
            node.make_directory(os.path.dirname(record))
            _place(node, record, f'{found}\n{directory}')
        _sweep(node, path)
        _sweep(node, record)


def _record(node: Node, directory: str) -> str:
    digest = hashlib.sha256(directory.encode()).hexdigest()
    return os.path.join(node.state_dir, 'pools', digest)


def _read(node: Node, path: str) -> str | None:
    """Return the first line; None if there is no such file."""
    try:
        text = node.read(path).decode(errors='replace')
    except errors.NotFound:
        return None
    return text.partition('\n')[0].strip()


def _place(node: Node, path: str, text: str) -> None:
    """Put a small file there, whole and durably, unless one is there."""
    draft = f'{path}.{ids.new()}.new'
    try:
        _draft(node, draft, text, path)
    except (errors.Invalid, errors.NotFound) as failed:
        # Without the draft's name: who asks again is told the same, so that
        # it is logged once.
        raise type(failed)(str(failed).replace(draft, path)) from failed


def _draft(node: Node, draft: str, text: str, path: str) -> None:
    try:
        with node.open(draft, 'xb') as file:
            file.write(f'{text}\n'.encode())
            file.sync()
        node.link(draft, path)
    finally:
        node.unlink(draft)  # which makes the other name durable as well


def _sweep(node: Node, path: str) -> None:
    """Remove drafts of the file, which is there."""
    directory, name = os.path.split(path)
    draft = re.compile(rf'{re.escape(name)}\.[0-9a-f-]{{36}}\.new')
    for left in filter(draft.fullmatch, node.list(directory)):
        node.unlink(os.path.join(directory, left))
