# SPDX-License-Identifier: Apache-2.0
"""What is done on the host that uses a volume: attach, detach, list, clean.

``attach`` asks the service for access, connects with this host's connector
and reports that the host has the volume. If any of it fails, the access is
given back. Run again, it goes on where an earlier run has ended. With a
connection_info from elsewhere the service is not asked at all.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import socket
from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

from volume import errors
from volume import ids
from volume import model
from volume.cli import find
from volume.cli import parser
from volume.cli import show
from volume.cli import values
from volume.cli import volumes
from volume.cli.client import Client
from volume.cli.client import Json
from volume.cli.parser import Verbs
from volume.cli.values import Usage
from volume.cli.wait import Session

if TYPE_CHECKING:
    from volume.connector.kept import Kept
    from volume.connector.kept import Note

INFO_BYTES_MAX = 1 << 20


def add(verbs: Verbs, prog: str, *, takes_connection: bool = False) -> None:
    """Declare attach and detach, which both commands have.

    ``takes_connection``: a connection_info may be given instead of a volume.
    """
    attaching = parser.verb(
        verbs, 'attach', attach, 'give this host access to a volume, and '
        'print its path or URL',
        f'{prog} attach database',
        more='QEMU and libnbd open a URL that is printed. Run it on the host '
             'that uses the\nvolume; as root, if the volume becomes a device '
             'of this host (iSCSI, NVMe,\nAoE, NFS). Again for what is '
             'attached is the same path.',
    )
    add_host(attaching, 'the name under which this host attaches')
    attaching.add_argument(
        '--mode', choices=('rw', 'ro'), default='rw',
        help='read and write (rw, the default), or read only (ro)',
    )
    attaching.add_argument(
        '--ip', metavar='ADDRESS',
        help='the address by which this host comes to the storage',
    )
    detaching = parser.verb(
        verbs, 'detach', detach, 'end the access of this host to a volume',
        f'{prog} detach database',
        more='Close it first: a device that is in use is refused, and what '
             'uses a URL gets\nerrors. Another host\'s access is left alone.',
    )
    add_host(detaching, 'end the access of the host of this name')
    detaching.add_argument(
        '--attachment', type=values.id, metavar='UUID',
        help='end just this one; see "volume attachments"',
    )
    for each in attaching, detaching:
        if takes_connection:
            one = each.add_mutually_exclusive_group(required=True)
            one.add_argument(
                'volume', metavar='VOLUME', nargs='?', help='its name or id'
            )
            one.add_argument(
                '--connection', metavar='FILE',
                help='a connection_info as JSON, or - for standard input; '
                     'the service is not asked',
            )
        else:
            add_volume(each)
            each.set_defaults(connection=None)


def add_volume(verb: parser.Parser) -> None:
    verb.add_argument('volume', metavar='VOLUME', help='its name or id')


def add_host(verb: parser.Parser, help: str) -> None:
    verb.add_argument('--host', metavar='NAME', help=help)


def attach(session: Session, args: argparse.Namespace) -> None:
    # Drivers of protocols are needed by hosts alone, and slow to import.
    from volume.connector import here

    kept = _kept(session)
    if args.connection:
        connection, attachment_id = _given(args.connection)
        _print(kept.attach(connection, attachment_id), connection)
        return
    client = session.client
    volume_id = find.volume(client, args.volume)
    with contextlib.ExitStack() as undo:
        made, is_new = _ask(session, args, volume_id)
        connection = here.connection(made['connection_info'])
        if is_new:  # what was here before stays, whatever goes wrong now
            undo.callback(_give_back, session, made['id'])
            undo.callback(_let_go, kept, connection, made['id'])
        location = kept.attach(connection, made['id'], _origin(session))
        client.post(
            f'/attachments/{made["id"]}/action', {'os-complete': None},
            again=True,
        )
        undo.pop_all()
    shown = shown_of(client.get(f'/attachments/{made["id"]}')['attachment'])
    shown['location'] = location
    if session.format == 'table':
        _print(location, connection)
    else:
        show.one(shown, session.format)


def detach(session: Session, args: argparse.Namespace) -> None:
    from volume.connector import here

    if args.attachment and args.host:
        raise Usage('--host and --attachment are given; one is enough')
    kept = _kept(session)
    if args.connection:
        connection, attachment_id = _given(args.connection)
        kept.detach(connection, attachment_id)
        volume_id = connection.fields.get('volume_id')
        show.note(
            f'volume {volume_id} is detached from this host' if volume_id
            else f'attachment {attachment_id} is ended on this host'
        )
        return
    client = session.client
    volume_id = find.volume(client, args.volume)
    noted = {
        note.attachment_id: note for note in kept.notes()
        if note.volume_id == volume_id and note.origin == _origin(session)
    }
    ending = _ending(session, args, volume_id, noted)
    for each in ending:
        note = noted.pop(each['id'], None)
        there = note.connection if note else None
        if info := each['connection_info']:
            there = here.connection(info)
        if there:
            try:
                kept.detach(there, each['id'])
            except errors.Unsupported:
                # If it is another host's, there is nothing to let go here.
                if not (args.host or args.attachment):
                    raise
        with contextlib.suppress(errors.NotFound):
            client.delete(f'/attachments/{each["id"]}')
    if not (args.attachment or args.host):
        for note in noted.values():
            _end_noted(client, kept, note)
    show.done(
        volumes.get(session, volume_id),
        f'volume {args.volume} is detached', session.format,
    )


def _end_noted(client: Client, kept: Kept, note: Note) -> None:
    """End what this host has, and the service did not say that it has.

    Its access was ended without this host; or it was given another name.
    """
    kept.detach(note.connection, note.attachment_id)
    with contextlib.suppress(errors.NotFound):
        client.delete(f'/attachments/{note.attachment_id}')


def shown_of(row: Json) -> dict[str, Any]:
    """Return what we say about an attachment."""
    info = row['connection_info']
    return {
        'id': row['id'],
        'volume_id': row['volume_id'],
        'status': row['status'],
        'mode': row['attach_mode'],
        'host': row.get('host'),
        'instance_id': row['instance'],
        'protocol': info.get('driver_volume_type'),
        'location': _location(info),
        'image_format': info.get('format') or 'raw',
        'attached_at': f'{row["attached_at"]}Z' if row['attached_at']
        else None,
    }


def _location(info: Json) -> str | None:
    """Return what programs that open a connection by themselves call it.

    Of a session of the kernel that is no device: which one it becomes, only
    its host can say.
    """
    if portal := info.get('target_portal'):
        return f'iscsi://{portal}/{info["target_iqn"]}/{info["target_lun"]}'
    if nqn := info.get('target_nqn'):
        address, port, _ = info['portals'][0]
        where = f'[{address}]' if ':' in address else address
        return f'nvme+tcp://{where}:{port}/{nqn}/{info["ns_id"]}'
    return info.get('uri') or info.get('path')


def _ask(
    session: Session, args: argparse.Namespace, volume_id: str
) -> tuple[Json, bool]:
    """Return this host's attachment, with its credentials.

    One is enough: whether it is a new one is said.
    """
    from volume.connector import here

    client = session.client
    properties = here.properties(args.host or '', args.ip or '')
    mine = _mine(session, volume_id, properties['host'])
    if len(mine) == 1:
        if mine[0]['attach_mode'] != args.mode:
            raise errors.Conflict(
                f'volume {volume_id} is attached here as '
                f'{mine[0]["attach_mode"]!r}: detach it first'
            )
        found: Json = client.put(
            f'/attachments/{mine[0]["id"]}',
            {'attachment': {'connector': properties}},
        )['attachment']
        return found, False
    made: Json = client.post('/attachments', {'attachment': {
        'volume_uuid': volume_id, 'connector': properties,
        'mode': args.mode,
    }})['attachment']
    return made, True


def _mine(session: Session, volume_id: str, host: str) -> list[Json]:
    """Return this host's own; what an instance uses is not."""
    return [
        each for each in session.client.pages(
            '/attachments/detail', 'attachments', volume_id=volume_id,
            attached_host=host,
        ) if not each['instance']
    ]


