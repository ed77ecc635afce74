# SPDX-License-Identifier: Apache-2.0
"""``./run crash`` as a person calls it: short, and able to fail.

With ``VOLUME_PROOF=1`` it is thirty seeds of a hundred operations with five
kills each. A seed repeats the load, and not the moment of a kill.
"""

import contextlib
import glob
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest

from tests.leftovers import users

TOP = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
CRASH = os.path.join(TOP, 'tools', 'crash.py')
LIMIT_S = 240
MUCH = bool(os.environ.get('VOLUME_PROOF'))
SEEDS_LIMIT_S = 4 * 3600


class Crash(unittest.TestCase):
    """However it ends, it leaves no process and no file behind."""

    def setUp(self):
        self.root = self.enterContext(
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        )
        self.report = os.path.join(self.root, 'report.json')

    def start(self, *arguments):
        crash = subprocess.Popen(
            [sys.executable, CRASH, '--directory', self.root,
             '--report', self.report, *arguments],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        self.addCleanup(crash.stdout.close)
        self.addCleanup(end, crash)
        return crash

    def finish(self, crash, code, limit_s=LIMIT_S):
        said, _ = crash.communicate(timeout=limit_s)
        self.assertEqual(code, crash.returncode, said)
        self.assertEqual([], list(users(self.root)))
        return said

    def test_nothing_is_lost_or_stuck_after_kills_of_everybody(self):
        much = ('--seeds', '30') if MUCH else (
            '--operations', '30', '--kills', '3',
        )
        said = self.finish(self.start(*much), 0, SEEDS_LIMIT_S)
        with open(self.report) as f:
            report = json.load(f)
        self.assertEqual([], report['differences'])
        # A long run kills all of them at once, too.
        self.assertLessEqual(
            {'service', 'daemon', 'helper'}, {*report['kills']}
        )
        self.assertGreater(report['verified_bytes'], 1 << 20)
        self.assertIn('nothing differs', said)
        self.assertEqual(['report.json'], os.listdir(self.root))

    def test_each_planted_loss_is_found(self):
        said = self.finish(self.start('--self-test'), 0)
        self.assertGreaterEqual(said.count(': found'), 10, said)
        self.assertNotIn('OVERLOOKED', said)
        self.assertEqual(['report.json'], os.listdir(self.root))

    def test_a_loss_in_a_run_is_written_out_and_kept(self):
        crash = self.start('--seed', '7', '--operations', '8', '--kills', '1')
        database = self.wait_for('vc7-*/state/volume.sqlite')
        self.spoil(database)
        said = self.finish(crash, 1)
        self.assertIn('claims: pool plain#plain', said)
        history, = glob.glob(f'{self.root}/vc7-*/history.txt')
        with open(history) as f:
            text = f.read()
        for word in 'seed 7', 'claims: pool plain#plain', 'SIGKILL', ' create':
            self.assertIn(word, text)

    def test_it_stops_when_it_is_told_to_and_says_what_it_has_seen(self):
        crash = self.start('--minutes', '600')
        self.wait_for('vc1-*/state/volume.sqlite')
        crash.send_signal(signal.SIGTERM)
        said = self.finish(crash, 0)
        self.assertIn('interrupted', said)
        self.assertIn('0 seeds', said)
        self.assertEqual(['report.json'], os.listdir(self.root))

    def spoil(self, database):
        """Have a pool claim more than its rows do, once it is there."""
        deadline = time.monotonic() + LIMIT_S
        with contextlib.closing(sqlite3.connect(database, 60.0)) as rows:
            while True:
                with contextlib.suppress(sqlite3.OperationalError), rows:
                    if rows.execute(
                        'UPDATE pools SET claimed_bytes = claimed_bytes + 512'
                        ' WHERE backend = ?', ('plain',),
                    ).rowcount:
                        return
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.05)

    def wait_for(self, pattern):
        """Return the first path of a pattern once it is there."""
        deadline = time.monotonic() + LIMIT_S
        while not (found := glob.glob(f'{self.root}/{pattern}')):
            self.assertLess(time.monotonic(), deadline, pattern)
            time.sleep(0.05)
        return found[0]


def end(process):
    """End it the way that lets it clean up."""
    if process.poll() is None:
        process.terminate()
        process.wait(LIMIT_S)
