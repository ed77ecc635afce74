# SPDX-License-Identifier: Apache-2.0
"""How far a job is, while a person waits: a bar, or plain lines.

Both go to standard error, so that the result alone is on standard output. A
bar is drawn on a terminal only; elsewhere a line now and then is enough for
whoever reads a log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from volume.cli import show
from volume.cli.client import Json

LINE_S = 5.0


class Meter(Protocol):
    """Shows a job as it is now; ``close`` leaves a clean screen."""

    def show(self, job: Json) -> None:
        """Show it."""

    def close(self) -> None:
        """Show it no more."""


def make(what: str) -> Meter:
    """Return what suits standard error."""
    return Bar(what) if sys.stderr.isatty() else Lines(what, sys.stderr)


class Lines:
    """A line every few seconds, if there is something new to say."""

    def __init__(
        self,
        what: str,
        out: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._out = out
        self._clock = clock
        self._due = clock() + LINE_S
        self._said = ''
        self._trouble = ''

    def show(self, job: Json) -> None:
        if (words := trouble(job)) != self._trouble:
            self._trouble = words
            if words:
                self._say(words)
        if self._clock() < self._due:
            return
        self._due = self._clock() + LINE_S
        words = show.progress(job)
        if words and words != self._said:
            self._said = words
            self._say(words)

    def close(self) -> None:
        pass

    def _say(self, words: str) -> None:
        print(
            f'{self._what}: {show.clean(words)}', file=self._out, flush=True
        )


class Bar:
    """A progress bar with bytes, rate and the time that is left."""

    def __init__(self, what: str) -> None:
        # Slow to import, and of use at a terminal only.
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn('{task.description}', markup=False),
            progress.BarColumn(),
            progress.TextColumn('{task.fields[words]}', markup=False),
            console=Console(stderr=True), transient=True,
        )
        self._task = self._bar.add_task(what, total=None, words='')
        self._trouble = ''
        self._bar.start()

    def show(self, job: Json) -> None:
        if (words := trouble(job)) != self._trouble:
            self._trouble = words
            if words:
                self._bar.console.print(show.clean(words), markup=False)
        values: dict[str, Any] = {'words': _words(job)}
        if job['total_bytes']:
            values['total'] = job['total_bytes']
            values['completed'] = job['done_bytes']
        self._bar.update(self._task, **values)

    def close(self) -> None:
        self._bar.stop()


def trouble(job: Json) -> str:
    """Return what keeps an open job, if something does."""
    if job['state'] != 'open':
        return ''
    if job['direction'] == 'undo':
        return f'it is being undone: {job["error"] or "it was cancelled"}'
    if job['attempts'] and job['error']:
        return f'it will be tried again: {job["error"]}'
    return ''


def _words(job: Json) -> str:
    left = job['total_bytes'] - job['done_bytes']
    rate = job['rate_bytes_per_s']
    words = show.progress(job)
    if words and rate and left > 0:
        minutes, seconds = divmod(-(-left // rate), 60)
        words += f', {minutes}:{seconds:02d} left'
    return words
