# SPDX-License-Identifier: Apache-2.0
"""The verbs of hosts: attach, detach, force-detach, attachments.

The first two are done on the host itself (``hostside``), the others from
wherever one is.
"""

from __future__ import annotations

import argparse

from volume import errors
from volume.cli import find
from volume.cli import hostside
from volume.cli import parser
from volume.cli import show
from volume.cli import values
from volume.cli import volumes
from volume.cli.client import Json
from volume.cli.parser import Verbs
from volume.cli.wait import Session


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    hostside.add(verbs, 'volume')
    verb = parser.verb(
        verbs, 'force-detach', force_detach, 'end the access of hosts that '
        'cannot do it themselves',
        'volume force-detach database --host node-7',
        more='Without --host and --attachment it ends the access of all '
             'hosts. It is for\nadministrators; what such a host has not '
             'written yet is lost.',
    )
    hostside.add_volume(verb)
    hostside.add_host(verb, 'only of the host of this name')
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
    hostside.add_host(verb, 'only of the host of this name')
    verb.add_argument(
        '--all-projects', action='store_true',
        help='also of other projects (administrators only)',
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
        [hostside.shown_of(row) for row in rows], show.ATTACHMENTS,
        session.format,
    )
