# SPDX-License-Identifier: Apache-2.0
"""The rbd driver among images that cannot be opened, and broken metadata."""

from __future__ import annotations

import errno
import types

from tests.integration import test_rbd
from tests.integration import test_rbd_hosts
from tests.integration.test_rbd_hosts import A
from tests.integration.test_rbd_hosts import BLOCKED
from tests.integration.test_rbd_hosts import HERE
from tests.integration.test_rbd_hosts import WRITE
from volume import errors
from volume import ids
from volume import model
from volume.drivers.rbd import names
from volume.drivers.rbd.options import Settings
from volume.drivers.rbd.wire import Wire
from volume.testing.workbench import fill
from volume.testing.workbench import pattern

MIB = model.MIB
BROKEN = ('{', '{"a": 1}', '[]', '[' * 65000, '\udcff\udcfe')


class Case(test_rbd.Case):

    def spoil(self, header: str) -> None:
        """Make a header unreadable."""

        def write(wire: Wire) -> None:
            with wire.rados.WriteOpCtx() as op:
                ioctx = wire.ioctx(self.pool)
                ioctx.set_omap(op, ('size',), (b'x',))
                ioctx.operate_write_op(op, header)

        self.link.do('break', write)
        # What has no header was never there, or goes.
        self.addCleanup(self.remove_object, header)

    def orphan(self, *, is_ours: bool) -> model.Volume:
        """Return a clone whose parent is lost."""
        source, clone = self.volume(seed=1), self.wish()
        if is_ours:
            self.driver.clone(source, clone)
        else:
            there = f'{self.pool}/volume-{source.id}@s'
            self.cluster.run('rbd', 'snap', 'create', '--no-progress', there)
            self.cluster.run(
                'rbd', 'clone', '--rbd-default-clone-format', '2', there,
                f'{self.pool}/volume-{clone.id}')
        self.remove_object(self.object_of('header', f'volume-{source.id}'))
        return clone

    def scanned(self) -> dict[str, model.Found]:
        return {
            found.handle: found for found in self.driver.scan(self.pool)}

    def tend(self) -> list[errors.VolumeError]:
        """Do all upkeep there is; return what it failed with."""
        failed = []
        for _ in range(200):
            try:
                if not self.driver.upkeep(self.pool):
                    return failed
            except errors.VolumeError as error:
                failed.append(error)
        raise AssertionError(f'upkeep has no end: {failed[-1]}')


