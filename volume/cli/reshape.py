# SPDX-License-Identifier: Apache-2.0
"""The verbs that change what a volume holds or is: extend, revert, flatten,
upload, adopt, disown.
"""

from __future__ import annotations

import argparse

from volume import ids
from volume.cli import find
from volume.cli import parser
from volume.cli import show
from volume.cli import values
from volume.cli import volumes
from volume.cli import wait
from volume.cli.client import Json
from volume.cli.parser import Verbs
from volume.cli.wait import Session
from volume.cli.wait import Ticket
from volume.sizes import human


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    verb = parser.verb(
        verbs, 'extend', extend, 'make a volume larger',
        'volume extend database 40G',
        more='What is in it stays; the new bytes are zero. An attached one '
             'grows where its\nexporter can (lio, nvmet) or its driver '
             '(rbd): see to its host then.',
        waits=True,
    )
    _add_volume(verb)
    verb.add_argument(
        'size', type=values.size, metavar='SIZE',
        help='its new size, like 40G or 1.5T, counted by 1024',
    )
    verb = parser.verb(
        verbs, 'revert', revert, 'put a volume back to one of its snapshots',
        'volume revert database before-upgrade',
        more='What was written since is lost. It must not be attached; '
             'every snapshot stays.',
        waits=True,
    )
    _add_volume(verb)
    verb.add_argument(
        'snapshot', metavar='SNAPSHOT',
        help='name or id of one of the volume\'s snapshots',
    )
    verb = parser.verb(
        verbs, 'flatten', flatten, 'free a volume from the layers that it '
        'shares with others',
        'volume flatten database-test',
        more='It is copied, so that it needs its source no more.',
        waits=True,
    )
    _add_volume(verb)
    _add_limit(verbs)
    _add_upload(verbs)
    _add_adopt(verbs)
    verb = parser.verb(
        verbs, 'disown', disown, 'forget a volume, and leave its bytes '
        'where they are',
        'volume disown database',
        waits=True, aliases=('unmanage',),
    )
    _add_volume(verb)


def _add_limit(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'limit', limit, 'bound how fast a volume may be used',
        'volume limit database --iops 500 --bandwidth 100M',
        more='What is not given is not limited any more. Some storage '
             'bounds it itself, and at once; otherwise its hosts are told '
             'when they attach it.',
        waits=True,
    )
    _add_volume(verb)
    verb.add_argument(
        '--iops', type=values.count, metavar='N',
        help='requests in a second, reads and writes together',
    )
    verb.add_argument(
        '--bandwidth', type=values.size, metavar='SIZE',
        help='bytes in a second, like 100M, counted by 1024',
    )


def _add_upload(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'upload', upload, 'write what a volume holds to an image',
        'volume upload database file:///srv/images/database.qcow2 '
        '--image-format qcow2',
        waits=True,
    )
    _add_volume(verb)
    verb.add_argument(
        'target', metavar='URL',
        help='where the image goes, like file:///… on the service\'s node; '
             'there must be nothing yet',
    )
    verb.add_argument(
        '--image-format', default='raw', metavar='FORMAT',
        help='raw (the default), qcow2, vhd or vmdk',
    )
    verb.add_argument(
        '--force', action='store_true',
        help='also while hosts use the volume, as of one moment',
    )


def _add_adopt(verbs: Verbs) -> None:
    verb = parser.verb(
        verbs, 'adopt', adopt, 'make a volume of what lies on the storage '
        'already',
        'volume adopt fast#pool old-disk.raw --name database',
        waits=True, aliases=('manage',),
    )
    verb.add_argument(
        'place', metavar='BACKEND#POOL',
        help='where it lies; the pool may be left out if there is one only',
    )
    verb.add_argument(
        'handle', metavar='HANDLE',
        help='what the storage calls it; see the page of the driver',
    )
    verb.add_argument('--name', metavar='NAME', help='its name')
    verb.add_argument(
        '--description', metavar='TEXT', help='its description'
    )
    verb.add_argument(
        '--metadata', action='append', default=[], type=values.pair,
        metavar='KEY=VALUE', help='may be given more than once',
    )
    verb.add_argument(
        '--id', type=values.id, metavar='UUID', help='choose its id'
    )


