# SPDX-License-Identifier: Apache-2.0
"""What exporters share whose targets the kernel keeps in configfs.

They differ in what a target is made of. Here is what does not differ: the
kernel is asked what is there, in one round trip for many; what is whole is
renewed, what is half made or not ours is removed, and made anew together;
and if anything fails, one by one, so that each has its own error.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

from volume import errors
from volume import ids
from volume import model
from volume.exports import naming
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import Node

LOG = logging.getLogger(__name__)

AT_ONCE = 100  # exports in a round trip
OPS_AT_ONCE = 2000  # of up to a KiB each

Found = Sequence[Result]
Names = Mapping[str, tuple[str, str]]
Outcome = model.Connection | errors.VolumeError


class Target(Protocol):
    """What the target of an attachment is to be."""

    @property
    def name(self) -> str: ...

    @property
    def wanted(self) -> Export: ...

    def questions(self) -> list[Op]:
        """Return what has to be asked to know how it is."""

    def is_there(self, found: Found) -> bool:
        """Say whether anything of it is."""

    def is_whole(self, found: Found) -> bool:
        """Say whether it works, and we have made it.

        :raises Conflict: so it is, and is for another source or host
        """


T = TypeVar('T', bound=Target)


class ConfigfsExporter(Exporter, Generic[T]):
    """Targets of the node's kernel; they outlive our service."""

    directory: ClassVar[str]
    """Where the kernel has a directory for each target."""

    modules: ClassVar[tuple[str, ...]]

    is_shared = True

    node: Node

    @property
    @abc.abstractmethod
    def prefix(self) -> str:
        """What the names of our targets begin with."""

    @abc.abstractmethod
    def target(self, wanted: Export, name: str) -> T:
        """Return what the target is to be."""

    @abc.abstractmethod
    def make(self, targets: Sequence[T], known: Mapping[str, Found]) -> None:
        """Make targets that are not there."""

    @abc.abstractmethod
    def renew(self, targets: Sequence[T], known: Mapping[str, Found]) -> None:
        """Bring up to date what may be while hosts work: secrets, portals."""

    @abc.abstractmethod
    def connections(
        self, targets: Sequence[T]
    ) -> dict[str, model.Connection]:
        """Return how hosts connect, by attachment."""

    @abc.abstractmethod
    def state(self, name: str, volume_id: str) -> list[Op]:
        """Return what has to be asked to know whether a target works."""

    @abc.abstractmethod
    def works(self, found: Found) -> bool:
        """Say whether it lets its host in, and we have made it."""

    @abc.abstractmethod
    def remove(self, name: str, names: Names) -> None:
        """Remove a target; return when no host has anything of it."""

    @abc.abstractmethod
    def remove_restored(self) -> None:
        """Remove what another tool has restored from its own records.

        Those know neither today's hosts nor today's secrets.
        """

    def remove_rest(self) -> None:
        """Remove what is left of targets that somebody else has removed."""

    # The contract.

    def export(self, wanted: Export) -> model.Connection:
        found = self.export_many([wanted])[wanted.attachment_id]
        if isinstance(found, errors.VolumeError):
            raise found
        return found

    def export_many(self, wanted: Sequence[Export]) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        targets, names = [], self.names()
        for each in wanted:
            try:
                targets.append(self._target(each, names))
            except errors.VolumeError as failed:
                found[each.attachment_id] = failed
        for start in range(0, len(targets), AT_ONCE):
            found |= self._export_some(targets[start:start + AT_ONCE])
        return found

    def unexport(self, attachment_id: str) -> None:
        attachment = ids.check(attachment_id, 'attachment')
        names = self.names()
        mine = [name for name, (_, of) in names.items() if of == attachment]
        for name in mine:
            self.remove(name, names)
        if not mine:
            self.remove_rest()

    def exported(self) -> set[str]:
        # What is half made lets nobody in: it is to be exported again.
        names = self.names()
        known = self.states(names)
        return {
            attachment for name, (_, attachment) in names.items()
            if self.works(known[name])
        }

    # For those that inherit.

    def load_modules(self) -> None:
        """Have the kernel's modules.

        :raises Unavailable: it has none
        """
        try:
            self.node.load_modules(*self.modules)
        except errors.Unsupported as failed:
            raise errors.Unavailable(
                f'the node cannot be such a target: {failed}'
            ) from failed

    def names(self) -> Names:
        """Return volume and attachment of each target of ours, by name."""
        (names,) = self.node.configure([Op.list(self.directory)])
        found = {}
        for name in texts(names):
            if parts := naming.parts(self.prefix, name):
                found[name] = parts
        return found

    def states(self, names: Names) -> dict[str, Found]:
        """Return the answers to ``state`` of each."""
        return self.ask({
            name: self.state(name, volume_id)
            for name, (volume_id, _) in names.items()
        })

    def ask(self, questions: Mapping[str, list[Op]]) -> dict[str, Found]:
        """Return the answers by name, in one round trip or few."""
        every = [op for ops in questions.values() for op in ops]
        answers = itertools.chain.from_iterable(
            self.node.configure(every[start:start + OPS_AT_ONCE])
            for start in range(0, len(every), OPS_AT_ONCE)
        )
        return {
            name: [next(answers) for _ in ops]
            for name, ops in questions.items()
        }

    def remove_if_there(self, target: T) -> None:
        """Remove a target, whole or half made."""
        names = self.names()
        if target.name in names:
            self.remove(target.name, names)

    # Ours alone.

    def _target(self, wanted: Export, names: Names) -> T:
        name = naming.target(
            self.prefix, wanted.volume_id, wanted.attachment_id
        )
        for other, (volume_id, attachment_id) in names.items():
            if attachment_id == wanted.attachment_id and other != name:
                raise errors.Conflict(
                    f'attachment {attachment_id} is of volume {volume_id}, '
                    f'not of {wanted.volume_id}: end it first'
                )
        return self.target(wanted, name)

    def _export_some(self, targets: Sequence[T]) -> dict[str, Outcome]:
        """Export them together, and one by one if anything fails."""
        found: dict[str, Outcome] = {}
        if len(targets) > 1:
            with contextlib.suppress(errors.VolumeError):
                return found | self._export_together(targets)
        trouble: errors.VolumeError | None = None
        for each in targets:
            try:
                if trouble:
                    raise trouble
                found |= self._export_together([each])
            except errors.VolumeError as failed:
                found[each.wanted.attachment_id] = failed
                trouble = trouble or self._trouble()
        return found

    def _trouble(self) -> errors.VolumeError | None:
        """Return what is wrong with the node, so the next one's as well."""
        try:
            self.names()
        except errors.VolumeError as failed:
            return failed
        return None

    def _export_together(
        self, targets: Sequence[T]
    ) -> dict[str, model.Connection]:
        known = self._look(targets)
        old = [each for each in targets if each.is_there(known[each.name])]
        if old:
            self.renew(old, known)
        if new := [each for each in targets if each not in old]:
            try:
                self.make(new, known)
            except errors.VolumeError as failed:
                self._undo(new)
                raise errors.rebuild(failed.kind, (
                    f'volume {new[0].wanted.volume_id} cannot be exported '
                    f'from {_path(new[0].wanted)}: {failed}'
                )) from failed
        return self.connections(targets)

    def _look(self, targets: Sequence[T]) -> dict[str, Found]:
        """Return how each is, when what is left of any is out of the way."""
        known = self.ask({each.name: each.questions() for each in targets})
        left = [
            each for each in targets if each.is_there(known[each.name])
            and not each.is_whole(known[each.name])
        ]
        if not left:
            return known
        self.remove_restored()
        for each in left:
            self.remove_if_there(each)
        return self._look(targets)

    def _undo(self, targets: Sequence[T]) -> None:
        """Remove what was half made."""
        for each in targets:
            try:
                self.remove_if_there(each)
            except errors.VolumeError as failed:
                LOG.warning('%s is left: %s', each.name, failed)
                return


def _path(wanted: Export) -> str:
    source = wanted.source
    return source.path if isinstance(source, model.Device) else 'its source'


def texts(found: Result) -> list[str]:
    """Return the names that a directory has; none, if it is not there."""
    return found if isinstance(found, list) else []
