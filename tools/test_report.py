# SPDX-License-Identifier: Apache-2.0
"""Run the tests under stestr, then say what was skipped and count.

Arguments are those of ``stestr run``. What is skipped, and why, stands at
the end, because a skip is a claim that nobody has checked on this machine.
After it stands what each failed test left, so that the end of a long log
has it. The closing line, alone on its line, is
``N passed, N failed, N skipped``; the exit code is stestr's.
"""

from __future__ import annotations

import collections
import io
import pathlib
import subprocess
import sys
from typing import Any

import subunit
import testtools

PASSED = ('success', 'xfail')
WORDS = 40  # lines of each thing that a failed test left
NEXT_STREAM = pathlib.Path('.stestr/next-stream')


def main(arguments: list[str]) -> int:
    before = _streams()
    code = subprocess.run(['stestr', 'run', *arguments]).returncode
    if _streams() == before:
        print('no test was run', file=sys.stderr)
        return code or 1
    outcomes = _outcomes()
    for line in _report(outcomes):
        print(line)
    return code or int(not outcomes)


def _streams() -> str:
    """Return stestr's count of runs: a run that broke off adds none."""
    return NEXT_STREAM.read_text() if NEXT_STREAM.exists() else ''


def _outcomes() -> list[dict[str, Any]]:
    """Return what the last run said of each test."""
    stream = subprocess.run(
        ['stestr', 'last', '--subunit'], stdout=subprocess.PIPE
    ).stdout
    outcomes: list[dict[str, Any]] = []
    result = testtools.StreamToDict(outcomes.append)
    result.startTestRun()
    subunit.ByteStreamToStreamResult(
        io.BytesIO(stream), non_subunit_name='stdout'
    ).run(result)
    result.stopTestRun()
    return [o for o in outcomes if o['status'] != 'exists']


def _report(outcomes: list[dict[str, Any]]) -> list[str]:
    skips = collections.defaultdict(list)
    failed = []
    for outcome in outcomes:
        if outcome['status'] == 'skip':
            skips[_reason(outcome)].append(outcome['id'])
        elif outcome['status'] not in PASSED:
            failed.append(outcome)
    lines = []
    for reason, names in sorted(skips.items()):
        lines.append(f'skipped, because {reason}:')
        lines += [f'    {name}' for name in sorted(names)]
    if failed:
        for outcome in failed:
            lines += _words(outcome)
        lines.append('failed:')
        lines += sorted(f'    {outcome["id"]}' for outcome in failed)
    skipped = sum(map(len, skips.values()))
    passed = len(outcomes) - len(failed) - skipped
    lines.append(f'{passed} passed, {len(failed)} failed, {skipped} skipped')
    return lines


def _words(outcome: dict[str, Any]) -> list[str]:
    """Return the end of what a failed test left: traceback, log, output."""
    lines = [f'{outcome["id"]}: {outcome["status"]}']
    for name, detail in sorted(outcome['details'].items()):
        text = detail.as_text().strip()
        if text:
            lines.append(f'  {name}:')
            last = text.splitlines()[-WORDS:]
            lines += [f'    {_both_ends(line)}' for line in last]
    return lines


def _both_ends(line: str) -> str:
    """Shorten a long line; a command's own words stand at its end."""
    return line if len(line) <= 900 else f'{line[:300]} ... {line[-600:]}'


def _reason(outcome: dict[str, Any]) -> str:
    reason = outcome['details'].get('reason')
    return reason.as_text().strip() if reason else 'no reason was given'


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
