# SPDX-License-Identifier: Apache-2.0
"""An SR for each volume (``sr_per_volume``, on nfs and smb).

Such a volume can be attached to a VM of another pool, for its SR can go
there alone: this pool lets go of it first. A VHD SR takes itself for the
only user of its directory, and two pools on one of them destroy it.

The SR that the section names is the *home*: it says how much room there is,
and holds nothing. A volume's SR bears the volume's name, and the home's uuid
in ``volume:home``; the volume's snapshots lie in it as well. A clone would,
too, so that volumes are copied instead.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers.xensm import hosts
from volume.drivers.xensm import vdis
from volume.drivers.xensm.access import Access
from volume.drivers.xensm.storage import Storage
from volume.drivers.xensm.vdis import Thing
from volume.drivers.xensm.vdis import Vdi
from volume.drivers.xensm.vhd import VDI_TYPES
from volume.xenapi import failures
from volume.xenapi import plugs
from volume.xenapi import srs
from volume.xenapi import tasks
from volume.xenapi.link import Link
from volume.xenapi.srs import Sr

HOME = 'volume:home'
DESCRIPTION = 'One volume of volume-service: change or delete it there only.'
# What the server says of an SR in which its collector has not swept yet.
NOT_EMPTY = ('SR_NOT_EMPTY', 'SR_BACKEND_FAILURE_63')


class SingleStorage(Access):
    """An export; each volume on it has an SR of its own."""

    inner: ClassVar[type[Storage]]
    """The storage of one volume's SR."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._inners: dict[str, Storage] = {}
        self._known = threading.Lock()
        self._in_doubt = True  # an earlier process may have asked for an SR

    def check(self) -> None:
        super().check()
        if not self.settings.repair:
            return
        lent = {
            vdi.sr for vdi in vdis.all_of(self.link)
            if vdi.id and hosts.lent_to(vdi, vdi.id)
        }
        for sr in self._ours():
            if sr.ref not in lent and not srs.is_served(
                self.link, sr, srs.pbds(self.link, sr)
            ):
                srs.repair(self.link, sr, self.settings.device_config)

    # The contract.

    def create(self, volume: model.Volume) -> str:
        inner = self._find_inner(volume)
        if inner is None:
            inner = self._make(volume)
        return inner.create(volume)

    def delete(self, volume: model.Volume) -> None:
        vdi = vdis.find(self.link, volume)
        if vdi is not None:
            hosts.need_home(vdi, volume.id)
            sr: Sr | None = srs.get(self.link, vdi.sr)
            assert sr is not None
            self._inner(sr).delete(volume)
        else:
            sr = srs.by_name(self.link, vdis.name(volume))
        if sr is None:
            self.need_served()
            return
        self._destroy(sr, volume)
        with self._known:
            self._inners.pop(sr.uuid, None)

    def inspect(self, volume: model.Volume) -> model.Found:
        return self._need_inner(volume).inspect(volume)

    def scan(self) -> Iterator[model.Found]:
        self.need_served()
        ours = {sr.ref for sr in self._ours()}
        for vdi in vdis.all_of(self.link):
            if vdi.sr in ours and vdi.managed and (
                vdi.type in VDI_TYPES and not vdi.is_passing
            ):
                yield vdi.found(vdi.id)

    def reader(self, source: Thing) -> AbstractContextManager[base.Reader]:
        return self._need_inner(source).reader(source)

    def writer(
        self, volume: model.Volume
    ) -> AbstractContextManager[base.Writer]:
        return self._need_inner(volume).writer(volume)

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        self._need_inner(volume).describe(volume, sidecar)

    def extents(
        self, source: Thing, since: model.Snapshot | None
    ) -> Iterator[model.Extent]:
        return self._need_inner(source).extents(source, since)

    def flatten(
        self, volume: model.Volume, watch: Callable[[float], None]
    ) -> str:
        return self._need_inner(volume).flatten(volume, watch)

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        self._need_inner(volume).resize(volume, size_bytes)

    def revert(self, snapshot: model.Snapshot) -> str:
        return self._need_inner(snapshot).revert(snapshot)

    def snapshot(self, snapshot: model.Snapshot) -> str:
        return self._need_inner(snapshot).snapshot(snapshot)

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        inner = self._find_inner(snapshot)
        if inner is None:
            self.need_served()
            return
        inner.delete_snapshot(snapshot)

    def upkeep(self) -> bool:
        more = False
        for inner in list(self._inners.values()):
            with contextlib.suppress(errors.NotFound):
                more = inner.upkeep() or more
        return more

    def find(self, thing: Thing) -> Vdi | None:
        found = vdis.find(self.link, thing)
        if found is None:
            self.need_served()
        return found

    # Lending.

    def place(self, volume: model.Volume, vdi: Vdi) -> hosts.Place:
        return hosts.Place(
            self.link, srs.get(self.link, vdi.sr), vdi, volume.id,
            _Lender(self, vdi),
        )

    # Ours alone.

    def _ours(self) -> list[Sr]:
        """Return the SRs of our volumes, those that are lent too."""
        return [
            Sr.of(ref, record) for ref, record
            in self.link.call('SR.get_all_records').items()
            if record['other_config'].get(HOME) == self.sr_uuid
        ]

    def _find_inner(self, thing: Thing) -> Storage | None:
        """Return the storage of a volume's own SR, if there is one.

        :raises Busy: another pool has it
        """
        volume = thing if isinstance(thing, model.Volume) else thing.volume
        vdi = vdis.find(self.link, volume)
        if vdi is not None:
            hosts.need_home(vdi, volume.id)
            return self._inner(srs.get(self.link, vdi.sr))
        sr = srs.by_name(self.link, vdis.name(volume))
        if sr is None:
            return None
        self._mark(sr)
        return self._inner(sr)

    def _need_inner(self, thing: Thing) -> Storage:
        """:raises NotFound: the volume has no SR"""
        found = self._find_inner(thing)
        if found is None:
            self.need_served()
            kind = type(thing).__name__.lower()
            raise errors.NotFound(f'no SR holds {kind} {thing.id}')
        return found

    def _inner(self, sr: Sr) -> Storage:
        with self._known:
            found = self._inners.get(sr.uuid)
            if found is None:
                found = self._inners[sr.uuid] = self.inner(
                    self.link, self.settings, self.node, self.name,
                    self.kind, sr.uuid,
                )
        found.sr_ref = sr.ref
        found.abilities, found.formats = self.abilities, self.formats
        return found

    def _make(self, volume: model.Volume) -> Storage:
        """Make the SR of a volume; it was looked for by its name before."""
        name = vdis.name(volume)
        self.need_served()
        if self._in_doubt:
            srs.refuse_pending(self.link)
            self._in_doubt = False
        try:
            ref = self.task(
                'SR.create', srs.pool(self.link)[1]['master'],
                dict(self.settings.device_config), '0', name, DESCRIPTION,
                self.kind.type, 'user', True, dict(self.settings.sm_config),
                label=name,
            )
        except errors.Unknown:
            self._in_doubt = True
            raise
        sr = srs.get(self.link, ref)
        self._mark(sr)
        if not srs.is_served(self.link, sr, srs.pbds(self.link, sr)):
            srs.repair(self.link, sr, self.settings.device_config)
        return self._inner(sr)

    def _mark(self, sr: Sr) -> None:
        if HOME not in sr.keys:
            with plugs.fine('MAP_DUPLICATE_KEY'):
                self.link.call(
                    'SR.add_to_other_config', sr.ref, HOME, self.sr_uuid
                )

    def _destroy(self, sr: Sr, volume: model.Volume) -> None:
        """Destroy the SR of a volume that is gone.

        :raises Busy: something is left in it
        """
        left = [
            vdi for vdi in vdis.all_of(self.link, sr.ref) if vdi.managed
        ]
        if left:
            raise errors.Busy(
                f'the SR of volume {volume.id} holds {len(left)} more VDIs, '
                f'such as {left[0].name or left[0].uuid}: remove them first'
            )
        if not srs.pbds(self.link, sr):
            self.take_back(sr)  # by a PBD the server finds what to remove
        self.let_go(sr, destroys_pbds=False)
        try:
            self.task('SR.destroy', sr.ref, label=sr.name)
        except errors.VolumeError as failed:
            if isinstance(failed, errors.NotFound):
                return
            if failures.code(failed) in NOT_EMPTY:
                # The server's collector works on what is plugged in.
                self.take_back(sr)
                raise errors.Busy(
                    f'the server still frees what volume {volume.id} held'
                ) from failed
            raise

    def let_go(self, sr: Sr, *, destroys_pbds: bool = True) -> None:
        """Unplug an SR from all hosts of this pool, and prove it.

        A host plugs in all its PBDs when it starts. So those of an SR that
        another pool has do not stay.
        """
        with self.turn():
            plugs.unplug_sr(self.link, sr.ref)
            if destroys_pbds:
                for pbd in plugs.pbds(self.link, sr.ref):
                    with plugs.fine(*plugs.GONE):
                        self.link.call('PBD.destroy', pbd)

    def take_back(self, sr: Sr) -> None:
        """Plug an SR in again where it belongs.

        :raises Unavailable: it cannot be, where it matters
        """
        with self.turn():
            troubles = srs.repair(
                self.link, sr, self.settings.device_config
            )
            sr = srs.get(self.link, sr.ref)
            if not srs.is_served(self.link, sr, srs.pbds(self.link, sr)):
                raise errors.Unavailable(
                    f'SR {sr.uuid} is not plugged in again: '
                    f'{"; ".join(troubles) or "it has no PBD"}'
                )
            tasks.run(self.link, 'SR.scan', (sr.ref,), sr.name)


class _Lender:
    """Lends a volume's SR."""

    def __init__(self, storage: SingleStorage, vdi: Vdi) -> None:
        self._storage = storage
        self._vdi = vdi

    def let_go(self) -> None:
        self._storage.refuse_plugged(self._vdi, 'lend')
        self._storage.let_go(self._sr())

    def take_back(self) -> None:
        self._storage.take_back(self._sr())

    def device_config(self) -> Mapping[str, str]:
        return self._storage.settings.device_config

    def end_in(self, peer: Link) -> None:
        ref = plugs.find(peer, 'SR', self._sr().uuid)
        if ref is None:
            return
        if plugs.is_brought(peer, ref):
            plugs.forget_sr(peer, ref)
        elif not plugs.in_use(peer, ref):
            plugs.unplug_sr(peer, ref)
        if plugs.find(peer, 'SR', self._sr().uuid) is not None and any(
            pbd['currently_attached']
            for pbd in plugs.pbds(peer, ref).values()
        ):
            raise errors.Busy(
                f'SR {self._sr().uuid} is still in use in the other pool: '
                'something of it is plugged in there'
            )

    def _sr(self) -> Sr:
        return srs.get(self._storage.link, self._vdi.sr)
