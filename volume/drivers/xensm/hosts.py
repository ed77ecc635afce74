# SPDX-License-Identifier: Apache-2.0
"""Let hosts reach a VDI, and end that: in its own pool, or in another.

Who was let in stands on the VDI itself, in ``other_config``, so that it can
be told whose VBD is whose without asking anybody::

    volume:host:<name>   <volume id> <ro or rw> <pool uuid> <vm uuid or ->
    volume:lent          <volume id> <pool uuid>

The volume's id stands in the value because the server copies these keys to
snapshots and clones, of which they are not true.

In its own pool nothing but the VBD is needed. An SR has one owner pool at a
time: to another pool a VDI is *lent*. It is marked first, let go of here,
and only then may the other pool be told how to introduce its SR; and it is
taken back once that pool, asked by us, shows that nothing of it is left.

The storage itself forbids nothing to a pool. So a connector looks whether its
host may still plug: in the VDI's own pool by the key on it, before and after;
in another pool by a key of that pool (``plugs.permit``), under a lock that it
shares with whoever takes the VDI back (``plugs.lending``). A host that comes
too late finds that it may not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from volume import errors
from volume import model
from volume.drivers.xensm.peers import Peers
from volume.drivers.xensm.vdis import Vdi
from volume.xenapi import kinds
from volume.xenapi import plugs
from volume.xenapi import srs
from volume.xenapi.link import Link
from volume.xenapi.srs import Sr

LENT = 'volume:lent'
FORCE_AFTER_S = 20.0
LOCK_WAIT_S = 20.0
OWN = frozenset({
    'sr_uuid', 'sr_type', 'vdi_uuid', 'volume_id', 'name_label', 'pool',
    'host', 'access', 'introduce_sr_keys',
})


class Lender(Protocol):
    """How the storage that holds a VDI lets go of it, and takes it back."""

    def let_go(self) -> None:
        """Use it here no more, and prove it; the same if repeated."""

    def take_back(self) -> None:
        """Use it here again; the same if repeated."""

    def device_config(self) -> Mapping[str, str]:
        """Return what a PBD in another pool needs, secrets in the clear."""

    def end_in(self, peer: Link) -> None:
        """End what of its SR is left in another pool, and prove it.

        The VDI has no VBD there any more.

        :raises Busy: something is left
        """


@dataclasses.dataclass(frozen=True)
class Place:
    """A volume's VDI, and the SR that it lies in."""

    link: Link
    sr: Sr
    vdi: Vdi
    volume_id: str
    lender: Lender | None = None
    why_not: str = ''
    """Why it cannot be lent, if there is no lender."""

    def lent_to(self) -> str:
        """Return the uuid of the pool that has it, if another has."""
        return lent_to(self.vdi, self.volume_id)

    def pool(self) -> str:
        """Return the uuid of the pool that owns the SR."""
        return str(plugs.pool(self.link)['uuid'])


@dataclasses.dataclass(frozen=True)
class Grant:
    """A host that was let in."""

    host: str
    access: str
    pool_uuid: str
    vm_uuid: str


def lent_to(vdi: Vdi, volume_id: str) -> str:
    """Return the uuid of the pool that a VDI is lent to, or nothing."""
    owner, _, pool = vdi.keys.get(LENT, '').partition(' ')
    return pool if owner == volume_id else ''


def grants(vdi: Vdi, volume_id: str) -> dict[str, Grant]:
    """Return who was let in, by the host's name."""
    found = {}
    for key, value in vdi.keys.items():
        words = value.split(' ')
        if key.startswith(plugs.GRANT) and len(words) == 4 and (
            words[0] == volume_id
        ):
            name = key.removeprefix(plugs.GRANT)
            found[name] = Grant(name, words[1], words[2], words[3])
    return found


def need_home(vdi: Vdi, volume_id: str) -> None:
    """Refuse to touch what another pool has.

    :raises Busy: it is lent
    """
    if pool := lent_to(vdi, volume_id):
        raise errors.Busy(
            f'volume {volume_id} is lent to pool {pool}: detach it there'
        )


def grant(
    place: Place, peers: Peers, host: model.Host, access: model.Access
) -> model.Connection:
    """Let a host in, and say what its connector needs to know."""
    own = place.pool()
    target = _pool_of(place, host, own)
    lent = place.lent_to()
    if target == own:
        need_home(place.vdi, place.volume_id)
        _note(place, host, access, target)
        return _connection(place, own, host, access)
    if place.lender is None:
        raise errors.Unsupported(
            f'volume {place.volume_id} cannot be attached to pool {target}: '
            f'{place.why_not}'
        )
    peer = peers.find(target)
    if lent not in ('', target):
        need_home(place.vdi, place.volume_id)
    others = [
        each.host for each in grants(place.vdi, place.volume_id).values()
        if each.pool_uuid != target
    ]
    if others:
        raise errors.Busy(
            f'volume {place.volume_id} is attached by {", ".join(others)} in '
            'another pool: detach it there first'
        )
    _note(place, host, access, target)
    if not lent:
        place.link.call(
            'VDI.add_to_other_config', place.vdi.ref, LENT,
            f'{place.volume_id} {target}',
        )
    place.lender.let_go()
    plugs.permit(peer, place.vdi.uuid, host.name, place.volume_id)
    return _connection(
        place, own, host, access, place.lender.device_config()
    )


