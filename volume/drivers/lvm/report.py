# SPDX-License-Identifier: Apache-2.0
"""What LVM reports, read into nouns.

One command tells of the group, its disks and the logical volumes that were
asked for, as of one moment. That something is not there is only ever said by
a report that was made and does not list it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume.drivers.lvm import names

VG_FIELDS = (
    'vg_name', 'vg_uuid', 'vg_size', 'vg_free', 'vg_extent_size',
    'vg_mda_size', 'vg_mda_free', 'vg_missing_pv_count',
)
PV_FIELDS = ('pv_name', 'pv_uuid', 'pv_missing')
LV_FIELDS = (
    'lv_name', 'lv_uuid', 'lv_size', 'lv_tags', 'lv_role', 'lv_layout',
    'lv_active', 'lv_device_open', 'lv_suspended', 'lv_permissions',
    'lv_health_status', 'lv_check_needed', 'lv_snapshot_invalid',
    'lv_when_full', 'lv_metadata_size', 'lv_skip_activation', 'origin',
    'origin_size', 'pool_lv', 'data_percent', 'metadata_percent',
)
SEG_FIELDS = ('lv_uuid', 'zero', 'thin_id', 'seg_pe_ranges')
SCAN_FIELDS = (
    'pv_name', 'pv_uuid', 'pv_missing', 'pv_duplicate', 'vg_name', 'vg_uuid',
    'vg_lock_type', 'vg_systemid', 'vg_exported',
)

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Lv:
    """A logical volume; ``role`` and ``id`` are empty if it is foreign.

    ``size_bytes`` is what it holds: of a thick snapshot that is its
    origin's size when it was taken, and ``stored_bytes`` what it occupies.
    """

    name: str
    uuid: str
    role: str
    id: str
    size_bytes: int
    stored_bytes: int
    tags: frozenset[str]
    roles: frozenset[str]
    layout: frozenset[str]
    is_active: bool
    is_open: bool
    is_suspended: bool
    is_read_only: bool
    is_invalid: bool
    is_skipped: bool
    health: str
    needs_check: bool
    zeroes: bool
    errors_when_full: bool
    origin: str
    pool: str
    thin_id: int | None
    ranges: tuple[str, ...]
    data_percent: float | None
    metadata_percent: float | None
    metadata_bytes: int

    @property
    def is_thin_pool(self) -> bool:
        return {'thin', 'pool'} <= self.layout

    @property
    def is_thick_snapshot(self) -> bool:
        return 'thicksnapshot' in self.roles

    @property
    def wiped_tags(self) -> list[str]:
        """What we have said of how much of it is zero."""
        return sorted(tag for tag in self.tags if names.WIPED.fullmatch(tag))

    @property
    def wiped_bytes(self) -> int:
        """How much of what is deleted is zero, from its beginning."""
        if self.role != 'deleted':
            return 0
        return max(
            (int(tag.partition(':')[2]) for tag in self.wiped_tags),
            default=0,
        )

    @property
    def of(self) -> str | None:
        """The id of the volume whose snapshot it is."""
        found = [t.removeprefix('of:') for t in self.tags
                 if t.startswith('of:')]
        return found[0] if found else None


@dataclasses.dataclass(frozen=True, slots=True)
class Pv:
    """A disk of a group; without a name if it is missing."""

    name: str
    uuid: str
    is_missing: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Vg:
    """A group at one moment, with the logical volumes that were asked for."""

    name: str
    uuid: str
    size_bytes: int
    free_bytes: int
    extent_bytes: int
    metadata_bytes: int
    metadata_free_bytes: int
    pvs: tuple[Pv, ...]
    lvs: tuple[Lv, ...]

    @property
    def missing(self) -> frozenset[str]:
        """The uuids of disks that are not there."""
        return frozenset(pv.uuid for pv in self.pvs if pv.is_missing)

    def ours(self, role: str, id: str) -> Lv | None:
        for lv in self.lvs:
            if (lv.role, lv.id) == (role, id):
                return lv
        return None

    def dependents(self, lv: Lv) -> list[Lv]:
        """Return what LVM would remove together with it, of what is here.

        Snapshots of the old kind, and what another pool has made of it. A
        thin snapshot or clone of its own pool stands by itself.
        """
        return [
            each for each in self.lvs if each.origin == lv.name
            and (each.is_thick_snapshot or each.pool != lv.pool)
        ]

    def named(self, name: str) -> Lv | None:
        for lv in self.lvs:
            if lv.name == name:
                return lv
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """A disk with a group on it, whosoever's, as a scan of all has it."""

    pv_name: str
    pv_uuid: str
    is_missing: bool
    is_duplicate: bool
    vg_name: str
    vg_uuid: str
    lock_type: str
    system_id: str
    is_exported: bool


