# SPDX-License-Identifier: Apache-2.0
"""NBD on the host's side: QEMU and libnbd open the URI themselves.

There is nothing to set up, so to attach is to prove: one handshake shows
that the export is there, and may be written to if that was promised.
"""

from __future__ import annotations

import contextlib
import socket
from typing import ClassVar

from volume import errors
from volume import model
from volume.connector.base import Connector
from volume.connector.base import field
from volume.nbd import NbdClient
from volume.node import Node

HANDSHAKE_S = 10.0


class NbdConnector(Connector):
    """Gives the URI of an export."""

    protocol: ClassVar[str] = 'nbd'

    def __init__(self, node: Node) -> None:
        self.node = node

    def host(self) -> model.Host:
        return model.Host(socket.gethostname())

    def attach(self, connection: model.Connection) -> str:
        uri = field(connection, 'nbd', 'uri')
        access = field(connection, 'nbd', 'access')
        client = self.node.act(
            'nbd connect', lambda: NbdClient(uri, HANDSHAKE_S)
        )
        with contextlib.closing(client):
            if access == model.Access.WRITE.value and client.is_read_only:
                raise errors.Invalid(
                    f'{uri} may be read only, but was promised for writing'
                )
        return uri

    def detach(self, connection: model.Connection) -> None:
        # The sessions are those of whoever opened the URI; the exporter
        # ends what is left of them.
        field(connection, 'nbd', 'uri')
