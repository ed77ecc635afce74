# SPDX-License-Identifier: Apache-2.0
"""What the parts of the benchmark share: a service up, phases, its lines."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

from bench_drive import drive
from bench_drive import Runs
from bench_service import Stack
from demo_screen import Failed

from volume.blockd import Blockd
from volume.node import Node

TOP = pathlib.Path(__file__).resolve().parent.parent
CONTROL = f'{sys.executable} {TOP}/tools/bench_service.py'


@contextlib.contextmanager
def running(stack: Stack) -> Iterator[None]:
    """Have a service up, and nothing of it left afterwards."""
    try:
        stack.start()
        yield
    finally:
        stack.stop()
        _end_daemons(stack.directory)


def _end_daemons(directory: str) -> None:
    """End the storage daemons that services were to leave running."""
    for where, names, _ in os.walk(directory):
        if 'blockd' in names:
            Blockd(Node(where), os.path.join(where, 'blockd')).stop()


def measure(
    options: argparse.Namespace, stack: Stack, *words: str
) -> Runs:
    """Run phases against a service that is up.

    :raises Failed: something went wrong in one
    """
    runs = drive(
        options.driver, stack.url,
        os.path.join(stack.directory, 'runs.jsonl'), words,
        '--repeat', str(options.repeat), '--label', 'volume-service',
        pids=stack.pids,
    )
    if problems := runs.problems():
        raise Failed(f'{"; ".join(problems)}\n{stack.log()}')
    return runs


def keep(options: argparse.Namespace, runs: Runs, name: str) -> None:
    """Keep the lines if that was asked for; say how quiet it was."""
    if options.keep:
        os.makedirs(options.keep, exist_ok=True)
        shutil.copy(runs.path, os.path.join(options.keep, f'{name}.jsonl'))
    say(f'others used up to {runs.noise():.0%} of the processors')


def start_phase(options: argparse.Namespace, stack: Stack) -> Runs:
    """Measure starts: the service is ended and started again."""
    return measure(
        options, stack, 'startup',
        '--start', f'{CONTROL} start {stack.directory}',
        '--stop', f'{CONTROL} stop {stack.directory}',
    )


def say(words: str) -> None:
    """Tell a person what goes on."""
    print(f'bench: {words}', file=sys.stderr)
