# SPDX-License-Identifier: Apache-2.0
"""Two managers of one backend, an API process and a compute client.

Each is a process of its own, on a real RabbitMQ. What is attached is worked
on where it is open; what one manager leaves, the other goes on with.
"""

import concurrent.futures
import contextlib
import json
import os
import random
import re
import signal
import types

import kombu

from tests.cluster import Cluster
from tests.cluster import name_of
from tests.cluster import state_of
from tests.integration import nodes_case
from tests.integration.compute import CALLER
from tests.integration.compute import Compute
from tests.integration.nodes_case import Filling
from tests.integration.nodes_case import MIB
from tests.integration.nodes_case import Nodes
from tests.process import Refused
from volume import errors
from volume import ids
from volume.blockd import Blockd
from volume.nbd import NbdClient
from volume.node import Node

setUpModule = nodes_case.start_broker


class Together(Nodes):
    """Both managers are well; what the broker may do is done to messages."""

    KEYS = 'volume', 'volume.one', 'volume.two'

    @classmethod
    def setUpClass(cls):
        cls.world = Cluster(
            types.SimpleNamespace(addCleanup=cls.addClassCleanup),
            nodes_case.broker.url,
            # Nobody is taken for dead because the disk is slow.
            extra='lease_s = 15\nservice_down_s = 30\n',
        )
        cls.world.start()

    def setUp(self):
        url = nodes_case.broker.url.replace('rabbit', 'amqp')
        self.broker = kombu.Connection(url)
        self.addCleanup(self.broker.release)
        self.channel = self.broker.channel()
        # A copy of each message that goes to the managers from now on.
        self.tap = self.queue('tap')
        for key in self.KEYS:
            self.tap.bind_to('volume', routing_key=key)

    def test_both_work_and_what_is_attached_is_worked_on_at_its_home(self):
        cluster, api = self.world, self.world.api
        begun = re.compile(' create of volume .* begins on q')
        homes = set()
        # Who gets a job is left to chance: both do, sooner or later.
        while homes != {'one', 'two'} or not all(
            begun.search(each.said()) for each in cluster.managers.values()
        ):
            volume_id = api.create(size_bytes=MIB)
            api.wait(volume_id, 'available')
            self.assertEqual(1, cluster.job_of(volume_id, 'create')['token'])
            made = self.attach(api, volume_id)
            home = self.home(cluster, volume_id)
            if home not in homes:
                self.work_at_home(volume_id, made, home)
                homes.add(home)
            else:
                api.call('DELETE', f'/attachments/{made["id"]}')
        cluster.idle()
        self.nothing_differs(cluster)
        self.ids_in_the_logs(cluster)

    def work_at_home(self, volume_id, made, home):
        """Do all that touches an attached volume, and end it."""
        cluster, api = self.world, self.world.api
        state = cluster.managers[home].state
        there = Blockd(Node(state), f'{state}/blockd')
        self.assertIn(made['id'], there.export_ids())
        uri = made['connection_info']['uri']
        with contextlib.closing(NbdClient(uri)) as client:
            client.pwrite(b'x' * 4096, 0)
            client.flush()
            snapshot = api.call('POST', '/snapshots', {'snapshot': {
                'volume_id': volume_id, 'force': True,
            }})['snapshot']['id']
            api.wait(snapshot, 'available', kind='snapshot')
            client.pwrite(b'y' * 4096, 0)
            client.flush()
        clone = api.create(snapshot_id=snapshot, size_bytes=MIB)
        api.wait(clone, 'available')
        # Asked of either, it is done at home.
        api.call('DELETE', f'/attachments/{made["id"]}')
        self.assertNotIn(made['id'], there.export_ids())
        self.assertEqual('available', api.volume(volume_id)['status'])
        self.assertEqual(
            [home, home], [
                cluster.job_of(volume_id, kind)['node']
                for kind in ('snapshot', 'detach')
            ],
        )
        self.assertEqual((b'x', b'y'), (
            self.bytes_of(cluster, clone)[:1],
            self.bytes_of(cluster, volume_id)[:1],
        ))
        api.call('DELETE', f'/snapshots/{snapshot}')
        api.wait(snapshot, 'gone', kind='snapshot')
        for each in clone, volume_id:
            api.call('DELETE', f'/volumes/{each}')
            api.wait(each, 'gone')

    def nothing_differs(self, cluster):
        for each in cluster.managers.values():
            done = each.manage('reconcile', '--dry-run')
            self.assertEqual((0, 'nothing differs\n'), (
                done.returncode, done.stdout,
            ), done.stdout + done.stderr)

    def ids_in_the_logs(self, cluster):
        """A request's id is in the log of each process that served it."""
        compute = Compute(self, nodes_case.broker.url)
        volume_id = ids.new()
        compute.create_volume(volume_id, size=1)
        cluster.api.wait(volume_id, 'available')
        wanted = cluster.rows(
            'SELECT request_id FROM jobs WHERE volume_id = ?', volume_id
        )[0][0]
        self.assertEqual(CALLER['request_id'], wanted)
        self.assertTrue(any(
            wanted in each.said() for each in cluster.managers.values()
        ))
        other = cluster.api.create(size_bytes=MIB)
        cluster.api.wait(other, 'available')
        wanted = cluster.rows(
            'SELECT request_id FROM jobs WHERE volume_id = ?', other
        )[0][0]
        self.assertIn(wanted, cluster.api.said())
        self.assertTrue(any(
            wanted in each.said() for each in cluster.managers.values()
        ))

    def queue(self, name):
        """Return a queue that ends with our connection."""
        made = kombu.Queue(
            f'{name}-{ids.new()}', durable=False, exclusive=True,
        )(self.channel)
        made.declare()
        return made

    def taken(self, *methods):
        """Return the messages that were copied since this was last asked."""
        found = []
        while (message := self.tap.get(no_ack=True)) is not None:
            envelope = json.loads(message.body)
            sent = json.loads(envelope['oslo.message'])
            if sent['method'] in methods:
                found.append(sent)
        return found

    def publish(self, sent, key):
        """Send a message as it was, but that oslo takes it for another."""
        again = {
            name: value for name, value in sent.items()
            # Nobody waits for the answer any more.
            if name not in ('_msg_id', '_reply_q')
        } | {'_unique_id': ids.new()}
        kombu.Producer(self.channel).publish(
            {'oslo.version': '2.0', 'oslo.message': json.dumps(again)},
            exchange='volume', routing_key=key, serializer='json',
        )

    def drained(self):
        """Return when the managers have taken and served every message."""
        api = self.client()
        for host in 'one', 'two':
            self.world.until(
                lambda host=host: depth(self.channel, f'volume.{host}') == 0
                and depth(self.channel, 'volume') == 0, 'the queues are empty'
            )
            with self.assertRaises(errors.NotFound):
                api.get_volume(CALLER, ids.new(), host=host)
        self.world.idle()

    def test_repeated_late_and_shuffled_messages_do_nothing_twice(self):
        world, seed = self.world, random.randrange(1 << 30)
        compute = Compute(self, nodes_case.broker.url)
        kept, gone = [ids.new() for _ in range(3)], ids.new()
        for each in (*kept, gone):
            compute.create_volume(each, confirm=False, size=1)
            world.until(lambda each=each: world.rows(
                "SELECT 1 FROM volumes WHERE id = ? AND status = 'available'",
                each,
            ), 'it is made')
        snapshot = ids.new()
        compute.create_snapshot(kept[0], snapshot)
        world.until(lambda: world.rows(
            "SELECT 1 FROM snapshots WHERE status = 'available'"
        ), 'it is taken')
        compute.extend_volume(kept[1], 2, confirm=True)
        world.idle()
        compute.delete_volume(gone)
        world.until(lambda: world.rows(
            "SELECT 1 FROM volumes WHERE id = ? AND status = 'deleted'", gone
        ), 'it is deleted')
        world.idle()
        before = world.dump()
        sent = self.taken(
            'create_volume', 'create_snapshot', 'extend_volume',
            'delete_volume', 'wake',
        )
        self.assertGreaterEqual(len(sent), 7)
        again = [each for each in sent for _ in range(3)]
        shuffle = random.Random(seed)
        shuffle.shuffle(again)
        for each in again:
            self.publish(each, shuffle.choice(self.KEYS))
        self.drained()
        self.assertEqual(before, world.dump(), f'seed {seed}')

    def test_a_create_that_comes_after_its_delete_makes_nothing(self):
        world = self.world
        compute, late = Compute(self, nodes_case.broker.url), ids.new()
        compute.create_volume(ids.new(), confirm=False, size=1)
        (sent,) = self.world.until(
            lambda: self.taken('create_volume'), 'it was sent'
        )
        sent['args']['volume_id'] = late
        compute.delete_volume(late, confirm=True)
        for key in self.KEYS:
            self.publish(sent, key)
        self.drained()
        self.assertEqual([('deleted',)], world.rows(
            'SELECT status FROM volumes WHERE id = ?', late
        ))
        self.assertEqual([], world.rows(
            'SELECT 1 FROM jobs WHERE volume_id = ?', late
        ))

    def test_hints_that_are_lost_are_found_by_a_sweep(self):
        """Once unseen by anybody, and once refused by the broker."""
        api, channel = self.world.api, self.channel
        for key in self.KEYS:  # then only the tap has them
            channel.queue_unbind(key, 'volume', routing_key=key)
        silent = api.create(size_bytes=MIB)
        api.wait(silent, 'available')
        # A sweep may be before the thread that gives hints.
        self.world.until(lambda: self.taken('wake'), 'it was hinted')
        for key in self.KEYS:
            channel.queue_unbind(self.tap.name, 'volume', routing_key=key)
        refused = api.create(size_bytes=MIB)
        api.wait(refused, 'available')
        job = self.world.job_of(refused, 'create')
        self.world.until(
            lambda: f'job {job["id"]} waits for a sweep' in api.said(),
            'the refused hint was told of',
        )
        for key in self.KEYS:
            channel.queue_bind(key, 'volume', routing_key=key)


