# SPDX-License-Identifier: Apache-2.0
"""The host's side of NFS with a server that is dead, or has forgotten us.

The server is one of FUSE: for who asks it, it is the same.
"""

from __future__ import annotations

import contextlib
import os
import unittest

from tests import hung
from volume import errors
from volume import model
from volume.connector import nfs
from volume.node import Node
from volume.testing import fixtures

NAME = 'volume-11111111-1111-4111-8111-111111111111'


class DeadServerTest(unittest.TestCase):

    def setUp(self) -> None:
        self.node = Node(fixtures.state_dir(self))
        self.connector = nfs.NfsConnector(self.node)
        self.connector.flush_s = 0.5
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
        with self.assertRaisesRegex(
            errors.Unavailable, f'{NAME} cannot be stored .* does not answer'
        ):
            self.connector.detach(self.connection)
        self.assertTrue(self.connector.present(self.connection))

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
