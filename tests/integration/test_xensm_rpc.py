# SPDX-License-Identifier: Apache-2.0
"""From end to end: RabbitMQ, the service, a compute host, two Xen pools.

The service and the compute host are processes of their own; what lies in the
SRs is read by libvhdi.
"""

import contextlib
import hashlib
import logging
import os
import random
import subprocess
import unittest

from tests import rabbit
from tests import vhds
from tests import xapi
from tests import xensm
from tests.integration.compute import Compute
from tests.integration.serving import until
from tests.process import Refused
from tests.process import ServiceProcess
from tests.xensm_hosts import make_vm
from tests.xensm_hosts import write_poolfile
from volume import errors
from volume import ids
from volume.sim.xapi.objects.guests import guests
from volume.testing import fixtures

MIB = 1 << 20
SIZE = 16 * MIB
SECRET = 'sesame-of-the-share'
SHARE = r'\\filer\volumes'
_broker = None


def setUpModule():
    global _broker
    _broker = rabbit.Rabbit()
    unittest.addModuleCleanup(_broker.remove)
    _broker.start()
    for name in 'oslo.messaging', 'oslo_messaging', 'amqp':
        logging.getLogger(name).addHandler(logging.NullHandler())


@unittest.skipIf(vhds.Libvhdi.missing(), vhds.Libvhdi.missing())
class EndToEnd(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.reader = vhds.Libvhdi(cls)

    def setUp(self):
        self.pool = xapi.simulator(self, detach_delay_s=0.02)
        self.other = xapi.simulator(
            self, world=self.pool.world, name='other', detach_delay_s=0.02)
        self.share = self.pool.world.add_share(
            'smb', 'filer', '/volumes', 100 << 30, user='u', password=SECRET)
        self.sr_uuid = xapi.nfs_sr(self.pool)
        directory = fixtures.state_dir(self)
        peer = write_poolfile(fixtures.state_dir(self), self.other)
        self.service = ServiceProcess(
            self, f'''
[shared]
driver = xensm
addresses = {self.pool.url()}
password = secret
sr_uuid = {self.sr_uuid}
[single]
driver = xensm
addresses = {self.pool.url()}
password = secret
sr_type = smb
device_config =
    server={SHARE}
    username=u
    password={SECRET}
sr_per_volume = true
peers = {peer}
''',
            directories=('images',), backends='shared, single',
            extra=f'host = node-1\ntransport_url = {_broker.url}\n'
                  'log_level = DEBUG\n'
                  f'image_allowed_directories = {directory}\n',
        )
        self.directory = directory
        self.service.start()

    def compute(self, pool, name):
        """Return a compute host of a pool, and the VM that it is."""
        vm = make_vm(pool)
        directory = fixtures.state_dir(self)
        return Compute(self, _broker.url, environment={
            'VOLUME_XENSM_HOST': write_poolfile(directory, pool, vm=vm),
            'TEST_STATE_DIR': directory,
        }), vm

    def image(self):
        """Return the URL of an image, and its bytes."""
        content = random.Random(1).randbytes(3 * MIB)
        raw, path = (
            os.path.join(self.directory, name) for name in ('i', 'i.qcow2')
        )
        with open(raw, 'wb') as f:
            f.write(content)
        subprocess.run([
            'qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, path,
        ], check=True)
        return f'file://{path}', content

    def make(self, compute, backend, url):
        """Cast a volume from an image; return its id when it is there."""
        volume_id = ids.new()
        until(lambda: is_up(compute), bool)
        compute.create_volume(
            volume_id, confirm=False, size_bytes=SIZE, backend=backend,
            image={'url': url},
        )
        found = until(
            lambda: look(compute, volume_id),
            lambda found: found and found['status'] in (
                'available', 'error'),
        )
        self.assertEqual('available', found['status'], self.service.tail())
        return volume_id

    @contextlib.contextmanager
    def attached(self, compute, name, volume_id):
        """Attach as nova does, and detach."""
        connector = compute.connector(name)
        compute.reserve_volume(volume_id)
        info = compute.initialize_connection(volume_id, connector)
        device = compute.plug(info)
        compute.attach_volume(volume_id, ids.new(), device)
        self.assertEqual('in-use', compute.get_volume(volume_id)['status'])
        yield info, device
        compute.begin_detaching(volume_id)
        compute.unplug(info)
        compute.terminate_connection(volume_id, connector)
        compute.detach_volume(volume_id)
        self.assertEqual(
            'available', compute.get_volume(volume_id)['status'])

    def stored(self, sr_uuid, vdi_uuid, wanted):
        """Compare what lies in an SR with bytes, by libvhdi."""
        chain = []
        with xensm.session(self.pool) as xenapi:
            while vdi_uuid:
                found = [
                    os.path.join(where, f'{vdi_uuid}.vhd')
                    for where, _, names in os.walk(self.pool.world.directory)
                    if f'{vdi_uuid}.vhd' in names
                ]
                self.assertEqual(1, len(found), vdi_uuid)
                self.assertIn(sr_uuid, found[0])
                chain += found
                record = xenapi.VDI.get_record(
                    xenapi.VDI.get_by_uuid(vdi_uuid))
                vdi_uuid = record['sm_config'].get('vhd-parent')
        said = self.reader.ask(*chain)
        self.assertEqual(len(wanted), said['size'])
        self.assertEqual(
            hashlib.sha256(wanted).hexdigest(), said['digest'])

    def test_vm_of_the_same_pool_gets_the_bytes_of_an_image(self):
        compute, vm = self.compute(self.pool, 'a')
        url, content = self.image()
        volume_id = self.make(compute, 'shared', url)
        wanted = bytearray(content + bytes(SIZE - len(content)))
        snapshot_id = ids.new()
        with self.attached(compute, 'compute-a', volume_id) as (info, device):
            data = info['data']
            self.assertEqual(self.sr_uuid, data['sr_uuid'])
            guest, at = guests(self.pool), os.path.basename(device)
            self.assertEqual(content, guest.read(vm, at, 0, len(content)))
            compute.create_snapshot(
                volume_id, snapshot_id, force=True, confirm=True)
            until(
                lambda: compute.get_snapshot(snapshot_id)['status'],
                lambda status: status == 'available',
            )
            guest.write(vm, at, 7 * MIB + 5, b'guest' * 1000)
            wanted[7 * MIB + 5:7 * MIB + 5005] = b'guest' * 1000
        self.stored(self.sr_uuid, data['vdi_uuid'], bytes(wanted))
        clone_id = ids.new()
        compute.create_volume(
            clone_id, snapshot_id, size_bytes=SIZE)
        until(
            lambda: compute.get_volume(clone_id)['status'],
            lambda status: status == 'available',
        )
        with self.attached(compute, 'compute-a', clone_id) as (_, device):
            at = os.path.basename(device)
            self.assertEqual(content, guest.read(vm, at, 0, len(content)))
            self.assertEqual(bytes(5000), guest.read(vm, at, 7 * MIB, 5000))
        compute.delete_volume(clone_id)
        until(lambda: look(compute, clone_id), lambda found: not found)
        compute.delete_snapshot(snapshot_id)
        until(
            lambda: look(compute, snapshot_id, 'get_snapshot'),
            lambda found: not found,
        )
        compute.delete_volume(volume_id)
        until(lambda: look(compute, volume_id), lambda found: not found)

    def test_vm_of_another_pool_gets_a_volume_that_has_its_own_sr(self):
        compute, vm = self.compute(self.other, 'b')
        url, content = self.image()
        volume_id = self.make(compute, 'single', url)
        wanted = bytearray(content + bytes(SIZE - len(content)))
        guest = guests(self.other)
        with self.attached(compute, 'compute-b', volume_id) as (info, device):
            data, at = info['data'], os.path.basename(device)
            self.assertEqual(
                ['password', 'server', 'sr_type', 'username'],
                data['introduce_sr_keys'],
            )
            self.assertEqual(SECRET, data['password'])
            self.assertEqual(content, guest.read(vm, at, 0, len(content)))
            guest.write(vm, at, 9 * MIB, b'elsewhere')
            wanted[9 * MIB:9 * MIB + 9] = b'elsewhere'
            # Asked again, it is the same with its secret; nowhere else.
            again = compute.initialize_connection(
                volume_id, compute.connector('compute-b'))
            self.assertEqual(info, again)
            for row in self.service.sql('SELECT * FROM attachments'):
                self.assertNotIn(SECRET, repr(row))
            shown = self.service.call(
                'GET', f'/attachments/{data["attachment_id"]}')
            self.assertNotIn(SECRET, repr(shown))
            with self.assertRaises(Refused):
                self.service.action(volume_id, 'os-extend', {'new_size': 1})
        for row in self.service.sql('SELECT * FROM jobs'):
            self.assertNotIn(SECRET, repr(row))
        with open(self.service.log) as f:
            self.assertNotIn(SECRET, f.read())
        self.stored(data['sr_uuid'], data['vdi_uuid'], bytes(wanted))
        compute.delete_volume(volume_id)
        until(lambda: look(compute, volume_id), lambda found: not found)

    def test_shared_sr_is_refused_to_another_pool_with_the_reason(self):
        compute, _ = self.compute(self.other, 'b')
        url, _ = self.image()
        volume_id = self.make(compute, 'shared', url)
        compute.reserve_volume(volume_id)
        with self.assertRaises(errors.Unsupported) as caught:
            compute.initialize_connection(
                volume_id, compute.connector('compute-b'))
        self.assertIn('one pool at a time', str(caught.exception))
        compute.unreserve_volume(volume_id)
        self.assertEqual(
            'available', compute.get_volume(volume_id)['status'])


def look(compute, row_id, verb='get_volume'):
    """Return a volume, or ``None`` if there is none."""
    try:
        return getattr(compute, verb)(row_id)
    except errors.NotFound:
        return None


def is_up(compute):
    """Say whether the service has both backends to offer."""
    try:
        compute.get_volume(ids.new())
    except errors.NotFound:
        return True
    except errors.VolumeError:
        return False
