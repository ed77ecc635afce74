# SPDX-License-Identifier: Apache-2.0
"""``volume-connect`` as an operator runs it: on the host, against a service.

The guest is the host, and has the storage as well; the service is here, and
the guest comes to it through a tunnel.
"""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.parse

from tests import lab
from tests.lab import case
from tests.lab.service_case import LabService
from tests.lab.service_case import SIZE_BYTES


class VolumeConnectTest(LabService):
    """Thin volumes over the kernel's iSCSI, CHAP both ways."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.guest.run('systemctl', 'start', 'iscsid', 'multipathd')
        case.script(cls.guest, 'connect.sh', str(lab.TOP), cls.tunnel())

    @classmethod
    def tunnel(cls):
        """Return the URL of the service, as the guest sees it."""
        at = urllib.parse.urlsplit(cls.service.url)
        *ssh, host = cls.guest.ssh()
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        forward = f'127.0.0.1:{port}:{at.hostname}:{at.port}'
        for what in 'forward', 'cancel':
            command = [*ssh, '-O', what, '-R', forward, host]
            if what == 'forward':
                subprocess.run(command, check=True, timeout=60,
                               stdin=subprocess.DEVNULL, capture_output=True)
            else:
                cls.addClassCleanup(
                    subprocess.run, command, timeout=60,
                    stdin=subprocess.DEVNULL, capture_output=True,
                )
        return f'http://127.0.0.1:{port}/v3'

    def connect(self, *words):
        return self.guest.run('volume-connect', *words, timeout_s=600.0)

    def made(self):
        """Return a new volume that the host has nothing of in the end."""
        volume_id = self.volume()
        self.addCleanup(
            self.guest.succeeds, 'volume-connect', 'detach', volume_id,
            timeout_s=600.0,
        )
        return volume_id

    def listed(self):
        return json.loads(self.connect('list', '--format', 'json'))

    def attachments(self, volume_id):
        return self.service.call(
            'GET', f'/attachments?volume_id={volume_id}'
        )['attachments']

    def test_a_host_attaches_uses_and_detaches(self):
        volume_id = self.made()
        path = self.connect('attach', volume_id).strip()
        self.assertEqual(
            SIZE_BYTES, int(self.guest.run('blockdev', '--getsize64', path))
        )
        (attachment,) = self.attachments(volume_id)
        (row,) = self.listed()
        self.assertEqual(
            (attachment['id'], volume_id, 'iscsi', 'attached', path),
            tuple(row[key] for key in (
                'id', 'volume_id', 'protocol', 'state', 'location'
            )),
        )
        noise = self.fill(path)
        self.assertEqual(path, self.connect('attach', volume_id).strip())
        self.connect('detach', volume_id)
        self.assertEqual([], self.attachments(volume_id))
        path = self.connect('attach', volume_id).strip()
        self.assertEqual(noise, self.sum(path))
        self.connect('detach', volume_id)
        self.assertEqual(set(), self.sessions())
        self.assertEqual([], self.listed())

    def test_what_a_killed_run_has_begun_is_gone_on_with(self):
        volume_id = self.made()
        for after_s in '1', '4', '8':
            self.guest.succeeds(
                'timeout', '-s', 'KILL', after_s, 'volume-connect', 'attach',
                volume_id, timeout_s=600.0,
            )
        path = self.connect('attach', volume_id).strip()
        self.assertEqual(1, len(self.attachments(volume_id)))
        self.assertTrue(self.guest.succeeds('test', '-b', path))
        self.connect('detach', volume_id)
        self.assertEqual(set(), self.sessions())
        self.assertEqual([], self.attachments(volume_id))

    def test_what_the_service_has_ended_is_cleaned_and_no_more(self):
        ended, kept = self.made(), self.made()
        for volume_id in ended, kept:
            self.connect('attach', volume_id)
        self.service.call('POST', f'/volumes/{ended}/action', {
            'os-force_detach': {},
        })
        self.wait(ended, 'available')
        said = self.connect('clean', '--dry-run')
        self.assertIn('would remove', said)
        self.assertEqual(
            {ended: 'dead', kept: 'attached'},
            {row['volume_id']: row['state'] for row in self.listed()},
        )
        self.connect('clean')
        (row,) = self.listed()
        self.assertEqual(kept, row['volume_id'])
        self.connect('detach', kept)
        self.assertEqual(set(), self.sessions())
