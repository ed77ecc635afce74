# SPDX-License-Identifier: Apache-2.0
"""The transport: librados and librbd, through Debian's Python modules.

They are no packages of PyPI. In a virtual environment the two are linked
into it, and nothing else of the system's Python: ``tools/link_ceph.py``.
"""

from __future__ import annotations

import datetime
import importlib
import json
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume.drivers.rbd import failures
from volume.drivers.rbd.options import Settings

# An address is never used again, so a block need not end soon; it must not
# end while a host may still have the image open.
BLOCK_S = 5 * 365 * 86400


class Wire:
    """One connection to a cluster. Everything here may block.

    Attribute ``rbd`` is the module; ``ioctx`` gives what its functions want.
    """

    def __init__(self, settings: Settings) -> None:
        self.rados, self.rbd = load('rados'), load('rbd')
        self.failures = self.rados.Error, self.rbd.Error
        self.features = sum(
            getattr(self.rbd, 'RBD_FEATURE_' + name.upper().replace('-', '_'))
            for name in settings.features
        )
        try:
            self._cluster = self._connect(settings)
        except self.failures as failed:
            raise failures.no_connection(
                f'client.{settings.user} by {settings.conf}', failed
            ) from failed
        self._ioctxs: dict[str, Any] = {}

    def _connect(self, settings: Settings) -> Any:
        timeout = str(settings.timeout_s)
        cluster = self.rados.Rados(
            conffile=settings.conf, rados_id=settings.user,
            clustername=settings.cluster, conf={
                'client_mount_timeout': timeout,
                'rados_mon_op_timeout': timeout,
                'rados_osd_op_timeout': timeout,
                # With two, as it comes, librados 16.2 uses memory that one
                # of them has given back (tests/integration/test_rbd_memory).
                'librados_thread_count': '1',
                # What a call has answered is stored, and not in a cache
                # whose errors are told to nobody.
                'rbd_cache': 'false',
                # A snapshot can go while clones of it live.
                'rbd_default_clone_format': '2',
                # librbd blocks whose lock it breaks, by itself for an hour;
                # and of two blocks of a client the first one stays.
                'rbd_blocklist_expire_seconds': str(BLOCK_S),
            },
        )
        cluster.connect(timeout=settings.timeout_s)
        return cluster

    def close(self) -> None:
        for ioctx in self._ioctxs.values():
            ioctx.close()
        self._cluster.shutdown()

    def ioctx(self, pool: str) -> Any:
        """Return what is called the context of a pool.

        :raises Unavailable: there is no such pool
        """
        if pool not in self._ioctxs:
            try:
                found = self._cluster.open_ioctx(pool)
            except self.rados.ObjectNotFound as gone:
                raise errors.Unavailable(
                    f'the cluster has no pool {pool}: make it, and "rbd pool '
                    'init" it'
                ) from gone
            self._ioctxs.setdefault(pool, found)
        return self._ioctxs[pool]

    def ioctx_of(self, pool_id: int) -> Any:
        """Return the context of a pool that is known by its number."""
        return self.ioctx(self._cluster.pool_reverse_lookup(pool_id))

    def command(self, prefix: str, **words: Any) -> Any:
        """Ask the monitors; return what they answer."""
        asked = json.dumps({'prefix': prefix, 'format': 'json', **words})
        code, answer, text = self._cluster.mon_command(
            asked, b'', timeout=int(self._cluster.conf_get(
                'rados_mon_op_timeout').partition('.')[0]),
        )
        if code:
            raise self.rados.OSError(text or prefix, abs(code))
        text = answer.decode().strip()
        # Some commands say in words, after it, how much they have found.
        return json.JSONDecoder().raw_decode(text)[0] if text else None

    def fsid(self) -> str:
        return str(self._cluster.get_fsid())

    def client(self) -> int:
        """Return the number by which the cluster knows this client."""
        return int(self._cluster.get_instance_id())

    def block(self, address: str) -> None:
        """Have the cluster refuse all that a client sends from now on."""
        self._cluster.blocklist_add(address, BLOCK_S)
        self._cluster.wait_for_latest_osdmap()

    def blocked_until(self, address: str) -> datetime.datetime | None:
        """Return the end of a client's block; None if there is none."""
        for each in self.command('osd blocklist ls') or ():
            if each['addr'] == address:
                return datetime.datetime.fromisoformat(each['until'])
        return None

    def watchers(self, image: Any) -> list[Mapping[str, Any]]:
        """Return who has an image open to be written."""
        return list(image.watchers_list())

    def lockers(self, image: Any) -> list[tuple[str, str, str]]:
        """Return client, cookie and address of who held the lock.

        As of when the image was opened.
        """
        found = image.list_lockers()
        return list(found['lockers']) if found else []


def load(name: str) -> Any:
    """Return the module ``rados`` or ``rbd``.

    :raises Unavailable: this environment has none
    """
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        raise errors.Unavailable(
            f'the module {name} of Ceph is not here: install the Debian '
            f'packages python3-rbd and python3-rados and, in a virtual '
            f'environment, run tools/link_ceph.py ({missing})'
        ) from missing
