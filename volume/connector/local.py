# SPDX-License-Identifier: Apache-2.0
"""A volume as a path of this node: there is nothing to set up.

To attach is to prove that the path is there and may be used as promised.
"""

from __future__ import annotations

import os
import socket
from typing import ClassVar

from volume import errors
from volume import model
from volume.connector.base import Connector
from volume.connector.base import field
from volume.node import Node


class LocalConnector(Connector):
    """Gives the path of a volume."""

    protocol: ClassVar[str] = 'local'

    def __init__(self, node: Node) -> None:
        self.node = node

    def host(self) -> model.Host:
        return model.Host(socket.gethostname())

    def attach(self, connection: model.Connection) -> str:
        path = field(connection, 'local', 'path')
        access = field(connection, 'local', 'access')
        field(connection, 'local', 'format')
        if not os.path.isabs(path):
            raise errors.Invalid(f'{path!r:.200} is no absolute path')
        if not self.node.exists(path):
            raise errors.NotFound(
                f'{path} is not here: the volume is on another node, or no '
                'longer attached'
            )
        needed = os.R_OK
        if access == model.Access.WRITE.value:
            needed |= os.W_OK
        if not os.access(path, needed):
            raise errors.Denied(
                f'{path} may not be opened by this user for {access!r}'
            )
        return path

    def detach(self, connection: model.Connection) -> None:
        # Whoever opened the path closes it; the exporter proves it.
        field(connection, 'local', 'path')
