# SPDX-License-Identifier: Apache-2.0
"""Delete several things with one command; no failure hides another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from volume import errors
from volume.cli import codes
from volume.cli import show
from volume.cli import wait
from volume.cli.wait import Session
from volume.cli.wait import Ticket


class Begun(NamedTuple):
    """A deletion that the service has accepted."""

    ticket: Ticket
    id: str
    volume_id: str
    noun: str


def all_of(
    session: Session, names: Sequence[str], begin: Callable[[str], Begun]
) -> int:
    """Begin them all, wait for them all; return the first failure's code."""
    failures: list[int] = []
    begun = []
    for name in names:
        try:
            begun.append((name, begin(name)))
        except errors.VolumeError as failed:
            show.note(str(failed))
            failures.append(codes.of(failed))
    ended = []
    for name, each in begun:
        status = 'deleting'
        try:
            if session.wait:
                wait.follow(
                    session, each.ticket, each.volume_id,
                    f'deleting {each.noun} {name}',
                )
                status = 'deleted'
        except wait.Interrupted:
            raise
        except errors.VolumeError as failed:
            show.note(str(failed))
            failures.append(codes.of(failed))
            continue
        ended.append({'id': each.id, 'status': status})
        if session.format == 'table':
            print(show.clean(f'{each.noun} {name} is {status}'))
    if session.format != 'table':
        show.many(ended, (), session.format)
    return failures[0] if failures else codes.OK
