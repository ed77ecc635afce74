# SPDX-License-Identifier: Apache-2.0
"""The owner of the one qemu-storage-daemon of this node.

Whoever wants an image opened, exported or put under an overlay while it is
in use asks here; nobody else speaks to the daemon. What is open and exported
is always asked of the daemon itself, never remembered: so a restarted
service sees what its predecessor did, and a fault leaves no second truth.

Two rules keep bytes right. A layer's node has a name that follows from its
whole chain (``blockgraph``), so an image can never be served over a wrong
chain. And an overlay for a snapshot has a name of another kind: opened, but
not yet on top of its image, nothing takes it for the volume.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from volume import blockdaemon
from volume import blockexports
from volume import blockgraph
from volume import errors
from volume import qmp
from volume.blockdaemon import Process
from volume.blockgraph import Graph
from volume.blockgraph import Layer
from volume.node import Node

# An export's id, its block node, and whether it may be written to.
Wanted = tuple[str, Mapping[str, Any], bool]

PRIVATE = 'p-'  # exports for our own readers and writers
ROUNDS = 5  # how often somebody else may close what we were about to use
END_S = 30.0

# What QEMU says when it refuses, and what it means to our caller.
MEANING: tuple[tuple[str, type[errors.VolumeError]], ...] = (
    ('Failed to get', errors.Busy),  # another process has the file's lock
    ('No such file', errors.NotFound),
    ('Permission denied', errors.Invalid),
    ('is busy', errors.Busy),
    ('is in use', errors.Busy),
    ('No space left', errors.NoSpace),
    ('not in qcow2 format', errors.Corrupt),
    ('corrupt', errors.Corrupt),
    ('Unsupported', errors.Unsupported),
    ('Unknown driver', errors.Unsupported),
)


class _Again(Exception):
    """A neighbour closed what was needed, or a leftover was in the way."""

    def __init__(self, error: errors.VolumeError) -> None:
        super().__init__(str(error))
        self.error = error


class Blockd:
    """One qemu-storage-daemon: it opens images and serves them by NBD."""

    def __init__(
        self, node: Node, directory: str, *, tcp: str | None = None
    ) -> None:
        """Keep where it lives; touch nothing yet.

        ``tcp`` is ``host:port`` of an NBD server on loopback; without it
        the server is a unix socket in ``directory``.

        :raises Invalid: ``tcp`` is no loopback address
        """
        self._node = node
        self._directory = os.path.realpath(directory)
        self._process = Process(node, self._directory, tcp)
        # Which private exports this process is using now: those of others
        # are leftovers of its predecessors.
        self._private: set[str] = set()
        self._private_lock = threading.Lock()

    def ensure(self) -> bool:
        """Have the daemon up: adopt the running one, or start one.

        True if it was started since the last call: its exports are gone,
        and whoever knows them exports them again.

        :raises Unavailable: it does not start, or does not answer
        """
        self.bring_up()
        return self._process.take_news()

    def bring_up(self) -> None:
        """As ``ensure``, for whoever restores nothing: no news is taken."""
        self._process.bring_up()

    def export(
        self, export_id: str, blocknode: Mapping[str, Any], writable: bool
    ) -> str:
        """Open the images and export them by NBD; return the NBD URI.

        The export's NBD name is ``export_id``. Repeated, it is the same
        URI. The images of a chain are opened once, however many exports
        use them. A daemon that is not running is started.

        :raises Conflict: the export exists, of another file or access
        :raises Busy: another process has a lock on one of the files
        :raises Corrupt: by its header a layer lies on another image
        """
        blockexports.check(export_id)
        layer = self._parse(blocknode)
        self._check_headers(layer)
        for _ in range(ROUNDS):
            with self._started() as monitor:
                try:
                    self._export(monitor, export_id, layer, writable)
                except _Again as again:
                    error = again.error
                else:
                    return self._process.uri(export_id)
        raise error

    def export_many(
        self, wanted: Sequence[Wanted]
    ) -> dict[str, str | errors.VolumeError]:
        """As ``export``, for many; return for each its URI, or what is wrong.

        What goes as on a daemon that has forgotten everything takes one
        exchange for all of them; what does not is exported by itself.

        :raises VolumeError: the daemon does not start, or does not answer
        """
        there = self._export_at_once(wanted)
        found: dict[str, str | errors.VolumeError] = {}
        for export_id, blocknode, writable in wanted:
            if export_id in there:
                found[export_id] = self._process.uri(export_id)
                continue
            try:
                found[export_id] = self.export(
                    export_id, blocknode, writable
                )
            except errors.VolumeError as failed:
                found[export_id] = failed
        return found

    def unexport(self, export_id: str) -> None:
        """End the export and its sessions, and close what only it used.

        Returns at once if it is gone, or if the daemon is not running.

        :raises Unknown: a request in flight hangs in the storage
        """
        blockexports.check(export_id)
        with self._running() as monitor:
            if monitor is None:
                return
            export = blockexports.find(monitor, export_id)
            if export is None:
                self._close_unused(monitor)
                return
            chain = _chain(monitor, export)
            with contextlib.suppress(qmp.Refused):
                # Refused: it is ending already. Waiting will tell.
                monitor.tell(
                    'block-export-del', id=export['id'], mode='hard'
                )
            self._await_end(monitor, export_id)
            for name in chain:
                if not _closed(monitor, name):
                    break

    def exports(self) -> dict[str, str]:
        """Return for each export id the file that is now on top."""
        with self._running() as monitor:
            if monitor is None:
                return {}
            graph = _graph(monitor, files=True)
            return {
                blockexports.id_of(export): graph.filename(export['node-name'])
                for export in monitor.ask('query-block-exports')
            }

    def export_ids(self) -> set[str]:
        """Return the ids of all exports: cheaper than ``exports``."""
        with self._running() as monitor:
            if monitor is None:
                return set()
            exports = monitor.ask('query-block-exports')
            return set(map(blockexports.id_of, exports))

    def is_open(self, path: str) -> bool:
        """Say whether the daemon has the file open, anywhere in a chain.

        The kernel says yes for a hundredth of what the daemon takes; a no
        is the daemon's. Whoever can ask for QEMU's locks does that first.
        """
        path = self._resolved(path)
        with self._running() as monitor:
            if monitor is None:
                return False
            if path in blockdaemon.files_of(self._node, monitor.pid):
                return True
            return path in _graph(monitor, files=True).files()

    def is_top(self, blocknode: Mapping[str, Any]) -> bool:
        """Say whether an export is of just this chain of images."""
        layer = self._parse(blocknode)
        names = {layer.name, layer.name_overlay}
        with self._running() as monitor:
            return monitor is not None and any(
                export['node-name'] in names
                for export in monitor.ask('query-block-exports')
            )

    def open_files(self) -> frozenset[str]:
        """Return the resolved paths of all files that the daemon has open."""
        with self._running() as monitor:
            if monitor is None:
                return frozenset()
            return _graph(monitor, files=True).files()

    def snapshot(self, active: str, overlay: str) -> None:
        """Put the qcow2 file ``overlay`` on top of the open ``active``.

        ``overlay`` exists, has the size of ``active`` and names it as its
        backing file. Exports go on, through the overlay. Repeat is safe.

        :raises NotFound: ``active`` is not open
        :raises Conflict: the overlay is open in another place, or
            ``active`` is under another image already
        :raises Invalid: the overlay has another size or backing file
        """
        active = self._resolved(active)
        overlay = self._resolved(overlay)
        with self._running() as monitor:
            graph = _graph(monitor, files=True) if monitor else None
            below = graph.layers_of(active) if graph else []
            if monitor is None or graph is None or not below:
                raise errors.NotFound(
                    f'{active} is not open in the block daemon; take the '
                    'snapshot without it'
                )
            for name in graph.layers_of(overlay):
                if graph.backing(name) in below:
                    return
                # Opened by a predecessor that got no further.
                if graph.is_used(name) or not _closed(monitor, name):
                    raise errors.Conflict(
                        f'{overlay} is open already, and not on {active}'
                    )
            tops = [name for name in below if not graph.is_backing(name)]
            if len(tops) != 1:
                raise errors.Conflict(
                    f'{active} is under another image already'
                )
            self._put_over(monitor, tops[0], active, overlay)

    def end_private(self) -> None:
        """End what our dead predecessors' readers and writers left.

        What readers and writers of this process use stays; what nobody uses
        is closed.
        """
        self.end_left()
        with self._running() as monitor:
            if monitor is not None:
                self._close_unused(monitor)

    def end_left(self) -> None:
        """End private exports that are nobody's: their end had failed.

        Safe beside work that goes on, which ``end_private`` is not: it
        closes images that another thread may have just opened.
        """
        for export_id in sorted(self.export_ids()):
            with self._private_lock:
                mine = export_id in self._private
            if export_id.startswith(PRIVATE) and not mine:
                self.unexport(export_id)

    @contextlib.contextmanager
    def private(
        self, export_id: str, blocknode: Mapping[str, Any], writable: bool
    ) -> Iterator[str]:
        """Export for our own use, as long as the context lasts."""
        assert export_id.startswith(PRIVATE)
        with self._private_lock:
            self._private.add(export_id)
        try:
            try:
                yield self.export(export_id, blocknode, writable)
            finally:
                self._end_private_export(export_id)
        finally:
            with self._private_lock:
                self._private.discard(export_id)

    def stop(self) -> None:
        """End the daemon; return at once if it is not running."""
        self._process.stop()

    # Ours alone.

    @contextlib.contextmanager
    def _started(self) -> Iterator[qmp.Monitor]:
        """Speak with the daemon; start it if it is not running."""
        with contextlib.ExitStack() as stack:
            try:
                monitor = stack.enter_context(
                    qmp.conversation(self._node, self._directory)
                )
            except qmp.NotRunning:
                # Not ensure(): who restores lost exports must still hear.
                self._process.bring_up()
                monitor = stack.enter_context(
                    qmp.conversation(self._node, self._directory)
                )
            yield monitor

    @contextlib.contextmanager
    def _running(self) -> Iterator[qmp.Monitor | None]:
        """Speak with the daemon; None if it is proved not to run."""
        with contextlib.ExitStack() as stack:
            monitor = None
            try:
                monitor = stack.enter_context(
                    qmp.conversation(self._node, self._directory)
                )
            except qmp.NotRunning:
                self._process.check_gone()
            yield monitor

    def _parse(self, blocknode: Mapping[str, Any]) -> Layer:
        return self._node.blocking(lambda: blockgraph.parse(blocknode))

    def _resolved(self, path: str) -> str:
        return self._node.blocking(lambda: os.path.realpath(path))

    def _check_headers(self, top: Layer) -> None:
        for layer in top.chain():
            if (layer.driver, layer.file['driver']) == ('qcow2', 'file'):
                with self._node.open(layer.filename) as file:
                    head = file.read(blockgraph.HEADER_BYTES) or b''
                self._node.blocking(functools.partial(
                    blockgraph.check_header, layer, head
                ))

    def _export_at_once(self, wanted: Sequence[Wanted]) -> set[str]:
        """Return what was not there and is now; the rest is looked at."""
        commands: list[qmp.Command] = []
        behind: dict[str, int] = {}
        below: set[str] = set()
        for export_id, blocknode, writable in wanted:
            with contextlib.suppress(errors.VolumeError):  # export() says it
                blockexports.check(export_id)
                layer = self._parse(blocknode)
                self._check_headers(layer)
                for each in reversed([*layer.chain()][1:]):
                    if each.name_below not in below:
                        below.add(each.name_below)
                        commands.append(('blockdev-add', each.qapi_below()))
                commands.append(('blockdev-add', layer.qapi(writable)))
                commands.append(blockexports.add(export_id, layer, writable))
                behind[export_id] = len(commands)
        with self._started() as monitor:
            replies = monitor.tell_all(commands)
            # Open before, it could be another's: that is looked at.
            done = {
                export_id for export_id, end in behind.items()
                if not any(
                    isinstance(reply, qmp.Refused)
                    for reply in replies[end - 2:end]
                )
            }
            if len(done) < len(wanted):
                self._close_unused(monitor)
        return done

    def _export(
        self, monitor: qmp.Monitor, export_id: str, layer: Layer,
        writable: bool,
    ) -> None:
        name = self._open(monitor, layer, writable)
        try:
            command, arguments = blockexports.add(export_id, layer, writable)
            monitor.tell(command, **{**arguments, 'node-name': name})
        except qmp.Refused as failed:
            if not self._is_exported(monitor, export_id, layer, writable):
                self._close_unused(monitor)
                raise _Again(_known(failed, layer.filename)) from failed

    def _open(
        self, monitor: qmp.Monitor, top: Layer, writable: bool
    ) -> str:
        """Have the chain open and return the name of its top node."""
        opened = []
        refusals: dict[str, qmp.Refused] = {}
        for layer in reversed([*top.chain()][1:]):
            try:
                monitor.tell('blockdev-add', **layer.qapi_below())
                opened.append(layer.name_below)
            except qmp.Refused as failed:
                # Open already, as a rule: the layer above will tell.
                refusals[layer.name_below] = failed
        try:
            monitor.tell('blockdev-add', **top.qapi(writable))
            return top.name
        except qmp.Refused as failed:
            refusals[top.name] = failed
        try:
            return self._opened(monitor, top, writable, refusals)
        finally:
            # Not needed if the top was open before: it has its own.
            for name in reversed(opened):
                _closed(monitor, name)

    def _opened(
        self, monitor: qmp.Monitor, top: Layer, writable: bool,
        refusals: Mapping[str, qmp.Refused],
    ) -> str:
        """Find the top among what is open, or say why it cannot be."""
        graph = _graph(monitor, files=True)
        name = top.name if top.name in graph.names else _overlay(graph, top)
        if name:
            if writable and graph.is_read_only(name):
                self._reopen(monitor, graph, name, top)
            return name
        for layer in reversed([*top.chain()][1:]):
            if layer.name_below not in graph.names:
                raise _why(refusals.get(layer.name_below), layer)
        leftovers = [
            name for name in graph.layers_of(top.filename)
            if not graph.is_used(name) and _closed(monitor, name)
        ]
        if leftovers:
            raise _Again(errors.Unavailable(f'{top.filename} was open'))
        raise _why(refusals[top.name], top)

    def _reopen(
        self, monitor: qmp.Monitor, graph: Graph, name: str, top: Layer
    ) -> None:
        """Make a layer that is open for reading writable."""
        if graph.is_backing(name) or name != top.name:
            raise errors.Busy(
                f'{top.filename} is under another open image: writing to it '
                'would change that one'
            )
        try:
            monitor.tell('blockdev-reopen', options=[top.reopen_qapi()])
        except qmp.Refused as failed:
            raise _known(failed, top.filename) from failed

    def _is_exported(
        self, monitor: qmp.Monitor, export_id: str, layer: Layer,
        writable: bool,
    ) -> bool:
        """Say whether it is there already, as it was asked for.

        :raises Conflict: it is there, and differs
        """
        export = blockexports.find(monitor, export_id)
        if export is None:
            return False
        graph = _graph(monitor, files=True)
        there = graph.filename(export['node-name'])
        if there == graph.filename(layer.name) or there == layer.filename:
            if blockexports.is_writable(export) == writable:
                return True
            there = f'{there} with another access'
        self._close_unused(monitor)
        raise errors.Conflict(
            f'export {export_id} is of {there}, not of {layer.filename}: '
            'end it first'
        )

    def _put_over(
        self, monitor: qmp.Monitor, name: str, active: str, overlay: str
    ) -> None:
        node = blockgraph.overlay_qapi(overlay)
        above = node['node-name']
        try:
            monitor.tell('blockdev-add', **node)
        except qmp.Refused as failed:
            raise _known(failed, overlay) from failed
        graph = _graph(monitor, files=True)
        try:
            self._node.blocking(lambda: _check_overlay(
                graph.image(above), graph.image(name), active
            ))
            monitor.tell('blockdev-snapshot', node=name, overlay=above)
        except errors.Unknown:
            raise
        except errors.VolumeError as failed:
            _closed(monitor, above)
            if isinstance(failed, qmp.Refused):
                raise _known(failed, overlay) from failed
            raise

    def _await_end(self, monitor: qmp.Monitor, export_id: str) -> None:
        deadline = time.monotonic() + END_S
        while blockexports.find(monitor, export_id) is not None:
            if time.monotonic() > deadline:
                raise errors.Unknown(
                    f'export {export_id} did not end within {END_S:g} s: a '
                    'request hangs in the storage; inspect the storage'
                )
            monitor.wait(0.05)

    def _close_unused(self, monitor: qmp.Monitor) -> None:
        """Close the layers that no export needs.

        A neighbour that has just opened one opens it again.
        """
        for _ in range(blockgraph.DEPTH_MAX):
            orphans = _graph(monitor).orphans()
            closed = [name for name in orphans if _closed(monitor, name)]
            if not closed:
                return

    def _end_private_export(self, export_id: str) -> None:
        for left in reversed(range(3)):
            try:
                self.unexport(export_id)
                return
            except errors.VolumeError as failed:
                if not left or not failed.retry:
                    raise


def _chain(
    monitor: qmp.Monitor, export: Mapping[str, Any]
) -> list[str]:
    """Return the nodes of an export from the top down."""
    name = str(export['node-name'])
    if blockexports.is_alone(export) and name.startswith('n'):
        return [name]
    return _graph(monitor).chain(name)


def _graph(monitor: qmp.Monitor, files: bool = False) -> Graph:
    nodes = (
        monitor.ask('query-named-block-nodes', flat=True) if files else ()
    )
    return Graph(monitor.ask('x-debug-query-block-graph'), nodes)


def _closed(monitor: qmp.Monitor, name: str) -> bool:
    """Close a node unless something needs it; say whether it is closed."""
    try:
        monitor.tell('blockdev-del', **{'node-name': name})
    except qmp.Refused:
        return False
    return True


def _overlay(graph: Graph, top: Layer) -> str:
    """Return the node that a snapshot put on top, if it is this chain."""
    wanted = [layer.filename for layer in top.chain()]
    for name in graph.layers_of(top.filename):
        if list(map(graph.filename, graph.chain(name))) == wanted:
            return name
    return ''


def _check_overlay(
    above: Mapping[str, Any], below: Mapping[str, Any], active: str
) -> None:
    path = above.get('filename')
    if above['virtual-size'] != below['virtual-size']:
        raise errors.Invalid(
            f'overlay {path} has {above["virtual-size"]} bytes, {active} '
            f'has {below["virtual-size"]}'
        )
    header = above.get('full-backing-filename', '')
    if os.path.realpath(header) != active:
        raise errors.Invalid(
            f'overlay {path} names {header!r:.200} as its backing file, not '
            f'{active}'
        )


def _why(refused: qmp.Refused | None, layer: Layer) -> Exception:
    """Return why a layer is not open: an error, or that it may yet be."""
    if refused is None:
        return _Again(errors.Unavailable(f'{layer.filename} was closed'))
    error = _known(refused, layer.filename)
    return _Again(error) if type(error) is errors.Unavailable else error


def _known(refused: qmp.Refused, path: str) -> errors.VolumeError:
    text = str(refused)
    for words, kind in MEANING:
        if words in text:
            return kind(f'{path}: {text}')
    return errors.Unavailable(f'{path}: {text}')
