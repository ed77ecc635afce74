# SPDX-License-Identifier: Apache-2.0
"""Merging of hidden layers, one at a time, under other work.

A hidden layer with one child only makes the way to the bytes longer. There
are two ways to be rid of it, and the one that copies less is taken:

* *pull*: the parent's bytes are copied into the child, whose header then
  names what was below the parent. QEMU does both under one lock of its own,
  and the bytes below are never changed.
* *commit*: the child's bytes are copied into the parent, which nobody else
  can see; then all that named the child is made to name the parent.

Either may be killed anywhere, by a power cut or by a caller that wants one
of the layers (``PoolDirectory.end_merges``): what the child reads as never
changes. The copying is done without the pool's lock; QEMU's own locks keep
everybody else away from both files, and they keep us away from open ones.

A volume may be opened and written between the end of a commit and the
switch to the parent. So the child's time of change is set to a mark before,
and the switch is made only if the mark is still there while nobody can open
the child. Where several things have to be switched, a record is made first
(``merges/``), from which another process goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator

from volume import errors
from volume.drivers import qcow_layers
from volume.drivers.qcow_pool import PoolDirectory
from volume.drivers.qcow_tree import Tree
from volume.node import CommandFailed

CHILDREN_MAX = 64  # so many are made to name another layer, no more
BATCH = 8  # and so many while the pool is locked
HASTE = 4
SPARE_BYTES = 64 << 20
TIME_MAX_S = 24 * 3600.0
MARK_NS = 1_000_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Merge:
    """Two layers that can become one."""

    child: str
    parent: str
    below: str | None
    is_pull: bool
    bytes: int


def tend(pool: PoolDirectory, bytes_per_s: int) -> bool:
    """Sweep, and merge one pair of layers; say if another can be merged."""
    blocking = pool.node.blocking
    with pool.lock():
        directory = blocking(
            lambda: os.open(pool.path('merges'), os.O_RDONLY)
        )
    try:
        try:
            blocking(lambda: (
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ))
        except BlockingIOError:
            return False  # somebody else is at it
        return _tend(pool, bytes_per_s)
    finally:
        blocking(lambda: os.close(directory))


def _tend(pool: PoolDirectory, bytes_per_s: int) -> bool:
    with pool.lock():
        pool.sweep()
        records = _records(pool)
    for child, parent in records:
        _finish(pool, child, parent)
    with pool.lock():
        merge = _choose(pool)
        if merge is None:
            return False
        if not merge.is_pull:
            _mark(pool, merge.child)
    done = (_pull if merge.is_pull else _commit)(pool, merge, bytes_per_s)
    with pool.lock():
        return done and _choose(pool) is not None


# Which.


def _choose(pool: PoolDirectory) -> Merge | None:
    """Return the merge that copies least; None if there is none."""
    tree = pool.tree()
    if not tree.is_certain():
        return None
    untouchable = _untouchable(pool, tree)
    found = []
    for parent in tree.hidden():
        children = tree.children.get(parent, set())
        if len(children) == 1 and not untouchable & {parent, *children}:
            found.append(_merge(tree, min(children), parent))
    found.sort(key=lambda merge: (merge.bytes, merge.child))
    if not found:
        return None
    free_bytes = pool.node.space(pool.directory).free_bytes
    for merge in found:
        if merge.bytes + SPARE_BYTES > free_bytes:
            return None
        if not pool.is_used(merge.child) and not pool.is_used(merge.parent):
            return merge
    return None


def _merge(tree: Tree, child: str, parent: str) -> Merge:
    pull_bytes = tree.allocated_bytes(parent)
    commit_bytes = tree.allocated_bytes(child)
    # A pull onto a third layer cannot be slowed down: it has to save a lot.
    weight = HASTE if tree.backing(parent) else 1
    is_pull = (
        pull_bytes * weight <= commit_bytes
        or len(tree.children.get(child, ())) > CHILDREN_MAX
    )
    return Merge(
        child, parent, tree.backing(parent), is_pull,
        pull_bytes if is_pull else commit_bytes,
    )


def _untouchable(pool: PoolDirectory, tree: Tree) -> set[str]:
    recorded = {name for pair in _records(pool) for name in pair}
    return recorded | _known_outside(pool, tree)


def _known_outside(pool: PoolDirectory, tree: Tree) -> set[str]:
    """Return the layers whose paths somebody may have."""
    names = pool.node.list(pool.path('mapped'))
    mapped = {f'volumes/{name}' for name in names}
    found: set[str] = set()
    for name, pointers in tree.names.items():
        if mapped & pointers or any(
            pointer.startswith('disowned/') for pointer in pointers
        ):
            found.update(tree.chain(name))
    return found


def _records(pool: PoolDirectory) -> list[tuple[str, str]]:
    """Return child and parent of each commit that was recorded."""
    found = []
    for child in pool.node.list(pool.path('merges')):
        parent = pool.target(f'merges/{child}')
        if parent is not None and qcow_layers.NAME.fullmatch(child):
            found.append((child, parent))
    return found


# How.


def _pull(pool: PoolDirectory, merge: Merge, bytes_per_s: int) -> bool:
    path, below = pool.layer_path(merge.child), merge.below
    # Written through: the header must not reach the disk before the bytes.
    words = ['-t', 'writethrough', '-b', below or '']
    if below:
        # With a filter in between, QEMU finds no neighbour by its name.
        words += ['-F', 'qcow2', '-f', 'qcow2', path]
    elif not bytes_per_s:
        words += ['-f', 'qcow2', path]
    else:
        words += [
            '--object', f'throttle-group,id=rate,x-bps-write={bytes_per_s}',
            '--image-opts',
            'driver=qcow2,file.driver=throttle,file.throttle-group=rate,'
            'file.file.driver=file,file.file.filename='
            + path.replace(',', ',,'),
        ]
    with _ended() as ended:
        _heal(pool, merge.child)
        pool.qemu_img('rebase', '-q', *words, timeout_s=TIME_MAX_S)
        pool.sync(path)
        ended.append(True)
    if not ended:
        return False
    with pool.lock():
        pool.free(pool.tree(), merge.parent)
    return True


def _commit(pool: PoolDirectory, merge: Merge, bytes_per_s: int) -> bool:
    rate = ('-r', str(bytes_per_s)) if bytes_per_s else ()
    with _ended() as ended:
        _heal(pool, merge.parent)
        # -d: the child keeps its bytes, and so is right whatever happens.
        pool.qemu_img(
            'commit', '-q', '-d', '-f', 'qcow2', *rate,
            pool.layer_path(merge.child), timeout_s=TIME_MAX_S,
        )
        pool.sync(pool.layer_path(merge.parent))
        ended.append(True)
    if not ended:
        return False
    with pool.lock():
        tree = pool.tree()
        if not _is_committed(pool, tree, merge):
            return False
        pointers = tree.names.get(merge.child, set())
        for pointer in pointers:
            if pointer.startswith('volumes/'):
                return _switch(pool, pointer, merge)
        pool.point(f'merges/{merge.child}', merge.parent)
    return _finish(pool, merge.child, merge.parent)


def _heal(pool: PoolDirectory, name: str) -> None:
    """Find again the space that an earlier, killed merge has lost.

    :raises Corrupt: the layer is damaged; nothing may be written to it
    """
    try:
        pool.qemu_img(
            'check', '-q', '-r', 'leaks', '-f', 'qcow2',
            pool.layer_path(name), timeout_s=TIME_MAX_S,
        )
    except CommandFailed as failed:
        if failed.is_ended:
            raise
        raise errors.Corrupt(
            f'layer {name} of pool {pool.name} is damaged and is not merged '
            f'({failed}): look at it with qemu-img check'
        ) from failed


@contextlib.contextmanager
def _ended() -> Iterator[list[bool]]:
    """Swallow that somebody opened, removed or wanted the layers."""
    try:
        yield []
    except (errors.Busy, errors.NotFound):
        return
    except CommandFailed as failed:
        if not failed.is_ended:
            raise


def _is_committed(pool: PoolDirectory, tree: Tree, merge: Merge) -> bool:
    """Say whether the parent holds what the child does, for nobody else."""
    child, parent = merge.child, merge.parent
    return (
        child in tree.layers and parent in tree.layers
        and tree.backing(child) == parent
        and tree.size_bytes(child) == tree.size_bytes(parent)
        and not tree.names.get(parent)
        and tree.children.get(parent) == {child}
        and not _untouchable(pool, tree) & {child, parent}
        and _is_marked(pool, child)
    )


def _switch(pool: PoolDirectory, pointer: str, merge: Merge) -> bool:
    """Have a volume write to the parent from now on."""
    path = pool.layer_path(merge.child)
    closed = contextlib.ExitStack()
    try:
        pool.node.blocking(
            lambda: closed.enter_context(qcow_layers.keep_closed(path))
        )
        if not _is_marked(pool, merge.child):
            return False
        pool.point(pointer, merge.parent)
        pool.node.unlink(path)
    except errors.Busy:
        return False
    finally:
        pool.node.blocking(closed.close)
    return True


def _finish(pool: PoolDirectory, child: str, parent: str) -> bool:
    """Have all that needs the child need its parent, as it was recorded."""
    while True:
        with pool.lock():
            tree = pool.tree()
            pointers = tree.names.get(child, set())
            if tree.backing(child) != parent or any(
                pointer.startswith('volumes/') for pointer in pointers
            ):
                # Gone meanwhile, or not what was recorded.
                pool.node.unlink(pool.path('merges', child))
                return False
            if child in _known_outside(pool, tree):
                return False
            children = sorted(tree.children.get(child, ()))[:BATCH]
            if not children:
                for pointer in sorted(pointers):
                    pool.point(pointer, parent)
                pool.node.unlink(pool.layer_path(child))
                pool.node.unlink(pool.path('merges', child))
                return True
            for name in children:
                if not _put_onto(pool, name, parent):
                    return False


def _put_onto(pool: PoolDirectory, name: str, parent: str) -> bool:
    """Have a layer stand on the parent; False if it is open."""
    if pool.is_used(name):
        return False
    path = pool.layer_path(name)
    with _ended() as ended:
        pool.qemu_img(
            'rebase', '-q', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b', parent,
            path,
        )
        pool.sync(path)
        ended.append(True)
    return bool(ended)


# The mark.


def _mark(pool: PoolDirectory, name: str) -> None:
    path = pool.layer_path(name)
    pool.node.act(f'mark {name}', lambda: pool.node.blocking(
        lambda: os.utime(path, ns=(MARK_NS, MARK_NS))
    ))


def _is_marked(pool: PoolDirectory, name: str) -> bool:
    path = pool.layer_path(name)
    return pool.node.act(f'probe mark {name}', lambda: pool.node.blocking(
        lambda: os.stat(path).st_mtime_ns == MARK_NS
    ))
