# SPDX-License-Identifier: Apache-2.0
"""The verbs of hosts: attach, detach, force-detach, attachments.

``attach`` asks the service for access, connects with this host's connector
and reports that the host has the volume. If any of it fails, the access is
given back.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
from typing import Any, TYPE_CHECKING

from volume import errors
from volume import model
from volume.cli import find
from volume.cli import parser
from volume.cli import show
from volume.cli import values
from volume.cli import volumes
from volume.cli.client import Json
from volume.cli.parser import Verbs
from volume.cli.values import Usage
from volume.cli.wait import Session

if TYPE_CHECKING:
    from volume.connector.base import Connector


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    verb = parser.verb(
        verbs, 'attach', attach, 'give this host access to a volume, and '
        'print its path or URL',
        'volume attach database',
        more='QEMU and libnbd open what is printed. Run it on the host that '
             'uses the volume.',
    )
    _add_volume(verb)
    _add_host(verb, 'the name under which this host attaches')
    verb.add_argument(
        '--mode', choices=('rw', 'ro'), default='rw',
        help='read and write (rw, the default), or read only (ro)',
    )
    verb = parser.verb(
        verbs, 'detach', detach, 'end the access of this host to a volume',
        'volume detach database',
        more='Close it first: what is using it gets errors. Another host\'s '
             'access is\nleft alone.',
    )
    _add_volume(verb)
    _add_host(verb, 'end the access of the host of this name')
    verb.add_argument(
        '--attachment', type=values.id, metavar='UUID',
        help='end just this one; see "volume attachments"',
    )
    verb = parser.verb(
        verbs, 'force-detach', force_detach, 'end the access of hosts that '
        'cannot do it themselves',
        'volume force-detach database --host node-7',
        more='Without --host and --attachment it ends the access of all '
             'hosts. It is for\nadministrators; what such a host has not '
             'written yet is lost.',
    )
    _add_volume(verb)
    _add_host(verb, 'only of the host of this name')
    verb.add_argument(
        '--attachment', type=values.id, metavar='UUID', help='only this one'
    )
    verb = parser.verb(
        verbs, 'attachments', show_list, 'list who has access to volumes',
        'volume attachments database',
    )
    verb.add_argument(
        'volume', nargs='?', metavar='VOLUME', help='only to this volume'
    )
    _add_host(verb, 'only of the host of this name')
    verb.add_argument(
        '--all-projects', action='store_true',
        help='also of other projects (administrators only)',
    )


def _add_volume(verb: parser.Parser) -> None:
    verb.add_argument('volume', metavar='VOLUME', help='its name or id')


def _add_host(verb: parser.Parser, help: str) -> None:
    verb.add_argument('--host', metavar='NAME', help=help)


def attach(session: Session, args: argparse.Namespace) -> None:
    # Drivers of protocols are needed by hosts alone, and slow to import.
    from volume.connector import here

    client = session.client
    volume_id = find.volume(client, args.volume)
    made = client.post('/attachments', {'attachment': {
        'volume_uuid': volume_id,
        'connector': here.properties(args.host or ''),
        'mode': args.mode,
    }})['attachment']
    connection = here.connection(made['connection_info'])
    with contextlib.ExitStack() as undo:
        undo.callback(_give_back, session, made['id'])
        connector = here.find(connection.protocol)
        undo.callback(_let_go, connector, connection)
        location = connector.attach(connection)
        client.post(
            f'/attachments/{made["id"]}/action', {'os-complete': None},
            again=True,
        )
        undo.pop_all()
    shown = _shown(client.get(f'/attachments/{made["id"]}')['attachment'])
    shown['location'] = location
    if session.format == 'table':
        print(show.clean(location))
        if shown['image_format'] != 'raw':
            show.note(f'open it as {shown["image_format"]}')
    else:
        show.one(shown, session.format)


def detach(session: Session, args: argparse.Namespace) -> None:
    from volume.connector import here

    if args.attachment and args.host:
        raise Usage('--host and --attachment are given; one is enough')
    client = session.client
    volume_id = find.volume(client, args.volume)
    ending = _ending(session, args, volume_id)
    for each in ending:
        if info := each['connection_info']:
            connection = here.connection(info)
            try:
                connector = here.find(connection.protocol)
            except errors.Unsupported:
                # If it is another host's, there is nothing to let go here.
                if not (args.host or args.attachment):
                    raise
            else:
                connector.detach(connection)
        with contextlib.suppress(errors.NotFound):
            client.delete(f'/attachments/{each["id"]}')
    show.done(
        volumes.get(session, volume_id),
        f'volume {args.volume} is detached', session.format,
    )


def force_detach(session: Session, args: argparse.Namespace) -> None:
    volume_id = find.volume(session.client, args.volume)
    which: Json = {}
    if args.attachment:
        which['attachment_id'] = args.attachment
    elif args.host:
        which['connector'] = {'host': args.host}
        if not any(session.client.pages(
            '/attachments', 'attachments', 1, volume_id=volume_id,
            attached_host=args.host,
        )):
            raise errors.Invalid(
                f'volume {volume_id} is not attached to {args.host}'
            )
    session.client.post(
        f'/volumes/{volume_id}/action', {'os-force_detach': which}
    )
    there = volumes.get(session, volume_id)
    show.done(
        there, f'volume {args.volume} is {there["status"]}', session.format
    )


def show_list(session: Session, args: argparse.Namespace) -> None:
    client = session.client
    rows = client.pages(
        '/attachments/detail', 'attachments',
        volume_id=find.volume(client, args.volume) if args.volume else None,
        attached_host=args.host,
        all_tenants=1 if args.all_projects else None,
    )
    show.many(
        [_shown(row) for row in rows], show.ATTACHMENTS, session.format
    )


def _ending(
    session: Session, args: argparse.Namespace, volume_id: str
) -> list[Json]:
    """Return which attachments to end; never another host's by chance."""
    client = session.client
    if args.attachment:
        path = f'/attachments/{args.attachment}'
        found: Json = client.get(path)['attachment']
        if found['volume_id'] != volume_id:
            raise errors.Invalid(
                f'attachment {args.attachment} is of volume '
                f'{found["volume_id"]}, not of {volume_id}'
            )
        return [found]
    name = args.host or socket.gethostname()
    mine = list(client.pages(
        '/attachments/detail', 'attachments', volume_id=volume_id,
        attached_host=name,
    ))
    # What an instance uses is its compute service's to end.
    mine = [each for each in mine if not each['instance']]
    if mine:
        return mine
    others = list(client.pages(
        '/attachments', 'attachments', volume_id=volume_id
    ))
    if others:
        raise errors.Invalid(
            f'volume {volume_id} is attached, but not by "volume attach" on '
            f'{name}; say which with --host or --attachment: '
            + ', '.join(str(each['id']) for each in others)
        )
    raise errors.Invalid(f'volume {volume_id} is not attached')


def _give_back(session: Session, attachment_id: str) -> None:
    try:
        session.client.delete(f'/attachments/{attachment_id}')
    except errors.VolumeError as failed:
        show.note(
            f'attachment {attachment_id} is left behind: {failed}; end it '
            'with "volume detach"'
        )


def _let_go(connector: Connector, connection: model.Connection) -> None:
    try:
        connector.detach(connection)
    except errors.VolumeError as failed:
        show.note(f'it is still connected to this host: {failed}')


def _shown(row: Json) -> dict[str, Any]:
    """Return what we say about an attachment."""
    info = row['connection_info']
    return {
        'id': row['id'],
        'volume_id': row['volume_id'],
        'status': row['status'],
        'mode': row['attach_mode'],
        'instance_id': row['instance'],
        'protocol': info.get('driver_volume_type'),
        'location': info.get('uri') or info.get('path'),
        'image_format': info.get('format') or 'raw',
        'attached_at': f'{row["attached_at"]}Z' if row['attached_at']
        else None,
    }