class UnopenedTest(Case):

    def test_image_that_cannot_be_opened_hides_no_other(self) -> None:
        healthy, broken, foreign = self.volume(), self.volume(), self.wish()
        self.cluster.run('rbd', 'create', '--size', '1M',
                         f'{self.pool}/volume-{foreign.id}')
        for each in broken, foreign:
            self.spoil(self.object_of('header', f'volume-{each.id}'))
        lost = [self.orphan(is_ours=ours) for ours in (True, False)]
        with self.assertLogs('volume.drivers.rbd.images', 'WARNING'):
            found = self.scanned()
        for volume, wanted in (
            (healthy, healthy.id), (broken, broken.id), (foreign, None),
            (lost[0], lost[0].id), (lost[1], None),
        ):
            self.assertEqual(wanted, found[f'volume-{volume.id}'].id)
        for volume in lost:
            self.cluster.run('rbd', 'rm', '--no-progress',
                             f'{self.pool}/volume-{volume.id}')

    def test_clone_of_a_lost_image_is_deleted_if_it_is_ours(self) -> None:
        ours, foreign = (
            self.orphan(is_ours=is_ours) for is_ours in (True, False))
        self.driver.delete(ours)
        with self.assertRaises(errors.Conflict):
            self.driver.delete(foreign)
        # Nor does upkeep touch it, in the trash.
        self.cluster.run(
            'rbd', 'trash', 'mv', f'{self.pool}/volume-{foreign.id}')
        self.tend()
        self.assertNotIn(f'volume-{ours.id}', self.trash())
        self.assertIn(f'volume-{foreign.id}', self.trash())

    def test_draft_of_a_lost_image_is_removed(self) -> None:
        draft = self.orphan(is_ours=False)
        name = f'volume-{draft.id}'
        self.driver._parts().images.begun.add(self.pool, name)
        self.driver.delete(draft)
        self.assertNotIn(name, self.cluster.run('rbd', 'ls', self.pool))
        self.assertNotIn(name, self.trash())

    def test_removal_that_was_cut_off_is_ended(self) -> None:
        volume = self.volume(seed=1)
        header = self.object_of('header', f'volume-{volume.id}')
        self.driver.delete(volume)
        self.remove_object(header)
        self.tend()
        self.assertNotIn(f'volume-{volume.id}', self.trash())

    def test_broken_image_keeps_no_other_in_the_trash(self) -> None:
        self.tend()
        volumes = [self.volume(seed=1) for _ in range(3)]
        headers = {
            f'volume-{each.id}': self.object_of(
                'header', f'volume-{each.id}')
            for each in volumes
        }
        for each in volumes:
            self.driver.delete(each)
        first = next(name for name in self.trash() if name in headers)
        self.spoil(headers[first])
        self.assertTrue(self.tend())
        self.assertEqual(
            {first}, {name for name in self.trash() if name in headers})

    def test_lost_clone_keeps_no_other_from_being_flattened(self) -> None:
        lost = self.orphan(is_ours=True)
        source, clone = self.volume(seed=1), self.wish()
        self.driver.clone(source, clone)
        tending = self.driver._parts().tending
        for each in lost, clone:
            tending.note(self.pool, f'volume-{each.id}')
        failed = self.tend()
        self.assertEqual(['Corrupt'], [each.kind for each in failed])
        with self.link.image(self.pool, f'volume-{clone.id}') as image:
            self.assertIsNone(image.parent())
        self.driver.delete(lost)
        # It was passed over; by now it is looked at again.
        self.make()._parts().tending.upkeep(self.pool)


