# SPDX-License-Identifier: Apache-2.0
"""VDIs as volumes and snapshots: their names, their keys, and which is ours.

The server cannot search maps, so a VDI is looked for by its name; and it
copies name, tags and keys to every snapshot and clone, whoever makes them,
so that neither says for certain whose a VDI is. Three keys do:

==================  =====================================================
``volume:id``       id of the volume or snapshot
``volume:of``       on a snapshot: id of the volume that it is of
``volume:vdi``      uuid of the VDI on which the keys were written; on any
                    other VDI they are a copy that somebody made
``volume:next``     the id of what is being copied from this VDI: a VDI
                    with it was born by our own call, and is that one
``volume:role``     ``next``: will take its volume's place; ``old``: gave it
                    up; ``wiping``
``volume:fresh``    on a volume: nobody has written to it yet
``volume:size``     what was asked for, where the VDI may be far larger
``volume:note``     the sidecar
``volume:was``      the name that an adopted VDI had before
``volume:reverted`` on a volume that took another VDI's place: its snapshots
                    are not those that the server lists for it
==================  =====================================================

The name of a volume is ``volume-<id>``, of a snapshot ``snapshot-<id>``. A
volume's own VDI is the one whose uuid is its handle; else that with its own
uuid in ``volume:vdi``; else the only one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from volume import errors
from volume import model
from volume.xenapi import failures
from volume.xenapi.link import Link
from volume.xenapi.options import UUID

ID = 'volume:id'
OF = 'volume:of'
OWN = 'volume:vdi'
NEXT = 'volume:next'
ROLE = 'volume:role'
SIZE = 'volume:size'
NOTE = 'volume:note'
WAS = 'volume:was'
REVERTED = 'volume:reverted'
FRESH = 'volume:fresh'
KEYS = (OF, OWN, NEXT, ROLE, SIZE, NOTE, WAS, REVERTED, FRESH, ID)
HEIR, RETIRED = 'next', 'old'

TAG = 'volume-service'
DESCRIPTION = 'Managed by volume-service: change or delete it there only.'

Thing = model.Volume | model.Snapshot


@dataclasses.dataclass(frozen=True, slots=True)
class Vdi:
    """A VDI, as the server knew it a moment ago."""

    ref: str
    uuid: str
    name: str
    sr: str
    size_bytes: int
    used_bytes: int
    is_snapshot: bool
    snapshot_of: str
    snapshots: tuple[str, ...]
    managed: bool
    read_only: bool
    sharable: bool
    type: str
    vbds: tuple[str, ...]
    keys: Mapping[str, str]
    sm_config: Mapping[str, str]
    tags: tuple[str, ...]
    operations: Mapping[str, str]

    @classmethod
    def of(cls, ref: str, record: Mapping[str, Any]) -> Vdi:
        """Return it from the server's record."""
        return cls(
            ref=ref,
            uuid=record['uuid'],
            name=record['name_label'],
            sr=record['SR'],
            size_bytes=int(record['virtual_size']),
            used_bytes=int(record['physical_utilisation']),
            is_snapshot=bool(record['is_a_snapshot']),
            snapshot_of=record['snapshot_of'],
            snapshots=tuple(record['snapshots']),
            managed=bool(record['managed']),
            read_only=bool(record['read_only']),
            sharable=bool(record['sharable']),
            type=record['type'],
            vbds=tuple(record['VBDs']),
            keys=dict(record['other_config']),
            sm_config=dict(record['sm_config']),
            tags=tuple(record['tags']),
            operations=dict(record['current_operations']),
        )

    @property
    def id(self) -> str | None:
        """Our id of it, if its keys are its own; ``None`` if foreign.

        Only what the keys can tell: of two VDIs without ``volume:vdi`` that
        bear one id, see ``choose``.
        """
        found = self.keys.get(ID, '')
        own = self.keys.get(OWN, self.uuid)
        if not UUID.fullmatch(found) or own != self.uuid:
            return None
        if NEXT in self.keys and OWN not in self.keys:
            return None
        if self.keys.get(ROLE) in (HEIR, RETIRED):
            return None
        if OF not in self.keys and self.is_snapshot:
            return None  # a copy of our volume's keys on somebody's snapshot
        return found

    @property
    def is_passing(self) -> bool:
        """Whether it is on its way to be a volume, or gave that up.

        Whoever repeats what began it ends that; nobody else needs to know.
        """
        own = self.keys.get(OWN)
        if own != self.uuid:
            return NEXT in self.keys and own is not None
        return self.keys.get(ROLE) in (HEIR, RETIRED)

    @property
    def of_id(self) -> str | None:
        """The id of the volume that this is our snapshot of."""
        return self.keys.get(OF) if self.id else None

    @property
    def note(self) -> dict[str, str]:
        """The sidecar."""
        try:
            note = json.loads(self.keys.get(NOTE, '{}'))
        except (ValueError, RecursionError):
            return {}
        if not isinstance(note, dict):
            return {}
        return {str(name): str(value) for name, value in note.items()}

    def found(self, id: str | None) -> model.Found:
        """Return it as a driver shows it, under the id that it bears."""
        return model.Found(
            self.uuid, self.size_bytes, id,
            snapshot_of=self.keys.get(OF) if id else None,
            sidecar=self.note if id else {},
        )


