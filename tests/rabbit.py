# SPDX-License-Identifier: Apache-2.0
"""A private RabbitMQ for tests: started here, ended by pid, thrown away.

It listens on loopback alone, with its own ports, node name, EPMD and cookie,
and runs as an ordinary user; a broker that the machine has already is
neither used nor disturbed.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest

from tests import ports

START_S = 90.0
END_S = 30.0
NOBODY = 65534
SERVER = '/usr/lib/rabbitmq/bin/rabbitmq-server'


class Rabbit:
    """A broker; ``url`` is what a ``transport_url`` would say."""

    def __init__(self) -> None:
        if not os.path.exists(SERVER):
            raise unittest.SkipTest('rabbitmq-server is not installed')
        if shutil.which('epmd') is None:
            raise unittest.SkipTest('epmd is not installed')
        self.directory = tempfile.mkdtemp(prefix='vtrabbit', dir='/tmp')
        self.port, self._dist_port, self._epmd_port = (
            ports.free() for _ in range(3)
        )
        self._name = f'vt{secrets.token_hex(6)}@localhost'
        self._children: list[subprocess.Popen[bytes]] = []
        with open(os.path.join(self.directory, 'plugins'), 'w') as f:
            f.write('[].\n')
        with open(os.path.join(self.directory, 'rabbitmq.conf'), 'w') as f:
            f.write('loopback_users = none\n')
        if os.getuid() == 0:
            for name in ('', 'plugins', 'rabbitmq.conf'):
                os.chown(
                    os.path.join(self.directory, name), NOBODY, NOBODY
                )

    @property
    def url(self) -> str:
        return f'rabbit://guest:guest@127.0.0.1:{self.port}/'

    def start(self) -> None:
        """Return when the broker speaks AMQP."""
        # Erlang would start an EPMD that outlives it: this one is ours.
        self._run([
            'epmd', '-port', str(self._epmd_port), '-address', '127.0.0.1',
        ])
        self._await(self._epmd_port, lambda end: True)
        self._run([SERVER])
        self._await(self.port, greets)

    def stop(self) -> None:
        """End the broker and its EPMD; what it stored stays."""
        for child in reversed(self._children):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait(END_S)
        self._children.clear()

    def remove(self) -> None:
        """End the broker, and leave nothing behind."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run(self, argv: list[str]) -> None:
        with open(os.path.join(self.directory, 'output'), 'ab') as output:
            self._children.append(subprocess.Popen(
                argv, env=self._environment(), cwd=self.directory,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
                **({
                    'user': NOBODY, 'group': NOBODY, 'extra_groups': [],
                } if os.getuid() == 0 else {}),
            ))

    def _environment(self) -> dict[str, str]:
        inside = {
            name: os.path.join(self.directory, path) for name, path in (
                ('HOME', ''),
                ('RABBITMQ_MNESIA_BASE', 'mnesia'),
                ('RABBITMQ_LOG_BASE', 'log'),
                ('RABBITMQ_ENABLED_PLUGINS_FILE', 'plugins'),
                ('RABBITMQ_CONFIG_FILE', 'rabbitmq'),
                ('RABBITMQ_ADVANCED_CONFIG_FILE', 'advanced'),
                ('RABBITMQ_CONF_ENV_FILE', 'env'),
                ('RABBITMQ_GENERATED_CONFIG_DIR', 'generated'),
                ('RABBITMQ_PID_FILE', 'pid'),
            )
        }
        return {
            **inside,
            'PATH': '/usr/sbin:/usr/bin:/sbin:/bin',
            'LC_ALL': 'C.UTF-8',
            'ERL_EPMD_PORT': str(self._epmd_port),
            'ERL_EPMD_ADDRESS': '127.0.0.1',
            'RABBITMQ_NODENAME': self._name,
            'RABBITMQ_NODE_IP_ADDRESS': '127.0.0.1',
            'RABBITMQ_NODE_PORT': str(self.port),
            'RABBITMQ_DIST_PORT': str(self._dist_port),
            'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': (
                '-start_epmd false '
                '-kernel inet_dist_use_interface {127,0,0,1} '
                '+S 1:1 +sbwt none'
            ),
        }

    def _await(self, port: int, check) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if any(c.poll() is not None for c in self._children):
                break
            with contextlib.suppress(OSError):
                with socket.create_connection(('127.0.0.1', port), 5) as end:
                    if check(end):
                        return
            time.sleep(0.05)
        with open(os.path.join(self.directory, 'output'), 'rb') as f:
            words = f.read()[-2000:].decode(errors='replace')
        self.remove()
        raise AssertionError(f'the private RabbitMQ did not start: {words}')


def greets(end: socket.socket) -> bool:
    """Say whether who listens begins the AMQP handshake."""
    end.settimeout(5)
    end.sendall(b'AMQP\0\0\x09\x01')
    return end.recv(1) == b'\x01'
