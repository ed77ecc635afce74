# SPDX-License-Identifier: Apache-2.0
"""A real image: an ext4 file system of files of this machine, as qcow2.

Nothing is mounted and nobody has to be root: mke2fs fills the file system
from a directory, e2fsck checks it, qemu-img makes a qcow2 image of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator

from demo_family import Family
from demo_screen import Failed
from demo_screen import MIB

PLACES = ('/usr/lib', '/usr/share', '/usr/bin')
FILE_BYTES_MAX = 64 * MIB  # many files, not one


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """The same disk twice: raw, as it must be read, and qcow2."""

    raw: str
    qcow2: str
    files: int
    content_bytes: int
    size_bytes: int
    checksum: str


def make(family: Family, directory: str, content_bytes: int) -> Image:
    """Make an image that holds about so many bytes of files."""
    tree = os.path.join(directory, 'tree')
    raw, qcow2 = (
        os.path.join(directory, name) for name in ('disk.raw', 'disk.qcow2')
    )
    os.mkdir(tree)
    files, copied = _copy_files(tree, content_bytes)
    # Small files take whole blocks, and inodes want their place.
    mib = copied * 5 // 4 // MIB + files // 100 + 16
    family.run(
        'mke2fs', '-q', '-t', 'ext4', '-L', 'demo', '-m', '0',
        '-E', 'lazy_itable_init=0', '-N', str(files * 5 // 4 + 1000),
        '-d', tree, raw, f'{mib}M',
    )
    shutil.rmtree(tree)
    family.run('e2fsck', '-fn', raw)
    family.run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, qcow2)
    with open(qcow2, 'rb') as f:
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
    return Image(
        raw, qcow2, files, copied, os.path.getsize(raw), f'sha256:{digest}'
    )


def _copy_files(tree: str, content_bytes: int) -> tuple[int, int]:
    count = copied = 0
    for path, size_bytes in _files():
        if copied + size_bytes > content_bytes:
            continue
        target = tree + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except OSError:
            continue  # not ours to read, or gone meanwhile
        count += 1
        copied += size_bytes
        if copied > content_bytes * 0.98:
            break
    if not count:
        raise Failed(f'there are no files in {" ".join(PLACES)}')
    return count, copied


def _files() -> Iterator[tuple[str, int]]:
    for place in PLACES:
        for directory, names, files in os.walk(place):
            names.sort()
            for name in sorted(files):
                path = os.path.join(directory, name)
                try:
                    found = os.lstat(path)
                except OSError:
                    continue
                if (
                    stat.S_ISREG(found.st_mode)
                    and 0 < found.st_size <= FILE_BYTES_MAX
                ):
                    yield path, found.st_size
