# SPDX-License-Identifier: Apache-2.0
"""Rows, storage and exports are compared, and mended when asked for."""

import json
import os
import subprocess
import time
import unittest
import uuid

from tests import database
from tests.process import ServiceProcess

SECTION = '[b]\ndriver = qcow\ndirectories = {root}/pool\n'
CONNECTOR = {'host': 'compute-1'}
MIB = 1 << 20


class Reconcile(unittest.TestCase):
    def setUp(self):
        self.service = ServiceProcess(
            self, SECTION, directories=('pool', 'images')
        )
        self.image = os.path.join(self.service.root, 'images', 'i.raw')
        self.content = b'x' * MIB + bytes(3 * MIB)
        with open(self.image, 'wb') as f:
            f.write(self.content)
        self.service.configure(
            SECTION,
            extra=f'image_allowed_directories = {self.service.root}/images',
        )
        self.service.start()

    def make(self, **wish):
        made = self.service.create(
            size_bytes=4 * MIB, imageRef=f'file://{self.image}', **wish
        )
        self.service.wait(made, 'available')
        return made

    def snap(self, volume_id):
        made = self.service.call(
            'POST', '/snapshots', {'snapshot': {'volume_id': volume_id}}
        )['snapshot']['id']
        self.service.wait(made, 'available', kind='snapshot')
        return made

    def findings(self, *argv):
        done = self.service.manage('--format', 'json', 'reconcile', *argv)
        return {
            (row['kind'], row['what'].partition(' ')[2]): row
            for row in json.loads(done.stdout)
        }

    def sql(self, statement, **values):
        self.service.sql(statement, **values)

    def test_nothing_differs_while_the_service_runs(self):
        volume = self.make()
        self.snap(volume)
        self.assertEqual({}, self.findings('--dry-run'))

    def test_mending_is_refused_while_the_service_runs(self):
        done = self.service.manage('reconcile')
        self.assertEqual(1, done.returncode)
        self.assertIn('is in use by another process', done.stderr)

    def test_a_lost_database_is_rebuilt_from_the_storage(self):
        volume = self.make(name='precious')
        snapshot = self.snap(volume)
        self.service.stop()
        database.lose(self.service.database_url)
        self.service.start()
        self.assertEqual({}, self.service.volumes())
        self.service.stop()
        self.assertEqual(
            {('orphan', volume), ('orphan', snapshot)},
            set(self.findings('--dry-run')),
        )
        self.findings('--adopt')
        self.assertEqual({}, self.findings('--dry-run'))
        self.service.start()
        row = self.service.volume(volume)
        self.assertEqual('precious', row['name'])
        self.assertEqual('available', row['status'])
        self.assertEqual([snapshot], list(self.service.snapshots()))
        self.assertEqual({}, self.findings('--dry-run'))
        self.assertEqual(self.content, self.read(volume))
        self.service.action(volume, 'revert', {'snapshot_id': snapshot})
        self.service.wait(volume, 'available')
        self.assertEqual(self.content, self.read(volume))

    def test_a_volume_without_a_row_is_not_taken_for_a_new_one(self):
        volume = self.make(name='precious')
        self.service.stop()
        self.sql('DELETE FROM volumes WHERE id = :id', id=volume)
        self.findings()  # sums the claims again
        self.service.start()
        self.service.call('POST', '/volumes', {
            'volume': {'size_bytes': 4 * MIB},
            'OS-SCH-HNT:scheduler_hints': {'volume_id': volume},
        })
        row = self.service.wait(volume, 'error')
        self.assertIn('whose row was lost', row['reason'])
        self.service.call('DELETE', f'/volumes/{volume}')
        self.service.wait(volume, 'gone')
        self.service.stop()
        self.findings('--adopt')
        self.service.start()
        self.assertEqual('precious', self.service.volume(volume)['name'])
        self.assertEqual(self.content, self.read(volume))

    def test_a_volume_whose_bytes_are_gone_is_said_to_be_in_error(self):
        volume = self.make()
        os.unlink(os.path.join(
            self.service.root, 'pool', 'volumes', volume
        ))
        self.assertIn(('missing', volume), self.findings('--dry-run'))
        self.assertEqual('available', self.service.volume(volume)['status'])
        self.service.stop()
        self.assertIn(('missing', volume), self.findings())
        self.service.start()
        row = self.service.volume(volume)
        self.assertEqual('error', row['status'])
        self.assertIn('has no such thing', row['reason'])

    def test_orphans_are_deleted_only_by_their_own_flag(self):
        volume = self.make()
        self.service.stop()
        self.sql('DELETE FROM volumes WHERE id = :id', id=volume)
        self.assertIn(('orphan', volume), self.findings())
        self.assertIn(('orphan', volume), self.findings('--dry-run'))
        self.findings('--delete-orphans')
        self.assertEqual({}, self.findings('--dry-run'))

    def test_wrong_claims_are_found_and_summed_again(self):
        self.make()
        self.service.stop()
        self.sql('UPDATE pools SET claimed_bytes = claimed_bytes + 1')
        self.assertIn(('claims', 'b#pool'), self.findings('--dry-run'))
        self.findings()
        self.assertEqual({}, self.findings('--dry-run'))

    def test_a_status_that_no_job_leads_on_is_found(self):
        volume = self.make()
        self.service.stop()
        self.sql("UPDATE volumes SET status = 'extending'")
        self.assertIn(('status', volume), self.findings('--dry-run'))
        self.findings()
        self.assertEqual({}, self.findings('--dry-run'))

    def test_an_export_of_nobody_ends_only_when_a_person_says_so(self):
        volume = self.make()
        made = self.service.call('POST', '/attachments', {'attachment': {
            'volume_uuid': volume, 'instance_uuid': str(uuid.uuid4()),
            'connector': CONNECTOR,
        }})['attachment']
        self.service.stop()
        self.sql('DELETE FROM attachments')
        self.sql('DELETE FROM jobs')
        self.service.start()
        time.sleep(1)  # its first look at exports is over within this
        self.service.stop()
        self.assertIn(('export', made['id']), self.findings('--dry-run'))
        self.findings()
        uri = made['connection_info']['uri']
        read = subprocess.run(
            ['qemu-img', 'info', '-f', 'raw', uri], capture_output=True,
        )
        self.assertNotEqual(0, read.returncode)

    def read(self, volume):
        made = self.service.call('POST', '/attachments', {'attachment': {
            'volume_uuid': volume, 'instance_uuid': str(uuid.uuid4()),
            'connector': CONNECTOR, 'mode': 'ro',
        }})['attachment']
        target = os.path.join(self.service.root, 'copy')
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'raw', '-O', 'raw',
             made['connection_info']['uri'], target],
            check=True, timeout=60,
        )
        self.service.call('DELETE', f'/attachments/{made["id"]}')
        with open(target, 'rb') as f:
            return f.read()
