# SPDX-License-Identifier: Apache-2.0
"""Connections to servers that a stranger has named.

Whoever may name an image may name any address, and a name may mean another
address a moment later. So every address is checked where it counts: the name
is resolved once, all that it means is checked, and the connection is made to
a checked address, not to the name. TLS still verifies the name. Proxies from
the environment are not asked, for they would make the connection for us.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from volume import errors

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[..., Sequence[tuple[Any, ...]]]

# Global by their prefix, but what they reach is inside the rest of them.
TRANSLATED = tuple(
    ipaddress.ip_network(prefix)
    for prefix in ('64:ff9b::/96', '64:ff9b:1::/48', '2002::/16', '2001::/32')
)
WINDOW_BYTES = 1 << 16
BUFFER_BYTES = 1 << 18


def masked(url: str) -> str:
    """Return the URL without what may be secret in it."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return f'{url.split(":", 1)[0]:.20}:***'
    at = parts.netloc.rpartition('@')
    host = f'***@{at[2]}' if at[1] else at[2]
    shown = urllib.parse.urlunsplit((parts.scheme, host, parts.path, '', ''))
    return shown[:400] + ('?***' if parts.query else '')


def networks(names: Sequence[str]) -> tuple[Network, ...]:
    """Return the networks of an option.

    :raises Invalid: one is malformed
    """
    try:
        return tuple(ipaddress.ip_network(name) for name in names)
    except ValueError as bad:
        raise errors.Invalid(f'image_allowed_networks: {bad}') from None


def is_reachable(address: str, allowed: Sequence[Network]) -> bool:
    """Say whether a stranger may have us connect to this address."""
    ip = ipaddress.ip_address(address.partition('%')[0])
    ip = getattr(ip, 'ipv4_mapped', None) or ip
    if any(ip in network for network in allowed):
        return True
    return (
        ip.is_global
        and not ip.is_multicast
        and not ip.is_reserved
        and not getattr(ip, 'is_site_local', False)
        and not any(ip in network for network in TRANSLATED)
    )


def dial(
    host: str,
    port: int,
    allowed: Sequence[Network],
    timeout_s: float,
    resolve: Resolve = socket.getaddrinfo,
) -> socket.socket:
    """Connect to a host after checking every address that its name has.

    :raises Invalid: one of them may not be reached
    :raises Unavailable: the name is not known, or nobody answers
    """
    try:
        found = resolve(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as unknown:
        raise errors.Unavailable(
            f'host {host:.255} cannot be resolved: {unknown}'
        ) from None
    # All of them: a name that is half inside is somebody's trick. The address
    # is not told, for it may be news to whoever asks.
    if not all(is_reachable(entry[4][0], allowed) for entry in found):
        raise errors.Invalid(
            f'host {host:.255} is not at a public address; allow its network '
            'by image_allowed_networks if images may come from there'
        )
    why: OSError | None = None
    for family, kind, protocol, _, address in found:
        candidate = socket.socket(family, kind, protocol)
        try:
            candidate.settimeout(timeout_s)
            candidate.connect(address)
        except OSError as failed:
            candidate.close()
            why = failed
            continue
        return candidate
    raise errors.Unavailable(f'host {host:.255} does not answer: {why}')


class Wire:
    """A connected socket as ``http.client`` wants one.

    It gives up on a server that is silent, or that sends so little that it
    might as well be.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._deadline: float | None = time.monotonic() + timeout_s
        self._blocked_s = 0.0
        self._arrived_bytes = 0

    def sendall(self, data: bytes) -> None:
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self), BUFFER_BYTES)

    def close(self) -> None:
        """Nothing: ``http.client`` closes before the body is read."""

    def headers_done(self) -> None:
        """From now on the body's pace counts, and no longer the clock."""
        self._deadline = None
        self._blocked_s = 0.0

    def end(self) -> None:
        """Close, and wake a thread that is reading."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The other side was first.
        self._sock.close()

    def receive(self, buffer: memoryview) -> int:
        start = time.monotonic()
        left_s = self._timeout_s - self._blocked_s
        if self._deadline is not None:
            left_s = self._deadline - start
        if left_s <= 0:
            raise TimeoutError(f'it sent next to nothing for {self._took()}')
        self._sock.settimeout(left_s)
        try:
            count = self._sock.recv_into(buffer)
        except TimeoutError:
            raise TimeoutError(
                f'it sent next to nothing for {self._took()}'
            ) from None
        except EOFError:
            count = 0  # what eventlet says when it was ended meanwhile
        self._blocked_s += time.monotonic() - start
        self._arrived_bytes += count
        if self._arrived_bytes >= WINDOW_BYTES:
            self._arrived_bytes = 0
            self._blocked_s = 0.0
        return count

    def _took(self) -> str:
        return f'{self._timeout_s:g} s'


class _Incoming(io.RawIOBase):
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._wire.receive(memoryview(buffer).cast('B'))


class Connection(http.client.HTTPConnection):
    """One request over a connection that has been made and checked."""

    def __init__(self, host: str, port: int, wire: Wire, secure: bool) -> None:
        super().__init__(host, port)
        # Decides whether the Host header names the port.
        self.default_port = 443 if secure else 80
        self.sock: Any = wire

    def connect(self) -> None:
        raise errors.Unavailable('the connection was closed')


def tls(ca_file: str | None) -> ssl.SSLContext:
    """Return a context that verifies certificates and names.

    :raises Invalid: the file of authorities cannot be used
    """
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as failed:
        raise errors.Invalid(
            f'image_ca_file {ca_file}: {failed}'
        ) from None
