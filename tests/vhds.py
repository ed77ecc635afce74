# SPDX-License-Identifier: Apache-2.0
"""VHDs for tests, and readers and a writer that share nothing with ours.

What is here knows the format by itself: numbers, not names, so that a
mistake in ``vhd_layout`` is not made twice.
"""

from __future__ import annotations

import bisect
import functools
import io
import json
import os
import random
import struct
import subprocess
import unittest
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from volume import model

SECTOR = 512
MIB = 1 << 20
ROOT = '00000000-0000-4000-8000-000000000000'
PYTHON = '/usr/bin/python3'
# libvhdi in a process of its own: it is a module of Debian's Python. It is
# told every file of a chain; the paths in them mean nothing here.
LIBVHDI = r'''
import hashlib, json, sys
import pyvhdi
def look(asked):
    chain = []
    for path in asked['chain']:
        disk = pyvhdi.file()
        disk.open(path)
        chain.append(disk)
    for child, parent in zip(chain, chain[1:]):
        child.set_parent(parent)
    disk, digest = chain[0], hashlib.sha256()
    size = disk.get_media_size()
    for at, length in asked['runs'] or [[0, size]]:
        while length:
            # Not across blocks: of two files with blocks of two sizes it
            # then mixes up the sectors.
            part = min(length, 4096 - at % 4096)
            data = disk.read_buffer_at_offset(part, at)
            digest.update(data)
            at += len(data)
            length -= len(data)
    return {
        'size': size, 'digest': digest.hexdigest(),
        'type': disk.get_disk_type(), 'id': disk.get_identifier(),
        'parent': disk.get_parent_identifier(),
        'path': disk.get_parent_filename(),
    }
for line in sys.stdin:
    try:
        answer = look(json.loads(line))
    except OSError as failed:
        answer = {'error': str(failed)}
    print(json.dumps(answer), flush=True)
'''


