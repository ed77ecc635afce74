# SPDX-License-Identifier: Apache-2.0
"""Volumes that the server allocates: a VDI for each, made by ``VDI.create``.

So it is on file systems and LVM (VHD or QCOW2), and on arrays. Creating is
made repeatable by the name: a VDI of the volume's name and keys is the
volume. A create whose reply was lost may still go on at the server; until
its task is over nobody makes another.

A volume costs three calls: one by which it is not found (``inspect``, just
before), one by which it is made, its note included, and one by which its
uuid is learned.
"""

from __future__ import annotations

import collections
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from volume import errors
from volume import model
from volume.drivers.xensm import vdis
from volume.drivers.xensm.storage import Storage
from volume.drivers.xensm.vdis import Vdi
from volume.xenapi import tasks
from volume.xenapi.options import UUID

LOG = logging.getLogger(__name__)

# How long "there is none" is relied on: far less than a lease lasts.
ABSENT_S = 5.0
SETTLED_S = 10.0
BORN_MAX = 1000
VDI_TYPES = ('user', 'system')


class VhdStorage(Storage):
    """An SR on which the server makes VDIs of any size."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._memory = threading.Lock()
        # When a volume was looked for and not found; notes written at birth.
        self._absent: dict[str, float] = {}
        self._born: collections.OrderedDict[str, tuple[str, str]] = (
            collections.OrderedDict())
        # Before this no create of ours, or of a predecessor, is pending.
        self._settled_at = -SETTLED_S

    def create(self, volume: model.Volume) -> str:
        self._check_size(volume)
        with self.turn():
            if not self._was_just_missed(volume.id):
                self._settle()
                found = self.find(volume)
                if found is not None:
                    return self._same(found, volume)
            note = _text(volume.note) if volume.note else ''
            started = time.monotonic()
            try:
                ref = self.link.call('VDI.create', vdis.record(
                    volume, self.ref(), self.rounded(volume.size_bytes),
                    {**self.kind.vdi_config, **self.settings.vdi_config},
                    keys_too=self._keys_too(volume.size_bytes, note),
                ))
            except errors.Unknown:
                self._settled_at = -SETTLED_S
                raise
            self.was_served(started)
            made = vdis.get(self.link, ref)
        with self._memory:
            self._born[volume.id] = ref, note
            while len(self._born) > BORN_MAX:
                self._born.popitem(last=False)
        return self._same(made, volume)

    def delete(self, volume: model.Volume) -> None:
        with self._memory:
            self._born.pop(volume.id, None)
        found = self._look_for(volume)
        if found is None:
            # One that is still being made would be left over.
            self._settle()
            found = self._look_for(volume)
        if found is None:
            return
        self._refuse_snapshots(found, volume)
        self.destroy(found)

    def inspect(self, volume: model.Volume) -> model.Found:
        started = time.monotonic()
        try:
            return self.need(volume).found(volume.id)
        except errors.NotFound:
            with self._memory:
                self._absent = {
                    id: at for id, at in self._absent.items()
                    if started - at < ABSENT_S
                }
                self._absent[volume.id] = started
            raise

    def scan(self) -> Iterator[model.Found]:
        sr = self.need_served()
        found = [
            vdi for vdi in vdis.all_of(self.link, sr.ref)
            if vdi.managed and vdi.type in VDI_TYPES
        ]
        bearers: dict[str, list[Vdi]] = {}
        for vdi in found:
            if vdi.id:
                bearers.setdefault(vdi.id, []).append(vdi)
        for vdi in found:
            if vdi.is_passing:
                continue
            yield vdi.found(
                vdi.id if vdi.id and _is_own(vdi, bearers[vdi.id]) else None
            )

    # Adopt.

    def adopt(self, handle: str, volume: model.Volume) -> str:
        if not UUID.fullmatch(handle):
            raise errors.Invalid(f'{handle!r:.100} is not the uuid of a VDI')
        vdi = vdis.by_uuid(self.link, handle)
        if vdi is None or vdi.sr != self.sr().ref:
            self.need_served()
            raise errors.NotFound(f'SR {self.sr_uuid} has no VDI {handle}')
        if vdi.id == volume.id and vdi.of_id is None:
            return vdi.uuid
        self._refuse_foreign(vdi)
        other = self.find(volume)
        if other is not None:
            raise errors.Conflict(
                f'volume {volume.id} exists: VDI {handle} cannot become it'
            )
        link, ref = self.link, vdi.ref
        # Its keys may be a copy of another volume's. Ours comes last: only
        # then is it the volume.
        vdis.drop(link, ref, [k for k in vdis.KEYS if k in vdi.keys])
        vdis.put(link, ref, {
            vdis.OWN: vdi.uuid, vdis.WAS: vdi.keys.get(vdis.WAS, vdi.name),
        })
        with self.turn():
            link.call('VDI.set_name_label', ref, vdis.name(volume))
        link.call('VDI.add_tags', ref, vdis.TAG)
        vdis.put(link, ref, vdis.keys(volume))
        return vdi.uuid

    def disown(self, volume: model.Volume) -> None:
        vdi = self._look_for(volume)
        if vdi is None:
            return
        self._refuse_snapshots(vdi, volume)
        self.refuse_plugged(vdi, 'let go of')
        link, ref = self.link, vdi.ref
        if vdi.name == vdis.name(volume):
            with self.turn():
                link.call('VDI.set_name_label', ref, vdi.keys.get(
                    vdis.WAS, f'disowned-{volume.id}'
                ))
        link.call('VDI.remove_tags', ref, vdis.TAG)
        vdis.drop(link, ref, [k for k in vdis.KEYS if k in vdi.keys])

    # Describe.

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        text = _text(sidecar)
        with self._memory:
            ref, written = self._born.pop(volume.id, ('', ''))
        if ref and written == text:
            return
        vdi = self.need(volume)
        if vdi.keys.get(vdis.OWN) != vdi.uuid:
            vdis.put(self.link, vdi.ref, {vdis.OWN: vdi.uuid})
        if vdi.keys.get(vdis.NOTE) != text:
            vdis.put(self.link, vdi.ref, {vdis.NOTE: text})

    # Resize.

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        vdi = self.need(volume)
        wanted_bytes = self.rounded(size_bytes)
        if size_bytes > self.max_volume_bytes():
            raise errors.Invalid(
                f'volume {volume.id} cannot have {size_bytes} bytes: here '
                f'{self.max_volume_bytes()} are the most'
            )
        if wanted_bytes < vdi.size_bytes and size_bytes < vdi.size_bytes:
            raise errors.Invalid(
                f'volume {volume.id} has {vdi.size_bytes} bytes: it cannot '
                f'shrink to {size_bytes}'
            )
        if wanted_bytes > vdi.size_bytes:
            self._refuse_raw(vdi)
            self.patient_task(
                'VDI.resize', vdi, str(wanted_bytes),
                label=f'volume {volume.id}',
            )
        if vdis.SIZE in vdi.keys:
            vdis.put(self.link, vdi.ref, {vdis.SIZE: str(size_bytes)})

    # Ours alone.

    def _look_for(self, volume: model.Volume) -> Vdi | None:
        """Return a volume's VDI, also one whose name is not its own.

        A disown that did not come to its end has left it so.
        """
        return self.find(volume) or vdis.choose(
            vdis.all_of(self.link, self.ref()), volume)

    def _keys_too(self, size_bytes: int, note: str) -> dict[str, str]:
        keys = {vdis.FRESH: 'yes'}
        if note:
            keys[vdis.NOTE] = note
        if self.kind.family == 'array':
            # An array rounds as it likes.
            keys[vdis.SIZE] = str(size_bytes)
        return keys

    def _was_just_missed(self, id: str) -> bool:
        """Say whether a volume was looked for a moment ago, and is not there.

        Whoever makes it has its lease, and has had it since.
        """
        with self._memory:
            at = self._absent.pop(id, -ABSENT_S)
        return time.monotonic() - at < ABSENT_S

    def _settle(self) -> None:
        """Make sure that no earlier create may yet make its VDI.

        :raises Unavailable: one is pending at the server
        """
        started = time.monotonic()
        if started - self._settled_at < SETTLED_S:
            return
        # A call that is waited for may have no task; its SR shows it.
        if 'vdi_create' in self.sr().operations.values() or any(
            record['status'] in tasks.OPEN
            and record['name_label'].endswith('VDI.create')
            for record in self.link.call('task.get_all_records').values()
        ):
            raise errors.Unavailable(
                f'SR {self.sr_uuid}: a VDI is still being made; nobody '
                'knows for whom until it is there'
            )
        self._settled_at = started

    def _same(self, found: Vdi, volume: model.Volume) -> str:
        asked = found.keys.get(vdis.SIZE, '')
        sizes = (volume.size_bytes, self.rounded(volume.size_bytes))
        if asked != str(volume.size_bytes) and (
            asked or found.size_bytes not in sizes
        ):
            raise errors.Conflict(
                f'volume {volume.id} exists with {found.size_bytes} bytes, '
                f'not {volume.size_bytes}'
            )
        return found.uuid

    def _check_size(self, volume: model.Volume) -> None:
        size_bytes = volume.size_bytes
        most = self.max_volume_bytes()
        if size_bytes % model.SECTOR_BYTES or not 0 < size_bytes <= most:
            raise errors.Invalid(
                f'volume {volume.id} has {size_bytes} bytes: here a volume '
                f'has a positive multiple of {model.SECTOR_BYTES}, up to '
                f'{most}'
            )

    def _refuse_snapshots(self, vdi: Vdi, volume: model.Volume) -> None:
        if vdis.snapshots_of(self.link, vdi, volume):
            raise errors.Busy(
                f'volume {volume.id} has snapshots: delete them first'
            )

    def _refuse_raw(self, vdi: Vdi) -> None:
        if self.kind.family == 'vhd' and (
            vdi.sm_config.get('type') == 'raw'
            or vdi.sm_config.get('image-format') == 'raw'
        ):
            raise errors.Unsupported(
                f'VDI {vdi.uuid} is raw: the server cannot grow it'
            )

    def _refuse_foreign(self, vdi: Vdi) -> None:
        """Refuse what cannot be a volume, or is another's."""
        if vdi.id:
            raise errors.Conflict(
                f'VDI {vdi.uuid} is ours already: {vdi.name}'
            )
        for is_wrong, why in (
            (not vdi.managed, 'a base copy, which others stand on'),
            (vdi.is_snapshot, 'a snapshot: clone it, and adopt the clone'),
            (vdi.type not in VDI_TYPES, f'of the type {vdi.type}'),
            (vdi.read_only, 'read-only'),
            (vdi.sharable, 'sharable'),
            (not vdi.size_bytes or vdi.size_bytes % model.SECTOR_BYTES,
             'not made of whole sectors'),
        ):
            if is_wrong:
                raise errors.Invalid(
                    f'VDI {vdi.uuid} cannot be a volume: it is {why}'
                )
        self.refuse_plugged(vdi, 'adopt')


def _text(sidecar: Mapping[str, str]) -> str:
    return json.dumps(dict(sidecar), sort_keys=True)


def _is_own(vdi: Vdi, bearers: list[Vdi]) -> bool:
    """Say whether a VDI is the one, of those that bear an id."""
    marked = [each for each in bearers if vdis.OWN in each.keys]
    return bearers == [vdi] or marked == [vdi]
