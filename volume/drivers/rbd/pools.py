# SPDX-License-Identifier: Apache-2.0
"""How large pools are, and which release the cluster runs.

Of capacities the monitors know all: no image is opened for them.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from volume import errors
from volume import model
from volume.drivers.rbd import images
from volume.drivers.rbd.link import Link
from volume.drivers.rbd.tending import Tending
from volume.drivers.rbd.wire import Wire

LOG = logging.getLogger(__name__)

# The first releases of a series without the flaws in cephx that were found
# in 2025 and 2026 (OSSN-0108); what is newer than all of them has none.
SECURE = {19: (19, 2, 6), 20: (20, 2, 4)}
VERSION = re.compile(r'ceph version (\d+)\.(\d+)\.(\d+)')


class Pools:
    """The pools of a section."""

    def __init__(self, link: Link, tending: Tending) -> None:
        self.link = link
        self.tending = tending
        self._devices: dict[str, str] = {}

    def check(self) -> None:
        """Look whether all pools are there, and what runs them.

        :raises Unavailable: a pool is not there, or the release is refused
        """
        fsid = self.link.ask('fsid', lambda wire: wire.fsid())
        for pool in self.link.settings.pools:
            rule = self.link.ask('rule', functools.partial(_rule, pool))
            # Pools of one rule lie on the same disks.
            self._devices[pool] = f'ceph:{fsid}:{rule["crush_rule"]}'
        self._check_release()

    def pools(self, features: frozenset[str]) -> list[model.Pool]:
        answer = self.link.ask(
            'df', lambda wire: wire.command('df', detail='detail'))
        stats = {each['name']: each['stats'] for each in answer['pools']}
        found = []
        for name in self.link.settings.pools:
            if name not in stats:
                raise errors.Unavailable(
                    f'the cluster has no figures for pool {name}: see to its '
                    'manager'
                )
            stored = int(stats[name].get('stored', 0))
            free = int(stats[name]['max_avail'])
            quota = int(stats[name].get('quota_bytes', 0))
            if quota:
                free = min(free, max(quota - stored, 0))
            found.append(model.Pool(
                name, stored + free, free, thin=True, features=features,
                max_volume_bytes=images.MAX_BYTES,
                hidden_bytes=self.tending.hidden_bytes(name),
                device=self._devices.get(name, ''),
            ))
        return found

    def _check_release(self) -> None:
        answer = self.link.ask('versions', lambda wire: wire.command(
            'versions'))
        old = sorted(
            name for name in answer.get('overall', {}) if not is_secure(name)
        )
        if not old:
            return
        words = (
            f'daemons of the cluster run {old[0]:.40}, whose cephx has known '
            'flaws (OSSN-0108): upgrade to 19.2.6, 20.2.4 or newer, and '
            'change the keys'
        )
        if self.link.settings.require_secure:
            raise errors.Unavailable(words)
        LOG.warning('%s', words)


def _rule(pool: str, wire: Wire) -> Any:
    wire.ioctx(pool)  # says in our words that there is no such pool
    return wire.command('osd pool get', pool=pool, var='crush_rule')


def is_secure(name: str) -> bool:
    """Say whether a release has none of the known flaws."""
    found = VERSION.match(name)
    if found is None:
        return False
    version = int(found[1]), int(found[2]), int(found[3])
    if version[0] in SECURE:
        return version >= SECURE[version[0]]
    return version[0] > max(SECURE)
