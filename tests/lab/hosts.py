# SPDX-License-Identifier: Apache-2.0
"""Hosts in the guest: initiators of its kernel, driven by their own tools.

Two hosts in one kernel are two names: an iSCSI host is an iface with an
initiator name of its own, an NVMe host a host NQN with a host id of its own.
So what a target knows a host by differs; that two kernels do not know of each
other's caches is not shown by it. Nothing here is code of the service.
"""

from __future__ import annotations

import abc
import hashlib
import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests import lab

WAIT_S = 300.0
PREFIX = 'iqn.2026-01.test.volume:'
# A path that is silent fails within these seconds, and its device does not
# wait for it.
TIMEOUTS = {
    'node.session.timeo.replacement_timeout': '5',
    'node.conn[0].timeo.noop_out_interval': '2',
    'node.conn[0].timeo.noop_out_timeout': '2',
    'node.session.initial_login_retry_max': '1',
}
AWAIT = 'until [ -b "$1" ]; do sleep 0.1; done'


class Host(abc.ABC):
    """A name by which the guest comes to a target."""

    def __init__(self, guest: lab.Guest, name: str) -> None:
        self.guest = guest
        self.name = name

    @property
    @abc.abstractmethod
    def connector(self) -> dict[str, Any]:
        """What is told of it to the service."""

    @abc.abstractmethod
    def connect(self, info: Mapping[str, Any]) -> list[str]:
        """Log in by a connection_info; return a device for each path."""

    @abc.abstractmethod
    def disconnect(self, info: Mapping[str, Any]) -> None:
        """Log out; return at once if that has happened."""


class IscsiHost(Host):
    """open-iscsi, with an iface for each host."""

    def __init__(self, guest: lab.Guest, name: str) -> None:
        super().__init__(guest, name)
        self.iqn = f'{PREFIX}{name}'
        iface = ['iscsiadm', '-m', 'iface', '-I', name, '-o']
        batch(
            guest, ['systemctl', 'start', 'iscsid'], [*iface, 'new'],
            [*iface, 'update', '-n', 'iface.initiatorname', '-v', self.iqn],
        )

    @property
    def connector(self) -> dict[str, Any]:
        return {'host': self.name, 'ip': '192.0.2.9', 'initiator': self.iqn}

    def connect(self, info: Mapping[str, Any]) -> list[str]:
        node = self._node(info)
        # Two hosts on one target would share these links of udev's; each
        # attachment has a target of its own.
        found = [
            f'/dev/disk/by-path/ip-{portal}-iscsi-{target}-lun-{lun}'
            for portal, target, lun in paths(info)
        ]
        batch(
            self.guest, *self._records(info), [*node, '--login'],
            *(['timeout', str(WAIT_S), 'bash', '-c', AWAIT, '-', path]
              for path in found),
        )
        return found

    def disconnect(self, info: Mapping[str, Any]) -> None:
        node = self._node(info)
        self.guest.succeeds(*node, '--logout')
        self.guest.succeeds(*node, '-o', 'delete')

    def admitted(self, info: Mapping[str, Any]) -> bool:
        """Say whether the first portal lets it in; it leaves at once."""
        batch(self.guest, *self._records(info))
        portal = paths(info)[0][0]
        found = self.guest.succeeds(
            *self._node(info), '-p', portal, '--login')
        self.disconnect(info)
        return found

    def rescan(self) -> None:
        """Look again how large the devices are."""
        self.guest.run('iscsiadm', '-m', 'session', '--rescan')

    def _node(self, info: Mapping[str, Any]) -> list[str]:
        """Return the beginning of a command for all paths of a target."""
        target = paths(info)[0][1]
        return ['iscsiadm', '-m', 'node', '-T', target, '-I', self.name]

    def _records(self, info: Mapping[str, Any]) -> list[list[str]]:
        """Return the commands that note down how to log in."""
        data = info.get('data', info)
        values = dict(TIMEOUTS)
        if data.get('auth_method'):
            values |= {
                'node.session.auth.authmethod': data['auth_method'],
                'node.session.auth.username': data['auth_username'],
                'node.session.auth.password': data['auth_password'],
            }
        if data.get('auth_mutual_username'):
            values |= {
                'node.session.auth.username_in': data['auth_mutual_username'],
                'node.session.auth.password_in': data['auth_mutual_password'],
            }
        node = self._node(info)
        return [
            *([*node, '-p', portal, '-o', 'new']
              for portal, _, _ in paths(info)),
            [*node, '-o', 'update', *(
                word for name, value in values.items()
                for word in ('-n', name, '-v', value)
            )],
        ]


