# SPDX-License-Identifier: Apache-2.0
"""What a person sees: one line a step, its time, and what was checked.

On a terminal a running step shows how far it is; elsewhere only what is done
is written, so that the output can be kept.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

NAME_WIDTH = 10
MIB = 1 << 20


class Failed(Exception):
    """Something is not as it must be; the message says what."""


class Step:
    """One line in the making."""

    def __init__(self, screen: Screen, title: str) -> None:
        self._screen = screen
        self._title = title
        self._started_at = time.monotonic()
        self.text = ''

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def doing(self, text: str) -> None:
        """Show what is going on, on a terminal."""
        self._screen.draw(self._title, text)

    def done(self, text: str) -> None:
        """Say what was done and checked."""
        self.text = text


class Screen:
    """Where the lines go, and the count of what was checked."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.checks = 0
        self.steps = 0
        self._started_at = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def say(self, text: str = '', colour: str = '') -> None:
        """Write a line."""
        print(self._colour(text, colour), flush=True)

    def check(self, is_right: bool, otherwise: str) -> None:
        """Count a check.

        :raises Failed: it is not right
        """
        self.checks += 1
        if not is_right:
            raise Failed(otherwise)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Time what is done, and write its line."""
        self.steps += 1
        title = f'{self.steps:3}  {name:{NAME_WIDTH}}'
        step = Step(self, title)
        step.doing('…')
        try:
            yield step
        except BaseException as failed:
            self._erase()
            word = 'FAILED' if isinstance(failed, Exception) else 'stopped'
            self.say(f'{title} {_seconds(step)}  {word}', '31')
            raise
        self._erase()
        self.say(
            f'{self._colour(title, "1")} '
            f'{self._colour(_seconds(step), "36")}  {step.text}'
        )

    def draw(self, title: str, text: str) -> None:
        """Show a line that the next one replaces."""
        if self.is_terminal:
            print(f'\r\33[K{title}         {text:.60}', end='', flush=True)

    def _erase(self) -> None:
        if self.is_terminal:
            print('\r\33[K', end='', flush=True)

    def _colour(self, text: str, code: str) -> str:
        if not self.is_terminal or not code:
            return text
        return f'\33[{code}m{text}\33[0m'


def size(count_bytes: int) -> str:
    """Return a size for a person to read."""
    mib = count_bytes / MIB
    if mib >= 1024 and not mib % 1024:
        return f'{mib / 1024:.0f} GiB'
    return f'{mib:.0f} MiB' if mib >= 10 else f'{mib:.1f} MiB'


def _seconds(step: Step) -> str:
    return f'{step.elapsed_s:6.2f} s'
