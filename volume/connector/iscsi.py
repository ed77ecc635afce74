# SPDX-License-Identifier: Apache-2.0
"""iSCSI on the host's side: log in, prove that it is the volume, let go.

There is one target per attachment, so its sessions are this attachment's
alone, and all disks that come by them. What this host has is always asked of
the kernel, never remembered: a run that was killed is gone on with, or
undone, by whoever comes next.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from volume import errors
from volume import identity
from volume import model
from volume.connector import base
from volume.connector import disks
from volume.connector import multipath
from volume.connector import naming
from volume.connector import open_iscsi
from volume.connector.alone import alone
from volume.connector.iscsi_paths import Asked
from volume.connector.iscsi_paths import Way
from volume.connector.open_iscsi import Session
from volume.node import Node

LOG = logging.getLogger(__name__)

DISK_S = 30.0
POLL_S = 0.1
# With another path to go on by, a dead one must not keep what it has.
FAIL_OVER = {'node.session.timeo.replacement_timeout': '5'}


class IscsiConnector(base.Connector):
    """Gives a SCSI disk, or the map over several paths to it."""

    protocol: ClassVar[str] = 'iscsi'
    leaves_traces: ClassVar[bool] = True
    knows_the_dead: ClassVar[bool] = True

    def __init__(self, node: Node, iface: str = 'default') -> None:
        self.node = node
        self.return_s = disks.RETURN_S
        self._iface = iface

    def host(self) -> model.Host:
        return model.Host(
            socket.gethostname(),
            iqn=open_iscsi.initiator(self.node, self._iface),
        )

    def attach(self, connection: model.Connection) -> str:
        asked = Asked(connection)
        with self._alone(asked.volume_id), contextlib.ExitStack() as undo:
            self._end_former(asked)
            had = self._sessions(asked.targets)
            undo.callback(self._back_out, asked, {
                session.number for session in had
            })
            found = self._log_in(asked, had)
            path = self._settle(asked, found)
            undo.pop_all()
        return path

    def detach(self, connection: model.Connection) -> None:
        asked = Asked(connection)
        with self._alone(asked.volume_id):
            disks.await_return(
                asked.volume_id, lambda: self._is_away(asked.targets),
                self.return_s,
            )
            self._let_go(asked.volume_id, asked.targets)

    def present(self, connection: model.Connection) -> str:
        sessions = self._sessions(Asked(connection).targets)
        # First those that live: a dead one's disk is there as well.
        names = self._names(sorted(sessions, key=lambda each: not each.is_up))
        over = multipath.over(self.node, names)
        if over:
            return over[0].path
        return f'/dev/{names[0]}' if names else ''

    def extend(self, connection: model.Connection) -> int:
        asked = Asked(connection)
        with self._alone(asked.volume_id):
            sessions = self._sessions(asked.targets)
            names = self._names(sessions)
            if not names:
                raise errors.NotFound(
                    f'volume {asked.volume_id} is not attached here'
                )
            found = multipath.over(self.node, names)
            if not found:  # of a dead one's disk nobody has any use
                up = [each for each in sessions if each.is_up]
                names = self._names(up) or names
            disks.rescan(self.node, names)
            for each in found:
                multipath.resize(self.node, each)
            device = found[0].device if found else names[0]
            return disks.size_bytes(self.node, device)

    def strays(self) -> Iterator[base.Stray]:
        """Yield targets of ours whose sessions are dead, or that have none."""
        sessions = open_iscsi.sessions(self.node)
        targets = {session.target for session in sessions}
        targets |= set(open_iscsi.recorded(self.node))
        for target in sorted(targets):
            if (found := naming.parts(target)) is None:
                continue
            mine = [each for each in sessions if each.target == target]
            if any(each.is_up for each in mine):
                continue
            what = f'{len(mine)} dead sessions' if mine else 'a record'
            yield base.Stray(
                self.protocol, found[0], found[1], f'{what} of {target}',
            )

    def reap(self, stray: base.Stray) -> None:
        """Let go of what a target has left here.

        :raises Busy: its disk is in use
        """
        mine = stray.volume_id, stray.attachment_id
        with self._alone(stray.volume_id):
            targets = {
                target for target in (
                    *open_iscsi.recorded(self.node),
                    *(s.target for s in open_iscsi.sessions(self.node)),
                ) if naming.parts(target) == mine
            }
            if any(each.is_up for each in self._sessions(targets)):
                raise errors.Busy(
                    f'attachment {stray.attachment_id} is served again'
                )
            self._let_go(stray.volume_id, targets, is_lost=True)

    # Attach.

    def _end_former(self, asked: Asked) -> None:
        """Let go of a map that ended attachments of the volume have left.

        By the new path it would come to life again, with all that was to be
        written when their access ended; and who uses it would go on.

        :raises Busy: somebody uses it
        """
        wwid = f'3{identity.scsi_naa(asked.volume_id)}'
        found = multipath.of(self.node, wwid)
        if found is None:
            return
        sessions = open_iscsi.sessions(self.node)
        alive = asked.targets.union(
            each.target for each in sessions if each.is_up
        )
        dead = [each for each in sessions if each.target not in alive]
        if set(found.paths).difference(self._names(dead)):
            return  # it goes on by those, or is this attachment's own
        if not found.paths:
            disks.need_unused(
                self.node, f'/dev/{found.device}', asked.volume_id
            )
            multipath.end(self.node, found)
            return
        self._let_go(asked.volume_id, {
            each.target for each in dead
            if not set(found.paths).isdisjoint(each.names)
        }, is_lost=True)

    def _log_in(self, asked: Asked, had: Sequence[Session]) -> list[Session]:
        """Log in by as many ways as make sense, and return the sessions."""
        by_portal = {(s.target, s.portal): s for s in had}
        missing = [
            way for way in asked.ways
            if (way.target, way.portal) not in by_portal
        ]
        is_many = len(asked.ways) > 1 and multipath.is_running(self.node)
        # A session that has died leads nowhere, and says nothing of others.
        is_reached = any(session.is_up for session in had)
        if missing and (is_many or not is_reached):
            failed = self._log_in_by(asked, missing, is_many)
        else:
            failed = []
        found = self._await_sessions(asked)
        if not found:
            raise _worst(failed) if failed else errors.Unavailable(
                f'no portal of volume {asked.volume_id} answers'
            )
        ups = {(s.target, s.portal) for s in found}
        for way in asked.ways if is_many else ():
            if (way.target, way.portal) not in ups:
                LOG.warning(
                    'volume %s is reached by %d of %d paths: not by %s',
                    asked.volume_id, len(ups), len(asked.ways), way.portal,
                )
        return found

    def _log_in_by(
        self, asked: Asked, ways: Sequence[Way], is_many: bool
    ) -> list[errors.VolumeError]:
        """Try all ways at once, or one after another until one leads there.
        """
        settings = {**asked.settings, **(FAIL_OVER if is_many else {})}

        def try_one(way: Way) -> errors.VolumeError | None:
            try:
                open_iscsi.log_in(self.node, way, self._iface)
            except errors.VolumeError as failed:
                return failed
            return None

        if not is_many:
            failures = []
            for way in ways:
                open_iscsi.record(self.node, way, self._iface, settings)
                failed = try_one(way)
                if failed is None:
                    return []
                failures.append(failed)
                open_iscsi.forget(self.node, way.target, way.portal)
            return failures
        for way in ways:
            open_iscsi.record(self.node, way, self._iface, settings)
        with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
            tried = pool.map(try_one, ways)
            return [failed for failed in tried if failed is not None]

    def _await_sessions(self, asked: Asked) -> list[Session]:
        """Return the sessions that are up, each with its disk if it comes."""
        luns = {(way.target, way.portal): way.lun for way in asked.ways}
        late = time.monotonic() + DISK_S
        while True:
            found = [
                each for each in self._sessions(asked.targets) if each.is_up
            ]
            if not found or all(
                luns.get((each.target, each.portal)) in dict(each.disks)
                for each in found
            ):
                return found
            if time.monotonic() > late:
                seen = [each for each in found if each.disks]
                if seen:
                    return seen
                raise errors.NotFound(
                    f'target {found[0].target} lets us in and shows no disk '
                    f'of volume {asked.volume_id}'
                )
            time.sleep(POLL_S)

    def _settle(self, asked: Asked, found: Sequence[Session]) -> str:
        """Return the path of the disk, proved to be the volume's."""
        names = self._names(found)
        for session in found:
            for lun, name in session.disks:
                if lun not in {way.lun for way in asked.ways}:
                    raise errors.Conflict(
                        f'target {session.target} shows a LUN {lun}, which '
                        f'is not of volume {asked.volume_id}'
                    )
                disks.check_scsi(self.node, name, asked.volume_id)
        over = multipath.over(self.node, names)
        if not over and len(asked.ways) > 1 and (
            multipath.is_running(self.node)
        ):
            wwid = f'3{identity.scsi_naa(asked.volume_id)}'
            over = [multipath.gather(self.node, wwid, names)]
        elif over and set(names) - set(over[0].paths):
            over = [multipath.gather(self.node, over[0].wwid, names)]
        device = over[0].device if over else names[0]
        disks.check_size(
            self.node, device, asked.volume_id, asked.size_bytes
        )
        if over:
            return multipath.path_of(self.node, over[0])
        return f'/dev/{names[0]}'

    def _back_out(self, asked: Asked, had: set[int]) -> None:
        """Undo an attach that failed, as far as it was made by it."""
        if had:
            return
        try:
            self._let_go(asked.volume_id, asked.targets)
        except errors.VolumeError as failed:
            LOG.warning(
                'volume %s is not let go of: %s', asked.volume_id, failed
            )

    # Detach.

    def _let_go(
        self, volume_id: str, targets: set[str], is_lost: bool = False
    ) -> None:
        """Remove disks, sessions and records of targets.

        ``is_lost``: what waits for them waits in vain, and may be told so.
        """
        sessions = self._sessions(targets)
        names = self._names(sessions)
        alive = self._names([each for each in sessions if each.is_up])
        try:
            self._free_all(volume_id, names, alive, is_lost)
        except errors.Busy:
            # multipathd may have made its map only now, of a disk that had
            # just come; once more then, with the map.
            if not multipath.over(self.node, names):
                raise
            self._free_all(volume_id, names, alive, is_lost)
        # A disk that went by itself meanwhile has left its name to others.
        disks.remove(self.node, [
            name for name in self._names(self._sessions(targets))
            if name in alive
        ])
        for session in sessions:
            open_iscsi.log_out(self.node, session)
        for target in sorted(targets):
            open_iscsi.forget(self.node, target)

    def _free_all(
        self, volume_id: str, names: Sequence[str], alive: Sequence[str],
        is_lost: bool,
    ) -> None:
        """End the maps over disks, and see that nobody uses any of them."""
        joined: set[str] = set()
        ended = {*names, *self._names([
            each for each in open_iscsi.sessions(self.node)
            if not each.is_up
        ])}
        for each in multipath.over(self.node, names):
            joined |= set(each.paths)
            if set(each.paths) - ended:
                # Another attachment of the volume goes on by the others.
                mine = [name for name in each.paths if name in names]
                multipath.part(self.node, mine)
            else:
                if is_lost:
                    # Who only looked (LVM, udev) would hang on it, and so
                    # keep it in use.
                    disks.need_unused(self.node, each.path, volume_id)
                    multipath.fail(self.node, each)
                self._free(each.path, volume_id, bool(alive))
                multipath.end(self.node, each)
        for name in names:
            # What was written to a map was flushed with it, by those of its
            # paths that work.
            is_written = name in alive and name not in joined
            self._free(f'/dev/{name}', volume_id, is_written)

    def _free(self, path: str, volume_id: str, is_written: bool) -> None:
        disks.need_free(self.node, path, volume_id)
        # What a dead session still has to write goes nowhere.
        if is_written:
            disks.flush(self.node, path, volume_id)

    def _is_away(self, targets: set[str]) -> bool:
        """Say whether there are sessions, and none of them is up."""
        found = self._sessions(targets)
        return bool(found) and not any(each.is_up for each in found)

    def _sessions(self, targets: set[str]) -> list[Session]:
        return [
            each for each in open_iscsi.sessions(self.node)
            if each.target in targets
        ]

    @staticmethod
    def _names(sessions: Sequence[Session]) -> list[str]:
        return [name for session in sessions for name in session.names]

    def _alone(
        self, volume_id: str
    ) -> contextlib.AbstractContextManager[None]:
        return alone(
            self.node.lock_dir, f'connect-{volume_id[:2]}',
            f'volume {volume_id}, or another, has been attached or detached',
        )


def _worst(failed: Sequence[errors.VolumeError]) -> errors.VolumeError:
    """Return the failure that says most: a refusal before silence."""
    for kind in errors.Denied, errors.NotFound:
        for each in failed:
            if isinstance(each, kind):
                return each
    return failed[0]
