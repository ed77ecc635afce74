# SPDX-License-Identifier: Apache-2.0
"""Volumes over NVMe/TCP, served by the kernel of the node (nvmet).

Each attachment has a subsystem, whose one list admits one host; its one
namespace is the volume, by the same UUID in all of them. All of it is
written as configfs, in few round trips, and the kernel is asked what is
there.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume import ids
from volume import model
from volume import identity
from volume.exports import naming
from volume.exports import nvmet_ports
from volume.exports import portals
from volume.exports.base import Abilities
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.nvmet_subsystem import MARK
from volume.exports.nvmet_subsystem import NAMESPACE
from volume.exports.nvmet_subsystem import namespace
from volume.exports.nvmet_subsystem import removing
from volume.exports.nvmet_subsystem import Subsystem
from volume.exports.nvmet_subsystem import SUBSYSTEMS
from volume.machine.ops import Op
from volume.machine.ops import Result
from volume.node import CommandFailed
from volume.node import Node

LOG = logging.getLogger(__name__)

MODULES = 'nvmet', 'nvmet-tcp'
PORT = 4420
AT_ONCE = 100  # exports in a round trip
_NQN = r'nqn\.\d{4}-\d\d\.[A-Za-z0-9][A-Za-z0-9.-]*'
_PREFIX = re.compile(rf'{_NQN}:[A-Za-z0-9._:-]*')
_HOST = re.compile(rf'{_NQN}(:[A-Za-z0-9._:-]+)?')


class NvmetExporter(Exporter):
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
    # for writing.
    abilities: ClassVar[Abilities] = Abilities(
        auth=('initiator',), read_only=False, multi_portal=True,
        online_resize=True, remote_node=True,
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node

    def check(self) -> None:
        self._check_options()
        try:
            self.node.run('modprobe', '-a', *MODULES)
        except CommandFailed as failed:
            raise errors.Unavailable(
                f'the kernel of the node has no NVMe target ({failed}): '
                'install one with the modules ' + ', '.join(MODULES)
            ) from failed
        nvmet_ports.ready(self.node, self._portals())
        self._remove_restored()

    def export(self, wanted: Export) -> model.Connection:
        found = self.export_many([wanted])[wanted.attachment_id]
        if isinstance(found, errors.VolumeError):
            raise found
        return found

    def export_many(
        self, wanted: Sequence[Export]
    ) -> dict[str, model.Connection | errors.VolumeError]:
        found: dict[str, model.Connection | errors.VolumeError] = {}
        subsystems = []
        ports = nvmet_ports.ready(self.node, self._portals())
        there = self._names()
        for each in wanted:
            try:
                subsystems.append(self._subsystem(each, ports, there))
            except errors.VolumeError as failed:
                found[each.attachment_id] = failed
        for start in range(0, len(subsystems), AT_ONCE):
            found |= self._export_some(subsystems[start:start + AT_ONCE])
        return found

    def unexport(self, attachment_id: str) -> None:
        attachment = ids.check(attachment_id, 'attachment')
        for nqn, (_, each) in self._names().items():
            if each == attachment:
                self._remove(nqn)

    def exported(self) -> set[str]:
        return {attachment for _, attachment in self._names().values()}

    def grow(self, wanted: Export) -> None:
        nqn = naming.target(
            self.conf.nvme_target_prefix, wanted.volume_id,
            wanted.attachment_id,
        )
        self.node.configure([Op.put(f'{namespace(nqn)}/revalidate_size', '1')])

    # Ours alone.

    def _check_options(self) -> None:
        prefix = self.conf.nvme_target_prefix
        if not _PREFIX.fullmatch(prefix) or (
            len(prefix) > naming.PREFIX_BYTES_MAX
        ):
            raise errors.Invalid(
                f'nvme_target_prefix {prefix!r:.80} is wrong: write it as '
                'nqn.YYYY-MM.reversed.domain:, at most '
                f'{naming.PREFIX_BYTES_MAX} characters'
            )
        self._portals()

    def _portals(self) -> tuple[portals.Portal, ...]:
        return portals.parse(self.conf.nvme_portals, 'nvme_portals', PORT)

    def _names(self) -> dict[str, tuple[str, str]]:
        """Return volume and attachment of each subsystem of ours, by NQN."""
        (names,) = self.node.configure([Op.list(SUBSYSTEMS)])
        found = {}
        for name in names if isinstance(names, list) else []:
            if parts := naming.parts(self.conf.nvme_target_prefix, name):
                found[name] = parts
        return found

    def _subsystem(
        self, wanted: Export, ports: Sequence[str],
        there: Mapping[str, tuple[str, str]],
    ) -> Subsystem:
        nqn = naming.target(
            self.conf.nvme_target_prefix, wanted.volume_id,
            wanted.attachment_id,
        )
        if wanted.access is model.Access.READ:
            raise errors.Unsupported(
                'the NVMe target cannot export a volume read-only: attach '
                f'volume {wanted.volume_id} read-write, or use lio'
            )
        for other, (volume_id, attachment_id) in there.items():
            if attachment_id == wanted.attachment_id and other != nqn:
                raise errors.Conflict(
                    f'attachment {attachment_id} is of volume {volume_id}, '
                    f'not of {wanted.volume_id}: end it first'
                )
        return Subsystem(nqn, wanted, _device(wanted), _host(wanted), ports)

    def _connection(self, subsystem: Subsystem) -> model.Connection:
        """Return how the host connects, in the form that os-brick knows."""
        volume_id = subsystem.wanted.volume_id
        return model.Connection('nvmeof', {
            'target_nqn': subsystem.nqn,
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

    # Making.

    def _export_some(
        self, subsystems: Sequence[Subsystem]
    ) -> dict[str, model.Connection | errors.VolumeError]:
        """Export them together, and one by one if anything fails."""
        found: dict[str, model.Connection | errors.VolumeError] = {}
        if len(subsystems) > 1:
            with contextlib.suppress(errors.VolumeError):
                return found | self._export_together(subsystems)
        trouble: errors.VolumeError | None = None
        for each in subsystems:
            try:
                if trouble:
                    raise trouble
                found |= self._export_together([each])
            except errors.VolumeError as failed:
                found[each.wanted.attachment_id] = failed
                if isinstance(failed, errors.Unavailable):
                    trouble = failed  # the node's, so the next one's as well
        return found

    def _export_together(
        self, subsystems: Sequence[Subsystem]
    ) -> dict[str, model.Connection]:
        known = self._look(subsystems)
        new = [
            each for each in subsystems if not each.is_there(known[each.nqn])
        ]
        try:
            self.node.configure([
                op for each in subsystems
                for op in (each.make() if each in new else each.reach())
            ])
        except errors.VolumeError:
            self._undo(new)
            raise
        return {
            each.wanted.attachment_id: self._connection(each)
            for each in subsystems
        }

    def _look(
        self, subsystems: Sequence[Subsystem]
    ) -> dict[str, Sequence[Result]]:
        """Return how each is, when what is left of any is out of the way."""
        known = self._ask({each.nqn: each.questions() for each in subsystems})
        left = [
            each for each in subsystems if each.is_there(known[each.nqn])
            and not each.is_whole(known[each.nqn])
        ]
        if not left:
            return known
        for each in left:
            self._remove(each.nqn)
        return self._look(subsystems)

    def _undo(self, subsystems: Sequence[Subsystem]) -> None:
        """Remove what was half made; it may not be there, or not yet."""
        for each in subsystems:
            try:
                self._remove(each.nqn)
            except errors.VolumeError as failed:
                LOG.warning('%s is left: %s', each.nqn, failed)
                return

    def _ask(
        self, questions: Mapping[str, list[Op]]
    ) -> dict[str, Sequence[Result]]:
        """Return the answers by name, in one round trip."""
        answers = iter(self.node.configure(
            [op for ops in questions.values() for op in ops]
        ))
        return {
            name: [next(answers) for _ in ops]
            for name, ops in questions.items()
        }

    # Unmaking.

    def _remove(self, nqn: str) -> None:
        self.node.configure(
            removing(self.node, nqn, nvmet_ports.numbers(self.node))
        )

    def _remove_restored(self) -> None:
        """Remove what another tool has restored from its own records.

        Those do not know today's hosts.
        """
        known = self._ask({
            nqn: [
                Op.get(f'{namespace(nqn)}/enable'),
                Op.get(f'{namespace(nqn)}/{MARK}'),
            ]
            for nqn in self._names()
        })
        for nqn, (enabled, mark) in known.items():
            if enabled == '1' and mark != '1':
                LOG.warning('%s was not made by this service: removed', nqn)
                self._remove(nqn)


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
