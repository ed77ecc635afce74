# SPDX-License-Identifier: Apache-2.0
"""Volumes over iSCSI, served by tgtd: a daemon that needs no kernel module.

There is one target per attachment, with the volume as its LUN 1, one
initiator that is let in, and accounts of its own. That initiator is bound
last: a target without one lets nobody in, and is what a crash has left of an
export. An end begins with the target taken offline: then it takes neither
logins nor commands, whatever a host has made of what is listed of it.

What a host has flushed, or has written through (FUA), the daemon has given
to fdatasync. Two attachments of one volume are two units to the daemon, with
reservations and atomic commands apart: so ``multi_attach`` is not promised.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume import identity
from volume import ids
from volume import model
from volume.exports import iscsi
from volume.exports import tgt_listing
from volume.exports import tgt_wire
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.exports.tgt_daemon import Daemon
from volume.exports.tgt_daemon import is_guessable
from volume.exports.tgt_listing import Target
from volume.exports.tgt_wire import Refused
from volume.node import Node

LOG = logging.getLogger(__name__)

VENDOR = 'VOLUME'
PRODUCT = 'VIRTUAL-DISK'
POLITE_S = 2.0  # for connections to end by themselves
END_S = 30.0  # for what is in flight to come back from the storage

OPTIONS: tuple[cfg.Opt, ...] = (
    cfg.StrOpt(
        'tgt_socket', default='',
        help='Socket of a tgtd that runs already.\n\n'
        'Such as /var/run/tgtd/socket.0; its targets of other names are left '
        'alone. Without it the service starts a tgtd of its own, which '
        'outlives it.',
    ),
    cfg.IntOpt(
        'tgt_io_threads', default=1, min=1, max=16,
        help='Threads that read and write, for each volume.\n\n'
        'For the tgtd that the service starts, and only when it starts it. '
        'More of them let one host have more requests in the storage at a '
        'time; each is a thread of the daemon for each attached volume.',
    ),
)


class TgtExporter(Exporter):
    """iSCSI targets of tgtd; they outlive our service."""

    options: ClassVar[tuple[cfg.Opt, ...]] = (*iscsi.OPTIONS, *OPTIONS)
    accepts_blocknode: ClassVar[bool] = False
    forms: ClassVar[frozenset[model.Form]] = frozenset({
        model.Form.BLOCK, model.Form.FILE,
    })
    outlives_service: ClassVar[bool] = True
    abilities: ClassVar[model.Abilities] = model.Abilities(
        auth=('chap', 'mutual-chap', 'initiator'), multi_attach=False,
        multi_portal=True, remote_node=True,
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        # A host's account is called after its attachment: so it is found
        # again, whatever a crash has left.
        self.wants = tuple(
            name for name in iscsi.WANTS[conf.chap]
            if not name.endswith('username')
        )
        self.is_shared = bool(conf.tgt_socket)
        self._daemon = Daemon(node, conf.tgt_socket, conf.tgt_io_threads)
        self._tgtd = self._daemon.tgtd
        self._was_warned = False

    def check(self) -> None:
        self._daemon.bring_up(iscsi.check(self.conf))
        if self.wants and not self._was_warned and is_guessable(self.node):
            LOG.warning(
                'the installed tgtd has CHAP challenges that can be guessed '
                '(CVE-2024-45751): update it'
            )
        self._was_warned = True

    def export(self, wanted: Export) -> model.Connection:
        return self._export(wanted, None)

    def export_many(
        self, wanted: Sequence[Export]
    ) -> dict[str, model.Connection | errors.VolumeError]:
        # One listing for all of them, and none if nothing is there.
        there = self._targets()
        found: dict[str, model.Connection | errors.VolumeError] = {}
        for each in wanted:
            try:
                found[each.attachment_id] = self._export(each, there)
            except errors.VolumeError as failed:
                found[each.attachment_id] = failed
        return found

    def unexport(self, attachment_id: str) -> None:
        attachment = ids.check(attachment_id, 'attachment')
        self._remove(
            attachment, self._known(attachment).get(attachment, [])
        )

    def abandon(self) -> None:
        self._daemon.stop()

    def exported(self) -> set[str]:
        return {
            attachment for attachment, targets in self._known().items()
            if any(target.bound and target.is_ready for target in targets)
        }

    # Ours alone: questions.

    def _known(self, containing: str = '') -> dict[str, list[Target]]:
        """As ``_targets``; none if our own daemon is gone with them."""
        try:
            return self._targets(containing)
        except errors.Unavailable:
            if self._daemon.is_gone():
                return {}
            raise

    def _targets(self, containing: str = '') -> dict[str, list[Target]]:
        """Return our targets by attachment, those that are it truly.

        Only those whose part of the listing contains a text.
        """
        found: dict[str, list[Target]] = {}
        listing = self._tgtd.listing()
        for target in tgt_listing.parse(listing, containing):
            parts = iscsi.parts(self.conf.iscsi_target_prefix, target.name)
            if parts and target.tid in tgt_listing.numbers(parts[1]):
                found.setdefault(parts[1], []).append(target)
        return found

    def _path(self, wanted: Export) -> str:
        """Return what the daemon opens.

        :raises Unsupported: it would not be the volume's bytes
        :raises Corrupt: it is smaller than the volume
        """
        source = wanted.source
        if not isinstance(source, model.Device) or source.format != 'raw':
            raise errors.Unsupported(
                f'volume {wanted.volume_id} is not a raw device or file of '
                'the node, and tgtd reads no other; use the nbd exporter'
            )
        size_bytes = self.node.size(source.path)
        if size_bytes < wanted.size_bytes:
            raise errors.Corrupt(
                f'{source.path} has {size_bytes} bytes, volume '
                f'{wanted.volume_id} has {wanted.size_bytes}'
            )
        return source.path

    def _secrets(self, wanted: Export) -> dict[str, str]:
        """Return the names and passwords of both sides."""
        name = ids.check(wanted.attachment_id, 'attachment')
        found = iscsi.credentials(wanted, self.wants)
        if 'password' in found:
            found = {'username': name, **found}
        if 'mutual_password' in found:
            found['mutual_username'] = _mutual(name)
        return found

    # Ours alone: deeds.

    def _export(
        self, wanted: Export, there: Mapping[str, list[Target]] | None
    ) -> model.Connection:
        """Export; ``there`` is what is known of targets, if anything is."""
        portals = iscsi.check(self.conf)
        name = iscsi.target(
            self.conf.iscsi_target_prefix, wanted.volume_id,
            wanted.attachment_id,
        )
        # As the host writes it, too: the daemon compares letter by letter.
        hosts = list(dict.fromkeys(
            [iscsi.initiator(wanted.host), wanted.host.iqn or '']
        ))
        secrets, path = self._secrets(wanted), self._path(wanted)
        targets = (there or {}).get(wanted.attachment_id, [])
        if not targets:
            targets = self._new_target(wanted.attachment_id, name)
        if any(target.name != name for target in targets):
            raise errors.Conflict(
                f'attachment {wanted.attachment_id} is exported as '
                f'{targets[0].name}, not of volume {wanted.volume_id}: end '
                'it first'
            )
        self._set_up(targets, wanted, path, hosts, secrets)
        return iscsi.connection(
            name, portals, tgt_wire.LUN, wanted, secrets
        )

    def _new_target(self, attachment_id: str, name: str) -> list[Target]:
        """Make a target, or return what there is of the attachment.

        :raises Unavailable: its numbers are others'
        """
        for tid in tgt_listing.numbers(attachment_id):
            try:
                self._tgtd.new_target(tid, name)
            except Refused as refused:
                if refused.code != tgt_wire.TARGET_EXISTS:
                    raise
            else:
                return [Target(tid, name)]
            if targets := self._targets(attachment_id).get(attachment_id):
                return targets
        raise errors.Unavailable(
            f'tgtd has no free number for target {name}'
        )

    def _set_up(
        self, targets: list[Target], wanted: Export, path: str,
        hosts: list[str], secrets: Mapping[str, str],
    ) -> None:
        """Make the rest of a target, whatever there is of it."""
        tid = targets[0].tid
        bound = {each for target in targets for each in target.bound}
        if any(target.has_lun for target in targets):
            _check_same(targets, wanted, path, bound, set(hosts))
        else:
            self._open(tid, path)
        if not bound:
            self._identify(tid, wanted)
        elif not secrets and not any(t.accounts for t in targets):
            self._make_ready(targets)
            return
        # While accounts are being changed, nobody may enter without one.
        for each in bound:
            self._unbind(tid, each)
        if any(target.accounts for target in targets):
            self._delete_accounts(wanted.attachment_id)
        self._set_accounts(tid, secrets)
        self._make_ready(targets)
        for host in hosts:
            self._tgtd.bind_initiator(tid, host)

    def _make_ready(self, targets: list[Target]) -> None:
        """Take back what an end that broke off has begun with."""
        for tid in {each.tid for each in targets if not each.is_ready}:
            self._tgtd.set_ready(tid, True)

    def _open(self, tid: int, path: str) -> None:
        try:
            self._tgtd.new_lun(tid, path)
        except Refused as refused:
            with _ignored(tgt_wire.NO_TARGET):
                self._tgtd.delete_target(tid)
            raise errors.Unavailable(
                f'tgtd cannot open {path}: see its log'
            ) from refused

    def _identify(self, tid: int, wanted: Export) -> None:
        """Give the LUN the volume's identity, and its access."""
        is_read_only = wanted.access is model.Access.READ
        self._tgtd.set_lun(
            tid,
            scsi_id=identity.scsi_naa(wanted.volume_id),
            scsi_sn=identity.scsi_serial(wanted.volume_id),
            vendor_id=VENDOR, product_id=PRODUCT,
            readonly='1' if is_read_only else '0',
        )

    def _set_accounts(self, tid: int, secrets: Mapping[str, str]) -> None:
        for prefix, direction in (
            ('', tgt_wire.INCOMING), ('mutual_', tgt_wire.OUTGOING),
        ):
            if user := secrets.get(f'{prefix}username'):
                self._new_account(user, secrets[f'{prefix}password'])
                self._tgtd.bind_account(tid, user, direction)

    def _new_account(self, user: str, password: str) -> None:
        try:
            self._tgtd.new_account(user, password)
        except Refused as refused:
            if refused.code != tgt_wire.ACCOUNT_EXISTS:
                raise
            # What a crash has left; its password may be another.
            self._tgtd.delete_account(user)
            self._tgtd.new_account(user, password)

    def _delete_accounts(self, attachment_id: str) -> None:
        for user in attachment_id, _mutual(attachment_id):
            with _ignored(tgt_wire.NO_ACCOUNT):
                self._tgtd.delete_account(user)

    def _unbind(self, tid: int, bound: str) -> None:
        unbind = (
            self._tgtd.unbind_initiator
            if bound.lower().startswith(('iqn.', 'eui.', 'naa.'))
            else self._tgtd.unbind_address
        )
        with _ignored(tgt_wire.NO_ACL, tgt_wire.NO_TARGET):
            unbind(tid, bound)

    def _remove(self, attachment_id: str, targets: list[Target]) -> None:
        """Forbid, end what is open, and remove it; prove that it is gone.

        The LUN goes first, for it is what can be read; then the accounts,
        which are found no more without their target.
        """
        numbers = {target.tid for target in targets}
        for tid in numbers:
            with _ignored(tgt_wire.NO_TARGET):
                self._tgtd.set_ready(tid, False)
        for target in targets:
            for bound in target.bound:
                self._unbind(target.tid, bound)
        for tid in numbers:
            self._end_connections(tid)
            self._close(tid)
            self._delete_accounts(attachment_id)
            self._delete_target(tid)

    def _end_connections(self, tid: int) -> None:
        """End what is open, and give it a moment to go."""
        deadline, pause_s = time.monotonic() + POLITE_S, 0.002
        ended: set[tuple[int, int]] = set()
        with _ignored(tgt_wire.NO_TARGET):
            while there := set(self._tgtd.connections(tid)):
                for session, connection in there - ended:
                    with _ignored(tgt_wire.NO_SESSION, tgt_wire.NO_CONNECTION):
                        self._tgtd.end_connection(tid, session, connection)
                if time.monotonic() > deadline:
                    return
                ended |= there
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 0.1)

    def _close(self, tid: int) -> None:
        """Close the LUN once nothing is in flight.

        :raises Unavailable: the storage does not answer a request
        """
        deadline, pause_s = time.monotonic() + END_S, 0.002
        with _ignored(tgt_wire.NO_LUN, tgt_wire.NO_TARGET):
            while True:
                try:
                    return self._tgtd.delete_lun(tid)
                except Refused as refused:
                    if refused.code != tgt_wire.LUN_ACTIVE:
                        raise
                    if time.monotonic() > deadline:
                        raise errors.Unavailable(
                            'a request of a host that is shut out is still '
                            f'there after {END_S:g} s: look at the storage, '
                            'or end the host, then repeat'
                        ) from refused
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 0.5)

    def _delete_target(self, tid: int) -> None:
        """Remove the target; prove that it has no session any more.

        :raises Unknown: it is still there
        """
        try:
            self._tgtd.delete_target(tid)
        except Refused as refused:
            if refused.code == tgt_wire.TARGET_ACTIVE:
                # A login that had begun before its host was shut out; it
                # finds no LUN, so nothing of it can be in flight.
                self._tgtd.delete_target(tid, by_force=True)
            elif refused.code != tgt_wire.NO_TARGET:
                raise
        with _ignored(tgt_wire.NO_TARGET):
            left = self._tgtd.connections(tid)
            raise errors.Unknown(
                f'target {tid} of tgtd is still there after its end, with '
                f'{len(left)} connections'
            )


def _mutual(attachment_id: str) -> str:
    """Return the name of the account by which a target proves itself."""
    return f'target-{attachment_id}'


def _check_same(
    targets: list[Target], wanted: Export, path: str, bound: set[str],
    hosts: set[str],
) -> None:
    """Refuse another volume, access or host for what is there already.

    :raises Conflict: as said
    """
    there = next(target for target in targets if target.has_lun)
    is_read_only = wanted.access is model.Access.READ
    wrong = []
    if there.path != path:
        wrong.append(f'of {there.path}, not of {path}')
    if bound and there.is_read_only != is_read_only:
        wrong.append(f'not for {wanted.access.value}')
    if bound and bound != hosts:
        wrong.append(f'for {", ".join(sorted(bound))}')
    if wrong:
        raise errors.Conflict(
            f'attachment {wanted.attachment_id} is exported '
            f'{" and ".join(wrong)}: end it first'
        )


@contextlib.contextmanager
def _ignored(*codes: int) -> Iterator[None]:
    """Take some refusals for what was wanted: it is so already."""
    try:
        yield
    except Refused as refused:
        if refused.code not in codes:
            raise