class Unwell(Filling):
    """One manager hangs, or is dead."""

    def test_a_manager_that_hangs_is_ended_with_its_helper(self):
        cluster = self.slow()
        raw, volume_id, helper = self.copying(cluster)
        cluster.start('two')
        self.one.signal(signal.SIGSTOP)
        self.assertEqual('qemu-img', name_of(helper), 'it must go on')
        job = cluster.until(
            lambda: (found := cluster.job_of(volume_id, 'create_filled'))
            ['owner_host'] == 'two' and found, 'two takes over',
        )
        self.assertGreater(job['token'], 1)
        cluster.api.wait(volume_id, 'available')
        self.assertIn(state_of(helper), ('', 'Z'))
        self.assertEqual(-signal.SIGKILL, self.one.process.wait(10))
        before = cluster.dump()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.one.process.pid, signal.SIGCONT)
        # What it could still write it would write within these seconds.
        cluster.api.wait(cluster.api.create(size_bytes=MIB), 'available')
        after = cluster.dump()
        for table, rows in before.items():
            self.assertLessEqual(set(rows), set(after[table]))
        with open(raw, 'rb') as f:
            self.assertEqual(f.read(), self.bytes_of(cluster, volume_id))
        self.assertEqual('two', cluster.rows(
            'SELECT host FROM backends'
        )[0][0])

    def test_one_goes_on_with_the_work_of_another_that_was_killed(self):
        cluster = self.cluster()
        api = cluster.api
        while True:
            kept = api.create(size_bytes=MIB)
            api.wait(kept, 'available')
            made = self.attach(api, kept)
            if self.home(cluster, kept) == 'one':
                break
        volumes = []
        with concurrent.futures.ThreadPoolExecutor(4) as clients:
            asked = [
                clients.submit(api.create, size_bytes=MIB)
                for _ in range(24)
            ]
            volumes.append(asked[0].result())
            self.one.kill()
            volumes += [each.result() for each in asked[1:]]
        for volume_id in volumes:
            api.wait(volume_id, 'available')
        # Its storage daemon serves on, and only it can end an export there.
        with contextlib.closing(
            NbdClient(made['connection_info']['uri'])
        ) as client:
            client.pwrite(b'x' * 4096, 0)
            client.flush()
        with concurrent.futures.ThreadPoolExecutor(1) as clients:
            ending = clients.submit(
                api.call, 'DELETE', f'/attachments/{made["id"]}'
            )
            cluster.until(
                lambda: cluster.job_of(kept, 'detach'), 'a detach is open'
            )
            cluster.start('one')
            ending.result(60)
        self.assertEqual('one', cluster.job_of(kept, 'detach')['owner_host']
                         or cluster.job_of(kept, 'detach')['node'])
        self.assertEqual('available', api.volume(kept)['status'])
        cluster.idle()
        # With nobody heard of, nothing new is promised.
        self.one.kill()
        self.two.kill()
        refused = cluster.until(lambda: refusal(api), 'it is refused')
        self.assertIn('1 not heard of lately', str(refused))
        services = api.call('GET', '/os-services?binary=cinder-volume')
        self.assertEqual(
            {'down'}, {each['state'] for each in services['services']}
        )


def refusal(api):
    """Return why a create is refused; ``None`` if it is not."""
    try:
        api.create(size_bytes=MIB)
    except Refused as refused:
        return refused
    return None


def depth(channel, queue):
    """Return how many messages nobody has taken from a queue."""
    return channel.queue_declare(queue, passive=True).message_count
