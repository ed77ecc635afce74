# SPDX-License-Identifier: Apache-2.0
"""Images through qemu-img: every format named, every resource bounded.

qemu-img is never asked what an image is, never given a name that a stranger
chose, and never lets an image open another. It gets ``json:`` options made
here, whose file is an absolute path, and it may use so much memory, processor
time and disk as an image of that size may need.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from volume import errors
from volume.node import CommandFailed
from volume.node import Endless
from volume.node import Limits
from volume.node import Node
from volume.transfer.formats import QEMU_NAMES

Watch = Callable[[int, int], None]
BlockNode = Mapping[str, Any]

ADDRESS_BYTES = 2 << 30
CPU_S = 120
CHECK_CPU_S = 10
CPU_BYTES_PER_S = 8 << 20  # the slowest decompression that is waited for
STALL_S = 300.0
BYTES_PER_S_MIN = 1 << 20
# How much larger than its disk the file of a format may grow.
SLACK_BYTES = 64 << 20
COROUTINES = '4'  # more are no quicker, and use more memory

OPTIONS: Mapping[str, tuple[str, ...]] = {
    'raw': (),
    'qcow2': ('-o', 'compat=1.1'),
    # Without force_size the disk grows to what cylinders make of it.
    'vhd': ('-o', 'subformat=dynamic,force_size=on'),
    'vmdk': ('-o', 'subformat=monolithicSparse'),
}
VHD_BYTES_MAX = 2040 << 30

# What qemu-img says, and what it means to our caller; first match.
MEANING: tuple[tuple[re.Pattern[str], type[errors.VolumeError]], ...] = (
    (re.compile(r'No space left|Disk quota'), errors.NoSpace),
    (re.compile(r'Failed to (get|lock).*lock|Is another process'),
     errors.Busy),
    (re.compile(r'[Cc]orrupt|[Ii]nvalid|Unsupported|unsupported|too large'
                r'|too small|beyond'), errors.Invalid),
)
MEMORY = re.compile(r'Cannot allocate memory|failed to allocate')
SIGXCPU, SIGXFSZ = -24, -25


def image_node(path: str, image_format: str) -> dict[str, Any]:
    """Return how QEMU opens an image that came from outside.

    :raises Invalid: the format is none of ours
    """
    if image_format not in QEMU_NAMES or not os.path.isabs(path):
        raise errors.Invalid(
            f'image {path!r:.400} of format {image_format!r:.40} cannot be '
            'opened'
        )
    node: dict[str, Any] = {
        'driver': QEMU_NAMES[image_format],
        'read-only': True,
        'file': {'driver': 'file', 'filename': path, 'read-only': True},
    }
    if image_format in ('qcow2', 'vmdk'):
        node['backing'] = None
    if image_format == 'vhd':
        # As ``formats`` has measured it, not by cylinders.
        node['force_size_calc'] = 'current_size'
    return node


def nbd_node(uri: str) -> dict[str, Any]:
    """Return how QEMU opens an export of this node's daemon."""
    parts = urllib.parse.urlsplit(uri)
    server: dict[str, str]
    if parts.scheme == 'nbd+unix':
        (path,) = urllib.parse.parse_qs(parts.query)['socket']
        server = {'type': 'unix', 'path': path}
    else:
        server = {
            'type': 'inet',
            'host': parts.hostname or '',
            'port': str(parts.port or 10809),
        }
    export = urllib.parse.unquote(parts.path.lstrip('/'))
    return {'driver': 'nbd', 'server': server, 'export': export}


def convert(
    node: Node,
    source: BlockNode,
    target: BlockNode,
    size_bytes: int,
    *,
    target_is_zero: bool = False,
    file_bytes: int | None = None,
    watch: Watch | None = None,
    rate_bytes_per_s: int | None = None,
    stall_s: float = STALL_S,
) -> None:
    """Copy the disk in ``source`` into a target that exists.

    ``target_is_zero`` lets zeros be skipped; without it they are written.
    What the target has beyond the source stays as it is.
    """
    argv = ['-n', '-t', 'unsafe', '-O', 'raw']
    if target_is_zero:
        argv.append('--target-is-zero')
    _run(
        node,
        [*argv, _name(source), _name({'driver': 'raw', 'file': target})],
        size_bytes, file_bytes, watch, rate_bytes_per_s, stall_s,
    )


def write_image(
    node: Node,
    source: BlockNode,
    path: str,
    image_format: str,
    size_bytes: int,
    *,
    watch: Watch | None = None,
    rate_bytes_per_s: int | None = None,
    stall_s: float = STALL_S,
) -> None:
    """Make an image of the disk in ``source``; ``path`` is overwritten.

    :raises Invalid: the format cannot hold so large a disk
    """
    if image_format == 'vhd' and size_bytes > VHD_BYTES_MAX:
        raise errors.Invalid(
            f'a vhd image holds {VHD_BYTES_MAX} bytes at most, not '
            f'{size_bytes}; use qcow2'
        )
    disk = {'driver': 'raw', 'size': size_bytes, 'file': source}
    _run(
        node,
        [
            '-t', 'unsafe', '-O', QEMU_NAMES[image_format],
            *OPTIONS[image_format], _name(disk), path,
        ],
        size_bytes, size_bytes + size_bytes // 8 + SLACK_BYTES,
        watch, rate_bytes_per_s, stall_s,
    )


