# SPDX-License-Identifier: Apache-2.0
"""VBDs and PBDs: what makes a VDI reachable, and what ends that for good.

Both sides use it: the connector on behalf of a compute host, the driver to
end what a host has left behind. Everything may be repeated: a thing that is
gone, unplugged or plugged already is what was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from volume import errors
from volume.xenapi import failures
from volume.xenapi import handlers

Record = dict[str, Any]

VOLUME = 'volume:id'
HOST = 'volume:host'
GRANT = 'volume:host:'
"""On a VDI, with a host's name: whom the service has let in."""
MAY = 'volume:may:'
"""On a pool, with a VDI's uuid and a host's name: what is lent to it."""
HELPER = 'volume:helper'
BROUGHT = 'brought by volume-service for volumes that are attached here'
"""The description of an SR that a connector introduced, and may forget."""

REJECTED = frozenset({'DEVICE_DETACH_REJECTED', 'DEVICE_DETACH_TIMEOUT'})
GONE = frozenset({'HANDLE_INVALID', 'UUID_INVALID'})
UNPLUG_S = 60.0
LEND_S = 300.0  # how long an attach, or the end of one, may take there
IN_USE_S = 30.0
PAUSE_S = 1.0


class Calls(Protocol):
    """A pool, as ``link.Link`` gives it."""

    def call(self, method: str, *args: Any) -> Any:
        """Call a message of the XenAPI; the session goes without saying."""


@contextlib.contextmanager
def fine(*codes: str) -> Iterator[None]:
    """Let pass that the server answers with one of these codes."""
    try:
        yield
    except errors.VolumeError as failed:
        if failures.code(failed) not in codes:
            raise


def find(link: Calls, cls: str, uuid: str) -> str | None:
    """Return the ref of what has a uuid, if the pool knows it."""
    try:
        return str(link.call(f'{cls}.get_by_uuid', uuid))
    except errors.VolumeError as failed:
        if failures.code(failed) not in GONE:
            raise
        return None


def record(link: Calls, cls: str, ref: str) -> Record | None:
    """Return a record, if it is still there."""
    try:
        return dict(link.call(f'{cls}.get_record', ref))
    except errors.VolumeError as failed:
        if failures.code(failed) not in GONE:
            raise
        return None


def pool(link: Calls) -> Record:
    """Return the record of the pool."""
    (found,) = link.call('pool.get_all_records').values()
    return dict(found)


def lending(vdi: str) -> str:
    """Return the name of the lock under which a lent VDI is plugged.

    Its connector holds it from looking whether it may to having done it;
    who forbids it, from forbidding it to having seen that nothing is left.
    """
    return f'lend-{vdi}'


def permit(link: Calls, vdi: str, host: str, volume_id: str) -> None:
    """Let a host of another pool plug a VDI that is lent to it."""
    (ref,) = link.call('pool.get_all_records')
    with fine('MAP_DUPLICATE_KEY'):
        link.call(
            'pool.add_to_other_config', ref, f'{MAY}{vdi}:{host}', volume_id
        )


def forbid(link: Calls, vdi: str, host: str) -> None:
    """Take back what ``permit`` gave."""
    (ref,) = link.call('pool.get_all_records')
    link.call('pool.remove_from_other_config', ref, f'{MAY}{vdi}:{host}')


def vbds(link: Calls, vdi: str) -> dict[str, Record]:
    """Return the VBDs of a VDI, plugged or not, by their refs."""
    return _records(link, 'VBD', record(link, 'VDI', vdi), 'VBDs')


