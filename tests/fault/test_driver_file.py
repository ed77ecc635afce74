# SPDX-License-Identifier: Apache-2.0
"""The file driver, spoilt at every act of every method."""

import os
import unittest

from tests import sshd
from volume.drivers import file
from volume.remote.node import SshNode
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import repeat


class Suite(repeat.DriverFaultSuite):

    def setUp(self):
        self.state_dir = fixtures.state_dir(self)
        self.directory = self.make_directory()
        super().setUp()

    def make_node(self):
        return faults.FaultyNode(self.state_dir)

    def make_driver(self, node):
        conf = fixtures.settings(
            file.FileDriver, directories=[self.directory]
        )
        return file.FileDriver(conf, node)

    def leftovers(self):
        # A probe may be that of a check elsewhere for a minute, and is then
        # removed (tests.conformance.test_file has that).
        return sorted(
            name for name in os.listdir(self.directory)
            if not file.PROBE.fullmatch(name)
        )


class PlainFileTest(Suite, unittest.TestCase):

    def make_directory(self):
        return fixtures.plain_directory(self)


class ReflinkFileTest(Suite, unittest.TestCase):

    def make_directory(self):
        return fixtures.reflink_directory(self)


class FaultySshNode(faults.FaultyNode, SshNode):
    """Spoils requests to another machine; all use one connection."""

    def __init__(self, shared):
        super().__init__(shared.target)
        self._shared = shared

    def _connected(self):
        return self._shared._connected()


class SshFileTest(Suite, unittest.TestCase):
    """Each request to an agent is an act; so are those that only read."""

    is_thorough = False

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = sshd.direct_node(cls)

    def make_node(self):
        return FaultySshNode(self.shared)

    def make_directory(self):
        return fixtures.reflink_directory(self)
