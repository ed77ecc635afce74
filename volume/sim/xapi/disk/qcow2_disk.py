# SPDX-License-Identifier: Apache-2.0
"""qcow2 files: qemu's own tools make, open and merge them.

An open disk is a qemu-nbd on a unix socket and one connection to it: when
that is gone, also because this process was killed, qemu-nbd ends by itself.
Each format is named, of parents as well; nothing is probed.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from volume import concurrency
from volume import errors
from volume import nbd
from volume.model import Extent
from volume.sim.xapi.disk import disks

MAGIC = b'QFI\xfb'
HEADER = struct.Struct('>4sIQIIQ')  # up to the size
COMPATIBLE_AT = 80
# A bit that others pass over and keep: the file is hidden.
HIDDEN = 1 << 63
NAME_BYTES_MAX = 1023
TOOL_TIMEOUT_S = 600.0
START_TIMEOUT_S = 20.0
POLL_S = 0.01
STOP_POLL_S = 0.1


class Qcow2Disk(disks.Disk):
    """A qcow2 file, and all that it stands upon, through qemu-nbd."""

    def __init__(
        self,
        path: str,
        writable: bool,
        claim: Callable[[int], None] = disks.endless,
    ) -> None:
        self.path = path
        self.is_writable = writable
        self._claim = claim
        self._lock = threading.Lock()
        # The socket needs no name once there is the one connection to it.
        with (
            tempfile.TemporaryDirectory(prefix='qcow2-') as directory,
            tempfile.TemporaryFile() as said,
        ):
            self._process, self._client = _serve(
                path, writable, os.path.join(directory, 'nbd'), said)
        self.size_bytes = self._client.size_bytes

    def pread_into(self, buffer: Any, offset: int) -> None:
        self._client.pread_into(buffer, offset)

    def pwrite(self, offset: int, data: Any) -> None:
        self.check('write', offset, len(data))
        self._claim(len(data))
        self._client.pwrite(data, offset)

    def zero(self, offset: int, length: int) -> None:
        self.check('zero', offset, length)
        self._client.zero(offset, length)

    def flush(self) -> None:
        if self.is_writable:
            self._client.flush()

    def extents(self) -> Iterator[Extent]:
        return iter([*self._client.extents()])

    def allocated(self) -> Iterator[Extent]:
        if self.is_writable:
            self.flush()
        found = json.loads(run(
            'qemu-img', 'map', '-U', '-f', 'qcow2', '--output=json',
            os.path.abspath(self.path),
        ))
        return disks.runs(
            (each['start'], each['start'] + each['length'],
             bool(each['depth'] or not each['present']))
            for each in found
        )

    def close(self) -> None:
        with self._lock:
            self._client.close()
            # It ends with its only connection, when all is written.
            self._process.wait(TOOL_TIMEOUT_S)


class Qcow2(disks.Format):
    """qcow2 files."""

    name = 'qcow2'
    suffix = '.qcow2'
    # qemu locks what it has open, parents, too.
    merges_live = False
    granularity_bytes = 65536
    size_bytes_max = 16 << 40

    def create(
        self, path: str, size_bytes: int, parent: str | None = None
    ) -> None:
        draft = f'{path}.draft'
        options = []
        if parent:
            name = os.path.basename(parent)
            options = ['-b', f'./{name}', '-F', 'qcow2']
        run('qemu-img', 'create', '-q', '-f', 'qcow2', *options,
            os.path.abspath(draft), str(size_bytes))
        self.kernel.rename(draft, path)

    def look(self, path: str) -> disks.Facts:
        with open(path, 'rb') as file:
            head = file.read(COMPATIBLE_AT + 8)
            name = os.path.basename(path)
            if len(head) < COMPATIBLE_AT + 8:
                raise errors.Invalid(f'{name} is refused: it is no qcow2')
            magic, version, at, length, _, size = HEADER.unpack_from(head)
            if magic != MAGIC or version < 3 or length > NAME_BYTES_MAX:
                raise errors.Invalid(
                    f'{name} is refused: it is no qcow2 of version 3')
            file.seek(at)
            parent = file.read(length).decode(errors='replace')
            used = file.seek(0, os.SEEK_END)
        flags = int.from_bytes(head[COMPATIBLE_AT:], 'big')
        return disks.Facts(
            size, used, os.path.basename(parent), bool(flags & HIDDEN))

    def open(
        self,
        path: str,
        writable: bool = False,
        parents: Sequence[str] = (),
        claim: Callable[[int], None] = disks.endless,
    ) -> disks.Disk:
        # The parents are named in the files; qemu follows them.
        if not os.path.exists(path):
            raise FileNotFoundError(path)
        return Qcow2Disk(path, writable, claim)

    def merge(
        self,
        path: str,
        parent: str,
        stop: Callable[[], bool] = disks.never,
    ) -> None:
        # -d keeps what is merged: it lies over its parent until the end.
        run('qemu-img', 'commit', '-q', '-d', '-f', 'qcow2',
            os.path.abspath(path), stop=stop)

    def extra_bytes(self, path: str, parent: str) -> int:
        return os.path.getsize(path)

    def relink(self, path: str, parent: str) -> None:
        run('qemu-img', 'rebase', '-q', '-u', '-f', 'qcow2', '-F', 'qcow2',
            '-b', f'./{os.path.basename(parent)}', os.path.abspath(path))

    def hide(self, path: str, is_hidden: bool) -> None:
        with open(path, 'r+b', buffering=0) as file:
            data = os.pread(file.fileno(), 8, COMPATIBLE_AT)
            flags = int.from_bytes(data, 'big') & ~HIDDEN
            if is_hidden:
                flags |= HIDDEN
            self.kernel.write(
                file.fileno(), [flags.to_bytes(8, 'big')], COMPATIBLE_AT)

    def grow(self, path: str, size_bytes: int) -> None:
        if self.look(path).size_bytes < size_bytes:
            run('qemu-img', 'resize', '-q', '-f', 'qcow2',
                os.path.abspath(path), str(size_bytes))


def run(*argv: str, stop: Callable[[], bool] = disks.never) -> bytes:
    """Run a tool of qemu's to its end.

    :raises Stopped: ``stop`` said so, and the tool was ended
    :raises Unavailable: it failed
    """
    with concurrency.popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        deadline = time.monotonic() + TOOL_TIMEOUT_S
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, text = process.communicate(timeout=STOP_POLL_S)
                break
            is_late = time.monotonic() > deadline
            if is_late or stop():
                process.kill()
                process.communicate()
                if not is_late:
                    raise disks.Stopped
                raise errors.Unavailable(
                    f'{argv[0]} {argv[1]} did not end within '
                    f'{TOOL_TIMEOUT_S:g} s'
                )
    if process.returncode:
        kind = errors.NoSpace if b'No space left' in text else (
            errors.Unavailable)
        raise kind(
            f'{argv[0]} {argv[1]} failed: '
            f'{text.decode(errors="replace").strip():.1000}'
        )
    return output


def _serve(
    path: str, writable: bool, socket: str, said: BinaryIO
) -> tuple[subprocess.Popen[bytes], nbd.NbdClient]:
    """Start a qemu-nbd and return it with a connection to it."""
    argv = ['qemu-nbd', '--socket', socket, '--format', 'qcow2',
            '--discard', 'unmap']
    if not writable:
        argv.append('--read-only')
    process = concurrency.popen(
        [*argv, os.path.abspath(path)], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=said,
    )
    try:
        uri = f'nbd+unix:///?socket={urllib.parse.quote(socket)}'
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            is_running = process.poll() is None
            with contextlib.suppress(errors.Unavailable):
                return process, nbd.NbdClient(uri, TOOL_TIMEOUT_S)
            if not is_running or time.monotonic() > deadline:
                said.seek(0)
                text = said.read(1000).decode(errors='replace')
                raise errors.Unavailable(
                    f'qemu-nbd does not serve {path}: {text.strip()}')
            time.sleep(POLL_S)
    except BaseException:
        process.kill()
        process.wait()
        raise