def check(
    node: Node,
    source: BlockNode,
    image_format: str,
    size_bytes: int,
    *,
    cpu_s: int = CHECK_CPU_S,
) -> None:
    """Refuse an image whose tables point beyond its end.

    QEMU reads zeros there, so that an image that was cut off would become a
    volume with holes. Raw images have no tables, and for vhd QEMU has no
    check: ``formats`` has one.

    :raises Invalid: it is damaged
    """
    if image_format not in ('qcow2', 'vmdk'):
        return
    limits = Limits(ADDRESS_BYTES, cpu_s + size_bytes // CPU_BYTES_PER_S)
    try:
        node.run(
            'qemu-img', 'check', '-q', _name(source), limits=limits,
            timeout_s=STALL_S + size_bytes / (64 * BYTES_PER_S_MIN),
        )
    except CommandFailed as failed:
        if failed.code == 3:  # Clusters that nothing uses: harmless.
            return
        if failed.code < 0 or MEMORY.search(failed.stderr):
            raise _meaning(failed) from None
        words = failed.stderr.strip().splitlines() or ['']
        raise errors.Invalid(
            f'the {image_format} image is damaged or cut off: '
            f'{_plain(words[0])}'
        ) from None
    except Endless as endless:
        # It would be no shorter the next time.
        raise errors.Invalid(
            f'the {image_format} image cannot be checked: {endless}'
        ) from None


def compare(
    node: Node, source: BlockNode, other: BlockNode, size_bytes: int
) -> bool:
    """Say whether two disks have the same bytes."""
    limits = Limits(ADDRESS_BYTES, CPU_S + size_bytes // CPU_BYTES_PER_S)
    try:
        node.run(
            'qemu-img', 'compare', '-q', _name(source), _name(other),
            limits=limits, timeout_s=_timeout_s(size_bytes, None),
        )
    except CommandFailed as failed:
        if failed.code == 1:
            return False
        raise _meaning(failed) from None
    return True


def _run(
    node: Node,
    argv: list[str],
    size_bytes: int,
    file_bytes: int | None,
    watch: Watch | None,
    rate_bytes_per_s: int | None,
    stall_s: float,
) -> None:
    options = ['-p', '-W', '-m', COROUTINES]
    if rate_bytes_per_s:
        options += ['-r', str(rate_bytes_per_s)]
    limits = Limits(
        ADDRESS_BYTES, CPU_S + size_bytes // CPU_BYTES_PER_S, file_bytes
    )
    last_percent, last_s = -1.0, time.monotonic()

    def watched(percent: float) -> None:
        nonlocal last_percent, last_s
        if percent != last_percent:
            last_percent, last_s = percent, time.monotonic()
        elif time.monotonic() - last_s > stall_s:
            raise errors.Unavailable(
                f'qemu-img made no progress for {stall_s:g} s at '
                f'{percent:g}%'
            )
        if watch is not None:
            watch(int(size_bytes * min(percent, 100.0) / 100), size_bytes)

    try:
        node.run(
            'qemu-img', 'convert', *options, *argv, limits=limits,
            timeout_s=_timeout_s(size_bytes, rate_bytes_per_s),
            watch=watched,
        )
    except CommandFailed as failed:
        raise _meaning(failed) from None


def _timeout_s(size_bytes: int, rate_bytes_per_s: int | None) -> float:
    slowest = min(BYTES_PER_S_MIN, (rate_bytes_per_s or BYTES_PER_S_MIN) / 2)
    return 3600 + size_bytes / max(slowest, 1)


def _meaning(failed: CommandFailed) -> errors.VolumeError:
    words = failed.stderr.strip().splitlines()[-1:] or ['it said nothing']
    said = _plain(words[0])
    if failed.code == SIGXCPU:
        return errors.Invalid(
            'the image takes more processor time than its size allows'
        )
    if MEMORY.search(failed.stderr):
        return errors.Invalid(
            f'the image takes more than the {ADDRESS_BYTES} bytes of memory '
            'that reading one may take'
        )
    if failed.code == SIGXFSZ or 'File too large' in failed.stderr:
        return errors.NoSpace(
            'the image grew beyond the space that its size allows'
        )
    for pattern, kind in MEANING:
        if pattern.search(failed.stderr):
            return kind(f'qemu-img: {said}')
    return errors.Unknown(f'qemu-img failed with code {failed.code}: {said}')


def _plain(words: str) -> str:
    """Return what was said, without the options that we gave."""
    words = re.sub(r"'?json:\{.*\}'?", 'the image', words)
    return words.removeprefix('qemu-img: ')[:300]


def _name(node: BlockNode) -> str:
    return 'json:' + json.dumps(node, separators=(',', ':'))
