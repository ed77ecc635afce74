# SPDX-License-Identifier: Apache-2.0
"""API and manager as two processes, on RabbitMQ and MariaDB.

The driver stores nothing, so that this is the control plane alone. The
servers are the private ones of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from bench_drive import Runs
from bench_run import keep
from bench_run import measure
from bench_run import running
from bench_run import say
from bench_run import TOP
from bench_service import free_port
from bench_service import Stack
from bench_table import Figure

CONFIGURATION = """\
[DEFAULT]
host = {name}
roles = {name}
state_path = {root}/state-{name}
log_level = WARNING
enabled_backends = {backends}
database = {database}
transport_url = {transport}
{concurrency}
[api]
port = {port}
[nothing]
driver = noop
"""



def figures(options: argparse.Namespace, root: str) -> Iterator[Figure]:
    """Measure it, beside the peer if its results are given."""
    say('RabbitMQ and MariaDB')
    sys.path.insert(0, str(TOP))
    from tests import mariadb
    from tests import rabbit

    os.makedirs(root)
    port = free_port()
    with contextlib.ExitStack() as ends:
        database, broker = mariadb.Mariadb(), rabbit.Rabbit()
        # As durable as it is by itself, and as large as the peer's.
        database.settings = '--innodb-buffer-pool-size=512M',
        for server in database, broker:
            ends.callback(server.remove)
            server.start()
        url = database.create()
        stack = Stack(root)
        stack.configure({
            name: CONFIGURATION.format(
                name=name, root=root, port=port, transport=broker.url,
                database=url,
                backends='nothing' if name == 'manager' else '',
                concurrency=f'concurrency = {options.concurrency}',
            )
            for name in ('manager', 'api')
        }, port)
        ends.enter_context(running(stack))
        runs = measure(options, stack, 'latency', 'load')
    keep(options, runs, 'stack')
    peer = Runs(options.peer)
    for clients in 1, 8, 32:
        ours, theirs = (
            each.figure('load-create', 'e2e_per_s', clients=clients)
            for each in (runs, peer)
        )
        yield Figure(
            f'RabbitMQ, MariaDB, no I/O: creates, {clients} clients', ours,
            'per s', f'>= {3 * theirs:.0f}' if theirs else '',
            f'Cinder: {theirs:.0f} per s' if theirs else '',
        )
    yield Figure(
        'RabbitMQ, MariaDB, no I/O: create to available, p50',
        runs.figure('latency-create', 'to_available_ms', 'p50'), 'ms', '',
        _beside(peer, 'latency-create', 'to_available_ms', 'p50'),
    )
    yield Figure(
        'RabbitMQ, MariaDB, no I/O: GET, p50',
        runs.figure('latency-get', 'get_ms', 'p50'), 'ms', '',
        _beside(peer, 'latency-get', 'get_ms', 'p50'),
    )


def _beside(peer: Runs, phase: str, *keys: str) -> str:
    value = peer.figure(phase, *keys)
    return f'Cinder: {value:.1f} ms' if value is not None else ''
