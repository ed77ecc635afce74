# SPDX-License-Identifier: Apache-2.0
"""NVMe over TCP as the kernel has it: who we are, controllers, namespaces."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence

from volume import errors
from volume.node import CommandFailed
from volume.node import Node
from volume.node import Op

CONTROLLERS = '/sys/class/nvme'
MULTIPATH = '/sys/module/nvme_core/parameters/multipath'
FABRICS = '/dev/nvme-fabrics'
NQN_FILE, ID_FILE = '/etc/nvme/hostnqn', '/etc/nvme/hostid'
_NQN = re.compile(r'nqn\.\d{4}-\d\d\.[!-~]{1,210}')

CONNECT_S = 60.0
SETTLE_S = 20.0
POLL_S = 0.1
ALREADY = 'already connected'
# A device of a controller (nvme0n1), of one path of several (nvme0c1n1).
_SPACE = re.compile(r'nvme\d+(c\d+)?n\d+')
_PATH = re.compile(r'nvme(\d+)c\d+n(\d+)')


@dataclasses.dataclass(frozen=True, slots=True)
class Portal:
    """Where a subsystem is reached."""

    address: str
    port: str

    def __str__(self) -> str:
        host = f'[{self.address}]' if ':' in self.address else self.address
        return f'{host}:{self.port}'


@dataclasses.dataclass(frozen=True, slots=True)
class Controller:
    """One connection to a subsystem, with the devices that came by it.

    Of several connections to one namespace the kernel makes one device, if
    its multipath is on.
    """

    name: str
    nqn: str
    state: str
    portal: Portal
    spaces: tuple[str, ...]

    @property
    def is_up(self) -> bool:
        return self.state == 'live'


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Who this host is to subsystems."""

    nqn: str
    host_id: str = ''


def identity(node: Node) -> Identity:
    """Return who this host is; what it calls itself is never changed.

    :raises Unavailable: it has no name
    """
    nqn, host_id = node.configure([Op.get(NQN_FILE), Op.get(ID_FILE)])
    if not isinstance(nqn, str) or not _NQN.fullmatch(nqn.strip()):
        raise errors.Unavailable(
            f'{NQN_FILE} names no host: install nvme-cli, or run "nvme '
            'gen-hostnqn" and write its name there'
        )
    return Identity(nqn.strip(), str(host_id or '').strip())


def has_multipath(node: Node) -> bool:
    """Say whether the kernel makes one device of several paths."""
    found, = node.configure([Op.get(MULTIPATH)])
    return found == 'Y'


def controllers(node: Node) -> list[Controller]:
    """Return all connections of this host over TCP, others' as well."""
    names = _listing(node, [CONTROLLERS])[0]
    keys = ('subsysnqn', 'state', 'address', 'transport')
    found = node.configure([
        Op.get(f'{CONTROLLERS}/{name}/{key}') for name in names
        for key in keys
    ])
    inside = _listing(node, [f'{CONTROLLERS}/{name}' for name in names])
    made = []
    for i, name in enumerate(names):
        nqn, state, address, transport = found[i * 4:i * 4 + 4]
        if isinstance(nqn, str) and transport == 'tcp':
            made.append(Controller(
                name, nqn.strip(), str(state), _portal(str(address)),
                tuple(
                    _device(each) for each in inside[i]
                    if _SPACE.fullmatch(each)
                ),
            ))
    return made


def connect(
    node: Node, nqn: str, portal: Portal, who: Identity
) -> None:
    """Connect, and return when the controller is there or refused.

    :raises Denied: the subsystem does not let this host in, or is not there
    :raises Unavailable: the portal does not answer
    :raises Unsupported: the kernel of this host has no NVMe over TCP
    """
    if not node.exists(FABRICS):
        node.load_modules('nvme-tcp')
    argv = [
        'nvme', 'connect', '--transport=tcp', f'--nqn={nqn}',
        f'--traddr={portal.address}', f'--trsvcid={portal.port}',
        f'--hostnqn={who.nqn}',
    ]
    if who.host_id:
        argv.append(f'--hostid={who.host_id}')
    try:
        node.run(*argv, timeout_s=CONNECT_S)
    except CommandFailed as failed:
        if ALREADY in failed.stderr:
            return
        # EOPNOTSUPP and the like: what a subsystem says to strangers, and
        # a port without the subsystem as well.
        words = failed.stderr.lower()
        kind = errors.Unavailable if (
            'refused' in words or 'timed out' in words
            or 'unreachable' in words or 'no route' in words
        ) else errors.Denied
        raise kind(
            f'portal {portal} does not let us in to {nqn}: {failed}'
        ) from failed


def disconnect(node: Node, controller: Controller) -> None:
    """End a connection; a device without any other goes with it."""
    if not _is_there(node, controller):
        return
    path = f'{CONTROLLERS}/{controller.name}/delete_controller'
    try:
        node.configure([Op.put(path, '1')])
    except errors.VolumeError:
        if _is_there(node, controller):
            raise  # else the kernel has ended it by itself
    late = time.monotonic() + SETTLE_S
    while _is_there(node, controller):
        if time.monotonic() > late:
            raise errors.Unavailable(
                f'connection {controller.name} to {controller.nqn} is still '
                f'there after {SETTLE_S:g} s'
            )
        time.sleep(POLL_S)


def rescan(node: Node, found: Sequence[Controller]) -> None:
    """Have the kernel ask for the size of namespaces, a little later."""
    node.configure([
        Op.put(f'{CONTROLLERS}/{each.name}/rescan_controller', '1')
        for each in found
    ])


def _is_there(node: Node, controller: Controller) -> bool:
    """Say whether a connection is there; its name is soon another's."""
    nqn, = node.configure([
        Op.get(f'{CONTROLLERS}/{controller.name}/subsysnqn')
    ])
    return isinstance(nqn, str) and nqn.strip() == controller.nqn


def _portal(address: str) -> Portal:
    """Return what is in ``traddr=10.0.0.1,trsvcid=4420,src_addr=…``."""
    parts = dict(
        each.partition('=')[::2] for each in address.strip().split(',')
    )
    return Portal(parts.get('traddr', ''), parts.get('trsvcid', ''))


def _device(name: str) -> str:
    match = _PATH.fullmatch(name)
    return f'nvme{match[1]}n{match[2]}' if match else name


def _listing(node: Node, paths: Sequence[str]) -> list[list[str]]:
    return [
        found if isinstance(found, list) else []
        for found in node.configure([Op.list(path) for path in paths])
    ]
