# SPDX-License-Identifier: Apache-2.0
"""The verbs of the RPC door, in one process, over a real file backend."""

import os
import unittest

from tests.fault.world import World
from volume import errors
from volume import ids
from volume.context import Caller
from volume.db import models
from volume.manager import VolumeManager
from volume.model import GIB
from volume.model import MIB
from volume.rpcapi import VolumeAPI
from volume.testing import fixtures

CALLER = Caller(project_id='p', user_id='u')
CONNECTOR = {'host': 'h1', 'ip': '127.0.0.1', 'initiator': 'iqn.x:y'}


class Serving(unittest.TestCase):
    """The verbs over a real database and a real file backend."""

    def setUp(self):
        pool = os.path.join(fixtures.state_dir(self), 'pool')
        os.mkdir(pool)
        self.world = World(self, (
            f'driver = file\ndirectories = {pool}\nexporter = local\n'
            'capacity_gib = 3\ntags = ssd'
        ))
        self.client = VolumeAPI.local(VolumeManager(self.world.core))
        self.own_id = ids.new()

    def make(self, **changes):
        return self.client.create_volume(
            CALLER, self.own_id, **{'size_bytes': MIB, **changes}
        )

    def status(self):
        return self.client.get_volume(CALLER, self.own_id)['status']

    def events(self):
        return [event for event, _ in self.world.events]

    def rows(self):
        return self.world.all(models.Volume)

    def test_a_cast_makes_a_whole_volume(self):
        self.client.create_volume(
            CALLER, self.own_id, confirm=False, size=1, name='n',
            metadata={'a': 'b'}, tags={'ssd'},
        )
        found = self.client.get_volume(CALLER, self.own_id)
        self.assertEqual(
            ('available', 1, GIB, 'n', {'a': 'b'}, 'detached', []),
            tuple(found[name] for name in (
                'status', 'size', 'size_bytes', 'display_name', 'metadata',
                'attach_status', 'attachments',
            )),
        )
        self.assertEqual({self.own_id}, self.world.stored())
        self.assertEqual(
            ['volume.create.start', 'volume.create.end'], self.events()
        )
        self.assertEqual([], self.world.disagreements())

    def test_the_same_cast_again_is_nothing(self):
        for _ in range(3):
            self.make(confirm=False, tags=['ssd'])
        self.make(confirm=True, tags=['ssd'])
        self.assertEqual(1, len(self.rows()))
        self.assertEqual(
            ['volume.create.start', 'volume.create.end'], self.events()
        )
        self.assertEqual([], self.world.disagreements())

    def test_another_request_for_the_same_id_is_a_conflict(self):
        self.make()
        with self.assertRaises(errors.Conflict):
            self.make(size_bytes=2 * MIB)
        self.make(size_bytes=2 * MIB, confirm=False)
        event, payload = self.world.events[-1]
        self.assertEqual('volume.create.error', event)
        self.assertEqual(
            (self.own_id, 'Conflict'),
            (payload['volume_id'], payload['error_kind']),
        )
        self.assertEqual(
            MIB, self.client.get_volume(CALLER, self.own_id)['size_bytes']
        )

    def test_another_projects_id_is_a_conflict_and_not_shown(self):
        self.make()
        with self.assertRaises(errors.Conflict):
            self.client.create_volume(
                Caller('q', 'v'), self.own_id, size_bytes=MIB
            )
        with self.assertRaises(errors.NotFound):
            self.client.get_volume(Caller('q', 'v'), self.own_id)

    def test_novas_bare_cast_for_a_known_row_is_a_mere_hint(self):
        self.make()
        self.client.create_volume(CALLER, self.own_id, confirm=False)
        self.assertEqual(
            ['volume.create.start', 'volume.create.end'], self.events()
        )
        self.assertEqual('available', self.status())

    def test_a_full_pool_refuses_a_call_and_leaves_no_row(self):
        with self.assertRaises(errors.NoSpace) as caught:
            self.make(size_bytes=4 * GIB)
        self.assertIn('without room', str(caught.exception))
        self.assertEqual([], self.rows())

    def test_a_full_pool_leaves_a_casts_row_in_error_with_the_reason(self):
        self.make(size_bytes=4 * GIB, confirm=False)
        found = self.client.get_volume(CALLER, self.own_id)
        self.assertEqual('error', found['status'])
        self.assertIn('without room', found['reason'])
        self.client.delete_volume(CALLER, self.own_id)
        with self.assertRaises(errors.NotFound):
            self.client.get_volume(CALLER, self.own_id)

    def test_sizes_are_gib_or_bytes_and_nothing_else(self):
        self.make(size_bytes=None, size='2')
        self.assertEqual(
            2 * GIB, self.client.get_volume(CALLER, self.own_id)['size_bytes']
        )
        for sizes in (
            {'size': '2Gb'}, {'size': 0}, {'size': -1}, {'size': '-1'},
            {'size': 1.5}, {'size': True}, {'size': '²'},
            {'size': 1, 'size_bytes': MIB}, {'size_bytes': 1}, {},
            {'size': '9' * 13},
        ):
            with self.subTest(sizes), self.assertRaises(errors.VolumeError):
                self.client.create_volume(
                    CALLER, ids.new(), **sizes, name='n'
                )
        self.assertEqual(1, len(self.rows()))

    def test_an_id_that_is_no_uuid_is_refused(self):
        for bad in 'x', '../../etc', '', 'G' * 36:
            with self.subTest(bad), self.assertRaises(errors.Invalid):
                self.client.create_volume(CALLER, bad, size=1)
            with self.subTest(bad), self.assertRaises(errors.Invalid):
                self.client.delete_volume(CALLER, bad, confirm=True)
        self.assertEqual([], self.rows())

    def test_a_delete_that_overtakes_its_create_wins(self):
        self.client.delete_volume(CALLER, self.own_id)
        self.make(confirm=False)
        self.assertEqual('deleted', self.make()['status'])
        with self.assertRaises(errors.NotFound):
            self.client.get_volume(CALLER, self.own_id)
        self.assertEqual(set(), self.world.stored())
        self.assertEqual([], self.events())
        self.assertEqual([], self.world.disagreements())

    def test_a_delete_again_is_nothing(self):
        self.make()
        for _ in range(3):
            self.client.delete_volume(CALLER, self.own_id)
        self.assertEqual(
            ['volume.create.start', 'volume.create.end',
             'volume.delete.start', 'volume.delete.end'], self.events(),
        )

    def test_a_delete_while_it_is_being_deleted_is_nothing(self):
        self.make()
        runs = self.world.core
        slow = VolumeAPI.local(VolumeManager(
            type(runs)(**{
                name: getattr(runs, name)
                for name in runs.__dataclass_fields__
            } | {'hint': lambda *known: None})
        ))
        slow.delete_volume(CALLER, self.own_id, confirm=True)
        self.assertEqual('deleting', self.status())
        slow.delete_volume(CALLER, self.own_id, confirm=True)
        self.assertNotIn('volume.delete.error', self.events())
        self.world.restart()
        self.assertEqual(set(), self.world.stored())

    def test_a_foreign_project_cannot_delete_nor_bury(self):
        self.make()
        self.client.delete_volume(Caller('q', 'v'), self.own_id)
        self.assertEqual('available', self.status())

    def test_an_attached_volume_is_not_deleted_and_that_is_told(self):
        self.make()
        self.client.initialize_connection(CALLER, self.own_id, CONNECTOR)
        self.client.delete_volume(CALLER, self.own_id)
        event, payload = self.world.events[-1]
        self.assertEqual('volume.delete.error', event)
        self.assertIn('attached', payload['reason'])

    def test_extending_again_is_nothing(self):
        self.make()
        for _ in range(2):
            self.client.extend_volume(
                CALLER, self.own_id, new_size_bytes=2 * MIB
            )
        self.client.extend_volume(CALLER, self.own_id, 1, confirm=True)
        self.assertNotIn('volume.resize.error', self.events())
        self.assertEqual(
            GIB, self.client.get_volume(CALLER, self.own_id)['size_bytes']
        )
        self.client.extend_volume(CALLER, self.own_id, new_size_bytes=MIB)
        self.assertEqual('volume.resize.error', self.events()[-1])

    def test_a_host_attaches_and_detaches_by_the_six_verbs(self):
        instance = ids.new()
        self.make()
        api, args = self.client, (CALLER, self.own_id)
        api.reserve_volume(*args)
        self.assertEqual('attaching', self.status())
        with self.assertRaises(errors.Invalid):
            api.reserve_volume(*args)
        info = api.initialize_connection(*args, CONNECTOR)
        self.assertEqual(
            info, api.initialize_connection(*args, CONNECTOR)
        )
        self.assertIn('driver_volume_type', info)
        api.attach_volume(*args, instance, '/dev/vdb')
        found = api.get_volume(*args)
        self.assertEqual(
            ('in-use', 'attached', instance, '/dev/vdb'),
            tuple(found[name] for name in (
                'status', 'attach_status', 'instance_uuid', 'mountpoint',
            )),
        )
        with self.assertRaises(errors.Invalid):
            api.initialize_connection(*args, {'host': 'h2'})
        api.begin_detaching(*args)
        api.roll_detaching(*args)
        self.assertEqual('in-use', self.status())
        api.begin_detaching(*args)
        api.terminate_connection(*args, CONNECTOR)
        api.terminate_connection(*args, CONNECTOR)
        api.detach_volume(*args)
        self.assertEqual('available', self.status())
        with self.assertRaises(errors.Invalid):
            api.detach_volume(*args)
        self.assertEqual([], self.world.disagreements())

    def test_a_reservation_is_given_back(self):
        self.make()
        self.client.reserve_volume(CALLER, self.own_id)
        self.client.unreserve_volume(CALLER, self.own_id)
        self.assertEqual('available', self.status())
        self.client.unreserve_volume(CALLER, self.own_id)
        self.assertEqual('available', self.status())

    def test_an_instance_that_is_no_uuid_is_refused(self):
        self.make()
        with self.assertRaises(errors.Invalid):
            self.client.attach_volume(CALLER, self.own_id, 'vm', '/dev/vdb')
        self.assertEqual('available', self.status())

    def test_a_volume_says_nothing_of_its_connection(self):
        self.make()
        info = self.client.initialize_connection(
            CALLER, self.own_id, {**CONNECTOR, 'secret': 'sesame'}
        )
        found = self.client.get_volume(CALLER, self.own_id)
        self.assertEqual('h1', found['attachments'][0]['host'])
        self.assertNotIn('sesame', repr(found))
        self.assertNotIn(str(info['data']), repr(found))

    def test_an_upload_writes_the_image_that_it_names(self):
        self.make()
        path = os.path.join(self.world.images, 'out.raw')
        self.client.copy_volume_to_image(
            CALLER, self.own_id, f'file://{path}'
        )
        self.assertEqual('available', self.status())
        self.assertEqual(MIB, os.path.getsize(path))
        self.client.copy_volume_to_image(CALLER, self.own_id, 'no-url')
        self.assertEqual('volume.upload.error', self.events()[-1])

    def test_wake_runs_a_job_of_ours_and_leaves_others(self):
        hints = []
        core = self.world.core
        for is_ours in True, False:
            woken = VolumeAPI.local(VolumeManager(type(core)(
                db=core.db, hint=lambda *job: hints.append(job[0].id),
                wait=core.wait, owner=core.owner, owner_host='node-1',
                runs=lambda backend, ours=is_ours: ours,
            )))
            volume_id = ids.new()
            woken.create_volume(CALLER, volume_id, size_bytes=MIB)
            (job_id,) = hints
            woken.wake(CALLER, job_id)
            self.assertEqual([job_id] * (1 + is_ours), hints)
            hints.clear()


