# SPDX-License-Identifier: Apache-2.0
"""nova-volume's cases 1 to 29: volumes and snapshots are made and go."""

import os

from tests.fault.world import CALLER
from tests.fault.world import World
from tests.integration.acceptance_case import AcceptanceCase
from tests.integration.acceptance_case import HOST
from tests.integration.acceptance_case import MIB
from volume import errors
from volume import ids
from volume import periodic
from volume.db import models
from volume.manager import VolumeManager
from volume.rpcapi import VolumeAPI
from volume.testing import fixtures


class Volumes(AcceptanceCase):
    # Create and delete.

    def test_case_01_created_it_is_available_launched_and_has_a_host(self):
        found = self.get(self.make())
        self.assertEqual('available', found['status'])
        self.assertIsNotNone(found['launched_at'])
        self.assertEqual('b#pool', found['host'])

    def test_case_02_a_create_is_told_of_exactly_twice(self):
        self.world.events.clear()
        volume_id = self.make(name='x')
        (start, first), (end, last) = self.world.events
        self.assertEqual('volume.create.start', start)
        self.assertEqual('creating', first['status'])
        self.assertEqual('volume.create.end', end)
        for key, value in {
            'tenant_id': 'p', 'user_id': 'u', 'volume_id': volume_id,
            'status': 'available', 'size': 1, 'display_name': 'x',
            'snapshot_id': None,
        }.items():
            self.assertEqual(value, last[key], key)
        self.assertIsNotNone(last['launched_at'])
        self.assertIsNotNone(last['created_at'])

    def test_case_03_deleted_it_is_gone_told_of_and_given_back(self):
        volume_id = self.make()
        self.assertEqual(MIB, self.claimed())
        self.world.events.clear()
        self.delete(volume_id)
        self.assertEqual(
            ['volume.delete.start', 'volume.delete.end'],
            [event for event, _ in self.world.events],
        )
        self.gone(volume_id)
        self.assertEqual(0, self.claimed())

    def test_case_04_metadata_goes_with_the_volume(self):
        volume_id = self.make(metadata={'a': 'b'})
        self.assertEqual({'a': 'b'}, self.get(volume_id)['metadata'])
        self.delete(volume_id)
        self.gone(volume_id)

    def test_case_05_a_create_that_failed_can_be_deleted(self):
        self.driver.troubles['create'] = errors.Invalid('it cannot be')
        volume_id = ids.new()
        self.api.create_volume(CALLER, volume_id, size_bytes=MIB)
        found = self.get(volume_id)
        self.assertEqual(
            ('error', 'it cannot be'), (found['status'], found['reason'])
        )
        self.delete(volume_id)
        self.gone(volume_id)

    def test_case_06_an_export_that_failed_leaves_a_volume_to_delete(self):
        volume_id = self.make()
        self.api.reserve_volume(CALLER, volume_id)

        def refuse(*args):
            raise errors.Invalid('no address is free')

        self.world.backends['b'].exporter.export = refuse
        with self.assertRaisesRegex(errors.Invalid, 'no address'):
            self.api.initialize_connection(CALLER, volume_id, HOST)
        self.assertEqual('attaching', self.status(volume_id))
        self.api.terminate_connection(CALLER, volume_id, HOST)
        self.api.unreserve_volume(CALLER, volume_id)
        self.delete(volume_id)
        self.assertEqual(set(), self.world.stored())

    def test_case_06_without_a_reservation_it_is_available_again(self):
        volume_id = self.make()

        def refuse(*args):
            raise errors.Invalid('no address is free')

        self.world.backends['b'].exporter.export = refuse
        with self.assertRaisesRegex(errors.Invalid, 'no address'):
            self.api.initialize_connection(CALLER, volume_id, HOST)
        self.assertEqual('available', self.status(volume_id))

    def test_case_07_the_drivers_handle_is_kept_before_it_is_used(self):
        volume_id = self.make()
        self.assertEqual(
            self.row(volume_id).handle,
            self.driver.inspect(self.world.noun(volume_id)).handle,
        )

    def test_case_08_a_size_is_a_positive_whole_number(self):
        for size in 2, '2':
            volume_id = ids.new()
            self.api.create_volume(CALLER, volume_id, size=size)
            self.assertEqual(2, self.get(volume_id)['size'])
            self.delete(volume_id)
        for size in '2Gb', 0, -1, '-1', '', '1.5':
            with self.subTest(size), self.assertRaises(errors.Invalid):
                self.api.create_volume(CALLER, ids.new(), size=size)
        self.assertEqual({}, self.world.live(models.Volume))
        self.assertEqual(0, self.claimed())

    def test_case_10_where_no_pool_fits_a_cast_ends_in_error(self):
        volume_id = ids.new()
        self.api.create_volume(CALLER, volume_id, size=5, confirm=False)
        found = self.get(volume_id)
        self.assertEqual('error', found['status'])
        self.assertIn('1 without room for it', found['reason'])

    def test_case_11_what_was_never_placed_is_deleted_without_a_job(self):
        volume_id = ids.new()
        self.api.create_volume(CALLER, volume_id, size=5, confirm=False)
        before = len(self.world.all(models.Job))
        self.delete(volume_id)
        self.gone(volume_id)
        self.assertEqual(before, len(self.world.all(models.Job)))

    def test_case_12_a_status_may_forbid_a_delete_and_force_allow_it(self):
        volume_id = self.make()
        self.attach(volume_id)
        for force in False, True:
            with self.assertRaises(errors.Invalid):
                self.delete(volume_id, force=force)
        for status in 'creating', 'error_deleting':
            volume_id = self.make()
            self.reset(volume_id, status)
            with self.assertRaises(errors.Invalid):
                self.delete(volume_id)
            self.assertEqual(status, self.status(volume_id))
            self.delete(volume_id, force=True)
            self.gone(volume_id)

    def test_case_13_an_attached_volume_is_not_deleted_and_says_in_use(self):
        volume_id = self.make()
        self.attach(volume_id)
        with self.assertRaisesRegex(errors.Invalid, 'attached'):
            self.delete(volume_id)
        self.assertEqual('in-use', self.status(volume_id))

    def test_case_15_a_busy_volume_stays_available_and_says_why(self):
        volume_id = self.make()
        self.driver.troubles['delete'] = errors.Busy('a backup reads it')
        self.delete(volume_id)
        self.world.recover()
        found = self.get(volume_id)
        self.assertEqual(
            ('available', 'a backup reads it'),
            (found['status'], found['reason']),
        )
        self.driver.troubles.clear()
        self.delete(volume_id)
        self.gone(volume_id)

    def test_case_15_busy_does_not_make_a_broken_volume_available(self):
        self.driver.troubles['create'] = errors.Corrupt('half of it')
        volume_id = ids.new()
        self.api.create_volume(CALLER, volume_id, size_bytes=MIB)
        self.assertEqual('error', self.status(volume_id))
        self.driver.troubles = {'delete': errors.Busy('somebody has it')}
        self.delete(volume_id)
        self.world.recover()
        self.assertEqual('error', self.status(volume_id))

    def test_case_15_a_busy_volume_has_not_its_snapshots_back(self):
        volume_id = self.make()
        snapshot_id = self.snap(volume_id)
        self.driver.troubles['delete'] = errors.Busy('somebody has it')
        self.delete(volume_id, cascade=True)
        self.world.recover()
        self.assertEqual('available', self.status(volume_id))
        self.assertEqual('error_deleting', self.snapshot_status(snapshot_id))
        self.driver.troubles.clear()
        self.delete(volume_id, cascade=True)
        self.gone(volume_id)

    def test_case_16_a_delete_that_failed_can_be_asked_for_again(self):
        volume_id = self.make()
        self.driver.troubles['delete'] = errors.Corrupt('the chain is cut')
        self.delete(volume_id)
        found = self.get(volume_id)
        self.assertEqual(
            ('error_deleting', 'the chain is cut'),
            (found['status'], found['reason']),
        )
        self.driver.troubles.clear()
        for _ in range(2):
            self.delete(volume_id, force=True)
        self.gone(volume_id)
        self.assertEqual(0, self.claimed())

    def test_case_17_what_is_gone_from_the_storage_can_be_deleted(self):
        volume_id = self.make()
        self.driver.delete(self.world.noun(volume_id))
        self.delete(volume_id)
        self.gone(volume_id)

    def test_case_17_what_cannot_be_asked_is_not_gone(self):
        volume_id = self.make()
        self.driver.troubles['delete'] = errors.Unavailable('no answer')
        self.delete(volume_id)
        self.assertEqual('deleting', self.status(volume_id))
        self.world.now += 3601
        self.world.recover()
        self.assertEqual('error_deleting', self.status(volume_id))
        self.assertEqual({volume_id}, self.world.stored())

    def test_case_18_a_volume_with_snapshots_is_deleted_after_them(self):
        volume_id = self.make()
        snapshot_id = self.snap(volume_id)
        with self.assertRaisesRegex(errors.Invalid, 'snapshots'):
            self.delete(volume_id)
        self.api.delete_snapshot(CALLER, snapshot_id, confirm=True)
        self.delete(volume_id)
        self.gone(volume_id)

    def test_case_20_a_restart_goes_on_deleting_beside_what_fails(self):
        good, bad = self.make(), self.make()
        self.driver.troubles['delete'] = errors.Unavailable('no answer')
        for volume_id in good, bad:
            self.delete(volume_id)
        self.world.boot(None)
        self.boot()
        real = self.driver.delete

        def delete(volume):
            if volume.id == bad:
                raise errors.Corrupt('the chain is cut')
            real(volume)

        self.driver.delete = delete
        self.world.now += 60
        self.world.recover()
        self.gone(good)
        self.assertEqual('error_deleting', self.status(bad))

    def test_case_21_a_restart_leads_out_of_creating(self):
        volume_id = ids.new()
        self.crash(lambda: self.api.create_volume(
            CALLER, volume_id, size_bytes=MIB
        ))
        self.assertEqual('available', self.status(volume_id))
        self.assertEqual([], self.world.disagreements())

    def test_case_21_a_restart_leads_out_of_uploading(self):
        volume_id = self.make()
        path = os.path.join(self.world.images, 'out.qcow2')
        self.crash(lambda: self.api.copy_volume_to_image(
            CALLER, volume_id, f'file://{path}', format='qcow2',
            confirm=True,
        ))
        self.assertEqual('available', self.status(volume_id))
        self.assertEqual([], self.world.disagreements())

    def test_case_21_a_host_that_is_lost_leaves_no_reservation(self):
        attached, reserved = self.make(), self.make()
        self.attach(attached)
        self.api.begin_detaching(CALLER, attached)
        self.api.reserve_volume(CALLER, reserved)
        self.world.now += 901
        self.assertEqual(
            2, periodic.end_stale_reservations(self.world.core, 900)
        )
        self.assertEqual('in-use', self.status(attached))
        self.assertEqual('available', self.status(reserved))

    def test_case_22_a_create_that_comes_again_does_nothing(self):
        volume_id = self.make()
        self.world.write(volume_id, 0, b'data')
        before = len(self.world.all(models.Job))
        for confirm in True, False:
            self.api.create_volume(
                CALLER, volume_id, size_bytes=MIB, confirm=confirm
            )
        self.assertEqual(before, len(self.world.all(models.Job)))
        found = self.world.content(self.world.noun(volume_id))
        self.assertEqual(b'data', found[:4])

    # Snapshots.

    def test_case_23_a_snapshot_is_made_whole_and_goes(self):
        snapshot_id = self.snap(self.make())
        found = self.api.get_snapshot(CALLER, snapshot_id)
        self.assertEqual(
            ('available', '100%'), (found['status'], found['progress'])
        )
        self.api.delete_snapshot(CALLER, snapshot_id, confirm=True)
        with self.assertRaises(errors.NotFound):
            self.api.get_snapshot(CALLER, snapshot_id)

    def test_case_24_a_volume_in_use_is_kept_only_by_force(self):
        volume_id = self.make()
        self.attach(volume_id)
        with self.assertRaises(errors.Invalid):
            self.snap(volume_id)
        snapshot_id = self.snap(volume_id, force=True)
        self.assertEqual('available', self.snapshot_status(snapshot_id))
        self.assertEqual('in-use', self.status(volume_id))

    def test_case_25_a_snapshot_that_failed_can_be_deleted(self):
        volume_id = self.make()
        self.driver.troubles['snapshot'] = errors.Invalid('too deep')
        snapshot_id = self.snap(volume_id)
        self.assertEqual('error', self.snapshot_status(snapshot_id))
        self.api.delete_snapshot(CALLER, snapshot_id, confirm=True)
        with self.assertRaises(errors.NotFound):
            self.api.get_snapshot(CALLER, snapshot_id)

    def test_case_25_a_snapshot_in_the_making_is_not_deleted(self):
        volume_id = self.make()
        self.driver.troubles['snapshot'] = errors.Unavailable('no answer')
        snapshot_id = self.snap(volume_id)
        self.assertEqual('creating', self.snapshot_status(snapshot_id))
        with self.assertRaises(errors.Invalid):
            self.api.delete_snapshot(CALLER, snapshot_id, confirm=True)

    def test_case_26_a_busy_snapshot_stays_available(self):
        snapshot_id = self.snap(self.make())
        self.driver.troubles['delete_snapshot'] = errors.Busy('read')
        self.api.delete_snapshot(CALLER, snapshot_id, confirm=True)
        self.world.recover()
        self.assertEqual('available', self.snapshot_status(snapshot_id))
        self.driver.troubles.clear()
        self.api.delete_snapshot(CALLER, snapshot_id, confirm=True)
        with self.assertRaises(errors.NotFound):
            self.api.get_snapshot(CALLER, snapshot_id)

    def test_case_27_a_volume_of_a_snapshot_is_as_large_at_least(self):
        snapshot_id = self.snap(self.make(size_bytes=2 * MIB))
        same, larger = ids.new(), ids.new()
        self.api.create_volume(CALLER, same, snapshot_id=snapshot_id)
        self.api.create_volume(
            CALLER, larger, snapshot_id=snapshot_id, size_bytes=3 * MIB
        )
        found = self.get(same)
        self.assertEqual(
            (2 * MIB, snapshot_id, 'b#pool', 'available'),
            (found['size_bytes'], found['snapshot_id'], found['host'],
             found['status']),
        )
        self.assertEqual(3 * MIB, self.get(larger)['size_bytes'])
        with self.assertRaisesRegex(errors.Invalid, 'smaller'):
            self.api.create_volume(
                CALLER, ids.new(), snapshot_id=snapshot_id, size_bytes=MIB
            )

    def test_case_27_only_a_snapshot_that_is_available_is_a_source(self):
        volume_id = self.make()
        self.driver.troubles['snapshot'] = errors.Invalid('too deep')
        snapshot_id = self.snap(volume_id)
        with self.assertRaises(errors.Invalid):
            self.api.create_volume(
                CALLER, ids.new(), snapshot_id=snapshot_id
            )

    def test_case_28_a_clone_outlives_its_snapshot_and_its_source(self):
        volume_id = self.make()
        self.world.write(volume_id, 0, b'data')
        snapshot_id = self.snap(volume_id)
        clone = self.make(size_bytes=None, snapshot_id=snapshot_id)
        self.api.delete_snapshot(CALLER, snapshot_id, confirm=True)
        self.delete(volume_id)
        found = self.world.content(self.world.noun(clone))
        self.assertEqual(b'data', found[:4])

    def test_case_29_a_pool_without_snapshots_says_so_and_does_nothing(self):
        directory = fixtures.plain_directory(self)
        self.world = World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        self.api = VolumeAPI.local(VolumeManager(self.world.core))
        volume_id = self.make()
        self.world.node.arm(None)
        with self.assertRaisesRegex(errors.Unsupported, 'no Snapshots'):
            self.snap(volume_id)
        self.assertEqual([], self.world.node.trace)
        self.assertEqual({}, self.world.live(models.Snapshot))
