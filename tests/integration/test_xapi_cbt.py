# SPDX-License-Identifier: Apache-2.0
"""S37: which blocks of a disk have changed, as a simulated pool tells it."""

import base64
import os
import shutil
import tempfile
import threading
import time

from tests import xapi
from tests.integration.xapi_case import Case
from tests.integration.xapi_case import MIB
from volume.sim.xapi.disk import cbt
from volume.sim.xapi.objects.guests import guests

BLOCK = 64 << 10
SIZE = 16 * MIB


class Changed(Case):

    def setUp(self):
        super().setUp()
        self.disk = self.vdi(SIZE)

    def blocks(self, first, second):
        """Return the numbers of the blocks that differ."""
        bitmap = base64.b64decode(
            self.x.VDI.list_changed_blocks(first, second))
        self.assertEqual(-(-SIZE // BLOCK // 8), len(bitmap))
        return [
            at for at in range(len(bitmap) * 8)
            if bitmap[at // 8] & 0x80 >> at % 8
        ]

    def test_what_a_guest_wrote_between_two_snapshots_has_changed(self):
        vm, _ = self.plugged(self.disk)
        self.write(vm, b'unseen', 0)
        self.x.VDI.enable_cbt(self.disk)
        self.write(vm, b'x', 9 * BLOCK)
        first = self.x.VDI.snapshot(self.disk)
        self.write(vm, b'across', 4 * BLOCK - 3)
        self.write(vm, bytes(10 * BLOCK), 100 * BLOCK)
        second = self.x.VDI.snapshot(self.disk)
        self.write(vm, b'later', 200 * BLOCK)
        self.assertEqual(
            [3, 4, *range(100, 110)], self.blocks(first, second))

    def test_changes_of_several_snapshots_add_up(self):
        self.x.VDI.enable_cbt(self.disk)
        taken = []
        for at in range(4):
            self.put(self.disk, bytes(BLOCK * (at + 1)))
            self.left(self.disk)
            taken.append(self.x.VDI.snapshot(self.disk))
        self.assertEqual([0, 1, 2, 3], self.blocks(taken[0], taken[3]))
        self.assertEqual([0, 1], self.blocks(taken[0], taken[1]))

    def test_a_snapshot_that_is_gone_leaves_its_changes_to_the_next(self):
        self.x.VDI.enable_cbt(self.disk)
        vm, _ = self.plugged(self.disk)
        first = self.x.VDI.snapshot(self.disk)
        self.write(vm, b'a', 5 * BLOCK)
        second = self.x.VDI.snapshot(self.disk)
        self.write(vm, b'b', 6 * BLOCK)
        third = self.x.VDI.snapshot(self.disk)
        self.x.VDI.destroy(second)
        self.assertEqual([5, 6], self.blocks(first, third))

    def test_changes_outlive_the_data_a_scan_and_a_restart(self):
        self.x.VDI.enable_cbt(self.disk)
        first = self.x.VDI.snapshot(self.disk)
        self.put(self.disk, b'a')
        self.left(self.disk)
        second = self.x.VDI.snapshot(self.disk)
        self.x.VDI.data_destroy(first)
        self.x.SR.scan(self.sr)
        self.assertEqual('cbt_metadata', self.x.VDI.get_type(first))
        world = self.pool.world
        self.pool.stop()
        self.pool = xapi.simulator(
            self, world=world, directory=self.pool.directory)
        self.x = xapi.login(self, self.pool).xenapi
        self.assertEqual([0], self.blocks(first, second))

    def test_a_log_that_a_killed_server_had_open_is_worth_nothing(self):
        self.x.VDI.enable_cbt(self.disk)
        first = self.x.VDI.snapshot(self.disk)
        vm, _ = self.plugged(self.disk)
        self.write(vm, b'lost in memory')
        directory = tempfile.TemporaryDirectory(prefix='vtx')
        self.addCleanup(directory.cleanup)
        self.pool.rows.flush()
        left = shutil.copytree(
            self.pool.directory, os.path.join(directory.name, 'pool'))
        world = self.pool.world
        self.pool.stop()
        self.pool = xapi.simulator(self, world=world, directory=left)
        self.x = xapi.login(self, self.pool).xenapi
        self.assertFalse(self.x.VDI.get_cbt_enabled(self.disk))
        self.x.VDI.enable_cbt(self.disk)
        second = self.x.VDI.snapshot(self.disk)
        with self.refuses('SR_BACKEND_FAILURE_460'):
            self.x.VDI.list_changed_blocks(first, second)

    def test_what_is_written_while_a_snapshot_is_made_is_not_missed(self):
        self.x.VDI.enable_cbt(self.disk)
        vm, _ = self.plugged(self.disk)
        plugged = guests(self.pool).disk(self.x.VM.get_uuid(vm), '0')
        logs = cbt.logs(self.pool)
        split = logs.snapshot
        writers = []

        def interrupted(*args):
            # The files are split already, the logs are not.
            writer = threading.Thread(
                target=plugged.pwrite, args=(7 * BLOCK, b'between'))
            writers.append(writer)
            writer.start()
            writer.join(0.2)
            return split(*args)

        logs.snapshot = interrupted
        first = self.x.VDI.snapshot(self.disk)
        logs.snapshot = split
        writers[0].join()
        second = self.x.VDI.snapshot(self.disk)
        self.assertEqual(bytes(7), self.content(first)[7 * BLOCK:][:7])
        self.assertEqual([7], self.blocks(first, second))


class Rules(Case):

    def setUp(self):
        super().setUp()
        self.disk = self.vdi(SIZE)

    def test_turning_it_on_and_off_twice_is_fine(self):
        self.x.VDI.enable_cbt(self.disk)
        self.x.VDI.enable_cbt(self.disk)
        self.assertTrue(self.x.VDI.get_cbt_enabled(self.disk))
        self.x.VDI.disable_cbt(self.disk)
        self.x.VDI.disable_cbt(self.disk)
        self.assertFalse(self.x.VDI.get_cbt_enabled(self.disk))

    def test_a_snapshot_is_not_tracked_anew(self):
        snapshot = self.x.VDI.snapshot(self.disk)
        for call in (self.x.VDI.enable_cbt, self.x.VDI.disable_cbt):
            with self.refuses(
                'OPERATION_NOT_ALLOWED', f'VDI is a snapshot: {snapshot}',
            ):
                call(snapshot)

    def test_only_disks_of_users_and_systems_are_tracked(self):
        vdi = self.vdi(type='metadata')
        with self.refuses('VDI_INCOMPATIBLE_TYPE', vdi, 'metadata'):
            self.x.VDI.enable_cbt(vdi)

    def test_a_raw_disk_is_not_tracked(self):
        vdi = self.vdi(sm_config={'type': 'raw'})
        with self.refuses('SR_BACKEND_FAILURE_66'):
            self.x.VDI.enable_cbt(vdi)

    def test_an_sr_that_cannot_is_told_first(self):
        sr = self.x.SR.get_by_uuid(
            xapi.hba_sr(self.pool, ('3600a', SIZE)))
        vdi = self.vdi(SIZE, sr=sr)
        with self.refuses('SR_OPERATION_NOT_SUPPORTED', sr):
            self.x.VDI.enable_cbt(vdi)

    def test_a_server_without_the_licence_refuses(self):
        host = self.pool.master
        self.pool.rows.update(
            'host', host, license_params={'restrict_cbt': 'true'})
        with self.refuses('LICENSE_RESTRICTION'):
            self.x.VDI.enable_cbt(self.disk)

    def test_data_is_destroyed_of_snapshots_that_were_tracked_alone(self):
        with self.refuses(
            'OPERATION_NOT_ALLOWED', f'VDI is not a snapshot: {self.disk}',
        ):
            self.x.VDI.data_destroy(self.disk)
        snapshot = self.x.VDI.snapshot(self.disk)
        with self.refuses('VDI_NO_CBT_METADATA', snapshot):
            self.x.VDI.data_destroy(snapshot)

    def test_data_is_gone_and_the_row_stays(self):
        self.x.VDI.enable_cbt(self.disk)
        snapshot = self.x.VDI.snapshot(self.disk)
        self.x.VDI.data_destroy(snapshot)
        self.x.VDI.data_destroy(snapshot)  # again is fine
        self.assertEqual('cbt_metadata', self.x.VDI.get_type(snapshot))
        self.assertEqual(
            '0', self.x.VDI.get_physical_utilisation(snapshot))
        self.x.VDI.destroy(snapshot)

    def test_what_is_left_of_it_is_of_no_other_use(self):
        self.x.VDI.enable_cbt(self.disk)
        snapshot = self.x.VDI.snapshot(self.disk)
        self.x.VDI.data_destroy(snapshot)
        vm = self.vm()
        for call in (
            lambda: self.vbd(vm, snapshot, 'RO'),
            lambda: self.x.VDI.copy(snapshot, self.sr),
            lambda: self.x.VDI.snapshot(snapshot),
            lambda: self.x.VDI.get_nbd_info(snapshot),
        ):
            with self.refuses(
                'VDI_INCOMPATIBLE_TYPE', snapshot, 'cbt_metadata',
            ):
                call()

    def test_a_disk_in_use_keeps_its_data_after_four_seconds(self):
        self.pool._switches['data_destroy_wait_s'] = 0.3
        self.x.VDI.enable_cbt(self.disk)
        snapshot = self.x.VDI.snapshot(self.disk)
        _, vbd = self.plugged(snapshot, 'RO')
        began = time.monotonic()
        with self.refuses('VDI_IN_USE', snapshot, 'data_destroy'):
            self.x.VDI.data_destroy(snapshot)
        self.assertGreaterEqual(time.monotonic() - began, 0.3)
        self.pool._switches['data_destroy_wait_s'] = 30
        task = self.x.Async.VDI.data_destroy(snapshot)
        self.x.VBD.unplug(vbd)
        self.assertEqual('success', self.ended(task)['status'])

    def test_by_default_it_waits_four_seconds(self):
        self.assertEqual(4, self.pool.switch('data_destroy_wait_s', 4))

    def test_disks_that_are_not_related_have_no_changes(self):
        other = self.vdi(SIZE)
        for vdi in (self.disk, other):
            self.x.VDI.enable_cbt(vdi)
        with self.refuses('SR_BACKEND_FAILURE_460'):
            self.x.VDI.list_changed_blocks(self.disk, other)
        with self.refuses('SR_BACKEND_FAILURE_460'):
            self.x.VDI.list_changed_blocks(self.disk, self.disk)

    def test_the_way_back_is_not_related(self):
        self.x.VDI.enable_cbt(self.disk)
        snapshot = self.x.VDI.snapshot(self.disk)
        self.assertTrue(
            self.x.VDI.list_changed_blocks(snapshot, self.disk))
        with self.refuses('SR_BACKEND_FAILURE_460'):
            self.x.VDI.list_changed_blocks(self.disk, snapshot)

    def test_changes_up_to_a_disk_in_use_are_not_told(self):
        self.x.VDI.enable_cbt(self.disk)
        snapshot = self.x.VDI.snapshot(self.disk)
        self.plugged(self.disk)
        with self.refuses('VDI_IN_USE', self.disk, 'list_changed_blocks'):
            self.x.VDI.list_changed_blocks(snapshot, self.disk)

    def test_a_clone_is_not_tracked(self):
        self.x.VDI.enable_cbt(self.disk)
        self.assertFalse(
            self.x.VDI.get_cbt_enabled(self.x.VDI.clone(self.disk)))

    def test_a_disk_that_has_grown_has_changes_of_its_new_size(self):
        self.x.VDI.enable_cbt(self.disk)
        snapshot = self.x.VDI.snapshot(self.disk)
        self.x.VDI.resize(self.disk, str(2 * SIZE))
        vm, _ = self.plugged(self.disk)
        self.write(vm, b'end', 2 * SIZE - 3)
        self.x.VM.hard_shutdown(vm)
        bitmap = base64.b64decode(
            self.x.VDI.list_changed_blocks(snapshot, self.disk))
        self.assertEqual(bytes(2 * SIZE // BLOCK // 8 - 1) + b'\1', bitmap)

    def test_dom0_that_is_letting_go_is_waited_for(self):
        guests(self.pool).linger_s = 2.0
        self.pool._switches['data_destroy_wait_s'] = 30
        self.x.VDI.enable_cbt(self.disk)
        snapshot = self.x.VDI.snapshot(self.disk)
        self.get(snapshot)
        self.assertTrue(self.x.VDI.get_VBDs(snapshot))
        self.x.VDI.data_destroy(snapshot)
        self.assertEqual('cbt_metadata', self.x.VDI.get_type(snapshot))
