# SPDX-License-Identifier: Apache-2.0
"""NFS on the host's side: a file on a mount that volumes share.

The mount is made for the first volume that needs it and removed with the
last; a file beside it stands for each. The file is the volume if it has the
volume's name: there is nothing else to know it by.

A server that does not answer keeps whoever asks for as long as it pleases. So
what asks it is a command with a time limit, and never we ourselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import stat
from collections.abc import Mapping
from typing import ClassVar

from volume import errors
from volume import model
from volume.connector import base
from volume.connector import disks
from volume.connector.alone import alone
from volume.connector.base import field
from volume.node import CommandFailed
from volume.node import Node

MOUNT_S = 60.0
LOOK_S = 30.0
FLUSH_S = 120.0  # for what this host has not written yet
_EXPORT = re.compile(
    r'(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*):/[!-~]*'
)
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,254}')
_OPTIONS = re.compile(r'(-o )?[A-Za-z0-9_.,=:-]*')
# What it says by our system's words.
MEANING: Mapping[str, type[errors.VolumeError]] = {
    'No such file or directory': errors.NotFound,
    'Stale file handle': errors.Denied,
    'Permission denied': errors.Denied,
    'Operation not permitted': errors.Denied,
}
# What a server may not bring to this host by its files.
SAFE = 'nosuid,nodev,noexec'


class NfsConnector(base.Connector):
    """Gives the path of a file."""

    protocol: ClassVar[str] = 'nfs'
    leaves_traces: ClassVar[bool] = True

    def __init__(self, node: Node) -> None:
        self.node = node
        self.flush_s = FLUSH_S

    def host(self) -> model.Host:
        return model.Host(socket.gethostname())

    def attach(self, connection: model.Connection) -> str:
        asked = Asked(connection, self.node)
        with self._alone(asked), contextlib.ExitStack() as undo:
            self.node.make_directory(asked.directory)
            self.node.make_directory(asked.uses)
            if not self.node.exists(asked.use):
                undo.callback(self._back_out, asked)
            self.node.write(asked.use, asked.path.encode())
            if not self._is_mounted(asked):
                self._mount(asked)
            size_bytes = self._size(asked)
            if size_bytes < asked.size_bytes:
                raise errors.Conflict(
                    f'{asked.path} has {size_bytes} bytes, and the volume '
                    f'{asked.size_bytes}: its node has to be looked at'
                )
            undo.pop_all()
        return asked.path

    def detach(self, connection: model.Connection) -> None:
        asked = Asked(connection, self.node)
        with self._alone(asked):
            is_over = False
            if self._is_mounted(asked):
                try:
                    self._flush(asked)
                except errors.Denied:
                    is_over = True  # and nothing can be written any more
            self._let_go(asked, is_over)

    def present(self, connection: model.Connection) -> str:
        asked = Asked(connection, self.node)
        is_there = self.node.exists(asked.use) and self._is_mounted(asked)
        return asked.path if is_there else ''

    def extend(self, connection: model.Connection) -> int:
        # The client asks the server; there is nothing to set up.
        return self._size(Asked(connection, self.node))

    def _size(self, asked: Asked) -> int:
        """Return how large the file is.

        :raises NotFound: there is none
        """
        said = self._stat(asked, LOOK_S, '%f %s')
        mode, size_bytes = said.split()
        if not stat.S_ISREG(int(mode, 16)):
            raise errors.NotFound(
                f'{asked.export} has no file {asked.name}'
            )
        return int(size_bytes)

    def _flush(self, asked: Asked) -> None:
        """Have stored what this host has written, which nobody uses now.

        :raises Busy: somebody does
        :raises Denied: the access has ended
        """
        try:
            # Asked once, with a limit: who uses it is known by that here.
            said = self._stat(asked, self.flush_s, '%d %i')
            disks.need_free(
                self.node, asked.path, asked.name, [*map(int, said.split())]
            )
            self._ask(asked, self.flush_s, 'sync', asked.path)
        except errors.NotFound:
            return
        except errors.Unavailable as failed:
            raise errors.Unavailable(
                f'what was written to {asked.name} cannot be stored '
                f'({failed}); see to its node, or end its access with '
                '"volume force-detach" and lose it'
            ) from failed

    def _stat(self, asked: Asked, timeout_s: float, what: str) -> str:
        # The server itself: this host would go on for seconds with what it
        # remembers of a file that has grown, or is no longer its own.
        return self._ask(
            asked, timeout_s, 'stat', '--cached=never', '-c', what,
            asked.path,
        )

    def _ask(self, asked: Asked, timeout_s: float, *argv: str) -> str:
        """Run what asks the server.

        :raises NotFound: it has no such file
        :raises Denied: it lets us in no more
        :raises Unavailable: it does not answer, or cannot
        """
        try:
            return self.node.run(*argv, timeout_s=timeout_s)
        except CommandFailed as failed:
            for words, kind in MEANING.items():
                if words in failed.stderr:
                    raise kind(
                        f'{asked.export} {asked.name}: {words.lower()}'
                    ) from failed
            raise errors.Unavailable(
                f'{asked.export} {asked.name}: {failed}'
            ) from failed
        except errors.Unknown as failed:
            raise errors.Unavailable(
                f'the server of {asked.export} does not answer: {failed}'
            ) from failed

    def _mount(self, asked: Asked) -> None:
        options = ','.join(filter(None, (asked.options, SAFE)))
        try:
            self.node.run(
                'mount', '-t', 'nfs', '-o', options, asked.export,
                asked.directory, timeout_s=MOUNT_S,
            )
        except CommandFailed as failed:
            words = failed.stderr.lower()
            kind: type[errors.VolumeError] = errors.Unavailable
            if 'access denied' in words or 'not permitted' in words:
                kind = errors.Denied
            elif 'no such file' in words:
                kind = errors.NotFound
            raise kind(
                f'{asked.export} cannot be mounted: {failed}'
            ) from failed

    def _let_go(self, asked: Asked, is_over: bool = False) -> None:
        if self.node.exists(asked.uses):
            self.node.unlink(asked.use)
            if self.node.list(asked.uses):
                return
        if self._is_mounted(asked):
            try:
                # A server that lets us in no more would refuse the rest.
                self.node.run(
                    'umount', *(['-l'] if is_over else []), asked.directory,
                    timeout_s=MOUNT_S,
                )
            except CommandFailed as failed:
                raise errors.Busy(
                    f'{asked.directory} is in use: {failed}'
                ) from failed

    def _back_out(self, asked: Asked) -> None:
        with contextlib.suppress(errors.VolumeError):
            self._let_go(asked)

    def _is_mounted(self, asked: Asked) -> bool:
        table = self.node.read('/proc/self/mountinfo', 16 << 20).decode(
            errors='replace'
        )
        return any(
            line.split(' ')[4:5] == [asked.directory]
            for line in table.splitlines()
        )

    def _alone(
        self, asked: Asked
    ) -> contextlib.AbstractContextManager[None]:
        return alone(
            self.node.lock_dir, f'connect-nfs-{asked.key[:2]}',
            f'{asked.export} has been mounted or unmounted',
        )


class Asked:
    """A connection of NFS, or ``Invalid``; the form is Cinder's."""

    def __init__(self, connection: model.Connection, node: Node) -> None:
        self.export = field(connection, 'nfs', 'export')
        self.name = field(connection, 'nfs', 'name')
        given = connection.fields.get('options') or ''
        if not _EXPORT.fullmatch(self.export):
            raise errors.Invalid(
                f'{self.export!r:.200} is no export: it is like host:/path'
            )
        if not _NAME.fullmatch(self.name):
            raise errors.Invalid(f'{self.name!r:.200} is no name of a file')
        if not isinstance(given, str) or not _OPTIONS.fullmatch(given):
            raise errors.Invalid(f'{given!r:.200} are no options of a mount')
        self.options = given.removeprefix('-o ')
        size = connection.fields.get('size_bytes')
        self.size_bytes = size if isinstance(size, int) else 0
        self.key = hashlib.sha256(
            f'{self.export} {self.options}'.encode()
        ).hexdigest()[:32]
        # Without links, as the kernel tells of mounts and open files.
        base_dir = os.path.join(os.path.realpath(node.state_dir), 'mounts')
        self.directory = os.path.join(base_dir, self.key)
        self.uses = os.path.join(base_dir, f'{self.key}.uses')
        self.use = os.path.join(self.uses, self.name)
        self.path = os.path.join(self.directory, self.name)