class Libvhdi:
    """A reader that others wrote."""

    def __init__(self, test: type[unittest.TestCase]) -> None:
        self._process = subprocess.Popen(
            [PYTHON, '-I', '-c', LIBVHDI], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        test.addClassCleanup(self._end)

    def ask(
        self, *chain: str, runs: Iterable[tuple[int, int]] = ()
    ) -> dict[str, Any]:
        """Open a VHD and its parents; hash the disk, or some runs of it."""
        assert self._process.stdin and self._process.stdout
        print(
            json.dumps({'chain': chain, 'runs': [*runs]}),
            file=self._process.stdin, flush=True,
        )
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        if 'error' in answer:
            raise AssertionError(f'libvhdi: {answer}')
        return answer

    def _end(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    @staticmethod
    @functools.cache
    def missing() -> str:
        """Say why it cannot be used, if so."""
        found = os.path.exists(PYTHON) and not subprocess.run(
            [PYTHON, '-I', '-c', 'import pyvhdi'], capture_output=True,
            check=False, timeout=60,
        ).returncode
        return '' if found else 'python3-libvhdi is not installed'


class Model(io.RawIOBase):
    """A disk that is known: runs of bytes, and zeros between them."""

    def __init__(self, size: int, runs: Mapping[int, bytes]) -> None:
        self.size_bytes = size
        self.runs = sorted(runs.items())
        self._ends = [at + len(data) for at, data in self.runs]
        self._at = 0
        self.read_bytes = 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, self.size_bytes)[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        # Short, as a read may be.
        length = min(len(view), 300_001, self.size_bytes - self._at)
        view[:length] = self.part(self._at, length)
        self._at += length
        self.read_bytes += length
        return length

    def part(self, at: int, length: int) -> bytes:
        """Return some bytes of it."""
        found = bytearray(length)
        for index in range(bisect.bisect_right(self._ends, at),
                           len(self.runs)):
            start, data = self.runs[index]
            if start >= at + length:
                break
            low, high = max(start, at), min(start + len(data), at + length)
            found[low - at:high - at] = data[low - start:high - start]
        return bytes(found)

    def extents(self) -> Iterator[model.Extent]:
        """Yield runs, as a driver's reader does."""
        at = 0
        for start, data in self.runs:
            if start > at:
                yield model.Extent(at, start - at, True)
            yield model.Extent(start, len(data), False)
            at = start + len(data)
        if at < self.size_bytes:
            yield model.Extent(at, self.size_bytes - at, True)

    def store(self, path: str) -> str:
        """Write it as a raw, sparse file."""
        with open(path, 'wb') as file:
            for at, data in self.runs:
                file.seek(at)
                file.write(data)
            file.truncate(self.size_bytes)
        return path

    @classmethod
    def of(cls, data: bytes) -> Model:
        return cls(len(data), {0: data} if data else {})

    @classmethod
    def random(
        cls, size: int, chance: random.Random, count: int = 12
    ) -> Model:
        """Return a disk with data at odd places, also at both ends."""
        runs: dict[int, bytes] = {}
        places = sorted(chance.randrange(size) for _ in range(count))
        if chance.random() < 0.5:
            places = [0, *places, max(0, size - 3 * SECTOR)]
        free = 0
        for place in places:
            at = max(place, free)
            length = min(chance.choice((1, 511, 512, 4096, 70_001, 700_000)),
                         size - at)
            if length > 0:
                runs[at] = chance.randbytes(length)
                free = at + length
        return cls(size, runs)


def total(data: bytes | bytearray, at: int) -> int:
    """Return the checksum of a structure."""
    return ~(sum(data) - sum(data[at:at + 4])) & 0xFFFFFFFF


def footer(
    kind: int, size: int, *, uid: str = ROOT, stamp: int = 0,
    header_at: int = 512, version: int = 0x10000,
) -> bytes:
    data = bytearray(512)
    struct.pack_into(
        '>8sIIQI4sI4sQQIII', data, 0, b'conectix', 2, version,
        (1 << 64) - 1 if kind == 2 else header_at, stamp, b'tst ', 1,
        b'Wi2k', size, size, 0, kind, 0,
    )
    data[68:84] = uuid.UUID(uid).bytes
    struct.pack_into('>I', data, 64, total(data, 64))
    return bytes(data)


def header(
    count: int, block: int, *, table_at: int = 1536, parent: str = '',
    stamp: int = 0, version: int = 0x10000,
) -> bytes:
    data = bytearray(1024)
    struct.pack_into(
        '>8sQQIII', data, 0, b'cxsparse', (1 << 64) - 1, table_at, version,
        count, block,
    )
    if parent:
        data[40:56] = uuid.UUID(parent).bytes
        struct.pack_into('>I', data, 56, stamp)
    struct.pack_into('>I', data, 36, total(data, 36))
    return bytes(data)


def craft(
    data: bytes, blocks: Sequence[int], *, block: int = 2 * MIB,
    kind: int = 3, uid: str = ROOT, stamp: int = 0, parent: str = '',
    parent_stamp: int = 0, unset: Iterable[int] = (), gap: int = 0,
    count: int = 0, is_short: bool = False,
) -> bytes:
    """Return a VHD of a disk with these blocks, in this order in the file.

    Sectors that are ``unset`` hold rubbish, and so do ``gap`` sectors before
    each block. ``is_short`` ends the last block where the disk ends.
    """
    size = len(data)
    count = count or -(-size // block)
    bitmap_bytes = max(512, block // 512 // 8)
    table = bytearray(b'\xff' * -(-count * 4 // 512) * 512)
    out = bytearray(footer(kind, size, uid=uid, stamp=stamp))
    out += header(count, block, parent=parent, stamp=parent_stamp)
    table_at = len(out)
    out += table
    rubbish = set(unset)
    for index in blocks:
        out += b'\xa5' * gap * 512
        struct.pack_into('>I', out, table_at + index * 4, len(out) // 512)
        piece = bytearray(data[index * block:][:block])
        bitmap = bytearray(b'\xff' * bitmap_bytes)
        for sector in range(len(piece) // 512):
            if index * block // 512 + sector in rubbish:
                bitmap[sector // 8] &= ~(0x80 >> sector % 8)
                piece[sector * 512:sector * 512 + 512] = b'\x5a' * 512
        out += bitmap + piece
        if not is_short:
            out += bytes(block - len(piece))
    return bytes(out + footer(kind, size, uid=uid, stamp=stamp))


def naive(*chain: bytes) -> bytes:
    """Return the disk in a VHD and its parents, sector by sector."""
    file = chain[0]
    end = file[-512:]
    size, = struct.unpack_from('>Q', end, 48)
    kind, = struct.unpack_from('>I', end, 60)
    if kind == 2:
        return file[:size]
    under = naive(*chain[1:]) if kind == 4 else b''
    out = bytearray(under[:size].ljust(size, b'\0'))
    head, = struct.unpack_from('>Q', end, 16)
    table, = struct.unpack_from('>Q', file, head + 16)
    block, = struct.unpack_from('>I', file, head + 32)
    bits = max(512, block // 4096)
    for at in range(0, size, 512):
        entry, = struct.unpack_from('>I', file, table + at // block * 4)
        sector = at % block // 512
        if entry != 0xFFFFFFFF:
            place = entry * 512
            if file[place + sector // 8] & (0x80 >> sector % 8):
                place += bits + sector * 512
                out[at:at + 512] = file[place:place + 512]
    return bytes(out)


class Wire(io.RawIOBase):
    """Bytes that come once, forward, in pieces as they like."""

    def __init__(self, data: bytes, seed: int = 0, largest: int = 0) -> None:
        self._file = io.BytesIO(data)
        self._chance = random.Random(seed)
        self._largest = largest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        if self._largest:
            view = view[:self._chance.randint(1, self._largest)]
        return self._file.readinto(view)
