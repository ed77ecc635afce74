# SPDX-License-Identifier: Apache-2.0
"""The verbs about volumes: create, clone, list, show, set, delete …"""

from __future__ import annotations

import argparse
import urllib.parse
from typing import Any

from volume import errors
from volume import ids
from volume.cli import ending
from volume.cli import find
from volume.cli import parser
from volume.cli import show
from volume.cli import values
from volume.cli import wait
from volume.cli.client import Json
from volume.cli.parser import Verbs
from volume.cli.values import Usage
from volume.cli.wait import Session
from volume.cli.wait import Ticket

HINTS = 'OS-SCH-HNT:scheduler_hints'


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    _add_create(verbs)
    _add_clone(verbs)
    _add_list(verbs)
    verb = parser.verb(
        verbs, 'show', show_one, 'show all about a volume',
        'volume show database',
    )
    _add_volume(verb)
    verb = parser.verb(
        verbs, 'rename', rename, 'give a volume another name',
        'volume rename database old-database',
    )
    _add_volume(verb)
    verb.add_argument(
        'name', type=values.name, metavar='NAME', help='the new name'
    )
    _add_set(verbs)
    _add_delete(verbs)


def _add_create(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'create', create, 'make a volume: empty, or filled from '
        'an image, a snapshot or another volume',
        'volume create --name database --size 20G --image '
        'https://images.example.org/debian.qcow2',
        more='The volume lies on the cheapest pool that fits; the options '
             'about the\nplace say which pools do.',
        waits=True,
    )
    verb.add_argument(
        '--size', type=values.size, metavar='SIZE',
        help='like 10G, 512M or 1.5T, counted by 1024; not needed with '
             '--snapshot and --source, whose size is then taken',
    )
    _add_about(verb)
    sources = verb.add_mutually_exclusive_group()
    sources.add_argument(
        '--image', metavar='URL',
        help='fill it from an image: https://…, or file:///… of the '
             'service\'s node',
    )
    sources.add_argument(
        '--snapshot', metavar='SNAPSHOT',
        help='fill it with what a snapshot holds',
    )
    sources.add_argument(
        '--source', metavar='VOLUME',
        help='fill it with what another volume holds now',
    )
    verb.add_argument(
        '--image-format', metavar='FORMAT',
        help='what the image must be: raw, qcow2, vhd or vmdk',
    )
    verb.add_argument(
        '--checksum', type=values.checksum, metavar='sha256:DIGITS',
        help='what the image\'s checksum must be',
    )
    verb.add_argument(
        '--multiattach', action='store_true',
        help='let several hosts have it at once',
    )
    places = verb.add_argument_group('place')
    places.add_argument(
        '--tag', action='append', default=[], metavar='TAG',
        help='only a backend with this tag; may be given more than once',
    )
    for name, what in (
        ('backend', 'only this backend'),
        ('pool', 'only the pool of this name'),
        ('cluster', 'only backends for this cluster'),
        ('role', 'only backends for this use, like SAN'),
    ):
        places.add_argument(f'--{name}', metavar='NAME', help=what)


def _add_clone(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'clone', clone, 'make a volume with what another one holds '
        'now',
        'volume clone database --name database-test',
        waits=True,
    )
    _add_volume(verb)
    verb.add_argument(
        '--size', type=values.size, metavar='SIZE',
        help='make it larger than its source',
    )
    _add_about(verb)


def _add_list(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'list', show_list, 'list volumes, the newest first',
        'volume list --status error --all-projects',
    )
    verb.add_argument('--name', metavar='NAME', help='only of this name')
    verb.add_argument(
        '--status', metavar='STATUS',
        help='only those that are available, in-use, error …',
    )
    verb.add_argument('--backend', metavar='NAME', help='only those on it')
    verb.add_argument('--pool', metavar='NAME', help='only those in it')
    verb.add_argument(
        '--all-projects', action='store_true',
        help='also of other projects (administrators only)',
    )
    verb.add_argument(
        '--limit', type=values.count, metavar='NUMBER',
        help='no more than so many',
    )


def _add_set(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'set', change, 'change what is said about a volume',
        'volume set database --description "of the shop" --metadata '
        'owner=shop',
    )
    _add_volume(verb)
    verb.add_argument(
        '--name', type=values.name, metavar='NAME', help='its new name'
    )
    verb.add_argument(
        '--description', metavar='TEXT', help='its new description'
    )
    verb.add_argument(
        '--metadata', action='append', default=[], type=values.pair,
        metavar='KEY=VALUE', help='set one key; may be given more than once',
    )
    verb.add_argument(
        '--unset-metadata', action='append', default=[], metavar='KEY',
        help='remove one key; may be given more than once',
    )
    verb.add_argument(
        '--bootable', type=values.yes, metavar='yes|no',
        help='whether a machine can start from it',
    )
    verb.add_argument(
        '--readonly', type=values.yes, metavar='yes|no',
        help='whether hosts that attach it from now on may only read it',
    )


def _add_delete(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'delete', delete, 'delete volumes and what they hold',
        'volume delete database-test',
        waits=True,
    )
    verb.add_argument(
        'volumes', nargs='+', metavar='VOLUME', help='names or ids'
    )
    verb.add_argument(
        '--cascade', action='store_true', help='its snapshots as well'
    )
    verb.add_argument(
        '--force', action='store_true',
        help='also one that is stuck halfway (administrators only)',
    )


def _add_volume(verb: parser.Parser) -> None:
    verb.add_argument('volume', metavar='VOLUME', help='its name or id')


