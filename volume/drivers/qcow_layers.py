# SPDX-License-Identifier: Apache-2.0
"""What is read from a layer's file without QEMU: its header, who has it open.

A tree of layers is known from the headers alone, so all of them must be read
often and in one pass: a few bytes of each, in Python. What a guest writes
never reaches a header, yet nothing unexpected is accepted in one: a name of
another file in there would be opened by QEMU with our rights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import struct
from collections.abc import Callable, Mapping

from volume import errors
from volume import ids
from volume import model
from volume.machine.qemulocks import is_used as is_used
from volume.machine.qemulocks import is_written as is_written
from volume.machine.qemulocks import keep_closed as keep_closed

NAME = re.compile(
    r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\.(qcow2|raw|vhd|vmdk)'
)
HEADER_BYTES = 4096  # what we read of a qcow2 header; ours are shorter


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """What a format is called in QEMU, and what it can do.

    ``features`` are those of the driver that it lacks.
    """

    driver: str
    max_bytes: int
    lacks: frozenset[str]
    create: tuple[str, ...] = ()


_NO_CHAINS = frozenset({'Clone', 'Flatten', 'Revert', 'Snapshots'})

# By the extension of a layer's name, which is the format's name in options.
# The limit of qcow2 is that of QEMU's first-level table at 64 KiB clusters.
FORMATS: Mapping[str, Format] = {
    'qcow2': Format('qcow2', 1 << 51, frozenset()),
    'raw': Format('raw', (1 << 63) - (1 << 30), _NO_CHAINS),
    'vhd': Format(
        'vpc', 2040 << 30, _NO_CHAINS | {'Resize'},
        # Without it QEMU rounds the size to cylinders.
        ('-o', 'force_size=on'),
    ),
    'vmdk': Format('vmdk', 1 << 41, _NO_CHAINS | {'Resize'}),
}


def forms(format_name: str) -> frozenset[model.Form]:
    """Return in which forms the volumes of a format come."""
    driver = FORMATS[format_name].driver
    return frozenset({model.Device('', False, driver).form})


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What a layer says of itself; ``backing`` is another layer's name."""

    size_bytes: int
    backing: str | None = None
    table_offset: int = 0
    table_bytes: int = 0


def new_name(extension: str) -> str:
    """Return a name that no layer ever had."""
    return f'{ids.new()}.{extension}'


def extension(name: str) -> str:
    """Return a layer's format by its name."""
    return name.rpartition('.')[2]


def read_header(path: str, extension: str) -> Header:
    """Return what the header says.

    :raises Corrupt: it is not what a layer of ours has, and why
    """
    with open(path, 'rb') as f:
        try:
            return _READERS[extension](f.fileno())
        except _Odd as odd:
            raise errors.Corrupt(
                f'{os.path.basename(path)} is no {extension} image of the '
                f'kind that is used here: {odd}'
            ) from None


def is_empty(path: str, header: Header) -> bool:
    """Say whether a qcow2 layer stores nothing of its own.

    Only of a layer that nobody has open for writing: QEMU keeps tables in
    memory.
    """
    with open(path, 'rb') as f:
        table = os.pread(f.fileno(), header.table_bytes, header.table_offset)
    return len(table) == header.table_bytes and not any(table)


# Headers.


class _Odd(Exception):
    """Why a header is refused."""


_QCOW2 = struct.Struct('>4sIQIIQIIQQIIQQQQII')
_EXTENSION_FORMAT = 0xE2792ACA
_EXTENSIONS = {
    0x6803F857,  # names of features
    0x23852875,  # bitmaps
    _EXTENSION_FORMAT,
}
# Incompatible features that are harmless: dirty reference counts, which QEMU
# repairs by itself, and the kind of compression.
_HARMLESS = 1 << 0 | 1 << 3
_CORRUPT = 1 << 1


def _read_qcow2(fd: int) -> Header:
    head = os.pread(fd, HEADER_BYTES, 0)
    if len(head) < _QCOW2.size:
        raise _Odd('it is too short')
    (
        magic, version, backing_offset, backing_bytes, cluster_bits, size,
        crypt, table_entries, table_offset, _, _, snapshots, _,
        incompatible, _, _, _, length,
    ) = _QCOW2.unpack_from(head)
    if magic != b'QFI\xfb' or version != 3:
        raise _Odd('no qcow2 header of version 3 is there')
    if crypt:
        raise _Odd('it is encrypted')
    if incompatible & _CORRUPT:
        raise _Odd('QEMU has marked it as corrupt')
    if incompatible & ~_HARMLESS:
        raise _Odd(f'it has features {incompatible:#x}')
    if snapshots:
        raise _Odd('it has internal snapshots')
    if not 9 <= cluster_bits <= 21 or length % 8 or not (
        _QCOW2.size <= length <= HEADER_BYTES
    ):
        raise _Odd('its header makes no sense')
    if table_offset % (1 << cluster_bits) or table_entries > 1 << 22:
        raise _Odd('its first table makes no sense')
    found = _extensions(head, length, backing_offset)
    backing = None
    if backing_offset:
        backing = _backing(head, backing_offset, backing_bytes)
        if found.get(_EXTENSION_FORMAT) != b'qcow2':
            raise _Odd('it does not say that its backing file is qcow2')
    return Header(
        _whole_sectors(size), backing, table_offset, 8 * table_entries
    )


