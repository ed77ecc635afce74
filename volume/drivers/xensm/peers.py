# SPDX-License-Identifier: Apache-2.0
"""The other pools that volumes may be lent to, by their uuids.

A volume is lent only to a pool that can be asked: nobody else could say
that it has been given back.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from volume import errors
from volume.node import Node
from volume.xenapi import plugs
from volume.xenapi import poolfile
from volume.xenapi import wire
from volume.xenapi.link import Link


class Peers:
    """Links to the pools that the option ``peers`` names."""

    def __init__(
        self,
        paths: Sequence[str],
        node: Node,
        connect: wire.Connect = wire.XenWire,
    ) -> None:
        self._paths = tuple(paths)
        self._node = node
        self._connect = connect
        self._guard = threading.Lock()
        self._links: dict[str, Link] = {}
        self._known: dict[str, str] = {}  # path by the pool's uuid

    def find(self, pool_uuid: str) -> Link:
        """Return the link to a pool.

        :raises Unsupported: no peer is that pool
        :raises Unavailable: a peer that may be it cannot be asked
        """
        with self._guard:
            if pool_uuid in self._known:
                return self._links[self._known[pool_uuid]]
            silent = []
            for path in self._paths:
                if path in self._known.values():
                    continue
                try:
                    found = str(plugs.pool(self._link(path))['uuid'])
                except errors.VolumeError as failed:
                    silent.append(f'{path}: {failed}')
                    continue
                self._known[found] = path
                if found == pool_uuid:
                    return self._links[path]
        if silent:
            raise errors.Unavailable(
                f'pool {pool_uuid} may be one that cannot be asked now: '
                f'{"; ".join(silent)}'
            )
        raise errors.Unsupported(
            f'pool {pool_uuid} is none of the option peers: what is lent to '
            'a pool that cannot be asked could never be proved to be back'
        )

    def _link(self, path: str) -> Link:
        if path not in self._links:
            self._links[path] = Link(
                poolfile.load(path).settings, self._node, self._connect
            )
        return self._links[path]
