# SPDX-License-Identifier: Apache-2.0
"""The service with a pool as its backend: what a batch costs, and trouble."""

import collections
import os
import subprocess
import sys
import time
import unittest

from tests import xapi
from tests import xensm
from tests.integration import agreement
from tests.integration import serving
from volume import periodic
from volume.context import Caller
from volume.sim.xapi.faults import Fault
from volume.testing import fixtures
from volume.verbs import jobs
from volume.verbs import lookup
from volume.verbs import place
from volume.verbs import volumes

COUNT = 1000 if os.environ.get('VOLUME_PROOF') else 60
WAIT_S = 600
MIB = 1 << 20
CALLER = Caller(is_admin=True)


class Service(unittest.TestCase):

    def setUp(self):
        self.pool = xapi.simulator(self)
        self.sr_uuid = xapi.nfs_sr(self.pool)
        self.world = serving.World(
            self, names='fast, xen',
            settings='job_retry_s = 600\nsweep_interval_s = 0.1',
            sections=(
                '[xen]\ndriver = xensm\noversubscription = 100\n'
                f'addresses = {self.pool.url(0)}, {self.pool.url(1)}\n'
                f'password = secret\nsr_uuid = {self.sr_uuid}\n'
                'timeout_s = 10\n'
            ),
        )
        self.backend = self.world.service.runner.backends['xen']
        self.assertTrue(self.backend.is_up, self.backend.reason)
        self.calls = []
        self.backend.driver._opened[1].records.append(self.calls.append)

    def create(self, number=0):
        answer = self.world.ask('POST', '/v3/volumes', {'volume': {
            'name': f'v{number}', 'size': 1, 'volume_type': 'xen',
        }})
        self.assertEqual(202, answer.status, answer.text)
        return answer.json['volume']['id']

    def settle(self):
        """Wait until each volume is available; return all of them."""
        deadline = time.monotonic() + WAIT_S
        while True:
            rows = self.world.ask(
                'GET', '/v3/volumes/detail?limit=1000').json['volumes']
            left = [row for row in rows if row['status'] != 'available']
            if not left:
                return rows
            self.assertLess(time.monotonic(), deadline, left[:3])
            time.sleep(0.05)

    def stored(self):
        rows = self.pool.rows
        return [rows.field('VDI', ref, 'name_label')
                for ref in rows.all('VDI')]

    def check(self):
        periodic.refresh(
            self.world.core, [self.backend], 'node-1', wait_s=60)

    def test_volume_has_the_size_that_the_pool_really_gives(self):
        answer = self.world.ask('POST', '/v3/volumes', {'volume': {
            'size_bytes': 10 * MIB + 512, 'volume_type': 'xen',
        }})
        self.assertEqual(12 * MIB, answer.json['volume']['size_bytes'])
        volume_id = answer.json['volume']['id']
        for asked, size_bytes in (None, 12 * MIB), (13 * MIB, 14 * MIB):
            if asked:
                self.world.ask('POST', f'/v3/volumes/{volume_id}/action', {
                    'os-extend': {'new_size_bytes': asked}})
            (row,) = self.settle()
            self.assertEqual(size_bytes, row['size_bytes'])
            # Of which there is not a byte more.
            self.assertEqual([], agreement.disagreements(self.world.service))
        clone = self.world.ask('POST', '/v3/volumes', {'volume': {
            'source_volid': volume_id, 'volume_type': 'fast'}})
        self.settle()
        self.assertEqual(14 * MIB, clone.json['volume']['size_bytes'])

    def test_batch_of_volumes_costs_three_calls_each(self):
        made = {self.create(number) for number in range(COUNT)}
        self.settle()
        self.assertEqual(
            {f'volume-{each}' for each in made}, set(self.stored()))
        self.assertEqual(COUNT, len(self.stored()))
        count = collections.Counter(self.calls)
        own = ('VDI.get_by_name_label', 'VDI.create', 'VDI.get_record')
        self.assertEqual([COUNT] * 3, [count.pop(name) for name in own])
        # The pool as a whole is looked at now and then.
        self.assertLess(count.total(), 20, count)

    def test_master_that_dies_in_mid_create_leaves_one_vdi(self):
        self.pool.faults.add(Fault('VDI.create', 'kill_master', 'after'))
        made = self.create()
        self.settle()
        self.assertEqual([f'volume-{made}'], self.stored())
        self.assertNotEqual(
            self.pool.url(0), self.backend.driver._opened[1].session().url)

    def test_sr_that_goes_away_comes_back_without_a_hand(self):
        first = self.create()
        self.settle()
        self.pool.faults.put_sr_offline(self.sr_uuid)
        with xensm.session(self.pool) as xenapi:
            sr = xenapi.SR.get_by_uuid(self.sr_uuid)
            for pbd in xenapi.SR.get_PBDs(sr):
                xenapi.PBD.unplug(pbd)
        second = self.create()
        self.check()
        self.assertFalse(self.backend.is_up)
        self.assertIn(self.sr_uuid, self.backend.reason)
        row = self.world.ask('GET', f'/v3/volumes/{second}').json['volume']
        self.assertEqual('creating', row['status'])
        self.pool.faults.put_sr_online(self.sr_uuid)
        self.check()
        self.assertTrue(self.backend.is_up, self.backend.reason)
        self.settle()
        self.assertEqual(
            {f'volume-{first}', f'volume-{second}'}, set(self.stored()))


