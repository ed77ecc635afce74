# SPDX-License-Identifier: Apache-2.0
"""Volumes as paths, for hosts that are this node.

Nothing stands between the host and the file, so nothing can end a session
for it: ``unexport`` is Busy while a process has the path open. It sees all
processes of its own user, and those of QEMU whoever runs them. What is
exported stands in one small record an attachment, which outlives the service.

A device is told by the name that its storage gave it, and never as what that
leads to: numbers of devices are given anew when the machine starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from volume import blockgraph
from volume import errors
from volume import ids
from volume import model
from volume.exports.base import Abilities
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.base import Source
from volume.node import Node

SUFFIX = '.json'
DEVICES = '/dev/'


class LocalExporter(Exporter):
    """Tells the path of a volume, and keeps a record of whom it told."""

    accepts_blocknode: ClassVar[bool] = True
    outlives_service: ClassVar[bool] = True
    abilities: ClassVar[Abilities] = Abilities(
        auth=('path',), ends_sessions=False
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node

    def check(self) -> None:
        self.node.make_directory(self._directory)

    def export(self, wanted: Export) -> model.Connection:
        attachment_id, access = wanted.attachment_id, wanted.access
        path, format_name = self.node.blocking(lambda: _plain(wanted.source))
        if not self.node.exists(path):
            raise errors.NotFound(f'{path} is not there to be attached')
        record: dict[str, object] = {
            'path': path, 'format': format_name, 'access': access.value,
        }
        there = self._record(attachment_id)
        if there is None or (there != record and self.node.blocking(
            lambda: _is_same(there, record)
        )):
            self.node.make_directory(self._directory)
            self.node.write(
                self._path(attachment_id), json.dumps(record).encode()
            )
        elif there != record:
            raise errors.Conflict(
                f'attachment {attachment_id} is of {there.get("path")} as '
                f'{there.get("access")}, not of {path} as {access.value}: '
                'end it first'
            )
        return model.Connection('local', record)

    def unexport(self, attachment_id: str) -> None:
        there = self._record(attachment_id)
        if there is None:
            return
        path = str(there.get('path', ''))
        others = (
            self._record(each) for each in self._recorded()
            if each != attachment_id
        )
        if path and not any(
            other and other.get('path') == path for other in others
        ):
            self._check_unused(path)
        self.node.unlink(self._path(attachment_id))

    def exported(self) -> set[str]:
        # A device does not outlive the machine: it is to be made again.
        return {
            each for each in self._recorded()
            if not (path := self._path_of(each)).startswith(DEVICES)
            or self.node.exists(path)
        }

    # Ours alone.

    def _recorded(self) -> set[str]:
        try:
            names = self.node.list(self._directory)
        except errors.NotFound:
            return set()
        found = (
            name.removesuffix(SUFFIX) for name in names
            if name.endswith(SUFFIX)
        )
        return {name for name in found if ids.is_id(name)}

    def _path_of(self, attachment_id: str) -> str:
        """Return what was told; nothing if it is not known."""
        try:
            return str((self._record(attachment_id) or {}).get('path', ''))
        except errors.Corrupt:
            return ''  # said to whoever wants to end it

    @property
    def _directory(self) -> str:
        return os.path.join(self.node.state_dir, 'local')

    def _path(self, attachment_id: str) -> str:
        name = ids.check(attachment_id, 'attachment')
        return os.path.join(self._directory, f'{name}{SUFFIX}')

    def _check_unused(self, path: str) -> None:
        """Prove that no process has it open, as far as that can be told.

        :raises Busy: one has
        """
        # A mount, or another device over it, is no process.
        users = [
            each for each in self.node.users(path)
            if not each.endswith(f'(pid {os.getpid()})')
        ]
        # Of another user's process only QEMU's locks can be seen.
        if not users and not self.node.is_block(path) and (
            self.node.is_open_in_qemu(self.node.blocking(
                lambda: os.path.realpath(path)
            ))
        ):
            users = ['a process of QEMU']
        if users:
            raise errors.Busy(
                f'{path} is in use ({", ".join(users):.300}): end that '
                'first, a path cannot be taken away from it'
            )

    def _record(self, attachment_id: str) -> Mapping[str, object] | None:
        try:
            found = json.loads(self.node.read(self._path(attachment_id)))
        except errors.NotFound:
            return None
        except ValueError as broken:
            raise errors.Corrupt(
                f'{self._path(attachment_id)} is no record of an '
                'attachment; look at it, and remove it'
            ) from broken
        return found if isinstance(found, dict) else {}


def _is_same(
    there: Mapping[str, object], record: Mapping[str, object]
) -> bool:
    """Say whether both are of one file now, by whatever name."""
    one, two = (
        {**each, 'path': os.path.realpath(str(each.get('path', '')))}
        for each in (there, record)
    )
    return one == two


def _plain(source: Source) -> tuple[str, str]:
    """Return path and format of what one file or device holds whole.

    A pointer to a file may move while the host has it; the name of a device
    is all that leads to it always.

    :raises Unsupported: it is more than one file, or none
    """
    if isinstance(source, model.Device):
        path = source.path if source.is_block else os.path.realpath(
            source.path)
        return path, source.format
    layer = blockgraph.parse(source)
    driver = layer.file['driver']
    if driver not in ('file', 'host_device'):
        raise errors.Unsupported(
            'the volume is no file of this node, and cannot be attached '
            'locally; use the nbd exporter'
        )
    if layer.backing or layer.options:
        raise errors.Unsupported(
            f'{layer.filename} is one layer of a volume, and a path cannot '
            'say so; use the nbd exporter'
        )
    path = _filename(source) if driver == 'host_device' else layer.filename
    return path, layer.driver


def _filename(source: Mapping[str, Any]) -> str:
    """Return the file of a block node that has one, as it was given."""
    at: Any = source
    while 'filename' not in at:
        at = at['file']
    return str(at['filename'])
