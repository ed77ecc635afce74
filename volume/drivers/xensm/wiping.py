# SPDX-License-Identifier: Apache-2.0
"""Make a whole LUN read as zeros, and prove it; see what one holds.

Zeros go to the server as one raw stream; where the section names a VM that
this service runs in, the LUN is plugged into it and the kernel writes them,
which many arrays do by themselves. What was written is then read back, here
and there, and always the beginning and the end, where file systems, volume
groups and partition tables say what they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

from volume import errors
from volume import model
from volume import progress
from volume.drivers import base
from volume.drivers.xensm import outgoing
from volume.drivers.xensm.incoming import VdiWriter
from volume.drivers.xensm.samples import Samples
from volume.drivers.xensm.vdis import Vdi
from volume.node import Node
from volume.xenapi import handlers
from volume.xenapi import plugs
from volume.xenapi.link import Link

EDGE_BYTES = model.MIB
SAMPLE_BYTES = 64 << 10
SAMPLES = 32
PIECE_BYTES = 64 << 10
SENT_BYTES = 4 * model.MIB  # between two looks whether to go on
COMMAND_BYTES = 256 * model.MIB

# Offset from the beginning (or the end, if negative), bytes, and what it is.
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (512, b'LABELONE', 'an LVM physical volume'),
    (1024, b'LABELONE', 'an LVM physical volume'),
    (0, b'conectix', 'a VHD'),
    (-512, b'conectix', 'a VHD'),
    (0, b'QFI\xfb', 'a qcow2 image'),
    (512, b'EFI PART', 'a partition table (GPT)'),
    (-512, b'EFI PART', 'a partition table (GPT)'),
    (510, b'\x55\xaa', 'a partition table or boot sector'),
    (1080, b'\x53\xef', 'an ext file system'),
    (0, b'XFSB', 'an XFS file system'),
    (65600, b'_BHRfS_M', 'a btrfs file system'),
    (0, b'LUKS\xba\xbe', 'an encrypted volume (LUKS)'),
    (3, b'NTFS    ', 'an NTFS file system'),
    (4096, b'\xfc\x4e\x2b\xa9', 'a member of a RAID'),
    (4086, b'SWAPSPACE2', 'a swap area'),
)


def wipe(link: Link, node: Node, vdi: Vdi, helper_vm: str = '') -> None:
    """Write zeros over all of a VDI, and prove it; begun again, all anew.

    :raises Corrupt: zeros were written, and something else is read
    """
    if helper_vm:
        _by_helper(link, node, vdi, helper_vm)
    else:
        with contextlib.closing(VdiWriter(node, _Whole(link, vdi))) as writer:
            # All of it: then nothing is fetched before.
            writer.expect([model.Extent(0, vdi.size_bytes, False)])
            for at, length in _pieces(vdi, SENT_BYTES):
                writer.zero(at, length)
            writer.commit()
    prove_zero(link, vdi)


def _pieces(vdi: Vdi, length_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of a whole VDI; tell of each that was made zero."""
    size = vdi.size_bytes
    progress.tell(0, size)
    for at in range(0, size, length_bytes):
        length = min(length_bytes, size - at)
        yield at, length
        progress.tell(at + length, size)
        progress.pace(length)


def prove_zero(link: Link, vdi: Vdi) -> None:
    """Read samples of a VDI that must be zero.

    :raises Corrupt: they are not
    """
    for at, data in _samples(link, vdi):
        if data.count(0) != len(data):
            raise errors.Corrupt(
                f'{_name(vdi)} was wiped, and is not zero at {at}: it will '
                'not be used again; look at the array'
            )


def look(link: Link, vdi: Vdi) -> str:
    """Say what a VDI holds; nothing is said of one that seems empty."""
    size, unknown = vdi.size_bytes, ''
    for at, data in _samples(link, vdi):
        for where, magic, what in SIGNATURES:
            offset = (where if where >= 0 else size + where) - at
            if 0 <= offset <= len(data) - len(magic) and (
                data[offset:offset + len(magic)] == magic
            ):
                return what
        if not unknown and data.count(0) != len(data):
            unknown = f'data at {at}'
    return unknown


