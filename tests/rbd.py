# SPDX-License-Identifier: Apache-2.0
"""The rbd driver over a real cluster: pools that a whole class shares."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from tests import ceph
from volume.drivers.rbd import options
from volume.drivers.rbd.driver import RbdDriver
from volume.drivers.rbd.options import Settings
from volume.drivers.rbd.wire import Wire
from volume.node import Node
from volume.testing import fixtures
from volume.testing import workbench

USER = 'volumes'
USER_SNAPSHOT = 0


@functools.cache
def user() -> str:
    """Make the user of the service, with the least that it needs."""
    ceph.cluster().user(
        USER, 'mon', 'profile rbd', 'osd', 'profile rbd', 'mgr',
        'profile rbd',
    )
    return USER


class Lasting(Wire):
    """A connection that several drivers share, and none closes."""

    def close(self) -> None:
        """Stay."""


@functools.cache
def lasting(settings: Settings) -> Lasting:
    return Lasting(settings)


@functools.cache
def pools(kind: str) -> list[str]:
    """Make two pools, once a process: that takes longer than most tests."""
    return [ceph.cluster().pool() for _ in range(2)]


class Pools(workbench.Case):
    """Two pools, shared by all classes of a kind."""

    kind = 'clean'

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.cluster = ceph.cluster()
        cls.pool_names = pools(cls.kind)

    def clear(self, pool: str) -> None:
        """Remove every image of a pool, as no driver would."""
        conf = fixtures.settings(
            RbdDriver, ceph_conf=self.cluster.conf, ceph_user=user())
        wire = lasting(options.read(conf))
        ioctx, api = wire.ioctx(pool), wire.rbd.RBD()
        for name in api.list(ioctx):
            with wire.rbd.Image(ioctx, name) as image:
                for each in list(image.list_snaps()):
                    if each['namespace'] == USER_SNAPSHOT:
                        image.remove_snap(each['name'])
            api.trash_move(ioctx, name, 0)
        while left := list(api.trash_list(ioctx)):
            for each in left:
                # The parent of a clone goes in the next round.
                with contextlib.suppress(wire.rbd.ImageHasSnapshots):
                    api.trash_remove(ioctx, each['id'], True)

    def rbd(
        self, node: Node, connect: Any = None, **wished: Any
    ) -> RbdDriver:
        """Return a driver of the pools."""
        return RbdDriver(fixtures.settings(RbdDriver, **{
            'ceph_conf': self.cluster.conf, 'ceph_user': user(),
            'pools': self.pool_names, **wished,
        }), node, connect or Wire)
