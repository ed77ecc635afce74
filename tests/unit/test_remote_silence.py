# SPDX-License-Identifier: Apache-2.0
"""A connection that stands, and at whose other end nobody does anything."""

from __future__ import annotations

import concurrent.futures
import os
import sys
import unittest

from tests.unit.test_remote import WAIT_S
from volume import errors
from volume.remote.link import Link
from volume.remote.opened import RemoteOpened
from volume.testing import fixtures

SILENCE_S = 2.0  # of who is deaf, and answers the first request
QUIET_S = 5.0  # of who works, on a machine that is slow to answer
# It greets, says that a file is open, and reads no more.
DEAF = '''
import os, signal
from volume.remote import wire
def say(header):
    os.write(1, b''.join(map(bytes, wire.pack(header))))
os.write(1, wire.MAGIC)
say({'hello': wire.VERSION})
while not wire.receive(lambda into: os.readv(0, [into]))[0]['id']:
    pass
say({'id': 1, 'result': [1, True, True]})
signal.pause()
'''


class SilenceTest(unittest.TestCase):

    def link(self, *argv: str, silence_s: float = SILENCE_S) -> Link:
        link = Link('deaf', [sys.executable, *argv], str, silence_s)
        link.open()
        self.addCleanup(link.close)
        return link

    def assert_lost(self, pending: concurrent.futures.Future[int]) -> None:
        with self.assertRaisesRegex(
            errors.VolumeError,
            f'silence for {SILENCE_S:g} s|connection was lost'
        ):
            pending.result(WAIT_S)

    def test_who_sends_to_a_node_that_reads_no_more_is_told(self) -> None:
        # One is stuck in the middle of a frame, and many wait for it.
        link = self.link('-c', DEAF)
        found, _ = link.call('open', '/x', 'r+b')
        opened = RemoteOpened(link, (), *found)
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            for pending in [
                threads.submit(opened.pwrite, bytes(4 << 20), 0)
                for _ in range(3)
            ]:
                self.assert_lost(pending)
        self.assertTrue(link.is_lost)

    def test_node_that_only_does_not_answer_is_told_of_as_well(self) -> None:
        link = self.link('-c', DEAF)
        link.call('open', '/x', 'r+b')
        with self.assertRaisesRegex(
            errors.Unavailable, f'silence for {SILENCE_S:g} s'
        ):
            link.call('size', '/x')

    def test_long_quiet_work_is_no_silence(self) -> None:
        state_path = os.path.join(fixtures.state_dir(self), 'node')
        link = self.link(
            '-m', 'volume.remote.agent', '--state-path', state_path,
            silence_s=QUIET_S,
        )
        link.call(
            'run', ['sleep', str(1.2 * QUIET_S)], 60.0, 1 << 10, False,
        )
        self.assertFalse(link.is_lost)


if __name__ == '__main__':
    unittest.main()
