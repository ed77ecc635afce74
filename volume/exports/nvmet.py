# SPDX-License-Identifier: Apache-2.0
"""Volumes over NVMe/TCP, served by the kernel of the node (nvmet).

Each attachment has a subsystem, whose one list admits one host; its one
namespace is the volume, by the same UUID in all of them.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume import identity
from volume import model
from volume.exports import naming
from volume.exports import nvmet_ports
from volume.exports.base import Abilities
from volume.exports.base import Export
from volume.exports.configfs import ConfigfsExporter
from volume.exports.configfs import Found
from volume.exports.configfs import Names
from volume.exports.nvmet_ports import PORTS
from volume.exports.nvmet_subsystem import admitted
from volume.exports.nvmet_subsystem import HOSTS
from volume.exports.nvmet_subsystem import is_enabled
from volume.exports.nvmet_subsystem import is_marked
from volume.exports.nvmet_subsystem import mark_questions
from volume.exports.nvmet_subsystem import NAMESPACE
from volume.exports.nvmet_subsystem import namespace
from volume.exports.nvmet_subsystem import removing
from volume.exports.nvmet_subsystem import Subsystem
from volume.exports.nvmet_subsystem import SUBSYSTEMS
from volume.exports.portals import parse
from volume.exports.portals import Portal
from volume.machine.ops import Op
from volume.node import Node

LOG = logging.getLogger(__name__)

PORT = 4420
_NQN = r'nqn\.\d{4}-\d\d\.[A-Za-z0-9][A-Za-z0-9.-]*'
_PREFIX = re.compile(rf'{_NQN}:[A-Za-z0-9._:-]*')
_HOST = re.compile(rf'{_NQN}(:[A-Za-z0-9._:-]+)?')


class NvmetExporter(ConfigfsExporter[Subsystem]):
    """Subsystems of the node's kernel; they outlive our service."""

    options: ClassVar[tuple[cfg.Opt, ...]] = (
        cfg.ListOpt(
            'nvme_portals', required=True,
            help='Addresses of this node on which hosts find subsystems.\n\n'
            'Each one address or address:port (4420 if it is left out), '
            'IPv6 in brackets; the transport is TCP. With several, hosts '
            'have several paths to each volume.',
        ),
        cfg.StrOpt(
            'nvme_target_prefix', default='nqn.2010-10.org.openstack:',
            help='What the names of subsystems begin with.\n\n'
            'Subsystems are called <prefix>volume-<volume>.<attachment>. '
            'Those with this prefix and this form are the service\'s own: '
            'do not change it while volumes are attached.',
        ),
    )
    # The kernel's namespaces know no "read only", and open what they serve
    # for writing. As a host, it takes no namespace whose UUID it has already.
    forms: ClassVar[frozenset[model.Form]] = frozenset({model.Form.BLOCK})
    abilities: ClassVar[Abilities] = Abilities(
        auth=('initiator',), read_only=False, twice_per_host=False,
        multi_portal=True, online_resize=True, remote_node=True,
    )

    directory = SUBSYSTEMS
    modules = 'nvmet', 'nvmet-tcp'

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        # A host's entry is made and admitted, or removed, and nothing
        # between.
        self._hosts = threading.Lock()

    @property
    def prefix(self) -> str:
        return str(self.conf.nvme_target_prefix)

    def check(self) -> None:
        if not _PREFIX.fullmatch(self.prefix) or (
            len(self.prefix) > naming.PREFIX_BYTES_MAX
        ):
            raise errors.Invalid(
                f'nvme_target_prefix {self.prefix!r:.80} is wrong: write it '
                'as nqn.YYYY-MM.reversed.domain:, at most '
                f'{naming.PREFIX_BYTES_MAX} characters'
            )
        portals = self._portals()
        self.load_modules()
        nvmet_ports.ready(self.node, portals)
        self.remove_restored()

    def grow(self, wanted: Export) -> None:
        space = namespace(naming.target(
            self.prefix, wanted.volume_id, wanted.attachment_id
        ))
        self.node.configure([Op.put(f'{space}/revalidate_size', '1')])

    def target(self, wanted: Export, name: str) -> Subsystem:
        if wanted.access is model.Access.READ:
            raise errors.Unsupported(
                'the NVMe target cannot export a volume read-only: attach '
                f'volume {wanted.volume_id} read-write, or use lio'
            )
        return Subsystem(name, wanted, _device(wanted), _host(wanted))

    def make(
        self, targets: Sequence[Subsystem], known: Mapping[str, Found]
    ) -> None:
        ports = nvmet_ports.ready(self.node, self._portals())
        ops = [
            op for each in targets
            for op in (*each.make(known[each.name][0]), *each.reach(ports))
        ]
        try:
            with self._hosts:
                self.node.configure(ops)
        except errors.NotFound:
            # Another service of the node may have let go of a host's entry
            # just before it was admitted here. Made anew, not repeated: an
            # enabled namespace is not told a second time what it is.
            for each in targets:
                self.remove_if_there(each)
            with self._hosts:
                self.node.configure(ops)

    def renew(
        self, targets: Sequence[Subsystem], known: Mapping[str, Found]
    ) -> None:
        ports = nvmet_ports.ready(self.node, self._portals())
        others = {
            f'{PORTS}/{each}' for each in nvmet_ports.numbers(self.node)
        }.difference(ports)
        self.node.configure([
            op for each in targets
            for op in (*each.reach(ports), *each.leave(sorted(others)))
        ])

    def connections(
        self, targets: Sequence[Subsystem]
    ) -> dict[str, model.Connection]:
        return {
            each.wanted.attachment_id: self._connection(each)
            for each in targets
        }

    def state(self, name: str, volume_id: str) -> list[Op]:
        return [
            *mark_questions(name),
            Op.list(f'{SUBSYSTEMS}/{name}/allowed_hosts'),
        ]

    def works(self, found: Found) -> bool:
        return is_enabled(found) and is_marked(found) and bool(found[-1])

    def remove(self, name: str, names: Names) -> None:
        ports = nvmet_ports.numbers(self.node)
        hosts = admitted(self.node, name)
        self.node.configure(removing(self.node, name, hosts, ports))
        # Who dies before an entry is linked, or after it is unlinked, leaves
        # one that admits nobody, and looks like one that another tool has
        # made ready: it goes with what the host is let in to next.
        for host in hosts:
            self._remove_host(host)

    def remove_if_there(self, target: Subsystem) -> None:
        super().remove_if_there(target)
        # What failed may have been the link.
        self._remove_host(target.host_nqn)

    def remove_restored(self) -> None:
        names = self.names()
        for name, found in self.states(names).items():
            if is_enabled(found) and not is_marked(found):
                LOG.warning('%s was not made by this service: removed', name)
                self.remove(name, names)

    # Ours alone.

    def _portals(self) -> tuple[Portal, ...]:
        return parse(self.conf.nvme_portals, 'nvme_portals', PORT)

    def _remove_host(self, nqn: str) -> None:
        # Busy is one whom another subsystem admits, ours or not.
        with self._hosts, contextlib.suppress(errors.Busy):
            self.node.configure([Op.rmdir(f'{HOSTS}/{nqn}')])

    def _connection(self, subsystem: Subsystem) -> model.Connection:
        """Return how the host connects, in the form that os-brick knows."""
        volume_id = subsystem.wanted.volume_id
        return model.Connection('nvmeof', {
            'target_nqn': subsystem.name,
            'vol_uuid': identity.nvme_uuid(volume_id),
            'volume_nguid': identity.nvme_nguid(volume_id),
            'ns_id': NAMESPACE,
            'host_nqn': subsystem.host_nqn,
            'portals': [
                [each.address, str(each.port), 'tcp']
                for each in self._portals()
            ],
            'volume_id': volume_id,
            'access_mode': subsystem.wanted.access.value,
            'discard': True,
        })


def _device(wanted: Export) -> model.Device:
    """Return the source, a block device.

    A file would have the blocks of its file system, 4096 bytes mostly, and
    a partition table that was written in blocks of 512 is none then.

    :raises Unsupported: it is something else
    """
    source = wanted.source
    if not isinstance(source, model.Device) or not source.is_block:
        raise errors.Unsupported(
            f'volume {wanted.volume_id} is no block device of its node: '
            'use the lio, tgt or nbd exporter'
        )
    return source


def _host(wanted: Export) -> str:
    """Return the host's NQN.

    :raises Invalid: it has none, or what is none
    """
    nqn = wanted.host.nqn or ''
    if not nqn:
        raise errors.Invalid(
            f'host {wanted.host.name} has no NQN: give its connector one '
            '(it stands in /etc/nvme/hostnqn)'
        )
    if not _HOST.fullmatch(nqn) or len(nqn) > naming.NAME_BYTES_MAX:
        raise errors.Invalid(
            f'host {wanted.host.name} calls itself {nqn!r:.80}, which is no '
            'NQN: it must be nqn.YYYY-MM.reversed.domain:…'
        )
    return nqn
