# SPDX-License-Identifier: Apache-2.0
"""Ceph's library in our process uses no memory that it has given back.

The C library's debugging allocator fills such memory with rubbish: whoever
looks at it again does not come far.
"""

import os
import subprocess
import sys
import unittest

from tests import ceph

ALLOCATOR = 'libc_malloc_debug.so.0'
LIMIT_S = 600


class Freed(unittest.TestCase):
    def test_memory_that_was_given_back_is_not_used(self):
        if lacking := ceph.missing():
            self.skipTest(lacking)
        done = subprocess.run(
            [sys.executable, '-m', 'unittest', '-k', 'clone', '-k', 'delete',
             'tests.conformance.test_rbd'],
            env={**os.environ, 'LD_PRELOAD': ALLOCATOR,
                 'MALLOC_CHECK_': '3', 'MALLOC_PERTURB_': '165'},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S,
        )
        self.assertNotIn('ld.so', done.stdout)
        self.assertEqual(0, done.returncode, done.stdout)
