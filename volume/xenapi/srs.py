# SPDX-License-Identifier: Apache-2.0
"""SRs: found, introduced, plugged in again, or created once.

An SR that exists is never formatted. One is created only if ``create`` says
so, none of its name is there, and probing its devices finds nothing; two
services that start together agree by a key of the pool, which the server
lets only one of them add. The key says until when it holds, so that one
whose owner died is taken over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from volume import errors
from volume.xenapi import failures
from volume.xenapi import kinds
from volume.xenapi import tasks
from volume.xenapi.kinds import Kind
from volume.xenapi.link import Link

LOG = logging.getLogger(__name__)

LOCK = 'volume:sr:{}'
LOCK_S = 900.0
WAIT_S = 120.0
POLL_S = 1.0
PLUG_S = 300.0
PENDING_S = 20.0
KEY = 'volume:sr'
# What the server answers when it has nothing to probe a type with.
NO_PROBE = ('FAULT', 'INTERNAL_ERROR', 'SR_OPERATION_NOT_SUPPORTED',
            'UNIMPLEMENTED_IN_SM_BACKEND', 'NOT_IMPLEMENTED')
PROLOGUE = re.compile(r'<!(DOCTYPE|ENTITY)', re.I)
XML_CHARACTERS_MAX = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class Sr:
    """An SR, as the server knew it a moment ago."""

    ref: str
    uuid: str
    name: str
    type: str
    shared: bool
    total_bytes: int
    used_bytes: int
    promised_bytes: int
    pbds: tuple[str, ...]
    keys: Mapping[str, str]
    sm_config: Mapping[str, str]
    operations: Mapping[str, str]

    @classmethod
    def of(cls, ref: str, record: Mapping[str, Any]) -> Sr:
        """Return it from the server's record."""
        return cls(
            ref=ref,
            uuid=record['uuid'],
            name=record['name_label'],
            type=record['type'],
            shared=bool(record['shared']),
            total_bytes=int(record['physical_size']),
            used_bytes=int(record['physical_utilisation']),
            promised_bytes=int(record['virtual_allocation']),
            pbds=tuple(record['PBDs']),
            keys=dict(record['other_config']),
            sm_config=dict(record['sm_config']),
            operations=dict(record['current_operations']),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Pbd:
    """How one host reaches an SR."""

    ref: str
    host: str
    attached: bool
    device_config: Mapping[str, str]


def get(link: Link, ref: str) -> Sr:
    """Return an SR by its reference.

    :raises NotFound: the pool knows it no more
    """
    return Sr.of(ref, link.call('SR.get_record', ref))


def by_uuid(link: Link, uuid: str) -> Sr | None:
    """Return an SR by its uuid."""
    try:
        return get(link, link.call('SR.get_by_uuid', uuid))
    except errors.NotFound:
        return None


def by_name(link: Link, name: str) -> Sr | None:
    """Return the only SR of a name.

    :raises Conflict: there are several
    """
    refs = link.call('SR.get_by_name_label', name)
    if len(refs) > 1:
        raise errors.Conflict(
            f'{len(refs)} SRs of the pool are called {name!r}: rename the '
            'others, or name the right one by sr_uuid'
        )
    return get(link, refs[0]) if refs else None


def pbds(link: Link, sr: Sr) -> list[Pbd]:
    """Return how each host reaches the SR."""
    found = []
    for ref in sr.pbds:
        with contextlib.suppress(errors.NotFound):
            record = link.call('PBD.get_record', ref)
            found.append(Pbd(
                ref, record['host'], bool(record['currently_attached']),
                dict(record['device_config']),
            ))
    return found


def hosts(link: Link) -> dict[str, Mapping[str, Any]]:
    """Return the records of the pool's hosts."""
    found: dict[str, Mapping[str, Any]] = link.call('host.get_all_records')
    return found


def pool(link: Link) -> tuple[str, Mapping[str, Any]]:
    """Return the pool, and its record."""
    found = link.call('pool.get_all_records')
    ref, record = next(iter(found.items()))
    return ref, record


def abilities(
    link: Link, type: str
) -> tuple[frozenset[str], frozenset[str]]:
    """Return what the storage driver of a type can do, and its formats."""
    for record in link.call('SM.get_all_records').values():
        if record['type'].replace('lvhd', 'lvm') == type:
            return frozenset(
                name.partition('/')[0] for name in record['features']
            ), frozenset(record.get('supported_image_formats') or ())
    return frozenset(), frozenset()


def scan(link: Link, sr: Sr) -> None:
    """Let the server look at what is stored, and how much.

    A user of a lower role than that leaves it to the server, which looks
    by itself every half minute.
    """
    try:
        tasks.run(link, 'SR.scan', (sr.ref,), f'SR {sr.uuid}')
    except errors.Denied as denied:
        LOG.info('%s', denied)


# Plugging.


def repair(
    link: Link, sr: Sr, device_config: Mapping[str, str] | None = None,
    only_enabled: bool = False,
) -> list[str]:
    """Give each host that should have the SR its PBD, and plug it in.

    Returns what could not be done, host by host. A shared SR belongs on
    every host; another on the one that has it.
    """
    there = pbds(link, sr)
    records = {
        ref: record for ref, record in hosts(link).items()
        if record['enabled'] or not only_enabled
    }
    troubles = []
    missing = _missing(link, sr, there, records)
    for host in missing:
        try:
            link.call('PBD.create', {
                'host': host, 'SR': sr.ref, 'other_config': {},
                'device_config': dict(device_config or {}) or (
                    _config_like(there)),
            })
        except errors.VolumeError as failed:
            if failures.code(failed) != 'PBD_EXISTS':
                troubles.append(_trouble(records, host, failed))
    if missing:
        there = pbds(link, get(link, sr.ref))
    for pbd in there:
        if not pbd.attached and pbd.host in records:
            try:
                tasks.run(
                    link, 'PBD.plug', (pbd.ref,), f'SR {sr.uuid}', PLUG_S
                )
            except errors.VolumeError as failed:
                troubles.append(_trouble(records, pbd.host, failed))
    return troubles


def is_served(link: Link, sr: Sr, found: Sequence[Pbd]) -> bool:
    """Say whether the server can change the SR now.

    A shared one is changed by the master, whoever else has it plugged.
    """
    plugged = {pbd.host for pbd in found if pbd.attached}
    if not sr.shared:
        return bool(plugged)
    return bool(plugged) and pool(link)[1]['master'] in plugged


def _missing(
    link: Link, sr: Sr, there: Sequence[Pbd],
    records: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    if not sr.shared:
        return [] if there else [pool(link)[1]['master']]
    have = {pbd.host for pbd in there}
    return [ref for ref in records if ref not in have]


def _config_like(there: Sequence[Pbd]) -> dict[str, str]:
    """Return the keys of another host's PBD, if none of them is a secret.

    A secret is kept by the server apart for each host, and never told.
    """
    if not there:
        raise errors.Invalid(
            'no host has a PBD of this SR: give sr_type and device_config'
        )
    config = dict(there[0].device_config)
    config.pop('SRmaster', None)
    if any(key.endswith('_secret') for key in config):
        raise errors.Invalid(
            'a host lacks this SR, whose keys hold a password: give sr_type '
            'and device_config'
        )
    return config


def _trouble(
    records: Mapping[str, Mapping[str, Any]], host: str,
    failed: errors.VolumeError,
) -> str:
    name = records.get(host, {}).get('name_label', host)
    return f'host {name}: {failed}'


# Introducing and creating.


def introduce(
    link: Link, uuid: str, name: str, kind: Kind,
    device_config: Mapping[str, str], sm_config: Mapping[str, str],
) -> Sr:
    """Make an SR known that exists on the storage; nothing is formatted.

    :raises Unavailable: no host could plug it in; the pool forgets it then
    """
    try:
        ref = link.call(
            'SR.introduce', uuid, name, 'Introduced by volume-service.',
            kind.type, 'user', kind.shared, dict(sm_config),
        )
    except errors.Conflict as failed:
        if failures.code(failed) != 'SR_UUID_EXISTS':
            raise
        ref = link.call('SR.get_by_uuid', uuid)
    sr = get(link, ref)
    troubles = repair(link, sr, device_config)
    if not is_served(link, sr, pbds(link, get(link, ref))):
        raise errors.Unavailable(
            f'SR {uuid} was introduced, and no host that matters can plug '
            f'it in: {"; ".join(troubles) or "no PBD"}'
        )
    return get(link, ref)


def create(
    link: Link, name: str, kind: Kind, device_config: Mapping[str, str],
    sm_config: Mapping[str, str], owner: str,
    clock: Callable[[], float] = time.time,
) -> Sr:
    """Format an SR, unless there is one of the name: also one just made.

    :raises Conflict: the devices hold something already
    :raises Busy: another service is making it
    """
    with lock(link, name, owner, clock):
        refuse_pending(link)
        found = by_name(link, name)
        if found is not None:
            return found
        master = pool(link)[1]['master']
        refuse_used(link, master, kind, device_config, sm_config)
        try:
            ref = tasks.run(link, 'SR.create', (
                master, dict(device_config), '0', name,
                'Made by volume-service.', kind.type, 'user', kind.shared,
                dict(sm_config),
            ), f'SR {name}')
        except errors.Unknown:
            # Its name tells, for it is made under this lock alone.
            found = by_name(link, name)
            if found is None:
                raise
            ref = found.ref
        sr = get(link, ref)
    for trouble in repair(link, sr, device_config):
        LOG.warning('SR %s: %s', name, trouble)
    return get(link, ref)


def refuse_pending(link: Link, wait_s: float = PENDING_S) -> None:
    """Wait for an SR that a service may have asked for before it died.

    :raises Busy: the pool is still making one
    """
    deadline = time.monotonic() + wait_s
    while any(
        record['status'] in tasks.OPEN
        and record['name_label'].endswith('SR.create')
        for record in link.call('task.get_all_records').values()
    ):
        if time.monotonic() >= deadline:
            raise errors.Busy(
                'the pool is making an SR already: wait until it is there'
            )
        time.sleep(POLL_S)


def refuse_used(
    link: Link, host: str, kind: Kind, device_config: Mapping[str, str],
    sm_config: Mapping[str, str],
) -> None:
    """Probe what is about to be formatted.

    :raises Conflict: an SR lies there, and which
    """
    if kind.family in ('lun', 'array'):
        # These make no file system: what their probe lists are SRs that
        # the pool knows, and LUNs are looked at one by one.
        return
    try:
        text = link.call(
            'SR.probe', host, dict(device_config), kind.type,
            dict(sm_config),
        )
    except errors.VolumeError as failed:
        code = failures.code(failed)
        if code in NO_PROBE:
            return  # the driver refuses by itself what is not empty
        raise
    there = [
        (each.findtext('UUID') or '').strip()
        for each in xml(text).iter('SR')
    ]
    there = [uuid for uuid in there if uuid]
    if there and kind.type in ('nfs', 'smb', 'cephfs', 'glusterfs',
                               'moosefs') and 'nosubdir' not in sm_config:
        # Each SR has a directory of its own there: another is no harm. One
        # that the pool does not know may be the one that is looked for.
        unknown = [uuid for uuid in there if by_uuid(link, uuid) is None]
        there = unknown
    if there:
        raise errors.Conflict(
            f'{kind.type}: create = true would format what holds '
            f'{"an SR" if len(there) == 1 else "SRs"} already '
            f'({", ".join(there):.200}): use it with sr_uuid, or give '
            'another place'
        )


def xml(text: str) -> ElementTree.Element:
    """Return the tree of what the server says in XML; an empty one if none.

    :raises Invalid: it is no plain XML
    """
    text = (text or '').strip()
    if not text:
        return ElementTree.Element('none')
    if len(text) > XML_CHARACTERS_MAX or PROLOGUE.search(text):
        raise errors.Invalid('the server\'s XML is not to be trusted')
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as failed:
        raise errors.Invalid(
            f'the server\'s XML cannot be read: {failed}'
        ) from failed


@contextlib.contextmanager
def lock(
    link: Link, name: str, owner: str,
    clock: Callable[[], float] = time.time, wait_s: float = WAIT_S,
    hold_s: float = LOCK_S,
) -> Iterator[None]:
    """Hold the pool-wide right to make the SR of a name, or to lend one.

    The right is the key with the highest number; nobody replaces one that
    is there, but who finds it void may add the next. The clocks of services
    must agree to within ``hold_s``.

    :raises Busy: another service has it, and is not done yet
    """
    ref, _ = pool(link)
    prefix = LOCK.format(name)
    deadline = time.monotonic() + wait_s
    value = ''
    while True:
        held = _held(link, prefix)
        last = max(held, default=0)
        if held and held[last] == value:
            break  # the reply was lost, and it was done
        if not held or _is_void(held[last], owner, clock()):
            value = f'{owner}|{clock() + hold_s:.3f}'
            try:
                link.call(
                    'pool.add_to_other_config', ref, f'{prefix}:{last + 1}',
                    value,
                )
                break
            except errors.Unknown:
                continue
            except errors.Conflict as failed:
                if failures.code(failed) != 'MAP_DUPLICATE_KEY':
                    raise
                continue
        if time.monotonic() >= deadline:
            raise errors.Busy(
                f'another service is at work on SR {name} '
                f'({held[last].partition("|")[0]}): wait for it'
            )
        time.sleep(POLL_S)
    try:
        yield
    finally:
        with contextlib.suppress(errors.VolumeError):
            held = _held(link, prefix)
            mine = max((n for n in held if held[n] == value), default=0)
            for number in sorted(held, reverse=True):
                if number <= mine:
                    link.call(
                        'pool.remove_from_other_config', ref,
                        f'{prefix}:{number}',
                    )


def sweep_lock(link: Link, name: str, owner: str) -> None:
    """Remove what a service left that died when the SR was there already."""
    ref, _ = pool(link)
    prefix = LOCK.format(name)
    for number, value in _held(link, prefix).items():
        if _is_void(value, owner, time.time()):
            link.call(
                'pool.remove_from_other_config', ref, f'{prefix}:{number}'
            )


def _held(link: Link, prefix: str) -> dict[int, str]:
    """Return the keys of a lock by their numbers."""
    _, record = pool(link)
    return {
        int(number): value
        for key, value in record['other_config'].items()
        if key.startswith(f'{prefix}:')
        and (number := key.rpartition(':')[2]).isdigit()
        and key == f'{prefix}:{number}'
    }


def _is_void(held: str, owner: str, now: float) -> bool:
    """Say whether a lock holds no more: it ran out, or was ours."""
    name, _, until = held.rpartition('|')
    try:
        return name == owner or now > float(until)
    except ValueError:
        return True


def describe(found: Mapping[str, str]) -> str:
    """Return keys in one line, without their secrets."""
    shown = kinds.shown(found)
    return ', '.join(f'{key}={value}' for key, value in shown.items())