def _ending(
    session: Session,
    args: argparse.Namespace,
    volume_id: str,
    noted: dict[str, Note],
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
    mine = _mine(session, volume_id, name)
    if mine or (noted and not args.host):
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


# volume-connect alone.


def extend(session: Session, args: argparse.Namespace) -> None:
    kept = _kept(session)
    for note in _noted(session, kept, args):
        size_bytes = kept.extend(note.connection)
        if session.format == 'table':
            print(f'{note.location} has {size_bytes} bytes')
        else:
            show.one(
                {**_row(note), 'id': note.attachment_id,
                 'size_bytes': size_bytes},
                session.format,
            )


def show_list(session: Session, args: argparse.Namespace) -> None:
    notes, strays = _kept(session).seen()
    rows = [_row(note) for note in notes]
    rows += [
        {'id': stray.attachment_id, 'volume_id': stray.volume_id,
         'protocol': stray.protocol, 'state': 'stray', 'location': None}
        for stray in strays
    ]
    show.many(rows, COLUMNS, session.format)


def clean(session: Session, args: argparse.Namespace) -> int:
    """Let go of what no attachment answers to; say what must stay, and why.
    """
    kept = _kept(session)
    left = seen = 0
    notes = {note.attachment_id: note for note in kept.notes()}
    others = {
        note.attachment_id for note in notes.values()
        if note.origin != _origin(session) and not args.offline
    }
    strays = {each.attachment_id: each for each in kept.strays()}
    for stray in strays.values():
        if stray.attachment_id not in others and not _is_known(
            session, args, stray.attachment_id
        ):
            seen += 1
            left += _clean_one(
                args, f'{stray.protocol} {stray.attachment_id}: {stray.what}',
                functools.partial(kept.reap, stray),
            )
    for note in notes.values():
        if _is_over(args, kept, note) and not (
            note.attachment_id in others or note.attachment_id in strays
        ) and not _is_known(session, args, note.attachment_id):
            seen += 1
            left += _clean_one(
                args, f'{note.connection.protocol} {note.attachment_id}: '
                f'what was {note.state}', functools.partial(kept.end, note),
            )
    if not seen:
        show.note('there is nothing to clean')
    return 1 if left else 0


def _is_over(args: argparse.Namespace, kept: Kept, note: Note) -> bool:
    """Say whether a note is of what is over, if the service says so too."""
    if args.offline:  # nobody will say it
        return note.state != 'attached'
    try:
        return kept.may_be_dead(note)
    except errors.Unsupported:
        return False


COLUMNS = (
    show.Column('ATTACHMENT', lambda row: row['id']),
    show.Column('VOLUME', lambda row: row['volume_id']),
    show.Column('PROTOCOL', lambda row: row['protocol']),
    show.Column('STATE', lambda row: row['state']),
    show.Column('LOCATION', lambda row: row['location'] or '-'),
)


def _row(note: Note) -> Json:
    return {
        'id': note.attachment_id, 'volume_id': note.volume_id,
        'protocol': note.connection.protocol, 'state': note.state,
        'location': note.location or None,
    }


def _clean_one(args: argparse.Namespace, words: str, act: Any) -> int:
    if args.dry_run:
        print(f'would remove {words} (if nobody uses it)')
        return 0
    try:
        act()
    except errors.VolumeError as failed:
        show.note(f'{words} stays: {failed}')
        return 1
    print(f'removed {words}')
    return 0


def _is_known(
    session: Session, args: argparse.Namespace, attachment_id: str
) -> bool:
    """Ask whether the service still has an attachment."""
    if args.offline:
        return False
    try:
        session.client.get(f'/attachments/{attachment_id}')
    except errors.NotFound:
        return False
    return True


def _noted(
    session: Session, kept: Kept, args: argparse.Namespace
) -> Iterator[Note]:
    """Yield what this host has of a volume.

    :raises NotFound: nothing
    """
    wanted = args.volume.lower()
    notes = list(kept.notes())
    if not ids.is_id(wanted):
        wanted = find.volume(session.client, args.volume)
    found = [
        note for note in notes if wanted in (
            note.volume_id, note.attachment_id
        )
    ]
    if not found:
        raise errors.NotFound(
            f'this host has nothing of volume {args.volume}; see '
            '"volume-connect list"'
        )
    yield from found


def _given(path: str) -> tuple[model.Connection, str]:
    """Return a connection_info that was given in a file, and whose it is."""
    from volume.connector import here

    try:
        with open(0 if path == '-' else path, closefd=path != '-') as f:
            info = json.loads(f.read(INFO_BYTES_MAX))
    except OSError as failed:
        raise Usage(f'{path} cannot be read: {failed.strerror}') from None
    except ValueError:
        raise Usage(f'{path} is no JSON') from None
    for key in 'attachment', 'connection_info':  # the answer of REST, or RPC
        if isinstance(info, dict):
            info = info.get(key, info)
    if not isinstance(info, dict) or 'driver_volume_type' not in info:
        raise Usage(f'{path} is no connection_info')
    connection = here.connection(info)
    return connection, here.attachment_of(info)


def _kept(session: Session) -> Kept:
    from volume.connector.kept import Kept

    return Kept()


def _origin(session: Session) -> str:
    """Return whose attachments these are: a service, and a project of it."""
    return session.client.origin


def _print(location: str, connection: model.Connection) -> None:
    print(show.clean(location))
    found = connection.fields.get('format') or 'raw'
    if found != 'raw':
        show.note(f'open it as {found}')


def _give_back(session: Session, attachment_id: str) -> None:
    try:
        session.client.delete(f'/attachments/{attachment_id}')
    except errors.VolumeError as failed:
        show.note(
            f'attachment {attachment_id} is left behind: {failed}; end it '
            'with "volume detach"'
        )


def _let_go(
    kept: Kept, connection: model.Connection, attachment_id: str
) -> None:
    try:
        kept.detach(connection, attachment_id)
    except errors.VolumeError as failed:
        show.note(f'it is still connected to this host: {failed}')
