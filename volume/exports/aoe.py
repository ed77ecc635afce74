# SPDX-License-Identifier: Apache-2.0
"""Volumes over Ethernet (AoE), each served by a vblade of its own.

There are no sessions and no passwords: what a host is known by is its MAC
address, which anybody on the segment can forge. So an operator has to say
that the network is trusted. A vblade does nothing when a host flushes;
therefore each write is stored before it is answered (``-s``).

Which exports there are is seen from the processes that run. The address of
each is claimed by a small file, so that it is the same after a restart. One
that was ended leaves a mark: a host that was cut off goes on asking there, and
would reach another volume; so the address is given to another last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume import ids
from volume import model
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.node import CommandFailed
from volume.node import Node

LOG = logging.getLogger(__name__)

PROGRAM = 'vblade'
MAC = re.compile(r'[0-9a-f]{2}(?::[0-9a-f]{2}){5}')
MACS_MAX = 32  # what a vblade keeps; it ignores more, and broken ones
INTERFACE = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,14}')
SHELVES = re.compile(r'(\d{1,5})-(\d{1,5})')
SHELF_MAX, SLOT_MAX = 0xfffe, 0xfe  # the ones above mean all
RUNNING = re.compile(r'^(\d+) vblade (.*?)(\d+) (\d+) (\S+) (/.*)$')
TRIES = 8
MARK = '.ended'
START_S = 10.0
END_S = 30.0

OPTIONS: tuple[cfg.Opt, ...] = (
    cfg.StrOpt(
        'aoe_interface', required=True,
        help='Network interface on which volumes are served.',
    ),
    cfg.StrOpt(
        'aoe_shelves', default='0-99',
        help='First and last shelf of the addresses, as in 0-99.\n\n'
        'Nodes on one network need different ones: two volumes with one '
        'address are one disk to a host, and spoil each other.',
    ),
    cfg.BoolOpt(
        'aoe_trusted_network', default=False,
        help='Say that everybody on that network may reach every volume.\n\n'
        'AoE has no passwords: whoever forges the MAC address of a host '
        'reads and writes its volumes, and a host may let others in. '
        'Without this the backend stays down.',
    ),
    cfg.BoolOpt(
        'aoe_any_host', default=False,
        help='Serve hosts that do not say their MAC addresses to everybody.',
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where a volume is on the network."""

    shelf: int
    slot: int

    def __str__(self) -> str:
        return f'e{self.shelf}.{self.slot}'


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """A vblade of this node, whoever started it."""

    address: Address
    interface: str
    path: str
    flags: str


