# SPDX-License-Identifier: Apache-2.0
"""The embedded default, with what a large installation holds."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator

from bench_run import keep
from bench_run import measure
from bench_run import running
from bench_run import say
from bench_run import start_phase
from bench_run import TOP
from bench_service import free_port
from bench_service import Stack
from bench_table import Figure

FILL = {
    'volumes': 10_000, 'snapshots': 2_000, 'attachments': 3_000,
    'pools': 200, 'history': 100_000,
}


def figures(options: argparse.Namespace, root: str) -> Iterator[Figure]:
    """Fill an installation, and measure it."""
    say('10,000 volumes')
    os.makedirs(root)
    filled = os.path.join(root, 'filled')
    subprocess.run(
        [sys.executable, str(TOP / 'tools' / 'fill.py'), filled,
         *(f'--{name}={count}' for name, count in FILL.items())],
        check=True, stdout=subprocess.DEVNULL,
    )
    port = free_port()
    with open(os.path.join(filled, 'volume.conf')) as f:
        words = f.read().replace('port = 0', f'port = {port}').replace(
            '[DEFAULT]\n', '[DEFAULT]\nlog_level = WARNING\n'
            f'concurrency = {options.concurrency}\n', 1,
        )
    stack = Stack(root)
    stack.configure({'service': words}, port)
    with running(stack):
        start_phase(options, stack)
        runs = measure(options, stack, 'list')
    keep(options, runs, 'scale')
    yield Figure(
        'With 10,000 volumes: start to the first new volume',
        runs.figure('startup', 'exec_to_first_volume_s'), 's', '< 1.5',
        '2,000 snapshots, 3,000 attachments, 200 pools, 100,000 rows of '
        'history',
    )
    for name, key, goal in (
        ('list 1,000 in detail, p50', 'list1000_detail_ms', '< 100'),
        ('list 1,000, brief, p50', 'list1000_brief_ms', ''),
        ('list 50 in detail, p50', 'list50_detail_ms', ''),
        ('list by name, p50', 'list_by_name_ms', ''),
        ('GET a volume, p50', 'get_ms', '< 3'),
        ('create to available, p50', 'create_to_available_ms', '< 30'),
    ):
        yield Figure(
            f'With 10,000 volumes: {name}',
            runs.figure('list', key, 'p50'), 'ms', goal,
        )
    yield Figure(
        'With 10,000 volumes: resident', runs.resident_mib('service'), 'MiB',
        '< 150', 'the storage daemon apart',
    )
