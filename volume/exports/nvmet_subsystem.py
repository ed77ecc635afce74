# SPDX-License-Identifier: Apache-2.0
"""An attachment as a subsystem of the kernel's NVMe target.

Ours has one namespace and one host on its list. What it is to be, what has
to be asked to know how it is, and the operations that make or remove it; who
does them is ``nvmet``.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

from volume import errors
from volume import identity
from volume import model
from volume.exports.base import Export
from volume.exports.configfs import texts
from volume.exports.nvmet_ports import NVMET
from volume.exports.nvmet_ports import PORTS
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import Node

SUBSYSTEMS = f'{NVMET}/subsystems'
HOSTS = f'{NVMET}/hosts'
NAMESPACE = 1
MODEL = 'volume-service'
# The highest number of a controller is what the kernel has room for; below
# that it says in which boot we have made a subsystem. One that another tool
# has restored from its own records is of an earlier boot.
MARK = 'attr_cntlid_max'
BOOT = '/proc/sys/kernel/random/boot_id'
NUMBER_MAX, MARKS = 65519, 60000


@dataclasses.dataclass(frozen=True, slots=True)
class Subsystem:
    """What the subsystem of an attachment is to be."""

    name: str
    wanted: Export
    device: model.Device
    host_nqn: str

    @property
    def path(self) -> str:
        return f'{SUBSYSTEMS}/{self.name}'

    def questions(self) -> list[Op]:
        """Return what has to be known of it."""
        space = namespace(self.name)
        return [
            *mark_questions(self.name), Op.exists(self.path),
            Op.get(f'{space}/device_path'),
            Op.list(f'{self.path}/allowed_hosts'),
        ]

    def is_there(self, found: Sequence[Result]) -> bool:
        return bool(found[-3])

    def is_whole(self, found: Sequence[Result]) -> bool:
        """Say whether it works, is ours, and is as it is to be.

        :raises Conflict: it does, and is other
        """
        path, hosts = found[-2:]
        if not is_marked(found) or not is_enabled(found) or not hosts:
            return False
        if path != self.device.path:
            raise errors.Conflict(
                f'volume {self.wanted.volume_id} is exported from {path}, '
                f'not from {self.device.path}: end that first'
            )
        if hosts != [self.host_nqn]:
            raise errors.Conflict(
                f'attachment {self.wanted.attachment_id} is exported to '
                f'{", ".join(texts(hosts)) or "nobody"}, not to '
                f'{self.host_nqn}: end it first'
            )
        return True

    def make(self, boot: Result) -> list[Op]:
        """Return how it is made, before hosts reach it."""
        space, volume_id = namespace(self.name), self.wanted.volume_id
        host = f'{HOSTS}/{self.host_nqn}'
        return [
            Op.mkdir(self.path),
            Op.put(f'{self.path}/attr_allow_any_host', '0'),
            Op.put(
                f'{self.path}/attr_serial', identity.nvme_serial(volume_id)
            ),
            Op.put(f'{self.path}/attr_model', MODEL),
            Op.put(f'{self.path}/{MARK}', mark(boot)),
            Op.mkdir(space),
            Op.put(f'{space}/device_path', self.device.path),
            Op.put(f'{space}/device_uuid', identity.nvme_uuid(volume_id)),
            Op.put(f'{space}/device_nguid', identity.nvme_nguid(volume_id)),
            Op.put(f'{space}/enable', '1'),
            Op.mkdir(host),
            Op.link(f'{self.path}/allowed_hosts/{self.host_nqn}', host),
        ]

    def reach(self, ports: Sequence[str]) -> list[Op]:
        """Return what lets hosts reach it at all portals."""
        return [
            Op.link(f'{port}/subsystems/{self.name}', self.path)
            for port in ports
        ]

    def leave(self, ports: Sequence[str]) -> list[Op]:
        """Return what ends that hosts reach it at other portals."""
        return [Op.unlink(f'{port}/subsystems/{self.name}') for port in ports]


def namespace(nqn: str, number: str | int = NAMESPACE) -> str:
    return f'{SUBSYSTEMS}/{nqn}/namespaces/{number}'


def mark_questions(nqn: str) -> list[Op]:
    """Return what ``is_enabled`` and ``is_marked`` have to know."""
    return [
        Op.get(BOOT), Op.get(f'{namespace(nqn)}/enable'),
        Op.get(f'{SUBSYSTEMS}/{nqn}/{MARK}'),
    ]


def is_enabled(found: Sequence[Result]) -> bool:
    return found[1] == '1'


def is_marked(found: Sequence[Result]) -> bool:
    """Say whether we have made it, since the node was booted."""
    return found[2] == mark(found[0])


def mark(boot: Result) -> str:
    return str(NUMBER_MAX - zlib.crc32(str(boot).encode()) % MARKS)


def admitted(node: Node, nqn: str) -> list[str]:
    """Return the hosts on a subsystem's list."""
    return texts(*node.configure([
        Op.list(f'{SUBSYSTEMS}/{nqn}/allowed_hosts')
    ]))


def removing(
    node: Node, nqn: str, hosts: Sequence[str], ports: Sequence[str]
) -> list[Op]:
    """Return how a subsystem goes, whoever filled it.

    The host is forbidden first. The kernel returns from disabling a
    namespace when the last request to it has ended, and serves none after
    it; with the ports' links the sessions end.
    """
    path = f'{SUBSYSTEMS}/{nqn}'
    spaces = texts(*node.configure([Op.list(f'{path}/namespaces')]))
    paths = [namespace(nqn, each) for each in spaces]
    return [
        *(Op.unlink(f'{path}/allowed_hosts/{each}') for each in hosts),
        *(Op.put(f'{each}/enable', '0') for each in paths),
        *(Op.unlink(f'{PORTS}/{each}/subsystems/{nqn}') for each in ports),
        *map(Op.rmdir, paths),
        Op.rmdir(path),
    ]
