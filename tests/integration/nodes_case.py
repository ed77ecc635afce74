# SPDX-License-Identifier: Apache-2.0
"""What tests of several nodes share: the broker, attaching, slow copies."""

import contextlib
import logging
import os
import subprocess
import unittest

from tests import rabbit
from tests.cluster import Cluster
from volume import ids
from volume.nbd import NbdClient
from volume.rpcapi import VolumeAPI

MIB = 1 << 20
CONNECTOR = {'host': 'compute-1', 'ip': '127.0.0.1', 'initiator': 'iqn.x:y'}
broker = None


def start_broker():
    """Start the broker of a module; it is its ``setUpModule``."""
    global broker
    broker = rabbit.Rabbit()
    unittest.addModuleCleanup(broker.remove)
    broker.start()
    # What they say of a broker that is stopped on purpose is no news.
    for name in 'oslo.messaging', 'oslo_messaging', 'amqp':
        logging.getLogger(name).addHandler(logging.NullHandler())


class Nodes(unittest.TestCase):
    """What the tests here share."""

    def cluster(self, *names, **options):
        made = Cluster(self, broker.url, **options)
        made.start(*names)
        self.one, self.two = made.managers['one'], made.managers['two']
        return made

    def client(self, **options):
        made = VolumeAPI.connect(url=broker.url, **options)
        self.addCleanup(made.close)
        return made

    def image(self, cluster, size_bytes):
        """Return an image of bytes that differ, and its URL."""
        path = os.path.join(cluster.root, 'images', 'i.qcow2')
        raw = f'{path}.raw'
        with open(raw, 'wb') as f:
            for number in range(size_bytes // MIB):
                f.write(bytes([number % 255 + 1]) * MIB)
        subprocess.run([
            'qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, path,
        ], check=True)
        return raw, f'file://{path}'

    def attach(self, api, volume_id):
        """Attach through the API; return the attachment."""
        made = api.call('POST', '/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': ids.new(),
            'connector': CONNECTOR,
        }})['attachment']
        api.call('POST', f'/attachments/{made["id"]}/action', {
            'os-complete': {},
        })
        return made

    def bytes_of(self, cluster, volume_id):
        """Return the volume's content, as a host would read it."""
        made = self.attach(cluster.api, volume_id)
        uri = made['connection_info']['uri']
        with contextlib.closing(NbdClient(uri)) as client:
            content = read(client)
        cluster.api.call('DELETE', f'/attachments/{made["id"]}')
        return content

    def home(self, cluster, volume_id):
        found = cluster.rows(
            'SELECT node FROM attachments WHERE volume_id = ?', volume_id
        )
        return found[0][0] if found else None


class Filling(Nodes):
    """What the tests with a slow copy share."""

    def copying(self, cluster, size_bytes=12 * MIB):
        """Return a volume that ``one`` fills slowly, with its helper."""
        raw, url = self.image(cluster, size_bytes)
        volume_id = cluster.api.create(size_bytes=size_bytes, imageRef=url)
        (helper,) = cluster.until(
            lambda: self.one.helpers('convert'), 'one runs qemu-img'
        )
        layers = os.path.join(cluster.root, 'layers')
        cluster.until(
            lambda: stored(layers) > 2 * MIB, 'bytes come'
        )
        self.assertEqual('one', cluster.job_of(
            volume_id, 'create_filled')['owner_host'])
        return raw, volume_id, helper

    def slow(self, **options):
        """Return a cluster whose ``one`` copies 1 MiB a second."""
        cluster = Cluster(self, broker.url, **options)
        self.one, self.two = cluster.managers['one'], cluster.managers['two']
        cluster.configure('one', 'manager', 'image_rate_bytes_per_s=1048576')
        cluster.start('one')
        return cluster


def read(client):
    """Return all that an export holds."""
    content = bytearray(client.size_bytes)
    for offset in range(0, len(content), MIB):
        client.pread_into(
            memoryview(content)[offset:offset + MIB], offset
        )
    return bytes(content)


def stored(directory):
    """Return how many bytes the files of a pool take up."""
    return sum(
        os.stat(os.path.join(where, name)).st_blocks * 512
        for where, _, names in os.walk(directory) for name in names
        if os.path.exists(os.path.join(where, name))
    )
