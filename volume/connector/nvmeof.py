# SPDX-License-Identifier: Apache-2.0
"""NVMe over TCP on the host's side: connect, prove, let go.

There is one subsystem per attachment, so its connections are this
attachment's alone. Several portals are several paths only if the kernel makes
one device of them (``nvme_core.multipath``); otherwise one is taken, and the
others are tried when it does not answer.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from volume import errors
from volume import ids
from volume import model
from volume.connector import base
from volume.connector import disks
from volume.connector import naming
from volume.connector import nvme_host
from volume.connector.alone import alone
from volume.connector.base import field
from volume.connector.nvme_host import Controller
from volume.connector.nvme_host import Identity
from volume.connector.nvme_host import Portal
from volume.node import Node

LOG = logging.getLogger(__name__)

PROTOCOL = 'nvmeof'
DISK_S = 30.0
GROW_S = 3.0
POLL_S = 0.1
_NQN = re.compile(r'nqn\.\d{4}-\d\d\.[!-~]{1,210}')
_ADDRESS = re.compile(r'[0-9a-fA-F:.]{2,45}')
_PORT = re.compile(r'\d{1,5}')


class NvmeConnector(base.Connector):
    """Gives an NVMe namespace."""

    protocol: ClassVar[str] = PROTOCOL
    leaves_traces: ClassVar[bool] = True
    knows_the_dead: ClassVar[bool] = True

    def __init__(self, node: Node, who: Identity | None = None) -> None:
        self.node = node
        self.grow_s = GROW_S
        self.return_s = disks.RETURN_S
        self._who = who

    def host(self) -> model.Host:
        who = self._identity()
        more = {'nvme_hostid': who.host_id} if who.host_id else {}
        return model.Host(
            socket.gethostname(), nqn=who.nqn, properties=more
        )

    def attach(self, connection: model.Connection) -> str:
        asked = Asked(connection)
        with self._alone(asked.volume_id), contextlib.ExitStack() as undo:
            had = self._controllers(asked.nqn)
            if not had:
                undo.callback(self._back_out, asked)
            self._connect(asked, had)
            name = self._await_device(asked)
            disks.check_nvme(self.node, name, asked.volume_id)
            disks.check_size(
                self.node, name, asked.volume_id, asked.size_bytes
            )
            undo.pop_all()
        return f'/dev/{name}'

    def detach(self, connection: model.Connection) -> None:
        asked = Asked(connection)
        with self._alone(asked.volume_id):
            disks.await_return(
                asked.volume_id, lambda: self._is_away(asked.nqn),
                self.return_s,
            )
            self._let_go(asked.volume_id, asked.nqn)

    def present(self, connection: model.Connection) -> str:
        for each in self._controllers(Asked(connection).nqn):
            if each.spaces:
                return f'/dev/{each.spaces[0]}'
        return ''

    def extend(self, connection: model.Connection) -> int:
        asked = Asked(connection)
        with self._alone(asked.volume_id):
            found = self._controllers(asked.nqn)
            names = [name for each in found for name in each.spaces]
            if not names:
                raise errors.NotFound(
                    f'volume {asked.volume_id} is not attached here'
                )
            before_bytes = disks.size_bytes(self.node, names[0])
            nvme_host.rescan(self.node, found)
            return self._await_growth(names[0], before_bytes)

    def strays(self) -> Iterator[base.Stray]:
        """Yield subsystems of ours that no connection leads to any more."""
        there = nvme_host.controllers(self.node)
        for nqn in sorted({each.nqn for each in there}):
            if (found := naming.parts(nqn)) is None:
                continue
            mine = [each for each in there if each.nqn == nqn]
            # Deleted by the kernel, or on its way up, it is no stray.
            if all(each.state == 'connecting' for each in mine):
                yield base.Stray(
                    self.protocol, found[0], found[1],
                    f'{len(mine)} dead connections to {nqn}',
                )

    def reap(self, stray: base.Stray) -> None:
        mine = stray.volume_id, stray.attachment_id
        with self._alone(stray.volume_id):
            there = [
                each for each in nvme_host.controllers(self.node)
                if naming.parts(each.nqn) == mine
            ]
            if any(each.is_up for each in there):
                raise errors.Busy(
                    f'attachment {stray.attachment_id} is served again'
                )
            for nqn in sorted({each.nqn for each in there}):
                self._let_go(stray.volume_id, nqn)

    # Attach.

    def _connect(self, asked: Asked, had: Sequence[Controller]) -> None:
        """Connect by all portals if the kernel joins them, else by one."""
        is_many = nvme_host.has_multipath(self.node)
        # One that only tries to come back leads nowhere yet.
        there = {each.portal for each in had if each.is_up}
        if there and not is_many:
            return
        failed: errors.VolumeError | None = None
        count = len(there)
        for portal in asked.portals:
            if portal in there:
                continue
            try:
                nvme_host.connect(
                    self.node, asked.nqn, portal, self._identity()
                )
            except (errors.Unavailable, errors.Denied) as refused:
                LOG.info('volume %s: %s', asked.volume_id, refused)
                failed = refused
                continue
            count += 1
            if not is_many:
                break
        if not count:
            raise failed or errors.Invalid(
                f'the connection of volume {asked.volume_id} has no portal'
            )
        if is_many and count < len(asked.portals):
            LOG.warning(
                'volume %s is reached by %d of %d paths: %s',
                asked.volume_id, count, len(asked.portals), failed,
            )

    def _await_device(self, asked: Asked) -> str:
        late = time.monotonic() + DISK_S
        while True:
            found = self._controllers(asked.nqn)
            for each in found:
                if each.spaces and each.is_up:
                    return each.spaces[0]
            if not found:
                raise errors.NotFound(
                    f'the connection to {asked.nqn} has ended'
                )
            if time.monotonic() > late:
                raise errors.NotFound(
                    f'{asked.nqn} lets us in, and the kernel shows no disk '
                    f'of volume {asked.volume_id}: it does not take a disk '
                    'twice that it has already by another attachment '
                    '("duplicate IDs" in its log)'
                )
            time.sleep(POLL_S)

    def _await_growth(self, name: str, before_bytes: int) -> int:
        """Return the size, when it has become another or time is over.

        The kernel asks the controllers later, and tells nobody when it has.
        It may have asked before, when the target said that there was news.
        """
        late = time.monotonic() + self.grow_s
        while (
            size_bytes := disks.size_bytes(self.node, name)
        ) == before_bytes and time.monotonic() < late:
            time.sleep(POLL_S)
        return size_bytes

    def _back_out(self, asked: Asked) -> None:
        try:
            self._let_go(asked.volume_id, asked.nqn)
        except errors.VolumeError as failed:
            LOG.warning(
                'volume %s is not let go of: %s', asked.volume_id, failed
            )

    # Detach.

    def _let_go(self, volume_id: str, nqn: str) -> None:
        found = self._controllers(nqn)
        alive = {
            name for each in found if each.is_up for name in each.spaces
        }
        for name in sorted({
            name for each in found for name in each.spaces
        }):
            path = f'/dev/{name}'
            disks.need_free(self.node, path, volume_id)
            # What a dead connection still has to write goes nowhere, and
            # who asks it to would wait for it.
            if name in alive:
                disks.flush(self.node, path, volume_id)
        for each in found:
            nvme_host.disconnect(self.node, each)

    def _is_away(self, nqn: str) -> bool:
        """Say whether there are connections, and none of them lives."""
        found = self._controllers(nqn)
        return bool(found) and not any(each.is_up for each in found)

    def _controllers(self, nqn: str) -> list[Controller]:
        """Return the connections, those that live first."""
        return sorted((
            each for each in nvme_host.controllers(self.node)
            if each.nqn == nqn
        ), key=lambda each: not each.is_up)

    def _identity(self) -> Identity:
        if self._who is None:
            self._who = nvme_host.identity(self.node)
        return self._who

    def _alone(
        self, volume_id: str
    ) -> contextlib.AbstractContextManager[None]:
        return alone(
            self.node.lock_dir, f'connect-{volume_id[:2]}',
            f'volume {volume_id}, or another, has been attached or detached',
        )


class Asked:
    """A connection of NVMe over TCP, or ``Invalid``.

    The form is os-brick's: ``portals`` is a list of address, port and
    transport. An older one has a single portal in fields of its own.
    """

    def __init__(self, connection: model.Connection) -> None:
        self.volume_id = ids.check(
            field(connection, PROTOCOL, 'volume_id'), 'volume id'
        )
        fields = connection.fields
        self.nqn = str(fields.get('target_nqn') or fields.get('nqn') or '')
        if not _NQN.fullmatch(self.nqn):
            raise errors.Invalid(
                f'the connection of volume {self.volume_id} has the '
                f'subsystem {self.nqn!r:.240}, which is no NQN'
            )
        if connection.credentials:
            raise errors.Unsupported(
                'this host cannot prove itself to NVMe subsystems'
            )
        portals = fields.get('portals')
        self.portals = [
            self._portal(each) for each in (
                portals if isinstance(portals, list) and portals else [[
                    fields.get('target_portal'), fields.get('target_port'),
                    fields.get('transport_type'),
                ]]
            )
        ]
        size = fields.get('size_bytes')
        self.size_bytes = size if isinstance(size, int) else 0

    def _portal(self, given: object) -> Portal:
        parts = given if isinstance(given, (list, tuple)) else []
        if len(parts) == 3:
            address, port, transport = (str(part) for part in parts)
            if _ADDRESS.fullmatch(address) and _PORT.fullmatch(port) and (
                transport.lower() == 'tcp'
            ):
                return Portal(address, port)
        raise errors.Invalid(
            f'the connection of volume {self.volume_id} has the portal '
            f'{given!r:.80}, which is no address, port and "tcp"'
        )