def name(thing: Thing) -> str:
    """Return the name of the VDI of a volume or snapshot."""
    kind = 'volume' if isinstance(thing, model.Volume) else 'snapshot'
    return f'{kind}-{thing.id}'


def keys(thing: Thing) -> dict[str, str]:
    """Return the keys with which a VDI is made."""
    if isinstance(thing, model.Volume):
        return {ID: thing.id}
    return {ID: thing.id, OF: thing.volume.id}


def record(
    thing: Thing, sr: str, size_bytes: int,
    sm_config: Mapping[str, str] | None = None,
    keys_too: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the record with which ``VDI.create`` is called."""
    return {
        **blank(sr, size_bytes),
        'name_label': name(thing),
        'name_description': DESCRIPTION,
        'other_config': {**keys(thing), **(keys_too or {})},
        'sm_config': dict(sm_config or {}),
        'tags': [TAG],
    }


def blank(sr: str, size_bytes: int) -> dict[str, Any]:
    """Return the record of a new VDI that is nobody's yet."""
    return {
        'name_label': '',
        'name_description': '',
        'SR': sr,
        'virtual_size': str(size_bytes),
        'type': 'user',
        'sharable': False,
        'read_only': False,
        'other_config': {},
        'xenstore_data': {},
        'sm_config': {},
        'tags': [],
    }


def get(link: Link, ref: str) -> Vdi:
    """Return a VDI by its reference.

    :raises NotFound: it is gone
    """
    return Vdi.of(ref, link.call('VDI.get_record', ref))


def by_uuid(link: Link, uuid: str) -> Vdi | None:
    """Return a VDI by its uuid."""
    try:
        return get(link, link.call('VDI.get_by_uuid', uuid))
    except errors.NotFound:
        return None


def by_name(link: Link, label: str) -> list[Vdi]:
    """Return the VDIs of a name."""
    found = []
    for ref in link.call('VDI.get_by_name_label', label):
        try:
            found.append(get(link, ref))
        except errors.NotFound:
            continue  # gone since
    return found


def all_of(link: Link, sr: str | None = None) -> list[Vdi]:
    """Return every VDI of an SR, or of the pool, base copies too."""
    records = link.call('VDI.get_all_records')
    return [
        Vdi.of(ref, record) for ref, record in records.items()
        if sr is None or record['SR'] == sr
    ]


def find(link: Link, thing: Thing) -> Vdi | None:
    """Return the VDI of a volume or snapshot, wherever it lies by now.

    :raises Conflict: several bear its keys, and nothing tells which it is
    """
    named = choose(by_name(link, name(thing)), thing)
    if named is not None or not thing.handle:
        return named
    # Renamed, or moved and renamed, by another tool.
    held = by_uuid(link, thing.handle)
    if held is not None and bears(held, thing):
        return held
    return choose(all_of(link), thing)


def choose(candidates: Iterable[Vdi], thing: Thing) -> Vdi | None:
    """Return the thing's own VDI of those that bear its keys.

    :raises Conflict: several do, and nothing tells which it is
    """
    candidates = list(candidates)
    found = [vdi for vdi in candidates if bears(vdi, thing)] or [
        # Its predecessor has retired: only the role is left to be dropped.
        vdi for vdi in candidates if bears(vdi, thing, HEIR)
        and vdi.keys.get(OWN) == vdi.uuid
    ]
    for own in (
        [vdi for vdi in found if vdi.uuid == thing.handle],
        [vdi for vdi in found if vdi.keys.get(OWN) == vdi.uuid],
        found,
    ):
        if len(own) == 1:
            return own[0]
    if not found:
        return None
    raise errors.Conflict(
        f'{name(thing)}: several VDIs bear its keys '
        f'({", ".join(sorted(vdi.uuid for vdi in found)):.200}), and none '
        'is known to be its own: remove or rename the copies\' key volume:id'
    )


def bears(vdi: Vdi, thing: Thing, role: str = '') -> bool:
    """Say whether a VDI may be a thing's, by its keys."""
    found = vdi.keys.get(ROLE, '')
    if isinstance(thing, model.Volume):
        is_kind = OF not in vdi.keys and not vdi.is_snapshot
    else:
        is_kind = vdi.keys.get(OF) == thing.volume.id
    return (
        is_kind and vdi.managed and vdi.keys.get(ID) == thing.id
        and (NEXT not in vdi.keys or vdi.keys.get(OWN) == vdi.uuid)
        and (found == role if role else found not in (HEIR, RETIRED))
    )


def snapshots_of(link: Link, vdi: Vdi, volume: model.Volume) -> list[Vdi]:
    """Return our snapshots of a volume."""
    if REVERTED in vdi.keys:
        candidates = all_of(link)
    else:
        candidates = []
        for ref in vdi.snapshots:
            try:
                candidates.append(get(link, ref))
            except errors.NotFound:
                continue
    return [each for each in candidates if each.of_id == volume.id]


def put(link: Link, ref: str, found: Mapping[str, str]) -> None:
    """Set keys of a VDI, whatever they were; each is one or three calls."""
    for key, value in found.items():
        try:
            link.call('VDI.add_to_other_config', ref, key, value)
        except errors.Conflict as failed:
            if failures.code(failed) != 'MAP_DUPLICATE_KEY':
                raise
            link.call('VDI.remove_from_other_config', ref, key)
            link.call('VDI.add_to_other_config', ref, key, value)


def drop(link: Link, ref: str, names: Sequence[str]) -> None:
    """Remove keys of a VDI; what is not there is no trouble."""
    for key in names:
        link.call('VDI.remove_from_other_config', ref, key)


def guests(link: Link, vdi: Vdi, is_plugged: bool = True) -> list[str]:
    """Return the VMs of others that have the VDI, by their references.

    The server's own domain has it for a while when bytes are read or
    written, and lets go by itself.
    """
    found = []
    for ref in vdi.vbds:
        try:
            vbd = link.call('VBD.get_record', ref)
            vm = link.call('VM.get_record', vbd['VM'])
        except errors.NotFound:
            continue
        is_used = vbd['currently_attached'] or vbd.get('reserved')
        if (is_used or not is_plugged) and not vm['is_control_domain']:
            found.append(vbd['VM'])
    return found


def used_by(link: Link, vdi: Vdi) -> list[str]:
    """Return the VMs that have the VDI plugged, by their references."""
    found = []
    for ref in vdi.vbds:
        try:
            vbd = link.call('VBD.get_record', ref)
        except errors.NotFound:
            continue
        if vbd['currently_attached'] or vbd.get('reserved'):
            found.append(vbd['VM'])
    return found
