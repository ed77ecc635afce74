# SPDX-License-Identifier: Apache-2.0
"""The client object of the rbd driver under eventlet."""

from __future__ import annotations

import subprocess
import sys
import unittest

SCRIPT = """
import sys, threading, time
from volume import concurrency
concurrency.start('eventlet')
from volume.drivers.rbd.link import Link
from volume.node import Node
native = concurrency.native()
may_go = native.Event()

class Wire:
    failures = ()
    def close(self): pass

def connect(settings):
    assert may_go.wait(30)
    return Wire()

link, answers = Link(None, Node('/'), connect), []

def ask():
    try:
        answers.append(link.ask('something', lambda wire: 'answered'))
    except BaseException as failed:
        answers.append(repr(failed))

def connecting():
    count = 0
    for frame in sys._current_frames().values():
        while frame is not None and frame.f_code is not Link._open.__code__:
            frame = frame.f_back
        count += frame is not None
    return count

threads = [threading.Thread(target=ask) for _ in range(2)]
for thread in threads:
    thread.start()
deadline = time.monotonic() + 30
while connecting() < 2 and not answers and time.monotonic() < deadline:
    time.sleep(0.01)
may_go.set()
for thread in threads:
    thread.join()
print(answers)
"""


class LinkTest(unittest.TestCase):

    def test_two_that_connect_at_once_wait_for_each_other(self) -> None:
        done = subprocess.run(
            [sys.executable, '-c', SCRIPT], capture_output=True, text=True,
            timeout=60,
        )
        self.assertEqual(
            "['answered', 'answered']\n", done.stdout, done.stderr)
