# SPDX-License-Identifier: Apache-2.0
"""Several paths to one disk: a map of device-mapper, kept by multipathd.

Most hosts make maps only of what they were told to (``find_multipaths
strict``), so the volume's WWID is told, and taken back with the last path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence

from volume import errors
from volume.node import CommandFailed
from volume.node import Node
from volume.node import Op

MAP_S = 15.0
POLL_S = 0.2
UUID = 'mpath-'
BLOCK = '/sys/block'


@dataclasses.dataclass(frozen=True, slots=True)
class Map:
    """A map: its kernel name (``dm-0``), its own, its WWID, its paths."""

    device: str
    name: str
    wwid: str
    paths: tuple[str, ...]

    @property
    def path(self) -> str:
        return f'/dev/mapper/{self.name}'


def is_running(node: Node) -> bool:
    """Say whether this host has a multipathd that answers."""
    try:
        node.run('multipathd', 'show', 'daemon')
    except (CommandFailed, errors.Unavailable):
        return False
    return True


def over(node: Node, disks: Sequence[str]) -> list[Map]:
    """Return the maps that have one of the disks as a path."""
    listed = node.configure([
        Op.list(f'{BLOCK}/{disk}/holders') for disk in disks
    ])
    holders = sorted({
        name for names in listed if isinstance(names, list) for name in names
    })
    found = [_map(node, device) for device in holders]
    return [each for each in found if each is not None]


def of(node: Node, wwid: str) -> Map | None:
    """Return the map of a WWID, also one without any path."""
    names, = node.configure([Op.list(BLOCK)])
    maps = [
        name for name in names if name.startswith('dm-')
    ] if isinstance(names, list) else []
    uuids = node.configure([
        Op.get(f'{BLOCK}/{name}/dm/uuid') for name in maps
    ])
    for name, uuid in zip(maps, uuids, strict=True):
        if uuid == f'{UUID}{wwid}':
            return _map(node, name)
    return None


def gather(node: Node, wwid: str, disks: Sequence[str]) -> Map:
    """Return the map of these disks, making it, or adding what it lacks.

    :raises Unavailable: multipathd makes none
    """
    _multipath(node, '-a', wwid)
    late = time.monotonic() + MAP_S
    while True:
        found = over(node, disks)
        has = found[0].paths if found else ()
        lacking = [disk for disk in disks if disk not in has]
        if found and not lacking:
            return found[0]
        if time.monotonic() > late:
            break
        for disk in lacking:
            with contextlib.suppress(CommandFailed):
                node.run('multipathd', 'add', 'path', disk)
        time.sleep(POLL_S)
    if found:
        return found[0]  # with fewer paths, which the caller says
    raise errors.Unavailable(
        f'multipathd makes no map of {", ".join(disks)} ({wwid}): see '
        '"multipath -v3", and whether /etc/multipath.conf excludes them'
    )


def path_of(node: Node, found: Map) -> str:
    """Return a map's path when udev has made it, and it is this map's.

    :raises Unavailable: it makes none
    """
    late = time.monotonic() + MAP_S
    while not _leads_to(node, found):
        if time.monotonic() > late:
            raise errors.Unavailable(
                f'udev makes no {found.path} that leads to {found.device}: '
                f'see "udevadm info /sys/block/{found.device}"'
            )
        time.sleep(POLL_S)
    return found.path


def part(node: Node, disks: Sequence[str]) -> None:
    """Take paths out of their map; others carry it on."""
    for disk in disks:
        with contextlib.suppress(CommandFailed):
            node.run('multipathd', 'del', 'path', disk)
    late = time.monotonic() + MAP_S
    while over(node, disks):
        if time.monotonic() > late:
            raise errors.Unavailable(
                f'multipathd does not let go of {", ".join(disks)}'
            )
        time.sleep(POLL_S)


def fail(node: Node, found: Map) -> None:
    """Have a map without a path fail what it would keep for ever."""
    with contextlib.suppress(CommandFailed):
        node.run('multipathd', 'disablequeueing', 'map', found.name)


def end(node: Node, found: Map) -> None:
    """Remove a map whose last paths go.

    :raises Busy: somebody has it open
    """
    # Its end would wait for what it keeps.
    fail(node, found)
    late = time.monotonic() + MAP_S
    while _is_there(node, found):
        try:
            node.run('multipath', '-f', found.name)
        except CommandFailed as failed:
            if time.monotonic() > late:
                raise errors.Busy(
                    f'map {found.name} cannot be removed: {failed}'
                ) from failed
            time.sleep(POLL_S)
    with contextlib.suppress(CommandFailed):
        _multipath(node, '-w', found.wwid)


def resize(node: Node, found: Map) -> None:
    """Make a map as large as its paths are by now."""
    try:
        node.run('multipathd', 'resize', 'map', found.name)
    except CommandFailed as failed:
        raise errors.Unavailable(
            f'map {found.name} cannot be resized: {failed}'
        ) from failed


def _is_there(node: Node, found: Map) -> bool:
    """Say whether a map is there still; its number is soon another's."""
    uuid, = node.configure([Op.get(f'{BLOCK}/{found.device}/dm/uuid')])
    return uuid == f'{UUID}{found.wwid}'


def _leads_to(node: Node, found: Map) -> bool:
    """Say whether a map's path is its device, and none that was before."""
    there = node.about(found.path)
    if there is None:
        return False
    if there.kind == 'link':
        try:
            to = node.readlink(found.path)
        except errors.NotFound:
            return False  # udev replaces it just now
        return os.path.basename(to) == found.device
    number, = node.configure([Op.get(f'{BLOCK}/{found.device}/dev')])
    return there.device == number


def _map(node: Node, device: str) -> Map | None:
    base = f'{BLOCK}/{device}'
    name, uuid, paths = node.configure([
        Op.get(f'{base}/dm/name'), Op.get(f'{base}/dm/uuid'),
        Op.list(f'{base}/slaves'),
    ])
    if not isinstance(uuid, str) or not uuid.startswith(UUID):
        return None
    return Map(
        device, str(name), uuid.removeprefix(UUID),
        tuple(paths) if isinstance(paths, list) else (),
    )


def _multipath(node: Node, option: str, wwid: str) -> None:
    node.run('multipath', option, wwid)
