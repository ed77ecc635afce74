# SPDX-License-Identifier: Apache-2.0
"""Check that files which are made from others are up to date.

The sample configuration must be what oslo-config-generator makes of the
options, and each release note must be one that reno can read.
"""

from __future__ import annotations

import difflib
import pathlib
import subprocess
import sys
import tempfile

SAMPLE = pathlib.Path('etc/volume/volume.conf.sample')
SHOWN = 20


def main() -> int:
    return max(check_sample(), check_notes())


def check_sample() -> int:
    """Compare the sample with what its generator says now."""
    with tempfile.TemporaryDirectory() as directory:
        made = pathlib.Path(directory, 'sample')
        subprocess.run([
            'oslo-config-generator',
            '--config-file', 'etc/volume/config-generator.conf',
            '--output-file', str(made),
        ], check=True)
        wanted = made.read_text().splitlines()
    there = SAMPLE.read_text().splitlines() if SAMPLE.exists() else []
    differs = list(difflib.unified_diff(
        there, wanted, str(SAMPLE), 'what the options say', lineterm='', n=1,
    ))
    if not differs:
        return 0
    print(*differs[:SHOWN], sep='\n')
    print(f'{SAMPLE} is not up to date: run "./run tox -e genconfig"')
    return 1


def check_notes() -> int:
    """Have reno read the release notes; it needs the repository."""
    if not pathlib.Path('.git').exists():
        print('this is no git repository: release notes are not checked')
        return 0
    done = subprocess.run(['reno', '-q', 'lint'])
    if done.returncode:
        print('a file in releasenotes/notes is wrong, see above')
    return done.returncode


if __name__ == '__main__':
    sys.exit(main())
