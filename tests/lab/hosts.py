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

WAIT_S = 60.0
PREFIX = 'iqn.2026-01.test.volume:'
# A path that is silent fails within these seconds, and its device does not
# wait for it.
TIMEOUTS = {
    'node.session.timeo.replacement_timeout': '5',
    'node.conn[0].timeo.noop_out_interval': '2',
    'node.conn[0].timeo.noop_out_timeout': '2',
}


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
        guest.run('systemctl', 'start', 'iscsid')
        guest.succeeds('iscsiadm', '-m', 'iface', '-I', name, '-o', 'new')
        self._adm(
            'iface', '-I', name, '-o', 'update', '-n', 'iface.initiatorname',
            '-v', self.iqn,
        )

    @property
    def connector(self) -> dict[str, Any]:
        return {'host': self.name, 'ip': '192.0.2.9', 'initiator': self.iqn}

    def connect(self, info: Mapping[str, Any]) -> list[str]:
        found = []
        for portal, target, lun in paths(info['data']):
            self._record(portal, target, info['data'])
            self._login(portal, target)
            # Two hosts on one target would share this link of udev's; each
            # attachment has a target of its own.
            found.append(
                f'/dev/disk/by-path/ip-{portal}-iscsi-{target}-lun-{lun}'
            )
        for path in found:
            until(
                lambda path=path: self.guest.succeeds('test', '-b', path),
                f'{path} did not come',
            )
        return found

    def disconnect(self, info: Mapping[str, Any]) -> None:
        for portal, target, _ in paths(info['data']):
            where = ('-T', target, '-p', portal, '-I', self.name)
            self.guest.succeeds(
                'iscsiadm', '-m', 'node', *where, '--logout'
            )
            self.guest.succeeds('iscsiadm', '-m', 'node', *where, '-o',
                                'delete')

    def admitted(self, info: Mapping[str, Any]) -> bool:
        """Say whether the first portal lets it in; it leaves at once."""
        portal, target, _ = paths(info['data'])[0]
        self._record(portal, target, info['data'])
        where = ('-T', target, '-p', portal, '-I', self.name)
        found = self.guest.succeeds(
            'iscsiadm', '-m', 'node', *where, '--login'
        )
        self.disconnect(info)
        return found

    def rescan(self) -> None:
        """Look again how large the devices are."""
        self._adm('session', '--rescan')

    def _record(
        self, portal: str, target: str, data: Mapping[str, Any]
    ) -> None:
        values = dict(TIMEOUTS) | {'node.session.initial_login_retry_max': '1'}
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
        where = ('-T', target, '-p', portal, '-I', self.name)
        lines = [['iscsiadm', '-m', 'node', '-o', 'new', *where]]
        lines += [
            ['iscsiadm', '-m', 'node', *where, '-o', 'update', '-n', name,
             '-v', value]
            for name, value in values.items()
        ]
        batch(self.guest, lines)

    def _login(self, portal: str, target: str) -> None:
        self._adm(
            'node', '-T', target, '-p', portal, '-I', self.name, '--login'
        )

    def _adm(self, mode: str, *argv: str) -> None:
        self.guest.run('iscsiadm', '-m', mode, *argv)


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
        data = info['data']
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
        data = info['data']
        nqn = data.get('target_nqn') or data['nqn']
        self.guest.run(
            'bash', '-c', DISCONNECT, '-', nqn, self.nqn
        )

    def admitted(self, info: Mapping[str, Any]) -> bool:
        data = info['data']
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
        [ -d "$namespace" ] && echo "/dev/${namespace##*/}"
    done
done
true
'''
DISCONNECT = CONTROLLERS + '''
    echo 1 >"$controller/delete_controller"
done
true
'''


def paths(data: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return portal, target and LUN of each path of an iSCSI connection."""
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


def batch(guest: lab.Guest, lines: list[list[str]]) -> None:
    """Run several commands in one go, each after the last; secrets too."""
    text = '\n'.join(shlex.join(line) for line in lines)
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
        time.sleep(0.2)
