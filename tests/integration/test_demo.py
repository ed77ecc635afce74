# SPDX-License-Identifier: Apache-2.0
"""The demo as a person calls it, on a small image."""

import os
import signal
import subprocess
import sys
import tempfile
import unittest

from tests.leftovers import processes
from tests.leftovers import users

TOP = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
DEMO = os.path.join(TOP, 'tools', 'demo.py')
LIMIT_S = 240
INTERRUPTED = 130


class Demo(unittest.TestCase):
    """However it ends, it leaves no file and no process behind."""

    def setUp(self):
        self.root = self.enterContext(
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        )

    def start(self, *arguments, **environment):
        demo = subprocess.Popen(
            [sys.executable, DEMO, *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {'TMPDIR': self.root} | environment,
        )
        self.addCleanup(demo.stdout.close)
        self.addCleanup(end, demo)
        return demo

    def test_every_step_passes(self):
        demo = self.start('--small')
        said, _ = demo.communicate(timeout=LIMIT_S)
        self.assertEqual(0, demo.returncode, said)
        self.assertRegex(said, r'All \d+ checks in \d+ steps passed')
        self.assert_nothing_left()

    @unittest.skipUnless(
        os.environ.get('VOLUME_PROOF'), 'VOLUME_PROOF is not set: a long run'
    )
    def test_every_step_passes_on_simulated_xen_pools(self):
        demo = self.start('xensm', '--small')
        said, _ = demo.communicate(timeout=LIMIT_S)
        self.assertEqual(0, demo.returncode, said)
        self.assertRegex(said, r'All \d+ checks in \d+ steps passed')
        self.assert_nothing_left()

    def test_interrupted_in_its_middle_it_cleans_up(self):
        demo = self.start('--small')
        # The next step has a service, a block daemon and two open creates.
        said = list(through(demo.stdout, ' grow '))
        demo.send_signal(signal.SIGTERM)
        rest, _ = demo.communicate(timeout=LIMIT_S)
        self.assertEqual(
            INTERRUPTED, demo.returncode, ''.join(said) + rest
        )
        self.assertIn('interrupted', rest)
        self.assert_nothing_left()

    def test_what_fails_is_said_with_the_end_of_the_service_log(self):
        demo = self.start('--small')
        list(through(demo.stdout, ' start '))
        os.kill(service_of(demo.pid), signal.SIGKILL)
        said, _ = demo.communicate(timeout=LIMIT_S)
        self.assertEqual(1, demo.returncode, said)
        self.assertIn('FAILED', said)
        self.assertIn('log ends with', said)
        self.assert_nothing_left()

    def test_missing_tools_are_named_before_anything_is_begun(self):
        demo = self.start(PATH=self.root)
        said, _ = demo.communicate(timeout=LIMIT_S)
        self.assertEqual(1, demo.returncode, said)
        self.assertIn('not installed: ', said)
        self.assertIn('bindep.txt', said)
        self.assert_nothing_left()

    def assert_nothing_left(self):
        self.assertEqual([], os.listdir(self.root))
        self.assertEqual([], list(users(self.root)))


def through(lines, word):
    """Yield lines up to the one that has the word."""
    for line in lines:
        yield line
        if word in line:
            return


def end(process):
    """End it the way that lets it clean up."""
    if process.poll() is None:
        process.terminate()
        process.wait(LIMIT_S)


def service_of(demo_pid):
    """Return the pid of the service that a demo has started."""
    pid, = (
        pid for pid, name in processes()
        if 'volume-service' in name and parent_of(pid) == demo_pid
    )
    return int(pid)


def parent_of(pid):
    """Return a process's parent; 0 if it, somebody else's, is gone."""
    try:
        with open(f'/proc/{pid}/stat', 'rb') as f:
            return int(f.read().rpartition(b')')[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
