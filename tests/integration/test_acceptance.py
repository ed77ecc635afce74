# SPDX-License-Identifier: Apache-2.0
"""nova-volume's 70 acceptance cases, by their numbers.

Each case that concerns what there is now is a test here, or stands in
``ELSEWHERE`` with the test that proves it; the others stand in ``LATER``
with the reason. The verbs come through ``VolumeAPI``, as a compute service
sends them; jobs run inline, so that every state can be looked at.
"""

import importlib
import json
import os
import re
import unittest

from sqlalchemy import select

from tests.fault.world import CALLER
from tests.fault.world import World
from volume import errors
from volume import ids
from volume import periodic
from volume.context import Caller
from volume.db import models
from volume.drivers.qcow import QcowDriver
from volume.manager import VolumeManager
from volume.nbd import NbdClient
from volume.rpcapi import VolumeAPI
from volume.testing import faults
from volume.testing import fixtures
from volume.verbs import volumes

MIB = 1 << 20
GIB = 1 << 30
HOST = {'host': 'compute-1', 'ip': '192.0.2.1', 'initiator': 'iqn.x:1'}
OTHER = {'host': 'compute-2', 'ip': '192.0.2.2'}
ADMIN = Caller(project_id='admin', user_id='root', is_admin=True)

ELSEWHERE = {
    14: 'tests.unit.test_runner.Sweeps.'
        'test_what_is_leased_or_not_due_or_anothers_is_left',
    19: 'tests.integration.test_races.Races.test_many_deletes_delete_once',
    49: 'tests.conformance.test_exports',
    52: 'tests.fault.test_flows.QcowFaults',
    61: 'tests.integration.test_service.Starts.'
        'test_a_backend_that_fails_its_check_leaves_the_others_serving',
    62: 'tests.unit.test_conf.Options.'
        'test_the_database_s_password_is_not_shown',
    67: 'tests.unit.test_backends.Sections.'
        'test_a_check_that_fails_leaves_the_others_up',
}
CHANGED = {
    6: 'nothing is exported at create: the same holds of the first attach',
    7: 'a handle takes the place of provider_location',
    14: 'any manager that serves the backend may; of another backend, none',
    29: 'it is refused before there is a row; nothing has to say error',
    33: 'there are no driver hooks: an access that cannot be undone does it',
    44: 'there is no size 0: a size is a positive number of sectors',
    49: 'an export is named by its attachment, so none can meet another',
    61: 'any backend, not only a storage repository',
    62: 'secrets of the configuration; options of SM come with xensm',
    67: 'directories of the file driver, until there is NFS',
}
LATER = {
    9: 'quota',
    43: 'lvm', 45: 'lvm', 46: 'lvm', 47: 'tgt', 48: 'tgt', 50: 'iscsi',
    53: 'xensm', 54: 'xensm', 55: 'xensm', 56: 'xensm', 57: 'xensm',
    58: 'xensm', 59: 'xensm', 60: 'xensm', 63: 'xensm', 64: 'xensm',
    65: 'xensm', 66: 'a SAN driver', 68: 'a SAN driver',
}


class TroubledQcow(QcowDriver):
    """The qcow driver, with an error for a verb where a test says so."""

    def __init__(self, conf, node):
        super().__init__(conf, node)
        self.troubles = {}

    def _meet(self, verb):
        if verb in self.troubles:
            raise self.troubles[verb]

    def create(self, volume):
        self._meet('create')
        return super().create(volume)

    def delete(self, volume):
        self._meet('delete')
        super().delete(volume)

    def snapshot(self, snapshot):
        self._meet('snapshot')
        return super().snapshot(snapshot)

    def delete_snapshot(self, snapshot):
        self._meet('delete_snapshot')
        super().delete_snapshot(snapshot)


