# SPDX-License-Identifier: Apache-2.0
"""``volume-manage xensm``: look after the SRs of a XenServer or XCP-ng pool.

``probe`` finds what an SR can be made of and prints the section to paste;
``repair`` plugs SRs in, host by host; ``orphans`` lists VDIs of ours that
nothing needs or that are not what they seem; ``chains`` says how long the
chains have grown. Only ``repair`` changes anything.
"""

from __future__ import annotations

import argparse
import getpass
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from volume import errors
from volume.drivers.xensm import chains
from volume.drivers.xensm import probing
from volume.drivers.xensm import vdis
from volume.drivers.xensm.vdis import Vdi
from volume.node import Node
from volume.xenapi import kinds
from volume.xenapi import options
from volume.xenapi import srs
from volume.xenapi.link import Link
from volume.xenapi.options import Settings
from volume.xenapi.srs import Sr

Row = dict[str, Any]
# Sections of the configuration, and what the database knows: the handle of
# each volume and snapshot, by its id.
Groups = Mapping[str, Any]
Known = Callable[[], Mapping[str, str]]


def run(
    args: argparse.Namespace, groups: Groups, node: Node, known: Known,
    show: Callable[[list[Row]], None],
) -> int:
    """Do one of the actions; 1 says that something needs a look."""
    name = args.backend
    if name not in groups:
        raise errors.NotFound(
            f'there is no backend {name} with driver = xensm; there are '
            f'{", ".join(sorted(groups)) or "none"}'
        )
    if args.action == 'probe':
        return probe(groups[name], name, node, args.words, show)
    settings = options.read(groups[name])
    link = Link(settings, node)
    try:
        rows: list[Row] = []
        for sr in _srs(link, settings):
            if args.action == 'repair':
                rows += repair(link, settings, sr)
            elif args.action == 'orphans':
                rows += orphans(link, sr, known())
            else:
                rows += long_chains(link, sr)
        show(rows)
    finally:
        link.close()
    if args.action == 'repair':
        return int(any(row['state'] != 'plugged in' for row in rows))
    return int(bool(rows)) if args.action == 'orphans' else 0


def _srs(link: Link, settings: Settings) -> Iterator[Sr]:
    """Yield the SRs of a section; none is made."""
    for uuid in settings.sr_uuids:
        sr = srs.by_uuid(link, uuid)
        if sr is None:
            raise errors.NotFound(f'the pool knows no SR {uuid}')
        yield sr
    if not settings.sr_uuids:
        sr = srs.by_name(link, settings.sr_name)
        if sr is None:
            raise errors.NotFound(
                f'the pool has no SR called {settings.sr_name!r}'
            )
        yield sr


# Probing.


def probe(
    group: Any, name: str, node: Node, words: Sequence[str],
    show: Callable[[list[Row]], None],
) -> int:
    """Take one step from what is known of an SR towards its section."""
    settings = options.read_link(group)
    if not words:
        show([
            {'type': kind.type, 'storage': kind.name,
             'keys': ' '.join(kind.required)}
            for kind in kinds.KINDS
        ])
        return 0
    kind = kinds.find(words[0])
    config = _keys(kind, words[1:])
    link = Link(settings, node)
    try:
        step = probing.step(link, kind, config)
        while len(step.choices()) == 1 and step.key not in config:
            # Nothing to choose: go on.
            config[step.key] = step.choices()[0]
            print(f'{step.key}={config[step.key]}')
            step = probing.step(link, kind, config)
    finally:
        link.close()
    for found in step.srs:
        print(f'there is an SR {found.get("UUID", "")}; to use it:\n')
        print(_section(group, settings, kind, config, found.get('UUID', '')))
    if step.key:
        if step.rows:
            show([dict(row) for row in step.rows])
        given = ''.join(
            f' {key}' if kinds.is_secret(key) else
            f' {shlex.quote(f"{key}={value}")}'
            for key, value in config.items()
        )
        print(
            f'\nit needs {step.key}. Next:\n  volume-manage xensm {name} '
            f'probe {kind.type}{given} {step.key}=...'
        )
        return 1
    if not step.can_probe:
        print(f'type {kind.type} cannot be probed')
    if not step.srs:
        print('there is no SR yet; to format one:\n')
        print(_section(group, settings, kind, config))
    return 0


def _section(
    group: Any, settings: Settings, kind: kinds.Kind,
    config: Mapping[str, str], sr_uuid: str = '',
) -> str:
    """Return the section to paste; it reaches the pool as this one does."""
    link = {
        'addresses': ', '.join(settings.urls),
        'username': settings.username,
        'password_file': group.password_file or '/etc/volume/xensm.password',
        'ca_file': settings.ca_file,
        'fingerprints': ', '.join(sorted(settings.fingerprints)),
        'insecure': 'true' if settings.insecure else '',
    }
    return probing.section(
        kind, config, {key: text for key, text in link.items() if text},
        sr_uuid,
    )


