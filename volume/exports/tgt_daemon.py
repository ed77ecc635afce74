# SPDX-License-Identifier: Apache-2.0
"""The tgtd that serves our targets: our own one, or one that runs already.

Our own outlives the service, as the block daemon does: it has a session of
its own, and a started service finds it by its socket. There is one for all
backends of a node; it starts without targets, and it takes a lock of its own
on the socket's name, so that there is never a second one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
import time
import weakref

from volume import errors
from volume.exports.portals import Portal
from volume.exports.tgt_wire import Refused
from volume.exports.tgt_wire import Tgtd
from volume.machine import processes
from volume.node import Node
from volume.node import Process

PROGRAM = 'tgtd'
PLACES = ('/usr/sbin/tgtd', '/usr/local/sbin/tgtd', '/usr/bin/tgtd')
SOCKET_PATH_BYTES_MAX = 107  # sun_path, and its zero byte
START_S = 15.0
LOG_BYTES_MAX = 1 << 20
# A host that takes nothing from the wire is let go of, with what it has in
# flight, after four such pauses. Until then its export cannot end.
NOP_S, NOP_COUNT = 5, 3
LOCKS = '/proc/locks'
PORTAL_FAILED = re.compile(r'iscsi_tcp_init_portal\(\d+\) (.*)')
LOCKED = 'another tgtd is using'
UNKNOWN = Process(0, '')  # one may run, and it is not known which

# Of the backends that share a daemon, one looks after it at a time: what one
# of them has started and finds useless, no other takes for its own.
_turns: weakref.WeakKeyDictionary[Node, threading.Lock]
_turns = weakref.WeakKeyDictionary()
_guard = threading.Lock()


class Daemon:
    """Where the daemon is, and whether it runs."""

    def __init__(
        self, node: Node, socket_path: str, threads: int
    ) -> None:
        """Keep where it is; without a socket it is our own one."""
        self._node = node
        self._directory = os.path.join(node.state_dir, 'tgtd')
        self._is_ours = not socket_path
        self._socket = socket_path or f'{self._base}.0'
        self._threads = threads
        self.tgtd = Tgtd(node, self._socket)

    def bring_up(self, portals: tuple[Portal, ...]) -> None:
        """Find it or start it, listening on these portals.

        :raises Invalid: one that is not ours listens elsewhere
        :raises Unavailable: it does not run, or does not start
        """
        wanted = {str(portal) for portal in portals}
        if not self._is_ours:
            self._check_portals(self.tgtd.portals(), wanted)
            return
        self._check_path()
        with _guard:
            turn = _turns.setdefault(self._node, threading.Lock())
        with turn:
            try:
                there = self.tgtd.portals()
            except errors.Unavailable:
                there = self._start(portals)
            else:
                self._write_down()
            self._listen(wanted - there)
        if wanted - there:
            self._check_portals(self.tgtd.portals(), wanted)

    def is_gone(self) -> bool:
        """Say whether it is our own, and provably does not run.

        With it all sessions are gone that it had.
        """
        if not self._is_ours:
            return False
        record = self._record()
        if record is None:
            return not self._node.exists(self._directory)
        return record != UNKNOWN and not self._node.is_running(record)

    def stop(self) -> None:
        """End our own one with everything that it exports.

        :raises Unavailable: it does not end
        :raises Unknown: it runs, and nobody can see which process it is
        """
        record = self._record()
        if not self._is_ours or record is None:
            return
        if record == UNKNOWN:
            with contextlib.suppress(errors.Unavailable):
                self.tgtd.portals()
                raise errors.Unknown(
                    f'the {PROGRAM} of {self._socket} runs, and it cannot be '
                    'seen which process that is: end it'
                )
            return
        # It ignores the polite signal while it has targets.
        self._node.end(record, timeout_s=0.0)

    # Ours alone.

    @property
    def _base(self) -> str:
        return os.path.join(self._directory, 'socket')

    def _start(self, portals: tuple[Portal, ...]) -> set[str]:
        """Start one, or wait for the one that somebody else has started.

        Return where it listens.
        """
        self._node.make_directory(self._directory)
        process = self._record()
        if (
            process is None or process == UNKNOWN
            or not self._node.is_running(process)
        ):
            self._check_room()
            # From here to the end one may run that nobody has written down.
            self._keep(UNKNOWN)
            process = self._node.start(self._argv(portals), self._log)
        there = self._await(process)
        if not self._has_lock(process):
            return there  # another process of the service was quicker
        self._keep(process)
        wanted = {str(portal) for portal in portals}
        if there != wanted:
            # One that could not listen where it was told to listens on all
            # addresses of the machine instead.
            self._node.end(process, timeout_s=0.0)
            raise self._deaf(', '.join(sorted(wanted - there)) or 'no more')
        return there

    def _listen(self, portals: set[str]) -> None:
        """Have one that runs listen there as well."""
        for portal in sorted(portals):
            try:
                self.tgtd.new_portal(portal)
            except Refused as refused:
                raise self._deaf(portal) from refused

    def _deaf(self, where: str) -> errors.Unavailable:
        said = PORTAL_FAILED.findall(self._log_text())
        return errors.Unavailable(
            f'{PROGRAM} cannot listen on {where}: '
            f'{said[-1] if said else self._said()}'
        )

    def _argv(self, portals: tuple[Portal, ...]) -> list[str]:
        return [
            'env', f'TGT_IPC_SOCKET={self._base}', PROGRAM, '--foreground',
            '--nr_iothreads', str(self._threads),
            '--iscsi', ','.join([
                *(f'portal={portal}' for portal in portals),
                f'nop_interval={NOP_S}', f'nop_count={NOP_COUNT}',
            ]),
        ]

    def _await(self, process: Process) -> set[str]:
        """Wait until it answers; return where it listens.

        The one that answers may be another that was quicker, of another
        process of the service: then this one ends by itself.
        """
        deadline, pause_s = time.monotonic() + START_S, 0.005
        while True:
            try:
                return self.tgtd.portals()
            except errors.Unavailable as failed:
                said = self._said()
                if (
                    not self._node.is_running(process)
                    and LOCKED not in said
                ):
                    raise errors.Unavailable(
                        f'{PROGRAM} does not start: {said}'
                    ) from failed
                if time.monotonic() > deadline:
                    raise errors.Unavailable(
                        f'{PROGRAM} does not answer for {START_S:g} s: end '
                        f'it if it hangs; it said: {said}'
                    ) from failed
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)

    def _has_lock(self, process: Process) -> bool:
        """Say whether it is this one that answers: it has the lock.

        One that was too late may not have ended yet.
        """
        return process.pid in self._with_locks()

    def _with_locks(self) -> set[int]:
        """Return which processes have locks as the daemon has one."""
        locks = self._node.read(LOCKS, LOG_BYTES_MAX * 2).decode()
        return {
            int(fields[4]) for fields in map(str.split, locks.splitlines())
            if fields[1:4] == ['POSIX', 'ADVISORY', 'WRITE']
        }

    def _holder(self) -> Process | None:
        """Return our own one, found among all processes, if it runs."""
        ours = f'TGT_IPC_SOCKET={self._base}'.encode()
        for pid in sorted(self._with_locks()):
            # One that has ended meanwhile, or is another user's, is not it.
            with contextlib.suppress(errors.VolumeError):
                words = self._node.read(f'/proc/{pid}/environ')
                if ours in words.split(b'\0'):
                    return Process(pid, processes.start_of(
                        self._node.read(processes.BOOT_ID).decode(),
                        self._node.read(f'/proc/{pid}/stat').decode(
                            errors='replace'
                        ),
                    ))
        return None

    def _check_path(self) -> None:
        if len(os.fsencode(self._socket)) > SOCKET_PATH_BYTES_MAX:
            raise errors.Invalid(
                f'{self._socket} is over {SOCKET_PATH_BYTES_MAX} bytes, the '
                'most a unix socket may have; use a shorter state_path'
            )

    def _check_portals(self, there: set[str], wanted: set[str]) -> None:
        for portal in sorted(wanted - there):
            port = portal.rpartition(':')[2]
            if not there & {f'0.0.0.0:{port}', f'[::]:{port}'}:
                raise errors.Invalid(
                    f'the tgtd of {self._socket} does not listen on '
                    f'{portal}, but on {", ".join(sorted(there))}'
                )

    def _check_room(self) -> None:
        if (
            self._node.exists(self._log)
            and self._node.size(self._log) > LOG_BYTES_MAX
        ):
            self._node.rename(self._log, f'{self._log}.old')

    def _said(self) -> str:
        lines = self._log_text().splitlines()
        return lines[-1] if lines else f'it said nothing; see {self._log}'

    def _log_text(self) -> str:
        try:
            said = self._node.read(self._log, LOG_BYTES_MAX * 2)
        except errors.VolumeError:
            return ''
        return said.decode(errors='replace')

    @property
    def _log(self) -> str:
        return os.path.join(self._directory, 'log')

    @property
    def _note(self) -> str:
        return os.path.join(self._directory, 'daemon.json')

    def _record(self) -> Process | None:
        """Return the process that is ours, or that it is ``UNKNOWN``."""
        record = self._written()
        if record == UNKNOWN:
            # The service died, or was killed, before it could write it down.
            return self._holder() or UNKNOWN
        return record

    def _write_down(self) -> None:
        """Keep which process it is that answers, if nobody has yet."""
        if self._written() == UNKNOWN and (process := self._holder()):
            self._keep(process)

    def _written(self) -> Process | None:
        try:
            found = json.loads(self._node.read(self._note))
            return Process(int(found['pid']), str(found['started']))
        except (errors.NotFound, ValueError, KeyError, TypeError):
            return None

    def _keep(self, record: Process) -> None:
        text = json.dumps(dataclasses.asdict(record)).encode()
        # Of two that write at once one finds its draft gone. What is there
        # then says too little, never too much.
        with contextlib.suppress(errors.NotFound):
            self._node.write(self._note, text)


def is_guessable(node: Node) -> bool:
    """Say whether the installed tgtd has challenges that can be guessed.

    CVE-2024-45751: before 1.0.93 each start had the same ones. Distributions
    repaired it without another version, so the program itself is looked at.
    """
    for path in PLACES:
        if node.exists(path):
            try:
                node.run('grep', '--quiet', '--fixed-strings', '--text',
                         'getrandom', path)
            except errors.VolumeError:
                return True
            return False
    return False
