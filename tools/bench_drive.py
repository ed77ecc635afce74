# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmark that drives any Cinder v3 endpoint, and reads it.

It is a program of its own, because Cinder is measured by the same one; where
it lies is told by ``--driver``. It writes one line of JSON for each run of a
phase. A figure is the median over runs, and runs during which others used
the processors are left out, as long as a quiet one remains.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from demo_screen import Failed

LIMIT_S = 1800
QUIET = 0.05  # of the processors, by others
Line = dict[str, Any]


class Runs:
    """The lines of one file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def lines(self, phase: str, clients: int | None = None) -> list[Line]:
        """Return the quiet runs of a phase, or all if none was."""
        found = [
            line for line in self._read()
            if line['phase'] == phase and line.get('conc') == clients
        ]
        quiet = [line for line in found if foreign(line) <= QUIET]
        return quiet or found

    def figure(
        self, phase: str, *keys: str, clients: int | None = None
    ) -> float | None:
        """Return the median of a value, ``None`` if nothing has it."""
        values = []
        for line in self.lines(phase, clients):
            found: Any = line
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                values.append(float(found))
        return statistics.median(values) if values else None

    def resident_mib(self, name: str) -> float | None:
        """Return the most memory that a process had after any phase."""
        return max((
            line['rss_mib'][name] for line in self._read()
            if name in line.get('rss_mib', {})
        ), default=None)

    def noise(self) -> float:
        """Return the largest share of the processors that others used."""
        return max(map(foreign, self._read()), default=0.0)

    def problems(self) -> list[str]:
        """Return what went wrong in any run."""
        return [
            f'{line["phase"]}: {line.get("error") or line["first_error"]}'
            for line in self._read()
            if line.get('error') or line.get('errors')
        ]

    def _read(self) -> Iterator[Line]:
        if os.path.exists(self.path):
            with open(self.path) as f:
                yield from map(json.loads, f)


def foreign(line: Line) -> float:
    """Return the share of the processors that others used in a run."""
    used = float(line.get('foreign_cpu_s', 0.0))
    return used / line['wall_s'] / (os.cpu_count() or 1)


def drive(
    driver: str,
    url: str,
    out: str,
    phases: Iterable[str],
    *words: str,
    pids: str = '',
) -> Runs:
    """Run phases against a service.

    :raises Failed: the benchmark itself failed
    """
    argv = [
        sys.executable, driver, '--url', url, '--out', out,
        *(['--pids', pids] if pids else []), *words, *phases,
    ]
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=LIMIT_S,
    )
    if done.returncode:
        raise Failed(f'{" ".join(argv)}: {done.stdout[-2000:]}')
    return Runs(out)
