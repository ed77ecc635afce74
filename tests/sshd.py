# SPDX-License-Identifier: Apache-2.0
"""A node over SSH on loopback: a private sshd, its keys and its agent."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable

from tests import ports
from volume.remote import ssh
from volume.remote.node import SshNode

SSHD = '/usr/sbin/sshd'
START_S = 20.0

Tests = unittest.TestCase | type[unittest.TestCase]


@dataclasses.dataclass(frozen=True, slots=True)
class DirectTarget(ssh.Target):
    """An agent without ssh: a child on two ends of a socket."""

    def argv(self) -> list[str]:
        return [sys.executable, '-m', 'volume.remote.agent',
                *self.command.split()[1:]]


def direct_target(state_path: str) -> DirectTarget:
    """Return a target whose agent has this directory."""
    return DirectTarget(
        'root', 'direct', 22, os.devnull, os.devnull,
        f'volume-node-agent --state-path {state_path}',
    )


def direct_node(test: Tests) -> SshNode:
    """Return a node by an agent that is a child of the test."""
    root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
    clean = cleaner(test)
    clean(shutil.rmtree, root, ignore_errors=True)
    node = SshNode(direct_target(root))
    clean(node.close)
    return node


def cleaner(test: Tests) -> Callable[..., object]:
    """Return what notes a deed for the end of a test, or of all of them."""
    if isinstance(test, type):
        return test.addClassCleanup
    return test.addCleanup


class Sshd:
    """A server for one user with one key, which starts the agent."""

    def __init__(self, test: Tests) -> None:
        for program in SSHD, 'ssh', 'ssh-keygen':
            if shutil.which(program) is None:
                raise unittest.SkipTest(f'no {os.path.basename(program)}')
        self.root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        clean = cleaner(test)
        clean(shutil.rmtree, self.root, ignore_errors=True)
        self.state_path = self.path('node')
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        for name in 'host', 'key', 'other':
            self._make_key(name)
        self.set_command(self.agent_command())
        self.port = ports.free()
        self.know_host('host')
        self._start(clean)

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def agent_command(self) -> str:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return (
            f'PYTHONPATH={root} {sys.executable} -m volume.remote.agent '
            f'--state-path {self.state_path}'
        )

    def set_command(self, command: str) -> None:
        """Bind the key to a command, as the manual says."""
        with open(self.path('key.pub')) as f:
            public = f.read()
        with open(self.path('authorized_keys'), 'w') as f:
            f.write(f'restrict,command="{command}" {public}')
        os.chmod(self.path('authorized_keys'), 0o600)

    def know_host(self, key: str) -> None:
        """Have the client know the server by this key."""
        with open(self.path(f'{key}.pub')) as f:
            kind, public = f.read().split()[:2]
        with open(self.path('known_hosts'), 'w') as f:
            f.write(f'[127.0.0.1]:{self.port} {kind} {public}\n')

    def target(self, key: str = 'key') -> ssh.Target:
        return ssh.parse(
            f'ssh://{self.user}@127.0.0.1:{self.port}', self.path(key),
            self.path('known_hosts'), 'volume-node-agent',
        )

    def node(self, test: unittest.TestCase) -> SshNode:
        """Return a node of its own connection; it is closed at the end."""
        node = SshNode(self.target())
        test.addCleanup(node.close)
        return node

    def said(self) -> str:
        """Return what the server has logged."""
        with open(self.path('log'), errors='replace') as f:
            return f.read()

    def sessions(self) -> list[int]:
        """Return the processes of the server's connections."""
        path = f'/proc/{self._server.pid}/task/{self._server.pid}/children'
        with open(path) as f:
            return [int(pid) for pid in f.read().split()]

    def cut(self) -> None:
        """End all connections, as a network that is gone."""
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _make_key(self, name: str) -> None:
        subprocess.run(
            ['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', name,
             '-f', self.path(name)],
            check=True, capture_output=True, timeout=60,
        )

    def _start(self, clean: Callable[..., object]) -> None:
        with open(self.path('config'), 'w') as f:
            f.write(
                'ListenAddress 127.0.0.1\n'
                f'Port {self.port}\n'
                f'HostKey {self.path("host")}\n'
                f'AuthorizedKeysFile {self.path("authorized_keys")}\n'
                f'PidFile {self.path("pid")}\n'
                'UsePAM no\nStrictModes no\nPasswordAuthentication no\n'
                'KbdInteractiveAuthentication no\nLogLevel VERBOSE\n'
                'MaxStartups 100\n'
            )
        if os.geteuid() == 0:
            os.makedirs('/run/sshd', 0o755, exist_ok=True)
        self._server = subprocess.Popen(
            [SSHD, '-D', '-f', self.path('config'), '-E', self.path('log')],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        clean(self._stop)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(
                ('127.0.0.1', self.port), 1
            ):
                return
            if self._server.poll() is not None or (
                time.monotonic() > deadline
            ):
                raise unittest.SkipTest(f'no sshd: {self.said()[-300:]}')
            time.sleep(0.05)

    def _stop(self) -> None:
        self.cut()
        self._server.terminate()
        self._server.wait(10)
