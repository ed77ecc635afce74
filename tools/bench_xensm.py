# SPDX-License-Identifier: Apache-2.0
"""The driver ``xensm``, over the simulator: bytes in and out, and creates.

The simulator is a process of its own; both speak plain HTTP on loopback. So
this is what our own code costs, and says nothing about a real server.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import os
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench_floor import gone
from bench_run import running
from bench_run import say
from bench_service import free_port
from bench_service import Stack
from bench_table import Figure
from demo_family import Family
from demo_screen import Failed
from demo_xen import EXPORT
from demo_xen import FILER
from demo_xen import IQN
from demo_xen import LVM_LUN
from demo_xen import STORAGE
from demo_xen import TARGET
from demo_xen import VOLUMES
from demo_xen import XenPool
from service_process import Json

from volume import ids
from volume import model
from volume.cli.client import Client
from volume.drivers.xensm.driver import XenSmDriver
from volume.flows import fill
from volume.testing import fixtures
from volume.transfer.file import FileSource
from volume.xenapi import options as settings_of
from volume.xenapi.link import Link

MIB = model.MIB
DISK_BYTES = 2048 * MIB
RUN_BYTES, EVERY_BYTES = 4 * MIB, 16 * MIB
COUNT = 1000
CLIENTS = 8
LIMIT_S = 120.0
STOP_S = 30.0
PERIODIC = ('SR.', 'PBD.', 'SM.', 'host.', 'pool.')

SRS: dict[str, Json] = {
    'nfs': {'server': FILER, 'serverpath': EXPORT},
    'lvmoiscsi': {'target': TARGET, 'targetIQN': IQN, 'SCSIid': LVM_LUN},
}
CONFIGURATION = """\
[DEFAULT]
enabled_backends = xen
state_path = {root}/state
log_level = WARNING
concurrency = {concurrency}
[api]
port = {port}
[xen]
driver = xensm
addresses = {addresses}
password = {password}
sr_name = batch
sr_type = nfs
device_config =
    server={server}
    serverpath={path}
create = true
oversubscription = 100000
"""


def figures(options: argparse.Namespace, root: str) -> Iterator[Figure]:
    """Measure it."""
    os.makedirs(root)
    with _Processes() as processes:
        pool = XenPool(processes, root, 'pool')
        pool.start(*STORAGE)
        say('images in and out of SRs')
        images = _Images(pool, root)
        for kind, config in SRS.items():
            yield from images.measure(kind, config, options.repeat)
        say(f'{COUNT} creates in a batch')
        yield from _batch(options, pool, os.path.join(root, 'service'))
        pool.link.close()


class _Processes(Family):
    """Starts processes and ends them; takes in nobody else's orphans."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *argv: str, **streams: Any) -> subprocess.Popen[bytes]:
        self._started.append(super().start(*argv, **streams))
        return self._started[-1]

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self._started:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# Bytes.


class _CountingLink(Link):
    """A link that knows how many bytes of disks it has sent."""

    sent_bytes = 0

    def open_http(
        self, url: str, timeout_s: float | None = None
    ) -> http.client.HTTPConnection:
        connection = super().open_http(url, timeout_s)
        connection.sock = _Counted(self, connection.sock)
        return connection


class _Counted:
    def __init__(self, link: _CountingLink, sock: Any) -> None:
        self._link = link
        self._sock = sock

    def sendall(self, data: Any) -> None:
        self._link.sent_bytes += len(data)
        self._sock.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _Driver(XenSmDriver):
    """The driver over such a link."""

    def _open(self) -> tuple[settings_of.Settings, Link]:
        if self._opened is None:
            found = settings_of.read(self.conf)
            self._opened = found, _CountingLink(found, self.node)
        return self._opened

    @property
    def link(self) -> _CountingLink:
        return self._open()[1]


