# SPDX-License-Identifier: Apache-2.0
"""The connectors that are installed on this host, by their protocols."""

from __future__ import annotations

import importlib.metadata
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from volume import errors
from volume import ids
from volume import model
from volume.connector import naming
from volume.connector.base import Connector
from volume.node import Node

GROUP = 'volume.connectors'
STATE_DIR = '/run/volume'
# By which fields of a flat connection_info a host proves who it is.
_SECRETS: Mapping[str, re.Pattern[str]] = {
    'iscsi': re.compile(r'auth_(mutual_)?(method|username|password)'),
    'nvmeof': re.compile(r'dhchap_.*'),
}


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


def properties(name: str = '', address: str = '') -> dict[str, Any]:
    """Return who this host is, as every connector knows it.

    ``name`` and ``address`` are used instead of the host's own. A connector
    that cannot be loaded has nothing to say; ``find`` tells why when it is
    needed.
    """
    known: dict[str, Any] = {}
    if address or (address := _address()):
        known['ip'] = address
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            host = _load(entry).host()
        except errors.VolumeError:
            continue
        for key, value in (
            ('initiator', host.iqn),
            ('nqn', host.nqn),
        ):
            if value:
                known[key] = value
        known.update(host.properties)
    return {**known, 'host': name or socket.gethostname()}


def connection(info: Mapping[str, Any]) -> model.Connection:
    """Return the connection that a connection_info is.

    It is flat, as REST has it, or has its fields in ``data``, as RPC does.
    """
    protocol = str(info.get('driver_volume_type'))
    data = info.get('data')
    given = data if isinstance(data, Mapping) else info
    fields: dict[str, object] = {}
    credentials: dict[str, str] = {}
    for key, value in given.items():
        if key == 'driver_volume_type':
            continue
        if is_secret(protocol, key) and isinstance(value, str):
            credentials[key] = value
        else:
            fields[key] = value
    return model.Connection(protocol, fields, credentials=credentials)


def is_secret(protocol: str, key: str) -> bool:
    """Say whether a field of a connection is for its host alone."""
    found = _SECRETS.get(protocol)
    return bool(found and found.fullmatch(key))


def installed(
    finder: Callable[[str], Connector] = find
) -> Iterator[Connector]:
    """Yield the connectors that work on this host."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            yield finder(entry.name)
        except errors.Unsupported:
            continue


def attachment_of(info: Mapping[str, Any]) -> str:
    """Return the attachment that a connection_info is of.

    One that does not say so gets an id from what it leads to, the same one
    each time.
    """
    data = info.get('data')
    given = {**info, **(data if isinstance(data, Mapping) else {})}
    said = given.get('attachment_id')
    if ids.is_id(said):
        return str(said)
    for key in 'target_iqn', 'target_nqn':
        if found := naming.parts(str(given.get(key))):
            return found[1]
    protocol = str(info.get('driver_volume_type'))
    where = {
        key: str(value) for key, value in given.items()
        if key != 'data' and not is_secret(protocol, key)
    }
    return str(uuid.uuid5(uuid.NAMESPACE_OID, repr(sorted(where.items()))))


def _address() -> str:
    """Return the address of this host's way to others; it sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(('192.0.2.1', 9))  # RFC 5737, nobody's
        except OSError:
            return ''
        return str(probe.getsockname()[0])


def _load(entry: importlib.metadata.EntryPoint) -> Connector:
    try:
        made: Connector = entry.load()(Node(STATE_DIR))
    except ImportError as failed:
        raise errors.Unsupported(
            f'the connector {entry.name} cannot be loaded: {failed}'
        ) from None
    return made
