# SPDX-License-Identifier: Apache-2.0
"""The connectors that are installed on this host, by their protocols."""

from __future__ import annotations

import importlib.metadata
import socket
from typing import Any

from volume import errors
from volume import model
from volume.connector.base import Connector
from volume.node import Node

GROUP = 'volume.connectors'
STATE_DIR = '/run/volume'


def find(protocol: str) -> Connector:
    """Return the connector of a protocol.

    :raises Unsupported: this host has none, or it cannot be loaded
    """
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name == protocol:
            return _load(entry)
    raise errors.Unsupported(
        f'this host has no connector for {protocol!r:.40}; install one'
    )


def properties(name: str = '') -> dict[str, Any]:
    """Return who this host is, as every connector knows it.

    ``name`` is used instead of the host's own. A connector that cannot be
    loaded has nothing to say; ``find`` tells why when it is needed.
    """
    known: dict[str, Any] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            host = _load(entry).host()
        except errors.VolumeError:
            continue
        for key, value in (
            ('ip', next(iter(host.addresses), None)),
            ('initiator', host.iqn),
            ('nqn', host.nqn),
        ):
            if value:
                known[key] = value
        known.update(host.properties)
    return {**known, 'host': name or socket.gethostname()}


def connection(info: dict[str, Any]) -> model.Connection:
    """Return the connection that the API's flat connection_info is."""
    fields = {
        key: value for key, value in info.items()
        if key != 'driver_volume_type'
    }
    return model.Connection(str(info.get('driver_volume_type')), fields)


def _load(entry: importlib.metadata.EntryPoint) -> Connector:
    try:
        made: Connector = entry.load()(Node(STATE_DIR))
    except ImportError as failed:
        raise errors.Unsupported(
            f'the connector {entry.name} cannot be loaded: {failed}'
        ) from None
    return made
