# SPDX-License-Identifier: Apache-2.0
"""An attachment as a subsystem of the kernel's NVMe target.

Ours has one namespace and one host on its list. What it is to be, what has
to be asked to know how it is, and the operations that make or remove it; who
does them is ``nvmet``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from volume import errors
from volume import model
from volume import identity
from volume.exports.base import Export
from volume.exports.nvmet_ports import NVMET
from volume.exports.nvmet_ports import PORTS
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import Node

SUBSYSTEMS = f'{NVMET}/subsystems'
NAMESPACE = 1
MODEL = 'volume-service'
# Of a block device it says nothing, and the tool that restores subsystems
# after a boot does not keep it: so it says that we have made this one.
MARK = 'buffered_io'


@dataclasses.dataclass(frozen=True, slots=True)
class Subsystem:
    """What the subsystem of an attachment is to be."""

    nqn: str
    wanted: Export
    device: model.Device
    host_nqn: str
    ports: Sequence[str]

    @property
    def path(self) -> str:
        return f'{SUBSYSTEMS}/{self.nqn}'

    def questions(self) -> list[Op]:
        """Return what has to be known of it."""
        space = namespace(self.nqn)
        return [
            Op.exists(self.path), Op.get(f'{space}/enable'),
            Op.get(f'{space}/{MARK}'), Op.get(f'{space}/device_path'),
            Op.list(f'{self.path}/allowed_hosts'),
            *(Op.exists(self._link(port)) for port in self.ports),
        ]

    def is_there(self, found: Sequence[Result]) -> bool:
        return bool(found[0])

    def is_whole(self, found: Sequence[Result]) -> bool:
        """Say whether it works, is ours, and is as it is to be.

        :raises Conflict: it does, and is other
        """
        _, enabled, mark, path, hosts, *links = found
        if enabled != '1' or mark != '1' or not any(links):
            return False
        if path != self.device.path:
            raise errors.Conflict(
                f'volume {self.wanted.volume_id} is exported from {path}, '
                f'not from {self.device.path}: end that first'
            )
        if hosts != [self.host_nqn]:
            raise errors.Conflict(
                f'attachment {self.wanted.attachment_id} is exported to '
                f'{", ".join(_names(hosts)) or "nobody"}, not to '
                f'{self.host_nqn}: end it first'
            )
        return True

    def make(self) -> list[Op]:
        """Return how it is made; hosts reach it with the last of it."""
        space, volume_id = namespace(self.nqn), self.wanted.volume_id
        host = f'{NVMET}/hosts/{self.host_nqn}'
        return [
            Op.mkdir(self.path),
            Op.put(f'{self.path}/attr_allow_any_host', '0'),
            Op.put(
                f'{self.path}/attr_serial', identity.nvme_serial(volume_id)
            ),
            Op.put(f'{self.path}/attr_model', MODEL),
            Op.mkdir(space),
            Op.put(f'{space}/device_path', self.device.path),
            Op.put(f'{space}/device_uuid', identity.nvme_uuid(volume_id)),
            Op.put(f'{space}/device_nguid', identity.nvme_nguid(volume_id)),
            Op.put(f'{space}/{MARK}', '1'),
            Op.put(f'{space}/enable', '1'),
            # A host that is admitted nowhere is only a name: nobody can
            # tell whose it is, and it is never removed.
            Op.mkdir(host),
            Op.link(f'{self.path}/allowed_hosts/{self.host_nqn}', host),
            *self.reach(),
        ]

    def reach(self) -> list[Op]:
        """Return what lets hosts reach it at all portals."""
        return [Op.link(self._link(port), self.path) for port in self.ports]

    def _link(self, port: str) -> str:
        return f'{port}/subsystems/{self.nqn}'


def namespace(nqn: str, number: str | int = NAMESPACE) -> str:
    return f'{SUBSYSTEMS}/{nqn}/namespaces/{number}'


def removing(node: Node, nqn: str, ports: Sequence[str]) -> list[Op]:
    """Return how a subsystem goes, whoever filled it.

    The host is forbidden first. The kernel returns from disabling a
    namespace when the last request to it has ended, and serves none after
    it; with the ports' links the sessions end.
    """
    path = f'{SUBSYSTEMS}/{nqn}'
    hosts, spaces, *reached = node.configure([
        Op.list(f'{path}/allowed_hosts'), Op.list(f'{path}/namespaces'),
        *(Op.exists(f'{PORTS}/{port}/subsystems/{nqn}') for port in ports),
    ])
    paths = [namespace(nqn, each) for each in _names(spaces)]
    return [
        *(Op.unlink(f'{path}/allowed_hosts/{e}') for e in _names(hosts)),
        *(Op.put(f'{each}/enable', '0') for each in paths),
        *(
            Op.unlink(f'{PORTS}/{port}/subsystems/{nqn}')
            for port, is_there in zip(ports, reached, strict=True) if is_there
        ),
        *map(Op.rmdir, paths),
        Op.rmdir(path),
    ]


def _names(found: Result) -> list[str]:
    return found if isinstance(found, list) else []
