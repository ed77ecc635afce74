# SPDX-License-Identifier: Apache-2.0
"""The embedded default: one process, SQLite, qcow2 layers on this disk."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Iterator

import bench_floor
from bench_drive import Runs
from bench_image import Images
from bench_run import keep
from bench_run import measure
from bench_run import running
from bench_run import say
from bench_run import start_phase
from bench_service import BIN
from bench_service import free_port
from bench_service import Stack
from bench_table import Figure

CONFIGURATION = """\
[DEFAULT]
enabled_backends = fast
state_path = {root}/state
log_level = WARNING
image_allowed_directories = {images}
image_allowed_networks = 127.0.0.0/8
{concurrency}
[api]
port = {port}
[fast]
driver = qcow
directories = {root}/pool
oversubscription = 100000
"""


def figures(options: argparse.Namespace, root: str) -> Iterator[Figure]:
    """Measure it, and what it stands on."""
    for name in 'state', 'pool', 'images':
        os.makedirs(os.path.join(root, name))
    images = os.path.join(root, 'images')
    say('the floor')
    floor = bench_floor.measure(images)
    raw, qcow2 = bench_floor.sources(images)
    port = free_port()
    stack = Stack(root)
    stack.configure({'service': CONFIGURATION.format(
        root=root, images=images, port=port,
        concurrency=f'concurrency = {options.concurrency}',
    )}, port)
    with running(stack):
        say('the embedded default')
        runs = measure(options, stack, 'latency', 'load', 'attach')
        start_phase(options, stack)
        say('images and clones')
        images_ms = Images(stack.url, raw, qcow2).measure()
    keep(options, runs, 'embedded')
    yield from _floor_figures(floor)
    yield from _service_figures(runs)
    yield from _image_figures(images_ms)
    yield Figure(
        '``volume --help``', bench_floor.median(lambda: subprocess.run(
            [os.path.join(BIN, 'volume'), '--help'], check=True,
            stdout=subprocess.DEVNULL,
        )), 'ms', '< 500',
    )


def _floor_figures(floor: dict[str, float]) -> Iterator[Figure]:
    for name, key in (
        ('Floor: a durable commit of SQLite', 'commit'),
        ('Floor: ``qemu-img create``', 'qemu_img_create'),
        ('Floor: ``qemu-img convert``, raw, 512 MiB', 'convert_raw'),
        ('Floor: ``qemu-img convert``, qcow2, 512 MiB', 'convert_qcow2'),
        ('Floor: a reflink of the file', 'reflink'),
    ):
        if key in floor:
            yield Figure(name, floor[key], 'ms')


def _service_figures(runs: Runs) -> Iterator[Figure]:
    yield Figure(
        'Create to available, p50',
        runs.figure('latency-create', 'to_available_ms', 'p50'), 'ms', '< 30',
        f'accepted after {_of(runs, "latency-create", "accept_ms", "p50")} ms',
    )
    yield Figure(
        'GET a volume, p50', runs.figure('latency-get', 'get_ms', 'p50'),
        'ms', '< 3',
    )
    yield Figure(
        'Snapshot to available, p50',
        runs.figure('latency-snapshot', 'create_ms', 'p50'), 'ms', '< 100',
    )
    for clients, goal in (1, ''), (8, '>= 60'), (32, ''):
        yield Figure(
            f'Creates, end to end, {clients} clients',
            runs.figure('load-create', 'e2e_per_s', clients=clients), 'per s',
            goal,
        )
    yield Figure(
        'Deletes, end to end, 8 clients',
        runs.figure('load-delete', 'e2e_per_s', clients=8), 'per s',
    )
    yield Figure(
        'Attach cycles (create, complete, delete), 8 clients',
        runs.figure('attach', 'cycles_per_s', clients=8), 'per s',
    )
    yield Figure(
        'Start to the first new volume',
        runs.figure('startup', 'exec_to_first_volume_s'), 's', '< 1.5',
    )
    yield Figure(
        'Resident after load', runs.resident_mib('service'), 'MiB', '< 150',
        'the storage daemon apart',
    )


def _image_figures(found: dict[str, float]) -> Iterator[Figure]:
    """Compare with what QEMU needs for as much: durable, like ours."""
    for name, key, base, goal in (
        ('raw, from a file', 'file_raw', 'convert, sync', '>= 0.8'),
        ('raw, by http', 'http_raw', 'curl, convert, sync', '>= 0.8'),
        ('qcow2, from a file', 'file_qcow2', 'convert, sync', '>= 0.8'),
        ('qcow2, by http', 'http_qcow2', 'curl, convert, sync', ''),
    ):
        ours_ms, base_ms = found[f'image_{key}'], found[f'base_{key}']
        yield Figure(
            f'Image to volume, {name}', base_ms / ours_ms, '×', goal,
            f'{ours_ms:,.0f} ms; {base}: {base_ms:,.0f} ms',
        )
    for gib in 1, 1024:
        for what in 'clone', 'snapshot':
            yield Figure(
                f'{what.capitalize()}, {gib} GiB holding 512 MiB',
                found[f'{what}_{gib}_gib'], 'ms', '< 100',
            )


def _of(runs: Runs, phase: str, *keys: str) -> str:
    value = runs.figure(phase, *keys)
    return f'{value:.1f}' if value is not None else '?'