def _add_about(verb: parser.Parser) -> None:
    verb.add_argument('--name', metavar='NAME', help='its name')
    verb.add_argument(
        '--description', metavar='TEXT', help='its description'
    )
    verb.add_argument(
        '--metadata', action='append', default=[], type=values.pair,
        metavar='KEY=VALUE', help='may be given more than once',
    )
    verb.add_argument(
        '--id', type=values.id, metavar='UUID',
        help='choose its id: the same command again is then the same volume',
    )


def create(session: Session, args: argparse.Namespace) -> None:
    if args.size is None and not (args.snapshot or args.source):
        raise Usage('--size is missing; say how large it shall be, like 10G')
    if (args.image_format or args.checksum) and not args.image:
        raise Usage(
            '--image-format and --checksum are about an image; add --image'
        )
    client = session.client
    wanted: Json = {'imageRef': args.image}
    if args.snapshot:
        wanted['snapshot_id'] = find.snapshot(client, args.snapshot)
    if args.source:
        wanted['source_volid'] = find.volume(client, args.source)
    _make(session, args, wanted, {
        'tags': args.tag,
        'backend': args.backend,
        'pool': args.pool,
        'cluster': args.cluster,
        'role': args.role,
        'multiattach': args.multiattach,
        'image_format': args.image_format,
        'image_checksum': args.checksum,
    })


def clone(session: Session, args: argparse.Namespace) -> None:
    source_id = find.volume(session.client, args.volume)
    _make(session, args, {'source_volid': source_id}, {})


def _make(
    session: Session, args: argparse.Namespace, wanted: Json, hints: Json
) -> None:
    volume_id = args.id or ids.new()
    wanted |= {
        'size_bytes': args.size,
        'name': args.name,
        'description': args.description,
        'metadata': dict(args.metadata) or None,
    }
    body: Json = {'volume': _given(wanted)}
    if hints := _given(hints):
        body[HINTS] = hints
    ticket = Ticket()
    # The id is ours: sent twice, it is still one volume.
    session.client.post(
        '/volumes', body, again=True,
        headers={**ticket.headers, 'X-Volume-Id': volume_id},
    )
    what = f'creating volume {args.name or volume_id}'
    if session.wait:
        try:
            wait.follow(session, ticket, volume_id, what)
        except wait.Failed as failed:
            raise wait.Failed(
                f'{failed}; end it with "volume delete {volume_id}"'
            ) from None
        row = wait.settled(
            session, lambda: get(session, volume_id), what
        )
        if row['status'].startswith('error'):
            raise errors.VolumeError(
                f'volume {volume_id} is in {row["status"]}: {row["reason"]}'
            )
    show.one(get(session, volume_id), session.format)


def show_list(session: Session, args: argparse.Namespace) -> None:
    rows = session.client.pages(
        '/volumes/detail', 'volumes', args.limit,
        name=args.name, status=args.status, backend=args.backend,
        pool=args.pool, all_tenants=1 if args.all_projects else None,
    )
    show.many(
        [show.volume(row) for row in rows], show.VOLUMES, session.format
    )


def show_one(session: Session, args: argparse.Namespace) -> None:
    volume_id = find.volume(session.client, args.volume)
    show.one(get(session, volume_id), session.format)


def rename(session: Session, args: argparse.Namespace) -> None:
    volume_id = find.volume(session.client, args.volume)
    answer = session.client.put(
        f'/volumes/{volume_id}', {'volume': {'name': args.name}}
    )
    show.done(
        show.volume(answer['volume']),
        f'volume {volume_id} is now called {args.name}', session.format,
    )


def change(session: Session, args: argparse.Namespace) -> None:
    texts: dict[str, Any] = {
        key: getattr(args, key) for key in ('name', 'description')
        if getattr(args, key) is not None
    }
    flags = {
        'os-set_bootable': {'bootable': args.bootable},
        'os-update_readonly_flag': {'readonly': args.readonly},
    }
    flags = {
        action: body for action, body in flags.items()
        if None not in body.values()
    }
    if not (texts or flags or args.metadata or args.unset_metadata):
        raise Usage('nothing to set; say what, like --name NAME')
    client = session.client
    volume_id = find.volume(client, args.volume)
    path = f'/volumes/{volume_id}'
    if texts:
        client.put(path, {'volume': texts})
    if args.metadata:
        client.post(
            f'{path}/metadata', {'metadata': dict(args.metadata)}, again=True
        )
    for key in args.unset_metadata:
        client.delete(f'{path}/metadata/{urllib.parse.quote(key, safe="")}')
    for action, body in flags.items():
        client.post(f'{path}/action', {action: body}, again=True)
    show.done(
        get(session, volume_id), f'volume {volume_id} is changed',
        session.format,
    )


def delete(session: Session, args: argparse.Namespace) -> int:
    def begin(name: str) -> ending.Begun:
        ticket = Ticket()
        volume_id = find.volume(session.client, name)
        session.client.delete(
            f'/volumes/{volume_id}', headers=ticket.headers,
            cascade='true' if args.cascade else None,
            force='true' if args.force else None,
        )
        return ending.Begun(ticket, volume_id, volume_id, 'volume')

    return ending.all_of(session, args.volumes, begin)


def get(session: Session, volume_id: str) -> Json:
    """Return a volume as it is shown."""
    return show.volume(session.client.get(f'/volumes/{volume_id}')['volume'])


def _given(wanted: Json) -> Json:
    return {
        key: value for key, value in wanted.items()
        if value not in (None, False, [], '')
    }
