# SPDX-License-Identifier: Apache-2.0
"""Volumes over iSCSI: a restart with many exports, the data path, copies.

The daemon is a ``tgtd`` of the service's own; beside it another one runs that
was set up by hand, with files of the same size on the same disk, and the two
are measured in turn.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import shutil
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import bench_floor
from bench_run import running
from bench_run import say
from bench_service import free_port
from bench_service import Stack
from bench_table import Figure
from demo_screen import Failed

from volume import errors
from volume.cli.client import Client
from volume.exports.tgt_daemon import Daemon
from volume.exports.tgt_wire import Tgtd
from volume.node import Node

COUNT = 1000
THREADS = 8
MIB, GIB = 1 << 20, 1 << 30
TIMES = 5
REQUESTS = 60_000  # so many that the login, and CHAP in it, do not count
LIMIT_S = 300.0
INITIATOR = 'iqn.2008-11.org.linux-kvm'  # as qemu-img calls itself
BY_HAND = 'iqn.2024-01.example:by-hand'
CONFIGURATION = """\
[DEFAULT]
enabled_backends = san
state_path = {root}/state
log_level = WARNING
stats_interval_s = 2
image_allowed_directories = {root}/images
concurrency = {concurrency}
[api]
port = {port}
[san]
driver = file
directories = {root}/pool
capacity_gib = 100000
oversubscription = 100
exporter = tgt
iscsi_portals = 127.0.0.1:{portal}
"""


def figures(options: argparse.Namespace, root: str) -> Iterator[Figure]:
    """Measure it."""
    for program in 'tgtd', 'qemu-img':
        if shutil.which(program) is None:
            say(f'{program} is not installed: no iSCSI is measured')
            return
    for name in 'state', 'pool', 'images', 'hand':
        os.makedirs(os.path.join(root, name))
    port, portal = free_port(), free_port()
    stack = Stack(root)
    stack.configure({'service': CONFIGURATION.format(
        root=root, port=port, portal=portal,
        concurrency=options.concurrency,
    )}, port)
    node = Node(os.path.join(root, 'state'))
    bench = Bench(stack, node, root)
    try:
        with running(stack):
            say('the data path over iSCSI')
            yield from bench.data_path()
            say('copies between files')
            yield bench.copies()
            say(f'{COUNT} volumes are attached')
            bench.attach_many()
            yield from bench.restarts()
    finally:
        Daemon(node, '', 1).stop()


@dataclasses.dataclass
class Side:
    """A target, and how one enters."""

    portal: str
    name: str
    username: str = ''
    password: str = ''

    def bench(self, *flags: str) -> None:
        """Have ``qemu-img`` read or write; passwords are no arguments."""
        proof = {
            'LIBISCSI_CHAP_USERNAME': self.username,
            'LIBISCSI_CHAP_PASSWORD': self.password,
        }
        _run(
            'qemu-img', 'bench', '-q', '-t', 'none', '-f', 'raw', *flags,
            f'iscsi://{self.portal}/{self.name}/1',
            **(proof if self.username else {}),
        )


class Bench:
    """One service with tgt, and what is done to it."""

    def __init__(self, stack: Stack, node: Node, root: str) -> None:
        self._stack = stack
        self._node = node
        self._root = root
        self._tgtd = Tgtd(node, f'{node.state_dir}/tgtd/socket.0')

    # The data path.

    def data_path(self) -> Iterator[Figure]:
        """Compare reads and writes with the daemon set up by hand."""
        volume = self._create(size=1)
        info = self._attach(volume)
        ours = Side(
            info['target_portal'], info['target_iqn'],
            info['auth_username'], info['auth_password'],
        )
        with self._by_hand() as theirs:
            for side in ours, theirs:
                _fill(side)
            for name, flags in (
                ('4 KiB reads', ()), ('4 KiB writes', ('-w',)),
                ('64 KiB reads', ('-s', '65536')),
            ):
                mine, hand = [], []
                for _ in range(TIMES):
                    hand.append(_bench(theirs, *flags))
                    mine.append(_bench(ours, *flags))
                ratio = statistics.median(hand) / statistics.median(mine)
                yield Figure(
                    f'iSCSI (tgt), {name}, to the daemon by hand', ratio, '',
                    '>= 0.95',
                    f'{REQUESTS / statistics.median(mine):.0f} a second',
                )

    @contextlib.contextmanager
    def _by_hand(self) -> Iterator[Side]:
        """Have another tgtd up, as an operator would start it."""
        directory = os.path.join(self._root, 'hand')
        path = os.path.join(directory, 'volume.raw')
        with open(path, 'wb') as f:
            f.truncate(GIB)
        portal = f'127.0.0.1:{free_port()}'
        process = self._node.start([
            'env', f'TGT_IPC_SOCKET={directory}/socket', 'tgtd', '-f', '-t',
            '1', '--iscsi', f'portal={portal}',
        ], os.path.join(directory, 'log'))
        try:
            tgtd = Tgtd(self._node, f'{directory}/socket.0')
            _until(lambda: _answers(tgtd))
            tgtd.new_target(1, BY_HAND)
            tgtd.new_lun(1, path)
            tgtd.bind_initiator(1, INITIATOR)
            yield Side(portal, BY_HAND)
        finally:
            self._node.end(process, timeout_s=0.0)

    # Copies.

    def copies(self) -> Figure:
        """Compare a clone by copy with ``qemu-img`` between two files."""
        raw, _ = bench_floor.sources(os.path.join(self._root, 'images'))
        source = self._create(size=1)
        path = os.path.join(self._root, 'pool', f'{source}.raw')
        shutil.copyfile(raw, path)
        with open(path, 'r+b') as f:
            os.fsync(f.fileno())
        made = os.path.join(self._root, 'pool', 'made.raw.new')
        ours, tool = [], []
        for _ in range(TIMES):
            tool.append(bench_floor.median(
                functools.partial(_convert, path, made), times=1
            ))
            os.unlink(made)
            began = time.perf_counter()
            copy = self._create(size=1, source_volid=source)
            ours.append((time.perf_counter() - began) * 1000)
            self._client.delete(f'/volumes/{copy}')
            _until(lambda gone=copy: self._is_gone(gone))
        mine, theirs = statistics.median(ours), statistics.median(tool)
        return Figure(
            'clone by copy, to qemu-img between files', theirs / mine, '',
            '>= 0.9', f'{mine:.0f} ms, and {theirs:.0f} ms',
        )

    # Many exports.

    def attach_many(self) -> None:
        """Have many volumes attached."""
        def one(_: int) -> None:
            self._attach(self._create(size=1))

        with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(one, range(COUNT)))

    def restarts(self) -> Iterator[Figure]:
        """Restart the service, and then the daemon as well."""
        wanted = self._exports()
        took_s = []
        for _ in range(TIMES):
            self._stack.stop()
            took_s.append(self._start())
            if self._exports() != wanted:
                raise Failed('the daemon has lost exports')
        yield Figure(
            f'restart with {wanted} exports (tgt)',
            statistics.median(took_s), 's', '< 3', 'until REST answers',
        )
        self._stack.stop()
        Daemon(self._node, '', 1).stop()
        began = time.perf_counter()
        ready_s = self._start()
        _until(lambda: self._exports() == wanted)
        yield Figure(
            'the same, the daemon having died', ready_s, 's', '< 3',
            f'all exported after {time.perf_counter() - began:.1f} s',
        )

    def _start(self) -> float:
        began = time.perf_counter()
        self._stack.start()
        self._client.get('/volumes?limit=1')
        return time.perf_counter() - began

    def _exports(self) -> int:
        try:
            return self._tgtd.listing().count(f'        {INITIATOR}\n')
        except errors.Unavailable:
            return 0

    # Requests.

    @property
    def _client(self) -> Client:
        return Client(self._stack.url)

    def _create(self, **wish: object) -> str:
        client = self._client
        made = str(client.post('/volumes', {'volume': wish})['volume']['id'])

        def is_done() -> bool:
            volume = client.get(f'/volumes/{made}')['volume']
            if str(volume['status']).startswith('error'):
                raise Failed(f'volume {made} is {volume["status"]}')
            return bool(volume['status'] == 'available')

        _until(is_done)
        return made

    def _attach(self, volume_id: str) -> dict[str, Any]:
        client = self._client
        made = client.post('/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': str(uuid.uuid4()),
            'connector': {'host': 'bench', 'initiator': INITIATOR},
        }})['attachment']
        client.post(
            f'/attachments/{made["id"]}/action', {'os-complete': None}
        )
        info: dict[str, Any] = made['connection_info']
        return info

    def _is_gone(self, volume_id: str) -> bool:
        try:
            self._client.get(f'/volumes/{volume_id}')
        except errors.NotFound:
            return True
        return False


def _fill(side: Side) -> None:
    """Store something everywhere: what was never written costs less."""
    side.bench('-w', '-s', str(MIB), '-c', '1024', '-d', '4')


def _bench(side: Side, *flags: str) -> float:
    """Return how long so many requests take, in seconds."""
    began = time.perf_counter()
    side.bench('-c', str(REQUESTS), '-d', '16', *flags)
    return time.perf_counter() - began


def _convert(source: str, made: str) -> None:
    """Copy as well as the tool can, and durably, as a service must."""
    with open(made, 'wb') as f:
        f.truncate(GIB)
    # It may pass over zeros as well: what it writes to is new.
    _run('qemu-img', 'convert', '-n', '--target-is-zero', '-m', '16', '-W',
         '-f', 'raw', '-O', 'raw', source, made)
    _run('sync', made)


def _answers(tgtd: Tgtd) -> bool:
    try:
        return bool(tgtd.portals())
    except errors.Unavailable:
        return False


def _until(is_right: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_right():
        if time.monotonic() > deadline:
            raise Failed(f'it did not come to that in {LIMIT_S:g} s')
        time.sleep(0.005)


def _run(*argv: str, **environment: str) -> None:
    done = subprocess.run(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise Failed(f'{argv[0]} {argv[1]}: {done.stderr.strip()[-300:]}')