class Snapshots(unittest.TestCase):
    """Snapshots by cast, on a backend that has them."""

    def setUp(self):
        pool = os.path.join(fixtures.state_dir(self), 'pool')
        os.mkdir(pool)
        self.world = World(
            self, f'driver = qcow\ndirectories = {pool}\nexporter = nbd',
            blockd=True,
        )
        self.client = VolumeAPI.local(VolumeManager(self.world.core))
        self.volume_id, self.own_id = ids.new(), ids.new()
        self.client.create_volume(CALLER, self.volume_id, size_bytes=MIB)

    def take(self):
        self.client.create_snapshot(CALLER, self.volume_id, self.own_id)

    def test_a_snapshot_is_made_once_and_deleted_once(self):
        self.take()
        self.take()
        found = self.client.get_snapshot(CALLER, self.own_id)
        self.assertEqual(
            ('available', '100%', self.volume_id, MIB),
            tuple(found[name] for name in (
                'status', 'progress', 'volume_id', 'size_bytes',
            )),
        )
        for _ in range(2):
            self.client.delete_snapshot(CALLER, self.own_id)
        with self.assertRaises(errors.NotFound):
            self.client.get_snapshot(CALLER, self.own_id)
        self.assertEqual(
            ['snapshot.create.start', 'snapshot.create.end',
             'snapshot.delete.start', 'snapshot.delete.end'],
            [event for event, _ in self.world.events
             if event.startswith('snapshot')],
        )

    def test_a_delete_that_overtakes_its_snapshot_wins(self):
        self.client.delete_snapshot(CALLER, self.own_id)
        self.take()
        with self.assertRaises(errors.NotFound):
            self.client.get_snapshot(CALLER, self.own_id)
        self.assertEqual([], self.world.disagreements())

    def test_a_volume_is_made_from_a_snapshot_of_the_same_size(self):
        self.take()
        clone_id = ids.new()
        self.client.create_volume(
            CALLER, clone_id, self.own_id, confirm=False
        )
        found = self.client.get_volume(CALLER, clone_id)
        self.assertEqual(
            ('available', self.own_id, MIB),
            (found['status'], found['snapshot_id'], found['size_bytes']),
        )