def _samples(link: Link, vdi: Vdi) -> Iterator[tuple[int, bytes]]:
    """Yield both ends, and pieces between them, in ascending order."""
    size = vdi.size_bytes
    runs = [(0, min(EDGE_BYTES, size))]
    step = max(size // (SAMPLES + 1), SAMPLE_BYTES)
    for number in range(1, SAMPLES + 1):
        start = max(number * step, sum(runs[-1]))
        end = min(start + SAMPLE_BYTES, size - EDGE_BYTES)
        if start < end:
            runs.append((start, end - start))
    start = max(size - EDGE_BYTES, sum(runs[-1]))
    if start < size:
        runs.append((start, size - start))
    with _reader(link, vdi) as reader:
        for at, length in runs:
            reader.seek(at)
            data = bytearray()
            while len(data) < length:
                piece = reader.read(min(PIECE_BYTES, length - len(data)))
                if not piece:
                    raise errors.Corrupt(
                        f'{_name(vdi)} ends at {at + len(data)}, before its '
                        f'size of {size}'
                    )
                data += piece
            yield at, bytes(data)


def _by_helper(link: Link, node: Node, vdi: Vdi, helper_vm: str) -> None:
    """Let the kernel of the VM that this is write the zeros.

    :raises Invalid: there is no such VM
    """
    vm = plugs.find(link, 'VM', helper_vm)
    if vm is None:
        raise errors.Invalid(f'helper_vm: the pool has no VM {helper_vm}')
    vbd = _plugged(link, vdi, vm)
    try:
        found = link.call('VBD.get_record', vbd)
        for at, length in _pieces(vdi, COMMAND_BYTES):
            node.run(
                'blkdiscard', '--zeroout', f'--offset={at}',
                f'--length={length}', f'/dev/{found["device"]}',
                timeout_s=link.settings.task_timeout_s,
            )
    finally:
        plugs.end_vbd(link, vbd)


def _plugged(link: Link, vdi: Vdi, vm: str) -> str:
    """Return the plugged VBD of the helper; one may be left of an attempt."""
    mine = [
        ref for ref, found in plugs.vbds(link, vdi.ref).items()
        if found['VM'] == vm
    ]
    vbd = mine[0] if mine else str(link.call('VBD.create', {
        'VM': vm, 'VDI': vdi.ref, 'userdevice': 'autodetect',
        'bootable': False, 'mode': 'RW', 'type': 'Disk',
        'unpluggable': True, 'empty': False, 'qos_algorithm_type': '',
        'qos_algorithm_params': {}, 'other_config': {plugs.HELPER: 'wipe'},
    }))
    with plugs.fine('DEVICE_ALREADY_ATTACHED'):
        link.call('VBD.plug', vbd)
    return vbd


class _Whole:
    """A VDI all of which is written anew."""

    is_fresh = False

    def __init__(self, link: Link, vdi: Vdi) -> None:
        self._link = link
        self._vdi = vdi
        self.name = _name(vdi)
        self.size_bytes = vdi.size_bytes

    def put(self, format: str, length_bytes: int) -> handlers.Upload:
        return handlers.put(
            self._link, self._vdi.ref, format, length_bytes, self.name
        )

    def reader(self) -> AbstractContextManager[base.Reader]:
        return _reader(self._link, self._vdi)

    def prove(self, samples: Samples) -> None:
        """What follows looks at more: ``prove_zero``."""

    def spoil(self) -> None:
        """It was never said to be fresh."""


def _reader(link: Link, vdi: Vdi) -> AbstractContextManager[base.Reader]:
    return outgoing.reader(link, vdi.ref, vdi.size_bytes, _name(vdi))


def _name(vdi: Vdi) -> str:
    return f'LUN {vdi.sm_config.get("SCSIid", vdi.uuid)}'
