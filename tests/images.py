# SPDX-License-Identifier: Apache-2.0
"""Images for tests: good ones by qemu-img, hostile ones byte by byte."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable

SECTOR = 512
MIB = 1 << 20
VIRTUAL = 8 * MIB
QEMU = {'raw': 'raw', 'qcow2': 'qcow2', 'vhd': 'vpc', 'vmdk': 'vmdk'}
OPTIONS = {
    'vhd': ['-o', 'force_size=on'],
    'vhd-fixed': ['-o', 'subformat=fixed,force_size=on'],
    'qcow2-old': ['-o', 'compat=0.10'],
    'qcow2-small': ['-c', '-o', 'cluster_size=512'],
    'qcow2-zstd': ['-c', '-o', 'compression_type=zstd'],
    'vmdk-stream': ['-o', 'subformat=streamOptimized'],
}
GOOD = ('raw', 'qcow2', 'qcow2-old', 'qcow2-small', 'qcow2-zstd', 'vhd',
        'vhd-fixed', 'vmdk', 'vmdk-stream')


def disk(size: int, seed: int = 1, density: float = 0.5) -> bytes:
    """Return a disk with data and holes of odd places and sizes."""
    chance = random.Random(seed)
    data = bytearray(size)
    at = 0
    while at < size:
        length = min(chance.randrange(1, 300_000), size - at)
        if chance.random() < density:
            data[at:at + length] = chance.randbytes(length)
        at += length
    data[-SECTOR:] = chance.randbytes(SECTOR)
    return bytes(data)


def make(kind: str, path: str, data: bytes) -> str:
    """Write a good image of the disk; return its path."""
    if kind == 'raw':
        with open(path, 'wb') as f:
            f.write(data)
        return path
    raw = f'{path}.disk'
    make('raw', raw, data)
    subprocess.run(
        ['qemu-img', 'convert', '-f', 'raw', '-O',
         QEMU[kind.split('-')[0]], *OPTIONS.get(kind, []), raw, path],
        check=True, stdin=subprocess.DEVNULL, timeout=60,
    )
    os.unlink(raw)
    return path


# Hostile ones.


def qcow2(
    size: int = VIRTUAL, *, version: int = 3, backing: bytes = b'',
    incompatible: int = 0, crypt: int = 0, cluster_bits: int = 16,
    extension: tuple[int, bytes] | None = None, at_510: bytes = b'',
) -> bytes:
    """Return a qcow2 image without data, but for what is asked for."""
    head = bytearray(1 << 16)
    struct.pack_into(
        '>4sIQIIQIIQQIIQ', head, 0, b'QFI\xfb', version,
        0x1000 if backing else 0, len(backing), cluster_bits, size, crypt,
        1, 3 << 16, 1 << 16, 1, 0, 0,
    )
    if version == 3:
        struct.pack_into('>QQQII', head, 72, incompatible, 0, 0, 4, 104)
    if extension:
        kind, data = extension
        at = 104 if version == 3 else 72
        struct.pack_into('>II', head, at, kind, len(data))
        head[at + 8:at + 8 + len(data)] = data
    head[0x1000:0x1000 + len(backing)] = backing
    head[510:510 + len(at_510)] = at_510
    table = bytearray(1 << 16)
    struct.pack_into('>Q', table, 0, 2 << 16)
    counts = bytearray(1 << 16)
    struct.pack_into('>4H', counts, 0, 1, 1, 1, 1)
    return bytes(head + table + counts + bytes(1 << 16))


def vhd_footer(
    kind: int, size: int = VIRTUAL, *, original: int | None = None,
    is_valid: bool = True,
) -> bytes:
    footer = bytearray(SECTOR)
    struct.pack_into(
        '>8sIIQI4sII', footer, 0, b'conectix', 2, 0x10000,
        SECTOR if kind != 2 else (1 << 64) - 1, 0, b'test', 0, 0,
    )
    struct.pack_into(
        '>QQIII', footer, 40, size if original is None else original, size,
        0x03FF103F, kind, 0,
    )
    total = ~sum(footer) & 0xFFFFFFFF
    struct.pack_into('>I', footer, 64, total if is_valid else total ^ 1)
    return bytes(footer)


def vhd(
    kind: int = 3, size: int = VIRTUAL, *, original: int | None = None,
    is_valid: bool = True, block: int = 2 * MIB,
    entries: tuple[int, ...] = (), ends: bool = True, count: int | None = None,
) -> bytes:
    """Return a dynamic vhd, or one that pretends to be."""
    footer = vhd_footer(kind, size, original=original, is_valid=is_valid)
    blocks = -(-size // block) if count is None else count
    sparse = bytearray(1024)
    struct.pack_into(
        '>8sQQIII', sparse, 0, b'cxsparse', (1 << 64) - 1, 1536, 0x10000,
        blocks, block,
    )
    struct.pack_into('>I', sparse, 36, ~sum(sparse) & 0xFFFFFFFF)
    table = bytearray(b'\xff' * -(-blocks * 4 // SECTOR) * SECTOR)
    for index, entry in enumerate(entries):
        struct.pack_into('>I', table, index * 4, entry)
    return footer + bytes(sparse) + bytes(table) + (footer if ends else b'')


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1:]


def vhd_fixed(data: bytes, *, kind: int = 2, claimed: int = 0) -> bytes:
    return data + vhd_footer(kind, claimed or len(data))


DESCRIPTOR = '''# Disk DescriptorFile
version=1
CID=12345678
parentCID={parent}
createType="{kind}"
{more}
# Extent description
{extents}
# The Disk Data Base
ddb.adapterType = "ide"
'''


def vmdk_descriptor(
    kind: str = 'monolithicSparse', *, parent: str = 'ffffffff',
    extents: str = 'RW 16384 SPARSE "disk.vmdk"', more: str = '',
) -> bytes:
    return DESCRIPTOR.format(
        kind=kind, parent=parent, extents=extents, more=more
    ).encode()


def vmdk(
    descriptor: bytes | None = None, *, sectors: int = VIRTUAL // SECTOR,
    footer_sectors: int | None = None, at: int = 1,
) -> bytes:
    """Return a sparse vmdk extent; with ``footer_sectors`` one with footer."""

    def head(capacity: int, tables: int) -> bytes:
        return struct.pack(
            '<4sIIQQQQIQQQB4sH', b'KDMV', 3 if footed else 1,
            3, capacity, 128, at, 20, 512, 0, tables, 128, 0,
            b'\n \r\n', 0,
        ).ljust(SECTOR, b'\0')

    footed = footer_sectors is not None
    text = vmdk_descriptor() if descriptor is None else descriptor
    body = text.ljust(20 * SECTOR, b'\0') + bytes(64 << 10)
    data = head(sectors, (1 << 64) - 1 if footed else 26) + body
    if footer_sectors is not None:
        marker = struct.pack('<QII', 1, 0, 3).ljust(SECTOR, b'\0')
        data += marker + head(footer_sectors, 26) + bytes(SECTOR)
    return data


def with_magic(magic: bytes, at: int = 0) -> bytes:
    data = bytearray(MIB)
    data[at:at + len(magic)] = magic
    return bytes(data)


PASSWD = b'/etc/passwd'

# What it is called, how it is declared, its bytes, and words of the refusal.
HOSTILE: dict[str, tuple[str | None, Callable[[], bytes], str]] = {
    'qcow2 with a backing file': (
        'qcow2', lambda: qcow2(backing=PASSWD), 'has a backing file'),
    'qcow2 with a backing file by json': (
        'qcow2', lambda: qcow2(backing=b'json:{"driver":"file"}'),
        'has a backing file'),
    'old qcow2 with a backing file': (
        None, lambda: qcow2(version=2, backing=PASSWD),
        'has a backing file'),
    'qcow2 with a data file': (
        'qcow2', lambda: qcow2(
            incompatible=4, extension=(0x44415441, PASSWD)),
        'external data file'),
    'qcow2 with the name of a data file alone': (
        'qcow2', lambda: qcow2(extension=(0x44415441, PASSWD)),
        'external data file'),
    'qcow2 with unknown features': (
        'qcow2', lambda: qcow2(incompatible=1 << 40), 'not known'),
    'qcow2 marked corrupt': (
        'qcow2', lambda: qcow2(incompatible=2), 'marked corrupt'),
    'encrypted qcow2': ('qcow2', lambda: qcow2(crypt=1), 'encrypted'),
    'luks qcow2': (
        'qcow2', lambda: qcow2(crypt=2, extension=(0x537BE77, b'x' * 16)),
        'encrypted'),
    'qcow2 with an endless extension': (
        'qcow2', lambda: qcow2(extension=(0x1234, b'')).replace(
            b'\x00\x00\x12\x34\0\0\0\0', b'\x00\x00\x12\x34\xff\xff\xff\xff'),
        'has no end'),
    'qcow of version 1': (
        None, lambda: qcow2(version=1), 'version 1'),
    'qcow2 of a future version': (
        'qcow2', lambda: qcow2(version=4), 'version 4'),
    'qcow2 of absurd size': (
        'qcow2', lambda: qcow2(size=1 << 62), 'which no disk has'),
    'qcow2 of no size': ('qcow2', lambda: qcow2(size=0), 'no disk has'),
    'qcow2 of odd size': ('qcow2', lambda: qcow2(size=1000), 'no disk has'),
    'qcow2 with absurd clusters': (
        'qcow2', lambda: qcow2(cluster_bits=40), 'clusters of'),
    'qcow2 declared raw': ('raw', qcow2, 'its bytes are qcow2'),
    'qcow2 that is cut off': ('qcow2', lambda: qcow2()[:100], 'cut off'),
    'raw declared qcow2': (
        'qcow2', lambda: bytes(MIB), 'its bytes are raw'),
    'qcow2 that is a partition table, too': (
        'qcow2', lambda: qcow2(at_510=b'\x55\xaa'), 'several formats'),
    'qcow2 that is an iso, too': (
        'qcow2', lambda: qcow2()[:32769] + b'CD001' + bytes(4096),
        'several formats'),
    'qcow2 that is a fixed vhd, too': (
        'qcow2', lambda: vhd_fixed(qcow2()), 'several formats'),
    'differencing vhd': ('vhd', lambda: vhd(4), 'differencing'),
    'differencing vhd by its end': (
        'vhd', lambda: vhd_fixed(bytes(MIB), kind=4), ''),
    'vhd of an unknown type': ('vhd', lambda: vhd(5), 'type 5'),
    'vhd with a wrong checksum': (
        'vhd', lambda: vhd(is_valid=False), 'checksum'),
    'vhd without its end': ('vhd', lambda: vhd(ends=False), 'cut off'),
    'vhd whose table points beyond its end': (
        'vhd', lambda: vhd(entries=(1 << 20,)), 'beyond its end'),
    'vhd whose end says another size': (
        'vhd', lambda: vhd()[:-SECTOR] + vhd_footer(3, VIRTUAL - SECTOR),
        'differs'),
    'vhd whose table has a damaged header': (
        'vhd', lambda: flipped(vhd(), SECTOR + 700), 'checksum'),
    'vhd whose table is too small': (
        'vhd', lambda: vhd(count=1), 'smaller than its disk'),
    'vhd with absurd blocks': (
        'vhd', lambda: vhd(block=3 * SECTOR), 'blocks of'),
    'vhd of absurd size': (
        'vhd', lambda: vhd(size=1 << 60, count=1), 'no disk has'),
    'vhd larger than its first size': (
        'raw', lambda: vhd(original=SECTOR), 'its bytes are vhd'),
    'fixed vhd that claims more than it has': (
        'vhd', lambda: vhd_fixed(bytes(MIB), claimed=2 * MIB), ''),
    'fixed vhd declared raw': (
        'raw', lambda: vhd_fixed(bytes(MIB)), 'its bytes are vhd'),
    'vmdk with a foreign flat extent': (
        'vmdk', lambda: vmdk(vmdk_descriptor(
            'monolithicFlat', extents='RW 16384 FLAT "/etc/passwd" 0')),
        'only monolithicSparse'),
    'sparse vmdk with a foreign flat extent': (
        'vmdk', lambda: vmdk(vmdk_descriptor(
            extents='RW 16384 FLAT "passwd" 0')), 'extents'),
    'vmdk with two extents': (
        'vmdk', lambda: vmdk(vmdk_descriptor(
            extents='RW 9 SPARSE "a.vmdk"\nRW 9 SPARSE "b.vmdk"')),
        'extents'),
    'vmdk with a path for an extent': (
        'vmdk', lambda: vmdk(vmdk_descriptor(
            extents='RW 16384 SPARSE "/etc/passwd"')), 'extent'),
    'vmdk without sectors of its own': (
        'vmdk', lambda: vmdk(sectors=0), 'no sectors'),
    'vmdk with a parent': (
        'vmdk', lambda: vmdk(vmdk_descriptor(
            parent='12345678', more='parentFileNameHint="/etc/passwd"')),
        'has a parent'),
    'vmdk with the hint of a parent alone': (
        'vmdk', lambda: vmdk(vmdk_descriptor(
            more='parentFileNameHint="/etc/passwd"')), 'has a parent'),
    'vmdk whose footer says another size': (
        'vmdk', lambda: vmdk(footer_sectors=1 << 40), 'footer that differs'),
    'vmdk whose footer has no sectors': (
        'vmdk', lambda: vmdk(footer_sectors=0), 'footer that differs'),
    'vmdk with its descriptor elsewhere': (
        'vmdk', lambda: vmdk(at=3), ''),
    'vmdk descriptor of other files': (
        'vmdk', lambda: vmdk_descriptor(
            'monolithicFlat', extents='RW 16384 FLAT "/etc/passwd" 0'),
        'descriptor of other files'),
    'vmdk descriptor that is not quite text': (
        None, lambda: vmdk_descriptor().ljust(2000) + b'\xff' * 9000,
        'descriptor of other files'),
    'vmdk descriptor declared raw': (
        'raw', vmdk_descriptor, 'its bytes are vmdk'),
    'old vmdk': (None, lambda: with_magic(b'COWD'), 'old sort'),
    'vhdx': (None, lambda: with_magic(b'vhdxfile'), 'not supported'),
    'vhdx declared raw': (
        'raw', lambda: with_magic(b'vhdxfile'), 'vhdx'),
    'vdi': (
        None, lambda: with_magic(b'\x7f\x10\xda\xbe', 0x40), 'vdi'),
    'qed': (None, lambda: with_magic(b'QED\0'), 'qed'),
    'parallels': (
        None, lambda: with_magic(b'WithoutFreeSpace'), 'parallels'),
    'luks': (
        None, lambda: with_magic(b'LUKS\xba\xbe\0\1'), 'encrypted'),
    'nothing': (None, lambda: b'', 'empty'),
}
