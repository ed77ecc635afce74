# SPDX-License-Identifier: Apache-2.0
"""The exporter suite: the contract of ``exports/base.py`` as tests.

Subclass ``ExporterSuite`` together with ``unittest.TestCase``; say how an
exporter is made, how a source with given bytes is, and how a host opens a
connection. Each test is a claim in plain words.
"""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import json
from collections.abc import Iterator
from typing import ClassVar, Protocol

from volume import errors
from volume import ids
from volume import model
from volume import vault
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.base import Source
from volume.testing import workbench
from volume.testing.workbench import pattern


class Session(Protocol):
    """A host that has a connection open. What fails raises an Exception."""

    def read(self, offset_bytes: int, length_bytes: int) -> bytes: ...

    def write(self, offset_bytes: int, data: bytes) -> None: ...

    def close(self) -> None: ...


class ExporterBench(workbench.Case):
    """What tests of an exporter work with, those of the suite and others."""

    size_bytes: ClassVar[int] = model.MIB
    host: ClassVar[model.Host] = model.Host(
        'one.example', ('127.0.0.1',), 'iqn.2024-01.example:one',
        'nqn.2014-08.org.nvmexpress:uuid:1d3c9fb5-9b42-4a2e-8d8b-0f6a4e0c7a11',
    )
    other_host: ClassVar[model.Host] = model.Host(
        'two.example', ('127.0.0.2',), 'iqn.2024-01.example:two',
        'nqn.2014-08.org.nvmexpress:uuid:2e4dafc6-ac53-4b3f-9e9c-1a7b5f1d8b22',
    )

    @abc.abstractmethod
    def make_exporter(self) -> Exporter:
        """Return an exporter that was not checked yet.

        Called again in the same test it is the service started anew.
        """

    @abc.abstractmethod
    def make_source(self, image: bytes) -> Source:
        """Return a volume of this node that holds the image."""

    @abc.abstractmethod
    def open_session(self, connection: model.Connection) -> Session:
        """Open the connection as its host does."""

    def setUp(self) -> None:
        super().setUp()
        self.exporter = self.make_exporter()
        self.exporter.check()
        self._volume_ids: dict[str, str] = {}
        self._secrets: dict[str, dict[str, str]] = {}
        self.image = pattern(1, self.size_bytes)
        self.source = self.make_source(self.image)
        self.before = self.exporter.exported()
        self.addCleanup(self._check_nothing_left)

    def _check_nothing_left(self) -> None:
        self.assertEqual(self.before, self.exporter.exported())

    def attachment(self) -> str:
        """Return a new attachment's id, ended with the test."""
        attachment_id = ids.new()
        self.addCleanup(lambda: self.exporter.unexport(attachment_id))
        return attachment_id

    def wanted(
        self,
        attachment_id: str,
        source: Source | None = None,
        access: model.Access = model.Access.WRITE,
        host: model.Host | None = None,
    ) -> Export:
        """Return what is to be exported; its secrets are the attachment's.

        Each source is a volume of its own, with an id for the test.
        """
        source = source or self.source
        secrets = self._secrets.setdefault(attachment_id, {
            name: vault.new_secret() for name in self.exporter.wants
        })
        return Export(
            attachment_id,
            self._volume_ids.setdefault(repr(source), ids.new()),
            source, host or self.host, access, self.size_bytes, secrets,
        )

    def export(
        self,
        attachment_id: str,
        source: Source | None = None,
        access: model.Access = model.Access.WRITE,
        host: model.Host | None = None,
    ) -> model.Connection:
        return self.exporter.export(
            self.wanted(attachment_id, source, access, host)
        )

    @contextlib.contextmanager
    def session(self, connection: model.Connection) -> Iterator[Session]:
        with contextlib.closing(self.open_session(connection)) as session:
            yield session

    def read(self, connection: model.Connection) -> bytes:
        with self.session(connection) as session:
            return session.read(0, self.size_bytes)

    def assert_closed(self, connection: model.Connection) -> None:
        """Fail if a host gets a byte through the connection."""
        with self.assertRaises(Exception):  # noqa: B017 (any refusal will do)
            self.read(connection)


