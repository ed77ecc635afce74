# SPDX-License-Identifier: Apache-2.0
"""``volume-manage lvm``: see whether groups, metadata and database agree.

It changes nothing. Of a thin pool the kernel is asked to keep a snapshot of
the metadata for a moment, in which ``thin_check`` looks while the pool is
used.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from volume import errors
from volume.drivers.lvm import deltas
from volume.drivers.lvm import names
from volume.drivers.lvm import options
from volume.drivers.lvm.groups import EVERYTHING
from volume.drivers.lvm.groups import Group
from volume.drivers.lvm.options import Settings
from volume.drivers.lvm.report import Lv
from volume.drivers.lvm.report import Vg
from volume.drivers.lvm.thick import Thick
from volume.drivers.lvm.thin import Thin
from volume.node import Node

Row = dict[str, str]
Show = Callable[[list[Row]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What the database has: ``size_bytes`` of volumes, None of snapshots."""

    pool: str
    handle: str
    size_bytes: int | None


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    command.add_argument('backend', help='section of the configuration')
    command.add_argument(
        'action', choices=['check'],
        help='see whether groups, metadata and database agree',
    )


def run(
    args: argparse.Namespace, backends: Mapping[str, tuple[Any, Node]],
    known: Callable[[str], Mapping[str, Known]], show: Show,
) -> int:
    """Compare; 1 says that something needs a look."""
    if args.backend not in backends:
        raise errors.NotFound(
            f'there is no backend {args.backend} with driver = lvm; there '
            f'are {", ".join(sorted(backends)) or "none"}'
        )
    conf, node = backends[args.backend]
    settings = options.read(conf)
    rows = check(settings, node, known(args.backend))
    show(rows)
    return int(bool(rows))


def check(
    settings: Settings, node: Node, known: Mapping[str, Known]
) -> list[Row]:
    """Return what is not as it should be, with a remedy for each."""
    rows: list[Row] = []
    for name in settings.groups:
        group = Group(name, settings, node)
        here = {i: each for i, each in known.items() if each.pool == name}
        try:
            rows += _group(group)
            vg = group.look(EVERYTHING)
        except errors.VolumeError as failed:
            rows.append(_row(name, str(failed), 'see the message'))
            continue
        rows += [*_left(vg), *_compared(vg, here)]
    return rows


def _group(group: Group) -> Iterator[Row]:
    kind = Thin if group.settings.is_thin else Thick
    store = kind(group)
    store.check(may_format=False)
    if store.trouble:
        yield _row(group.name, store.trouble, 'see the message')
    if group.settings.is_thin:
        try:
            deltas.Deltas(group).verify()
        except errors.VolumeError as failed:
            yield _row(
                f'{group.name}/{group.settings.thin_pool}', str(failed),
                'look at it before anything else is stored there',
            )


def _left(vg: Vg) -> Iterator[Row]:
    """Yield what a job has left, or does now; and what lies about itself."""
    for lv in vg.lvs:
        what = f'{vg.name}/{lv.name}'
        if lv.role in ('draft', 'tail', 'reverted', 'deleted'):
            yield _row(
                what, f'{lv.role}: a job is at work, or has left it',
                'the next try of the job, or deleting the volume, ends it',
            )
        elif not lv.role and (ids := _tagged(lv)):
            yield _row(
                what, f'it bears the tag of {", ".join(ids)}, and not its '
                'name',
                'rename it back if it was renamed by hand; else remove the '
                'tag (lvchange --deltag)',
            )
        elif lv.role == 'snap' and lv.is_invalid:
            yield _row(
                what, 'it overflowed, and its bytes are lost',
                'delete the snapshot; raise snapshot_percent',
            )
        elif lv.role and 'partial' in lv.health:
            yield _row(what, 'it lies on a disk that is missing',
                       'connect the disk')


def _compared(vg: Vg, known: Mapping[str, Known]) -> Iterator[Row]:
    """Yield where the group and the database differ."""
    there = {
        lv.id: lv for lv in vg.lvs if lv.role in ('volume', 'snap')
    }
    for id, lv in there.items():
        if id not in known:
            yield _row(
                f'{vg.name}/{lv.name}', 'no row of the database has it',
                '"volume-manage reconcile" adopts or removes it',
            )
    for id, row in known.items():
        if id not in there:
            if row.handle:
                yield _row(
                    f'{vg.name}/{row.handle}',
                    f'the database has {id}, and the group has not',
                    'look for it under another name; restore it, or delete '
                    'its row by deleting it',
                )
        elif (row.size_bytes or 0) > there[id].size_bytes:
            yield _row(
                f'{vg.name}/{there[id].name}',
                f'it has {there[id].size_bytes} bytes, and should have '
                f'{row.size_bytes}',
                'extend it by hand (lvextend), zero the new part first',
            )


def _tagged(lv: Lv) -> list[str]:
    if lv.name.startswith(f'{names.DISOWNED}-'):
        return []
    return sorted(
        tag for tag in lv.tags if tag.startswith(('volume:', 'snapshot:'))
    )


def _row(what: str, why: str, remedy: str) -> Row:
    return {'what': what, 'why': why, 'remedy': remedy}
