# SPDX-License-Identifier: Apache-2.0
"""The contract of a connector: how a host opens what was exported to it.

This side runs where the volume is used, and knows nothing of the service: it
imports model, errors and node only. Repeating is safe: ``attach`` of what is
attached is the same path or URL, ``detach`` of what is not returns at once.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from volume import errors
from volume import model
from volume.node import Node


@dataclasses.dataclass(frozen=True, slots=True)
class Stray:
    """What an attachment has left on this host, and nothing answers to."""

    protocol: str
    volume_id: str
    attachment_id: str
    what: str


class Connector(abc.ABC):
    """One protocol by which this host reaches volumes.

    One that ``leaves_traces`` changes the host (sessions, devices, mounts):
    that takes root, and is noted, so that it can be undone by others.
    """

    protocol: ClassVar[str]
    leaves_traces: ClassVar[bool] = False
    knows_the_dead: ClassVar[bool] = False
    """Whether ``strays`` tells what is served no more. For a protocol that
    cannot, only the service knows that an access has ended."""

    @abc.abstractmethod
    def __init__(self, node: Node) -> None:
        """Keep the node; touch nothing yet."""

    @abc.abstractmethod
    def host(self) -> model.Host:
        """Say who we are, as the exporter must know it."""

    @abc.abstractmethod
    def attach(self, connection: model.Connection) -> str:
        """Return the path or URL that QEMU opens, proved to be there.

        A path's format stands in ``connection.fields['format']``; nobody
        may probe it.

        :raises Invalid: the connection is of another protocol, or broken
        :raises NotFound: the volume is not exported to us
        :raises Unavailable: the server does not answer
        """

    @abc.abstractmethod
    def detach(self, connection: model.Connection) -> None:
        """Let go of the volume; return at once if it is not attached.

        :raises Busy: something on this host has it open
        """

    def clear(self, connection: model.Connection) -> None:
        """Let go of what a former volume has left in this one's place.

        Asked, before ``attach``, of what this host has no note of: where a
        place is known by a number, that was another's before.

        :raises Busy: somebody uses it
        """

    def present(self, connection: model.Connection) -> str:
        """Return the path or URL if it is attached now; else nothing.

        Asked only of those that leave traces; it changes nothing.
        """
        return ''

    def extend(self, connection: model.Connection) -> int:
        """Have this host see that the volume has grown; return its size.

        :raises NotFound: the volume is not attached here
        :raises Unsupported: whoever has it open must open it anew
        """
        raise errors.Unsupported(
            f'a volume reached by {self.protocol} is opened anew to see '
            'that it has grown'
        )

    def strays(self) -> Iterator[Stray]:
        """Yield what was left here and is dead; what is served is none."""
        return iter(())

    def reap(self, stray: Stray) -> None:
        """Undo what an attachment has left here.

        :raises Busy: it is in use, or served again
        """


def field(connection: model.Connection, protocol: str, name: str) -> str:
    """Return one of the connection's fields.

    :raises Invalid: it is of another protocol, or has no such field
    """
    found = connection.fields.get(name)
    if connection.protocol != protocol or not isinstance(found, str):
        raise errors.Invalid(
            f'the connection is {connection.protocol!r:.40} and has no '
            f'{name} of {protocol}'
        )
    return found
