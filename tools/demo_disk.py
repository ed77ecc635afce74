# SPDX-License-Identifier: Apache-2.0
"""A volume as the host sees it that has attached it: an NBD disk.

What is read is compared twice by programs that share no code: our own NBD
client reads every byte, and ``qemu-img compare`` does it again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
from collections.abc import Iterator
from typing import BinaryIO

from demo_family import Family
from demo_screen import Failed
from demo_service import Service

from volume import errors
from volume import model
from volume.connector.base import Connector
from volume.nbd import NbdClient
from volume.node import Node

CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 16


class Disk:
    """One attachment: from ``attach`` until ``detach`` it has a URI."""

    def __init__(
        self, service: Service, family: Family, volume_id: str
    ) -> None:
        self._service = service
        self._family = family
        self._volume_id = volume_id
        self._attachment_id = ''
        self._connection = model.Connection('', {})
        self.uri = ''

    def attach(self) -> None:
        """Ask the service for access, and the connector for a URI."""
        client = self._service.client
        found = client.post('/attachments', {'attachment': {
            'volume_uuid': self._volume_id,
            'connector': {'host': socket.gethostname()},
        }})['attachment']
        self._attachment_id = found['id']
        fields = dict(found['connection_info'])
        protocol = fields.pop('driver_volume_type')
        self._connection = model.Connection(protocol, fields)
        self.uri = _connector(protocol).attach(self._connection)
        client.post(
            f'/attachments/{self._attachment_id}/action', {'os-complete': {}}
        )
        self._service.settle('volume', self._volume_id, 'in-use')

    def detach(self) -> None:
        """Let go, and see that nothing can be read there any more.

        :raises Failed: the old URI still reads
        """
        _connector(self._connection.protocol).detach(self._connection)
        self._service.client.delete(f'/attachments/{self._attachment_id}')
        self._service.settle('volume', self._volume_id, 'available')
        with contextlib.suppress(errors.NotFound, errors.Unavailable):
            NbdClient(self.uri).close()
            raise Failed(f'{self.uri} still reads after its end')

    @property
    def size_bytes(self) -> int:
        with self._open() as client:
            return client.size_bytes

    def compare(self, path: str) -> int:
        """Read every byte; return how many.

        Where the file ends the volume must hold zeros.

        :raises Failed: one byte is another, and where
        """
        with self._open() as client, open(path, 'rb') as f:
            for offset, wanted, found in _chunks(client, f):
                if found != wanted:
                    pairs = enumerate(zip(wanted, found, strict=True))
                    at = offset + next(i for i, (a, b) in pairs if a != b)
                    raise Failed(
                        f'byte {at} of {self.uri} is not that of {path}'
                    )
            if f.read(1):
                raise Failed(f'{path} is longer than {self.uri}')
            return client.size_bytes

    def compare_by_qemu(self, path: str, format: str = 'raw') -> None:
        """Have qemu-img compare the volume with an image.

        :raises Failed: they differ, and where
        """
        self._family.run(
            'qemu-img', 'compare', '-f', format, '-F', 'raw', path, self.uri
        )

    def pull(self, path: str) -> None:
        """Copy the volume into a raw file."""
        self._family.run(
            'qemu-img', 'convert', '-f', 'raw', '-O', 'raw', self.uri, path
        )

    def push(self, path: str) -> int:
        """Write the blocks in which a raw file differs; return the bytes."""
        written = 0
        with self._open() as client, open(path, 'rb') as f:
            for offset, wanted, found in _chunks(client, f):
                if wanted == found:
                    continue
                for at in range(0, len(wanted), BLOCK_BYTES):
                    block = wanted[at:at + BLOCK_BYTES]
                    if block != found[at:at + BLOCK_BYTES]:
                        client.pwrite(block, offset + at)
                        written += len(block)
            client.flush()
        return written

    def write(self, data: bytes, offset_bytes: int) -> None:
        """Write, and make it durable."""
        with self._open() as client:
            client.pwrite(data, offset_bytes)
            client.flush()

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        buffer = bytearray(length_bytes)
        with self._open() as client:
            client.pread_into(buffer, offset_bytes)
        return bytes(buffer)

    def _open(self) -> contextlib.closing[NbdClient]:
        return contextlib.closing(NbdClient(self.uri))


def _chunks(
    client: NbdClient, file: BinaryIO
) -> Iterator[tuple[int, bytes, bytearray]]:
    """Yield offset, the file's bytes and the volume's, to its end."""
    for offset in range(0, client.size_bytes, CHUNK_BYTES):
        length = min(CHUNK_BYTES, client.size_bytes - offset)
        found = bytearray(length)
        client.pread_into(found, offset)
        yield offset, file.read(length).ljust(length, b'\0'), found


def _connector(protocol: str) -> Connector:
    """Return the host's side of a protocol, by its entry point."""
    entry, = importlib.metadata.entry_points(
        group='volume.connectors', name=protocol
    )
    made: Connector = entry.load()(Node(os.curdir))
    return made
