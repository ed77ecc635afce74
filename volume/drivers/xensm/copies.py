# SPDX-License-Identifier: Apache-2.0
"""Snapshots, clones and what is made of them: part of a storage.

Each is a birth (see ``births``), and may be repeated after any fault. What
takes a volume's place (revert, flatten) is prepared beside it under the role
``next``; then one call gives the old VDI the role ``old``, and from there on
the new one is the volume, whatever else is left to be done.

Where the chain is at its limit a snapshot waits, with a clear reason, for
what the server will merge by itself; if there is nothing, it becomes a copy
of all bytes, if no host uses the volume. A clone becomes a copy at once.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping

from volume import errors
from volume import model
from volume import progress
from volume.drivers.xensm import births
from volume.drivers.xensm import chains
from volume.drivers.xensm import vdis
from volume.drivers.xensm.births import Birth
from volume.drivers.xensm.storage import Storage
from volume.drivers.xensm.vdis import Thing
from volume.drivers.xensm.vdis import Vdi
from volume.drivers.xensm.vhd import VhdStorage
from volume.xenapi import failures
from volume.xenapi import handlers
from volume.xenapi import srs
from volume.xenapi import tasks

LOG = logging.getLogger(__name__)

SCAN_S = 600.0  # between two scans that nothing but upkeep asks for

Watch = Callable[[float], None]


class Copies(VhdStorage):
    """An SR whose VDIs share what they have in common."""

    _scanned_at = float('-inf')
    _is_worth_a_scan = True

    def snapshot(self, snapshot: model.Snapshot) -> str:
        there = self.find(snapshot)
        volume = self.need(snapshot.volume)
        with self.locked(volume.uuid):
            if there is None:
                there = self._bear_snapshot(volume, snapshot)
            else:
                self._unmark(volume, snapshot)
        return there.uuid

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        there = self.find(snapshot)
        if there is not None:
            self.destroy(there)

        def look() -> list[Vdi]:
            return [
                vdi for thing in (snapshot.volume, snapshot)
                for vdi in vdis.by_name(self.link, vdis.name(thing))
            ]

        self._undo_birth(look, snapshot)
        # A revert to it that nobody goes on with.
        self._undo_birth(look, snapshot.volume)
        self._is_worth_a_scan = True

    def delete(self, volume: model.Volume) -> None:
        was_there = self.find(volume) is not None
        super().delete(volume)
        label = vdis.name(volume)

        def look() -> list[Vdi]:
            if was_there:
                return vdis.by_name(self.link, label)
            return self.all_vdis()

        for vdi in look():
            if vdi.is_passing and vdi.keys.get(vdis.ID) == volume.id and (
                vdi.keys.get(vdis.OWN) == vdi.uuid
            ):
                self.destroy(vdi)
        self._undo_birth(look, volume)
        self._is_worth_a_scan = True

    def clone(self, source: Thing, volume: model.Volume) -> str:
        size_bytes = self.rounded(volume.size_bytes)
        if volume.size_bytes < source.size_bytes:
            raise errors.Invalid(
                f'volume {volume.id} would have {volume.size_bytes} bytes, '
                f'and its source {source.id} has {source.size_bytes}; make '
                'it as large'
            )
        there = self.find(volume)
        if there is not None:
            if there.size_bytes != size_bytes:
                raise errors.Conflict(
                    f'volume {volume.id} exists with {there.size_bytes} '
                    f'bytes, not {size_bytes}'
                )
            there_before = self.find(source)
            if there_before is not None:
                with self.locked(there_before.uuid):
                    self._unmark(there_before, volume)
            return there.uuid
        origin = self.need(source)
        if origin.sr != self.ref():
            raise errors.Unsupported(
                f'source {source.id} lies in another SR than volume '
                f'{volume.id} is to: it can only be copied'
            )
        if origin.size_bytes > size_bytes:
            raise errors.Invalid(
                f'volume {volume.id} would have {size_bytes} bytes, and its '
                f'source {source.id} has {origin.size_bytes}; make it as '
                'large'
            )

        def finish(child: Vdi) -> None:
            self._grow(child, size_bytes, vdis.name(volume))
            self._christen(child, volume, origin.keys)

        with self.locked(origin.uuid):
            return self._bear_clone(origin, volume, finish).uuid

    def revert(self, snapshot: model.Snapshot) -> str:
        origin, volume = self.need(snapshot), snapshot.volume
        with self.locked(volume.id), self.locked(origin.uuid):
            old = self._settled(volume)
            self.refuse_plugged(old, 'revert')
            if 'VDI_REVERT' in self.abilities and (
                origin.is_snapshot and origin.snapshot_of == old.ref
                and old.size_bytes == origin.size_bytes
            ):
                self.patient_task(
                    'VDI.revert', origin, label=vdis.name(volume))
                return old.uuid
            new = self._bear_clone(
                origin, volume,
                lambda child: self._succeed(child, old, volume),
            )
            return self._swap(old, new)

    def flatten(self, volume: model.Volume, watch: Watch) -> str:
        with self.locked(volume.id):
            old = self._settled(volume)
            self.refuse_plugged(old, 'flatten')
            everything = self.all_vdis()
            if self.snapshots_of(volume, everything):
                raise errors.Busy(
                    f'volume {volume.id} has snapshots: delete them before '
                    'it is flattened'
                )
            if chains.of(old, everything).depth == 1:
                return old.uuid
            with self.locked(old.uuid):
                new = births.bear(self.link, old, Birth(
                    volume,
                    lambda: self._copy_of(
                        old, self.ref(), vdis.name(volume), watch),
                    lambda child: self._succeed(child, old, volume),
                    by_bytes=True,
                ), self.destroy)
            return self._swap(old, new)

    def move(self, volume: model.Volume, target: Storage) -> str:
        with self.locked(volume.id):
            there = self._settled(volume)
            if there.sr == target.ref():
                return there.uuid
            self.refuse_plugged(there, 'move')
            if self.snapshots_of(volume, self.all_vdis()):
                raise errors.Busy(
                    f'volume {volume.id} has snapshots, which cannot move '
                    'with it: delete them first'
                )
            with self.locked(there.uuid):
                new = births.bear(self.link, there, Birth(
                    volume,
                    lambda: self._copy_of(
                        there, target.ref(), vdis.name(volume)),
                    lambda child: self._succeed(child, there, volume),
                    by_bytes=True,
                ), self.destroy)
            return self._swap(there, new)

    def upkeep(self) -> bool:
        """Sweep what was born and forgotten; have the server merge."""
        now = time.time()
        for vdi in self.all_vdis():
            if births.is_born(vdi) and births.is_stale(vdi, now):
                LOG.warning(
                    'VDI %s is a copy that nobody finished: destroyed',
                    vdi.uuid,
                )
                self.destroy(vdi)
        is_due = time.monotonic() > self._scanned_at + SCAN_S
        if self._is_worth_a_scan or is_due:
            self._is_worth_a_scan = False
            self._scanned_at = time.monotonic()
            srs.scan(self.link, self.sr())
        return False

    # What stands on these.

    def snapshots_of(
        self, volume: model.Volume, everything: list[Vdi]
    ) -> list[Vdi]:
        """Return our snapshots of a volume."""
        return [vdi for vdi in everything if vdi.of_id == volume.id]

    def all_vdis(self) -> list[Vdi]:
        """Return every VDI of the SR, base copies too."""
        return vdis.all_of(self.link, self.ref())

    # Births.

    def _bear_snapshot(
        self, volume: Vdi, snapshot: model.Snapshot
    ) -> Vdi:
        label = vdis.name(snapshot)

        def make() -> str:
            if self.settings.cbt and 'VDI_CONFIG_CBT' in self.abilities:
                self.link.call('VDI.enable_cbt', volume.ref)
            return self.task(
                'VDI.snapshot', volume.ref, {}, label=label)

        def rather_copy() -> None:
            self._need_copy(volume, snapshot)
            # The server will not list it among the volume's snapshots.
            vdis.put(self.link, volume.ref, {vdis.REVERTED: 'yes'})

        return self._bear(volume, Birth(
            snapshot, make,
            lambda child: self._christen(child, snapshot, volume.keys),
            is_snapshot=True,
        ), rather_copy)

    def _bear_clone(
        self, origin: Vdi, volume: model.Volume, finish: Callable[[Vdi], None]
    ) -> Vdi:
        if origin.sm_config.get('type') == 'raw':
            raise errors.Unsupported(
                f'{origin.name} is a raw VDI, which the server cannot clone')
        label = vdis.name(volume)
        return self._bear(origin, Birth(
            volume,
            lambda: self.task('VDI.clone', origin.ref, {}, label=label),
            finish,
        ))

    def _bear(
        self, origin: Vdi, birth: Birth,
        rather_copy: Callable[[], None] = lambda: None,
    ) -> Vdi:
        """Have it made, or copied if the chain is too long for it."""
        try:
            return births.bear(self.link, origin, birth, self.destroy)
        except errors.VolumeError as failed:
            if failures.code(failed) != failures.CHAIN_TOO_LONG:
                raise
        rather_copy()
        return births.bear(self.link, origin, dataclasses.replace(
            birth, by_bytes=True, make=lambda: self._copy_of(
                origin, self.ref(), vdis.name(birth.thing)),
        ), self.destroy)

    def _need_copy(self, volume: Vdi, snapshot: model.Snapshot) -> None:
        """Wait for the server if that helps; see that a copy can be made.

        :raises Busy: wait, or change something, and what
        """
        chain = chains.of(volume, self.all_vdis())
        if chain.can_shorten:
            srs.scan(self.link, self.sr())  # it begins by this
            raise errors.Busy(
                f'snapshot {snapshot.id} waits: {volume.name} has {chain}'
            )
        if vdis.guests(self.link, volume):
            raise errors.Busy(
                f'snapshot {snapshot.id} cannot be taken: {volume.name} has '
                f'{chain}; delete snapshots, or detach it, so that the '
                'snapshot can be a copy'
            )
        LOG.info(
            '%s has %s: snapshot %s becomes a copy', volume.name, chain,
            snapshot.id,
        )

    def _copy_of(
        self, origin: Vdi, sr: str, label: str, watch: Watch | None = None
    ) -> str:
        def tell(percent: float) -> None:
            progress.tell(
                int(origin.size_bytes * percent / 100), origin.size_bytes)

        # It does not lock the SR: nobody need wait for it.
        found: str = handlers.patiently(lambda: tasks.run(
            self.link, 'VDI.copy', (origin.ref, sr), label,
            self.settings.task_timeout_s, watch or tell,
        ))
        return found

    def _grow(self, vdi: Vdi, size_bytes: int, label: str) -> None:
        if vdi.size_bytes < size_bytes:
            self.patient_task(
                'VDI.resize', vdi, str(size_bytes), label=label)

    def _christen(
        self, child: Vdi, thing: Thing, born_with: Mapping[str, str]
    ) -> None:
        """Give a copy its name, and then, at once, all keys of its own."""
        if child.name != vdis.name(thing):
            self.link.call('VDI.set_name_label', child.ref, vdis.name(thing))
        self.link.call('VDI.set_other_config', child.ref, {
            **foreign_keys(born_with), **vdis.keys(thing),
            vdis.OWN: child.uuid,
        })

    def _unmark(self, source: Vdi, thing: Thing) -> None:
        """Take away what a birth that is complete has left on its source."""
        if self._asks_for(source, thing):
            vdis.drop(self.link, source.ref, [vdis.NEXT])

    def _asks_for(self, source: Vdi, thing: Thing) -> bool:
        mark = births.Mark.of(source)
        return not births.is_born(source) and (
            mark is not None and mark.id == thing.id
        )

    def _undo_birth(
        self, look: Callable[[], list[Vdi]], thing: Thing
    ) -> None:
        found = look()
        asked = [vdi for vdi in found if self._asks_for(vdi, thing)]
        if asked:
            # Its reply was lost, and it may only just be about to be born.
            births.need_quiet(self.link, asked[0])
            found = look()
        for vdi in births.unfinished(found, thing.id):
            self.destroy(vdi)
        for vdi in found:
            self._unmark(vdi, thing)

    # Successions.

    def _succeed(
        self, child: Vdi, old: Vdi, volume: model.Volume
    ) -> None:
        """Make a copy into the one that will take the volume's place."""
        label = vdis.name(volume)
        self._grow(child, old.size_bytes, label)
        if child.name != label:
            self.link.call('VDI.set_name_label', child.ref, label)
        self.link.call('VDI.set_other_config', child.ref, {
            **{key: value for key, value in old.keys.items()
               if key not in (vdis.NEXT, vdis.FRESH)},
            vdis.OWN: child.uuid, vdis.ROLE: vdis.HEIR,
            # The server takes the snapshots for the old one's.
            vdis.REVERTED: 'yes',
        })

    def _swap(self, old: Vdi, new: Vdi) -> str:
        """Let the new VDI be the volume, and remove the old one."""
        vdis.put(self.link, old.ref, {vdis.ROLE: vdis.RETIRED})
        vdis.drop(self.link, new.ref, [vdis.ROLE])
        self.destroy(old)
        self._is_worth_a_scan = True
        return new.uuid

    def _settled(self, volume: model.Volume) -> Vdi:
        """Return a volume's VDI, once what was left half done is undone."""
        self._sweep_roles(volume)
        return self.need(volume)

    def _sweep_roles(self, volume: model.Volume) -> None:
        """Finish a succession that was decided; undo one that was not."""
        own = [
            vdi for vdi in vdis.by_name(self.link, vdis.name(volume))
            if vdi.keys.get(vdis.ID) == volume.id
            and vdi.keys.get(vdis.OWN) == vdi.uuid
        ]
        heirs = [v for v in own if v.keys.get(vdis.ROLE) == vdis.HEIR]
        retired = [v for v in own if v.keys.get(vdis.ROLE) == vdis.RETIRED]
        if len(heirs) + len(retired) < len(own):
            for each in heirs + retired:
                self.destroy(each)
        elif len(heirs) == 1:
            vdis.drop(self.link, heirs[0].ref, [vdis.ROLE])
            for each in retired:
                self.destroy(each)


def foreign_keys(found: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a VDI that are none of ours."""
    return {
        key: value for key, value in found.items()
        if not key.startswith('volume:')
    }
