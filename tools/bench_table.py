# SPDX-License-Identifier: Apache-2.0
"""The table of figures, and where in the documentation it stands."""

from __future__ import annotations

import dataclasses
import operator
import pathlib

BEGIN = '.. The table is written by ./run bench.\n'
END = '.. The end of the table.\n'


@dataclasses.dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    ``goal`` is a bound with its direction, as in ``< 30`` or ``>= 60``;
    ``beside`` what it stands on or is compared with.
    """

    name: str
    value: float | None
    unit: str
    goal: str = ''
    beside: str = ''

    @property
    def is_met(self) -> bool:
        """Say whether the goal is met; what has none always is."""
        if self.value is None or not self.goal:
            return self.value is not None
        sign, bound = self.goal.split()
        compare = {'<': operator.lt, '>=': operator.ge, '<=': operator.le}
        return bool(compare[sign](self.value, float(bound)))

    def words(self) -> tuple[str, str, str, str]:
        """Return the cells of its row."""
        if self.value is None:
            return self.name, 'not measured', self.goal, self.beside
        value = f'{_short(self.value)} {self.unit}'.strip()
        goal = self.goal and f'{self.goal} {self.unit}'.strip()
        mark = '' if self.is_met else ' **missed**'
        return self.name, value + mark, goal, self.beside


def lines(figures: list[Figure]) -> list[str]:
    """Return the table for a terminal."""
    rows = [('figure', 'measured', 'goal', 'beside it')]
    rows += [figure.words() for figure in figures]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        '  '.join(f'{cell:{width}}' for cell, width in zip(
            row, widths, strict=True
        ))
        .rstrip()
        for row in rows
    ]


def write(path: pathlib.Path, heading: str, figures: list[Figure]) -> None:
    """Put the table into a page, between its two marks."""
    words = path.read_text()
    before, rest = words.split(BEGIN)
    after = rest.split(END)[1]
    table = [
        heading, '', '.. list-table::', '   :header-rows: 1',
        '   :widths: 40 18 14 28', '',
        '   * - Figure', '     - Measured', '     - Goal', '     - Beside it',
    ]
    for figure in figures:
        cells = figure.words()
        table.append(f'   * - {cells[0]}')
        table += [f'     - {cell}'.rstrip() for cell in cells[1:]]
    path.write_text(
        f'{before}{BEGIN}\n' + '\n'.join(table) + f'\n\n{END}{after}'
    )


def _short(value: float) -> str:
    if value >= 100:
        return f'{value:,.0f}'
    return f'{value:.1f}' if value >= 10 else f'{value:.2f}'
