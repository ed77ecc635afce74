# SPDX-License-Identifier: Apache-2.0
"""The host's side of NFS with a server that is dead, or has forgotten us.

The server is one of FUSE: for who asks it, it is the same.
"""

from __future__ import annotations

import contextlib
import os
import threading
import unittest
from collections.abc import Sequence

from tests import hung
from volume import errors
from volume import model
from volume.connector import nfs
from volume.node import Node
from volume.testing import fixtures

WAIT_S = 20
SILENT_S = 0.5  # until a server that sticks is given up
NAME = 'volume-11111111-1111-4111-8111-111111111111'


class ChangingNode(Node):
    """A host where something happens before users are looked for."""

    def before_users(self) -> None:
        """Nothing, as a rule."""

    def users(self, path: str, known: Sequence[int] = ()) -> Sequence[str]:
        self.before_users()
        return super().users(path, known)


class DeadServerTest(unittest.TestCase):

    def setUp(self) -> None:
        self.node = ChangingNode(fixtures.state_dir(self))
        self.connector = nfs.NfsConnector(self.node)
        self.connector.flush_s = 30.0
        self.connection = model.Connection('nfs', {
            'export': 'server:/srv', 'name': NAME, 'format': 'raw',
        })
        # As ``attach`` leaves it.
        self.asked = nfs.Asked(self.connection, self.node)
        os.makedirs(self.asked.uses)
        os.makedirs(self.asked.directory)
        self.node.write(self.asked.use, b'')
        self.server = hung.Hung(self, self.asked.directory)
        self.assertTrue(self.connector.present(self.connection))

    def test_server_that_is_silent_is_told_of_and_nothing_is_let_go(
        self,
    ) -> None:
        self.server.stick()
        self.connector.flush_s = SILENT_S
        with self.assertRaisesRegex(
            errors.Unavailable, f'{NAME} cannot be stored .* does not answer'
        ):
            self.connector.detach(self.connection)
        self.assertTrue(self.connector.present(self.connection))

    def test_server_that_falls_silent_in_the_midst_is_told_of_as_well(
        self,
    ) -> None:
        told: list[errors.VolumeError] = []

        def detach() -> None:
            try:
                self.connector.detach(self.connection)
            except errors.VolumeError as failed:
                told.append(failed)

        def fall_silent() -> None:
            self.server.stick()
            self.connector.flush_s = SILENT_S

        self.node.before_users = fall_silent  # type: ignore[method-assign]
        # Who waits for it in this process could not be ended.
        detaching = threading.Thread(target=detach, daemon=True)
        detaching.start()
        detaching.join(WAIT_S)
        is_stuck = detaching.is_alive()
        self.assertTrue(self.connector.present(self.connection))
        self.server.end()
        detaching.join(WAIT_S)
        self.assertFalse(is_stuck, 'it waits for a server that is dead')
        self.assertRegex(str(*told), 'cannot be stored .* does not answer')

    def test_user_of_the_file_is_named_and_nothing_is_let_go(self) -> None:
        with open(self.server.path):
            with self.assertRaisesRegex(errors.Busy, f'pid {os.getpid()}'):
                self.connector.detach(self.connection)
        self.assertTrue(self.connector.present(self.connection))

    def test_mount_is_known_again_below_a_directory_that_is_a_link(
        self,
    ) -> None:
        link = f'{self.node.state_dir}.link'
        os.symlink(self.node.state_dir, link)
        self.addCleanup(os.unlink, link)
        connector = nfs.NfsConnector(Node(link))
        self.assertTrue(connector.present(self.connection))

    def test_server_that_lets_us_in_no_more_has_ended_it(self) -> None:
        used = os.open(self.server.path, os.O_RDONLY)
        self.server.expire()
        self.connector.detach(self.connection)
        with contextlib.suppress(OSError):
            os.close(used)  # what was not written is told of here
        self.assertFalse(self.connector.present(self.connection))
        self.assertFalse(os.path.ismount(self.asked.directory))
        self.connector.detach(self.connection)


if __name__ == '__main__':
    unittest.main()
