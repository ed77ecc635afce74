# SPDX-License-Identifier: Apache-2.0
"""The contract of a connector: how a host opens what was exported to it.

This side runs where the volume is used, and knows nothing of the service: it
imports model, errors and node only. Repeating is safe: ``attach`` of what is
attached is the same path or URL, ``detach`` of what is not returns at once.
"""

from __future__ import annotations

import abc
from typing import ClassVar

from volume import errors
from volume import model
from volume.node import Node


class Connector(abc.ABC):
    """One protocol by which this host reaches volumes."""

    protocol: ClassVar[str]

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
