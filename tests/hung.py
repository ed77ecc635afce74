# SPDX-License-Identifier: Apache-2.0
"""A file system whose server stops answering, as a dead NFS server does.

FUSE, spoken by a process of its own: whoever waits for what that has read
and does not answer is in an uninterruptible sleep, and cannot be killed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import subprocess
import sys
import tempfile
import unittest

LOOKUP, FORGET, GETATTR, OPEN, INIT, INTERRUPT, FORGETS = (
    1, 2, 3, 14, 26, 36, 42)
REQUEST, REPLY = '=IIQQ', '=IiQ'
FORCE, DETACH = 1, 2  # of umount2
FILE = 2  # the number of the one file


class Hung:
    """One file, ``path``, by whatever name; until it is stuck or stale."""

    def __init__(
        self, test: unittest.TestCase, directory: str | None = None
    ) -> None:
        self._directory = directory or tempfile.mkdtemp(
            prefix='vt', dir='/tmp')
        if directory is None:
            test.addCleanup(os.rmdir, self._directory)
        self.path = os.path.join(self._directory, 'file')
        self._server = subprocess.Popen(
            [sys.executable, __file__, self._directory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        test.addCleanup(self.end)
        said = self._hear()
        if said != 'ready':
            raise unittest.SkipTest(f'no FUSE: {said}')
        # Before the first word is exchanged, who waits can be killed.
        os.stat(self.path)

    def stick(self) -> None:
        """Answer nothing from now on."""
        self._say(b'?')

    def expire(self) -> None:
        """Know no file from now on, as a server that was told to forget."""
        self._say(b'!')

    def end(self) -> None:
        """Let all who wait go on, and take it away."""
        libc = ctypes.CDLL(None)
        for flags in FORCE, DETACH:
            libc.umount2(self._directory.encode(), flags)
        self._server.communicate(timeout=20)

    def _say(self, word: bytes) -> None:
        assert self._server.stdin
        self._server.stdin.write(word)
        self._server.stdin.flush()
        self._hear()

    def _hear(self) -> str:
        assert self._server.stdout
        return self._server.stdout.readline().decode().strip()


def serve(directory: str) -> None:
    fd = os.open('/dev/fuse', os.O_RDWR | os.O_CLOEXEC)
    options = f'fd={fd},rootmode=40000,user_id=0,group_id=0'
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b'hung', directory.encode(), b'fuse', 0, options.encode()):
        raise OSError(ctypes.get_errno(), 'mount')
    print('ready', flush=True)
    mood = b''
    while True:
        ready, _, _ = select.select([fd, 0], [], [])
        if 0 in ready:
            mood = os.read(0, 1)
            if not mood:
                return
            print('so be it', flush=True)
            continue
        request = os.read(fd, 1 << 17)
        _, verb, unique, number = struct.unpack_from(REQUEST, request)
        if mood == b'?' or verb in (FORGET, FORGETS, INTERRUPT):
            continue
        answer, code = answer_to(verb, number), errno.ENOSYS
        if mood == b'!':
            answer, code = b'', errno.ESTALE
        os.write(fd, struct.pack(
            REPLY, 16 + len(answer), 0 if answer else -code, unique,
        ) + answer)


def answer_to(verb: int, number: int) -> bytes:
    # Nothing is kept by the kernel: each look is a question.
    if verb == INIT:
        return struct.pack('=4I4H10I', 7, 31, *[0] * 16)
    if verb == LOOKUP:
        return struct.pack('=4Q2I', FILE, *[0] * 5) + about(FILE)
    if verb == GETATTR:
        return bytes(16) + about(number)
    if verb == OPEN:
        return bytes(16)
    return b''


def about(number: int) -> bytes:
    mode = stat.S_IFREG | 0o600 if number == FILE else stat.S_IFDIR | 0o700
    return struct.pack('=6Q10I', number, *[0] * 8, mode, 1, *[0] * 5)


if __name__ == '__main__':
    try:
        serve(sys.argv[1])
    except OSError as over:
        print(over, flush=True)