def revoke(place: Place, peers: Peers, host: model.Host) -> None:
    """Forbid a host to plug, end what it has plugged, and prove it.

    If it was the last one of another pool, take the VDI back.
    """
    lent = place.lent_to()
    known = grants(place.vdi, place.volume_id)
    others = [each for each in known.values() if each.host != host.name]
    link = peers.find(lent) if lent else place.link
    ends = lent != '' and not others
    with contextlib.ExitStack() as stack:
        if lent:
            stack.enter_context(srs.lock(
                link, plugs.lending(place.vdi.uuid), link.originator,
                hold_s=plugs.LEND_S, wait_s=LOCK_WAIT_S,
            ))
            plugs.forbid(link, place.vdi.uuid, host.name)
        _drop(place, f'{plugs.GRANT}{host.name}')
        vdi = plugs.find(link, 'VDI', place.vdi.uuid)
        if vdi is not None:
            _end(link, vdi, host, known.get(host.name), others)
        if ends and place.lender is not None:
            place.lender.end_in(link)
    if ends:
        if place.lender is not None:
            place.lender.take_back()
        _drop(place, LENT)


def _pool_of(place: Place, host: model.Host, own: str) -> str:
    """Return the uuid of the pool that a host is in.

    :raises Invalid: it does not say so, and is none of ours by name
    """
    if found := host.properties.get('xensm_pool'):
        return found
    # A connector of nova's tells its name and address only.
    for each in place.link.call('host.get_all_records').values():
        names = _names(each)
        if host.name in names or names.intersection(host.addresses):
            return own
    raise errors.Invalid(
        f'host {host.name} does not say in which pool it is (xensm_pool in '
        'its connector), and the pool of this volume has none of that name '
        'or address'
    )


def _names(host: Mapping[str, Any]) -> set[str]:
    return {host['name_label'], host['hostname'], host['address']}


def _note(
    place: Place, host: model.Host, access: model.Access, pool: str
) -> None:
    key = f'{plugs.GRANT}{host.name}'
    value = ' '.join((
        place.volume_id, access.value, pool,
        host.properties.get('xensm_vm') or '-',
    ))
    there = place.vdi.keys.get(key)
    if there == value:
        return
    if there is not None:
        _drop(place, key)
    place.link.call('VDI.add_to_other_config', place.vdi.ref, key, value)


def _drop(place: Place, key: str) -> None:
    place.link.call('VDI.remove_from_other_config', place.vdi.ref, key)


def _connection(
    place: Place,
    own: str,
    host: model.Host,
    access: model.Access,
    config: Mapping[str, str] | None = None,
) -> model.Connection:
    """Return what the host's connector needs, and not a key more."""
    config = config or {}
    clash = sorted(OWN.intersection(config))
    if clash:
        raise errors.Unsupported(
            f'the SR has keys that a connection has for itself: '
            f'{", ".join(clash)}'
        )
    secrets = {k: v for k, v in config.items() if kinds.is_secret(k)}
    return model.Connection('xensm', {
        **{k: v for k, v in config.items() if k not in secrets},
        'sr_uuid': place.sr.uuid,
        'sr_type': place.sr.type,
        'vdi_uuid': place.vdi.uuid,
        'volume_id': place.volume_id,
        'name_label': place.sr.name,
        'introduce_sr_keys': sorted([*config, 'sr_type']),
        'pool': own,
        'host': host.name,
        'access': access.value,
    }, secrets)


def _end(
    link: Link,
    vdi: str,
    host: model.Host,
    mine: Grant | None,
    others: Iterable[Grant],
) -> None:
    """End the VBDs of a host: all that are not another's.

    :raises Busy: a guest keeps it, or somebody plugged it in again
    """
    others = list(others)
    for _ in range(2):
        left = _mine(link, vdi, host, mine, others)
        for vbd in left:
            plugs.end_vbd(
                link, vbd, by_force=True, wait_s=FORCE_AFTER_S
            )
        if not left:
            return
    if _mine(link, vdi, host, mine, others):
        raise errors.Busy(
            f'a VDI that host {host.name} may no longer use was plugged in '
            'again while it was unplugged'
        )


def _mine(
    link: Link,
    vdi: str,
    host: model.Host,
    mine: Grant | None,
    others: list[Grant],
) -> list[str]:
    found = []
    for ref, vbd in plugs.vbds(link, vdi).items():
        vm = plugs.record(link, 'VM', vbd['VM'])
        mark = vbd['other_config'].get(plugs.HOST, '')
        # What the pool itself has plugged, to export it, goes by itself.
        if vm is None or (vm['is_control_domain'] and not mark):
            continue
        if not others:
            is_mine = True  # nobody else may have it plugged
        elif mark:
            is_mine = mark == host.name
        elif mine is not None and mine.vm_uuid == vm['uuid']:
            is_mine = True
        else:
            is_mine = not _is_of(link, vm, others)
        if is_mine:
            found.append(ref)
    return found


def _is_of(
    link: Link, vm: Mapping[str, Any], others: list[Grant]
) -> bool:
    """Say whether a VM is one that other hosts were let in for."""
    if not others:
        return False
    names = {vm['uuid']}
    host = plugs.record(link, 'host', vm['resident_on'])
    if host is not None:
        names |= _names(host)
    return any(names.intersection((o.host, o.vm_uuid)) for o in others)
