# SPDX-License-Identifier: Apache-2.0
"""Kill the service and its helpers under load, again and again.

Everything that was acknowledged must be there afterwards, with the bytes
that were written; nothing may be stuck, leak or be claimed for nobody. It
needs no root; what it makes lies in one temporary directory, what it starts
is ended by its pid.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

import crash_images
import crash_plant
from crash_model import Thing
from crash_report import Kill
from crash_report import Outcome
from crash_report import Report
from crash_report import Request
from crash_run import Run
from crash_run import Settings
from demo_family import ENVIRONMENT
from demo_family import Family
from demo_screen import Failed
from demo_web import ImageServer

TOOLS = ('prlimit', 'qemu-img', 'qemu-storage-daemon')
FREE_BYTES = 4 << 30
HISTORY = 'history.txt'
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run seeds; 0 is that nothing differs, 1 that something does."""
    options = _parser().parse_args(arguments)
    report = Report()
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        _check_machine(options.directory)
        _run(options, report)
    except KeyboardInterrupt:
        print('interrupted; the seed that ran is not counted', flush=True)
    except (Failed, OSError) as failed:
        print(f'crash: {failed}', file=sys.stderr)
        return 1
    if not options.self_test:
        print(f'\n{report.text()}')
    if options.report:
        with open(options.report, 'w') as f:
            f.write(report.json())
    return 1 if report.differences else 0


def _run(options: argparse.Namespace, report: Report) -> None:
    began_at = time.monotonic()
    settings = Settings(options.operations, options.kills, options.clients)
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(tempfile.TemporaryDirectory(
            prefix='vc-images-', dir=options.directory
        ))
        server = stack.enter_context(ImageServer(shared))
        with Family() as family:
            images = crash_images.make(family, shared)
        if options.self_test:
            report.differences += _test(options, images, server)
            return
        for seed in itertools.count(options.seed):
            outcome = _seed(seed, settings, options, images, server)
            report.add(outcome)
            print(outcome.line(), flush=True)
            if outcome.differences:
                return
            if options.minutes is not None:
                if time.monotonic() - began_at > options.minutes * 60:
                    return
            elif report.seeds >= options.seeds:
                return


def _seed(
    seed: int,
    settings: Settings,
    options: argparse.Namespace,
    images: dict[str, Thing],
    server: ImageServer,
) -> Outcome:
    # A socket's path has to be short.
    directory = tempfile.mkdtemp(prefix=f'vc{seed}-', dir=options.directory)
    keep = options.keep
    try:
        with Family() as family:
            run = Run(seed, settings, directory, family, images, server)
            outcome = run.go()
        if outcome.differences:
            keep = True
            _write_out(run, outcome)
        return outcome
    except Exception:
        keep = True  # a bug of ours: what it met is worth a look
        raise
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


def _test(
    options: argparse.Namespace, images: dict[str, Thing], server: ImageServer
) -> list[str]:
    """Plant one loss after the other; return those that were overlooked."""
    overlooked = []
    with tempfile.TemporaryDirectory(
        prefix='vct-', dir=options.directory
    ) as directory, Family() as family:
        settings = Settings(operations=20, kills=0, files_s=3.0)
        run = Run(options.seed, settings, directory, family, images, server)
        for name, is_found in crash_plant.try_all(run):
            print(f'{name}: {"found" if is_found else "OVERLOOKED"}')
            if not is_found:
                overlooked.append(f'overlooked: {name}')
        for each in run.outcome.differences:
            print(each)
            overlooked.append(str(each))
    return overlooked


def _write_out(run: Run, outcome: Outcome) -> None:
    """Say all that there is to know about a difference."""
    events: list[Request | Kill] = [*outcome.requests, *outcome.kills]
    lines = [
        f'seed {outcome.seed}',
        *(str(each) for each in outcome.differences),
        '',
        *(
            each.line(outcome.began_at)
            for each in sorted(events, key=lambda each: each.at)
        ),
        '',
        *_rows(run),
    ]
    path = os.path.join(run.directory, HISTORY)
    with open(path, 'w') as f:
        f.write('\n'.join(lines) + '\n')
    print('\n'.join(map(str, outcome.differences)))
    print(f'\nThe service\'s log ends with:\n{run.service.log_tail()}')
    print(
        f'{path} has the whole history and all rows; the rest of the '
        'service lies beside it', flush=True,
    )


def _rows(run: Run) -> list[str]:
    with contextlib.suppress(Exception):
        rows = run.rows()
        return [
            f'{noun} {row}' for noun, table in (
                ('volume', rows.volumes), ('snapshot', rows.snapshots),
                ('attachment', rows.attachments), ('job', rows.jobs),
            ) for row in table.values()
        ]
    return ['the rows cannot be read']


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='./run crash', description=__doc__.split('\n')[0]
    )
    add = parser.add_argument
    add('--seed', type=int, default=1, help='the first seed (default: 1)')
    add('--seeds', type=int, default=1, help='how many (default: 1)')
    add('--minutes', type=float, help='go on for so long, at least one seed')
    add('--operations', type=int, default=100, help='for each seed')
    add('--kills', type=int, default=5, help='for each seed')
    add('--clients', type=int, default=4, help='that ask at once')
    add('--directory', help='where to work (default: $TMPDIR or /tmp)')
    add('--keep', action='store_true', help='keep what each seed has made')
    add('--self-test', action='store_true',
        help='plant losses instead, and see that each is found')
    add('--report', metavar='FILE', help='write the report as JSON as well')
    return parser


def _check_machine(directory: str | None) -> None:
    """Say what is missing before anything is begun."""
    missing = [
        tool for tool in TOOLS
        if shutil.which(tool, path=ENVIRONMENT['PATH']) is None
    ]
    if missing:
        raise Failed(f'not installed: {", ".join(missing)}; see bindep.txt')
    where = directory or tempfile.gettempdir()
    free = shutil.disk_usage(where).free
    if free < FREE_BYTES:
        raise Failed(
            f'{where} has {free >> 20} MiB free and {FREE_BYTES >> 20} are '
            'needed; use --directory'
        )


def _interrupt(number: int, frame: object) -> None:
    # From here on nobody's impatience leaves a process or a file behind.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == '__main__':
    sys.exit(main())
