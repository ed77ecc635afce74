# SPDX-License-Identifier: Apache-2.0
"""What is known of LUNs: the marks on their SR, and who else has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from volume import model
from volume.drivers.xensm import vdis
from volume.drivers.xensm.vdis import Vdi
from volume.xenapi import plugs
from volume.xenapi.link import Link
from volume.xenapi.srs import Sr

if TYPE_CHECKING:
    from volume.drivers.xensm.lun import LunStorage

WIPING = 'volume:wiping'
CLAIM, READY, CLEAN, HOLDS = MARKS = (
    'volume:lun:', 'volume:ready:', 'volume:clean:', 'volume:holds:',
)
DISOWNED = 'a volume that was let go of'


@dataclasses.dataclass(frozen=True)
class Lun:
    """A LUN that the operator has named, as it is now."""

    scsi_id: str
    vdi: Vdi
    marks: Mapping[str, str]
    """What the SR says about it, by kind."""

    @property
    def id(self) -> str:
        """The id of the volume that has it, or nothing."""
        return self.marks.get(CLAIM) or self.vdi.keys.get(vdis.ID, '')

    @property
    def is_free(self) -> bool:
        return not self.id and WIPING not in self.vdi.keys

    @property
    def was_handed_out(self) -> bool:
        """Whether it may hold bytes of its volume."""
        return self.marks.get(READY, '') == self.id != ''

    @property
    def is_ready(self) -> bool:
        return self.was_handed_out and WIPING not in self.vdi.keys

    @property
    def is_clean(self) -> bool:
        return self.marks.get(CLEAN) == str(self.vdi.size_bytes)

    def found(self) -> model.Found:
        return self.vdi.found(self.id or None)


def marks_of(sr: Sr, scsi_id: str) -> dict[str, str]:
    """Return what an SR says about a LUN."""
    return {
        kind: sr.keys[f'{kind}{scsi_id}'] for kind in MARKS
        if f'{kind}{scsi_id}' in sr.keys
    }


class Users:
    """The other SRs of the pool that have LUNs, as of this moment."""

    def __init__(self, link: Link, ref: str) -> None:
        self._others = {
            other: record for other, record
            in link.call('SR.get_all_records').items() if other != ref
        }
        self._pbds = [
            pbd for pbd in link.call('PBD.get_all_records').values()
            if pbd['SR'] in self._others
        ]

    def of(self, scsi_id: str) -> str:
        """Name another SR that has a LUN, if one has.

        It lies on it (LVM, a file system), or has a volume on it.
        """
        users = [
            record for record in self._others.values()
            if f'{CLAIM}{scsi_id}' in record['other_config']
        ]
        users += [
            self._others[pbd['SR']] for pbd in self._pbds
            if any(
                scsi_id in pbd['device_config'].get(key, '')
                for key in ('SCSIid', 'device')
            )
        ]
        return next((
            f'SR {each["uuid"]} ({each["type"]})' for each in users
        ), '')


class Lender:
    """Lends a LUN: who has no VBD of it here does not touch it."""

    def __init__(self, storage: LunStorage, vdi: Vdi) -> None:
        self._storage = storage
        self._vdi = vdi

    def let_go(self) -> None:
        self._storage.refuse_plugged(self._vdi, 'lend')

    def take_back(self) -> None:
        """It was never away: the other pool has no VBD of it any more."""

    def device_config(self) -> Mapping[str, str]:
        return self._storage.config_of_pbd()

    def end_in(self, peer: Link) -> None:
        # The VDI's VBDs have ended; its SR may serve other LUNs there.
        sr = plugs.find(peer, 'SR', self._storage.sr_uuid)
        if sr is not None and plugs.is_brought(peer, sr):
            plugs.forget_sr(peer, sr)