def end_vbd(
    link: Calls,
    vbd: str,
    *,
    by_force: bool = False,
    wait_s: float = UNPLUG_S,
    pause_s: float = PAUSE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Unplug a VBD and destroy it.

    A guest that has the disk mounted, or is still starting, refuses to give
    it up: it is asked again until ``wait_s`` is over. Then ``by_force`` asks
    it no more.

    :raises Busy: the guest keeps it
    """
    left, method = int(wait_s / pause_s), 'VBD.unplug'
    while (found := record(link, 'VBD', vbd)) is not None:
        try:
            with fine('DEVICE_ALREADY_DETACHED'):
                if found['currently_attached']:
                    link.call(method, vbd)
            link.call('VBD.destroy', vbd)
        except errors.VolumeError as failed:
            code = failures.code(failed)
            if code in GONE:
                return
            if code not in REJECTED and not isinstance(
                failed, errors.Unknown
            ):
                raise
            if left:
                left -= 1
                sleep(pause_s)
            elif by_force and method == 'VBD.unplug':
                method = 'VBD.unplug_force'
            else:
                raise


def unplug_sr(link: Calls, sr: str, wait_s: float = IN_USE_S) -> None:
    """Unplug an SR from every host, and prove it.

    What the server itself has plugged in, to export a VDI, goes in time.

    :raises Busy: one of its VDIs is in use
    """
    for pbd, found in pbds(link, sr).items():
        if found['currently_attached']:
            with fine(*GONE):
                handlers.patiently(
                    functools.partial(link.call, 'PBD.unplug', pbd), wait_s
                )
    left = [
        found['host'] for found in pbds(link, sr).values()
        if found['currently_attached']
    ]
    if left:
        raise errors.Busy(
            f'the SR is still plugged on {len(left)} hosts of the pool; '
            'another client has plugged it again'
        )


def plug_sr(link: Calls, sr: str, needed: Mapping[str, str]) -> None:
    """Plug an SR's PBDs; those of the ``needed`` hosts must come up.

    A host that is down must not keep the others from working, so what the
    rest says is left to be repaired. ``needed`` names hosts by their refs.
    """
    missing = dict(needed)
    for pbd, found in pbds(link, sr).items():
        try:
            if not found['currently_attached']:
                link.call('PBD.plug', pbd)
        except errors.VolumeError:
            if found['host'] in needed:
                raise
        missing.pop(found['host'], None)
    if missing:
        raise errors.Unavailable(
            f'the SR has no PBD on {", ".join(missing.values())}: run '
            'volume-manage xensm repair'
        )


def pbds(link: Calls, sr: str) -> dict[str, Record]:
    """Return the PBDs of an SR by their refs."""
    return _records(link, 'PBD', record(link, 'SR', sr), 'PBDs')


def forget_sr(link: Calls, sr: str) -> bool:
    """Unplug and forget an SR that nothing uses; say whether it is gone.

    Forgetting erases nothing: it removes what the pool's database says.
    """
    if in_use(link, sr):
        return False
    try:
        unplug_sr(link, sr, 0.0)
        link.call('SR.forget', sr)
    except errors.VolumeError as failed:
        if failures.code(failed) in GONE:
            return True
        # Somebody attached another of its VDIs a moment ago.
        if failures.code(failed) in ('VDI_IN_USE', 'SR_HAS_PBD'):
            return False
        raise
    return True


def is_brought(link: Calls, sr: str) -> bool:
    """Say whether a connector has brought the SR, and may forget it."""
    found = record(link, 'SR', sr)
    return found is not None and found['name_description'] == BROUGHT


def in_use(link: Calls, sr: str) -> bool:
    """Say whether any VDI of an SR has a VBD, or something going on."""
    vdis = _records(link, 'VDI', record(link, 'SR', sr), 'VDIs')
    return any(
        vdi['VBDs'] or vdi['current_operations'] for vdi in vdis.values()
    )


def _records(
    link: Calls, cls: str, owner: Record | None, field: str
) -> dict[str, Record]:
    """Return the records that another one names; gone ones are left out."""
    found = {
        ref: record(link, cls, ref) for ref in (owner or {}).get(field, ())
    }
    return {ref: each for ref, each in found.items() if each is not None}
