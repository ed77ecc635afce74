# SPDX-License-Identifier: Apache-2.0
"""Snapshots of images that the block daemon has open."""

from __future__ import annotations

import contextlib
import os
import unittest
from collections.abc import Callable, Iterator
from typing import TypeVar

from tests.integration.blockd_case import BlockdCase
from tests.integration.blockd_case import MIB
from tests.integration.blockd_case import run
from tests.integration.blockd_case import SIZE
from volume import errors
from volume.blockd import Blockd
from volume.node import Node

T = TypeVar('T')


class SnapshotTest(BlockdCase):
    def overlay(self, name: str, below: str) -> str:
        # As the driver does it: the active image is open, and locked.
        path = self.path(name)
        run(
            'qemu-img', 'create', '-q', '-u', '-f', 'qcow2',
            '-b', self.path(below), '-F', 'qcow2', path, str(SIZE),
        )
        return path

    def test_bytes_from_before_the_snapshot_are_read_through_the_export(
        self
    ) -> None:
        self.qcow2('a')
        old, new = os.urandom(MIB), os.urandom(MIB)
        uri = self.blockd.export('one', self.chain('a'), True)
        client = self.client(uri)
        client.pwrite(old, 0)
        client.pwrite(old, 4 * MIB)
        client.flush()
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        client.pwrite(new, 4 * MIB)
        client.flush()
        whole = old + bytes(3 * MIB) + new + bytes(3 * MIB)
        buffer = bytearray(SIZE)
        client.pread_into(buffer, 0)
        self.assertEqual(whole, buffer)
        self.assertEqual(whole, self.copied(uri))
        # And the snapshot is what was there before.
        snapshot = self.blockd.export('s', self.chain('a'), False)
        self.assertEqual(
            old + bytes(3 * MIB) + old + bytes(3 * MIB),
            self.copied(snapshot),
        )

    def test_snapshot_again_changes_nothing(self) -> None:
        self.qcow2('a')
        uri = self.blockd.export('one', self.chain('a'), True)
        overlay = self.overlay('b', 'a')
        self.blockd.snapshot(self.path('a'), overlay)
        self.write(uri, b'later')
        self.blockd.snapshot(self.path('a'), overlay)
        self.assertEqual(b'later', self.read(uri, 5))
        self.assertEqual({'one': overlay}, self.blockd.exports())
        # Also when there is a later one on top.
        self.blockd.snapshot(overlay, self.overlay('c', 'b'))
        self.blockd.snapshot(self.path('a'), overlay)
        self.assertEqual({'one': self.path('c')}, self.blockd.exports())

    def test_all_exports_of_the_volume_go_on_through_the_overlay(
        self
    ) -> None:
        self.qcow2('a')
        one = self.blockd.export('one', self.chain('a'), True)
        two = self.blockd.export('two', self.chain('a'), False)
        overlay = self.overlay('b', 'a')
        self.blockd.snapshot(self.path('a'), overlay)
        self.write(one, b'x')
        self.assertEqual(b'x', self.read(two, 1))
        self.assertEqual(
            {'one': overlay, 'two': overlay}, self.blockd.exports()
        )

    def test_volume_is_exported_again_over_its_new_layer(self) -> None:
        self.qcow2('a')
        one = self.blockd.export('one', self.chain('a'), True)
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        chain = self.chain('b', 'a')
        two = self.blockd.export('two', chain, True)
        self.assertEqual(one, self.blockd.export('one', chain, True))
        self.write(two, b'by two')
        self.assertEqual(b'by two', self.read(one, 6))
        self.blockd.unexport('one')
        self.assertEqual(b'by two', self.read(two, 6))
        self.blockd.unexport('two')
        self.assertEqual(frozenset(), self.blockd.open_files())
        three = self.blockd.export('three', chain, True)
        self.assertEqual(b'by two', self.read(three, 6))

    def test_clone_of_the_snapshot_is_exported_beside_the_volume(
        self
    ) -> None:
        self.qcow2('a')
        one = self.blockd.export('one', self.chain('a'), True)
        self.write(one, b'old')
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        self.overlay('clone', 'a')
        self.write(one, b'new')
        clone = self.blockd.export('clone', self.chain('clone', 'a'), True)
        self.assertEqual(b'old', self.read(clone, 3))
        self.write(clone, b'own')
        self.assertEqual(b'new', self.read(one, 3))
        self.assertEqual(b'own', self.read(clone, 3))

    def test_layer_under_an_open_one_is_not_opened_for_writing(self) -> None:
        self.qcow2('a')
        self.blockd.export('one', self.chain('a'), True)
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        with self.assertRaises(errors.Busy):
            self.blockd.export('two', self.chain('a'), True)

    def test_layer_that_is_written_to_is_not_opened_under_another(
        self
    ) -> None:
        self.qcow2('a')
        self.blockd.export('one', self.chain('a'), True)
        self.overlay('b', 'a')
        with self.assertRaises(errors.Busy):
            self.blockd.export('two', self.chain('b', 'a'), True)

    def test_crash_at_any_step_is_mended_by_repeating(self) -> None:
        for number, (what, before) in enumerate(
            (what, before)
            for what in ('qmp blockdev-add', 'qmp blockdev-snapshot')
            for before in (True, False)
        ):
            with self.subTest(what=what, before=before):
                self._mended(f'a{number}', f'b{number}', what, before)

    def _mended(
        self, active: str, overlay: str, what: str, before: bool
    ) -> None:
        self.qcow2(active)
        uri = self.blockd.export(active, self.chain(active), True)
        self.write(uri, b'old')
        self.overlay(overlay, active)
        self.node.what, self.node.before = what, before
        with self.assertRaises(errors.VolumeError):
            self.blockd.snapshot(self.path(active), self.path(overlay))
        self.assertEqual(b'old', self.read(uri, 3))
        # The service was restarted.
        later = Blockd(Node(self.root), self.directory)
        later.snapshot(self.path(active), self.path(overlay))
        self.assertEqual(self.path(overlay), later.exports()[active])
        self.assertEqual(b'old', self.read(uri, 3))

    def test_overlay_left_by_a_crash_is_never_served_without_its_base(
        self
    ) -> None:
        self.qcow2('a')
        self.write(self.blockd.export('one', self.chain('a'), True), b'old')
        self.overlay('b', 'a')
        self.node.what, self.node.before = 'qmp blockdev-snapshot', True
        with contextlib.suppress(errors.Unknown), self._refusal_is_lost():
            self.blockd.snapshot(self.path('a'), self.path('b'))
        self.assertTrue(self.blockd.is_open(self.path('b')))
        self.blockd.unexport('one')
        uri = self.blockd.export('one', self.chain('b', 'a'), True)
        self.assertEqual(b'old', self.read(uri, 3))

    @contextlib.contextmanager
    def _refusal_is_lost(self) -> Iterator[None]:
        """Nothing of ours runs after the refusal, as in a crash."""
        act = self.node.act

        class Crash(BaseException):
            pass

        def dying(what: str, effect: Callable[[], T]) -> T:
            if what == 'qmp blockdev-snapshot':
                raise Crash
            return act(what, effect)

        self.node.act = dying  # type: ignore[method-assign]
        try:
            with contextlib.suppress(Crash):
                yield
        finally:
            del self.node.act  # type: ignore[method-assign]

    def test_overlay_of_another_size_or_base_is_refused(self) -> None:
        self.qcow2('a')
        self.qcow2('other')
        uri = self.blockd.export('one', self.chain('a'), True)
        run('qemu-img', 'create', '-q', '-u', '-f', 'qcow2', '-b',
            self.path('a'), '-F', 'qcow2', self.path('large'), '16M')
        for bad in self.path('large'), self.overlay('b', 'other'):
            with self.assertRaises(errors.Invalid):
                self.blockd.snapshot(self.path('a'), bad)
            self.assertFalse(self.blockd.is_open(bad))
        self.write(uri, b'x')
        self.assertEqual({'one': self.path('a')}, self.blockd.exports())

    def test_snapshot_of_what_is_not_open_is_not_found(self) -> None:
        self.qcow2('a')
        self.overlay('b', 'a')
        for _ in range(2):
            with self.assertRaises(errors.NotFound):
                self.blockd.snapshot(self.path('a'), self.path('b'))
            self.blockd.ensure()

    def test_second_overlay_on_a_layer_is_a_conflict(self) -> None:
        self.qcow2('a')
        self.blockd.export('one', self.chain('a'), True)
        self.blockd.snapshot(self.path('a'), self.overlay('b', 'a'))
        with self.assertRaises(errors.Conflict):
            self.blockd.snapshot(self.path('a'), self.overlay('c', 'a'))


if __name__ == '__main__':
    unittest.main()
