# SPDX-License-Identifier: Apache-2.0
"""The file driver on a node over SSH: the same claims, on loopback."""

import unittest

from tests import sshd
from tests.conformance import test_file
from volume.remote.node import SshNode
from volume.testing import fixtures


class SshFileTest(test_file.Suite, unittest.TestCase):
    """All that is done to the storage goes through one connection."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.server = sshd.Sshd(cls)
        cls.shared = SshNode(cls.server.target())
        cls.addClassCleanup(cls.shared.close)

    def make_node(self):
        return self.shared

    def make_directory(self):
        return fixtures.reflink_directory(self)

    def test_every_act_goes_over_ssh(self):
        self.volume(seed=1)
        self.assertEqual(1, len(self.server.sessions()))
