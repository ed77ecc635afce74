# SPDX-License-Identifier: Apache-2.0
"""nova-volume's cases from 30 on: hosts, images, restarts, projects."""

import json
import os

from tests.fault.world import CALLER
from tests.integration.acceptance_case import AcceptanceCase
from tests.integration.acceptance_case import ADMIN
from tests.integration.acceptance_case import HOST
from tests.integration.acceptance_case import MIB
from tests.integration.acceptance_case import OTHER
from volume import errors
from volume import ids
from volume.context import Caller
from volume.db import models
from volume.nbd import NbdClient
from volume.verbs import volumes


class Hosts(AcceptanceCase):
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
        with self.assertRaises(errors.Unavailable):
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
        self.assertEqual([], self.world.open_jobs())
        self.assertEqual(set(), self.exported())
        self.api.unreserve_volume(CALLER, volume_id)
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
