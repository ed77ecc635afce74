# SPDX-License-Identifier: Apache-2.0
"""The driver ``xensm``: a pool of XenServer or XCP-ng hosts, its SRs pools.

It finds the SRs that its section names and hands each call to the
``Storage`` of the volume's pool. An SR that is away takes only its own
volumes with it: the others serve, and it comes back with the next check.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers.xensm import roles
from volume.drivers.xensm import storage
from volume.drivers.xensm.access import Access
from volume.drivers.xensm.copies import Copies
from volume.drivers.xensm.lun import LunStorage
from volume.drivers.xensm.single import SingleStorage
from volume.drivers.xensm.storage import Storage
from volume.drivers.xensm.streams import Streams
from volume.node import Node
from volume.xenapi import kinds
from volume.xenapi import options
from volume.xenapi import srs
from volume.xenapi import wire
from volume.xenapi.link import Link
from volume.xenapi.options import Settings
from volume.xenapi.srs import Sr

LOG = logging.getLogger(__name__)


class _Vhd(Copies, Streams, Access):
    """VDIs that the server makes, and shares the bytes of."""


class _Lun(LunStorage, Streams):
    """LUNs that are VDIs."""


class _Single(SingleStorage):
    """Volumes with an SR each."""

    inner = _Vhd


FAMILIES: Mapping[str, type[Storage]] = {
    'vhd': _Vhd, 'lvm': _Vhd, 'qcow2': _Vhd, 'array': _Vhd, 'lun': _Lun,
}
SINGLE: Mapping[str, type[Storage]] = {'vhd': _Single}


class XenSmDriver(
    base.Driver, base.Adopt, base.Clone, base.Describe, base.Extents,
    base.Flatten, base.Move, base.NativeAccess, base.Resize, base.Revert,
    base.Snapshots, base.Upkeep,
):
    """Storage repositories of a pool, through its own storage manager."""

    options = options.OPTIONS
    abilities = model.Abilities(auth=('pool',))

    def __init__(
        self, conf: Any, node: Node, connect: wire.Connect = wire.XenWire
    ) -> None:
        self.conf = conf
        self.node = node
        self._connect = connect
        self._guard = threading.Lock()
        self._opened: tuple[Settings, Link] | None = None
        self._storages: dict[str, Storage] = {}
        self._troubles: dict[str, str] = {}
        self._may_do = False  # the user's roles are known to do

    def check(self) -> None:
        settings, link = self._open()
        if not self._may_do:
            roles.check(link, settings)
            self._may_do = True
        found = self._find(settings, link)
        troubles: dict[str, errors.VolumeError] = {}
        for name, each in found.items():
            try:
                if isinstance(each, errors.VolumeError):
                    raise each
                each.check()
            except errors.VolumeError as failed:
                troubles[name] = failed
                if self._troubles.get(name) != str(failed):
                    LOG.warning('pool %s is away: %s', name, failed)
        self._troubles = {n: str(each) for n, each in troubles.items()}
        if troubles and len(troubles) == len(found):
            raise next(iter(troubles.values()))

    def pools(self) -> list[model.Pool]:
        found, failures = [], []
        for each in list(self._storages.values()):
            try:
                found.append(each.pool())
            except errors.VolumeError as failed:
                failures.append(failed)
        if failures and not found:
            raise failures[0]
        return found

    def create(self, volume: model.Volume) -> str:
        return self._of(volume).create(volume)

    def delete(self, volume: model.Volume) -> None:
        self._of(volume).delete(volume)

    def inspect(self, volume: model.Volume) -> model.Found:
        return self._of(volume).inspect(volume)

    def scan(self, pool: str) -> Iterator[model.Found]:
        return self._storage(pool).scan()

    def reader(
        self, source: model.Volume | model.Snapshot
    ) -> AbstractContextManager[base.Reader]:
        return self._of(source).reader(source)

    def writer(
        self, volume: model.Volume
    ) -> AbstractContextManager[base.Writer]:
        return self._of(volume).writer(volume)

    # Adopt.

    def adopt(self, handle: str, volume: model.Volume) -> str:
        return self._of(volume, 'Adopt').adopt(handle, volume)

    def disown(self, volume: model.Volume) -> None:
        self._of(volume, 'Adopt').disown(volume)

    # Clone.

    def clone(
        self, source: model.Volume | model.Snapshot, volume: model.Volume
    ) -> str:
        return self._of(volume, 'Clone').clone(source, volume)

    # Describe.

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        self._of(volume, 'Describe').describe(volume, sidecar)

    # Extents.

    def extents(
        self,
        source: model.Volume | model.Snapshot,
        since: model.Snapshot | None,
    ) -> Iterator[model.Extent]:
        return self._of(source, 'Extents').extents(source, since)

    # Flatten.

    def flatten(
        self, volume: model.Volume, watch: Callable[[float], None]
    ) -> str:
        return self._of(volume, 'Flatten').flatten(volume, watch)

    # Move.

    def move(self, volume: model.Volume, pool: str) -> str:
        return self._of(volume, 'Move').move(volume, self._storage(pool))

    # NativeAccess.

    def grant(
        self, volume: model.Volume, host: model.Host, access: model.Access
    ) -> model.Connection:
        return self._of(volume, 'NativeAccess').grant(volume, host, access)

    def revoke(self, volume: model.Volume, host: model.Host) -> None:
        self._of(volume, 'NativeAccess').revoke(volume, host)

    # Resize.

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        self._of(volume, 'Resize').resize(volume, size_bytes)

    # Revert.

    def revert(self, snapshot: model.Snapshot) -> str:
        return self._of(snapshot, 'Revert').revert(snapshot)

    # Snapshots.

    def snapshot(self, snapshot: model.Snapshot) -> str:
        return self._of(snapshot, 'Snapshots').snapshot(snapshot)

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        self._of(snapshot, 'Snapshots').delete_snapshot(snapshot)

    # Upkeep.

    def upkeep(self, pool: str) -> bool:
        return self._storage(pool).upkeep()

    # Ours alone.

    def _of(
        self, thing: model.Volume | model.Snapshot, feature: str = ''
    ) -> Storage:
        """Return the storage of a volume's pool.

        :raises Unsupported: the pool lacks the feature
        """
        volume = thing if isinstance(thing, model.Volume) else thing.volume
        found = self._storage(volume.pool)
        if feature and feature not in found.features():
            raise errors.Unsupported(
                f'pool {volume.pool}: an SR of type {found.kind.type} has no '
                f'{feature} here'
            )
        return found

    def _storage(self, pool: str) -> Storage:
        """Return the storage of a pool, known or not yet.

        :raises Invalid: the section names no such pool
        :raises Unavailable: its SR has not been found yet
        """
        found = self._storages.get(pool)
        if found is not None and found.abilities:
            return found
        settings, link = self._open()
        if pool not in self._names(settings):
            raise errors.Invalid(f'this backend has no SR called {pool}')
        each = self._find(settings, link)[pool]
        if isinstance(each, errors.VolumeError):
            raise errors.Unavailable(str(each)) from each
        if not each.abilities:
            each.check()
        return each

    def _open(self) -> tuple[Settings, Link]:
        """Return the pool's link; the section is read once it is right."""
        with self._guard:
            if self._opened is None:
                settings = options.read(self.conf)
                if not self.may_format:
                    # Nor plug anything in: somebody only looks.
                    settings = dataclasses.replace(settings, repair=False)
                self._opened = settings, Link(
                    settings, self.node, self._connect
                )
            return self._opened

    @staticmethod
    def _names(settings: Settings) -> tuple[str, ...]:
        return settings.sr_uuids or (settings.sr_name,)

    def _find(
        self, settings: Settings, link: Link
    ) -> dict[str, Storage | errors.VolumeError]:
        """Return each pool's storage, or why there is none yet."""
        found: dict[str, Storage | errors.VolumeError] = {}
        for name in self._names(settings):
            there = self._storages.get(name)
            if there is None:
                try:
                    sr = self._find_sr(settings, link, name)
                    _check_type(settings, name, sr)
                    _check_keys(settings, name, srs.pbds(link, sr))
                    there = self._storages[name] = storage.make(
                        SINGLE if settings.sr_per_volume else FAMILIES,
                        link, settings, self.node, name, sr,
                    )
                except errors.VolumeError as failed:
                    found[name] = failed
                    continue
            found[name] = there
        return found

    def _find_sr(self, settings: Settings, link: Link, name: str) -> Sr:
        """Return the SR of a pool; made known, or made, if so it shall be.

        :raises Invalid: there is none, and none may be made
        """
        if settings.sr_uuids:
            sr = srs.by_uuid(link, name)
            if sr is not None:
                return sr
            if settings.kind is None or not settings.device_config:
                raise errors.Unavailable(
                    f'the pool knows no SR {name}: introduce it, or give '
                    'sr_type and device_config, so that the service does'
                )
            if not self.may_format:
                raise errors.Unavailable(
                    f'the pool does not know SR {name} yet: the service '
                    'introduces it when it starts'
                )
            return srs.introduce(
                link, name, settings.sr_name or f'volumes {name[:8]}',
                settings.kind, settings.device_config, settings.sm_config,
            )
        sr = srs.by_name(link, name)
        if sr is not None and not settings.create:
            return sr
        if sr is not None and srs.is_served(link, sr, srs.pbds(link, sr)):
            srs.sweep_lock(link, name, link.originator)
            return sr
        if not settings.create or settings.kind is None:
            raise errors.Invalid(
                f'the pool has no SR called {name!r}: name one that it has, '
                'or say create = true to have it formatted'
            )
        if sr is None and not self.may_format:
            srs.refuse_used(
                link, srs.pool(link)[1]['master'], settings.kind,
                settings.device_config, settings.sm_config,
            )
            raise errors.Unavailable(
                f'the pool has no SR called {name!r} yet: the service '
                'formats one when it starts'
            )
        return srs.create(
            link, name, settings.kind, settings.device_config,
            settings.sm_config, link.originator,
        )


