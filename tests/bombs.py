# SPDX-License-Identifier: Apache-2.0
"""Small images that make whoever reads them work without end."""

from __future__ import annotations

import struct

L2_CLUSTERS = 1 << 21
MIB = 1 << 20


def memory(path: str) -> None:
    """Write a qcow2 file of one block on disk that looks like 256 GiB.

    Its clusters have 512 bytes and their counts eight: to check it takes a
    table of 4 GiB.
    """
    with open(path, 'wb') as f:
        f.write(_head(9, MIB, 512, 32, 1024, counts=6))
        f.truncate(1 << 38)


def flood(path: str) -> None:
    """Write a qcow2 image with so many errors that naming them is long."""
    count = 1 << 16
    l1 = b''.join(
        struct.pack('>Q', 1 << 63 | (2 * 512 + (512 << 4) + i * 512))
        for i in range(count // 64)
    )
    l2 = b''.join(
        struct.pack('>Q', 1 << 63 | (1 << 24) + i * 512)
        for i in range(count)
    )
    with open(path, 'wb') as f:
        f.write(_head(9, count * 512, 1024, count // 64, 512, counts=4))
        f.seek(1024)
        f.write(l1)
        f.seek(1024 + 8192)
        f.write(l2)
        f.truncate((1 << 24) + count * 512)


def processor(path: str) -> None:
    """Write a qcow2 image of 6 MiB whose every table is the same one.

    To check it, QEMU reads half a million tables of 262,144 entries.
    """
    cluster, count = L2_CLUSTERS, 1 << 19
    with open(path, 'wb') as f:
        f.write(_head(21, MIB, cluster, count, 4 * cluster, counts=4))
        f.seek(cluster)
        f.write(struct.pack('>Q', 1 << 63 | 6 * cluster) * count)
        f.truncate(8 * cluster)


def _head(
    cluster_bits: int, size: int, l1_at: int, l1_entries: int,
    counts_at: int, *, counts: int,
) -> bytes:
    head = bytearray(512)
    struct.pack_into(
        '>4sIQIIQIIQQIIQ', head, 0, b'QFI\xfb', 3, 0, 0, cluster_bits, size,
        0, l1_entries, l1_at, counts_at, 1, 0, 0,
    )
    struct.pack_into('>QQQII', head, 72, 0, 0, 0, counts, 104)
    return bytes(head)
