# SPDX-License-Identifier: Apache-2.0
"""Measure the service, and what it stands on; ``./run bench``.

Measured are, one after the other: the embedded default (one process, SQLite,
qcow2 layers), the same with 10,000 volumes, a stack of two processes on
RabbitMQ and MariaDB whose driver stores nothing, volumes over iSCSI, and the
driver ``xensm`` over the simulator. The stack is what another control plane
can be compared with; give its results by ``--peer``. Only a quiet machine
gives figures that mean something: how busy others were is measured and said.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator

import bench_embedded
import bench_scale
import bench_stack
import bench_tgt
import bench_xensm
from bench_table import Figure
from bench_table import lines
from bench_table import write
from demo_screen import Failed

TOP = pathlib.Path(__file__).resolve().parent.parent
DRIVER = TOP.parent / 'shared' / 'bench' / 'bench.py'
PAGE = TOP / 'doc' / 'source' / 'performance.rst'
FREE_BYTES = 8 << 30
PARTS = {
    'embedded': bench_embedded.figures, 'scale': bench_scale.figures,
    'stack': bench_stack.figures, 'tgt': bench_tgt.figures,
    'xensm': bench_xensm.figures,
}


def main(argv: list[str]) -> int:
    """Measure; 0 says that every goal was met, 1 that one was missed."""
    options = _options(argv)
    if not os.path.exists(options.driver):
        print(
            f'bench: {options.driver} is not there: say by --driver where '
            'the benchmark for Cinder v3 endpoints lies', file=sys.stderr,
        )
        return 2
    root = tempfile.mkdtemp(prefix='volume-bench-', dir=options.directory)
    try:
        if shutil.disk_usage(root).free < FREE_BYTES:
            raise Failed(f'{root} needs {FREE_BYTES >> 30} GiB; give another '
                         'place by --directory')
        figures = list(_measure(options, root))
    except Failed as failed:
        print(f'bench: {failed}', file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print('\n'.join(lines(figures)))
    if options.write:
        write(PAGE, _heading(options), figures)
    return int(not all(figure.is_met for figure in figures))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='./run bench', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--driver', default=str(DRIVER), metavar='FILE',
        help='the benchmark that drives any Cinder v3 endpoint',
    )
    parser.add_argument(
        '--peer', metavar='FILE', default='',
        help='its results against another service, measured within the hour',
    )
    parser.add_argument(
        '--directory', default=None, metavar='DIR',
        help='where to store what is measured; the disk under it matters',
    )
    parser.add_argument(
        '--repeat', type=int, default=3, metavar='N',
        help='how often each phase is run; the median counts',
    )
    parser.add_argument(
        '--only', default=','.join(PARTS), metavar='PARTS',
        help=f'parts to measure, of: {", ".join(PARTS)}',
    )
    parser.add_argument(
        '--concurrency', default='threads', choices=['threads', 'eventlet'],
        help='mode of the measured services',
    )
    parser.add_argument(
        '--keep', metavar='DIR', default='',
        help='keep the lines that the benchmark has written there',
    )
    parser.add_argument(
        '--write', action='store_true',
        help='put the table into doc/source/performance.rst',
    )
    return parser.parse_args(argv)


def _measure(options: argparse.Namespace, root: str) -> Iterator[Figure]:
    for name in options.only.split(','):
        if name not in PARTS:
            raise Failed(f'there is no part {name!r}')
        yield from PARTS[name](options, os.path.join(root, name))


def _heading(options: argparse.Namespace) -> str:
    with open('/proc/meminfo') as f:
        memory_gib = int(f.readline().split()[1]) / (1 << 20)
    return (
        f'Measured on {time.strftime("%Y-%m-%d")}: {os.cpu_count()} '
        f'processors, {memory_gib:.0f} GiB, Linux {platform.release()}, '
        f'Python {platform.python_version()}, '
        f'concurrency = {options.concurrency}; medians of '
        f'{options.repeat} runs.'
    )


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
