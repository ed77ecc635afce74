# SPDX-License-Identifier: Apache-2.0
"""How iSCSI lets go of a disk; a tree of files stands for the kernel."""

import os
import shutil
import unittest

from volume import errors
from volume import identity
from volume import ids
from volume import model
from volume.connector import disks
from volume.connector import multipath
from volume.connector.iscsi import IscsiConnector
from volume.connector.open_iscsi import SESSIONS
from volume.machine import ops
from volume.node import CommandFailed
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

    before_state = None  # what happens before sessions are looked at
    is_busy = False  # and gives the number of what ends to another at once

    def __init__(self, state_dir):
        super().__init__(state_dir)
        self.in_use = {}
        self.said = []
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

    def make_map(self, wwid='one'):
        self.make(f'{DISK}/holders/dm-0')
        self.make('/sys/block/dm-0/slaves/sda')
        self.make('/sys/block/dm-0/dm/name', 'one')
        self.make('/sys/block/dm-0/dm/uuid', f'mpath-{wwid}')
        self.make('/dev/mapper/one')

    def remove(self, *paths):
        for path in map(self.here, paths):
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def here(self, path):
        return os.path.join(self.state_dir, 'host', path.lstrip('/'))

    def configure(self, wanted):
        if self.before_state and any(
            op.path.endswith('/state') for op in wanted
        ):
            self.before_state()
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

    def about(self, path):
        return super().about(self.here(path))

    def readlink(self, path):
        return super().readlink(self.here(path))

    def users(self, path, known=()):
        if path in self.in_use:
            return self.in_use[path]
        if self.before_users:
            happens, self.before_users = self.before_users, None
            happens()
        holders = self.here(f'{DISK}/holders')
        if path == '/dev/sda' and os.path.isdir(holders):
            return os.listdir(holders)
        return []

    def run(self, *argv, **options):
        self.said.append(argv)
        if argv == ('multipath', '-f', 'one'):
            self.remove(
                f'{DISK}/holders/dm-0', '/sys/block/dm-0', '/dev/mapper/one'
            )
            if self.is_busy:
                self.make('/sys/block/dm-0/dm/name', 'other')
                self.make('/sys/block/dm-0/dm/uuid', 'LVM-other')
        if argv[0] == 'iscsiadm' and '--op' in argv:
            raise CommandFailed(argv, 6, 'no')
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

    def test_a_map_whose_number_is_another_s_by_now_has_ended(self):
        self.node.is_busy = True
        self.node.make_map()
        self.connector.detach(CONNECTION)
        self.assertEqual(1, self.node.said.count(('multipath', '-f', 'one')))
        self.assertTrue(self.node.exists('/sys/block/dm-0'))

    def test_a_disk_whose_name_is_another_s_by_now_stays(self):
        def happens():
            self.node.remove(f'{LUN}/block/sda')

        self.node.before_users = happens
        self.connector.detach(CONNECTION)
        self.assertTrue(self.node.exists(f'{DISK}/device/delete'))

    def test_a_session_that_comes_back_takes_what_was_not_written(self):
        self.node.make(f'{SESSION}/state', 'FAILED')
        back = iter([None, None, lambda: (
            self.node.make(f'{SESSION}/state', 'LOGGED_IN'))])
        self.node.before_state = lambda: (next(back, None) or (lambda: 0))()
        self.connector.detach(CONNECTION)
        self.assertIn(('blockdev', '--flushbufs', '/dev/sda'), self.node.said)
        self.assert_nothing_left()

    def test_a_session_that_does_not_is_let_go_of_and_that_is_said(self):
        self.node.make(f'{SESSION}/state', 'FAILED')
        self.connector.return_s = 0.3
        with self.assertLogs('volume.connector.disks', 'WARNING'):
            self.connector.detach(CONNECTION)
        self.assertEqual([], [
            argv for argv in self.node.said if argv[0] == 'blockdev'])
        self.assertFalse(self.node.exists(SESSION))

    def test_a_disk_that_goes_by_itself_is_gone(self):
        self.node.remove(f'{DISK}/device/delete')
        self.connector.detach(CONNECTION)
        self.assertFalse(self.node.exists(SESSION))


class TwoSessions(unittest.TestCase):
    """Without multipathd: one has died, and another portal was taken."""

    def setUp(self):
        self.node = HostNode(fixtures.state_dir(self))
        self.connector = IscsiConnector(self.node)
        second = f'{SESSIONS}/session2'
        self.node.make(f'{SESSION}/state', 'FAILED')
        self.node.make(f'{second}/targetname', TARGET)
        self.node.make(f'{second}/state', 'LOGGED_IN')
        self.node.make(
            f'{second}/device/target1:0:0/1:0:0:0/block/sdb/size', '16')
        self.node.make('/sys/block/sdb/size', '16')
        self.node.make('/sys/block/sdb/device/rescan')
        self.node.make(f'{DISK}/size', '8')

    def test_the_disk_that_lives_is_where_the_volume_is(self):
        self.assertEqual('/dev/sdb', self.connector.present(CONNECTION))

    def test_the_disk_that_lives_is_asked_how_large_it_is(self):
        self.assertEqual(16 * 512, self.connector.extend(CONNECTION))


