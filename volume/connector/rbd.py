# SPDX-License-Identifier: Apache-2.0
"""Ceph on the host's side: QEMU opens the image itself, through librbd.

There is nothing to set up, so to attach is to prove that the image opens:
with the key that this host has, for the connection has none. The host says
all of its addresses, by which the service can tell its clients from those of
others.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any, ClassVar

from volume import errors
from volume import model
from volume.connector.base import Connector
from volume.connector.base import field
from volume.node import CommandFailed
from volume.node import Node

CONF = '/etc/ceph/ceph.conf'
OPEN_S = 60.0
NAME = re.compile(r'([^/@]+)/([^/@]+)')
ADDRESSES_MAX = 16

# What qemu-img says, and what it means to our caller; first match. The same
# words come before every failure, which stands at the end.
MEANING: tuple[tuple[str, type[errors.VolumeError], str], ...] = (
    (r'Unknown driver', errors.Unavailable,
     'QEMU has no block driver for it here: install qemu-block-extra'),
    (r'error reading header from .*: No such file or directory$',
     errors.NotFound, 'there is no such image'),
    (r'error opening pool .*: No such file or directory$',
     errors.NotFound, 'there is no such pool'),
    (r'error (reading header|opening pool) .*: Operation not permitted$',
     errors.Denied, 'the key of this host may not open it'),
    (r'error connecting', errors.Unavailable,
     'the cluster does not answer, or refuses the key of this host'),
)


class RbdConnector(Connector):
    """Gives what QEMU opens."""

    protocol: ClassVar[str] = 'rbd'

    def __init__(self, node: Node, conf: str = CONF) -> None:
        self.node = node
        self._conf = conf

    def host(self) -> model.Host:
        if not self.node.exists(self._conf):
            return model.Host(socket.gethostname())
        said = self.node.run('hostname', '--all-ip-addresses').split()
        return model.Host(socket.gethostname(), properties={
            'rbd_addresses': ' '.join(said[:ADDRESSES_MAX]),
        })

    def attach(self, connection: model.Connection) -> str:
        url = 'json:' + json.dumps(self._node_of(connection))
        name = field(connection, 'rbd', 'name')
        try:
            self.node.run(
                'qemu-img', 'info', '--output=json', url, timeout_s=OPEN_S)
        except CommandFailed as failed:
            for words, kind, said in MEANING:
                if re.search(words, failed.stderr, re.MULTILINE):
                    raise kind(f'image {name}: {said}') from failed
            raise errors.Unavailable(
                f'image {name} cannot be opened: {failed!s:.500}'
            ) from failed
        return url

    def detach(self, connection: model.Connection) -> None:
        # The sessions are those of whoever opened the image; the service
        # ends what is left of them.
        field(connection, 'rbd', 'name')

    def _node_of(self, connection: model.Connection) -> dict[str, Any]:
        found = NAME.fullmatch(field(connection, 'rbd', 'name'))
        fields = connection.fields
        hosts, ports = fields.get('hosts'), fields.get('ports')
        if found is None or not (
            isinstance(hosts, list) and isinstance(ports, list)
            and hosts and len(hosts) == len(ports)
        ):
            raise errors.Invalid(
                'the connection names no image, or no monitors'
            )
        node: dict[str, Any] = {
            'driver': 'rbd', 'pool': found[1], 'image': found[2],
            'server': [
                {'host': str(host), 'port': str(port)}
                for host, port in zip(hosts, ports, strict=True)
            ],
        }
        if isinstance(fields.get('auth_username'), str):
            node['user'] = fields['auth_username']
        if self.node.exists(self._conf):
            node['conf'] = self._conf
        whole: dict[str, Any] = {'driver': 'raw', 'file': node}
        if fields.get('access_mode') == model.Access.READ.value:
            whole['read-only'] = True
        return whole
