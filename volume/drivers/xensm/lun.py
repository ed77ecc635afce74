# SPDX-License-Identifier: Apache-2.0
"""LUN-per-VDI (``hba``, ``iscsi``, ``rawhba``): a volume is a whole LUN.

The server allocates nothing on these: it shows every LUN on the bus, others'
too. So only LUNs that option ``luns`` names are used; one that holds
something is refused unless ``luns_erase`` says otherwise; and none is handed
out that was not proved to be zero.

A LUN is claimed by the key ``volume:id`` of its VDI, which the server lets
nobody add twice. But a scan while the storage is away removes the VDI with
its keys. So what must not be forgotten stands on the SR as well::

    volume:lun:<SCSIid>     id of the volume that has the LUN
    volume:ready:<SCSIid>   the same, from when it is handed out until it is
                            wiped again
    volume:clean:<SCSIid>   its size, proved zero and not used since
    volume:holds:<SCSIid>   what was found in it when it was to be taken

A LUN without any of them is free, and unknown: it is looked at and wiped
before its first use. While it is wiped its VDI bears ``volume:wiping``. One
that was never handed out holds nothing of the volume that claimed it: it is
let go of as it is, and never wiped, for what it holds may be another's. What
holds something is shown as a foreign thing, to be adopted by its VDI; any
free LUN can be adopted by its SCSI id. It is no free space, and is looked at
again now and then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from volume import errors
from volume import model
from volume.drivers.xensm import access
from volume.drivers.xensm import hosts
from volume.drivers.xensm import vdis
from volume.drivers.xensm import wiping
from volume.drivers.xensm.luns import CLAIM
from volume.drivers.xensm.luns import CLEAN
from volume.drivers.xensm.luns import DISOWNED
from volume.drivers.xensm.luns import HOLDS
from volume.drivers.xensm.luns import Lender
from volume.drivers.xensm.luns import Lun
from volume.drivers.xensm.luns import marks_of
from volume.drivers.xensm.luns import READY
from volume.drivers.xensm.luns import Users
from volume.drivers.xensm.luns import WIPING
from volume.drivers.xensm.vdis import Thing
from volume.drivers.xensm.vdis import Vdi
from volume.xenapi import failures
from volume.xenapi import handlers
from volume.xenapi import plugs
from volume.xenapi import srs

LOG = logging.getLogger(__name__)

HELD = 'volume-claim'  # the name of a VDI of hba that is held for a moment
LOOK_AGAIN_S = 600.0  # at a LUN that was refused
NEVER = float('-inf')


class LunStorage(access.Access):
    """An SR of LUNs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._refused_at: dict[str, float] = {}

    def check(self) -> None:
        if not self.settings.luns:
            raise errors.Invalid(
                f'SR {self.sr_uuid} is of whole LUNs ({self.kind.type}): '
                'name those that may be used, by their SCSI ids, in option '
                'luns'
            )
        super().check()
        missing = set(self.settings.luns) - set(self._luns())
        if missing:
            srs.scan(self.link, self.sr())
            missing -= set(self._luns())
        if missing:
            LOG.warning(
                'SR %s does not show LUNs that luns names: %s',
                self.sr_uuid, ', '.join(sorted(missing)),
            )

    def pool(self) -> model.Pool:
        self.need_served()
        luns, users = self._luns().values(), self._users()
        return model.Pool(
            self.name,
            total_bytes=sum(lun.vdi.size_bytes for lun in luns),
            free_bytes=sum(
                lun.vdi.size_bytes for lun in luns
                if self._is_to_be_had(lun) and not users.of(lun.scsi_id)
            ),
            thin=False,
            features=self.features(),
            granularity_bytes=self.kind.granularity_bytes,
            max_volume_bytes=max(
                (lun.vdi.size_bytes for lun in luns), default=0
            ),
            device=f'sr:{self.sr_uuid}',
        )

    # The contract.

    def create(self, volume: model.Volume) -> str:
        if volume.size_bytes <= 0 or volume.size_bytes % model.SECTOR_BYTES:
            raise errors.Invalid(
                f'volume {volume.id} has {volume.size_bytes} bytes: a volume '
                f'has a positive multiple of {model.SECTOR_BYTES}'
            )
        refused: dict[str, str] = {}
        lun = self._held(volume)
        while True:
            if lun is None:
                lun = self._claim(volume, refused)
            self._check_size(lun, volume)
            if lun.is_ready:
                return lun.vdi.uuid
            if user := self._users().of(lun.scsi_id):
                # Another SR has data there, whatever luns_erase says.
                refused[lun.scsi_id] = f'is used by {user}'
                self._leave(lun, f'what {user} has there')
                # Once that SR is gone, a look is worth while at once.
                self._refused_at.pop(lun.scsi_id, None)
                lun = None
                continue
            if not lun.vdi.managed:
                with self._alone():
                    lun = self._managed(self._again(lun), volume)
            # What an earlier attempt had begun to wipe was looked at.
            if lun.is_clean or self.settings.luns_erase or (
                WIPING in lun.vdi.keys
            ):
                break
            holds = wiping.look(self.link, lun.vdi)
            if not holds:
                break
            refused[lun.scsi_id] = f'holds {holds}: luns_erase is false'
            self._leave(lun, holds)
            lun = None
        if not lun.is_clean:
            self._wipe(lun, volume)
        self._hand_out(lun, volume)
        return lun.vdi.uuid

    def delete(self, volume: model.Volume) -> None:
        lun = self._held(volume)
        if lun is None:
            self.need_served()
            return
        hosts.need_home(lun.vdi, volume.id)
        self.refuse_plugged(lun.vdi, 'delete')
        if lun.was_handed_out:
            if user := self._users().of(lun.scsi_id):
                raise errors.Busy(
                    f'volume {volume.id} is not wiped: LUN {lun.scsi_id} is '
                    f'used by {user} as well; see whose bytes these are, and '
                    'remove that SR or let go of the volume'
                )
            vdis.put(self.link, lun.vdi.ref, {WIPING: volume.id})
            if not lun.is_clean:
                self._wipe(lun, volume)
            if HOLDS in lun.marks:  # it was about to be let go of once
                self._unmark(HOLDS, lun)
            self._unmark(READY, lun)
        self._release(lun)

    def inspect(self, volume: model.Volume) -> model.Found:
        vdi = self.need(volume)
        hosts.need_home(vdi, volume.id)
        return vdi.found(volume.id)

    def scan(self) -> Iterator[model.Found]:
        """Yield volumes, and what was found in LUNs that are not."""
        self.need_served()
        for lun in self._luns().values():
            if lun.id or HOLDS in lun.marks:
                yield lun.found()

    def adopt(self, handle: str, volume: model.Volume) -> str:
        lun = self._by_handle(handle)
        if lun.id not in ('', volume.id) or WIPING in lun.vdi.keys:
            raise errors.Conflict(
                f'LUN {lun.scsi_id} is volume {lun.id} already'
            )
        other = self._held(volume)
        if other is not None and other.scsi_id != lun.scsi_id:
            raise errors.Conflict(
                f'volume {volume.id} exists: LUN {lun.scsi_id} cannot '
                'become it'
            )
        if user := self._users().of(lun.scsi_id):
            raise errors.Conflict(
                f'LUN {lun.scsi_id} is used by {user}: it cannot become a '
                'volume'
            )
        if volume.size_bytes > lun.vdi.size_bytes:
            raise errors.Invalid(
                f'LUN {lun.scsi_id} has {lun.vdi.size_bytes} bytes, '
                f'fewer than {volume.size_bytes}'
            )
        with self._alone():
            if not self._mark_claim(lun, volume):
                raise errors.Conflict(
                    f'LUN {lun.scsi_id} was just taken by another volume'
                )
            lun = self._managed(self._again(lun), volume)
        self._hand_out(lun, volume, is_fresh=False)
        return lun.vdi.uuid

    def disown(self, volume: model.Volume) -> None:
        lun = self._held(volume)
        if lun is None:
            return
        hosts.need_home(lun.vdi, volume.id)
        self.refuse_plugged(lun.vdi, 'let go of')
        # On hba it stays managed: nobody's create may claim it.
        self._unmark(HOLDS, lun)
        self._mark(HOLDS, lun, DISOWNED)
        self._unmark(READY, lun)
        self._let_go(lun)

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        vdis.put(self.link, self.need(volume).ref, {
            vdis.NOTE: json.dumps(dict(sidecar)),
        })

    def find(self, thing: Thing) -> Vdi | None:
        """Return the VDI of a volume that was handed out."""
        lun = self._held(thing) if isinstance(thing, model.Volume) else None
        if lun is None:
            self.need_served()
            return None
        # One on its way is not a volume yet; one being wiped still is.
        return lun.vdi if lun.was_handed_out else None

    def upkeep(self) -> bool:
        """Look again at one LUN that was refused: it may be empty by now."""
        self.need_served()
        now, users = time.monotonic(), self._users()
        due = [] if self.settings.luns_erase else [
            lun for lun in self._luns().values()
            if lun.is_free and lun.marks.get(HOLDS, DISOWNED) != DISOWNED
            and now - self._refused_at.get(lun.scsi_id, NEVER) > LOOK_AGAIN_S
            and not users.of(lun.scsi_id)
        ]
        if due:
            self._refused_at[due[0].scsi_id] = now
            self._look_again(due[0])
        return len(due) > 1

    # Lending: hba alone says which LUN it gives.

    def lender(self, vdi: Vdi) -> hosts.Lender | None:
        return None if self.kind.type == 'hba' else Lender(self, vdi)

    def why_not(self) -> str:
        return (
            'the pool there would choose a LUN by its size alone (hba); use '
            'rawhba or iscsi, or attach it in its own pool'
        )

    # Ours alone: what there is.

    def _luns(self) -> dict[str, Lun]:
        """Return the LUNs that are named and seen, by SCSI id."""
        sr = self.sr()
        by_uuid = {
            uuid: key.removeprefix('scsi-')
            for key, uuid in sr.sm_config.items() if key.startswith('scsi-')
        }
        found = {}
        for vdi in vdis.all_of(self.link, sr.ref):
            scsi_id = vdi.sm_config.get('SCSIid') or by_uuid.get(vdi.uuid)
            if scsi_id in self.settings.luns:
                found[scsi_id] = Lun(scsi_id, vdi, marks_of(sr, scsi_id))
        return found

    def _held(self, volume: model.Volume) -> Lun | None:
        """Return the LUN that a volume has, whatever state it is in."""
        lun = self._seen(volume)
        lost = '' if lun else next((
            key.removeprefix(CLAIM) for key, value in self.sr().keys.items()
            if key.startswith(CLAIM) and value == volume.id
        ), '')
        if lost:
            srs.scan(self.link, self.sr())
            lun = self._seen(volume)
        if lost and lun is None:
            raise errors.Unavailable(
                f'LUN {lost} of volume {volume.id} is not seen by SR '
                f'{self.sr_uuid} now, or is no longer named in luns'
            )
        if lun is not None and vdis.ID not in lun.vdi.keys:
            # A scan has lost it, and brought it back without its keys.
            self._label(lun, volume)
            lun = self._again(lun)
        return lun

    def _seen(self, volume: model.Volume) -> Lun | None:
        return next((
            lun for lun in self._luns().values() if lun.id == volume.id
        ), None)

    def _by_handle(self, handle: str) -> Lun:
        for lun in self._luns().values():
            if handle == lun.scsi_id or (handle == lun.vdi.uuid and (
                lun.id or HOLDS in lun.marks
            )):
                return lun
        raise errors.NotFound(
            f'SR {self.sr_uuid} shows no LUN {handle!r:.80} that luns names'
        )

    def _again(self, lun: Lun) -> Lun:
        return Lun(
            lun.scsi_id, vdis.get(self.link, lun.vdi.ref),
            marks_of(self.sr(), lun.scsi_id),
        )

    def _users(self) -> Users:
        return Users(self.link, self.ref())

    def _is_to_be_had(self, lun: Lun) -> bool:
        """Say whether a volume could have a LUN, for all that is known."""
        holds = lun.marks.get(HOLDS)
        return lun.is_free and (
            holds is None or (self.settings.luns_erase and holds != DISOWNED)
        )

    def _look_again(self, lun: Lun) -> None:
        with self._alone(), contextlib.ExitStack() as stack:
            vdi = lun.vdi
            if not vdi.managed:
                vdi = stack.enter_context(self._drawn(lun))
                stack.callback(self._give_back, [vdi])
            holds = wiping.look(self.link, vdi)
        found = self._luns().get(lun.scsi_id)
        if not holds and found and found.is_free and (
            found.marks == lun.marks
        ):
            LOG.info('LUN %s holds nothing any more', lun.scsi_id)
            self._unmark(HOLDS, lun)

    # Claiming.

    def _claim(
        self, volume: model.Volume, refused: Mapping[str, str]
    ) -> Lun:
        """Claim the smallest LUN that fits and was not refused.

        :raises NoSpace: there is none
        """
        self.need_served()
        with self._alone():
            fitting = sorted(
                (
                    lun for lun in self._luns().values() if lun.is_free
                    and lun.vdi.size_bytes >= volume.size_bytes
                    and lun.marks.get(HOLDS) != DISOWNED
                    and lun.scsi_id not in refused
                ),
                key=lambda lun: (
                    HOLDS in lun.marks, lun.vdi.size_bytes,
                    not lun.is_clean, lun.scsi_id,
                ),
            )
            for lun in fitting:
                if self._mark_claim(lun, volume):
                    return self._managed(self._again(lun), volume)
        why = '; '.join(
            f'{scsi_id} {what}' for scsi_id, what in refused.items()
        )
        raise errors.NoSpace(
            f'no LUN of SR {self.sr_uuid} that luns names is free and has '
            f'{volume.size_bytes} bytes'
            + (f' ({why})' if why else '')
        )

    def _mark_claim(self, lun: Lun, volume: model.Volume) -> bool:
        """Claim a LUN for a volume; false if another was quicker."""
        for add in (
            lambda: self.link.call(
                'VDI.add_to_other_config', lun.vdi.ref, vdis.ID, volume.id
            ),
            lambda: self._mark(CLAIM, lun, volume.id),
        ):
            try:
                add()
            except errors.Conflict as failed:
                if failures.code(failed) != 'MAP_DUPLICATE_KEY':
                    raise
                if self._again(lun).id != volume.id:
                    return False
        vdis.put(self.link, lun.vdi.ref, {
            vdis.SIZE: str(volume.size_bytes),
        })
        return True

    def _managed(self, lun: Lun, volume: model.Volume) -> Lun:
        """Make a LUN of hba a managed VDI, which its create alone does.

        The server picks the smallest that nobody has: what it gives is held
        until it gives the right one, and what was held is given back.
        """
        if lun.vdi.managed:
            return lun
        with self._drawn(lun) as got:
            drawn = dataclasses.replace(lun, vdi=got)
            self._label(drawn, volume)
            return self._again(drawn)

    @contextlib.contextmanager
    def _drawn(self, lun: Lun) -> Iterator[Vdi]:
        """Have the server give a certain LUN, and give back the others."""
        held: list[Vdi] = []
        try:
            for _ in range(len(self.sr_vdis())):
                got = vdis.get(self.link, self.link.call('VDI.create', {
                    **vdis.blank(self.ref(), lun.vdi.size_bytes),
                    'name_label': HELD,
                }))
                if got.uuid == lun.vdi.uuid:
                    yield got
                    return
                held.append(got)
        finally:
            self._give_back(held)
        raise errors.NoSpace(
            f'the server does not give LUN {lun.scsi_id}: another client '
            'has it'
        )

    def _give_back(self, held: list[Vdi]) -> None:
        for vdi in held:
            with contextlib.suppress(errors.NotFound):
                handlers.patiently(functools.partial(
                    self.link.call, 'VDI.destroy', vdi.ref
                ))
        if held:
            srs.scan(self.link, self.sr())

    def sr_vdis(self) -> list[str]:
        """Return the references of all that the SR shows."""
        found: list[str] = self.link.call('SR.get_record', self.ref())['VDIs']
        return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only service that lets hba choose; end what one has left."""
        if self.kind.type != 'hba':
            yield
            return
        # The pool's lock is this service's; the other, this thread's.
        with self.locked(self.sr_uuid), srs.lock(
            self.link, f'luns-{self.sr_uuid}', self.link.originator
        ):
            self._give_back([
                vdi for vdi in vdis.by_name(self.link, HELD)
                if vdi.sr == self.ref() and vdis.ID not in vdi.keys
                and vdi.managed
            ])
            yield

    # From claimed to handed out, and back.

    def _check_size(self, lun: Lun, volume: model.Volume) -> None:
        asked = lun.vdi.keys.get(vdis.SIZE, str(lun.vdi.size_bytes))
        if asked != str(volume.size_bytes):
            raise errors.Conflict(
                f'volume {volume.id} has LUN {lun.scsi_id} and {asked} '
                f'bytes, not {volume.size_bytes}'
            )

    def _wipe(self, lun: Lun, volume: model.Volume) -> None:
        """Make a LUN zero, prove it, and note that it is."""
        vdis.put(self.link, lun.vdi.ref, {WIPING: volume.id})
        wiping.wipe(
            self.link, self.node, lun.vdi, self.settings.helper_vm
        )
        self._unmark(CLEAN, lun)
        self._mark(CLEAN, lun, str(lun.vdi.size_bytes))

    def _hand_out(
        self, lun: Lun, volume: model.Volume, *, is_fresh: bool = True
    ) -> None:
        """Make a volume of a LUN: from now on it may be written to."""
        self._label(lun, volume)
        if is_fresh:
            vdis.put(self.link, lun.vdi.ref, {vdis.FRESH: 'true'})
        self._unmark(CLEAN, lun)
        self._unmark(HOLDS, lun)
        vdis.drop(self.link, lun.vdi.ref, [WIPING])
        self._mark(READY, lun, volume.id)

    def _release(self, lun: Lun) -> None:
        """Let others have a LUN that is zero.

        On hba the VDI is destroyed, which erases nothing and makes the LUN
        free again; on the others it would only vanish until the next scan.
        """
        if self.kind.type == 'hba':
            # Until it is destroyed, its own keys say whose it is.
            self._unmark(CLAIM, lun)
            if lun.vdi.managed:
                self._give_back([lun.vdi])
        else:
            self._let_go(lun)

    def _leave(self, lun: Lun, holds: str) -> None:
        """Do not take a LUN; show what is in it."""
        self._unmark(HOLDS, lun)
        self._mark(HOLDS, lun, holds)
        self._refused_at[lun.scsi_id] = time.monotonic()
        self._release(lun)

    def _let_go(self, lun: Lun) -> None:
        """Take our name and keys off a LUN; the claim itself goes last."""
        names = [*vdis.KEYS, vdis.FRESH, hosts.LENT, *(
            key for key in lun.vdi.keys if key.startswith(plugs.GRANT)
        )]
        vdis.drop(self.link, lun.vdi.ref, [
            *(name for name in names if name != vdis.ID), WIPING, vdis.ID,
        ])
        self.link.call('VDI.set_name_label', lun.vdi.ref, lun.scsi_id)
        self.link.call('VDI.set_name_description', lun.vdi.ref, '')
        self.link.call('VDI.remove_tags', lun.vdi.ref, vdis.TAG)
        self._unmark(CLAIM, lun)

    def _label(self, lun: Lun, volume: model.Volume) -> None:
        """Say on the VDI whose it is, for whoever looks at the pool."""
        vdis.put(self.link, lun.vdi.ref, {
            vdis.ID: volume.id, vdis.SIZE: str(volume.size_bytes),
        })
        self.link.call(
            'VDI.set_name_label', lun.vdi.ref, vdis.name(volume)
        )
        self.link.call(
            'VDI.set_name_description', lun.vdi.ref, vdis.DESCRIPTION
        )
        self.link.call('VDI.add_tags', lun.vdi.ref, vdis.TAG)

    def _mark(self, kind: str, lun: Lun, value: str) -> None:
        """Note on the SR; what is there already is not another's."""
        try:
            self.link.call(
                'SR.add_to_other_config', self.ref(),
                f'{kind}{lun.scsi_id}', value,
            )
        except errors.Conflict as failed:
            if failures.code(failed) != 'MAP_DUPLICATE_KEY' or (
                self.sr().keys.get(f'{kind}{lun.scsi_id}') != value
            ):
                raise

    def _unmark(self, kind: str, lun: Lun) -> None:
        self.link.call(
            'SR.remove_from_other_config', self.ref(), f'{kind}{lun.scsi_id}'
        )