def _add_volume(verb: parser.Parser) -> None:
    verb.add_argument('volume', metavar='VOLUME', help='its name or id')


def extend(session: Session, args: argparse.Namespace) -> None:
    volume_id = _act(
        session, args, 'extending',
        {'os-extend': {'new_size_bytes': args.size}},
    )
    size = human(args.size)
    _done(session, volume_id, f'volume {args.volume} has {size}')


def revert(session: Session, args: argparse.Namespace) -> None:
    volume_id = find.volume(session.client, args.volume)
    snapshot_id = find.snapshot(session.client, args.snapshot, volume_id)
    _act(
        session, args, 'reverting', {'revert': {'snapshot_id': snapshot_id}},
    )
    _done(
        session, volume_id,
        f'volume {args.volume} is as snapshot {args.snapshot}',
    )


def limit(session: Session, args: argparse.Namespace) -> None:
    limits = {'iops': args.iops, 'bytes_per_s': args.bandwidth}
    volume_id = _act(session, args, 'limiting', {'os-limit': limits})
    said = [
        f'{args.iops} requests a second' if args.iops else '',
        f'{human(args.bandwidth)} a second' if args.bandwidth else '',
    ]
    told = ' and '.join(filter(None, said)) or 'no limit'
    _done(session, volume_id, f'volume {args.volume} has {told}')


def flatten(session: Session, args: argparse.Namespace) -> None:
    volume_id = _act(session, args, 'flattening', {'os-flatten': None})
    _done(session, volume_id, f'volume {args.volume} stands alone')


def upload(session: Session, args: argparse.Namespace) -> None:
    volume_id = _act(session, args, 'uploading', {
        'os-volume_upload_image': {
            'image_name': args.target,
            'disk_format': args.image_format,
            'force': args.force,
        },
    })
    _done(session, volume_id, f'volume {args.volume} is uploaded')


def disown(session: Session, args: argparse.Namespace) -> None:
    volume_id = find.volume(session.client, args.volume)
    there = volumes.get(session, volume_id)
    _act(session, args, 'letting go of', {'os-unmanage': None})
    show.done(
        there, f'volume {args.volume} is ours no more' if session.wait
        else _accepted(args.volume), session.format,
    )


def adopt(session: Session, args: argparse.Namespace) -> None:
    volume_id = args.id or ids.new()
    wanted: Json = {
        'host': args.place,
        'ref': {'source-name': args.handle},
        'name': args.name,
        'description': args.description,
        'metadata': dict(args.metadata),
    }
    ticket = Ticket()
    session.client.post(
        '/os-volume-manage', {'volume': wanted},
        headers={**ticket.headers, 'X-Volume-Id': volume_id},
    )
    if session.wait:
        wait.follow(session, ticket, volume_id, f'adopting {args.handle}')
    show.one(volumes.get(session, volume_id), session.format)


def _act(
    session: Session, args: argparse.Namespace, doing: str, action: Json
) -> str:
    """Ask for an action and wait for its job; return the volume's id."""
    volume_id = find.volume(session.client, args.volume)
    ticket = Ticket()
    session.client.post(
        f'/volumes/{volume_id}/action', action, headers=ticket.headers
    )
    if session.wait:
        wait.follow(
            session, ticket, volume_id, f'{doing} volume {args.volume}'
        )
    return volume_id


def _done(session: Session, volume_id: str, sentence: str) -> None:
    show.done(
        volumes.get(session, volume_id),
        sentence if session.wait else _accepted(volume_id), session.format,
    )


def _accepted(volume: str) -> str:
    return f'it is accepted; see "volume show {volume}"'