def _check_type(settings: Settings, name: str, sr: Sr) -> None:
    """Refuse an SR that is not what the section says.

    :raises Invalid: it is of another type
    """
    if settings.kind is not None and kinds.find(sr.type) != settings.kind:
        raise errors.Invalid(
            f'SR {name} of the pool is of type {sr.type}, and sr_type is '
            f'{settings.kind.type}: correct sr_type and device_config, or '
            'name another SR'
        )


def _check_keys(
    settings: Settings, name: str, pbds: Iterable[srs.Pbd]
) -> None:
    """Refuse an SR of the right name that lies elsewhere.

    Who names it by its uuid is right, whatever the keys say; they are used
    for hosts that have lost it. Secrets are told by no server.

    :raises Invalid: a host reaches it by another key than the section has
    """
    for pbd in pbds:
        for key, wanted in settings.device_config.items():
            found = pbd.device_config.get(key, '')
            if kinds.is_secret(key) or found == wanted:
                continue
            text = (
                f'device_config has {key}={wanted}, and the hosts of the '
                f'pool reach SR {name} by '
                + (f'{key}={found}' if found else f'keys without {key}')
            )
            if found and not settings.sr_uuids:
                raise errors.Invalid(
                    f'{text}: correct device_config, give another sr_name, '
                    'or name the SR by sr_uuid'
                )
            LOG.warning('%s', text)