class AoeExporter(Exporter):
    """A vblade for each attachment; they outlive our service."""

    options: ClassVar[tuple[cfg.Opt, ...]] = OPTIONS
    outlives_service: ClassVar[bool] = True
    forms: ClassVar[frozenset[model.Form]] = frozenset({
        model.Form.BLOCK, model.Form.FILE,
    })
    abilities: ClassVar[model.Abilities] = model.Abilities(
        auth=('mac',), remote_node=True,
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        self.end_s = END_S
        self._was_warned = False

    def check(self) -> None:
        self._shelves()
        interface = self.conf.aoe_interface
        if not INTERFACE.fullmatch(interface):
            raise errors.Invalid(
                f'aoe_interface {interface!r:.40} is no name of one'
            )
        if not self.conf.aoe_trusted_network:
            raise errors.Invalid(
                'AoE has no passwords, and MAC addresses can be forged: set '
                f'aoe_trusted_network if everybody on {interface} may reach '
                'every volume, or use another exporter'
            )
        if not self.node.exists(f'/sys/class/net/{interface}'):
            raise errors.Unavailable(
                f'the node has no network interface {interface}'
            )
        try:
            self.node.run(PROGRAM)
        except CommandFailed:
            pass  # it says how it is used
        self.node.make_directory(self._directory)
        if not self._was_warned:
            LOG.warning(
                'AoE on %s: everybody on that network can reach the volumes '
                'that are attached', interface,
            )
            self._was_warned = True

    def export(self, wanted: Export) -> model.Connection:
        attachment = ids.check(wanted.attachment_id, 'attachment')
        source = wanted.source
        if not isinstance(source, model.Device) or source.format != 'raw':
            raise errors.Unsupported(
                f'volume {wanted.volume_id} is not a raw device or file of '
                f'the node, and {PROGRAM} reads no other'
            )
        if self.node.size(source.path) < wanted.size_bytes:
            raise errors.Corrupt(
                f'{source.path} is smaller than volume {wanted.volume_id}'
            )
        flags = self._flags(wanted)
        running = self._running()
        there = running.get(self._link(attachment))
        if there is not None:
            self._check_same(wanted, there, source.path, flags)
            return _connection(there.address)
        address = self._claim(attachment, running)
        self.node.point(self._link(attachment), source.path)
        self._start(attachment, address, flags)
        return _connection(address)

    def unexport(self, attachment_id: str) -> None:
        attachment = ids.check(attachment_id, 'attachment')
        link = self._link(attachment)
        self._end(attachment)
        for address, owner in self._claims(attachment):
            if owner == attachment:
                with contextlib.suppress(errors.VolumeError):  # a hint
                    self.node.write(self._mark(address), b'')
                self.node.unlink(self._claim_path(address))
        for path in link, self._log(attachment), self._draft(attachment):
            self.node.unlink(path)

    def abandon(self) -> None:
        self._end()

    def exported(self) -> set[str]:
        found = set()
        for path in self._running():
            directory, name = os.path.split(path)
            if directory == self._directory and ids.is_id(name):
                found.add(name)
        return found

    # Ours alone: names.

    @property
    def _directory(self) -> str:
        return os.path.join(os.path.realpath(self.node.state_dir), 'aoe')

    def _link(self, attachment: str) -> str:
        """Return the name by which the process opens the volume.

        It says in the list of processes whose it is.
        """
        return os.path.join(self._directory, attachment)

    def _log(self, attachment: str) -> str:
        return os.path.join(self._directory, f'{attachment}.log')

    def _draft(self, attachment: str) -> str:
        return os.path.join(self._directory, f'{attachment}.claim')

    def _claim_path(self, address: Address) -> str:
        return os.path.join(self._directory, str(address))

    def _mark(self, address: Address) -> str:
        return os.path.join(self._directory, f'{address}{MARK}')

    # Ours alone: questions.

    def _shelves(self) -> range:
        """Return the shelves of this node.

        :raises Invalid: they are none
        """
        match = SHELVES.fullmatch(self.conf.aoe_shelves)
        first, last = (int(match[1]), int(match[2])) if match else (1, 0)
        if not first <= last <= SHELF_MAX:
            raise errors.Invalid(
                f'aoe_shelves {self.conf.aoe_shelves!r:.40} is wrong: say '
                f'the first and the last, as in 0-99, up to {SHELF_MAX}'
            )
        return range(first, last + 1)

    def _addresses(self, attachment: str) -> Iterator[Address]:
        """Yield the addresses that an attachment may have, in order."""
        shelves = self._shelves()
        digest = hashlib.sha256(attachment.encode()).digest()
        for index in range(TRIES):
            number = int.from_bytes(digest[index * 4:index * 4 + 4], 'big')
            shelf, slot = divmod(number, SLOT_MAX + 1)
            yield Address(shelves[shelf % len(shelves)], slot)

    def _running(self) -> dict[str, Running]:
        """Return all vblades of the node, by what they have open."""
        try:
            said = self.node.run('pgrep', '--list-full', '--exact', PROGRAM)
        except CommandFailed as failed:
            if failed.code == 1:
                return {}
            raise
        found = {}
        for line in said.splitlines():
            if match := RUNNING.fullmatch(line):
                address = Address(int(match[3]), int(match[4]))
                found[match[6]] = Running(
                    address, match[5], match[6], match[2].strip()
                )
        return found

    def _flags(self, wanted: Export) -> str:
        """Return how the process serves: its access, and for whom.

        :raises Invalid: the host did not say by what it is known
        """
        said = wanted.host.properties.get('aoe_mac', '').lower()
        macs = [mac for mac in said.replace(' ', '').split(',') if mac]
        if not macs and not self.conf.aoe_any_host:
            raise errors.Invalid(
                f'host {wanted.host.name} has not said its MAC addresses '
                '(aoe_mac), by which alone it can be told from others'
            )
        # A vblade passes over what it cannot read, and serves all without.
        if not all(map(MAC.fullmatch, macs)) or len(macs) > MACS_MAX:
            raise errors.Invalid(
                f'host {wanted.host.name} gave {said!r:.80} as aoe_mac: it '
                f'is at most {MACS_MAX} MAC addresses with commas between'
            )
        flags = ['-s']
        if wanted.access is model.Access.READ:
            flags.append('-r')
        if macs:
            flags += ['-m', ','.join(macs)]
        return ' '.join(flags)

    def _check_same(
        self, wanted: Export, there: Running, path: str, flags: str
    ) -> None:
        """
        :raises Conflict: it is exported otherwise
        """
        served = self.node.readlink(there.path)
        if (served, there.flags) != (path, flags):
            raise errors.Conflict(
                f'attachment {wanted.attachment_id} is exported from '
                f'{served} with {there.flags}, not from {path} with {flags}: '
                'end it first'
            )

    def _claims(self, attachment: str) -> Iterator[tuple[Address, str]]:
        """Yield the addresses that it may have, and who has each."""
        for address in self._addresses(attachment):
            try:
                said = json.loads(self.node.read(self._claim_path(address)))
            except errors.NotFound:
                yield address, ''
            else:
                yield address, str(said)

    def _ended_s(self, address: Address) -> float:
        """Return when it was last a volume's; zero if it never was."""
        found = self.node.about(self._mark(address))
        return found.modified_s if found else 0.0

    # Ours alone: deeds.

    def _claim(self, attachment: str, running: dict[str, Running]) -> Address:
        """Return its address; it keeps it until it is ended.

        :raises Unavailable: all that it may have are others'
        """
        claims = list(self._claims(attachment))
        for address, owner in claims:
            if owner == attachment:
                return address
        served = {each.address for each in running.values()}
        draft = self._draft(attachment)
        self.node.write(draft, json.dumps(attachment).encode())
        try:
            free = [address for address, owner in claims if not owner]
            for address in sorted(free, key=self._ended_s):
                if address not in served:
                    # Of two at once one finds it taken.
                    path = self._claim_path(address)
                    self.node.link(draft, path)
                    if json.loads(self.node.read(path)) == attachment:
                        return address
        finally:
            self.node.unlink(draft)
        raise errors.Unavailable(
            f'attachment {attachment} finds no free address on shelves '
            f'{self.conf.aoe_shelves}: give more of them by aoe_shelves'
        )

    def _start(self, attachment: str, address: Address, flags: str) -> None:
        """Start the process and wait until it serves.

        :raises Unavailable: it does not
        """
        log = self._log(attachment)
        self.node.unlink(log)
        # It has no parent that would have to wait for its end.
        starter = self.node.start([
            'setsid', '--fork', PROGRAM, *flags.split(), str(address.shelf),
            str(address.slot), self.conf.aoe_interface,
            self._link(attachment),
        ], log)
        deadline, pause_s = time.monotonic() + START_S, 0.005
        while f'{address},' not in (said := self._said(log)):
            has_begun = not self.node.is_running(starter) and said
            if has_begun and self._link(attachment) not in self._running():
                raise errors.Unavailable(
                    f'{PROGRAM} does not serve attachment {attachment}: '
                    f'{said}'
                )
            if time.monotonic() > deadline:
                self._end(attachment)
                raise errors.Unavailable(
                    f'{PROGRAM} was not ready within {START_S:g} s: '
                    f'{said or "it said nothing"}'
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)
        self.node.is_running(starter)

    def _said(self, log: str) -> str:
        try:
            return self.node.read(log).decode(errors='replace').strip()
        except errors.NotFound:
            return ''

    def _end(self, attachment: str = '') -> None:
        """End the process of an attachment, or all; prove that they are gone.

        :raises Unavailable: some hang in the storage; the others are gone
        """
        deadline, pause_s = time.monotonic() + self.end_s, 0.005
        while left := self.exported():
            if attachment:
                if attachment not in left:
                    return
                left = {attachment}
            if time.monotonic() > deadline:
                raise errors.Unavailable(
                    f'{PROGRAM} does not end for {", ".join(sorted(left))}: '
                    'it hangs in the storage'
                )
            self._kill(attachment)
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.5)

    def _kill(self, attachment: str) -> None:
        # By its whole command line, which names the attachment: no other
        # process has it, whatever numbers come and go. All are killed by one
        # command, so that none goes on serving until another has ended.
        name = re.escape(attachment) if attachment else '[0-9a-f-]{36}'
        try:
            self.node.run(
                'pkill', '-KILL', '--full', '--exact',
                f'{PROGRAM} .* {re.escape(self._directory)}/{name}',
            )
        except CommandFailed as failed:
            if failed.code != 1:
                raise


def _connection(address: Address) -> model.Connection:
    return model.Connection('aoe', {
        'shelf': address.shelf, 'slot': address.slot,
        'device': str(address),
    })
