# SPDX-License-Identifier: Apache-2.0
"""What is ended is asked first, and finishes what it has in hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import unittest

from volume import endings
from volume import errors
from volume.testing import fixtures

# Asked to end, it finishes: says much, if it is to, and leaves a whole file.
# It tells by another file that it is in the middle of it.
CAREFUL = '''
import os, signal, sys, time
path = sys.argv[1]
def finish(number, frame):
    sys.stdout.write('x' * int(sys.argv[2]))
    sys.stdout.flush()
    with open(path, 'w') as f:
        f.write('whole')
    os._exit(0)
signal.signal(signal.SIGTERM, finish)
open(path + '.begun', 'w').close()
time.sleep(600)
'''

# It heeds nothing, and says so.
DEAF = '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('deaf', flush=True)
time.sleep(600)
'''


class Endings(unittest.TestCase):

    def setUp(self) -> None:
        self.node = fixtures.make_node(self)
        self.path = os.path.join(self.node.state_dir, 'done')

    def cancel(self, *argv: str) -> None:
        """Cancel a command once it is in the middle of its work."""
        def watch(percent: float) -> None:
            if os.path.exists(f'{self.path}.begun'):
                raise errors.Cancelled('a person wants it')

        with self.assertRaises(errors.Cancelled):
            self.node.run(*argv, watch=watch, output_bytes_max=1 << 30)

    def assert_whole(self) -> None:
        with open(self.path) as f:
            self.assertEqual('whole', f.read())

    def test_command_that_is_cancelled_finishes_what_it_has_in_hand(
        self
    ) -> None:
        self.cancel(sys.executable, '-c', CAREFUL, self.path, '1000000')
        self.assert_whole()

    def test_so_does_what_a_command_has_started(self) -> None:
        # The shell ends at once.
        self.cancel(
            'sh', '-c', '"$@"; true', 'sh',
            sys.executable, '-c', CAREFUL, self.path, '1000000',
        )
        self.assert_whole()

    def test_what_does_not_heed_it_is_killed(self) -> None:
        with subprocess.Popen(
            [sys.executable, '-c', DEAF], stdout=subprocess.PIPE,
            process_group=0, bufsize=0,
        ) as child:
            try:
                assert child.stdout
                self.assertEqual(b'd', child.stdout.read(1))
                endings.end_group(child.pid, [child.stdout], term_s=0.2)
                self.assertEqual(-signal.SIGKILL, child.wait(20))
            finally:
                child.kill()


if __name__ == '__main__':
    unittest.main()
