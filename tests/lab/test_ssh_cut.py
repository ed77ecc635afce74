# SPDX-License-Identifier: Apache-2.0
"""A connection that is cut in the middle of an LVM command.

What the agent had begun ends with it; the next connection finds the group as
LVM leaves it, done or not done, and the same call finishes the work.
"""

import contextlib
import threading
import time
import unittest

from tests import lab
from tests.lab import exports_case
from tests.lab.lvm_case import LvmCase
from volume import errors
from volume import ids
from volume import model
from volume.drivers.lvm import driver
from volume.remote.node import SshNode

# From before the command begins until after it has ended, in a slow guest.
DELAYS_S = (0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.5) if lab.FULL else (0.2, 0.8)
WAIT_S = 60.0


class CutNode(SshNode):
    """Hangs up a while after it was asked to run some command."""

    def __init__(self, target):
        super().__init__(target)
        self.command, self.delay_s = '', 0.0

    def act(self, what, effect):
        if not self.command or self.command not in what:
            return effect()
        self.command = ''
        timer = threading.Timer(self.delay_s, self.close)
        timer.start()
        try:
            return effect()
        finally:
            timer.join()


class CutTest(LvmCase, unittest.TestCase):
    provisioning = 'thin'

    def setUp(self):
        self.cut = CutNode(exports_case.target_of(self.guest))
        self.addCleanup(self.cut.close)
        self.driver = driver.LvmDriver(self.settings(), self.cut)
        self.driver.check()
        self.left = set(self.lvs('-a'))

    def test_cut_in_the_middle_of_a_create(self):
        for delay_s in DELAYS_S:
            with self.subTest(delay_s):
                volume = model.Volume(ids.new(), self.pool(), 64 << 20)
                self.spoil('lvcreate', delay_s, self.driver.create, volume)
                self.assertEqual(
                    volume.size_bytes, self.driver.inspect(volume).size_bytes
                )
                self.driver.delete(volume)
                self.assertEqual(self.left, set(self.lvs('-a')))

    def test_cut_in_the_middle_of_a_delete(self):
        for delay_s in DELAYS_S[1:]:
            with self.subTest(delay_s):
                volume = model.Volume(ids.new(), self.pool(), 64 << 20)
                self.driver.create(volume)
                self.spoil('lvremove', delay_s, self.driver.delete, volume)
                self.assertEqual(self.left, set(self.lvs('-a')))

    def pool(self):
        return self.driver.pools()[0].name

    def spoil(self, command, delay_s, verb, volume):
        """Call, with the connection cut meanwhile; then as a next owner."""
        self.cut.command, self.cut.delay_s = command, delay_s
        locks = [f'volume-{volume.id}']
        with contextlib.suppress(errors.Unknown, errors.Unavailable):
            with self.cut.hold(locks):
                verb(volume)
        self.assertEqual('', self.cut.command, 'it was never asked for')
        with self.cut.hold(locks):
            self.assert_ended(command)
            verb(volume)

    def assert_ended(self, command):
        """See that nobody runs it any more, now that we have the lock."""
        deadline = time.monotonic() + WAIT_S
        # In brackets, so that it does not find the shell that looks.
        name = f'[{command[0]}]{command[1:]}'
        while self.guest.run('pgrep', '-f', name, check=False):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
