# SPDX-License-Identifier: Apache-2.0
"""Where two VDIs of one tree may differ: by whose files are not shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from volume.model import Extent
from volume.sim.xapi.disk.chains import Node
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.sm.chained import ChainManager


def between(manager: Any, base: str, vdi: str, ref: str) -> list[Extent]:
    """Return runs outside of which two VDIs, by uuid, have the same bytes.

    Two that have no file in common differ wherever either has data.

    :raises Failure: VDI_NOT_SPARSE: they are not kept as files with parents
    """
    if not isinstance(manager, ChainManager):
        raise Failure('VDI_NOT_SPARSE', ref)
    chains = manager.chains
    with chains.lock:
        mine = [chains.node(vdi), *chains.parents(vdi)]
        theirs = [chains.node(base), *chains.parents(base)]
        if 'raw' in {mine[0].format, theirs[0].format}:
            raise Failure('VDI_NOT_SPARSE', ref)
        shared = {node.uuid for node in mine} & {
            node.uuid for node in theirs}
        size = mine[0].size_bytes
        found: list[tuple[int, int]] = []
        for chain in (mine, theirs):
            for at, node in enumerate(chain):
                if node.uuid not in shared:
                    found += _data_in(manager, node, chain[at + 1:])
    return [
        Extent(low, min(high, size) - low, False)
        for low, high in joined(found) if low < size
    ]


def joined(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield runs in ascending order that do not touch."""
    start = end = -1
    for low, high in sorted(runs):
        if low > end:
            if end > start:
                yield start, end
            start, end = low, high
        end = max(end, high)
    if end > start:
        yield start, end


def _data_in(
    manager: ChainManager, node: Node, parents: list[Node]
) -> list[tuple[int, int]]:
    """Return what lies in one file, whatever lies below it."""
    format = manager.chains.formats[node.format]
    with format.open(
        node.path, parents=[parent.path for parent in parents]
    ) as disk:
        return [
            (extent.offset_bytes, extent.offset_bytes + extent.length_bytes)
            for extent in disk.allocated() if not extent.is_zero
        ]