@dataclasses.dataclass
class _Times:
    """What the rounds took, in milliseconds, each thing by its name."""

    spare: str
    took_ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    began = 0.0

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time something."""
        _touch_memory(self.spare)
        self.began = time.perf_counter()
        yield
        self.part(name)

    def part(self, name: str) -> None:
        """Note how long it took until now."""
        self.took_ms.setdefault(name, []).append(
            (time.perf_counter() - self.began) * 1000)

    def median(self, name: str) -> float:
        return statistics.median(self.took_ms[name])


class _Images:
    """An image of which a quarter is data, into volumes and out again."""

    def __init__(self, pool: XenPool, root: str) -> None:
        self._pool = pool
        self._root = root
        self._path, self._digest = _image(os.path.join(root, 'image.raw'))
        self._source = FileSource(fixtures.settings(
            FileSource, image_allowed_directories=[root],
            image_upload_directories=[root],
        ), pool.node)

    def measure(
        self, kind: str, config: Json, rounds: int
    ) -> Iterator[Figure]:
        """Measure one SR; each round ends with nothing left behind."""
        driver = _Driver(fixtures.settings(
            XenSmDriver, addresses=self._pool.urls,
            password=self._pool.password, sr_name=kind, sr_type=kind,
            create=True, device_config='\n'.join(
                f'{key}={value}' for key, value in config.items()),
        ), self._pool.node)
        driver.check()
        times = _Times(self._file('spare'))
        for _ in range(rounds):
            self._round(driver, kind, times)
        sent = driver.link.sent_bytes / rounds / DISK_BYTES
        driver.link.close()
        yield Figure(
            f'XenAPI, {kind}: image of 2 GiB, a quarter data: sent',
            sent * 100, '%', '< 30',
        )
        convert_ms = times.median('convert')
        durable_ms = times.median('durable')
        for name, what, goal in (
            ('import', 'import', '>= 0.7'),
            ('vhd', 'export as VHD', '>= 0.7'),
            # All of the disk is hashed, not a quarter of it.
            ('raw', 'export as raw', ''),
        ):
            ours_ms = times.median(name)
            yield Figure(
                f'XenAPI, {kind}: {what}', durable_ms / ours_ms, '×', goal,
                f'{ours_ms:,.0f} ms, durable; convert to VHD, sync: '
                f'{durable_ms:,.0f} ms; convert alone, not durable: '
                f'{convert_ms:,.0f} ms',
            )

    def _round(
        self, driver: _Driver, kind: str, times: _Times
    ) -> None:
        """Let QEMU do it, then us: a disk is not always as quick."""
        made, volume = self._file('made'), model.Volume(
            ids.new(), kind, DISK_BYTES)
        with times.of('durable'):
            _run('qemu-img', 'convert', '-f', 'raw', '-O', 'vpc', '-o',
                 'force_size=on,subformat=dynamic', self._path, made)
            times.part('convert')
            _run('sync', made)
        gone(made)
        driver.create(volume)
        with times.of('import'):
            fill.fill_from_image(
                driver, volume, self._source, f'file://{self._path}',
                declared_format='raw', spool_directory=self._file('spool'),
                token='t', node=self._pool.node, fresh=True,
            )
        with times.of('vhd'):
            self._upload(driver, volume, 'vhd')
        if len(times.took_ms['vhd']) == 1:
            _run('qemu-img', 'compare', '-q', '-f', 'vpc', '-F', 'raw',
                 made, self._path)
        gone(made)
        with times.of('raw'):
            found = self._upload(driver, volume, 'raw')
        gone(made)
        if found != self._digest:
            raise Failed(f'{kind}: the volume is not what its image is')
        driver.delete(volume)

    def _upload(
        self, driver: _Driver, volume: model.Volume, format: str
    ) -> str:
        """Make ``made``; return its digest."""
        return fill.upload(
            driver, volume, self._source, f'file://{self._file("made")}',
            format=format, spool_directory=self._file('spool'), token='t',
            node=self._pool.node,
        )['sha256']

    def _file(self, name: str) -> str:
        return os.path.join(self._root, name)


def _image(path: str) -> tuple[str, str]:
    """Make the image; return its path and digest."""
    chance = random.Random(4)
    with open(path, 'w+b') as file:
        file.truncate(DISK_BYTES)
        for at in range(0, DISK_BYTES, EVERY_BYTES):
            file.seek(at)
            file.write(chance.randbytes(RUN_BYTES))
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return path, hashlib.file_digest(file, 'sha256').hexdigest()


def _touch_memory(path: str) -> None:
    """Use as much of the page cache as will be used, and free it.

    A virtual machine's memory that was not used for a while is fetched from
    its host, at ten times the price: nobody shall pay that while he is timed.
    """
    piece = os.urandom(MIB)
    with open(path, 'wb', buffering=0) as file:
        for _ in range(DISK_BYTES * 3 // 8 // MIB):
            file.write(piece)
    os.unlink(path)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)


# Creates.


def _batch(
    options: argparse.Namespace, pool: XenPool, root: str
) -> Iterator[Figure]:
    """Have a service make many volumes that are asked for at once."""
    os.makedirs(root)
    stack, port = Stack(root), free_port()
    stack.configure({'service': CONFIGURATION.format(
        root=root, port=port, concurrency=options.concurrency,
        addresses=', '.join(pool.urls), password=pool.password,
        server=FILER, path=VOLUMES,
    )}, port)
    os.chmod(os.path.join(root, 'service.conf'), 0o600)
    with running(stack):
        client = Client(stack.url)
        _until(lambda: _is_up(client), 'the backend')
        before = _calls(pool)
        began = time.perf_counter()
        _ask_for(stack.url, COUNT)
        _until(lambda: _is_settled(client), f'{COUNT} volumes')
        took_s = time.perf_counter() - began
        calls = _calls(pool)
    more = {
        name: count - before.get(name, 0) for name, count in calls.items()
        if count > before.get(name, 0)
    }
    # The state of the SR is asked for now and then, whoever creates.
    others = {name for name in more if name.startswith(PERIODIC)}
    own = sorted(more.keys() - others, key=lambda name: -more[name])
    yield Figure(
        f'XenAPI, nfs: {COUNT:,} creates in a batch', COUNT / took_s,
        'per s', '', f'{CLIENTS} clients; the simulator is a process beside',
    )
    yield Figure(
        'XenAPI, nfs: calls for a create',
        sum(more[name] for name in own) / COUNT, '', '<= 3',
        ', '.join(f'{name} {more[name]:,}' for name in own)
        + f'; and {sum(more[name] for name in others)} to look at the SR, '
        'whoever creates',
    )


def _ask_for(url: str, count: int) -> None:
    """Ask for volumes by several clients, each as soon as it may."""
    failed: list[BaseException] = []

    def ask(number: int) -> None:
        client = Client(url)
        try:
            for _ in range(number, count, CLIENTS):
                client.post('/volumes', {'volume': {'size': 1}})
        except BaseException as why:
            failed.append(why)

    threads = [
        threading.Thread(target=ask, args=(number,))
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise Failed(f'a create was refused: {failed[0]}')


def _is_up(client: Client) -> bool:
    pools = client.get('/scheduler-stats/get_pools', detail='true')['pools']
    return bool(pools)


def _is_settled(client: Client) -> bool:
    rows = client.get('/volumes', status='creating', limit=1)['volumes']
    return not rows


def _calls(pool: XenPool) -> dict[str, int]:
    """Return how often each call came, as the server has counted."""
    found: dict[str, int] = pool.control('GET', '/calls')
    return found


def _until(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not look():
        if time.monotonic() > deadline:
            raise Failed(f'waited {LIMIT_S:g} s for {what}')
        time.sleep(0.05)
