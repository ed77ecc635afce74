# SPDX-License-Identifier: Apache-2.0
"""An upload of an attached volume holds one moment, whatever is written."""

import contextlib
import os
import time
import unittest
import uuid

from tests.process import ServiceProcess
from volume.nbd import NbdClient

MIB = 1 << 20
SIZE = 48 * MIB


class Moment(unittest.TestCase):
    def test_what_is_written_during_an_upload_is_not_in_the_image(self):
        service = ServiceProcess(
            self, '', directories=('pool', 'images'),
        )
        service.configure(
            '[b]\ndriver = qcow\ndirectories = {root}/pool\n',
            extra=f'image_upload_directories = {service.root}/images\n'
            f'image_rate_bytes_per_s = {16 * MIB}',
        )
        service.start()
        volume = service.create(size_bytes=SIZE)
        service.wait(volume, 'available')
        made = service.call('POST', '/attachments', {'attachment': {
            'volume_uuid': volume, 'instance_uuid': str(uuid.uuid4()),
            'connector': {'host': 'h'},
        }})['attachment']
        service.call(
            'POST', f'/attachments/{made["id"]}/action',
            {'os-complete': None},
        )
        target = os.path.join(service.root, 'images', 'out.raw')
        client = NbdClient(made['connection_info']['uri'])
        with contextlib.closing(client):
            for offset in range(0, SIZE, MIB):
                client.pwrite(b'1' * MIB, offset)
            client.flush()
            service.action(volume, 'os-volume_upload_image', {
                'image_name': f'file://{target}', 'disk_format': 'raw',
                'force': True,
            })
            self.until_begun(service, volume)
            for offset in range(0, SIZE, MIB):
                client.pwrite(b'2' * MIB, offset)
            client.flush()
            service.wait(volume, 'in-use')
            last = bytearray(MIB)
            client.pread_into(last, SIZE - MIB)
            self.assertEqual(b'2' * MIB, bytes(last))
        with open(target, 'rb') as f:
            self.assertEqual(b'1' * SIZE, f.read())
        found = service.manage('reconcile', '--dry-run')
        self.assertEqual('nothing differs', found.stdout.strip())

    def until_begun(self, service, volume):
        """Wait until bytes move: the moment has been taken."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            # None is open once it has ended.
            found = service.call(
                'GET', f'/os-volume-jobs?volume_id={volume}&state=open'
            )['jobs']
            if not found or found[0]['step'] >= 1:
                return
            time.sleep(0.01)
        self.fail('the upload did not begin')
