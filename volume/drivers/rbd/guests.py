# SPDX-License-Identifier: Apache-2.0
"""The hosts that were let in, as an image's metadata has them.

Whoever may write an image may write its metadata, too: what stands there is
what a host says. An entry that nobody can read is not nothing: its key says
that some host was let in. It is *unreadable*, and counts as a host of whom
neither name nor address is known.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping

from volume import model
from volume.drivers.rbd import headers
from volume.drivers.rbd import names

KEY = re.compile(rf'{re.escape(names.HOST)}[0-9a-f]{{32}}')


@dataclasses.dataclass(frozen=True, slots=True)
class Guests:
    """Who may have an image open."""

    hosts: tuple[model.Host, ...]
    unreadable: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.hosts or self.unreadable)

    def __str__(self) -> str:
        """Return one of them, in words."""
        if self.hosts:
            return f'host {self.hosts[0].name}'
        return f'a host that nobody knows ({", ".join(self.unreadable):.80})'


def entry(host: model.Host, addresses: list[str], access: str) -> str:
    """Return what is written of a host, under ``names.host``."""
    return json.dumps({
        'name': host.name, 'addresses': addresses, 'access': access,
    }, sort_keys=True)


def read(notes: Mapping[str, str]) -> Guests:
    """Return who was let in."""
    hosts, unreadable = [], []
    for key in sorted(filter(KEY.fullmatch, notes)):
        host = _host(key, notes[key])
        if host is None:
            unreadable.append(key)
        else:
            hosts.append(host)
    return Guests(tuple(hosts), tuple(unreadable))


def _host(key: str, text: str) -> model.Host | None:
    found = headers.parse(text)
    if not isinstance(found, dict):
        return None
    name, addresses = found.get('name'), found.get('addresses')
    if (
        isinstance(name, str) and names.host(name) == key
        and isinstance(addresses, list)
        and all(isinstance(each, str) for each in addresses)
    ):
        return model.Host(name, tuple(addresses))
    return None
