# SPDX-License-Identifier: Apache-2.0
"""The embedded default, with what a large installation holds."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
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
from demo_screen import Failed

from volume.cli.client import Client

LIMIT_S = 180
QUIET_LOOKS = 4
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
        restored_s = _wait_for_exports(stack)
        # The project that has half of everything.
        runs = measure(options, stack, '--project', 'default', 'list')
    keep(options, runs, 'scale')
    yield Figure(
        'With 10,000 volumes: start to the first new volume',
        runs.figure('startup', 'exec_to_first_volume_s'), 's', '< 1.5',
        '2,000 snapshots, 3,000 attachments, 200 pools, 100,000 rows of '
        'history',
    )
    yield Figure(
        'With 10,000 volumes: 3,000 exports are back after a reboot',
        restored_s, 's', '', 'beside the service, which serves meanwhile',
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


def _wait_for_exports(stack: Stack) -> float:
    """Return how long it took until no job was open any more, in seconds."""
    client, began, quiet = Client(stack.url), time.monotonic(), 0
    while quiet < QUIET_LOOKS:
        if time.monotonic() - began > LIMIT_S:
            raise Failed(f'exports are still being restored after {LIMIT_S} s')
        time.sleep(0.5)
        is_busy = client.get(
            '/os-volume-jobs', state='open', limit=1, all_tenants=1
        )['jobs']
        quiet = 0 if is_busy else quiet + 1
    return time.monotonic() - began