class NvmeHost(Host):
    """The kernel's NVMe host over TCP."""

    def __init__(self, guest: lab.Guest, name: str) -> None:
        super().__init__(guest, name)
        guest.run('modprobe', '-a', 'nvme-tcp')
        digest = hashlib.sha256(name.encode()).hexdigest()
        self.id = (
            f'{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-'
            f'8{digest[17:20]}-{digest[20:32]}'
        )
        self.nqn = f'nqn.2014-08.org.nvmexpress:uuid:{self.id}'

    @property
    def connector(self) -> dict[str, Any]:
        return {
            'host': self.name, 'ip': '192.0.2.9', 'nqn': self.nqn,
            'uuid': self.id,
        }

    def connect(self, info: Mapping[str, Any]) -> list[str]:
        data = info.get('data', info)
        nqn = data.get('target_nqn') or data['nqn']
        for address, port in nvme_portals(data):
            self.guest.run(
                'nvme', 'connect', '-t', 'tcp', '-a', address, '-s', port,
                '-n', nqn, '-q', self.nqn, '-I', self.id, '-l', '5', '-k',
                '2', '-c', '1',
            )
        count = len(nvme_portals(data))
        found: list[str] = []

        def look() -> bool:
            found[:] = self.guest.run(
                'bash', '-c', NAMESPACES, '-', nqn, self.nqn
            ).split()
            return len(found) == count

        until(look, f'no {count} devices of {nqn}')
        return found

    def disconnect(self, info: Mapping[str, Any]) -> None:
        data = info.get('data', info)
        nqn = data.get('target_nqn') or data['nqn']
        self.guest.run(
            'bash', '-c', DISCONNECT, '-', nqn, self.nqn
        )

    def admitted(self, info: Mapping[str, Any]) -> bool:
        data = info.get('data', info)
        nqn = data.get('target_nqn') or data['nqn']
        address, port = nvme_portals(data)[0]
        found = self.guest.succeeds(
            'nvme', 'connect', '-t', 'tcp', '-a', address, '-s', port, '-n',
            nqn, '-q', self.nqn, '-I', self.id, '-l', '1', '-c', '1',
        )
        self.disconnect(info)
        return found

    def rescan(self) -> None:
        """The target tells of it by an event: there is nothing to do."""


# The controllers of a subsystem that a host has, and their namespaces.
CONTROLLERS = '''
for controller in /sys/class/nvme/nvme*; do
    [ "$(cat "$controller/subsysnqn" 2>/dev/null)" = "$1" ] || continue
    [ "$(cat "$controller/hostnqn" 2>/dev/null)" = "$2" ] || continue
'''
NAMESPACES = CONTROLLERS + '''
    for namespace in "$controller"/nvme*n*; do
        # With the kernel's own multipath, a path is no device.
        [ -d "$namespace" ] || continue
        echo "/dev/${namespace##*/}" | sed 's/c[0-9]*n/n/'
    done
done
true
'''
DISCONNECT = CONTROLLERS + '''
    echo 1 >"$controller/delete_controller"
done
true
'''


def paths(info: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return portal, target and LUN of each path of an iSCSI connection."""
    data = info.get('data', info)
    if 'target_portals' in data:
        return list(zip(
            data['target_portals'], data['target_iqns'], data['target_luns'],
            strict=True,
        ))
    return [(data['target_portal'], data['target_iqn'], data['target_lun'])]


def nvme_portals(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return address and port of each path of an NVMe connection."""
    if 'portals' in data:
        return [(address, str(port)) for address, port, _ in data['portals']]
    return [(data['target_portal'], str(data['target_port']))]


def batch(guest: lab.Guest, *lines: list[str]) -> None:
    """Run several commands in one go, each if the last went well.

    They are given on standard input, for they may hold secrets.
    """
    text = '\n'.join(map(shlex.join, lines))
    guest.run(
        'bash', '-e', '-s', input_bytes=f'exec >/dev/null\n{text}\n'.encode()
    )


def until(look: Callable[[], bool], else_say: str) -> None:
    """Wait until it is so.

    :raises AssertionError: that takes too long
    """
    deadline = time.monotonic() + WAIT_S
    while not look():
        if time.monotonic() > deadline:
            raise AssertionError(else_say)
        time.sleep(0.5)
