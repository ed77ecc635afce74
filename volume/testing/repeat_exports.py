# SPDX-License-Identifier: Apache-2.0
"""The exporter fault suite: spoil every act of every method, then repeat it.

For each method of an exporter, for each act of it on the machine, for each
fault: run the method, let the fault come up; whatever it has left, nobody
gets in who has not the attachment's secret. Then repeat it, after a crash by
a new exporter, and all must be as if nothing had happened; and once more,
with the end of the exports instead, as a flow's undo does it.

An author subclasses ``ExporterFaultSuite`` with ``unittest.TestCase``, says
how an exporter is made over a given node, and how a host reads.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from volume import errors
from volume import ids
from volume import model
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.base import Source
from volume.testing import faults
from volume.testing import workbench
from volume.testing.workbench import pattern

Deed = Callable[[Exporter], object]

ACTS_MAX = 400


class ExporterFaultSuite(workbench.Case):
    """Every method of an exporter may fail anywhere, and be called again."""

    size_bytes: ClassVar[int] = model.MIB
    host: ClassVar[model.Host] = model.Host(
        'one.example', ('127.0.0.1',), 'iqn.2024-01.example:one',
        'nqn.2014-08.org.nvmexpress:uuid:1d3c9fb5-9b42-4a2e-8d8b-0f6a4e0c7a11',
    )

    is_thorough: ClassVar[bool] = True
    """Whether all six faults of an act are tried, or the two that differ
    most: a refusal, and a death after it was done."""

    @abc.abstractmethod
    def make_node(self) -> faults.FaultyNode:
        """Return a node without a fault; its state directory is the same."""

    @abc.abstractmethod
    def make_exporter(self, node: faults.FaultyNode) -> Exporter:
        """Return an exporter over the node that was not checked yet."""

    @abc.abstractmethod
    def make_source(self, image: bytes) -> Source:
        """Return a volume of this node that holds the image."""

    @abc.abstractmethod
    def read(self, connection: model.Connection) -> bytes:
        """Return all bytes, as the host reads them."""

    def intrude(self, connection: model.Connection) -> bytes:
        """Read as one who knows all but the secret; raise if refused."""
        raise errors.Denied('there is no secret to be without')

    def return_to(self, connection: model.Connection) -> bytes:
        """Read as the host when its access has ended; raise if refused."""
        return self.read(connection)

    def leftovers(self) -> object:
        """Return what there is beyond what ``exported`` says.

        It must be equal before and after each run.
        """
        return None

    def setUp(self) -> None:
        super().setUp()
        exporter = self.start()
        self.images = [pattern(seed, self.size_bytes) for seed in (1, 2, 3)]
        self.wanted = [self.wish(exporter, image) for image in self.images]
        self.bystander = self.wanted.pop()
        self.connections: dict[str, model.Connection] = {}
        self.take(exporter.export(self.bystander), self.bystander)
        self.addCleanup(
            lambda: self.start().unexport(self.bystander.attachment_id)
        )
        self.empty = self.leftovers()

    # The scenes.

    def test_check(self) -> None:
        self.spoil(self.export, lambda e: e.check())

    def test_export(self) -> None:
        self.spoil(lambda e: None, self.export)

    def test_export_of_what_is_exported(self) -> None:
        self.spoil(self.export, self.export)

    def test_export_many(self) -> None:
        self.spoil(self.export, self.export_all)

    def test_unexport(self) -> None:
        self.spoil(
            self.export_all,
            lambda e: e.unexport(self.wanted[0].attachment_id),
        )

    def test_exported(self) -> None:
        self.spoil(self.export, lambda e: e.exported())

    # What scenes are made of.

    def export(self, exporter: Exporter) -> None:
        self.take(exporter.export(self.wanted[0]), self.wanted[0])

    def export_all(self, exporter: Exporter) -> None:
        found = exporter.export_many(self.wanted)
        for each in self.wanted:
            made = found[each.attachment_id]
            if isinstance(made, errors.VolumeError):
                raise made
            self.take(made, each)

    def take(self, connection: model.Connection, wanted: Export) -> None:
        self.connections[wanted.attachment_id] = connection

    # How a scene is played.

    def spoil(self, prepare: Deed, deed: Deed) -> None:
        """Do the deed with each fault, repeat it, and compare."""
        exporter = self.start()
        prepare(exporter)
        deed(exporter)
        wanted = self.describe(exporter)
        self.clear('undisturbed')
        for nth in range(1, ACTS_MAX):
            came_up = [
                self.play(fault, prepare, deed, wanted)
                for fault in faults.every(nth) if self.is_worth(fault)
            ]
            if not any(came_up):
                self.assertGreater(nth, 1, 'the deed does not use the node')
                return
        self.fail(f'over {ACTS_MAX} acts')

    def is_worth(self, fault: faults.Fault) -> bool:
        """Say whether to try a fault."""
        most = ('refused', False), ('crash', True)
        return self.is_thorough or (fault.kind, fault.is_late) in most

    def play(
        self, fault: faults.Fault, prepare: Deed, deed: Deed, wanted: object
    ) -> bool:
        """Play the scene once with a repetition, and once with an undo."""
        for is_undone in (False, True) if fault.kind == 'crash' else (False,):
            prepare(self.start())
            node = self.make_node()
            exporter = self.make_exporter(node)
            exporter.check()
            node.arm(fault)
            with contextlib.suppress(faults.Crash, errors.VolumeError):
                deed(exporter)
            words = f'{fault}, acts {node.trace}, undone: {is_undone}'
            came_up = node.fired
            self.assert_shut(words)
            if not is_undone:
                if fault.kind == 'crash':
                    exporter = self.start()
                node.arm(None)
                try:
                    deed(exporter)
                except errors.VolumeError as failed:
                    raise AssertionError(f'{words}: {failed!r}') from failed
                self.assertEqual(wanted, self.describe(exporter), words)
            self.clear(words)
        return came_up

    def start(self) -> Exporter:
        """Return an exporter as it is after the service has started anew."""
        exporter = self.make_exporter(self.make_node())
        exporter.check()
        return exporter

    def describe(self, exporter: Exporter) -> list[tuple[str, Any]]:
        """Return what is exported, and what each host reads."""
        return sorted(
            (attachment_id, hash(self.read(self.connections[attachment_id])))
            for attachment_id in exporter.exported()
        )

    def assert_shut(self, words: str) -> None:
        for each in self.wanted:
            connection = self.connections.get(each.attachment_id)
            if connection is not None:
                with self.assertRaises(Exception, msg=words):  # noqa: B017
                    self.intrude(connection)

    def clear(self, words: str) -> None:
        """End all but the bystander; nothing else may be left."""
        exporter = self.start()
        self.end(exporter, self.wanted)
        self.assertEqual(
            {self.bystander.attachment_id}, exporter.exported(), words
        )
        for each in self.wanted:
            connection = self.connections.get(each.attachment_id)
            if connection is not None:
                with self.assertRaises(Exception, msg=words):  # noqa: B017
                    self.return_to(connection)
        bystander = self.connections[self.bystander.attachment_id]
        self.assertEqual(self.images[2], self.read(bystander), words)
        self.assertEqual(self.empty, self.leftovers(), words)

    def end(self, exporter: Exporter, wanted: Sequence[Export]) -> None:
        for each in wanted:
            exporter.unexport(each.attachment_id)

    def wish(self, exporter: Exporter, image: bytes) -> Export:
        secrets = {
            name: ids.new().replace('-', '')[:16] for name in exporter.wants
        }
        return Export(
            ids.new(), ids.new(), self.make_source(image), self.host,
            model.Access.WRITE, self.size_bytes, secrets,
        )
