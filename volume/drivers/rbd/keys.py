# SPDX-License-Identifier: Apache-2.0
"""Small sets of names that a pool keeps for us: the keys of an object."""

from __future__ import annotations

import contextlib

from volume import errors
from volume.drivers.rbd.link import Link
from volume.drivers.rbd.wire import Wire

PAGE = 1000


class Keys:
    """One set in each pool; adding and removing repeat."""

    def __init__(self, link: Link, name: str) -> None:
        self.link = link
        self.name = name

    def add(self, pool: str, key: str) -> None:
        def put(wire: Wire) -> None:
            ioctx = wire.ioctx(pool)
            with wire.rados.WriteOpCtx() as op:
                ioctx.set_omap(op, (key,), (b'',))
                ioctx.operate_write_op(op, self.name)

        self.link.do('add_key', put)

    def remove(self, pool: str, key: str) -> None:
        def drop(wire: Wire) -> None:
            ioctx = wire.ioctx(pool)
            with wire.rados.WriteOpCtx() as op:
                ioctx.remove_omap_keys(op, (key,))
                ioctx.operate_write_op(op, self.name)

        with contextlib.suppress(errors.NotFound):
            self.link.do('remove_key', drop)

    def some(self, pool: str) -> list[str]:
        """Return the first of them, in order."""

        def look(wire: Wire) -> list[str]:
            ioctx = wire.ioctx(pool)
            with wire.rados.ReadOpCtx() as op:
                found, _ = ioctx.get_omap_vals(op, '', '', PAGE)
                ioctx.operate_read_op(op, self.name)
                return [str(key) for key, _ in found]

        try:
            return self.link.ask('keys', look)
        except errors.NotFound:
            return []

    def has(self, pool: str, key: str) -> bool:
        def look(wire: Wire) -> bool:
            ioctx = wire.ioctx(pool)
            with wire.rados.ReadOpCtx() as op:
                found, _ = ioctx.get_omap_vals_by_keys(op, (key,))
                ioctx.operate_read_op(op, self.name)
                return any(True for _ in found)

        try:
            return self.link.ask('keys', look)
        except errors.NotFound:
            return False
