# SPDX-License-Identifier: Apache-2.0
"""What an NVMe host asks of its kernel; a tree of files stands for that."""

import os
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.cli import codes
from volume.connector import nvme_host
from volume.connector.nvmeof import NvmeConnector
from volume.machine import ops
from volume.node import Node
from volume.testing import fixtures

NQN = 'nqn.2010-10.org.openstack:volume-1'
CONTROLLER = f'{nvme_host.CONTROLLERS}/nvme0'
SIZE = '/sys/block/nvme0n1/size'
CONNECTION = model.Connection('nvmeof', {
    'target_nqn': NQN, 'volume_id': ids.new(),
    'portals': [['192.0.2.1', '4420', 'tcp']],
})


class HostNode(Node):
    """A host with a disk that grows some looks after a scan was asked for."""

    looks_left = None

    def __init__(self, state_dir):
        super().__init__(state_dir)
        for name, text in (
            ('subsysnqn', NQN), ('state', 'live'), ('transport', 'tcp'),
            ('address', 'traddr=192.0.2.1,trsvcid=4420'),
            ('nvme0n1/size', ''),
        ):
            self.make(f'{CONTROLLER}/{name}', text)
        self.make(SIZE, '8')

    def make(self, path, text):
        os.makedirs(os.path.dirname(self.here(path)), exist_ok=True)
        with open(self.here(path), 'w') as f:
            f.write(text)

    def here(self, path):
        return os.path.join(self.state_dir, 'host', path.lstrip('/'))

    def configure(self, wanted):
        for op in wanted:
            if op.path.endswith('/rescan_controller'):
                self.make(op.path, '')
                self.looks_left = 3
            elif op.path == SIZE and self.looks_left is not None:
                self.looks_left -= 1
                if not self.looks_left:
                    self.make(SIZE, '16')
        return [
            ops.run(ops.Op(op.verb, self.here(op.path), op.text))
            for op in wanted
        ]


class BusyNode(HostNode):
    """A host on which the name of what ends is given to another at once."""

    refuses = False
    ended = 0

    def next(self):
        self.make(f'{CONTROLLER}/subsysnqn', f'{NQN}-other')

    def configure(self, wanted):
        if wanted[0].path == f'{CONTROLLER}/delete_controller':
            self.ended += 1
            self.next()
            if self.refuses:
                raise errors.Unknown('cannot put: No such device')
            return [None]
        return super().configure(wanted)

    def exists(self, path):
        return os.path.exists(self.here(path))


class Bare(Node):
    """A host without kmod, whose kernel has not loaded anything."""

    def exists(self, path):
        return False

    def run(self, *argv, **_):
        raise errors.Unavailable(f'{argv[0]} is not installed')


class Connecting(unittest.TestCase):

    def test_host_without_the_module_is_told_what_to_install_for_it(self):
        with self.assertRaisesRegex(
            errors.Unsupported, 'nvme-tcp.*install kmod'
        ) as seen:
            nvme_host.connect(
                Bare(fixtures.state_dir(self)), NQN,
                nvme_host.Portal('192.0.2.1', '4420'),
                nvme_host.Identity('nqn.2014-08.org.example:host'),
            )
        # The service answers: to ask again is of no use.
        self.assertEqual(codes.FAILED, codes.of(seen.exception))


class Growing(unittest.TestCase):

    def setUp(self):
        self.node = HostNode(fixtures.state_dir(self))
        self.connector = NvmeConnector(self.node)

    def test_the_size_is_told_when_the_kernel_has_asked_for_it(self):
        self.assertEqual(16 * 512, self.connector.extend(CONNECTION))

    def test_one_that_has_not_grown_is_not_waited_for_without_end(self):
        self.connector.grow_s = 0.0
        self.assertEqual(8 * 512, self.connector.extend(CONNECTION))

    def test_one_that_is_not_attached_is_refused(self):
        os.unlink(self.node.here(f'{CONTROLLER}/subsysnqn'))
        with self.assertRaises(errors.NotFound):
            self.connector.extend(CONNECTION)


class TwoConnections(unittest.TestCase):
    """Without multipath: one has died, and another portal was taken."""

    def test_the_disk_that_lives_is_where_the_volume_is(self):
        node = HostNode(fixtures.state_dir(self))
        node.make(f'{CONTROLLER}/state', 'connecting')
        for name, text in (
            ('subsysnqn', NQN), ('state', 'live'), ('transport', 'tcp'),
            ('address', 'traddr=192.0.2.2,trsvcid=4420'),
            ('nvme1n1/size', ''),
        ):
            node.make(f'{nvme_host.CONTROLLERS}/nvme1/{name}', text)
        node.make('/sys/block/nvme1n1/size', '32')
        connector = NvmeConnector(node)
        connector.grow_s = 0.0
        self.assertEqual('/dev/nvme1n1', connector.present(CONNECTION))
        self.assertEqual(32 * 512, connector.extend(CONNECTION))


class Ending(unittest.TestCase):

    def setUp(self):
        self.node = BusyNode(fixtures.state_dir(self))
        self.ours, = nvme_host.controllers(self.node)

    def test_a_name_that_is_another_s_by_now_has_ended(self):
        nvme_host.disconnect(self.node, self.ours)
        self.assertEqual(1, self.node.ended)

    def test_another_that_has_the_name_is_not_ended(self):
        self.node.next()
        nvme_host.disconnect(self.node, self.ours)
        self.assertEqual(0, self.node.ended)

    def test_what_the_kernel_ends_by_itself_has_ended(self):
        self.node.refuses = True
        nvme_host.disconnect(self.node, self.ours)

    def test_what_is_there_still_is_told(self):
        self.node.refuses = True
        self.node.next = lambda: None
        with self.assertRaises(errors.Unknown):
            nvme_host.disconnect(self.node, self.ours)
