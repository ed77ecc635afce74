# SPDX-License-Identifier: Apache-2.0
"""Ask a pool, step by step, what an SR could be made of.

The server probes by failing: what could complete the keys stands as XML in
its failure. Here it is read into plain rows, whatever the type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from volume import errors
from volume.xenapi import failures
from volume.xenapi import kinds
from volume.xenapi import srs
from volume.xenapi.kinds import Kind
from volume.xenapi.link import Link
from volume.xenapi.options import lines

# What holds the value of a key in the server's rows.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    'serverpath': ('Path',),
    'targetIQN': ('TargetIQN',),
    'SCSIid': ('SCSIid',),
    'device': ('path', 'device'),
    'aggregate': ('aggregate', 'Name', 'name'),
    'storagepool': ('name', 'Name', 'storagepool'),
}
PROVIDERS = ('iscsi', 'hba', 'fcoe')  # how gfs2 reaches its LUN
ASKED_BY_CREATE = ('aggregate', 'storagepool')


@dataclasses.dataclass(frozen=True)
class Step:
    """What the pool said: rows to choose a key from, or SRs."""

    key: str = ''
    """The key that comes next; nothing if the keys are complete."""
    rows: tuple[Mapping[str, str], ...] = ()
    srs: tuple[Mapping[str, str], ...] = ()
    message: str = ''
    can_probe: bool = True

    def choices(self) -> list[str]:
        """Return the values that the next key may have."""
        found = []
        for row in self.rows:
            for column in COLUMNS.get(self.key, (self.key,)):
                if row.get(column, '*') != '*':
                    found.append(row[column])
                    break
        return list(dict.fromkeys(found))


def step(
    link: Link, kind: Kind, device_config: Mapping[str, str],
    host: str = '',
) -> Step:
    """Ask once, with the keys that are known.

    :raises VolumeError: the storage says otherwise that it cannot be so
    """
    host = host or srs.pool(link)[1]['master']
    if kind.probes_ext:
        return _extended(link, kind, device_config, host)
    found: tuple[Mapping[str, str], ...] = ()
    key = _next(kind, device_config)
    try:
        text = link.call(
            'SR.probe', host, dict(device_config), kind.type, {}
        )
        found = tuple(_row(each) for each in srs.xml(text).iter('SR'))
        if key not in ASKED_BY_CREATE:
            return Step(srs=found)
        # A filer lists these only where an SR is wanted without them, and
        # refuses that before it makes anything.
        link.call(
            'SR.create', host, dict(device_config), '0', 'probe', '',
            kind.type, 'user', kind.shared, {},
        )
    except errors.VolumeError as failed:
        if failures.code(failed) in srs.NO_PROBE:
            return Step(can_probe=False, message=str(failed))
        if not key or not failures.code(failed).startswith(failures.PREFIX):
            raise
        tree = _tree(failures.params(failed))
        if tree is None and failures.code(failed) != _missing(key):
            raise
        rows = tuple(_rows(tree)) if tree is not None else ()
        return Step(key, rows, found, str(failed))
    raise errors.Unknown(
        f'type {kind.type} made an SR called "probe", although {key} was '
        'not given: look at it, and destroy it'
    )


def _extended(
    link: Link, kind: Kind, device_config: Mapping[str, str], host: str
) -> Step:
    """Ask a driver of the newer kind: it answers with sets of keys.

    A set that is not complete has one key more than was given.
    """
    if 'provider' not in device_config:
        return Step('provider', tuple(
            {'provider': name} for name in PROVIDERS
        ))
    key = _next(kind, device_config)
    try:
        found = link.call(
            'SR.probe_ext', host, dict(device_config), kind.type, {}
        )
    except errors.VolumeError as failed:
        if failures.code(failed) in srs.NO_PROBE:
            return Step(can_probe=False, message=str(failed))
        if not key or not failures.code(failed).startswith(
            failures.PREFIX.rstrip('_')
        ):
            raise
        return Step(key, message=str(failed))
    there = tuple(
        {**each['configuration'], 'UUID': sr['uuid']}
        for each in found if (sr := _only(each.get('sr'))).get('uuid')
    )
    rows = [
        {**each['configuration'], **each.get('extra_info', {})}
        for each in found if not each['complete']
    ]
    key = next((
        name for name in (*kind.keys(), *(n for row in rows for n in row))
        if name not in device_config and any(name in row for row in rows)
    ), '')
    return Step(key if rows else '', tuple(rows), there)


def _only(found: Any) -> Mapping[str, Any]:
    """Return what is there or not: a list of one on the wire, or of none."""
    if isinstance(found, list):
        found = found[0] if found else None
    return found or {}


def section(
    kind: Kind, device_config: Mapping[str, str], link: Mapping[str, str],
    sr_uuid: str = '',
) -> str:
    """Return the section of a configuration file that uses what was found.

    Without an SR it is one that formats a new one. ``link`` holds the
    options that are about talking to the pool.
    """
    config = {
        key: '(its password)' if kinds.is_secret(key)
        else value.replace('$', '$$')
        for key, value in device_config.items()
    }
    which = f'sr_uuid = {sr_uuid}' if sr_uuid else (
        f'sr_name = volumes-{kind.type}'
    )
    made = '' if sr_uuid else 'create = true\n'
    luns = 'luns = (SCSI ids of the LUNs that may be used)\n' if (
        kind.family == 'lun') else ''
    return (
        f'[{kind.type}]\n'
        'driver = xensm\n'
        + ''.join(f'{key} = {value}\n' for key, value in link.items())
        + f'{which}\n{made}{luns}'
        f'sr_type = {kind.type}\n'
        f'device_config ={lines(config)}\n'
    )


def _next(kind: Kind, device_config: Mapping[str, str]) -> str:
    for key in kind.probe:
        if key not in device_config:
            return key
    return ''


def _missing(key: str) -> str:
    """Return the code by which a driver says that a key is missing."""
    number = {
        'server': 102, 'serverpath': 101, 'device': 90, 'target': 95,
        'targetIQN': 96, 'SCSIid': 107, 'aggregate': 123,
        'storagepool': 163,
    }.get(key, 0)
    return f'{failures.PREFIX}{number}'


def _tree(params: tuple[str, ...]) -> ElementTree.Element | None:
    for text in reversed(params):
        if text.lstrip().startswith('<'):
            try:
                return srs.xml(text)
            except errors.Invalid:
                continue
    return None


def _rows(tree: ElementTree.Element) -> list[dict[str, str]]:
    """Return what a list in XML holds, each element a row."""
    rows = []
    for each in tree:
        row = _row(each)
        # An adapter stands beside the disks that it leads to.
        if row and each.tag != 'Adapter':
            rows.append(row)
    return rows


def _row(element: ElementTree.Element) -> dict[str, str]:
    return {
        child.tag: (child.text or '').strip()
        for child in element if not len(child)
    }
