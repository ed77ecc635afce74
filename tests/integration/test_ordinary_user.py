# SPDX-License-Identifier: Apache-2.0
"""Nothing here needs root: the suites of file and qcow, as nobody.

Who the user is makes no difference between qcow's formats: by default it is
qcow2 alone, with ``VOLUME_PROOF=1`` all of them.
"""

import os
import subprocess
import sys
import unittest

import volume

NOBODY = 65534
TOP = os.path.dirname(os.path.dirname(volume.__file__))
SUITES = (
    'tests.conformance.test_file',
    'tests.conformance.test_qcow' if os.environ.get('VOLUME_PROOF')
    else 'tests.conformance.test_qcow.Qcow2Test',
)


@unittest.skipIf(os.getuid(), 'the whole run is an ordinary user\'s already')
class OrdinaryUser(unittest.TestCase):
    def as_nobody(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ['setpriv', f'--reuid={NOBODY}', f'--regid={NOBODY}',
             '--clear-groups', *argv],
            cwd=TOP, capture_output=True, text=True, timeout=280,
            env={'PATH': os.environ['PATH'], 'HOME': '/nonexistent',
                 'PYTHONDONTWRITEBYTECODE': '1'},
        )

    def test_drivers_keep_their_contract_without_any_privilege(self):
        try:
            probe = self.as_nobody(
                sys.executable, '-c', 'import volume.drivers.file'
            )
        except PermissionError:
            probe = None
        if probe is None or probe.returncode:
            self.skipTest('an ordinary user cannot read the checkout')
        done = self.as_nobody(
            sys.executable, '-m', 'unittest', *SUITES
        )
        self.assertEqual(0, done.returncode, done.stderr[-3000:])
        self.assertRegex(done.stderr, r'Ran \d{3} tests')