def _extensions(head: bytes, at: int, end: int) -> dict[int, bytes]:
    found = {}
    end = min(end or len(head), len(head))
    while at + 8 <= end:
        kind, length = struct.unpack_from('>II', head, at)
        if not kind:
            break
        if kind not in _EXTENSIONS or at + 8 + length > end:
            raise _Odd(f'it has a header extension {kind:#x}')
        found[kind] = head[at + 8:at + 8 + length]
        at += 8 + -(-length // 8) * 8
    return found


def _backing(head: bytes, offset: int, length: int) -> str:
    name = head[offset:offset + length].decode('latin-1')
    match = NAME.fullmatch(name)
    if len(name) != length or match is None or match[1] != 'qcow2':
        raise _Odd(f'its backing file {name!r:.80} is no layer of the pool')
    return name


def _read_raw(fd: int) -> Header:
    return Header(_whole_sectors(os.fstat(fd).st_size))


# Who must have written a VHD for QEMU to believe its size field.
_SIZED_BY = (b'win ', b'qem2', b'd2v ', b'tap\0', b'CXS')


def _read_vhd(fd: int) -> Header:
    end = os.fstat(fd).st_size - 512
    for at in 0, max(0, end):
        foot = os.pread(fd, 512, at)
        if foot.startswith(b'conectix') and len(foot) == 512:
            break
    else:
        raise _Odd('no VHD footer is there')
    kind, = struct.unpack_from('>I', foot, 60)
    if kind not in (2, 3):
        raise _Odd(f'it is of type {kind}: it needs another file')
    if not foot[28:32].startswith(_SIZED_BY):
        raise _Odd(
            f'its size is uncertain, as {foot[28:32]!r} has made it: convert '
            'it with force_size=on'
        )
    size, = struct.unpack_from('>Q', foot, 48)
    return Header(_whole_sectors(size))


def _read_vmdk(fd: int) -> Header:
    head = os.pread(fd, 512, 0)
    if len(head) < 512 or head[:4] != b'KDMV':
        raise _Odd('no header of a sparse VMDK is there')
    sectors, _, text_at, text_sectors = struct.unpack_from('<QQQQ', head, 12)
    if not 0 < text_sectors <= 128 or not sectors:
        raise _Odd('it has no description inside')
    text = os.pread(fd, 512 * text_sectors, 512 * text_at)
    words = text.rstrip(b'\0').decode('latin-1')
    if 'createType="monolithicSparse"' not in words:
        raise _Odd('it is not of type monolithicSparse')
    if 'parentCID=ffffffff' not in words or 'parentFileNameHint' in words:
        raise _Odd('it has a parent')
    return Header(_whole_sectors(512 * sectors))


def _whole_sectors(size_bytes: int) -> int:
    if size_bytes <= 0 or size_bytes % model.SECTOR_BYTES:
        raise _Odd(
            f'it has {size_bytes} bytes, no positive multiple of '
            f'{model.SECTOR_BYTES}'
        )
    return size_bytes


_READERS: Mapping[str, Callable[[int], Header]] = {
    'qcow2': _read_qcow2,
    'raw': _read_raw,
    'vhd': _read_vhd,
    'vmdk': _read_vmdk,
}


def openers(paths: frozenset[str], command: str) -> list[int]:
    """Return the processes of a command that have one of the files open."""
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            with open(f'/proc/{pid}/comm') as f:
                if f.read().strip() != command:
                    continue
            if any(
                os.readlink(link) in paths
                # Not of the process: one whose first thread has ended has
                # none there, and another one may still write.
                for link in glob.iglob(f'/proc/{pid}/task/*/fd/*')
            ):
                found.append(int(pid))
    return found


def words_of(pid: int) -> list[str]:
    """Return a process's command line; empty if it is gone."""
    try:
        with open(f'/proc/{pid}/cmdline', 'rb') as f:
            return f.read().decode(errors='replace').split('\0')
    except OSError:
        return []
