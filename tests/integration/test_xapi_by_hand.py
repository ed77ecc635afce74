# SPDX-License-Identifier: Apache-2.0
"""The commands on the simulator's page do what the page says."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest

PAGE = (
    pathlib.Path(__file__).parents[2] / 'doc/source/simulator.rst'
).read_text()
START = 'import sys; from volume.sim.xapi.main import main; sys.exit(main())'
ROOT = pathlib.Path(__file__).parents[2]


class ByHand(unittest.TestCase):
    """A stranger with curl, and the simulator as a process."""

    def setUp(self):
        for tool in ('bash', 'curl', 'qemu-img'):
            if shutil.which(tool) is None:
                self.skipTest(f'no {tool}')
        made = tempfile.TemporaryDirectory(prefix='vtxapi')
        self.addCleanup(made.cleanup)
        self.directory = pathlib.Path(made.name)
        shown = PAGE.split('$ cat pool.json\n', 1)[1].split('$ ', 1)[0]
        (self.directory / 'pool.json').write_text(shown)
        (self.directory / 'backup.pass').write_text('backup\n')

    def serve(self, *flags):
        """Start the simulator; return what it printed."""
        process = subprocess.Popen(
            [sys.executable, '-c', START, '--config', 'pool.json', *flags],
            cwd=self.directory, stdout=subprocess.PIPE, text=True,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, 30)
        self.addCleanup(process.terminate)
        return json.loads(process.stdout.readline())

    def bash(self, script):
        """Run a script of the page; return what it said."""
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', script],
            cwd=self.directory, capture_output=True, text=True, timeout=60,
        )
        self.assertEqual(0, done.returncode, done.stderr)
        return done.stdout

    def test_a_session_with_curl_imports_and_exports_a_disk(self):
        said = self.bash(block('URL', self.serve()['master']))
        self.assertIn('SR_BACKEND_FAILURE_101', said)
        self.assertIn('Images are identical.', said)
        made = list(self.directory.glob('state/world/nfs/filer/export/*/*'))
        self.assertEqual(['.vhd'], [path.suffix for path in made])

    def test_faults_are_ordered_and_taken_back(self):
        said = self.bash(block('CONTROL', self.serve()['control']))
        self.assertIn('"lose_reply"', said)
        self.assertIn('"SR_BACKEND_FAILURE_40"', said)

    def test_with_tls_the_certificate_that_is_named_is_the_one(self):
        started = self.serve('--tls')
        said = subprocess.run(
            ['curl', '-sS', '--cacert', started['certificates'][0],
             f'{started["master"]}/jsonrpc', '-d', json.dumps({
                 'jsonrpc': '2.0', 'id': 1,
                 'method': 'session.login_with_password',
                 'params': ['backup', 'backup']})],
            capture_output=True, text=True, timeout=60,
        )
        self.assertIn('OpaqueRef:', said.stdout, said.stderr)


def block(name, url):
    """Return the script of the page that sets a variable, set to ``url``."""
    found = re.search(
        rf'\.\. code-block:: bash\n\n((?:   .*\n|\n)*?   {name}=\S+\n'
        r'(?:   .*\n|\n)*)', PAGE)
    return re.sub(
        rf'(?m)^{name}=\S+$', f'{name}={url}',
        textwrap.dedent(found.group(1)))
