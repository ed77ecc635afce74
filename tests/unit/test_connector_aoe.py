# SPDX-License-Identifier: Apache-2.0
"""An AoE host whose kernel has a device already; files stand for that."""

import unittest

from volume import errors
from volume import ids
from volume import model
from volume.connector import disks
from volume.connector.aoe import AoeConnector
from volume.node import Node
from volume.testing import fixtures

DEVICE = '/dev/etherd/e1.2'
CONNECTION = model.Connection('aoe', {
    'device': 'e1.2', 'volume_id': ids.new(),
})


class HostNode(Node):
    """A host on which somebody may have the device open."""

    def __init__(self, state_dir):
        super().__init__(state_dir)
        self.has_it, self.in_use, self.said = True, [], []

    def exists(self, path):
        return path == DEVICE and self.has_it

    def users(self, path, known=()):
        assert path == DEVICE
        return self.in_use

    def open(self, path, mode='rb'):
        raise AssertionError('what was another volume\'s is written')

    def run(self, *argv, **options):
        self.said.append(argv)
        self.has_it = False
        return ''


class NewHost(Node):
    """A host that may have the tools, and whose kernel has no module yet."""

    tools = ()

    def exists(self, path):
        return path in self.tools

    def list(self, path):
        return ['eth1']

    def read(self, path, bytes_max=1 << 20):
        return b'02:00:00:00:00:01\n'


class FirstVolume(unittest.TestCase):

    def test_host_with_the_tools_says_who_it_is_before_it_has_the_module(
        self
    ):
        node = NewHost(fixtures.state_dir(self))
        self.assertEqual({}, AoeConnector(node).host().properties)
        node.tools = ('/usr/sbin/aoe-discover',)
        self.assertEqual(
            {'aoe_mac': '02:00:00:00:00:01'},
            AoeConnector(node).host().properties,
        )


class FormerDevice(unittest.TestCase):
    """The address was another volume's, and the kernel has its device."""

    def setUp(self):
        self.node = HostNode(fixtures.state_dir(self))
        self.connector = AoeConnector(self.node)

    def test_it_goes_and_nothing_is_written_to_who_has_the_address_now(self):
        for _ in range(2):
            self.connector.clear(CONNECTION)
        self.assertEqual([('aoe-flush', 'e1.2')], self.node.said)

    def test_it_stays_while_it_is_used_and_it_is_said_by_whom(self):
        self.addCleanup(setattr, disks, 'FREE_S', disks.FREE_S)
        disks.FREE_S = 0.0
        self.node.in_use = ['mounted on /srv']
        with self.assertRaisesRegex(errors.Busy, 'mounted on /srv'):
            self.connector.clear(CONNECTION)
        self.assertEqual([], self.node.said)
