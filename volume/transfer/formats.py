# SPDX-License-Identifier: Apache-2.0
"""What an image is, told from its bytes, and which images are refused.

An image comes from a stranger, and a format is a program that QEMU runs:
it may name other files of this machine, promise terabytes, or be two things
at once. So the bytes are looked at twice before QEMU sees them: by the
inspectors of oslo.utils, and by the checks below, which know what QEMU 7
would do with a header that those let pass. Nothing here trusts a name or a
declaration, and nothing starts a program.

Names of formats are ours: ``vhd`` is what QEMU calls ``vpc``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import struct
from collections.abc import Callable

from oslo_utils.imageutils import format_inspector

from volume import errors
from volume.transfer import vhd_layout
from volume.transfer.base import Opened

FORMATS = ('raw', 'qcow2', 'vhd', 'vmdk')
QEMU_NAMES = {'raw': 'raw', 'qcow2': 'qcow2', 'vhd': 'vpc', 'vmdk': 'vmdk'}

HEAD_BYTES = 2 << 20  # the largest qcow2 cluster; its header ends there
TAIL_BYTES = 4096
VIRTUAL_BYTES_MAX = 1 << 50
SECTOR = 512

# Formats by their first bytes: a damaged image must not pass for a raw one
# because an inspector gave up on it.
MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b'QFI\xfb', 'qcow2'),
    (0, vhd_layout.COOKIE, 'vhd'),
    (0, b'KDMV', 'vmdk'),
    (0, b'COWD', 'vmdk'),
    (0, b'vhdxfile', 'vhdx'),
    (0, b'QED\0', 'qed'),
    (0, b'LUKS\xba\xbe', 'luks'),
    (0x40, b'\x7f\x10\xda\xbe', 'vdi'),
    (0, b'WithoutFreeSpace', 'parallels'),
    (0, b'WithouFreSpacExt', 'parallels'),
)
# What the bytes of a raw disk may well be.
RAW_KINDS = frozenset({'gpt', 'iso'})
INSPECTOR_TROUBLE = (
    format_inspector.ImageFormatError, struct.error, ValueError,
    AttributeError, LookupError,
)

QCOW2_CORRUPT = 1 << 1
QCOW2_DATA_FILE = 1 << 2
QCOW2_KNOWN = 0b1111  # dirty, corrupt, data file, compression type
QCOW2_REFUSED_EXTENSIONS = {
    0x44415441: 'names an external data file',
    0x0537BE77: 'is encrypted',
}
VHD_PIECE_BYTES = 1 << 20
Refuse = Callable[[str], errors.Invalid]
VMDK_TYPES = ('monolithicsparse', 'streamoptimized')


@dataclasses.dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image is, and how large the disk in it is."""

    format: str
    virtual_size_bytes: int


def check_name(declared: str | None) -> None:
    """Refuse a format that nobody here can read.

    :raises Invalid: it is none of ours
    """
    if declared is not None and declared not in FORMATS:
        raise errors.Invalid(
            f'image format {declared!r:.40} is not known; use one of '
            + ', '.join(FORMATS)
        )


def inspect(
    image: Opened | str, declared: str | None = None, name: str = 'image'
) -> ImageInfo:
    """Say what a whole image is.

    :raises Invalid: it is refused, and why
    """
    if isinstance(image, str):
        with open(image, 'rb') as opened:
            return inspect(opened, declared, name)
    size_bytes = image.seek(0, os.SEEK_END)
    head = vhd_layout.read_at(image, 0, min(size_bytes, HEAD_BYTES))
    start = max(0, size_bytes - TAIL_BYTES)
    tail = vhd_layout.read_at(image, start, size_bytes - start)
    info = inspect_parts(head, tail, size_bytes, declared, name)
    if info.format == 'vhd' and head.startswith(vhd_layout.COOKIE):
        _check_vhd_blocks(image, head, size_bytes, name)
    return info


