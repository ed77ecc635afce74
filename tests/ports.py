# SPDX-License-Identifier: Apache-2.0
"""Ports for servers that end and come again, as tests have them.

A port that the kernel chooses may be another's as soon as its server is
down. So these are none of those that it chooses from, and each process has
some that no other process of tests gives away.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
from collections.abc import Iterator

FIRST, COUNT = 20000, 100
USUAL_LOW = 32768  # the lowest that Linux chooses by itself
CHOSEN = '/proc/sys/net/ipv4/ip_local_port_range'

_marks: list[socket.socket] = []  # names that end with the process


def free(address: str = '127.0.0.1') -> int:
    """Return a port where nobody listens, and another one the next time."""
    for port in itertools.islice(_own(), COUNT):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise AssertionError(f'{address} has no free port among {COUNT}')


@functools.cache
def _own() -> Iterator[int]:
    """Return the ports of this process, again and again."""
    with open(CHOSEN) as f:
        low = int(f.read().split()[0])
    # Where a machine gives nearly all away by itself, chance is left.
    if low < FIRST + COUNT * (os.cpu_count() or 1):
        low = USUAL_LOW
    blocks = range(FIRST, low - COUNT + 1, COUNT)
    for number in range(len(blocks)):
        first = blocks[(os.getpid() + number) % len(blocks)]
        # Of no file system: nothing is left behind.
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f'\0volume-test-ports-{first}')
        except OSError:
            mark.close()
            continue
        _marks.append(mark)
        return itertools.cycle(range(first, first + COUNT))
    raise AssertionError('other processes have all ports')
