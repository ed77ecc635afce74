# SPDX-License-Identifier: Apache-2.0
"""Which managers share this machine's locks, and the end of a silent one.

Managers with one lock directory, under one running kernel, form a lock
domain: what one of them has begun, another can prove to have ended. Each
says in the directory who it is; its process is known by its number and the
time of its start, so that no other process is ever taken for it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal

from volume import errors
from volume import ids

ID_FILE = '.domain'
MEMBERS = '.members'
BOOT_ID = '/proc/sys/kernel/random/boot_id'
END_S = 10.0


class LockDomain:
    """The lock directory of a manager, as one of perhaps several."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.id = ''

    def join(self, host: str, owner: str, state_dir: str) -> None:
        """Belong to the domain, as the process that this is.

        :raises Invalid: the directory cannot be used
        """
        path = os.path.join(self.directory, ID_FILE)
        members = os.path.join(self.directory, MEMBERS)
        pid = os.getpid()
        try:
            os.makedirs(members, 0o700, exist_ok=True)
            if not os.path.exists(path):
                _place(path, f'{ids.new()}\n')
            number = ids.check(_read(path).strip(), 'id of the lock domain')
            _replace(
                os.path.join(members, host),
                f'{owner}\n{pid}\n{_started(pid)}\n{state_dir}\n',
            )
            # The same process number is another process in another container.
            space = os.readlink('/proc/self/ns/pid')
            self.id = f'{number} {_read(BOOT_ID).strip()} {space}'
        except OSError as failed:
            raise errors.Invalid(
                f'lock_path {self.directory} cannot be used '
                f'({failed.strerror}): it must belong to the user of this '
                'service, and so must what is in it'
            ) from failed

    def end(self, host: str, owner: str) -> str:
        """End a member's process, and return its state directory.

        It may have ended long ago. Its helpers may still run: their locks
        tell who has to end them.

        :raises Unavailable: it cannot be proved to have ended
        """
        try:
            text = _read(os.path.join(self.directory, MEMBERS, host))
        except OSError as failed:
            raise errors.Unavailable(
                f'{host} left no word in {self.directory} '
                f'({failed.strerror}): whether it runs is not known here'
            ) from failed
        said, pid, started, state_dir = text.splitlines()
        if said != owner:
            raise errors.Unavailable(
                f'{host} was started again: its earlier work is its own'
            )
        _end(host, int(pid), started)
        return state_dir


def kernel(domain: str) -> str:
    """Return which boot of which machine a domain's id is of."""
    return ''.join(domain.split(' ')[1:2])


def _end(host: str, pid: int, started: str) -> None:
    """End a process, if it is still the one that was started then."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The number is ours for as long as the descriptor is open.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if _started(pid) != started:
                return
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            return
        except PermissionError as failed:
            raise errors.Unavailable(
                f'{host} (process {pid}) is silent, and may not be ended '
                'from here: it runs as another user'
            ) from failed
        # Not select: its numbers end at 1024.
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            if selector.select(END_S):
                return
        raise errors.Unavailable(
            f'{host} (process {pid}) is silent and does not end: it '
            'hangs in the kernel, perhaps in its storage'
        )
    finally:
        os.close(fd)


def _started(pid: int) -> str:
    """Return when a process was started, in ticks since the boot."""
    # Its name may have anything in it, up to the last bracket.
    return _read(f'/proc/{pid}/stat').rpartition(')')[2].split()[19]


def _read(path: str) -> str:
    with open(path, encoding='utf-8') as f:
        return f.read(4096)


def _replace(path: str, text: str) -> None:
    draft = f'{path}.{ids.new()}'
    with open(draft, 'x', encoding='utf-8') as f:
        f.write(text)
    os.replace(draft, path)


def _place(path: str, text: str) -> None:
    """Put a small file there, whole, unless another was faster."""
    draft = f'{path}.{ids.new()}'
    with open(draft, 'x', encoding='utf-8') as f:
        f.write(text)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