def read_group(text: str) -> Vg:
    """Read a full report about one group.

    :raises Unknown: it is none
    """
    sections = _sections(text)
    rows = sections.get('vg', [])
    if len(rows) != 1:
        raise errors.Unknown(
            f'lvm reports {len(rows)} groups where one was asked for'
        )
    row = rows[0]
    segments: dict[str, list[Row]] = {}
    for each in sections.get('seg', []):
        segments.setdefault(_text(each, 'lv_uuid'), []).append(each)
    return Vg(
        _text(row, 'vg_name'), _text(row, 'vg_uuid'),
        _number(row, 'vg_size'), _number(row, 'vg_free'),
        _number(row, 'vg_extent_size'), _number(row, 'vg_mda_size'),
        _number(row, 'vg_mda_free'),
        tuple(_pv(each) for each in sections.get('pv', [])),
        tuple(
            _lv(each, segments.get(_text(each, 'lv_uuid'), []))
            for each in sections.get('lv', [])
        ),
    )


def read_scan(text: str) -> list[Seen]:
    """Read a report about all disks."""
    return [
        Seen(
            _text(row, 'pv_name'), _text(row, 'pv_uuid'),
            _text(row, 'pv_missing') != '',
            _text(row, 'pv_duplicate') != '', _text(row, 'vg_name'),
            _text(row, 'vg_uuid'), _text(row, 'vg_lock_type'),
            _text(row, 'vg_systemid'), _text(row, 'vg_exported') != '',
        )
        for row in _sections(text).get('pv', [])
    ]


def _sections(text: str) -> dict[str, list[Row]]:
    try:
        found: dict[str, list[Row]] = {}
        for part in json.loads(text)['report']:
            for name, rows in part.items():
                found.setdefault(name, []).extend(rows)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as broken:
        raise errors.Unknown(
            f'lvm printed no report: {text.strip()[:200]!r}'
        ) from broken


def _pv(row: Row) -> Pv:
    return Pv(
        _text(row, 'pv_name'), _text(row, 'pv_uuid'),
        _text(row, 'pv_missing') != '',
    )


def _lv(row: Row, segments: list[Row]) -> Lv:
    name, tags = _text(row, 'lv_name'), _words(row, 'lv_tags')
    role, id = names.role_of(name, tags)
    roles = _words(row, 'lv_role')
    stored = _number(row, 'lv_size')
    size = _number(row, 'origin_size') if 'thicksnapshot' in roles else 0
    thin_id = ''.join(_text(each, 'thin_id') for each in segments[:1])
    return Lv(
        name, _text(row, 'lv_uuid'), role, id, size or stored, stored, tags,
        roles, _words(row, 'lv_layout'),
        is_active=_text(row, 'lv_active') == 'active',
        is_open=_text(row, 'lv_device_open') == 'open',
        is_suspended=_text(row, 'lv_suspended') == 'suspended',
        is_read_only=_text(row, 'lv_permissions') == 'read-only',
        is_invalid='invalid' in _text(row, 'lv_snapshot_invalid'),
        is_skipped=_text(row, 'lv_skip_activation') != '',
        health=_text(row, 'lv_health_status'),
        needs_check=_text(row, 'lv_check_needed') not in ('', 'unknown'),
        zeroes=any(_text(each, 'zero') == 'zero' for each in segments),
        errors_when_full=_text(row, 'lv_when_full') == 'error',
        origin=_text(row, 'origin'), pool=_text(row, 'pool_lv'),
        thin_id=int(thin_id) if thin_id.isdigit() else None,
        ranges=tuple(
            word for each in segments
            for word in _text(each, 'seg_pe_ranges').split()
        ),
        data_percent=_percent(row, 'data_percent'),
        metadata_percent=_percent(row, 'metadata_percent'),
        metadata_bytes=_number(row, 'lv_metadata_size'),
    )


def _text(row: Row, field: str) -> str:
    # Internal ones have brackets around their names.
    return str(row.get(field, '')).strip('[]')


def _words(row: Row, field: str) -> frozenset[str]:
    return frozenset(filter(None, _text(row, field).split(',')))


def _number(row: Row, field: str) -> int:
    text = _text(row, field)
    return int(text) if text.isdigit() else 0


def _percent(row: Row, field: str) -> float | None:
    try:
        return float(_text(row, field))
    except ValueError:
        return None
