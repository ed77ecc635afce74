# SPDX-License-Identifier: Apache-2.0
"""The clients that people have: python-cinderclient and openstacksdk.

Over a real socket. What they ask at their start stands in the tests: a
service that does not answer those cannot be used by them at all.
"""

import logging
import unittest
import warnings

import openstack
from cinderclient import api_versions
from cinderclient import client as cinder
from cinderclient import exceptions as cinder_exceptions
from cinderclient.contrib import noauth
from keystoneauth1 import session
from openstack import exceptions as sdk_exceptions

from tests.integration import serving
from volume import model

ROLES = 'api, manager'
HOST = {'host': 'h1', 'ip': '192.0.2.1'}


class Asked(logging.Handler):
    """Collects method, path and status from the access log."""

    def __init__(self, test):
        super().__init__()
        self.calls = []
        log = logging.getLogger('volume.api.access')
        level = log.level
        log.setLevel(logging.INFO)
        log.addHandler(self)
        test.addCleanup(log.removeHandler, self)
        test.addCleanup(log.setLevel, level)

    def emit(self, record):
        _, method, path, status, *_ = record.args
        self.calls.append(f'{method} {path} {status}')


class Cinderclient(unittest.TestCase):
    """python-cinderclient with its noauth plugin."""

    def setUp(self):
        self.world = serving.World(self, roles=ROLES, snapshots=True)
        self.asked = Asked(self)
        self.client = self.connect('3.59')

    def connect(self, version):
        plugin = noauth.CinderNoAuthPlugin(
            'user', 'red', endpoint=f'{self.world.service.address}/v3'
        )
        asking = session.Session(auth=plugin)
        self.addCleanup(asking.session.close)
        return cinder.Client(version, session=asking)

    def settled(self, manager, thing, status='available'):
        return serving.until(
            lambda: manager.get(thing.id),
            lambda thing: thing.status in (status, 'error'),
        )

    def test_it_starts_by_asking_for_the_versions(self):
        url = f'{self.world.service.address}/v3/'
        self.assertEqual(
            ('3.0', '3.59'),
            tuple(v.get_string() for v in cinder.get_server_version(url)),
        )
        newest = self.connect('3.71')
        found = api_versions.discover_version(
            newest, api_versions.APIVersion('3.59')
        )
        self.assertEqual('3.59', found.get_string())
        self.assertEqual(['GET / 300', 'GET / 300'], self.asked.calls)

    def test_volumes_and_snapshots_live_and_end(self):
        volumes, snapshots = self.client.volumes, self.client.volume_snapshots
        made = volumes.create(1, name='data', metadata={'a': 'b'})
        volume = self.settled(volumes, made)
        self.assertEqual('available', volume.status)
        self.assertEqual('POST /v3/red/volumes 202', self.asked.calls[0])
        self.assertEqual(made.id, volumes.find(name='data').id)
        self.assertEqual([made.id], [each.id for each in volumes.list(
            search_opts={'metadata': {'a': 'b'}, 'status': 'available'},
            sort='name:asc', limit=1,
        )])
        volumes.set_metadata(volume, {'c': 'd'})
        volumes.delete_metadata(volume, ['a'])
        self.assertEqual({'c': 'd'}, volumes.get(volume.id).metadata)
        volumes.set_image_metadata(volume, {'hw_disk_bus': 'virtio', 'x': '1'})
        volumes.delete_image_metadata(volume, ['x'])
        self.assertEqual(
            {'hw_disk_bus': 'virtio'},
            volumes.get(volume.id).volume_image_metadata,
        )
        volumes.update(volume, name='other', description='d')
        snapshot = self.settled(
            snapshots, snapshots.create(volume.id, name='s')
        )
        self.assertEqual('available', snapshot.status)
        volumes.revert_to_snapshot(volume, snapshot)
        self.settled(volumes, volume)
        snapshots.update(snapshot, name='t')
        self.assertEqual('t', snapshots.list()[0].name)
        clone = self.settled(
            volumes, volumes.create(1, snapshot_id=snapshot.id)
        )
        self.assertEqual('available', clone.status)
        snapshots.delete(snapshot)
        self.world.gone(snapshot.id, 'snapshot')
        volumes.extend(volume, 2)
        self.assertEqual(2, self.settled(volumes, volume).size)
        for each in volume, clone:
            volumes.delete(each)
            self.world.gone(each.id)
        with self.assertRaises(cinder_exceptions.NotFound):
            volumes.get(volume.id)

    def test_pages_are_followed(self):
        names = [f'v{number}' for number in range(3)]
        for name in names:
            self.client.volumes.create(1, name=name)
        listed = self.client.volumes.list(limit=2, sort='name:asc')
        self.assertEqual(names[:2], [each.name for each in listed])
        rest = self.client.volumes.list(
            marker=listed[-1].id, sort='name:asc'
        )
        self.assertEqual(names[2:], [each.name for each in rest])
        for each in self.client.volumes.list():
            self.settled(self.client.volumes, each)

    def test_a_volume_is_attached_and_let_go(self):
        volumes = self.client.volumes
        volume = self.settled(volumes, volumes.create(1))
        made = self.client.attachments.create(volume.id, HOST, mode='rw')
        self.assertEqual(
            'local', made['connection_info']['driver_volume_type']
        )
        self.client.attachments.complete(made['id'])
        volume = volumes.get(volume.id)
        self.assertEqual('in-use', volume.status)
        self.assertEqual(made['id'], volume.attachments[0]['attachment_id'])
        self.assertEqual([made['id']], [
            each.id for each in self.client.attachments.list()
        ])
        self.client.attachments.delete(made['id'])
        self.assertEqual('available', volumes.get(volume.id).status)

    def test_the_old_verbs_work_too(self):
        volumes = self.client.volumes
        volume = self.settled(volumes, volumes.create(1))
        volumes.reserve(volume)
        info = volumes.initialize_connection(volume, HOST)
        self.assertEqual('local', info['driver_volume_type'])
        volumes.attach(volume, None, '/dev/vdb', host_name='h1')
        self.assertEqual('in-use', volumes.get(volume.id).status)
        volumes.begin_detaching(volume)
        volumes.terminate_connection(volume, HOST)
        volumes.detach(volume)
        self.assertEqual('available', volumes.get(volume.id).status)

    def test_faults_are_understood(self):
        volumes = self.client.volumes
        with self.assertRaises(cinder_exceptions.OverLimit) as said:
            volumes.create(1000)
        self.assertIn('1 without room for it', str(said.exception))
        with self.assertRaises(cinder_exceptions.BadRequest):
            volumes.create(0)
        with self.assertRaises(cinder_exceptions.NotFound):
            volumes.get('no-such-id')
        with self.assertRaises(cinder_exceptions.NotFound):
            volumes.create(1, volume_type='none')

    def test_what_an_operator_asks_is_answered(self):
        client = self.client
        self.assertEqual(
            ['node-1@fast#pool'],
            [each.name for each in client.pools.list(detailed=True)],
        )
        self.assertEqual(['nova'], [
            each.zoneName for each in client.availability_zones.list()
        ])
        self.assertEqual({'__DEFAULT__', 'fast'}, {
            each.name for each in client.volume_types.list()
        })
        self.assertEqual('__DEFAULT__', client.volume_types.default().name)
        self.assertEqual('up', client.services.list()[0].state)
        self.assertEqual(-1, client.quotas.get('red').volumes)
        limits = {each.name: each.value
                  for each in client.limits.get().absolute}
        self.assertEqual(0, limits['totalVolumesUsed'])
        summary = client.volumes.summary(False)['volume-summary']
        self.assertEqual(0, summary['total_count'])


