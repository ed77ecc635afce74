# SPDX-License-Identifier: Apache-2.0
"""The contract of an exporter: how a host reaches a device of this node.

There is one export per attachment, so that one host's access can end alone.
Repeating is safe: ``export`` of what is exported is the same connection;
``unexport`` of what is not returns at once.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume import model
from volume.node import Node

Source = model.Device | Mapping[str, Any]
"""A path with its format, or QAPI ``BlockdevOptions`` for QEMU."""

Wanted = tuple[str, Source, model.Host, model.Access]
"""What ``export`` takes."""


class Exporter(abc.ABC):
    """One way for hosts to reach volumes of this node."""

    options: ClassVar[tuple[cfg.Opt, ...]] = ()
    accepts_blocknode: ClassVar[bool] = False
    outlives_service: ClassVar[bool] = True

    @abc.abstractmethod
    def __init__(self, conf: Any, node: Node) -> None:
        """Keep the option group and the node; touch nothing yet."""

    @abc.abstractmethod
    def check(self) -> None:
        """Prepare for work, or say why it cannot.

        :raises Invalid: an option is wrong
        :raises Unavailable: the target software is not there
        """

    @abc.abstractmethod
    def export(
        self,
        attachment_id: str,
        source: Source,
        host: model.Host,
        access: model.Access,
    ) -> model.Connection:
        """Let the host in and say how it connects.

        :raises Conflict: the attachment is exported from another source
        """

    def export_many(
        self, wanted: Sequence[Wanted]
    ) -> dict[str, model.Connection | errors.VolumeError]:
        """As ``export``, for many after a restart; say how each went."""
        found: dict[str, model.Connection | errors.VolumeError] = {}
        for each in wanted:
            try:
                found[each[0]] = self.export(*each)
            except errors.VolumeError as failed:
                found[each[0]] = failed
        return found

    @abc.abstractmethod
    def unexport(self, attachment_id: str) -> None:
        """Forbid, end live sessions, and prove that none is left."""

    @abc.abstractmethod
    def exported(self) -> set[str]:
        """Return the ids of all attachments that are exported now."""
