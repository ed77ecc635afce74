# SPDX-License-Identifier: Apache-2.0
"""Where an NBD server is, as a URI says it, and the way there."""

from __future__ import annotations

import socket
import urllib.parse

from volume import errors


def parse(uri: str) -> tuple[str | tuple[str, int], bytes]:
    """Return address and export name of an NBD URI.

    :raises Invalid: it is none
    """
    try:
        parts = urllib.parse.urlsplit(uri)
        name = urllib.parse.unquote(parts.path.removeprefix('/')).encode()
        query = urllib.parse.parse_qs(parts.query, strict_parsing=bool(
            parts.query
        ))
        if len(name) > 4096:
            raise ValueError('its export name is too long')
        if parts.scheme == 'nbd+unix':
            if set(query) != {'socket'} or parts.netloc:
                raise ValueError('it needs ?socket=PATH, and no host')
            return query['socket'][0], name
        if parts.scheme == 'nbd' and parts.hostname and not query:
            return (parts.hostname, parts.port or 10809), name
        raise ValueError('it is not nbd:// or nbd+unix://')
    except ValueError as failed:
        raise errors.Invalid(
            f'{uri!r:.200} is no NBD URI of ours: {failed}'
        ) from failed


def connect(
    address: str | tuple[str, int], timeout_s: float
) -> socket.socket:
    try:
        if isinstance(address, tuple):
            sock = socket.create_connection(address, timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as failed:
        raise errors.Unavailable(
            f'no NBD server at {address}: {failed}'
        ) from failed
