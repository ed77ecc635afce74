# SPDX-License-Identifier: Apache-2.0
"""Volumes over NBD, served by the block daemon of this node.

The NBD name of an export is the attachment's id. All backends of a node
share the one daemon and its one address, which the service's options set; so
the exporter has no options of its own.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from volume import errors
from volume import ids
from volume import model
from volume.blockd import Blockd
from volume.blockd import PRIVATE
from volume.exports.base import Abilities
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.base import Source
from volume.node import Node


class NbdExporter(Exporter):
    """Exports by qemu-storage-daemon; they outlive our service."""

    accepts_blocknode: ClassVar[bool] = True
    outlives_service: ClassVar[bool] = True
    abilities: ClassVar[Abilities] = Abilities(auth=('path',))

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node

    def check(self) -> None:
        # The service alone asks Blockd.ensure(): its answer, that exports
        # are to be restored, is given once.
        self._blockd().bring_up()

    def export(self, wanted: Export) -> model.Connection:
        name = ids.check(wanted.attachment_id, 'attachment')
        writable = wanted.access is model.Access.WRITE
        uri = self._blockd().export(
            name, _blocknode(wanted.source), writable
        )
        return model.Connection('nbd', _fields(uri, name, wanted.access))

    def export_many(
        self, wanted: Sequence[Export]
    ) -> dict[str, model.Connection | errors.VolumeError]:
        accesses = {
            ids.check(each.attachment_id, 'attachment'): each.access
            for each in wanted
        }
        uris = self._blockd().export_many([
            (
                each.attachment_id, _blocknode(each.source),
                each.access is model.Access.WRITE,
            )
            for each in wanted
        ])
        return {
            name: uri if isinstance(uri, errors.VolumeError) else (
                model.Connection('nbd', _fields(uri, name, accesses[name]))
            )
            for name, uri in uris.items()
        }

    def unexport(self, attachment_id: str) -> None:
        name = ids.check(attachment_id, 'attachment')
        self._blockd().unexport(name)

    def exported(self) -> set[str]:
        return {
            name for name in self._blockd().export_ids()
            if not name.startswith(PRIVATE)
        }

    # Ours alone.

    def _blockd(self) -> Blockd:
        if self.node.blockd is None:
            raise errors.Unavailable('this node has no block daemon')
        return self.node.blockd


def _blocknode(source: Source) -> Mapping[str, Any]:
    if not isinstance(source, model.Device):
        return source
    protocol = 'host_device' if source.is_block else 'file'
    node: dict[str, Any] = {
        'driver': source.format,
        'file': {'driver': protocol, 'filename': source.path},
    }
    if source.format == 'qcow2':
        # A device is whole: what its header says of a backing file is not
        # followed. A driver with chains gives block nodes.
        node['backing'] = None
    return node


def _fields(
    uri: str, name: str, access: model.Access
) -> dict[str, object]:
    fields: dict[str, object] = {
        'uri': uri, 'export': name, 'access': access.value,
    }
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme == 'nbd+unix':
        fields['socket'] = urllib.parse.parse_qs(parts.query)['socket'][0]
    else:
        fields['host'], fields['port'] = parts.hostname, parts.port
    return fields
