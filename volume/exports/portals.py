# SPDX-License-Identifier: Apache-2.0
"""Addresses on which hosts find targets, as options write them."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Sequence

from volume import errors


@dataclasses.dataclass(frozen=True, slots=True)
class Portal:
    """An address of the node, and a TCP port."""

    address: str
    port: int

    @property
    def is_v6(self) -> bool:
        return ':' in self.address

    def __str__(self) -> str:
        """As URLs, iSCSI and LIO write it."""
        host = f'[{self.address}]' if self.is_v6 else self.address
        return f'{host}:{self.port}'


def parse(
    texts: Sequence[str], option: str, default_port: int
) -> tuple[Portal, ...]:
    """Return the portals of an option, each ``address`` or ``address:port``.

    An IPv6 address stands in brackets. Names are refused: the kernel takes
    addresses, and a name may lead elsewhere tomorrow.

    :raises Invalid: one is wrong, or there is none
    """
    found = [_parse(text.strip(), option, default_port) for text in texts]
    if not found:
        raise errors.Invalid(
            f'{option} is empty: name the addresses of the storage network '
            'on which hosts reach this node'
        )
    if len(set(found)) < len(found):
        raise errors.Invalid(f'{option} names a portal twice')
    return tuple(found)


def _parse(text: str, option: str, default_port: int) -> Portal:
    host, colon, port = text, '', ''
    if text.startswith('['):
        host, _, rest = text[1:].partition(']')
        colon, port = rest[:1], rest[1:]
    elif text.count(':') == 1:
        host, colon, port = text.partition(':')
    number = int(port) if port.isascii() and port.isdigit() else 0
    try:
        address = ipaddress.ip_address(host)
        if (colon or port) and not (colon == ':' and 0 < number < 1 << 16):
            raise ValueError(f'{port} is no port')
    except ValueError as wrong:
        raise errors.Invalid(
            f'{option}: {text!r:.80} is no address with a port ({wrong}): '
            'write it as 192.0.2.1:3260 or [2001:db8::1]:3260'
        ) from wrong
    if address.is_unspecified:
        raise errors.Invalid(
            f'{option}: hosts cannot connect to {text!r}: name the addresses '
            'themselves'
        )
    return Portal(str(address), number or default_port)
