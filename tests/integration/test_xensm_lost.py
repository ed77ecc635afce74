# SPDX-License-Identifier: Apache-2.0
"""Replies that are lost, masters that die, transfers that end early."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
import unittest
from typing import Any

from tests import xapi
from tests import xensm
from volume import errors
from volume import ids
from volume import model
from volume.drivers.xensm import vdis
from volume.node import Node
from volume.sim.xapi.faults import Fault
from volume.testing import fixtures
from volume.testing import workbench
from volume.testing.workbench import pattern

SIZE = 4 * model.MIB
AGAIN_S = 30.0
# What never came to the server is tried in a proof run, too.
KINDS = ('lose_reply', 'drop') if os.environ.get('VOLUME_PROOF') else (
    'lose_reply',)


class Case(workbench.Case):
    """A pool of its own for each test, with a volume in it."""

    def setUp(self) -> None:
        self.simulator: Any = xapi.simulator(
            self, hosts=2, detach_delay_s=0.02)
        self.sr_uuid = str(xapi.nfs_sr(self.simulator))
        self.node = fixtures.make_node(self)
        self.driver = self.make_driver()
        self.driver.check()
        volume = self.new()
        self.volume = dataclasses.replace(
            volume, handle=self.driver.create(volume))
        workbench.fill(self.driver, self.volume, pattern(1, SIZE))
        self.snapshot = model.Snapshot(ids.new(), self.volume, SIZE)

    def make_driver(self, node: Node | None = None) -> Any:
        urls = [self.simulator.url(host) for host in range(2)]
        return xensm.XenSmDriver(fixtures.settings(
            xensm.XenSmDriver, addresses=urls, password='secret',
            sr_uuid=[self.sr_uuid],
        ), node or self.node)

    def new(self, size_bytes: int = SIZE) -> model.Volume:
        return model.Volume(ids.new(), self.sr_uuid, size_bytes)

    def spoil(self, method: str, kind: str, *params: Any, **more: Any) -> None:
        self.simulator.faults.add(
            Fault(method, kind, params=params, **more))

    def again(self, deed: Any) -> Any:
        """Do it until it is done: what a job does with what may be tried."""
        deadline = time.monotonic() + AGAIN_S
        while True:
            try:
                return deed()
            except errors.VolumeError as failed:
                if not failed.retry or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def managed(self) -> list[vdis.Vdi]:
        """Return what the server has, base copies aside."""
        with xensm.session(self.simulator) as xenapi:
            return [
                vdi for vdi in (
                    vdis.Vdi.of(ref, record) for ref, record
                    in xenapi.VDI.get_all_records().items()
                ) if vdi.managed and vdi.type == 'user'
            ]

    def assert_only(
        self, *wanted: model.Volume | model.Snapshot, is_undone: bool = False
    ) -> None:
        """Fail unless these are there, once, and nothing is left of how.

        What was undone may leave a mark on what it would have been made of.
        """
        found = self.managed()
        self.assertEqual(
            sorted(thing.id for thing in wanted),
            sorted(str(vdi.id) for vdi in found),
        )
        for vdi in found:
            self.assertNotIn(vdis.ROLE, vdi.keys)
            if not is_undone:
                self.assertNotIn(vdis.NEXT, vdi.keys)

    def assert_seed(self, thing: Any, seed: int) -> None:
        image = pattern(seed, SIZE)
        found = workbench.content(self.driver, thing)
        self.assertTrue(
            found == image.ljust(len(found), b'\0'), 'other bytes')


class LostTest(Case, unittest.TestCase):
    """What the server has done, and nobody heard of."""

    METHODS = (
        'Async.VDI.snapshot', 'Async.VDI.clone', 'VDI.set_name_label',
        'VDI.set_other_config', 'VDI.add_to_other_config',
        'VDI.remove_from_other_config', 'Async.VDI.resize',
        'Async.VDI.destroy', 'Async.VDI.copy', 'task.destroy',
        'event.from', 'VDI.get_record',
    )

    def each(self, deed: Any, *wanted: Any, undo: Any) -> None:
        for kind in KINDS:
            for method in self.METHODS:
                with self.subTest(method=method, kind=kind):
                    self.simulator.faults.clear()
                    self.spoil(method, kind)
                    self.again(deed)
                    self.assert_only(self.volume, *wanted)
                    for thing in wanted:
                        self.assert_seed(thing, 1)
                    undo()

    def test_snapshot_is_taken_once(self) -> None:
        self.each(
            lambda: self.driver.snapshot(self.snapshot), self.snapshot,
            undo=lambda: self.again(
                lambda: self.driver.delete_snapshot(self.snapshot)),
        )

    def test_clone_is_made_once(self) -> None:
        clone = self.new(2 * SIZE)
        self.each(
            lambda: self.driver.clone(self.volume, clone), clone,
            undo=lambda: self.again(lambda: self.driver.delete(clone)),
        )

    def test_revert_is_done_once(self) -> None:
        self.driver.snapshot(self.snapshot)

        def revert() -> None:
            handle = self.driver.revert(self.snapshot)
            self.assertEqual(
                handle, self.driver.inspect(self.volume).handle)

        self.each(
            revert, self.snapshot,
            undo=lambda: workbench.fill(
                self.driver, self.volume, pattern(2, SIZE)),
        )
        self.again(revert)
        self.assert_seed(self.volume, 1)

    def test_flatten_is_done_once(self) -> None:
        clone = self.new()

        def flatten() -> None:
            self.driver.clone(self.volume, clone)
            self.driver.flatten(clone, lambda percent: None)

        self.each(
            flatten, clone,
            undo=lambda: self.again(lambda: self.driver.delete(clone)),
        )

    def test_what_never_came_to_be_is_undone(self) -> None:
        clone = self.new()
        for kind in KINDS:
            for method in self.METHODS:
                for deed, undo in (
                    (lambda: self.driver.snapshot(self.snapshot),
                     lambda: self.driver.delete_snapshot(self.snapshot)),
                    (lambda: self.driver.clone(self.volume, clone),
                     lambda: self.driver.delete(clone)),
                ):
                    self.simulator.faults.clear()
                    self.spoil(method, kind)
                    with self.subTest(method=method, kind=kind):
                        with contextlib.suppress(errors.VolumeError):
                            deed()
                        self.again(undo)
                        self.assert_only(self.volume, is_undone=True)

    def test_other_service_goes_on_where_one_has_stopped(self) -> None:
        other = self.make_driver(fixtures.make_node(self))
        for method in 'Async.VDI.snapshot', 'VDI.set_name_label':
            for kind in 'lose_reply', 'drop':
                with self.subTest(method=method, kind=kind):
                    self.spoil(method, kind)
                    with self.assertRaises(errors.VolumeError):
                        self.driver.snapshot(self.snapshot)
                    self.again(lambda: other.snapshot(self.snapshot))
                    self.assert_only(self.volume, self.snapshot)
                    self.assert_seed(self.snapshot, 1)
                    other.delete_snapshot(self.snapshot)

    def test_other_service_does_not_disturb_what_is_going_on(self) -> None:
        other, clone = self.make_driver(fixtures.make_node(self)), self.new()
        self.spoil('VDI.set_other_config', 'drop')
        with self.assertRaises(errors.VolumeError):
            self.driver.snapshot(self.snapshot)
        with self.assertRaisesRegex(errors.Busy, 'another service'):
            other.clone(self.volume, clone)
        self.driver.snapshot(self.snapshot)
        other.clone(self.volume, clone)
        self.assert_only(self.volume, self.snapshot, clone)

    def test_copy_that_nobody_finishes_is_swept_in_the_end(self) -> None:
        with xensm.session(self.simulator) as xenapi:
            ref, = xenapi.VDI.get_by_name_label(f'volume-{self.volume.id}')
            for until in 1, 1 << 40:
                key = f'{ids.new()} made {until} somebody'
                xenapi.VDI.add_to_other_config(ref, vdis.NEXT, key)
                xenapi.VDI.clone(ref)
                xenapi.VDI.remove_from_other_config(ref, vdis.NEXT)
        before = len(self.managed())
        self.driver.upkeep(self.sr_uuid)
        self.assertEqual(before - 1, len(self.managed()))
        self.assert_seed(self.volume, 1)

    def test_copy_that_another_client_made_is_left_alone(self) -> None:
        with xensm.session(self.simulator) as xenapi:
            ref, = xenapi.VDI.get_by_name_label(f'volume-{self.volume.id}')
            theirs = xenapi.VDI.get_uuid(xenapi.VDI.snapshot(ref))
            also = xenapi.VDI.get_uuid(xenapi.VDI.clone(ref))
        self.driver.snapshot(self.snapshot)
        self.driver.delete_snapshot(self.snapshot)
        found = {f.handle: f.id for f in self.driver.scan(self.sr_uuid)}
        self.assertIsNone(found[theirs])
        self.assertIsNone(found[also])
        self.assert_seed(self.volume, 1)


class MasterTest(Case, unittest.TestCase):
    """The master dies in the middle of it."""

    def test_there_is_one_volume_and_no_orphan(self) -> None:
        for when in 'before', 'after':
            with self.subTest(when=when):
                volume = self.new()
                self.spoil('VDI.create', 'kill_master', when=when)
                self.again(functools.partial(self.driver.create, volume))
                self.assert_only(self.volume, volume)
                self.again(functools.partial(self.driver.delete, volume))
                for host in 0, 1:
                    if not self.simulator.is_up(self.simulator.host(host)):
                        self.simulator.start_host(host)

    def test_snapshot_and_clone_are_made_once(self) -> None:
        clone = self.new()
        self.spoil('VDI.snapshot', 'kill_master', when='after')
        self.again(lambda: self.driver.snapshot(self.snapshot))
        self.again(lambda: self.driver.clone(self.volume, clone))
        self.assert_only(self.volume, self.snapshot, clone)
        self.assert_seed(self.snapshot, 1)


class TransferTest(Case, unittest.TestCase):
    """Bytes that end before their time."""

    def test_import_that_was_cut_off_is_not_committed(self) -> None:
        for count in 0, 4096, SIZE - 512:
            self.spoil('import_raw_vdi', 'partial', count)
            with self.subTest(count=count):
                with self.assertRaises(errors.VolumeError):
                    workbench.fill(
                        self.driver, self.volume, pattern(2, SIZE))
                workbench.fill(self.driver, self.volume, pattern(3, SIZE))
                self.assert_seed(self.volume, 3)

    def test_export_that_was_cut_off_is_not_the_volume(self) -> None:
        for count in 0, 4096, 2 * model.MIB:
            self.spoil('export_raw_vdi', 'partial', count)
            with self.subTest(count=count):
                with self.assertRaises(errors.VolumeError):
                    workbench.content(self.driver, self.volume)
                self.assert_seed(self.volume, 1)

    def test_sr_that_goes_away_comes_back_by_itself(self) -> None:
        self.simulator.faults.put_sr_offline(self.sr_uuid)
        with self.assertRaises(errors.VolumeError):
            self.driver.snapshot(self.snapshot)
        with self.assertRaises(errors.VolumeError):
            workbench.content(self.driver, self.volume)
        self.simulator.faults.put_sr_online(self.sr_uuid)
        self.again(self.driver.check)
        self.again(lambda: self.driver.snapshot(self.snapshot))
        self.assert_only(self.volume, self.snapshot)
        self.assert_seed(self.snapshot, 1)
