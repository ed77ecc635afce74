# SPDX-License-Identifier: Apache-2.0
"""What was done and what came of it: a line a seed, and tables at the end."""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
import time
from typing import Any

ENDS = ('done', 'refused', 'failed', 'cancelled', 'unanswered')


@dataclasses.dataclass(frozen=True)
class Difference:
    """Something that is not as it must be."""

    kind: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f'{self.kind}: {self.what}: {self.detail}'


@dataclasses.dataclass
class Request:
    """One thing that was asked for, and what became of it."""

    kind: str
    client: int
    about: str
    request_id: str
    at: float
    took_s: float = 0.0
    answer: str = 'unanswered'
    words: str = ''
    end: str = ''

    def line(self, began_at: float) -> str:
        return (
            f'{self.at - began_at:8.3f} +{self.took_s:.3f} client '
            f'{self.client} {self.kind} {self.about}: {self.answer}'
            f'{", " + self.end if self.end else ""}'
            f'{" (" + self.words + ")" if self.words else ""} '
            f'{self.request_id}'
        )


@dataclasses.dataclass
class Kill:
    """A process that was killed, and the work that was under way."""

    target: str
    at: float
    pid: int = 0
    words: str = ''
    in_flight: list[str] = dataclasses.field(default_factory=list)
    jobs: list[str] = dataclasses.field(default_factory=list)
    recovered_s: float | None = None
    is_looked_at: bool = False

    def line(self, began_at: float) -> str:
        return (
            f'{self.at - began_at:8.3f} SIGKILL of the {self.target}, process '
            f'{self.pid} ({self.words}), while '
            f'{", ".join(self.in_flight) or "nothing"} ran'
        )


@dataclasses.dataclass
class Outcome:
    """One seed."""

    seed: int
    began_at: float
    requests: list[Request] = dataclasses.field(default_factory=list)
    kills: list[Kill] = dataclasses.field(default_factory=list)
    differences: list[Difference] = dataclasses.field(default_factory=list)
    checks: int = 0
    verified_bytes: int = 0
    recovered_jobs: int = 0
    excused_jobs: int = 0
    took_s: float = 0.0

    def line(self) -> str:
        killed = collections.Counter(kill.target for kill in self.kills)
        targets = ', '.join(f'{n} {name}' for name, n in killed.items())
        return (
            f'seed {self.seed}: {len(self.requests)} requests, '
            f'killed {targets or "nothing"}, {self.recovered_jobs} jobs '
            f'recovered, {self.verified_bytes / (1 << 30):.1f} GiB verified '
            f'in {self.checks} checks, {self.took_s:.0f} s: '
            + (f'{len(self.differences)} differences' if self.differences
               else 'nothing differs')
        )


class Report:
    """All seeds together: counts alone, so that days cost no memory."""

    RECOVERIES_MAX = 100_000

    def __init__(self) -> None:
        self._began_at = time.monotonic()
        self.seeds = 0
        self.first_seed: int | None = None
        self.last_seed = 0
        self.differences: list[str] = []
        self._ends: dict[str, collections.Counter[str]] = {}
        self._kills: dict[str, dict[str, Any]] = {}
        self._sums: collections.Counter[str] = collections.Counter()

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        if self.first_seed is None:
            self.first_seed = outcome.seed
        self.last_seed = outcome.seed
        self.differences += map(str, outcome.differences)
        for request in outcome.requests:
            self._ends.setdefault(request.kind, collections.Counter())[
                request.end or request.answer
            ] += 1
        for kill in outcome.kills:
            sums = self._kills.setdefault(kill.target, {
                'count': 0, 'in_flight': collections.Counter(),
                'recovered_s': [],
            })
            sums['count'] += 1
            sums['in_flight'].update(kill.in_flight or ['nothing'])
            if kill.recovered_s is not None:
                sums['recovered_s'] = [
                    *sums['recovered_s'][1 - self.RECOVERIES_MAX:],
                    kill.recovered_s,
                ]
        for name in (
            'checks', 'verified_bytes', 'recovered_jobs', 'excused_jobs',
        ):
            self._sums[name] += getattr(outcome, name)

    def json(self) -> str:
        """Return everything for a program to read."""
        return json.dumps({
            'seeds': self.seeds,
            'first_seed': self.first_seed,
            'last_seed': self.last_seed,
            'took_s': round(time.monotonic() - self._began_at, 1),
            'requests': {
                kind: dict(ends) for kind, ends in sorted(self._ends.items())
            },
            'kills': {
                target: {
                    'count': sums['count'],
                    'in_flight': dict(sums['in_flight']),
                    **_spread(sums['recovered_s']),
                } for target, sums in sorted(self._kills.items())
            },
            **self._sums,
            'differences': self.differences,
        }, indent=1) + '\n'

    def text(self) -> str:
        """Return everything for a person to read."""
        took_s = time.monotonic() - self._began_at
        count = sum(sum(ends.values()) for ends in self._ends.values())
        lines = [
            f'{self.seeds} seeds, {count:,} requests, '
            f'{sum(sums["count"] for sums in self._kills.values())} kills in '
            f'{took_s / 60:.1f} min',
            '',
            f'{"request":18}' + ''.join(f'{end:>11}' for end in ENDS),
            *(
                f'{kind:18}' + ''.join(
                    f'{ends[end] or "":>11}' for end in ENDS
                ) for kind, ends in sorted(self._ends.items())
            ),
            '',
            f'{"killed":10}{"times":>6}{"p50":>8}{"max":>8}  jobs under way',
        ]
        for target, sums in sorted(self._kills.items()):
            spread = _spread(sums['recovered_s'])
            words = ', '.join(
                f'{n} {kind}' for kind, n in sums['in_flight'].most_common()
            )
            lines.append(
                f'{target:10}{sums["count"]:6}'
                f'{_seconds(spread["recovery_p50_s"]):>8}'
                f'{_seconds(spread["recovery_max_s"]):>8}  {words}'
            )
        lines += [
            '',
            f'{self._sums["recovered_jobs"]:,} jobs were recovered, '
            f'{self._sums["excused_jobs"]:,} failed by a kill; '
            f'{self._sums["verified_bytes"] / (1 << 30):,.1f} GiB were read '
            f'and compared in {self._sums["checks"]:,} checks',
            f'{len(self.differences)} differences' if self.differences
            else 'nothing differs',
        ]
        return '\n'.join(lines)


def _spread(found: list[float]) -> dict[str, float | None]:
    return {
        'recovery_p50_s': round(statistics.median(found), 3)
        if found else None,
        'recovery_max_s': round(max(found), 3) if found else None,
    }


def _seconds(value: float | None) -> str:
    return '' if value is None else f'{value:.2f} s'
