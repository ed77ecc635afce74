# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a thin volume are stored, and which have changed.

The pool's metadata is read beside the kernel, from a snapshot that the
kernel keeps of it: one a pool at most. It is held for one command, and
whoever finds it gone or replaced afterwards does not believe what he read.
"""

from __future__ import annotations

import logging
import re
import threading
import xml.sax
import xml.sax.handler
from collections.abc import Iterator
from xml.sax.xmlreader import AttributesImpl

from volume import errors
from volume import model
from volume.drivers.lvm import names
from volume.drivers.lvm.groups import Group
from volume.drivers.lvm.report import Lv
from volume.drivers.lvm.report import Vg
from volume.node import CommandFailed
from volume.node import Endless

LOG = logging.getLogger(__name__)

OUTPUT_BYTES_MAX = 64 << 20
DUMP_S = 600.0
# <transaction> <used>/<total> metadata <used>/<total> data <held root> …
STATUS = re.compile(r'thin-pool \d+ \d+/\d+ \d+/\d+ (\d+|-) ')

Run = tuple[int, int, bool]
"""First block, count, and whether the newer one stores them."""


class Deltas:
    """Asks the metadata of one pool."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._node = group.node
        self._name = f'{group.name}/{group.settings.thin_pool}'
        self._lock = threading.Lock()

    def extents(
        self, vg: Vg, lv: Lv, old: Lv | None
    ) -> Iterator[model.Extent]:
        """Yield what a volume stores, or how it differs from an older one.

        All of it where that cannot be told: what is not zero may hold
        zeros, and what has changed may be the same.
        """
        tool = ['thin_dump', '-m', '-f', 'xml', '--dev-id', str(lv.thin_id)]
        if old is not None:
            tool = [
                'thin_delta', '-m', '--thin1', str(old.thin_id),
                '--thin2', str(lv.thin_id),
            ]
        whole = iter([model.Extent(0, lv.size_bytes, False)])
        if lv.thin_id is None or (old is not None and old.thin_id is None):
            return whole
        try:
            text = self._ask(tool)
        except Endless as endless:
            LOG.warning(
                '%s/%s: %s; all of it is taken as changed', vg.name, lv.name,
                endless,
            )
            return whole
        block_bytes, runs = read(text, None if old is None else lv.thin_id)
        return _extents(runs, block_bytes, lv.size_bytes)

    def release_left(self) -> None:
        """Release what a predecessor has held, and died."""
        with self._lock:
            self._release()

    def verify(self) -> None:
        """Check the metadata while the pool is in use.

        :raises Corrupt: they are damaged
        """
        try:
            self._ask(['thin_check', '-q', '-m'])
        except CommandFailed as failed:
            raise errors.Corrupt(
                f'the metadata of thin pool {self._name} are damaged: '
                f'{failed}'
            ) from failed

    def _ask(self, tool: list[str]) -> str:
        """Run a tool on metadata that do not change meanwhile."""
        pool = self._group.settings.thin_pool
        device = names.device(self._group.name, f'{pool}_tmeta')
        with self._lock:
            target, _ = self._held()
            self._message(target, 'reserve_metadata_snap')
            try:
                held = self._held()
                text = self._node.run(
                    *tool, device, timeout_s=DUMP_S,
                    output_bytes_max=OUTPUT_BYTES_MAX,
                )
                if held[1] is None or self._held() != held:
                    raise errors.Unavailable(
                        f'somebody released the metadata snapshot of thin '
                        f'pool {self._name} while it was read: ask again'
                    )
            finally:
                self._release()
        return text

    def _release(self) -> None:
        target, held = self._held()
        if held is not None:
            self._message(target, 'release_metadata_snap')

    def _message(self, target: str, words: str) -> None:
        try:
            self._node.run('dmsetup', 'message', target, '0', words)
        except CommandFailed as failed:
            if 'resource busy' not in failed.stderr:
                raise
            raise errors.Unavailable(
                f'{target} has a metadata snapshot already: another tool '
                'reads it; if none does, release it (dmsetup message '
                f'{target} 0 release_metadata_snap)'
            ) from failed

    def _held(self) -> tuple[str, int | None]:
        """Return the pool's device, and the root of what is held, if any.

        :raises Unavailable: the pool is not active, or does not work
        """
        path = names.device(
            self._group.name, self._group.settings.thin_pool
        )
        name = path.removeprefix('/dev/mapper/')
        # A layer of its own, once the pool has volumes.
        wanted = name, f'{name}-tpool'
        text = self._node.run('dmsetup', 'status', '--target', 'thin-pool')
        for line in text.splitlines():
            target, _, status = line.partition(': ')
            found = STATUS.search(status)
            if target in wanted and found:
                return target, None if found[1] == '-' else int(found[1])
        raise errors.Unavailable(
            f'thin pool {name} is not active, or has failed (dmsetup status)'
        )


def read(text: str, newer: int | None) -> tuple[int, list[Run]]:
    """Read what thin_dump or thin_delta printed.

    Return how many bytes a block has, and runs of blocks in order.

    :raises Unknown: it is neither
    """
    handler = _Handler()
    try:
        xml.sax.parseString(text.encode(), handler)
    except (xml.sax.SAXException, KeyError, ValueError) as broken:
        raise errors.Unknown(
            f'the metadata of a thin pool cannot be read: {broken}'
        ) from broken
    if not handler.block_bytes or (newer is not None) != handler.is_delta:
        raise errors.Unknown(
            'the metadata of a thin pool says nothing of the volume'
        )
    return handler.block_bytes, sorted(handler.runs)


class _Handler(xml.sax.handler.ContentHandler):
    """Takes the runs of either tool."""

    def __init__(self) -> None:
        super().__init__()
        self.block_bytes = 0
        self.is_delta = False
        self.runs: list[Run] = []

    def startElement(self, name: str, attrs: AttributesImpl) -> None:
        if name == 'superblock':
            sectors = int(attrs['data_block_size'])
            self.block_bytes = sectors * model.SECTOR_BYTES
        elif name == 'diff':
            self.is_delta = True
        elif name == 'range_mapping':
            self.runs.append(
                (int(attrs['origin_begin']), int(attrs['length']), True))
        elif name == 'single_mapping':
            self.runs.append((int(attrs['origin_block']), 1, True))
        elif name in ('different', 'right_only', 'left_only'):
            self.runs.append((
                int(attrs['begin']), int(attrs['length']),
                name != 'left_only',
            ))


def _extents(
    runs: list[Run], block_bytes: int, size_bytes: int
) -> Iterator[model.Extent]:
    for begin, count, is_stored in runs:
        start = begin * block_bytes
        end = min(start + count * block_bytes, size_bytes)
        if start < end:
            yield model.Extent(start, end - start, not is_stored)