class Wiping(unittest.TestCase):
    """A LUN is wiped for long: that is told, and can be stopped."""

    RATE = 2 * MIB  # so that a LUN takes three seconds
    SIZE = 8 * MIB

    def setUp(self):
        self.pool = xapi.simulator(self)
        sr_uuid = xensm.lun_sr(self.pool, 'iscsi', 1, self.SIZE)
        (self.lun,) = xensm.lun_ids(1)
        self.file = self.pool.world.lun_file(self.lun)
        self.world = serving.World(
            self, names='fast, xen',
            settings=f'image_rate_bytes_per_s = {self.RATE}\n'
            'sweep_interval_s = 0.1',
            sections=(
                '[xen]\ndriver = xensm\npassword = secret\n'
                f'addresses = {self.pool.url(0)}\nsr_uuid = {sr_uuid}\n'
                f'luns = {self.lun}\nluns_erase = true\n'
            ),
        )
        self.core = self.world.core

    def create(self):
        return volumes.create(self.core, CALLER, place.NewVolume(
            size_bytes=self.SIZE, volume_type='xen')).id

    def cancel(self, kind):
        """Cancel a job in the middle of its wipe; return how it ended."""
        (job,) = [
            job for job in self.jobs()
            if job.kind == kind and job.state == 'open'
        ]
        serving.until(
            lambda: self.job(job.id).total_bytes, lambda told: told)
        jobs.cancel(self.core, CALLER, job.id)
        serving.until(
            lambda: self.job(job.id).state, lambda state: state != 'open')
        ended = self.job(job.id)
        self.assertEqual(self.SIZE, ended.total_bytes)
        return ended.state

    def jobs(self):
        return lookup.jobs(self.core, CALLER, lookup.Page()).rows

    def job(self, job_id):
        return jobs.get(self.core, CALLER, job_id)

    def test_cancelled_in_mid_wipe_a_volume_can_be_made_and_deleted_again(
        self
    ):
        first = self.create()
        self.assertEqual('cancelled', self.cancel('create'))
        self.assertEqual('error', self.world.settled(first)['status'])
        # Its LUN was let go of, and whoever comes next has it wiped whole.
        self.file.write_bytes(b'\xff' * self.SIZE)
        self.world.ask('DELETE', f'/v3/volumes/{first}')
        self.world.gone(first)
        second = self.create()
        row = self.world.settled(second)
        self.assertEqual('available', row['status'], row)
        self.assertEqual(bytes(self.SIZE), self.file.read_bytes())
        self.file.write_bytes(b'\xff' * self.SIZE)
        self.world.ask('DELETE', f'/v3/volumes/{second}')
        self.assertEqual('cancelled', self.cancel('delete'))
        row = self.world.settled(second)
        self.assertEqual('error_deleting', row['status'], row)
        self.assertIn('cancelled', row['reason'])
        self.world.ask('POST', f'/v3/volumes/{second}/action', {
            'os-force_delete': None})
        self.world.gone(second)
        self.assertEqual(bytes(self.SIZE), self.file.read_bytes())


# What a service does first, in a process of its own.
OTHER_SERVICE = """
import sys
from volume import backends, conf
from volume.node import Node
found = conf.load([], sys.argv[1:])
node = Node(found.state_path, found.lock_path)
backend = backends.load(found, node)['xen']
backend.check()
print('up' if backend.is_up else backend.reason)
"""


class Beginning(unittest.TestCase):

    def test_services_that_start_together_make_one_sr(self):
        pool = xapi.simulator(self)
        pool.world.add_nfs('filer', '/exports/a b=c')
        section = (
            '[xen]\ndriver = xensm\npassword = secret\n'
            f'addresses = {pool.url(0)}\n'
            'sr_name = volumes\nsr_type = nfs\ncreate = true\n'
            'device_config =\n'
            '    server=filer\n'
            '    serverpath=/exports/a b=c\n'
            '    options=vers=4.1,nosharecache\n'
        )
        pool.faults.add(Fault('SR.create', 'delay', params=(1.0,), count=-1))
        path = os.path.join(fixtures.state_dir(self), 'volume.conf')
        with open(path, 'w') as file:
            file.write(
                '[DEFAULT]\nenabled_backends = xen\n'
                f'state_path = {os.path.dirname(path)}\n{section}'
            )
        with subprocess.Popen(
            [sys.executable, '-c', OTHER_SERVICE, path],
            stdout=subprocess.PIPE,
        ) as other:
            world = serving.World(self, names='xen', sections=section)
            backend = world.service.runner.backends['xen']
            serving.until(
                lambda: backend.check() or backend.is_up, lambda up: up)
            told, _ = other.communicate(timeout=60)
        self.assertEqual(['volumes'], list(backend.pools))
        self.assertEqual(b'up\n', told)
        self.assertEqual(1, len(pool.rows.all('SR')))
        configs = [
            pool.rows.field('PBD', ref, 'device_config')
            for ref in pool.rows.all('PBD')
        ]
        self.assertEqual(2, len(configs))
        for config in configs:
            self.assertEqual('/exports/a b=c', config['serverpath'])
            self.assertEqual('vers=4.1,nosharecache', config['options'])
        self.assertEqual({}, {
            key: value for key, value in pool.rows.field(
                'pool', pool.ref, 'other_config').items()
            if key.startswith('volume:')
        })
