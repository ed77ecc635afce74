# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, without a service in between.

A figure of the service means little alone: these are what it stands on. Each
is the median of several runs, in milliseconds.
"""

from __future__ import annotations

import functools
import os
import shutil
import sqlite3
import statistics
import subprocess
import time
from collections.abc import Callable

MIB = 1 << 20
COMMITS = 200
TIMES = 7
DATA_MIB = 512


def measure(directory: str) -> dict[str, float]:
    """Return the floor by name; leaves ``source.raw`` and ``source.qcow2``."""
    floor = {'commit': _commit(os.path.join(directory, 'floor.sqlite'))}
    made = os.path.join(directory, 'floor.qcow2')
    floor['qemu_img_create'] = median(lambda: _run(
        'qemu-img', 'create', '-q', '-f', 'qcow2', made, '1G'
    ), lambda: gone(made))
    raw, qcow2 = sources(directory)

    def clear() -> None:
        gone(made)

    for name, source, form in (
        ('convert_raw', raw, 'raw'), ('convert_qcow2', qcow2, 'qcow2'),
    ):
        floor[name] = median(
            functools.partial(convert, source, form, made), clear
        )
    try:
        floor['reflink'] = median(
            lambda: _run('cp', '--reflink=always', raw, made),
            clear,
        )
    except subprocess.CalledProcessError:
        pass  # this file system has none
    gone(made)
    return floor


def sources(directory: str) -> tuple[str, str]:
    """Return a raw and a qcow2 image of 1 GiB with 512 MiB of noise."""
    raw, qcow2 = (
        os.path.join(directory, f'source.{form}') for form in ('raw', 'qcow2')
    )
    if not os.path.exists(qcow2):
        with open(raw, 'wb') as f:
            for _ in range(DATA_MIB):
                f.write(os.urandom(MIB))
            f.truncate(1 << 30)
            os.fsync(f.fileno())
        _run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, qcow2)
        _run('sync', qcow2)
    return raw, qcow2


def convert(source: str, form: str, made: str) -> None:
    """Have ``qemu-img`` make a qcow2 image; in the page cache alone."""
    _run('qemu-img', 'convert', '-f', form, '-O', 'qcow2', source, made)


def convert_durably(source: str, form: str, made: str) -> None:
    """Convert, and wait until it is on the disk, as a service must."""
    convert(source, form, made)
    _run('sync', made)


def download(url: str, path: str) -> bool:
    """Fetch by http into a file; say if there is a tool for it here."""
    if shutil.which('curl') is None:
        return False
    _run('curl', '-sS', '-o', path, url)
    return True


def median(
    deed: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    times: int = TIMES,
) -> float:
    """Return the median time of a deed, in milliseconds."""
    took_ms = []
    for _ in range(times):
        before()
        began = time.perf_counter()
        deed()
        took_ms.append((time.perf_counter() - began) * 1000)
    return statistics.median(took_ms)


def _commit(path: str) -> float:
    """Return the time of the smallest durable transaction."""
    with sqlite3.connect(path, isolation_level=None) as database:
        database.execute('PRAGMA journal_mode=WAL')
        database.execute('PRAGMA synchronous=FULL')
        database.execute('CREATE TABLE IF NOT EXISTS t (x INTEGER)')
        took = median(
            lambda: database.execute('INSERT INTO t VALUES (1)'),
            times=COMMITS,
        )
    database.close()
    return took


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)


def gone(path: str) -> None:
    """Remove a file, if it is there."""
    if os.path.exists(path):
        os.unlink(path)
