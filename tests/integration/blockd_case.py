# SPDX-License-Identifier: Apache-2.0
"""What the tests of the block daemon stand on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import unittest
from collections.abc import Callable
from typing import Any, TypeVar

from volume import errors
from volume.blockd import Blockd
from volume.nbd import NbdClient
from volume.node import Node

T = TypeVar('T')

MIB = 1 << 20
SIZE = 8 * MIB
COMMAND_S = 30
PROGRAMS = ('qemu-storage-daemon', 'qemu-img', 'nbdcopy', 'nbdinfo')
MISSING = [name for name in PROGRAMS if not shutil.which(name)]


def run(*argv: str) -> str:
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=COMMAND_S
    ).stdout


class FailingNode(Node):
    """Loses the reply to one kind of call, or refuses it, once."""

    def __init__(self, state_dir: str) -> None:
        super().__init__(state_dir)
        self.what = ''
        self.before = False
        self.seen: list[str] = []

    def act(self, what: str, effect: Callable[[], T]) -> T:
        self.seen.append(what)
        if what != self.what:
            return effect()
        self.what = ''
        if self.before:
            raise errors.Unavailable('refused by the test')
        effect()
        raise errors.Unknown('lost by the test')


@unittest.skipIf(MISSING, f'not installed: {", ".join(MISSING)}')
class BlockdCase(unittest.TestCase):
    """A daemon and images of its own for each test."""

    def setUp(self) -> None:
        self.root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        self.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        self.node = FailingNode(self.root)
        self.directory = os.path.join(self.root, 'blockd')
        self.addCleanup(Blockd(Node(self.root), self.directory).stop)
        self.blockd = Blockd(self.node, self.directory)
        self.node.blockd = self.blockd

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def qcow2(self, name: str, below: str | None = None) -> str:
        path = self.path(name)
        backing = ['-b', self.path(below), '-F', 'qcow2'] if below else []
        size = [] if below else [str(SIZE)]
        run('qemu-img', 'create', '-q', '-f', 'qcow2', *backing, path, *size)
        return path

    def raw(self, name: str, data: bytes = b'') -> str:
        with open(self.path(name), 'wb') as f:
            f.write(data)
            f.truncate(SIZE)
        return self.path(name)

    def chain(self, *names: str) -> dict[str, Any]:
        """Return the block node of a chain, the top first."""
        node: dict[str, Any] | None = None
        for name in reversed(names):
            node = {
                'driver': 'qcow2', 'backing': node,
                'file': {'driver': 'file', 'filename': self.path(name)},
            }
        assert node
        return node

    def plain(self, name: str) -> dict[str, Any]:
        return {
            'driver': 'raw',
            'file': {'driver': 'file', 'filename': self.path(name)},
        }

    def client(self, uri: str) -> NbdClient:
        client = NbdClient(uri)
        self.addCleanup(client.close)
        return client

    def write(self, uri: str, data: bytes, offset: int = 0) -> None:
        with contextlib.closing(NbdClient(uri)) as client:
            client.pwrite(data, offset)
            client.flush()

    def read(
        self, uri: str, length: int = 4096, offset: int = 0
    ) -> bytes:
        buffer = bytearray(length)
        with contextlib.closing(NbdClient(uri)) as client:
            client.pread_into(buffer, offset)
        return bytes(buffer)

    def copied(self, uri: str) -> bytes:
        """Return all bytes as libnbd reads them: not by our client."""
        target = self.path('copied')
        run('nbdcopy', uri, target)
        with open(target, 'rb') as f:
            return f.read()

    def pid(self) -> int:
        with open(os.path.join(self.directory, 'daemon.json')) as f:
            return int(json.load(f)['pid'])

    def kill(self) -> None:
        """End the daemon as a power cut would, and wait until it is."""
        fd = os.pidfd_open(self.pid())
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            self.blockd.stop()  # reaps; there is nothing left to end
        finally:
            os.close(fd)


