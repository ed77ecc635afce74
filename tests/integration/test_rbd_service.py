# SPDX-License-Identifier: Apache-2.0
"""The service as a process, with a cluster of Ceph as its backend."""

from __future__ import annotations

import json
import os
import subprocess
import unittest
from typing import Any

from tests import rbd
from tests.process import ServiceProcess
from tests.rbd_client import Client
from volume import ids
from volume.drivers.rbd import pools

MIB = 1 << 20
SIZE = 8 * MIB
SECTION = """
[b]
driver = rbd
pools = {pool}
ceph_conf = {conf}
ceph_user = {user}
secret_uuid = 6b8f0d0e-2f0b-4b2e-9a57-6d1c0a3c9f10
timeout_s = 20
"""
CONNECTOR = {'host': 'compute-1', 'ip': '192.0.2.1'}


class RbdServiceTest(rbd.Pools, unittest.TestCase):
    """What a compute service does, with a stranger's eyes on the bytes."""

    kind = 'service'

    def setUp(self) -> None:
        self.user = rbd.user()
        self.pool = self.pool_names[0]
        self.clear(self.pool)  # its volumes were another database's
        self.api: Any = ServiceProcess(
            self, SECTION.format(
                pool=self.pool, conf=self.cluster.conf, user=self.user),
            directories=('images',),
            extra='image_allowed_directories = {root}/images\n',
        )
        # The directory is known only now.
        self.api.configure(
            SECTION.format(
                pool=self.pool, conf=self.cluster.conf, user=self.user),
            extra=f'image_allowed_directories = {self.api.root}/images\n')
        self.api.start()

    def image(self, kind: str) -> tuple[bytes, str]:
        """Return an image's bytes and its URL."""
        data = b''.join(
            bytes([65 + number]) * MIB if number % 3 else bytes(MIB)
            for number in range(SIZE // MIB))
        path = os.path.join(self.api.root, 'images', f'i.{kind}')
        raw = f'{path}.source'
        with open(raw, 'wb') as f:
            f.write(data)
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'raw', '-O', kind, raw, path],
            check=True, timeout=60)
        return data, f'file://{path}'

    def export(self, name: str) -> bytes:
        return self.cluster.read(
            'rbd', 'export', '--no-progress', f'{self.pool}/{name}', '-')

    def attach(self, volume_id: str) -> dict[str, Any]:
        made: dict[str, Any] = self.api.call(
            'POST', '/attachments', {'attachment': {
                'volume_uuid': volume_id, 'instance_uuid': ids.new(),
                'connector': CONNECTOR,
            }})['attachment']
        self.api.call('POST', f'/attachments/{made["id"]}/action', {
            'os-complete': {}})
        return made

    def test_volume_lives_from_an_image_to_its_end(self) -> None:
        for kind in 'raw', 'qcow2':
            data, url = self.image(kind)
            volume_id = self.api.create(size_bytes=SIZE, imageRef=url)
            self.api.wait(volume_id, 'available')
            name = f'volume-{volume_id}'
            self.assertEqual(data, self.export(name))
        snapshot_id = self.api.call('POST', '/snapshots', {'snapshot': {
            'volume_id': volume_id}})['snapshot']['id']
        self.api.wait(snapshot_id, 'available', kind='snapshot')
        made = self.attach(volume_id)
        info = made['connection_info']
        self.assertEqual('rbd', info['driver_volume_type'])
        self.assertEqual(f'{self.pool}/{name}', info['name'])
        self.assertNotIn('key', json.dumps(info).replace('secret', ''))
        host = Client(
            self, self.cluster.conf, info['auth_username'], info['name'])
        self.assertEqual('written', host.ask('write', 0, 'h'))
        clone_id = self.api.create(
            snapshot_id=snapshot_id, size_bytes=2 * SIZE)
        self.api.wait(clone_id, 'available')
        self.assertEqual(
            data + bytes(SIZE), self.export(f'volume-{clone_id}'))
        # The attachment's end is the end of the session that is open.
        self.api.call('DELETE', f'/attachments/{made["id"]}')
        self.assertEqual('error 108', host.ask('read', 0))
        self.api.wait(volume_id, 'available')
        self.assertEqual(
            b'h' * 4096 + data[4096:], self.export(name))
        self.api.action(volume_id, 'revert', {'snapshot_id': snapshot_id})
        self.api.wait(volume_id, 'available')
        self.assertEqual(data, self.export(name))
        for kind, each in (
            ('snapshot', snapshot_id), ('volume', volume_id),
            ('volume', clone_id),
        ):
            self.api.call('DELETE', f'/{kind}s/{each}')
            self.api.wait(each, 'gone', kind=kind)

    def test_attached_volume_grows_and_stays_attached(self) -> None:
        volume_id = self.api.create(size_bytes=SIZE)
        self.api.wait(volume_id, 'available')
        made = self.attach(volume_id)
        host = Client(
            self, self.cluster.conf, self.user,
            made['connection_info']['name'])
        self.assertEqual('written', host.ask('write', 0, 'h'))
        self.api.action(
            volume_id, 'os-extend', {'new_size_bytes': 2 * SIZE})
        self.api.wait(volume_id, 'in-use')
        self.assertEqual('written', host.ask('write', SIZE, 'i'))
        self.api.call('DELETE', f'/attachments/{made["id"]}')
        self.assertEqual(
            2 * SIZE, len(self.export(f'volume-{volume_id}')))

    def test_host_with_two_machines_keeps_the_one_that_stays(self) -> None:
        volume_id = self.api.call('POST', '/volumes', {
            'volume': {'size_bytes': SIZE},
            'OS-SCH-HNT:scheduler_hints': {'multiattach': True},
        })['volume']['id']
        self.api.wait(volume_id, 'available')
        first, second = self.attach(volume_id), self.attach(volume_id)
        host = Client(
            self, self.cluster.conf, self.user,
            second['connection_info']['name'])
        self.assertEqual('written', host.ask('write', 0, 'h'))
        self.api.call('DELETE', f'/attachments/{first["id"]}')
        self.assertEqual('written', host.ask('write', 0, 'i'))
        self.api.call('DELETE', f'/attachments/{second["id"]}')
        self.assertEqual('error 108', host.ask('write', 0, 'j'))

    def test_host_whose_attachment_was_lost_is_found_and_cut_off(
        self,
    ) -> None:
        volume_id = self.api.create(size_bytes=SIZE)
        self.api.wait(volume_id, 'available')
        name = self.attach(volume_id)['connection_info']['name']
        host = Client(self, self.cluster.conf, self.user, name)
        self.assertEqual('written', host.ask('write', 0, 'h'))
        done = self.api.manage('reconcile', '--dry-run')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.api.stop()
        self.api.sql('DELETE FROM attachments')
        self.api.sql("UPDATE volumes SET status = 'available'")
        done = self.api.manage('reconcile', '--dry-run')
        self.assertIn('compute-1', done.stdout, done.stderr)
        self.assertEqual('written', host.ask('write', 0, 'i'))
        done = self.api.manage('reconcile')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertEqual('error 108', host.ask('write', 0, 'j'))
        done = self.api.manage('reconcile', '--dry-run')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)

    def test_operator_sees_the_backend(self) -> None:
        done = self.api.manage('check', '--format', 'json')
        self.assertEqual(0, done.returncode, done.stderr)
        row, = json.loads(done.stdout)
        self.assertEqual(('up', self.pool), (row['state'], row['pools']))
        overall = self.cluster.ceph('versions')['overall']
        self.assertEqual(
            not all(map(pools.is_secure, overall)),
            'OSSN-0108' in done.stderr, done.stderr)
        done = self.api.manage('reconcile', '--dry-run')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