class FullWire(Wire):
    """A cluster that gets full in the middle of a rollback."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        rbd = self.rbd

        class Image(rbd.Image):  # type: ignore[name-defined,misc]
            def rollback_to_snap(self, name: str) -> None:
                self.discard(0, MIB // 2)
                raise rbd.NoSpace('full', errno.ENOSPC)

        self.rbd = types.SimpleNamespace(**{**vars(rbd), 'Image': Image})


class RevertTest(Case):

    def test_rollback_that_breaks_off_leaves_a_volume_that_says_so(
        self,
    ) -> None:
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        fill(self.driver, volume, pattern(2, MIB))
        with self.assertRaises(errors.NoSpace):
            self.rbd(self.node, connect=FullWire).revert(snapshot)
        self.assertNotIn(
            self.content(volume), (pattern(1, MIB), pattern(2, MIB)))
        self.assertTrue(self.driver.inspect(volume).is_torn)
        self.driver.revert(snapshot)
        self.assertFalse(self.driver.inspect(volume).is_torn)
        self.assertEqual(pattern(1, MIB), self.content(volume))

    def test_revert_that_is_refused_leaves_a_whole_volume(self) -> None:
        volume = self.volume(seed=1)
        gone = model.Snapshot(ids.new(), volume, MIB)
        with self.assertRaises(errors.NotFound):
            self.driver.revert(gone)
        self.assertFalse(self.driver.inspect(volume).is_torn)


class MetadataTest(test_rbd_hosts.Case):
    """Any host may write metadata of an image that it may write."""

    def write(self, volume: model.Volume, key: str, text: str) -> None:
        link = self.driver._parts().link
        header = link.header(self.pool, f'volume-{volume.id}')

        def put(wire: Wire) -> None:
            with wire.rados.WriteOpCtx() as op:
                ioctx = wire.ioctx(self.pool)
                ioctx.set_omap(
                    op, (f'metadata_{key}',),
                    (text.encode(errors='surrogateescape'),))
                ioctx.operate_write_op(op, f'rbd_header.{header}')

        link.do('write', put)

    def test_key_that_is_no_text_hides_nothing(self) -> None:
        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        for key in '\udcff', f'{names.HOST}\udcff':
            self.cluster.run(
                'rbd', 'image-meta', 'set', f'{self.pool}/volume-{volume.id}',
                key, 'x')
        found = self.driver.inspect(volume)
        self.assertEqual((volume.id, (A,)), (found.id, found.hosts))

    def test_broken_metadata_hide_nothing(self) -> None:
        for text in BROKEN:
            with self.subTest(text[:20]):
                volume = self.volume()
                self.driver.describe(volume, {'name': 'n'})
                self.driver.grant(volume, A, WRITE)
                self.write(volume, names.host('b'), text)
                found = self.driver.inspect(volume)
                self.assertEqual({'name': 'n'}, found.sidecar)
                self.assertEqual((A,), found.hosts)
                self.write(volume, names.NOTE, text)
                self.write(volume, names.REVERT, text)
                self.assertTrue(self.driver.inspect(volume).is_torn)
                self.assertIn(volume.id, [
                    found.id for found in self.driver.scan(self.pool)])
                snapshot = model.Snapshot(ids.new(), volume, MIB)
                self.driver.snapshot(snapshot)
                self.driver.revert(snapshot)
                self.assertEqual(MIB, self.driver.inspect(volume).size_bytes)
                self.driver.delete_snapshot(snapshot)
                self.driver.delete(volume)

    def test_host_cannot_stay_by_spoiling_its_own_entry(self) -> None:
        for text in BROKEN:
            with self.subTest(text[:20]):
                volume = self.volume()
                self.driver.grant(volume, A, WRITE)
                host = self.open(volume)
                self.assertEqual('written', host.ask('write', 0, 'h'))
                self.write(volume, names.host('a'), text)
                self.driver.revoke(volume, A)
                self.assertEqual(BLOCKED, host.ask('write', 0, 'x'))
                self.assertEqual((), self.driver.inspect(volume).hosts)

    def test_broken_entry_of_another_host_cuts_off_nobody(self) -> None:
        volume = self.volume()
        for each in A, HERE:
            self.driver.grant(volume, each, WRITE)
        host = self.open(volume)
        self.assertEqual('written', host.ask('write', 0, 'h'))
        self.write(volume, names.host(HERE.name), '{')
        with self.assertLogs('volume.drivers.rbd.fence', 'WARNING') as said:
            with self.assertRaises(errors.Busy):
                self.driver.revoke(volume, A)
        self.assertIn('rbd image-meta remove', said.output[0])
        self.assertEqual('written', host.ask('write', 0, 'i'))
        # Its own addresses it has in any case.
        self.driver.revoke(volume, HERE)
        self.assertEqual(BLOCKED, host.ask('write', 0, 'x'))

    def test_metadata_without_end_are_refused(self) -> None:
        volume = self.volume()

        def write(wire: Wire) -> None:
            with wire.rbd.Image(
                wire.ioctx(self.pool), f'volume-{volume.id}', None, True
            ) as image:
                header = f'rbd_header.{image.id()}'
            for page in range(21):
                keys = tuple(
                    f'metadata_{page}-{each}' for each in range(1000))
                with wire.rados.WriteOpCtx() as op:
                    ioctx = wire.ioctx(self.pool)
                    ioctx.set_omap(op, keys, (b'x',) * len(keys))
                    ioctx.operate_write_op(op, header)

        self.driver._parts().link.do('break', write)
        with self.assertRaisesRegex(errors.Invalid, 'entries of metadata'):
            self.driver.inspect(volume)
        self.assertIn(volume.id, [
            found.id for found in self.driver.scan(self.pool)])
        self.cluster.run('rbd', 'rm', '--no-progress',
                         f'{self.pool}/volume-{volume.id}')
