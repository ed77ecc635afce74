# SPDX-License-Identifier: Apache-2.0
"""The real service under eventlet: a volume's life, a crash, many at once.

The whole suite runs so with VOLUME_TEST_CONCURRENCY=eventlet; this is what
every run looks at.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import unittest
import uuid

from tests.process import Refused
from tests.process import ServiceProcess
from volume.nbd import NbdClient

MIB = 1 << 20
QCOW = '[b]\ndriver = qcow\ndirectories = {root}/pool\n'
CLIENTS = 30
IMAGE_MIB = 500
DOORS_S = 300


class Doors(unittest.TestCase):
    def test_the_http_server_passes_its_own_tests(self):
        done = subprocess.run(
            [sys.executable, '-m', 'unittest',
             'tests.integration.test_api_server'],
            env={**os.environ, 'VOLUME_TEST_CONCURRENCY': 'eventlet'},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=DOORS_S,
        )
        self.assertEqual(0, done.returncode, done.stdout)


class Eventlet(unittest.TestCase):
    def setUp(self):
        self.service = ServiceProcess(
            self, QCOW, directories=('pool', 'images'),
            concurrency='eventlet',
        )
        self.images = os.path.join(self.service.root, 'images')
        self.service.configure(
            QCOW, extra=f'image_allowed_directories = {self.images}'
        )
        self.service.start()

    def image(self, data):
        path = os.path.join(self.images, str(uuid.uuid4()))
        with open(path, 'wb') as f:
            f.write(data)
        return f'file://{path}'

    def attach(self, volume_id):
        """Return the address where a host finds the volume."""
        made = self.service.call('POST', '/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': str(uuid.uuid4()),
            'connector': {'host': 'compute-1'}, 'mode': 'rw',
        }})['attachment']
        self.service.call(
            'POST', f'/attachments/{made["id"]}/action', {'os-complete': {}}
        )
        return made['id'], made['connection_info']['uri']

    def detach(self, attachment_id, volume_id):
        self.service.call('DELETE', f'/attachments/{attachment_id}')
        self.service.wait(volume_id, 'available')

    def read(self, uri, offset, length):
        data = bytearray(length)
        with contextlib.closing(NbdClient(uri)) as disk:
            disk.pread_into(data, offset)
        return bytes(data)

    def ready(self, **wish):
        volume_id = self.service.create(**wish)
        self.service.wait(volume_id, 'available')
        return volume_id

    def test_a_volume_lives_through_a_crash_and_ends(self):
        service, image = self.service, os.urandom(3 * MIB)
        volume_id = self.ready(size_bytes=4 * MIB, imageRef=self.image(image))
        attachment_id, uri = self.attach(volume_id)
        with contextlib.closing(NbdClient(uri)) as disk:
            disk.pwrite(b'host' * 1024, 0)
            disk.flush()
        wanted = b'host' * 1024 + image[4096:]
        # The disk serves on while the service is dead; what it was doing
        # is done by its successor.
        cut_off = service.create(
            size_bytes=64 * MIB, imageRef=self.image(os.urandom(64 * MIB))
        )
        service.kill()
        self.assertEqual(wanted, self.read(uri, 0, len(wanted)))
        service.start()
        service.wait(cut_off, 'available')
        self.detach(attachment_id, volume_id)
        snapshot_id = service.call('POST', '/snapshots', {'snapshot': {
            'volume_id': volume_id, 'name': 's',
        }})['snapshot']['id']
        service.wait(snapshot_id, 'available', kind='snapshot')
        clone_id = self.ready(size_bytes=4 * MIB, snapshot_id=snapshot_id)
        attachment_id, uri = self.attach(clone_id)
        self.assertEqual(wanted, self.read(uri, 0, len(wanted)))
        self.detach(attachment_id, clone_id)
        for kind, each in (
            ('volume', clone_id), ('snapshot', snapshot_id),
            ('volume', volume_id), ('volume', cut_off),
        ):
            service.call('DELETE', f'/{kind}s/{each}')
            service.wait(each, 'gone', kind=kind)
        process = service.process
        service.process.send_signal(signal.SIGHUP)
        self.assertEqual({}, service.volumes())
        service.stop()
        self.assertEqual(0, process.returncode, service.tail())
        with open(service.log) as log:
            self.assertNotIn('Traceback', log.read())

    def test_thirty_clients_are_served_at_once(self):
        faults, begin = [], threading.Barrier(CLIENTS)

        def live():
            try:
                begin.wait()
                volume_id = self.ready(size_bytes=4 * MIB)
                self.service.call('DELETE', f'/volumes/{volume_id}')
                self.service.wait(volume_id, 'gone')
            except (AssertionError, OSError, Refused) as failed:
                faults.append(failed)

        clients = [threading.Thread(target=live) for _ in range(CLIENTS)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        with open(self.service.log) as log:
            bugs = log.read().partition('a bug, met by')[2]
        self.assertEqual([], faults, bugs[:8000])
        self.assertEqual({}, self.service.volumes())

    def test_requests_are_answered_while_an_image_is_hashed_and_copied(self):
        data = os.urandom(MIB) * IMAGE_MIB
        digest = hashlib.sha256(data).hexdigest()
        volume_id = self.service.call('POST', '/volumes', {
            'volume': {
                'size_bytes': IMAGE_MIB * MIB, 'imageRef': self.image(data),
            },
            'OS-SCH-HNT:scheduler_hints': {
                'image_checksum': f'sha256:{digest}',
            },
        })['volume']['id']
        answers = 0
        while (status := self.service.volume(volume_id)['status']) != (
            'available'
        ):
            self.assertNotEqual('error', status)
            answers += 1
            time.sleep(0.01)  # or it would be the client who keeps it busy
        self.assertGreater(answers, 20)