class Acceptance(unittest.TestCase):
    """A service with one qcow backend, and its compute service."""

    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = World(
            self, f'driver = qcow\ndirectories = {directory}\ncapacity_gib=4',
            blockd=True,
        )
        self.boot()

    def boot(self):
        """Take the world's new process; its driver can be troubled."""
        backend = self.world.backends['b']
        self.driver = TroubledQcow(backend.conf, self.world.node)
        self.driver.check()
        backend.driver = self.driver
        self.api = VolumeAPI.local(VolumeManager(self.world.core))

    def make(self, **wish):
        """Return the id of a volume that is available."""
        volume_id = ids.new()
        self.api.create_volume(
            CALLER, volume_id, **{'size_bytes': MIB, **wish}
        )
        self.assertEqual('available', self.status(volume_id))
        return volume_id

    def snap(self, volume_id, **wish):
        snapshot_id = ids.new()
        self.api.create_snapshot(
            CALLER, volume_id, snapshot_id, confirm=True, **wish
        )
        return snapshot_id

    def get(self, volume_id):
        return self.api.get_volume(CALLER, volume_id)

    def status(self, volume_id):
        return self.get(volume_id)['status']

    def snapshot_status(self, snapshot_id):
        return self.api.get_snapshot(CALLER, snapshot_id)['status']

    def delete(self, volume_id, **how):
        self.api.delete_volume(CALLER, volume_id, confirm=True, **how)

    def gone(self, volume_id):
        with self.assertRaises(errors.NotFound):
            self.get(volume_id)

    def attach(self, volume_id, host=HOST):
        """Attach as nova-compute does; return the connection_info."""
        self.api.reserve_volume(CALLER, volume_id)
        info = self.api.initialize_connection(CALLER, volume_id, host)
        self.api.attach_volume(CALLER, volume_id, ids.new(), '/dev/vdb')
        return info

    def exported(self):
        return self.world.backends['b'].exporter.exported()

    def reset(self, volume_id, status):
        volumes.reset_status(self.world.core, ADMIN, volume_id, status)

    def row(self, volume_id):
        return self.world.db.read(lambda s: s.get(models.Volume, volume_id))

    def claimed(self):
        return self.world.db.read(
            lambda s: s.scalars(select(models.Pool)).one().claimed_bytes
        )

    def crash(self, verb):
        """Die at the first thing that is done to the storage."""
        self.world.node.arm(faults.Fault('crash', 1, True, 'run qemu-img'))
        with self.assertRaises(faults.Crash):
            verb()
        self.world.restart()
        self.boot()

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
        exporter = self.world.backends['b'].exporter
        self.world.backends['b'].exporter = None
        self.world.settings = self.world.settings
        with self.assertRaises(errors.VolumeError):
            self.api.initialize_connection(CALLER, volume_id, HOST)
        self.world.backends['b'].exporter = exporter
        self.api.terminate_connection(CALLER, volume_id, HOST)
        self.api.unreserve_volume(CALLER, volume_id)
        self.delete(volume_id)
        self.assertEqual(set(), self.world.stored())

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
        self.assertIn('capacity -1', found['reason'])

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

    # Attach and detach.

    def test_case_30_of_two_reservations_one_succeeds(self):
        volume_id = self.make()
        self.api.reserve_volume(CALLER, volume_id)
        self.assertEqual('attaching', self.status(volume_id))
        with self.assertRaises(errors.Invalid):
            self.api.reserve_volume(CALLER, volume_id)

    def test_case_31_unreserve_changes_attaching_alone(self):
        volume_id = self.make()
        self.api.reserve_volume(CALLER, volume_id)
        self.api.unreserve_volume(CALLER, volume_id)
        self.assertEqual('available', self.status(volume_id))
        self.attach(volume_id)
        self.api.unreserve_volume(CALLER, volume_id)
        self.assertEqual('in-use', self.status(volume_id))
        self.reset(other := self.make(), 'error')
        self.api.unreserve_volume(CALLER, other)
        self.assertEqual('error', self.status(other))

    def test_case_32_an_attached_volume_says_to_whom_and_since_when(self):
        volume_id, instance = self.make(), ids.new()
        self.api.reserve_volume(CALLER, volume_id)
        self.api.initialize_connection(CALLER, volume_id, HOST)
        with self.assertRaises(errors.Invalid):
            self.api.attach_volume(CALLER, volume_id, 'vm-7', '/dev/vdb')
        self.api.attach_volume(CALLER, volume_id, instance, '/dev/vdb')
        found = self.get(volume_id)
        self.assertEqual(
            ('in-use', 'attached', instance, '/dev/vdb'),
            (found['status'], found['attach_status'],
             found['instance_uuid'], found['mountpoint']),
        )
        (row,) = self.world.all(models.Attachment)
        self.assertEqual(self.world.now, row.attached_at)

    def test_case_33_an_access_that_cannot_be_ended_is_an_error(self):
        volume_id = self.make()
        self.attach(volume_id)
        exporter = self.world.backends['b'].exporter
        self.world.backends['b'].exporter = None
        self.api.begin_detaching(CALLER, volume_id)
        self.world.settings = None
        with self.assertRaises(errors.VolumeError):
            self.world.now += 0
            self.fail_at_once(
                self.api.terminate_connection, CALLER, volume_id, HOST
            )
        self.assertEqual('error_detaching', self.status(volume_id))
        self.assertEqual('attached', self.get(volume_id)['attach_status'])
        self.world.backends['b'].exporter = exporter

    def test_case_34_detaching_can_be_rolled_back(self):
        volume_id = self.make()
        with self.assertRaises(errors.Invalid):
            self.api.begin_detaching(CALLER, volume_id)
        self.attach(volume_id)
        self.api.begin_detaching(CALLER, volume_id)
        self.assertEqual('detaching', self.status(volume_id))
        self.api.roll_detaching(CALLER, volume_id)
        self.assertEqual('in-use', self.status(volume_id))

    def test_case_35_a_detached_volume_knows_no_instance(self):
        volume_id = self.make()
        with self.assertRaises(errors.Invalid):
            self.api.detach_volume(CALLER, volume_id)
        self.attach(volume_id)
        self.api.begin_detaching(CALLER, volume_id)
        self.api.terminate_connection(CALLER, volume_id, HOST)
        self.api.detach_volume(CALLER, volume_id)
        found = self.get(volume_id)
        self.assertEqual(
            ('available', 'detached', None, None),
            (found['status'], found['attach_status'],
             found['instance_uuid'], found['mountpoint']),
        )

    def test_case_36_connecting_and_ending_may_be_repeated(self):
        volume_id = self.make()
        self.api.reserve_volume(CALLER, volume_id)
        first, second = (
            self.api.initialize_connection(CALLER, volume_id, HOST)
            for _ in range(2)
        )
        self.assertEqual(first, second)
        self.assertEqual(1, len(self.exported()))
        for _ in range(2):
            self.api.terminate_connection(CALLER, volume_id, HOST)
        self.assertEqual(set(), self.exported())

    def test_case_37_connection_info_is_json_with_its_identity(self):
        volume_id = self.make()
        self.api.reserve_volume(CALLER, volume_id)
        info = self.api.initialize_connection(
            CALLER, volume_id, {**HOST, 'volume_id': 'x', 'uri': 'y'}
        )
        self.assertEqual(info, json.loads(json.dumps(info)))
        self.assertEqual('nbd', info['driver_volume_type'])
        self.assertEqual(volume_id, info['data']['volume_id'])
        self.assertNotEqual('y', info['data']['uri'])

    def test_case_38_to_end_one_hosts_access_leaves_anothers(self):
        volume_id = self.make(multiattach=True)
        self.attach(volume_id)
        info = self.api.initialize_connection(CALLER, volume_id, OTHER)
        self.api.attach_volume(
            CALLER, volume_id, ids.new(), '/dev/vdc', host_name='compute-2'
        )
        self.api.terminate_connection(CALLER, volume_id, HOST)
        client = NbdClient(info['data']['uri'])
        self.addCleanup(client.close)
        client.pread_into(bytearray(512), 0)
        self.assertEqual(1, len(self.exported()))

    def test_case_38_each_of_two_hosts_is_recorded_for_itself(self):
        volume_id = self.make(multiattach=True)
        for host in HOST, OTHER:
            self.api.initialize_connection(CALLER, volume_id, host)
        with self.assertRaisesRegex(errors.Invalid, 'name the host'):
            self.api.attach_volume(CALLER, volume_id, ids.new(), '/dev/vdb')
        instance = ids.new()
        self.api.attach_volume(
            CALLER, volume_id, instance, '/dev/vdb', host_name='compute-2'
        )
        self.assertEqual(
            {'compute-1': None, 'compute-2': instance},
            {row.host: row.instance_uuid
             for row in self.world.all(models.Attachment)},
        )

    def test_case_39_who_gave_up_waiting_and_ends_it_leaves_no_export(self):
        volume_id = self.make()
        self.api.reserve_volume(CALLER, volume_id)
        backend = self.world.backends['b']
        exporter, backend.exporter = backend.exporter, None
        wait = self.world.wait

        def too_long(job_id, timeout_s):
            raise errors.Unknown('it goes on')

        object.__setattr__(self.world.core, 'wait', too_long)
        with self.assertRaises(errors.Unknown):
            self.api.initialize_connection(CALLER, volume_id, HOST)
        self.assertEqual(1, len(self.world.open_jobs()))
        object.__setattr__(self.world.core, 'wait', wait)
        backend.exporter = exporter
        self.api.terminate_connection(CALLER, volume_id, HOST)
        self.api.unreserve_volume(CALLER, volume_id)
        self.world.recover()
        self.assertEqual(set(), self.exported())
        self.assertEqual([], self.world.all(models.Attachment))
        self.assertEqual('available', self.status(volume_id))

    # Images.

    def image(self, size_bytes=MIB, name='image.raw'):
        path = os.path.join(self.world.images, name)
        with open(path, 'wb') as f:
            f.write(b'i' * 512)
            f.truncate(size_bytes)
        return f'file://{path}'

    def test_case_40_a_volume_of_an_image_says_downloading_meanwhile(self):
        seen = []

        def note(event, payload):
            seen.append(event)

        url, volume_id = self.image(), ids.new()
        find = self.world.sources.find

        def watched(name):
            seen.append(self.row(volume_id).status)
            return find(name)

        self.world.sources.find = watched
        self.api.create_volume(
            CALLER, volume_id, size_bytes=MIB, image={'url': url}
        )
        self.assertEqual(['downloading'], seen)
        self.assertEqual('available', self.status(volume_id))
        found = self.world.content(self.world.noun(volume_id))
        self.assertEqual(b'i' * 512 + bytes(MIB - 512), found)

    def test_case_40_an_unknown_image_is_an_error_that_names_it(self):
        volume_id = ids.new()
        url = f'file://{self.world.images}/none.raw'
        self.api.create_volume(
            CALLER, volume_id, size_bytes=MIB, image={'url': url}
        )
        found = self.get(volume_id)
        self.assertEqual('error', found['status'])
        self.assertIn('none.raw', found['reason'])
        self.assertEqual(0, self.claimed())

    def test_case_41_an_image_may_be_as_large_as_its_volume(self):
        for size_bytes, status in (
            (MIB, 'available'), (MIB + 1, 'error'), (MIB - 1, 'available'),
        ):
            with self.subTest(size_bytes):
                volume_id = ids.new()
                self.api.create_volume(
                    CALLER, volume_id, size_bytes=MIB, image={
                        'url': self.image(size_bytes), 'format': 'raw',
                    },
                )
                self.assertEqual(status, self.status(volume_id))

    def test_case_42_an_upload_leaves_the_volume_as_it_was(self):
        volume_id = self.make()
        self.world.write(volume_id, 0, b'data')
        path = os.path.join(self.world.images, 'out.raw')
        self.api.copy_volume_to_image(
            CALLER, volume_id, f'file://{path}', confirm=True
        )
        self.assertEqual('available', self.status(volume_id))
        with open(path, 'rb') as f:
            self.assertEqual(b'data' + bytes(MIB - 4), f.read())
        self.attach(volume_id)
        self.api.copy_volume_to_image(
            CALLER, volume_id, f'file://{path}.2', confirm=True, force=True
        )
        self.assertEqual('in-use', self.status(volume_id))

    def test_case_42_an_upload_that_fails_leaves_it_as_it_was_too(self):
        volume_id = self.make()
        self.api.copy_volume_to_image(
            CALLER, volume_id, 'file:///nowhere/out.raw', confirm=True
        )
        found = self.get(volume_id)
        self.assertEqual('available', found['status'])
        self.assertIn('not uploaded', found['reason'])

    # What remains.

    def test_case_44_there_is_no_volume_of_no_size(self):
        with self.assertRaises(errors.Invalid):
            volumes.create(
                self.world.core, CALLER, volumes.NewVolume(size_bytes=0)
            )

    def test_case_51_after_a_restart_what_was_exported_is_exported(self):
        attached, idle = self.make(), self.make()
        before = self.attach(attached)
        self.world.node.blockd.stop()
        self.world.restart()
        self.boot()
        self.assertEqual(1, len(self.exported()))
        client = NbdClient(before['data']['uri'])
        self.addCleanup(client.close)
        client.pread_into(bytearray(512), 0)
        self.assertEqual('available', self.status(idle))
        self.assertEqual([], self.world.disagreements())

    def test_case_69_another_project_sees_no_volume_of_ours(self):
        volume_id = self.make()
        snapshot_id = self.snap(volume_id)
        other = Caller(project_id='q', user_id='v')
        for verb, args in (
            ('get_volume', (volume_id,)),
            ('get_snapshot', (snapshot_id,)),
            ('reserve_volume', (volume_id,)),
            ('unreserve_volume', (volume_id,)),
            ('begin_detaching', (volume_id,)),
            ('roll_detaching', (volume_id,)),
            ('initialize_connection', (volume_id, HOST)),
            ('terminate_connection', (volume_id, HOST)),
            ('attach_volume', (volume_id, ids.new(), '/dev/vdb')),
            ('detach_volume', (volume_id,)),
        ):
            with self.subTest(verb), self.assertRaises(errors.NotFound):
                getattr(self.api, verb)(other, *args)
        for verb in (
            lambda: self.api.create_volume(
                other, ids.new(), source_volume_id=volume_id
            ),
            lambda: self.api.create_volume(
                other, ids.new(), snapshot_id=snapshot_id
            ),
            lambda: self.api.create_snapshot(
                other, volume_id, ids.new(), confirm=True
            ),
            lambda: self.api.extend_volume(
                other, volume_id, 2, confirm=True
            ),
        ):
            with self.assertRaises(errors.NotFound):
                verb()
        self.api.delete_volume(other, volume_id, confirm=True)
        self.assertEqual('available', self.status(volume_id))
        self.assertEqual(
            volume_id, self.api.get_volume(ADMIN, volume_id)['id']
        )

    def test_case_70_a_status_is_set_only_to_one_that_may_be(self):
        volume_id = self.make()
        for status in (
            'creating', 'deleting', 'error', 'error_deleting', 'attaching',
            'in-use', 'detaching', 'available',
        ):
            self.reset(volume_id, status)
            self.assertEqual(status, self.status(volume_id))
        for status in 'deleted', 'downloading', '', 'x' * 100:
            with self.subTest(status), self.assertRaises(errors.Invalid):
                self.reset(volume_id, status)

    def fail_at_once(self, verb, *args):
        """Ask, and let the hour pass in which a job is tried again."""
        wait = self.world.wait

        def later(job_id, timeout_s):
            self.world.now += 3601
            return wait(job_id, timeout_s)

        object.__setattr__(self.world.core, 'wait', later)
        try:
            verb(*args)
        finally:
            object.__setattr__(self.world.core, 'wait', wait)


class TheTable(unittest.TestCase):
    """Every number is somewhere, and what is named is there."""

    def here(self):
        found = set()
        for name in dir(Acceptance):
            if match := re.match(r'test_case_(\d\d)_', name):
                found.add(int(match[1]))
        return found

    def test_each_of_the_70_cases_is_here_elsewhere_or_later(self):
        parts = [self.here(), set(ELSEWHERE), set(LATER)]
        self.assertEqual(set(range(1, 71)), set.union(*parts))
        self.assertEqual(70, sum(map(len, parts)))
        self.assertLessEqual(set(CHANGED), parts[0] | parts[1])

    def test_what_is_elsewhere_is_there(self):
        for number, name in ELSEWHERE.items():
            with self.subTest(number):
                module, attributes = name, []
                while True:
                    try:
                        found = importlib.import_module(module)
                        break
                    except ModuleNotFoundError:
                        module, _, last = module.rpartition('.')
                        attributes.insert(0, last)
                for attribute in attributes:
                    found = getattr(found, attribute)
