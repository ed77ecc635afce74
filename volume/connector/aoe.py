# SPDX-License-Identifier: Apache-2.0
"""ATA over Ethernet on the host's side, by the kernel's driver and aoetools.

There is no session: a host asks who is there, and a device appears for each
address that answers. The network says nothing of a volume's id, so what is
proved is that the address answers, and how large it is.
"""

from __future__ import annotations

import re
import socket
import time
from typing import ClassVar

from volume import errors
from volume import model
from volume.connector import disks
from volume.connector.base import Connector
from volume.connector.base import field
from volume.node import Node

DEVICE = re.compile(r'e\d{1,5}\.\d{1,3}')
MAC = re.compile(r'[0-9a-f]{2}(?::[0-9a-f]{2}){5}')
NONE = '00:00:00:00:00:00'
MACS_MAX = 8
MODULE = '/sys/module/aoe'
TOOLS = '/usr/sbin/aoe-discover', '/sbin/aoe-discover'
NETWORKS = '/sys/class/net'
ANSWER_S = 20.0
POLL_S = 0.5


class AoeConnector(Connector):
    """Gives the device of an address."""

    protocol: ClassVar[str] = 'aoe'
    leaves_traces: ClassVar[bool] = True

    def __init__(self, node: Node) -> None:
        self.node = node

    def host(self) -> model.Host:
        # The module is loaded by the first volume, which is for these alone.
        is_able = any(map(self.node.exists, (MODULE, *TOOLS)))
        macs = self._macs()[:MACS_MAX] if is_able else []
        return model.Host(
            socket.gethostname(),
            properties={'aoe_mac': ','.join(macs)} if macs else {},
        )

    def attach(self, connection: model.Connection) -> str:
        name, path = _names(connection)
        volume_id = str(connection.fields.get('volume_id', ''))
        if not self.node.exists(MODULE):
            self.node.load_modules('aoe')
        if self.node.exists(path):
            self.node.run('aoe-revalidate', name)
        deadline = time.monotonic() + ANSWER_S
        while not self.node.exists(path):
            if time.monotonic() > deadline:
                raise errors.NotFound(
                    f'nobody on the network answers as {name}: the volume is '
                    'not exported to this host, or not on its network'
                )
            self.node.run('aoe-discover')
            time.sleep(POLL_S)
        disks.check_size(self.node, _block(name), volume_id, 1)
        return path

    def detach(self, connection: model.Connection) -> None:
        name, path = _names(connection)
        if not self.node.exists(path):
            return
        volume_id = str(connection.fields.get('volume_id', ''))
        disks.need_free(self.node, path, volume_id)
        disks.flush(self.node, path, volume_id)
        self.node.run('aoe-flush', name)

    def clear(self, connection: model.Connection) -> None:
        name, path = _names(connection)
        if self.node.exists(path):
            # Whoever has it open would go on, on this volume; and nothing is
            # to be written now that was meant for another.
            volume_id = str(connection.fields.get('volume_id', ''))
            disks.need_free(self.node, path, volume_id)
            self.node.run('aoe-flush', name)

    def present(self, connection: model.Connection) -> str:
        _, path = _names(connection)
        return path if self.node.exists(path) else ''

    # Ours alone.

    def _macs(self) -> list[str]:
        found = []
        for name in self.node.list(NETWORKS):
            try:
                said = self.node.read(f'{NETWORKS}/{name}/address')
            except errors.VolumeError:
                continue  # it has none, or has gone
            mac = said.decode(errors='replace').strip().lower()
            if MAC.fullmatch(mac) and mac != NONE:
                found.append(mac)
        return found


def _names(connection: model.Connection) -> tuple[str, str]:
    """Return the address and its device.

    :raises Invalid: the connection has none
    """
    name = field(connection, 'aoe', 'device')
    if not DEVICE.fullmatch(name):
        raise errors.Invalid(f'{name!r:.40} is no AoE address')
    return name, f'/dev/etherd/{name}'


def _block(name: str) -> str:
    """Return what the kernel calls the disk in ``/sys/block``."""
    return f'etherd!{name}'
