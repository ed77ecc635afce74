# SPDX-License-Identifier: Apache-2.0
"""The contract of an exporter: how a host reaches a device of this node.

There is one export per attachment, so that one host's access can end alone.
What a host sees of a volume's identity (a serial number, a WWN, an NVMe
UUID) comes from the volume's id, so that all exports of it are one disk, on
whichever node and after whatever restart. Which attachments are exported is
asked of the kernel or the daemon that serves them, never remembered.

Repeating is safe: ``export`` of what is exported is the same connection;
``unexport`` of what is not returns at once.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume import model
from volume.model import Abilities as Abilities
from volume.node import Node

Source = model.Device | Mapping[str, Any]
"""A path with its format, or QAPI ``BlockdevOptions`` for QEMU."""


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """What a host is to reach.

    ``credentials`` are the secrets by which the host proves who it is, one
    for each name in the exporter's ``wants``, good for this attachment
    alone. They may differ from those of an earlier ``export`` of the same
    attachment, and then replace them. After a restart there may be none,
    of an attachment that was made before the options wanted any: it is
    exported again as it was.
    """

    attachment_id: str
    volume_id: str
    source: Source
    host: model.Host
    access: model.Access
    size_bytes: int
    credentials: Mapping[str, str] = dataclasses.field(
        default_factory=dict, hash=False, repr=False
    )


class Exporter(abc.ABC):
    """One way for hosts to reach volumes of this node."""

    options: ClassVar[tuple[cfg.Opt, ...]] = ()
    accepts_blocknode: ClassVar[bool] = False
    forms: ClassVar[frozenset[model.Form]] = frozenset(model.Form)
    """Which paths it can read; a driver that has no such is no match."""
    outlives_service: ClassVar[bool] = True
    is_shared: bool = False
    """Whether every service of the node sees the same exports (those of its
    kernel), and not each only its own."""
    abilities: ClassVar[Abilities] = Abilities()

    wants: tuple[str, ...] = ()
    """Names of the secrets that ``Export.credentials`` must have, as the
    options say; the service makes them, and keeps them encrypted."""
    node: Node

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
    def export(self, wanted: Export) -> model.Connection:
        """Let the host in and say how it connects.

        :raises Conflict: the attachment is exported from another source
        :raises Invalid: the host lacks what it would be known by
        """

    def export_many(
        self, wanted: Sequence[Export]
    ) -> dict[str, model.Connection | errors.VolumeError]:
        """As ``export``, for many after a restart; say how each went."""
        found: dict[str, model.Connection | errors.VolumeError] = {}
        for each in wanted:
            try:
                found[each.attachment_id] = self.export(each)
            except errors.VolumeError as failed:
                found[each.attachment_id] = failed
        return found

    def grow(self, wanted: Export) -> None:
        """Let the host see that the volume has become ``size_bytes`` large.

        Asked only of what is exported, and only if ``online_resize`` is
        among the abilities.
        """
        raise errors.Unsupported(
            f'{type(self).__name__} cannot tell a host that volume '
            f'{wanted.volume_id} has grown: detach it first'
        )

    @abc.abstractmethod
    def unexport(self, attachment_id: str) -> None:
        """Forbid, end live sessions, and prove that none is left."""

    def abandon(self) -> None:
        """End at once what serves hosts for this service alone.

        It was fenced: others may have exported the same by now. What is in
        the kernel is the machine's, and goes when the service starts again.
        """

    @abc.abstractmethod
    def exported(self) -> set[str]:
        """Return the ids of all attachments that are exported now."""
