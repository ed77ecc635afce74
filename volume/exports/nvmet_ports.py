# SPDX-License-Identifier: Apache-2.0
"""Addresses at which the kernel's NVMe target listens.

An address can be listened on once, so a port may be shared with subsystems
that are not ours: one that is there is used as it is. Ours get their number
from the address, so that two services that make the same one at a time make
one port. A port without subsystems does not listen, and is left.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from volume import errors
from volume.exports.configfs import texts
from volume.exports.portals import Portal
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import Node

NVMET = '/sys/kernel/config/nvmet'
PORTS = f'{NVMET}/ports'
FIRST, COUNT = 20000, 40000  # numbers of ports are below 1 << 16
FIELDS = ('addr_trtype', 'addr_adrfam', 'addr_traddr', 'addr_trsvcid')


def ready(node: Node, portals: Sequence[Portal]) -> list[str]:
    """Return the paths of the portals' ports, made where there are none."""
    there = _all(node)
    found, ops = [], []
    for portal in portals:
        wanted = _address(portal)
        number = next((n for n, has in there.items() if has == wanted), '')
        if not number:
            number = _number(portal, wanted, there)
            ops += _make(number, wanted)
            there[number] = wanted
        found.append(f'{PORTS}/{number}')
    if ops:
        node.configure(ops)
    return found


def numbers(node: Node) -> list[str]:
    return texts(*node.configure([Op.list(PORTS)]))


def _all(node: Node) -> dict[str, tuple[Result, ...]]:
    names = numbers(node)
    values = iter(node.configure([
        Op.get(f'{PORTS}/{name}/{field}')
        for name in names for field in FIELDS
    ]))
    return {name: tuple(next(values) for _ in FIELDS) for name in names}


def _address(portal: Portal) -> tuple[str, ...]:
    family = 'ipv6' if portal.is_v6 else 'ipv4'
    return 'tcp', family, portal.address, str(portal.port)


def _number(
    portal: Portal, wanted: tuple[str, ...],
    there: Mapping[str, tuple[Result, ...]],
) -> str:
    """Return a number that is free, or whose port was begun and not ended."""
    start = zlib.crc32(str(portal).encode()) % COUNT
    for step in range(COUNT):
        number = str(FIRST + (start + step) % COUNT)
        has = there.get(number, wanted)
        if all(
            each in ('', None, text)
            for each, text in zip(has, wanted, strict=True)
        ):
            return number
    raise errors.Unavailable('the NVMe target has no number left for a port')


def _make(number: str, wanted: tuple[str, ...]) -> list[Op]:
    return [
        Op.mkdir(f'{PORTS}/{number}'),
        *(
            Op.put(f'{PORTS}/{number}/{field}', text)
            for field, text in zip(FIELDS, wanted, strict=True)
        ),
    ]