def inspect_parts(
    head: bytes,
    tail: bytes | None,
    size_bytes: int,
    declared: str | None = None,
    name: str = 'image',
) -> ImageInfo:
    """Say what an image is, by its first and last bytes.

    ``head`` is all of the first ``HEAD_BYTES``. Without a ``tail`` (the
    server cannot give it before the rest) the answer is provisional, and
    ``inspect`` is asked again when all has arrived.

    :raises Invalid: it is refused, and why
    """
    check_name(declared)
    if not size_bytes or not head:
        raise errors.Invalid(f'{name} is empty')
    found = _found(head, tail, size_bytes, declared, name)
    if declared is not None and declared != found:
        raise errors.Invalid(
            f'{name} is declared {declared}, but its bytes are {found}; '
            'declare what it is'
        )
    if found == 'qcow2':
        virtual = _qcow2(head, name)
    elif found == 'vhd':
        virtual = _vhd(head, tail, size_bytes, name)
    elif found == 'vmdk':
        virtual = _vmdk(head, tail, name)
    else:
        virtual = -(-size_bytes // SECTOR) * SECTOR
    if not 0 < virtual <= VIRTUAL_BYTES_MAX or virtual % SECTOR:
        raise errors.Invalid(
            f'{name} says that its disk has {virtual} bytes, which no disk '
            'has'
        )
    return ImageInfo(found, virtual)


def has_vhd_footer(tail: bytes, size_bytes: int) -> bool:
    """Say whether the last bytes make a fixed VHD of what looks raw."""
    try:
        footer = vhd_layout.Footer.parse(tail[-SECTOR:], 'image')
    except errors.Invalid:
        return False
    return (
        footer.kind == vhd_layout.FIXED
        and footer.size_bytes <= size_bytes - SECTOR
    )


def name_vmdk_extent(image: Opened, name: str) -> None:
    """Write the file's own name into the descriptor of a new vmdk.

    QEMU does not read it, others do; and QEMU wrote the name of the draft.
    """
    if re.fullmatch(r'[A-Za-z0-9._-]{1,100}', name) is None:
        name = 'disk.vmdk'
    head = vhd_layout.read_at(image, 0, 2 * SECTOR)
    at, sectors = struct.unpack_from('<QQ', head, 28)
    room = sectors * SECTOR
    text = vhd_layout.read_at(image, at * SECTOR, room).rstrip(b'\0')
    named = re.sub(
        rb'(?m)^(RW \d+ SPARSE) ".*"$', rb'\1 "%s"' % name.encode(), text
    )
    image.seek(at * SECTOR)
    image.write(named.ljust(room, b'\0')[:room])


def _found(
    head: bytes,
    tail: bytes | None,
    size_bytes: int,
    declared: str | None,
    name: str,
) -> str:
    """Return the one format that the bytes have."""
    strict = {
        kind for at, magic, kind in MAGICS if head.startswith(magic, at)
    }
    if b'# disk descriptorfile' in head[:SECTOR].lower():
        strict.add('vmdk')
    matched = _matched(head, tail)
    strict |= matched - RAW_KINDS
    if tail is not None and has_vhd_footer(tail, size_bytes):
        strict.add('vhd')
    if strict == {'luks'} and declared == 'raw':
        # Encrypted by a guest: nobody here reads more than bytes in it.
        return 'raw'
    if len(strict) > 1 or (strict and matched & RAW_KINDS):
        both = ', '.join(sorted(strict | matched))
        raise errors.Invalid(
            f'{name} is refused: it is several formats at once ({both})'
        )
    if not strict:
        if declared == 'vhd' and tail is None:
            return 'vhd'
        return 'raw'
    (kind,) = strict
    if kind == 'luks':
        raise errors.Invalid(
            f'{name} is encrypted (luks); decrypt it first, or declare it '
            'raw to store its bytes as they are'
        )
    if kind not in FORMATS:
        raise errors.Invalid(
            f'{name} is {kind}, which is not supported; convert it to one '
            'of ' + ', '.join(FORMATS)
        )
    return kind


def _matched(head: bytes, tail: bytes | None) -> set[str]:
    """Return the formats that the inspectors of oslo.utils recognise."""
    matched = set()
    for kind in format_inspector.ALL_FORMATS:
        if kind != 'raw':
            try:
                if _oslo(kind, head, tail).format_match:
                    matched.add(kind)
            except INSPECTOR_TROUBLE:
                continue
    return matched


def _oslo(
    kind: str, head: bytes, tail: bytes | None
) -> format_inspector.FileInspector:
    inspector: format_inspector.FileInspector
    inspector = format_inspector.ALL_FORMATS[kind]()
    inspector.eat_chunk(head)
    if tail is not None and len(head) >= HEAD_BYTES:
        # What lies between is not looked at: no format that is let pass
        # keeps anything there that its inspector wants.
        inspector.eat_chunk(tail)
    inspector.finish()
    return inspector


def _oslo_safe(kind: str, head: bytes, tail: bytes | None, name: str) -> None:
    """Let oslo.utils refuse the image."""
    try:
        _oslo(kind, head, tail).safety_check()
    except format_inspector.SafetyCheckFailed as failed:
        why = '; '.join(str(f) for f in failed.failures.values())
        raise errors.Invalid(
            f'{name} is refused: {kind}: {why:.200}'
        ) from None
    except INSPECTOR_TROUBLE as damaged:
        raise errors.Invalid(
            f'{name} is refused: its {kind} header is damaged or unusual '
            f'({damaged!s:.100})'
        ) from None


def _qcow2(head: bytes, name: str) -> int:
    if len(head) < SECTOR:
        raise errors.Invalid(f'{name} is cut off in its qcow2 header')

    def refuse(why: str) -> errors.Invalid:
        return errors.Invalid(f'{name} is refused: the qcow2 image {why}')

    if _u64(head, 8):
        raise refuse('has a backing file; flatten it first')
    version = _u32(head, 4)
    if version not in (2, 3):
        raise refuse(f'has version {version}, not 2 or 3')
    features = _u64(head, 72) if version == 3 else 0
    if features & QCOW2_DATA_FILE:
        raise refuse('names an external data file')
    if features & QCOW2_CORRUPT:
        raise refuse('is marked corrupt; repair it first')
    if features & ~QCOW2_KNOWN:
        raise refuse(f'has features that are not known ({features:#x})')
    if _u32(head, 32):
        raise refuse('is encrypted; decrypt it first')
    cluster_bits = _u32(head, 20)
    if not 9 <= cluster_bits <= 21:
        raise refuse(f'has clusters of 2^{cluster_bits} bytes')
    _qcow2_extensions(head, version, 1 << cluster_bits, refuse)
    _oslo_safe('qcow2', head, None, name)
    return _u64(head, 24)


def _qcow2_extensions(
    head: bytes, version: int, cluster_bytes: int, refuse: Refuse
) -> None:
    at = 72 if version == 2 else _u32(head, 100)
    if at % 8 or not (72, 104)[version == 3] <= at <= cluster_bytes:
        raise refuse(f'has a header of {at} bytes')
    end = min(cluster_bytes, len(head))
    while at + 8 <= end:
        kind, length = struct.unpack_from('>II', head, at)
        if not kind:
            return
        if kind in QCOW2_REFUSED_EXTENSIONS:
            raise refuse(QCOW2_REFUSED_EXTENSIONS[kind])
        at += 8 + -(-length // 8) * 8
        if at > cluster_bytes:
            raise refuse('has a header extension that has no end')


def _vhd(head: bytes, tail: bytes | None, size_bytes: int, name: str) -> int:
    dynamic = head.startswith(vhd_layout.COOKIE)
    if not dynamic and tail is None:
        return max(0, size_bytes - SECTOR) // SECTOR * SECTOR
    data = head[:SECTOR] if dynamic else (tail or b'')[-SECTOR:]
    footer = vhd_layout.Footer.parse(data, name)
    if footer.kind == vhd_layout.DIFFERENCING:
        raise errors.Invalid(
            f'{name} is refused: it is a differencing vhd, whose parent is '
            'elsewhere; coalesce it first'
        )
    if footer.kind != (vhd_layout.DYNAMIC if dynamic else vhd_layout.FIXED):
        raise errors.Invalid(
            f'{name} is refused: vhd type {footer.kind} is not supported'
        )
    vhd_layout.check_size(footer.size_bytes, name)
    if dynamic and tail is not None:
        last = vhd_layout.Footer.parse(tail[-SECTOR:], name)
        vhd_layout.check_twins(footer, last, name)
    if not dynamic and footer.size_bytes > size_bytes - SECTOR:
        raise errors.Invalid(
            f'{name} is refused: it holds less than its '
            f'{footer.size_bytes} bytes'
        )
    _oslo_safe('vhd', data, None, name)
    return footer.size_bytes


def _check_vhd_blocks(
    image: Opened, head: bytes, size_bytes: int, name: str
) -> None:
    """Refuse a dynamic vhd whose table points beyond its end.

    QEMU would read zeros there, and has no check for this format.
    """

    def refuse(why: str) -> errors.Invalid:
        return errors.Invalid(f'{name} is refused: its vhd table {why}')

    footer = vhd_layout.Footer.parse(head[:SECTOR], name)
    header = vhd_layout.Header.parse(
        vhd_layout.read_at(
            image, footer.header_offset_bytes, vhd_layout.HEADER_BYTES),
        footer.size_bytes, name,
    )
    last = 0
    # In pieces: a table may be as large as half the service.
    for start in range(0, header.entries * 4, VHD_PIECE_BYTES):
        length = min(VHD_PIECE_BYTES, header.entries * 4 - start)
        data = vhd_layout.read_at(
            image, header.table_offset_bytes + start, length)
        if len(data) < length:
            raise refuse('is cut off')
        used = (
            entry for entry in vhd_layout.table(data)
            if entry != vhd_layout.UNUSED
        )
        last = max(last, max(used, default=0))
    # The last block may be as short as the disk's end makes it.
    if last and last * SECTOR + header.bitmap_bytes >= size_bytes:
        raise refuse('points beyond its end, as if it were cut off')


def _vmdk(head: bytes, tail: bytes | None, name: str) -> int:
    def refuse(why: str) -> errors.Invalid:
        return errors.Invalid(f'{name} is refused: the vmdk image {why}')

    if not head.startswith(b'KDMV') or len(head) < 2 * SECTOR:
        raise refuse(
            'is a descriptor of other files or an old sort; only '
            'monolithicSparse and streamOptimized are supported'
        )
    (capacity,) = struct.unpack_from('<Q', head, 12)
    if not capacity:
        # QEMU would open the files that the descriptor names.
        raise refuse('has no sectors of its own')
    at, sectors = struct.unpack_from('<QQ', head, 28)
    text = head[at * SECTOR:][:min(sectors * SECTOR, 1 << 20)]
    _vmdk_descriptor(text.split(b'\0')[0].lower(), refuse)
    (tables_at,) = struct.unpack_from('<Q', head, 56)
    footed = tables_at == format_inspector.VMDKInspector.GD_AT_END
    if footed and tail is None:
        return int(capacity) * SECTOR
    if footed and tail is not None:
        if len(tail) < 3 * SECTOR:
            raise refuse('is cut off')
        footer = tail[-2 * SECTOR:-SECTOR]
        # QEMU believes the footer, so it must say what the header says.
        if footer[:4] != b'KDMV' or footer[12:48] != head[12:48]:
            raise refuse(
                'has a footer that differs from its header, as if it were '
                'cut off'
            )
    _oslo_safe('vmdk', head, tail, name)
    return int(capacity) * SECTOR


def _vmdk_descriptor(text: bytes, refuse: Refuse) -> None:
    lines = [line.strip() for line in text.splitlines()]
    fields = {}
    for line in lines:
        if not line.startswith(b'#'):
            key, _, value = line.partition(b'=')
            fields[key.strip()] = value.strip()
    created = fields.get(b'createtype', b'').strip(b'"')
    kind = created.decode('ascii', 'replace')
    if kind not in VMDK_TYPES:
        raise refuse(
            f'is {kind or "of no"} type; only monolithicSparse and '
            'streamOptimized are supported'
        )
    if (
        b'parentfilenamehint' in text
        or fields.get(b'parentcid', b'ffffffff') != b'ffffffff'
    ):
        raise refuse('has a parent; flatten it first')
    extents = [
        line.split() for line in lines
        if line.startswith((b'rw ', b'rdonly ', b'noaccess '))
    ]
    if len(extents) != 1 or len(extents[0]) < 3 or extents[0][2] != b'sparse':
        raise refuse('has extents other than one in itself')


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at:at + 4], 'big')


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at:at + 8], 'big')