def _keys(kind: kinds.Kind, words: Sequence[str]) -> dict[str, str]:
    """Return the keys of a command line, passwords asked for.

    :raises Invalid: a word is no key of the type, or tells a password
    """
    found = {}
    for word in words:
        key, sign, value = word.partition('=')
        if key not in (*kind.keys(), 'probeversion'):
            raise errors.Invalid(
                f'type {kind.type} has no key {key}; it has '
                f'{", ".join(kind.keys())}'
            )
        if kinds.is_secret(key):
            if sign:
                raise errors.Invalid(
                    f'give {key} without a value, for others can see a '
                    'command line; you are asked for it'
                )
            value = _secret(key)
        elif not sign:
            raise errors.Invalid(f'{key} needs a value: {key}=...')
        found[key] = value
    return found


def _secret(key: str) -> str:
    if sys.stdin.isatty():
        return getpass.getpass(f'{key}: ')
    return sys.stdin.readline().rstrip('\n')


# Looking after SRs.


def repair(link: Link, settings: Settings, sr: Sr) -> list[Row]:
    """Plug an SR in wherever it should be; say how each host stands."""
    troubles = srs.repair(link, sr, settings.device_config)
    records = srs.hosts(link)
    rows = []
    for pbd in srs.pbds(link, srs.get(link, sr.ref)):
        name = records.get(pbd.host, {}).get('name_label', pbd.host)
        trouble = next(
            (each for each in troubles if each.startswith(f'host {name}:')),
            '',
        )
        rows.append({
            'sr': sr.uuid, 'host': name,
            'state': 'plugged in' if pbd.attached else 'not plugged in',
            'keys': srs.describe(pbd.device_config), 'trouble': trouble,
        })
    hosts = {row['host'] for row in rows}
    for ref, record in records.items():
        if sr.shared and record['name_label'] not in hosts:
            rows.append({
                'sr': sr.uuid, 'host': record.get('name_label', ref),
                'state': 'no PBD', 'keys': '',
                'trouble': '; '.join(troubles),
            })
    return rows


def orphans(link: Link, sr: Sr, known: Mapping[str, str]) -> list[Row]:
    """Return the VDIs that bear our keys and are not what these say."""
    rows = []
    everything = vdis.all_of(link)
    uuids = {vdi.uuid for vdi in everything}
    for vdi in everything:
        if vdi.sr != sr.ref:
            continue
        why, remedy = _orphan(vdi, known, uuids)
        if why:
            rows.append({
                'vdi': vdi.uuid, 'name': vdi.name, 'why': why,
                'remedy': remedy,
            })
    return rows


def _orphan(
    vdi: Vdi, known: Mapping[str, str], uuids: set[str]
) -> tuple[str, str]:
    keys = vdi.keys
    if not vdi.managed or vdis.ID not in keys:
        return '', ''
    bears = keys[vdis.ID]
    if vdis.NEXT in keys:
        return (
            f'something is being made of {bears}, or was not finished',
            'the next try of its job, or upkeep, ends it',
        )
    if vdis.ROLE in keys:
        return (
            f'it is on its way out of, or into, {bears}\'s place',
            'the next try of its job, or upkeep, ends it',
        )
    if vdi.id is None:
        return (
            f'a copy that another tool made of {bears}; not ours',
            'let that tool remove it',
        )
    if bears not in known:
        return (
            'no row of the database has it',
            '"volume-manage reconcile" adopts or removes it',
        )
    if known[bears] != vdi.uuid and known[bears] in uuids:
        return (
            f'a twin: {bears} is VDI {known[bears]}',
            'look at it, and destroy it if it holds nothing',
        )
    return '', ''


def long_chains(link: Link, sr: Sr) -> list[Row]:
    """Return how long the chain of each VDI is, the longest first."""
    everything = vdis.all_of(link, sr.ref)
    rows = []
    for vdi in everything:
        if vdi.managed:
            chain = chains.of(vdi, everything)
            rows.append({
                'vdi': vdi.uuid, 'name': vdi.name, 'depth': chain.depth,
                'limit': chains.LIMIT, 'to_be_merged': chain.mergeable,
                'foreign_snapshots': chain.foreign,
            })
    return sorted(rows, key=lambda row: (-row['depth'], row['name']))


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    command.add_argument('backend', help='section of the configuration')
    command.add_argument(
        'action', choices=['probe', 'repair', 'orphans', 'chains'],
        help='find what an SR can be made of, plug SRs in, list what '
             'is nobody\'s, or list chains of disks',
    )
    command.add_argument(
        'words', nargs='*', metavar='TYPE KEY=VALUE',
        help='for probe: the type of SR, and what is known of it',
    )
