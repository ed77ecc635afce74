# SPDX-License-Identifier: Apache-2.0
"""The verbs about snapshots: create, list, show, rename, delete."""

from __future__ import annotations

import argparse

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
from volume.cli.wait import Session
from volume.cli.wait import Ticket


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    verbs = parser.group(
        verbs, 'snapshot', 'keep what a volume holds at one moment',
    )
    _add_create(verbs)
    verb = parser.verb(
        verbs, 'list', show_list, 'list snapshots, the newest first',
        'volume snapshot list --volume database',
    )
    verb.add_argument(
        '--volume', metavar='VOLUME', help='only of this volume'
    )
    verb.add_argument('--name', metavar='NAME', help='only of this name')
    verb.add_argument(
        '--status', metavar='STATUS', help='only those that are so'
    )
    verb.add_argument(
        '--all-projects', action='store_true',
        help='also of other projects (administrators only)',
    )
    verb.add_argument(
        '--limit', type=values.count, metavar='NUMBER',
        help='no more than so many',
    )
    verb = parser.verb(
        verbs, 'show', show_one, 'show all about a snapshot',
        'volume snapshot show before-upgrade',
    )
    _add_snapshot(verb)
    verb = parser.verb(
        verbs, 'rename', rename, 'give a snapshot another name',
        'volume snapshot rename before-upgrade version-1',
    )
    _add_snapshot(verb)
    verb.add_argument(
        'name', type=values.name, metavar='NAME', help='the new name'
    )
    verb = parser.verb(
        verbs, 'delete', delete, 'delete snapshots',
        'volume snapshot delete before-upgrade',
        waits=True,
    )
    verb.add_argument(
        'snapshots', nargs='+', metavar='SNAPSHOT', help='names or ids'
    )
    verb.add_argument(
        '--force', action='store_true',
        help='also one that is stuck halfway (administrators only)',
    )


def _add_create(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'create', create, 'take a snapshot of a volume',
        'volume snapshot create database --name before-upgrade',
        waits=True,
    )
    verb.add_argument('volume', metavar='VOLUME', help='its name or id')
    verb.add_argument('--name', metavar='NAME', help='the snapshot\'s name')
    verb.add_argument(
        '--description', metavar='TEXT', help='the snapshot\'s description'
    )
    verb.add_argument(
        '--metadata', action='append', default=[], type=values.pair,
        metavar='KEY=VALUE', help='may be given more than once',
    )
    verb.add_argument(
        '--force', action='store_true',
        help='also while hosts use the volume: it then holds what had '
             'arrived, as after a power cut',
    )
    verb.add_argument(
        '--id', type=values.id, metavar='UUID',
        help='choose its id: the same command again is then the same '
             'snapshot',
    )


def _add_snapshot(verb: parser.Parser) -> None:
    verb.add_argument('snapshot', metavar='SNAPSHOT', help='its name or id')


def create(session: Session, args: argparse.Namespace) -> None:
    volume_id = find.volume(session.client, args.volume)
    snapshot_id = args.id or ids.new()
    wanted: Json = {
        'volume_id': volume_id,
        'name': args.name,
        'description': args.description,
        'metadata': dict(args.metadata),
        'force': args.force,
    }
    ticket = Ticket()
    # The id is ours: sent twice, it is still one snapshot.
    session.client.post(
        '/snapshots', {'snapshot': wanted}, again=True,
        headers={**ticket.headers, 'X-Snapshot-Id': snapshot_id},
    )
    what = f'taking snapshot {args.name or snapshot_id}'
    if session.wait:
        wait.follow(session, ticket, volume_id, what)
        row = wait.settled(session, lambda: get(session, snapshot_id), what)
        if row['status'].startswith('error'):
            raise errors.VolumeError(
                f'snapshot {snapshot_id} is in {row["status"]}: '
                f'{row["reason"]}'
            )
    show.one(get(session, snapshot_id), session.format)


def show_list(session: Session, args: argparse.Namespace) -> None:
    client = session.client
    rows = client.pages(
        '/snapshots/detail', 'snapshots', args.limit,
        volume_id=find.volume(client, args.volume) if args.volume else None,
        name=args.name, status=args.status,
        all_tenants=1 if args.all_projects else None,
    )
    show.many(
        [show.snapshot(row) for row in rows], show.SNAPSHOTS, session.format
    )


def show_one(session: Session, args: argparse.Namespace) -> None:
    snapshot_id = find.snapshot(session.client, args.snapshot)
    show.one(get(session, snapshot_id), session.format)


def rename(session: Session, args: argparse.Namespace) -> None:
    snapshot_id = find.snapshot(session.client, args.snapshot)
    session.client.put(
        f'/snapshots/{snapshot_id}', {'snapshot': {'name': args.name}}
    )
    show.done(
        get(session, snapshot_id),
        f'snapshot {snapshot_id} is now called {args.name}', session.format,
    )


def delete(session: Session, args: argparse.Namespace) -> int:
    client = session.client

    def begin(name: str) -> ending.Begun:
        ticket = Ticket()
        snapshot_id = find.snapshot(client, name)
        path = f'/snapshots/{snapshot_id}'
        volume_id = client.get(path)['snapshot']['volume_id']
        if args.force:
            client.post(
                f'{path}/action', {'os-force_delete': None},
                headers=ticket.headers,
            )
        else:
            client.delete(path, headers=ticket.headers)
        return ending.Begun(ticket, snapshot_id, volume_id, 'snapshot')

    return ending.all_of(session, args.snapshots, begin)


def get(session: Session, snapshot_id: str) -> Json:
    """Return a snapshot as it is shown."""
    answer = session.client.get(f'/snapshots/{snapshot_id}')
    return show.snapshot(answer['snapshot'])
