# SPDX-License-Identifier: Apache-2.0
"""What this host was given, and what it has of it.

A note is written before a host is changed, and removed when the change is
undone, so that whoever comes after a crash knows what was begun. It is a note
and no truth: what is there is asked of the kernel. It holds no secret.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from volume import errors
from volume import ids
from volume import model
from volume.connector import here
from volume.connector.alone import alone
from volume.connector.base import Connector
from volume.connector.base import Stray
from volume.node import Node

ATTACHING, ATTACHED, DETACHING = 'attaching', 'attached', 'detaching'
GONE = 'gone'  # noted as attached, and not there
DEAD = 'dead'  # noted as attached, still there, and nothing answers


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """One attachment, as this host noted it; ``origin`` is whose it is."""

    attachment_id: str
    connection: model.Connection
    state: str
    location: str = ''
    origin: str = ''

    @property
    def volume_id(self) -> str:
        return str(self.connection.fields.get('volume_id') or '')


Finder = Callable[[str], Connector]


class Kept:
    """The attachments of this host that leave something on it."""

    def __init__(
        self, node: Node | None = None, find: Finder | None = None
    ) -> None:
        self.node = node or Node(here.STATE_DIR)
        self._find = find or here.find
        self._directory = os.path.join(self.node.state_dir, 'attached')

    def attach(
        self,
        connection: model.Connection,
        attachment_id: str,
        origin: str = '',
    ) -> str:
        """Attach, and return the path or URL; again is the same one."""
        connector = self._need(connection)
        if not connector.leaves_traces:
            return connector.attach(connection)
        note = Note(attachment_id, connection, ATTACHING, origin=origin)
        with self._alone(attachment_id):
            before = self._note(attachment_id)
            if before is None:
                connector.clear(connection)
            self._write(note)
            try:
                location = connector.attach(connection)
            except errors.VolumeError:
                if before is None and not _is_there(connector, connection):
                    self._forget(attachment_id)
                raise
            self._write(dataclasses.replace(
                note, state=ATTACHED, location=location
            ))
        return location

    def detach(
        self, connection: model.Connection, attachment_id: str
    ) -> None:
        """Let go, and forget it.

        :raises Busy: somebody on this host uses it
        """
        connector = self._need(connection)
        if not connector.leaves_traces:
            connector.detach(connection)
            return
        with self._alone(attachment_id):
            self._detach(connector, connection, attachment_id)

    def end(self, seen: Note) -> None:
        """Let go of what was seen to be over, if it still is.

        :raises Busy: somebody on this host uses it, or has attached it again
        """
        connector = self._need(seen.connection)
        with self._alone(seen.attachment_id):
            note = self._note(seen.attachment_id)
            if note is None:
                return
            if seen.state != ATTACHED and (
                note.state == ATTACHED == self._as_it_is(note).state
            ):
                raise errors.Busy(
                    f'attachment {seen.attachment_id} was {seen.state}, and '
                    'is attached by now'
                )
            self._detach(connector, note.connection, note.attachment_id)

    def extend(self, connection: model.Connection) -> int:
        """Have this host see how large the volume is by now."""
        return self._need(connection).extend(connection)

    def notes(self) -> Iterator[Note]:
        """Yield what was noted, each with the state that is true now."""
        for name in self._names():
            note = self._note(name.removesuffix('.json'))
            if note is None:
                continue
            if note.state == ATTACHED:
                note = self._as_it_is(note)
            yield note

    def strays(self) -> Iterator[Stray]:
        """Yield what is left on this host and nothing answers to."""
        for connector in here.installed(self._find):
            if connector.leaves_traces:
                yield from connector.strays()

    def seen(self) -> tuple[list[Note], list[Stray]]:
        """Return what is noted, and what is left here besides.

        Of what is noted it is said whether its device still answers; where
        the protocol does not know that, only the service does.
        """
        strays = {each.attachment_id: each for each in self.strays()}
        notes = list(self.notes())
        noted = {note.attachment_id for note in notes}
        return [
            dataclasses.replace(note, state=DEAD)
            if note.state == ATTACHED and note.attachment_id in strays
            else note for note in notes
        ], [
            stray for stray in strays.values()
            if stray.attachment_id not in noted
        ]

    def reap(self, stray: Stray) -> None:
        """Let go of what was left.

        :raises Busy: somebody uses it, or it is served again
        """
        self._find(stray.protocol).reap(stray)
        self._forget(stray.attachment_id)

    def may_be_dead(self, note: Note) -> bool:
        """Say whether what is noted may be served no more.

        :raises Unsupported: this host has no connector for it
        """
        if note.state != ATTACHED:
            return True
        return not self._find(note.connection.protocol).knows_the_dead

    def _detach(
        self,
        connector: Connector,
        connection: model.Connection,
        attachment_id: str,
    ) -> None:
        note = self._note(attachment_id)
        if note is not None:
            self._write(dataclasses.replace(note, state=DETACHING))
        try:
            connector.detach(connection)
        except errors.Busy:
            if note is not None:
                self._write(note)
            raise
        self._forget(attachment_id)

    def _alone(
        self, attachment_id: str
    ) -> contextlib.AbstractContextManager[None]:
        name = ids.check(attachment_id, 'attachment id')
        return alone(
            self.node.lock_dir, f'attachment-{name[:2]}',
            f'attachment {name}, or another, has been attached or detached',
        )

    def _as_it_is(self, note: Note) -> Note:
        """Return a note with where it is now: a disk may have come anew."""
        try:
            connector = self._find(note.connection.protocol)
            location = connector.present(note.connection)
        except errors.Invalid:
            location = ''
        except errors.VolumeError:
            return note  # nobody can look
        if not location:
            return dataclasses.replace(note, state=GONE)
        return dataclasses.replace(note, location=location)

    def _need(self, connection: model.Connection) -> Connector:
        connector = self._find(connection.protocol)
        if connector.leaves_traces and os.geteuid():
            raise errors.Denied(
                f'{connection.protocol} changes this host: run it as root'
            )
        return connector

    # Notes.

    def _names(self) -> list[str]:
        if not self.node.exists(self._directory):
            return []
        return [
            name for name in self.node.list(self._directory)
            if name.endswith('.json')
            and ids.is_id(name.removesuffix('.json'))
        ]

    def _path(self, attachment_id: str) -> str:
        name = ids.check(attachment_id, 'attachment id')
        return os.path.join(self._directory, f'{name}.json')

    def _note(self, attachment_id: str) -> Note | None:
        try:
            data = self.node.read(self._path(attachment_id))
        except errors.NotFound:
            return None
        try:
            found: dict[str, Any] = json.loads(data)
            return Note(
                attachment_id,
                model.Connection(found['protocol'], found['fields']),
                found['state'], found['location'], found['origin'],
            )
        except (ValueError, KeyError, TypeError) as broken:
            raise errors.Corrupt(
                f'{self._path(attachment_id)} is no note of an attachment: '
                'remove it, and detach with --connection'
            ) from broken

    def _write(self, note: Note) -> None:
        self.node.make_directory(self._directory)
        self.node.write(self._path(note.attachment_id), json.dumps({
            'protocol': note.connection.protocol,
            'fields': _plain(note.connection),
            'state': note.state,
            'location': note.location,
            'origin': note.origin,
        }, indent=1).encode())

    def _forget(self, attachment_id: str) -> None:
        if self.node.exists(self._directory):
            self.node.unlink(self._path(attachment_id))


def _is_there(connector: Connector, connection: model.Connection) -> bool:
    """Say whether anything is attached; nobody knows is yes."""
    try:
        return bool(connector.present(connection))
    except errors.Invalid:
        return False
    except errors.VolumeError:
        return True


def _plain(connection: model.Connection) -> dict[str, object]:
    """Return the fields that may stand on a disk."""
    return {
        key: value for key, value in connection.fields.items()
        if not here.is_secret(connection.protocol, key)
    }
