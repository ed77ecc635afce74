# SPDX-License-Identifier: Apache-2.0
"""A process that has the number of one that somebody else waited for."""

import gc
import os
import unittest

from volume.machine import processes
from volume.testing import fixtures

LAST_PID = '/proc/sys/kernel/ns_last_pid'
TRIES = 200


class ReusedTest(unittest.TestCase):

    def start(self, *argv):
        log = os.path.join(fixtures.directory(self), 'log')
        return processes.start(argv, log)

    def start_as(self, pid):
        """Start a process with this number; None if another was faster."""
        try:
            with open(LAST_PID, 'w') as f:
                f.write(str(pid - 1))
        except OSError as refused:
            self.skipTest(f'the next number cannot be chosen: {refused}')
        found = self.start('sleep', '600')
        return found if found.pid == pid else processes.end(found, 5.0)

    def test_new_one_is_not_waited_for_in_place_of_the_old_one(self):
        for _ in range(TRIES):
            old = self.start('true')
            os.waitpid(old.pid, 0)
            new = self.start_as(old.pid)
            if new is None:
                processes.is_running(old)
                continue
            # It ends, and is still there for us alone to see.
            pidfd = os.pidfd_open(new.pid)
            self.addCleanup(os.close, pidfd)
            gc.collect()
            self.assertTrue(processes.is_running(new))
            os.kill(new.pid, 9)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
            self.start('true')  # when Python looks at what was let go of
            self.assertTrue(os.path.exists(f'/proc/{new.pid}'))
            self.assertFalse(processes.is_running(new))
            self.assertFalse(os.path.exists(f'/proc/{new.pid}'))
            return
        self.fail(f'others took the number {TRIES} times')
