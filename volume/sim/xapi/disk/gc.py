# SPDX-License-Identifier: Apache-2.0
"""The garbage collector of a storage repository: chains get shorter.

Three things are done, the first that is found first: hidden files that
nobody needs are removed; a hidden file that is its parent's only child is
merged into the parent; and a disk that is its parent's only child, likewise
(*leaf-coalesce*). Whoever reads through a chain reads the same bytes before,
during and after, also if the process dies at any point: what is merged still
lies above its parent until all its children stand upon the parent.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from volume import errors
from volume.model import MIB
from volume.sim.xapi.disk import disks
from volume.sim.xapi.disk.chains import Chains
from volume.sim.xapi.disk.chains import Node
from volume.sim.xapi.failure import Failure

T = TypeVar('T')
LIVE_BYTES_MAX = 20 * MIB  # of a disk that is merged while its user waits
ROUNDS_MAX = 20
DELAY_S = 300.0
GARBAGE, COALESCE, LEAF = 'garbage', 'coalesce', 'leaf'
FAILURES = (errors.VolumeError, Failure, OSError)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What has changed: files that are no more, and those that differ."""

    gone: tuple[str, ...] = ()
    changed: tuple[Node, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What a repository allows, and whom it tells.

    ``may_leaf`` says whether a disk may be leaf-coalesced, ``room`` how many
    bytes are free. ``told`` gets a code, 44 for no space and 204 for a disk
    that grows faster than it is merged, the disk, and the bytes it is about.
    """

    coalesce: bool = True
    leaf_coalesce: bool = True
    may_leaf: Callable[[str], bool] = lambda uuid: True
    room: Callable[[], int] = lambda: 1 << 62
    told: Callable[[int, str, int], None] = lambda code, uuid, length: None
    live_bytes_max: int = LIVE_BYTES_MAX


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
    """Something to do; what is garbage has no parent here."""

    verb: str
    node: Node
    parent: Node | None = None


class Pass:
    """One run of the collector over a repository."""

    def __init__(
        self,
        chains: Chains,
        policy: Policy | None = None,
        aborted: Callable[[], bool] = disks.never,
    ) -> None:
        self._chains = chains
        self._policy = policy or Policy()
        self._aborted = aborted
        self._left_alone: set[str] = set()
        self._rounds: dict[str, list[int]] = {}

    def has_work(self) -> bool:
        """Say whether there is something to do."""
        with self._chains.lock:
            return next(self._tasks(), None) is not None

    def steps(self) -> Iterator[Step]:
        """Do what there is to do; each step is whole by itself."""
        while not self._aborted():
            try:
                step = self._step()
            except disks.Stopped:
                return
            if step is None:
                return
            if step.gone or step.changed:
                yield step

    def recover(self) -> None:
        """End what a dead process has begun; nothing is open yet."""
        chains = self._chains
        with chains.lock:
            chains.recover()
            for name, asked in chains.journals():
                if name == COALESCE:
                    if chains.has(asked['node']):
                        node = chains.node(asked['node'])
                        parent = chains.node(asked['parent'])
                        self._format(node).merge(node.path, parent.path)
                        self._take_out(node, parent)
                elif name == LEAF:
                    if chains.has(asked['base']):
                        self._merge_leaf(
                            chains.node(asked['leaf']),
                            chains.node(asked['base']),
                        )
                else:
                    continue
                chains.end_journal(name)

    def _tasks(self) -> Iterator[_Task]:
        nodes = self._chains.nodes()
        opened = {*self._chains.users.opened()}
        children: dict[str, list[Node]] = {}
        for node in nodes.values():
            children.setdefault(node.parent, []).append(node)
        needed = opened.union(children)
        for uuid, node in nodes.items():
            if node.is_hidden and uuid not in needed:
                yield _Task(GARBAGE, node)
        leaves = []
        for uuid, node in nodes.items():
            parent = nodes.get(node.parent)
            is_only = parent is not None and parent.is_hidden and (
                len(children[node.parent]) == 1)
            if node.is_hidden and uuid not in children:
                continue
            elif not is_only or uuid in self._left_alone:
                continue
            elif node.is_hidden:
                # Whoever has a base copy itself open wants it as it is.
                if self._policy.coalesce and not (
                    opened & {uuid, node.parent}
                ):
                    yield _Task(COALESCE, node, parent)
            elif node.parent not in opened:
                leaves.append(_Task(LEAF, node, parent))
        if self._policy.coalesce and self._policy.leaf_coalesce:
            for task in leaves:
                if self._policy.may_leaf(task.node.uuid):
                    yield task

    def _step(self) -> Step | None:
        """Do the first thing there is; None if there is none."""
        with self._chains.lock:
            tasks = self._tasks()
            task = next(tasks, None)
            if task is None:
                return None
            node, parent = task.node, task.parent
            if parent is None:
                # A look at all files for each would be long.
                return self._remove([node, *(
                    each.node for each in itertools.takewhile(
                        lambda each: each.verb == GARBAGE, tasks)
                )])
            if task.verb == LEAF:
                return self._coalesce_leaf(node, parent)
        return self._coalesce(node, parent)

    def _remove(self, nodes: list[Node]) -> Step:
        for node in nodes:
            self._chains.kernel.remove(node.path)
        return Step(tuple(node.uuid for node in nodes))

    def _coalesce(self, node: Node, parent: Node) -> Step:
        """Merge a hidden file into its parent, and take it out."""
        if not self._has_room(node, parent):
            return Step()
        chains, kind = self._chains, self._format(node)
        with chains.journal(COALESCE, node=node.uuid, parent=parent.uuid):
            if kind.merges_live:
                kind.merge(node.path, parent.path, self._aborted)
            else:
                with chains.lock, chains.users.paused(
                    chains.above(parent.uuid)
                ):
                    kind.merge(node.path, parent.path, self._aborted)
            with chains.lock:
                return self._take_out(node, parent)

    def _take_out(self, node: Node, parent: Node) -> Step:
        """Let the children of a file stand upon its parent; remove it."""
        chains = self._chains
        children = chains.children(node.uuid)
        with chains.users.paused(chains.above(node.uuid)):
            for child in children:
                self._format(child).relink(child.path, parent.path)
            chains.kernel.remove(node.path)
        return Step((node.uuid,), tuple(
            chains.node(each.uuid) for each in (parent, *children)
        ))

    def _coalesce_leaf(self, node: Node, base: Node) -> Step:
        """Merge a disk into its parent, which becomes the disk."""
        if node.used_bytes > self._policy.live_bytes_max:
            return self._shrink(node)
        if not self._has_room(node, base):
            return Step()
        chains = self._chains
        with chains.users.paused([node.uuid]):
            with chains.journal(LEAF, leaf=node.uuid, base=base.uuid):
                self._merge_leaf(node, base, self._aborted)
        return Step((base.uuid,), (chains.node(node.uuid),))

    def _merge_leaf(
        self,
        node: Node,
        base: Node,
        stop: Callable[[], bool] = disks.never,
    ) -> None:
        kind = self._format(node)
        kind.merge(node.path, base.path, stop)
        kind.hide(base.path, False)
        try:
            self._chains.kernel.rename(base.path, node.path)
        except OSError:
            kind.hide(base.path, True)
            raise

    def _shrink(self, node: Node) -> Step:
        """Put most of a large disk below it, to be merged in the next step.

        Its user writes on meanwhile: there may be several rounds of it.
        """
        rounds = self._rounds.setdefault(node.uuid, [])
        if len(rounds) >= ROUNDS_MAX or (
            rounds and node.used_bytes >= rounds[-1]
        ):
            self._left_alone.add(node.uuid)
            self._policy.told(204, node.uuid, node.used_bytes)
            return Step()
        rounds.append(node.used_bytes)
        return Step((), tuple(
            self._chains.snapshot(node.uuid, str(uuids.uuid4()))))

    def _has_room(self, node: Node, parent: Node) -> bool:
        extra = self._format(node).extra_bytes(node.path, parent.path)
        if extra <= self._policy.room():
            return True
        self._left_alone.add(node.uuid)
        self._policy.told(44, node.uuid, extra)
        return False

    def _format(self, node: Node) -> disks.Format:
        return self._chains.formats[node.format]


class Collector(Generic[T]):
    """Runs passes in a thread of its own, while there is something to do.

    ``work`` yields what was done and ends soon when ``aborted`` says so;
    ``report`` is told of each. Before a pass it waits for ``delay_s``, but
    for the first after ``start``. A pass that is paused is begun again.
    """

    def __init__(
        self,
        work: Callable[[Callable[[], bool]], Iterator[T]],
        has_work: Callable[[], bool],
        report: Callable[[T], None],
        delay_s: Callable[[], float] = lambda: DELAY_S,
    ) -> None:
        self._work = work
        self._has_work = has_work
        self._report = report
        self._delay_s = delay_s
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_asked = False
        self._is_first = True
        self._is_paused = False
        self._is_ending = False
        self.state = 'idle'  # or 'waiting', 'paused', 'working'
        self.last_error = ''

    def kick(self) -> None:
        """Say that there may be something to do."""
        with self._changed:
            self._is_asked = True
            self._changed.notify_all()
            if self._thread is None and not self._is_ending:
                self._thread = threading.Thread(
                    target=self._run, name='gc', daemon=True)
                self._thread.start()

    def pause(self) -> None:
        """Do nothing until ``resume``; what is half done is left."""
        with self._changed:
            self._is_paused = True
            self._changed.notify_all()

    def resume(self) -> None:
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def wake(self) -> None:
        """Look at the delay again: it was changed, or is over."""
        with self._changed:
            self._changed.notify_all()

    def abort(self, timeout_s: float = 60.0) -> None:
        """End, and return when it has; ``kick`` is in vain from now on.

        :raises Unavailable: it does not end
        """
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
            if not self._changed.wait_for(
                lambda: self._thread is None, timeout_s
            ):
                raise errors.Unavailable(
                    f'the collector did not end within {timeout_s:g} s')

    def wait(self, timeout_s: float = 60.0) -> bool:
        """Return whether it came to have nothing to do within a time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._thread is None, timeout_s)

    def _aborted(self) -> bool:
        if self._is_paused:
            self._is_asked = True  # the pass does not come to its end
        return self._is_ending or self._is_paused

    def _run(self) -> None:
        while self._next():
            try:
                for done in self._work(self._aborted):
                    self._report(done)
                self.last_error = ''
            except FAILURES as failed:
                self.last_error = str(failed)

    def _next(self) -> bool:
        """Wait until there is a pass to do; say whether there is one."""
        while True:
            with self._changed:
                if self._is_ending or not self._is_asked:
                    return self._end()
                self._is_asked = False
            if self._look():
                break
        with self._changed:
            began = time.monotonic()
            while not self._is_ending:
                left_s = began + self._delay_s() - time.monotonic()
                if self._is_paused:
                    self.state = 'paused'
                    self._changed.wait()
                elif self._is_first or left_s <= 0:
                    break
                else:
                    self.state = 'waiting'
                    self._changed.wait(left_s)
            self._is_first = self._is_asked = False
            self.state = 'working'
            return not self._is_ending or self._end()

    def _look(self) -> bool:
        try:
            return self._has_work()
        except FAILURES as failed:
            self.last_error = str(failed)
            return False

    def _end(self) -> bool:
        """Leave no thread behind; called with the condition held."""
        self.state = 'idle'
        self._thread = None
        self._changed.notify_all()
        return False
