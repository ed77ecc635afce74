# SPDX-License-Identifier: Apache-2.0
"""What an operator fences, and a broker that is restarted: long runs."""

import concurrent.futures
import contextlib
import hashlib
import os
import signal
import threading
import time
import unittest

from tests.cluster import LEASE_S
from tests.integration import nodes_case
from tests.integration.compute import CALLER
from tests.integration.compute import Compute
from tests.integration.nodes_case import Filling
from tests.integration.nodes_case import MIB
from tests.integration.nodes_case import read
from tests.integration.nodes_case import stored
from volume import errors
from volume import ids
from volume.blockd import Blockd
from volume.nbd import NbdClient
from volume.node import Node

setUpModule = nodes_case.start_broker


@unittest.skipUnless(
    os.environ.get('VOLUME_PROOF'), 'VOLUME_PROOF is not set'
)
class Proof(Filling):
    """What takes longer."""

    def test_a_fenced_manager_that_wakes_changes_no_row(self):
        cluster = self.slow(apart=True)
        raw, volume_id, helper = self.copying(cluster)
        cluster.start('two')
        self.one.signal(signal.SIGSTOP)
        cluster.until(
            lambda: cluster.rows(
                'SELECT 1 FROM jobs WHERE volume_id = ? AND expires_at < ?',
                volume_id, time.time() - LEASE_S,
            ), 'the lease has run out long ago',
        )
        job = cluster.job_of(volume_id, 'create_filled')
        self.assertEqual('one', job['owner_host'], 'nobody may take it')
        # What the operator swears, and then says.
        os.kill(helper, signal.SIGKILL)
        Blockd(Node(self.one.state), self.one.state + '/blockd').stop()
        done = self.two.manage('node', 'fence', 'one')
        self.assertEqual(0, done.returncode, done.stderr)
        cluster.api.wait(volume_id, 'available')
        cluster.idle()
        before = cluster.dump()
        self.one.signal(signal.SIGCONT)
        self.assertEqual(3, self.one.process.wait(30))
        self.assertEqual(before, cluster.dump())
        self.assertIn('an operator has fenced it', self.one.said())
        with open(raw, 'rb') as f:
            self.assertEqual(f.read(), self.bytes_of(cluster, volume_id))

    def test_what_a_hanging_manager_has_open_to_fill_is_closed(self):
        """Its own writer goes through its daemon, which no lock fences."""
        cluster = self.slow()
        size_bytes = 12 * MIB
        raw, _ = self.image(cluster, size_bytes)
        with open(raw, 'rb') as f:
            digest = hashlib.sha256(f.read()).hexdigest()
        volume_id = ids.new()
        self.client().create_volume(
            CALLER, volume_id, size_bytes=size_bytes, image={
                'url': f'file://{raw}', 'format': 'raw',
                # Then the bytes pass through the manager itself.
                'checksum': f'sha256:{digest}',
            },
        )
        daemon = Blockd(Node(self.one.state), self.one.state + '/blockd')
        layers = os.path.join(cluster.root, 'layers')
        cluster.until(
            lambda: stored(layers) > 2 * MIB and daemon.export_ids(),
            'bytes come',
        )
        self.assertEqual([], self.one.helpers())
        self.one.signal(signal.SIGSTOP)
        cluster.start('two')
        cluster.api.wait(volume_id, 'available')
        self.assertEqual(set(), daemon.export_ids())
        self.assertEqual(-signal.SIGKILL, self.one.process.wait(10))
        with open(raw, 'rb') as f:
            self.assertEqual(f.read(), self.bytes_of(cluster, volume_id))

    def test_what_is_attached_on_a_fenced_node_moves_to_another(self):
        cluster = self.cluster('one', apart=True)
        api = cluster.api
        volume_id = api.create(size_bytes=MIB)
        api.wait(volume_id, 'available')
        made = self.attach(api, volume_id)
        with contextlib.closing(
            NbdClient(made['connection_info']['uri'])
        ) as client:
            client.pwrite(b'x' * 4096, 0)
            client.flush()
        cluster.start('two')
        early = self.two.manage('node', 'fence', 'one')
        self.assertIn('stop it first', early.stderr)
        self.one.kill()
        Blockd(Node(self.one.state), self.one.state + '/blockd').stop()
        cluster.until(
            lambda: not self.two.manage('node', 'fence', 'one').returncode,
            'one may be fenced',
        )
        cluster.until(
            lambda: self.home(cluster, volume_id) == 'two', 'it moves'
        )
        moved = api.call('GET', f'/attachments/{made["id"]}')['attachment']
        uri = moved['connection_info']['uri']
        self.assertNotEqual(made['connection_info']['uri'], uri)
        with contextlib.closing(NbdClient(uri)) as client:
            self.assertEqual(b'x' * 4096, read(client)[:4096])
        # One that comes back leaves it there.
        cluster.start('one')
        api.call('DELETE', f'/attachments/{made["id"]}')
        self.assertEqual('available', api.volume(volume_id)['status'])
        self.assertEqual('two', cluster.job_of(volume_id, 'detach')['node'])

    def test_a_broker_that_is_restarted_under_load_loses_nothing(self):
        world, stop = self.cluster(), threading.Event()
        url = nodes_case.broker.url
        computes = [Compute(self, url, 10.0) for _ in range(2)]
        told, by_call, by_rest, asked = [], [], [], []

        def call(compute):
            while not stop.is_set():
                volume_id = ids.new()
                asked.append(volume_id)
                try:
                    compute.create_volume(volume_id, size_bytes=MIB)
                    by_call.append((compute, volume_id))
                except errors.VolumeError as failed:
                    told.append(failed)

        def ask():
            while not stop.is_set():
                by_rest.append(world.api.create(size_bytes=MIB))
                time.sleep(0.05)

        def more(count):
            """Say whether each client had so many more answers."""
            start = len(by_call)
            return lambda: all(
                sum(compute is each for each, _ in by_call[start:]) >= count
                for compute in computes
            )

        with concurrent.futures.ThreadPoolExecutor(3) as clients:
            running = [clients.submit(call, each) for each in computes]
            running.append(clients.submit(ask))
            try:
                world.until(more(3), 'calls are answered')
                nodes_case.broker.stop()
                count = len(by_rest)
                # REST needs no broker to accept, nor managers to go on.
                world.until(
                    lambda: len(by_rest) > count + 4, 'REST goes on'
                )
                world.api.wait(by_rest[-1], 'available')
                world.until(lambda: told, 'a client is told')
                nodes_case.broker.start()
                world.until(more(3), 'calls are answered again')
            finally:
                stop.set()
            for each in running:
                each.result(90)
        for failed in told:
            self.assertIn(failed.kind, ('Unavailable', 'Unknown'))
            self.assertRegex(str(failed), 'not sent|no message broker|may')
            self.assertNotIn('guest', str(failed))
        # What was not answered may be there; asked again, it surely is.
        for volume_id in {*asked} - {each for _, each in by_call}:
            computes[0].create_volume(volume_id, size_bytes=MIB)
        for volume_id in (*asked, *by_rest):
            world.api.wait(volume_id, 'available')
        twice = world.rows(
            'SELECT volume_id FROM jobs GROUP BY volume_id'
            ' HAVING count(*) > 1'
        )
        self.assertEqual([], twice)
