# SPDX-License-Identifier: Apache-2.0
"""How iSCSI lets go of a disk; a tree of files stands for the kernel."""

import os
import shutil
import unittest

from volume import ids
from volume import model
from volume.connector.iscsi import IscsiConnector
from volume.connector.open_iscsi import SESSIONS
from volume.machine import ops
from volume.node import Node
from volume.testing import fixtures

VOLUME = ids.new()
TARGET = f'iqn.2010-10.org.openstack:volume-{VOLUME}.{ids.new()}'
DISK, SESSION = '/sys/block/sda', f'{SESSIONS}/session1'
LUN = f'{SESSION}/device/target0:0:0/0:0:0:0'
CONNECTION = model.Connection('iscsi', {
    'target_portal': '192.0.2.1:3260', 'target_iqn': TARGET,
    'target_lun': 0, 'volume_id': VOLUME,
})


class HostNode(Node):
    """A host with one session and its disk, of which a map may be made."""

    def __init__(self, state_dir):
        super().__init__(state_dir)
        self.before_users = None  # what happens before they are looked for
        self.make(f'{SESSION}/targetname', TARGET)
        self.make(f'{SESSION}/state', 'LOGGED_IN')
        self.make(f'{LUN}/block/sda/size', '8')
        self.make(f'{DISK}/device/delete')
        self.make('/dev/sda')

    def make(self, path, text=''):
        os.makedirs(os.path.dirname(self.here(path)), exist_ok=True)
        with open(self.here(path), 'w') as f:
            f.write(text)

    def make_map(self):
        self.make(f'{DISK}/holders/dm-0')
        self.make('/sys/block/dm-0/slaves/sda')
        self.make('/sys/block/dm-0/dm/name', 'one')
        self.make('/sys/block/dm-0/dm/uuid', 'mpath-one')
        self.make('/dev/mapper/one')

    def remove(self, *paths):
        for path in map(self.here, paths):
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def here(self, path):
        return os.path.join(self.state_dir, 'host', path.lstrip('/'))

    def configure(self, wanted):
        found = [
            ops.run(ops.Op(op.verb, self.here(op.path), op.text))
            for op in wanted
        ]
        if ops.Op.put(f'{DISK}/device/delete', '1') in wanted:
            self.remove(DISK, LUN, '/dev/sda')
        return found

    def exists(self, path):
        return super().exists(self.here(path))

    def open(self, path, mode='rb'):
        return super().open(self.here(path), mode)

    def users(self, path, known=()):
        if self.before_users:
            happens, self.before_users = self.before_users, None
            happens()
        holders = self.here(f'{DISK}/holders')
        if path == '/dev/sda' and os.path.isdir(holders):
            return os.listdir(holders)
        return []

    def run(self, *argv, **options):
        if argv == ('multipath', '-f', 'one'):
            self.remove(
                f'{DISK}/holders/dm-0', '/sys/block/dm-0', '/dev/mapper/one'
            )
        if argv[-1] == '--logout':
            self.remove(SESSION)
        return ''


class LettingGo(unittest.TestCase):

    def setUp(self):
        self.node = HostNode(fixtures.state_dir(self))
        self.connector = IscsiConnector(self.node)
        self.assertEqual('/dev/sda', self.connector.present(CONNECTION))

    def assert_nothing_left(self):
        self.assertEqual('', self.connector.present(CONNECTION))
        for path in '/sys/block/dm-0', DISK, SESSION:
            self.assertFalse(self.node.exists(path), path)

    def test_a_map_is_ended_before_its_disk(self):
        self.node.make_map()
        self.assertEqual('/dev/mapper/one', self.connector.present(CONNECTION))
        self.connector.detach(CONNECTION)
        self.assert_nothing_left()

    def test_a_map_that_comes_as_its_disk_is_let_go_of_is_ended_as_well(
        self
    ):
        self.node.before_users = self.node.make_map
        self.connector.detach(CONNECTION)
        self.assertIsNone(self.node.before_users, 'no map has come')
        self.assert_nothing_left()
