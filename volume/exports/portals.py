# SPDX-License-Identifier: Apache-2.0
"""Addresses on which hosts find targets, as options write them."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Sequence

from volume import errors

# An address in brackets, or one of IPv4, and perhaps a port. One of IPv6 may
# stand alone, without either.
_PORTAL = re.compile(r'(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::([0-9]{1,5}))?')


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
    match = _PORTAL.fullmatch(text)
    host, port = (match[1] or match[2], match[3]) if match else (text, None)
    try:
        address = ipaddress.ip_address(host)
        number = default_port if port is None else int(port)
        if not 0 < number < 1 << 16:
            raise ValueError(f'{port} is no port')
    except ValueError as wrong:
        raise errors.Invalid(
            f'{option}: {text!r:.80} is no address with a port ({wrong}): '
            'write it as 192.0.2.1:3260 or [2001:db8::1]:3260'
        ) from wrong
    if address.is_unspecified or '%' in text:
        raise errors.Invalid(
            f'{option}: hosts cannot connect to {text!r}: name the addresses '
            'themselves'
        )
    return Portal(str(address), number)