class ExporterSuite(ExporterBench):
    """What holds for every exporter."""

    def test_check_may_be_repeated(self) -> None:
        connection = self.export(self.attachment())
        self.exporter.check()
        self.assertEqual(self.image, self.read(connection))

    def test_what_it_reads_is_what_it_says_that_it_reads(self) -> None:
        if isinstance(self.source, model.Device):
            self.assertIn(self.source.form, self.exporter.forms)
        for form in set(model.Form) - self.exporter.forms:
            device = model.Device(
                '/nowhere', form is model.Form.BLOCK,
                'qcow2' if form is model.Form.IMAGE else 'raw',
            )
            with self.assertRaises(errors.Unsupported):
                self.export(self.attachment(), device)

    def test_options_are_explained_in_one_sentence(self) -> None:
        for option in type(self.exporter).options:
            first = (option.help or '').splitlines()[:1]
            self.assertRegex(''.join(first), r'^.{1,79}\.$', option.name)

    def test_host_reads_the_bytes_of_the_volume(self) -> None:
        connection = self.export(self.attachment())
        self.assertEqual(self.image, self.read(connection))

    def test_host_writes_and_another_session_reads_it(self) -> None:
        connection = self.export(self.attachment())
        with self.session(connection) as session:
            session.write(4096, b'\xff' * 512)
        wanted = self.image[:4096] + b'\xff' * 512 + self.image[4608:]
        self.assertEqual(wanted, self.read(connection))

    def test_read_only_connection_cannot_be_written_through(self) -> None:
        if not self.exporter.abilities.read_only:
            self.skipTest('the exporter cannot refuse writes')
        connection = self.export(
            self.attachment(), access=model.Access.READ
        )
        with self.assertRaises(Exception):  # noqa: B017
            with self.session(connection) as session:
                session.write(0, b'\xff' * 512)
        self.assertEqual(self.image, self.read(connection))

    def test_connection_is_data(self) -> None:
        connection = self.export(self.attachment())
        self.assertTrue(connection.protocol)
        fields = dict(connection.fields)
        self.assertEqual(fields, json.loads(json.dumps(fields)))

    def test_export_repeated_is_the_same_connection(self) -> None:
        attachment_id = self.attachment()
        connection = self.export(attachment_id)
        with self.session(connection) as session:
            self.assertEqual(connection, self.export(attachment_id))
            self.assertEqual(self.image[:512], session.read(0, 512))

    def test_attachment_of_another_volume_is_a_conflict(self) -> None:
        attachment_id = self.attachment()
        connection = self.export(attachment_id)
        other = self.make_source(pattern(2, self.size_bytes))
        with self.assertRaises(errors.Conflict):
            self.export(attachment_id, other)
        self.assertEqual(self.image, self.read(connection))

    def test_source_that_is_absent_is_refused(self) -> None:
        attachment_id = self.attachment()
        gone = model.Device('/nowhere/at/all', is_block=False)
        with self.assertRaises(errors.VolumeError):
            self.export(attachment_id, gone)
        self.assertNotIn(attachment_id, self.exporter.exported())

    def test_unexport_of_what_is_gone_succeeds(self) -> None:
        attachment_id = self.attachment()
        self.exporter.unexport(attachment_id)
        self.export(attachment_id)
        for _ in range(2):
            self.exporter.unexport(attachment_id)

    def test_exported_are_those_that_are_exported_now(self) -> None:
        one, two = self.attachment(), self.attachment()
        self.assertFalse({one, two} & self.exporter.exported())
        self.export(one)
        self.export(two)
        self.assertLessEqual({one, two}, self.exporter.exported())
        self.exporter.unexport(one)
        self.assertEqual({two}, {one, two} & self.exporter.exported())

    def test_connection_reads_no_more_after_its_end(self) -> None:
        if not self.exporter.abilities.ends_sessions:
            self.skipTest('the host reaches the volume without the exporter')
        attachment_id = self.attachment()
        connection = self.export(attachment_id)
        self.exporter.unexport(attachment_id)
        self.assert_closed(connection)

    def test_open_session_is_ended_by_unexport_or_keeps_it_busy(self) -> None:
        attachment_id = self.attachment()
        with self.session(self.export(attachment_id)) as session:
            self.assertEqual(self.image[:512], session.read(0, 512))
            if self.exporter.abilities.ends_sessions:
                self.exporter.unexport(attachment_id)
                with self.assertRaises(Exception):  # noqa: B017
                    session.read(0, 512)
            else:
                with self.assertRaises(errors.Busy):
                    self.exporter.unexport(attachment_id)
                self.assertIn(attachment_id, self.exporter.exported())

    def test_end_of_one_attachment_leaves_the_other_s_access(self) -> None:
        one, two = self.attachment(), self.attachment()
        first = self.export(one)
        second = self.export(two, host=self.other_host)
        with self.session(second) as session:
            self.exporter.unexport(one)
            self.assertEqual(self.image[:512], session.read(0, 512))
        self.assertEqual(self.image, self.read(second))
        if self.exporter.abilities.ends_sessions:
            self.assert_closed(first)

    def test_volume_can_be_exported_again_after_the_end(self) -> None:
        attachment_id = self.attachment()
        for _ in range(3):
            connection = self.export(attachment_id)
            self.assertEqual(self.image, self.read(connection))
            self.exporter.unexport(attachment_id)

    def test_exports_outlive_the_service(self) -> None:
        if not self.exporter.outlives_service:
            self.skipTest('exports end with the service')
        attachment_id = self.attachment()
        connection = self.export(attachment_id)
        with self.session(connection) as session:
            self.exporter = self.make_exporter()
            self.exporter.check()
            self.assertIn(attachment_id, self.exporter.exported())
            self.assertEqual(self.image[:512], session.read(0, 512))
        self.assertEqual(connection, self.export(attachment_id))
        self.exporter.unexport(attachment_id)
        self.assertNotIn(attachment_id, self.exporter.exported())

    def test_many_are_exported_side_by_side(self) -> None:
        images = [pattern(seed, self.size_bytes) for seed in range(6)]
        sources = [self.make_source(image) for image in images]
        names = [self.attachment() for _ in sources]
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            connections = list(threads.map(self.export, names, sources))
            found = list(threads.map(self.read, connections))
            list(threads.map(self.exporter.unexport, names[:3]))
        self.assertEqual(images, found)
        self.assertEqual(set(names[3:]), self.exporter.exported())