class Sdk(unittest.TestCase):
    """openstacksdk with ``auth_type: none`` and an endpoint of its own."""

    def setUp(self):
        caught = warnings.catch_warnings()
        caught.__enter__()
        self.addCleanup(caught.__exit__, None, None, None)
        warnings.simplefilter('ignore')  # its own, about its own future
        self.world = serving.World(self, roles=ROLES, snapshots=True)
        self.asked = Asked(self)
        self.cloud = openstack.connect(
            load_yaml_config=False, load_envvars=False, auth_type='none',
            endpoint=self.world.service.address,
            block_storage_endpoint_override=(
                f'{self.world.service.address}/v3'
            ),
        )
        self.addCleanup(self.cloud.close)
        self.door = self.cloud.block_storage

    def settled(self, thing, status='available'):
        return self.door.wait_for_status(
            thing, status, ['error'], interval=0.05, wait=serving.WAIT_S
        )

    def test_it_starts_by_asking_for_the_versions(self):
        self.assertEqual([], list(self.door.volumes()))
        self.assertEqual(
            ['GET /v3 200', 'GET /v3/ 200', 'GET /v3/volumes/detail 200'],
            self.asked.calls,
        )

    def test_volumes_snapshots_and_attachments_live_and_end(self):
        door = self.door
        volume = self.settled(door.create_volume(
            size=1, name='data', metadata={'a': 'b'},
            scheduler_hints={'tags': ['ssd']},
        ))
        self.assertEqual(volume.id, door.find_volume('data').id)
        self.assertEqual([volume.id], [
            each.id for each in door.volumes(status='available')
        ])
        snapshot = self.settled(
            door.create_snapshot(volume_id=volume.id, name='s')
        )
        self.assertEqual([snapshot.id], [
            each.id for each in door.snapshots(volume_id=volume.id)
        ])
        attachment = door.create_attachment(volume, connector=HOST)
        door.complete_attachment(attachment)
        self.assertEqual('in-use', door.get_volume(volume).status)
        self.assertEqual(
            'local', door.get_attachment(attachment).connection_info[
                'driver_volume_type'],
        )
        door.delete_attachment(attachment)
        self.assertEqual('available', door.get_volume(volume).status)
        door.set_volume_metadata(volume, c='d')
        door.delete_volume_metadata(volume, ['c'])
        self.assertEqual(
            {'a': 'b'}, dict(door.fetch_volume_metadata(volume).metadata)
        )
        door.revert_volume_to_snapshot(volume, snapshot)
        self.settled(door.get_volume(volume))
        door.delete_snapshot(snapshot, ignore_missing=False)
        door.wait_for_delete(snapshot, interval=0.05)
        door.extend_volume(volume, 2)
        serving.until(
            lambda: door.get_volume(volume),
            lambda volume: (volume.status, volume.size) == ('available', 2),
        )
        door.update_volume(volume, name='other')
        door.delete_volume(volume, ignore_missing=False)
        door.wait_for_delete(volume, interval=0.05)

    def test_faults_are_understood(self):
        with self.assertRaises(sdk_exceptions.HttpException) as said:
            self.door.create_volume(size=1000)
        self.assertEqual(413, said.exception.status_code)
        self.assertIn('1 without room for it', str(said.exception))
        with self.assertRaises(sdk_exceptions.BadRequestException):
            self.door.create_volume(size=0)
        with self.assertRaises(sdk_exceptions.NotFoundException):
            self.door.get_volume('0' * 8)

    def test_what_an_operator_asks_is_answered(self):
        door = self.door
        (pool,) = door.backend_pools()
        self.assertEqual('node-1@fast#pool', pool.name)
        self.assertLess(
            0, pool.capabilities['total_capacity_gb'] * model.GIB
        )
        self.assertEqual(['nova'], [
            each.name for each in door.availability_zones()
        ])
        self.assertEqual({'__DEFAULT__', 'fast'}, {
            each.name for each in door.types()
        })
        self.assertEqual(-1, door.get_quota_set('default').volumes)
        self.assertEqual(0, door.get_limits().absolute.total_volumes_used)
        self.assertEqual(2, len(list(door.services())))
        self.assertIn('OS-SCH-HNT', {
            each.alias for each in door.extensions()
        })