class Maps(unittest.TestCase):

    def test_a_link_that_leads_elsewhere_still_is_no_map_s_path(self):
        node = HostNode(fixtures.state_dir(self))
        node.make_map()
        found, = multipath.over(node, ['sda'])
        node.remove('/dev/mapper/one')
        os.symlink('../dm-7', node.here('/dev/mapper/one'))
        self.assertFalse(multipath._leads_to(node, found))
        node.remove('/dev/mapper/one')
        self.assertFalse(multipath._leads_to(node, found))
        os.symlink('../dm-0', node.here('/dev/mapper/one'))
        self.assertEqual('/dev/mapper/one', multipath.path_of(node, found))


class Beside(unittest.TestCase):
    """Another attachment's path is in the map as well; that one has died."""

    def setUp(self):
        self.node = HostNode(fixtures.state_dir(self))
        self.node.make_map()
        other = f'{SESSIONS}/session2'
        self.node.make(f'{other}/targetname', f'{TARGET}-other')
        self.node.make(f'{other}/state', 'FAILED')
        self.node.make(
            f'{other}/device/target1:0:0/1:0:0:0/block/sdb/size', '8')
        self.node.make('/sys/block/dm-0/slaves/sdb')
        self.connector = IscsiConnector(self.node)

    def test_a_map_that_would_have_no_path_left_is_written_out_and_ended(
        self
    ):
        self.connector.detach(CONNECTION)
        self.assertFalse(self.node.exists('/sys/block/dm-0'))
        self.assertIn(
            ('blockdev', '--flushbufs', '/dev/mapper/one'), self.node.said)

    def test_while_it_is_used_it_keeps_its_last_path(self):
        self.addCleanup(setattr, disks, 'FREE_S', disks.FREE_S)
        disks.FREE_S = 0.0
        self.node.in_use['/dev/mapper/one'] = ['mounted on /srv']
        with self.assertRaisesRegex(errors.Busy, 'mounted on /srv'):
            self.connector.detach(CONNECTION)
        self.assertEqual([], self.node.said)
        self.assertTrue(self.node.exists(SESSION))


class Former(unittest.TestCase):
    """The volume was attached before, and that access was ended."""

    def setUp(self):
        self.node = HostNode(fixtures.state_dir(self))
        self.node.make(f'{SESSION}/state', 'FAILED')
        self.node.make_map(f'3{identity.scsi_naa(VOLUME)}')
        self.connector = IscsiConnector(self.node)
        self.anew = model.Connection('iscsi', {
            **CONNECTION.fields,
            'target_iqn': TARGET.rpartition('.')[0] + f'.{ids.new()}',
        })

    def attach(self, connection):
        # There is no iscsiadm that would log in.
        with self.assertRaises(errors.Unavailable):
            self.connector.attach(connection)

    def test_its_map_and_session_are_ended_before_there_is_a_new_path(self):
        self.attach(self.anew)
        self.assertFalse(self.node.exists('/sys/block/dm-0'))
        self.assertFalse(self.node.exists(SESSION))
        said = [argv[-1] for argv in self.node.said]
        self.assertLess(said.index('--logout'), said.index('new'))

    def test_its_map_is_ended_also_without_any_path(self):
        self.node.remove('/sys/block/dm-0/slaves/sda')
        self.attach(self.anew)
        self.assertFalse(self.node.exists('/sys/block/dm-0'))

    def test_while_it_is_used_the_volume_is_not_attached_anew(self):
        for device in '/dev/mapper/one', '/dev/dm-0':
            self.node.in_use[device] = ['mounted on /srv']
        for _ in range(2):
            with self.assertRaisesRegex(errors.Busy, 'mounted on /srv'):
                self.connector.attach(self.anew)
            self.assertTrue(self.node.exists('/sys/block/dm-0'))
            self.assertTrue(self.node.exists(SESSION))
            self.assertEqual([], self.node.said)
            self.node.remove('/sys/block/dm-0/slaves')
            self.node.make('/sys/block/dm-0/slaves/none')
            self.node.remove('/sys/block/dm-0/slaves/none')

    def test_another_attachment_that_lives_keeps_its_map(self):
        self.node.make(f'{SESSION}/state', 'LOGGED_IN')
        self.attach(self.anew)
        self.assertTrue(self.node.exists('/sys/block/dm-0'))

    def test_the_same_attachment_keeps_its_map(self):
        self.attach(CONNECTION)
        self.assertTrue(self.node.exists('/sys/block/dm-0'))
