# SPDX-License-Identifier: Apache-2.0
"""The tests; none of them may run for ever.

A test that exceeds the limit fails with the stacks of all threads, and its
clean-up still runs. The limit is a guard against hanging, not a statement
about speed.
"""

import os

from volume import concurrency

# Before anything else: eventlet has to patch what the rest imports. Services
# that tests start as processes of their own follow it (see process.py).
CONCURRENCY = os.environ.get('VOLUME_TEST_CONCURRENCY', concurrency.THREADS)
concurrency.start(CONCURRENCY)

import faulthandler  # noqa: E402
import logging  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import unittest  # noqa: E402

by_thread = unittest.skipIf(
    CONCURRENCY != concurrency.THREADS,
    'under eventlet a statement does not tell whose thread asks it',
)

END_S = 30.0  # for a thread of a service that was told to end
LIMIT_S = float(os.environ.get('VOLUME_TEST_LIMIT_S', '300'))

# Injected faults are logged by the thousand; a test that asks for logs gets
# them all the same.
logging.getLogger('volume').addHandler(logging.NullHandler())

_run = unittest.TestCase.run


class TooLong(BaseException):
    """A test hangs; no ``except Exception`` on its way may swallow this."""


def _limited(case, result=None):
    threads = concurrency.native()
    if threads.current_thread() is not threads.main_thread():
        return _run(case, result)

    def end(signum, frame):
        faulthandler.dump_traceback()
        raise TooLong(f'{case.id()} ran for more than {limit_s:g} s')

    # What is first to be cleaned up later is the last to be looked at.
    case.addCleanup(_ended, _services())
    # Where all is slow, more time is no sign of hanging.
    limit_s = max(LIMIT_S, getattr(case, 'limit_s', 0.0))
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s, limit_s)
    try:
        return _run(case, result)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _services():
    """Return how many services run in this process."""
    return sum(thread.name == 'sweep' for thread in threading.enumerate())


def _ended(before):
    """Fail if a service that the test has started goes on.

    It would work on in the tests after it: log, start daemons anew in what
    is gone, and, when it finds that it was fenced, end the whole process.
    """
    deadline = time.monotonic() + END_S
    while (now := _services()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now <= before, 'a service that the test has started goes on'


unittest.TestCase.run = _limited
