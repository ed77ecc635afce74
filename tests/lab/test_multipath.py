# SPDX-License-Identifier: Apache-2.0
"""The host's side of iSCSI by several paths: maps that multipathd keeps."""

from __future__ import annotations

from tests.lab import case
from tests.lab import hosts
from tests.lab import test_connector
from volume import errors
from volume import identity
from volume.connector import multipath
from volume.connector import open_iscsi


class MultipathTest(test_connector.IscsiConnectorTest):
    """Two portals, and multipathd."""

    portals = case.PORTALS

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.guest.run('systemctl', 'start', 'multipathd')

    def test_the_loss_of_one_portal_is_no_error(self):
        target = self.target()
        path = self.attach(target)
        self.assertTrue(path.startswith('/dev/mapper/'), path)
        writing = self.guest.start(
            'dd', 'if=/dev/zero', f'of={path}', 'bs=64k', 'count=1000',
            'oflag=direct',
        )
        self.cut(case.PORTALS[0])
        said, _ = writing.communicate(timeout=120)
        self.assertEqual(0, writing.returncode, said)

    def test_one_path_of_two_is_enough_and_it_is_said(self):
        target = self.target()
        self.cut(case.PORTALS[1])
        with self.assertLogs('volume.connector.iscsi', 'WARNING') as logs:
            self.attach(target)
        self.assertIn('1 of 2 paths', logs.output[0])

    def test_a_path_that_is_down_keeps_no_map_from_being_detached(self):
        target = self.target()
        path = self.attach(target)
        self.guest.run('dd', f'of={path}', 'bs=4k', input_bytes=b'\xa5' * 4096)
        self.cut(case.PORTALS[0])
        hosts.until(
            lambda: not all(
                each.is_up for each in open_iscsi.sessions(self.node)
            ), 'no path goes down',
        )
        self.connector.detach(target.connection)
        self.assertEqual(b'\xa5' * 4096, self.guest.run_bytes(
            'dd', f'if={target.device}', 'bs=4k', 'count=1', 'iflag=direct',
            'status=none',
        ))

    def test_a_map_in_use_goes_on_waiting_for_its_paths(self):
        target = self.target()
        path = self.attach(target)
        with self.open(path):
            self.guest.run('dmsetup', 'message', path, '0',
                           'queue_if_no_path')
            self.targets.end(target)
            with self.assertRaisesRegex(errors.Busy, 'cat'):
                self.connector.reap(self.await_stray())
            self.assertIn(
                'queue_if_no_path', self.guest.run('dmsetup', 'table', path))
            self.guest.run('dmsetup', 'message', path, '0',
                           'fail_if_no_path')

    def test_a_map_of_an_ended_attachment_comes_to_life_by_no_other(self):
        ended = self.target()
        path = self.attach(ended)
        anew = self.target(volume_id=ended.volume_id)
        with self.open(path):
            self.targets.end(ended)
            self.await_stray()
            with self.assertRaisesRegex(errors.Busy, 'cat'):
                self.connector.attach(anew.connection)
            self.assertFalse(self.is_up(anew))
        self.attach(anew)
        wwid = f'3{identity.scsi_naa(ended.volume_id)}'
        joined = multipath.of(self.node, wwid)
        self.assertEqual(
            sorted(joined.paths), sorted(
                name for each in open_iscsi.sessions(self.node)
                if each.target == anew.name for name in each.names
            ),
        )
        self.connector.detach(anew.connection)

    def test_a_map_goes_on_by_no_path_that_has_died(self):
        ended = self.target()
        target = self.target(volume_id=ended.volume_id)
        self.attach(ended)
        path = self.attach(target)
        self.targets.end(ended)
        self.await_stray()
        with self.open(path):
            with self.assertRaisesRegex(errors.Busy, 'cat'):
                self.connector.detach(target.connection)
            self.assertTrue(self.is_up(target))
        self.guest.run('dd', f'of={path}', 'bs=4k', input_bytes=b'\xa5' * 4096)
        self.connector.detach(target.connection)
        self.assertEqual(b'\xa5' * 4096, self.guest.run_bytes(
            'dd', f'if={target.device}', 'bs=4k', 'count=1', 'iflag=direct',
            'status=none',
        ))

    def test_a_map_that_comes_as_its_disk_is_let_go_of_is_ended_as_well(
        self
    ):
        target = self.target()
        path = self.attach_by_one_portal(target)
        wwid = f'3{identity.scsi_naa(target.volume_id)}'
        self.addCleanup(setattr, self.node, 'late', None)
        self.node.late = lambda: multipath.gather(
            self.node, wwid, [path.removeprefix('/dev/')]
        )
        self.connector.detach(target.connection)
        self.assertIsNone(self.node.late, 'no map has come')
        self.assertNotIn(wwid, self.guest.run('multipath', '-ll'))
        self.assertFalse(self.is_up(target))

    def attach_by_one_portal(self, target):
        """Return the disk itself: of one path multipathd makes no map."""
        path = self.connector.attach(self.by(target, case.PORTALS[0]))
        self.addCleanup(self.connector.detach, target.connection)
        self.assertEqual([], multipath.over(
            self.node, [path.removeprefix('/dev/')]
        ))
        return path

    def test_no_command_line_ever_has_the_secret(self):
        self.skipTest('one portal shows it')

    test_a_host_may_have_a_name_for_an_interface = None
    test_a_record_in_pieces_is_made_anew = None
