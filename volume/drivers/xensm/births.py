# SPDX-License-Identifier: Apache-2.0
"""Copies that are known from birth, although the server names them wrongly.

Snapshot, clone and copy give the new VDI the name and the keys of its source.
So, before one is asked for, ``volume:next`` is written on the source, with
the id that the copy will have: the copy is born with it. Then the copy gets a
name and keys of its own, in that order, and the source loses the mark.

The mark is also the lock: the server lets one caller add it. It says who
wrote it and until when it holds. One of this service that nobody works on is
left over from a crash or a lost reply; whoever comes next may take it away,
for the copy itself still bears it. ``volume:vdi`` on the source tells it from
its copies.

A copy of bytes (``VDI.copy``) is born empty. It is marked so, and one that is
found later is never believed: it is destroyed, and made again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

from volume import errors
from volume.drivers.xensm import vdis
from volume.drivers.xensm.vdis import Thing
from volume.drivers.xensm.vdis import Vdi
from volume.xenapi import failures
from volume.xenapi import tasks
from volume.xenapi.link import Link

HOLD_S = 7200.0  # as long as the server may keep a call waiting
BUSY = frozenset({'snapshot', 'clone', 'copy', 'mirror', 'destroy'})
COPIES = ('VDI.snapshot', 'VDI.clone', 'VDI.copy')  # ends of tasks' names


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """What stands in ``volume:next``."""

    id: str
    by_bytes: bool
    until: float
    owner: str

    @classmethod
    def of(cls, vdi: Vdi) -> Mark | None:
        """Return the mark of a VDI."""
        words = vdi.keys.get(vdis.NEXT, '').split(' ', 3)
        if len(words) != 4 or not words[2].isdigit():
            return cls(words[0], True, 0.0, '') if words[0] else None
        return cls(
            words[0], words[1] == 'copy', float(words[2]), words[3])

    def __str__(self) -> str:
        kind = 'copy' if self.by_bytes else 'made'
        return f'{self.id} {kind} {self.until:.0f} {self.owner}'


@dataclasses.dataclass(frozen=True, slots=True)
class Birth:
    """A copy to be made: for whom, how, and how it is finished."""

    thing: Thing
    make: Callable[[], str]
    """Asks the server for the copy; returns its reference."""

    finish: Callable[[Vdi], None]
    """Gives the copy its size and name, and last its own keys."""

    by_bytes: bool = False
    is_snapshot: bool = False


def bear(
    link: Link, source: Vdi, birth: Birth,
    destroy: Callable[[Vdi], None],
    clock: Callable[[], float] = time.time,
) -> Vdi:
    """Make a copy, or finish one that was made before; return it.

    The caller is alone, in this service, with the source.

    :raises Busy: another service makes a copy of it, or the server still
        does
    """
    mark = Mark(
        birth.thing.id, birth.by_bytes, clock() + HOLD_S, link.originator)
    source = vdis.get(link, source.ref)
    was_asked = _claim(link, source, mark, clock())
    # Asked before it is looked for: what is over by now is found.
    is_pending = _is_busy(source) or (was_asked and _has_task(link))
    children = born(link, source, birth)
    if is_pending and (not children or birth.by_bytes):
        raise _pending(source)
    child = None
    for each in children:
        if child is None and not birth.by_bytes:
            child = each
        else:
            destroy(each)
    if child is None:
        try:
            child = vdis.get(link, birth.make())
        except errors.Unknown:
            raise
        except errors.VolumeError:
            vdis.drop(link, source.ref, [vdis.NEXT])
            raise
    birth.finish(child)
    vdis.drop(link, source.ref, [vdis.NEXT])
    return vdis.get(link, child.ref)


def need_quiet(link: Link, source: Vdi) -> None:
    """Make sure that a copy which a mark asks for can no longer be born.

    :raises Busy: the server may be about to make it
    """
    if _is_busy(source) or _has_task(link):
        raise _pending(source)


def _is_busy(source: Vdi) -> bool:
    return bool(BUSY.intersection(source.operations.values()))


def _has_task(link: Link) -> bool:
    """Say whether the server has a copy to make, of whatever it is."""
    return any(
        record['status'] in tasks.OPEN
        and record['name_label'].endswith(COPIES)
        for record in link.call('task.get_all_records').values()
    )


def _pending(source: Vdi) -> errors.Busy:
    return errors.Busy(
        f'{source.name} is being copied at the server, by an earlier call '
        'whose reply was lost; wait for it'
    )


def born(link: Link, source: Vdi, birth: Birth) -> list[Vdi]:
    """Return the unfinished copies of a source for a thing.

    One that may lack bytes is told only to whoever will not believe it.
    """
    names = {source.name, vdis.name(birth.thing)}
    found = [vdi for name in sorted(names) for vdi in vdis.by_name(link, name)]
    return [
        vdi for vdi in unfinished(found, birth.thing.id)
        if birth.by_bytes or (
            vdi.is_snapshot == birth.is_snapshot
            and not _is_by_bytes(vdi)
        )
    ]


def unfinished(found: Iterable[Vdi], id: str) -> list[Vdi]:
    """Return those that were born for an id, and have no keys of their own."""
    return [
        vdi for vdi in found
        if vdi.managed and is_born(vdi) and _mark_id(vdi) == id
    ]


def is_born(vdi: Vdi) -> bool:
    """Say whether a VDI bears the mark as a copy does, not as a source."""
    return vdis.NEXT in vdi.keys and vdi.keys.get(vdis.OWN) != vdi.uuid


def is_stale(vdi: Vdi, now: float) -> bool:
    """Say whether nobody can be at work any more on what bears the mark."""
    mark = Mark.of(vdi)
    return mark is not None and now > mark.until


def _is_by_bytes(vdi: Vdi) -> bool:
    mark = Mark.of(vdi)
    return mark is None or mark.by_bytes


def _mark_id(vdi: Vdi) -> str:
    mark = Mark.of(vdi)
    return mark.id if mark else ''


def _claim(link: Link, source: Vdi, mark: Mark, now: float) -> bool:
    """Write the mark on the source; say if the thing was asked for before."""
    if source.keys.get(vdis.OWN) != source.uuid:
        vdis.put(link, source.ref, {vdis.OWN: source.uuid})
    there = Mark.of(source)
    if there is not None:
        if (there.id, there.by_bytes) == (mark.id, mark.by_bytes):
            return True  # by whomever: the work is ours now
        if there.id != mark.id and now <= there.until and (
            there.owner not in ('', link.originator)
        ):
            raise errors.Busy(
                f'{source.name} is being copied by another service '
                f'({there.owner}); wait for it'
            )
        vdis.drop(link, source.ref, [vdis.NEXT])
    try:
        link.call(
            'VDI.add_to_other_config', source.ref, vdis.NEXT, str(mark))
    except errors.Conflict as failed:
        if failures.code(failed) != 'MAP_DUPLICATE_KEY':
            raise
        raise errors.Busy(
            f'{source.name} is being copied by another service; wait for it'
        ) from failed
    return there is not None and there.id == mark.id
