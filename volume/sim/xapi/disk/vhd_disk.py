# SPDX-License-Identifier: Apache-2.0
"""VHD files: made, changed, merged; and a chain of them as one disk."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from volume import errors
from volume.model import Extent
from volume.model import MIB
from volume.model import SECTOR_BYTES as SECTOR
from volume.sim.xapi.disk import disks
from volume.sim.xapi.disk import vhd_layer
from volume.sim.xapi.disk.vhd_layer import GRAIN_BYTES
from volume.sim.xapi.disk.vhd_layer import Layer
from volume.transfer import vhd_layout as layout

GEOMETRY = slice(56, 60)
SUM = slice(layout.FOOTER_SUM_AT, layout.FOOTER_SUM_AT + 4)
CURRENT_SIZE = slice(48, 56)


class VhdDisk(disks.Disk):
    """A VHD and its parents, which are only read."""

    def __init__(self, layers: Sequence[Layer], is_writable: bool) -> None:
        self._layers = list(layers)
        self._lock = threading.RLock()
        self.path = layers[0].path
        self.size_bytes = layers[0].size_bytes
        self.is_writable = is_writable

    def pread_into(self, buffer: Any, offset: int) -> None:
        view = memoryview(buffer).cast('B')
        self.check('read', offset, len(view))
        with self._lock:
            self._read(view, offset)

    def pwrite(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast('B')
        self.check('write', offset, len(view))
        with self._lock:
            for at, until in self._pieces(offset, offset + len(view)):
                self._write(at, view[at - offset:until - offset])

    def zero(self, offset: int, length: int) -> None:
        self.check('zero', offset, length)
        with self._lock:
            for low, high, layer, _ in self._runs(offset, offset + length):
                if layer is not None:
                    for at, until in self._pieces(low, high):
                        self._zero(at, until)

    def flush(self) -> None:
        with self._lock:
            if self.is_writable:
                self._layers[0].flush()

    def extents(self) -> Iterator[Extent]:
        with self._lock:
            return iter([*disks.runs(
                (at, until, layer is None)
                for at, until, layer, _ in self._runs(0, self.size_bytes)
            )])

    def allocated(self) -> Iterator[Extent]:
        with self._lock:
            return iter([*disks.runs(
                (at, until, where is None)
                for at, until, where in _runs(self._layers[0])
            )])

    def close(self) -> None:
        with self._lock:
            for layer in self._layers:
                layer.close()

    def _pieces(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a run that lie in one block each."""
        block_bytes = self._layers[0].block_bytes
        while at < end:
            until = min(end, (at // block_bytes + 1) * block_bytes)
            yield at, until
            at = until

    def _read(self, view: memoryview, offset: int) -> None:
        for at, until, layer, where in self._runs(
            offset, offset + len(view)
        ):
            part = view[at - offset:until - offset]
            if layer is None:
                part[:] = bytes(len(part))
            else:
                layer.read(where, part)

    def _write(self, at: int, view: memoryview) -> None:
        """Write into one block; what is new in the file is whole grains."""
        leaf, end = self._layers[0], at + len(view)
        low = at // GRAIN_BYTES * GRAIN_BYTES
        high = min(-(-end // GRAIN_BYTES) * GRAIN_BYTES, self.size_bytes)
        parts: list[Any] = [view]
        if low < at:
            if leaf.is_set(low, at):
                low = at
            else:
                parts.insert(0, self._some(low, at))
        if end < high and not leaf.is_set(end, high):
            parts.append(self._some(end, high))
        leaf.write(low, parts)

    def _zero(self, at: int, end: int) -> None:
        """Make a part of one block zeros."""
        low = min(end, -(-at // GRAIN_BYTES) * GRAIN_BYTES)
        high = max(low, end // GRAIN_BYTES * GRAIN_BYTES)
        for start, until in (at, low), (high, end):
            if start < until:
                self._write(start, memoryview(bytes(until - start)))
        if low < high:
            self._layers[0].zero(low, high)

    def _some(self, at: int, end: int) -> bytearray:
        data = bytearray(end - at)
        self._read(memoryview(data), at)
        return data

    def _runs(
        self, at: int, end: int
    ) -> Iterator[tuple[int, int, Layer | None, int]]:
        """Yield runs: from, until, in which layer, where in its file."""
        while at < end:
            until, found, offset = end, None, 0
            for layer in self._layers:
                if at >= layer.size_bytes:
                    # A disk that has grown since: its parent ends here.
                    break
                until, where = layer.run(at, until)
                if where is not None:
                    found, offset = layer, where
                    break
            yield at, until, found, offset
            at = until


class Vhd(disks.Format):
    """Dynamic and differencing VHD files."""

    name = 'vhd'
    suffix = '.vhd'
    granularity_bytes = 2 * MIB
    size_bytes_max = layout.DISK_BYTES_MAX

    def create(
        self, path: str, size_bytes: int, parent: str | None = None
    ) -> None:
        head = vhd_layer.read_head(parent) if parent else None
        layout.check_size(size_bytes, os.path.basename(path))
        self.kernel.store(path, b''.join(vhd_layer.new_file(
            size_bytes, head, os.path.basename(parent or ''))))

    def look(self, path: str) -> disks.Facts:
        head = vhd_layer.read_head(path)
        return disks.Facts(
            head.footer.size_bytes, head.file_bytes, head.parent,
            head.is_hidden,
        )

    def open(
        self,
        path: str,
        writable: bool = False,
        parents: Sequence[str] = (),
        claim: Callable[[int], None] = disks.endless,
    ) -> disks.Disk:
        layers: list[Layer] = []
        try:
            layers.append(Layer(path, writable, self.kernel, claim))
            for parent in parents:
                layers.append(Layer(parent))
            _check_chain(layers)
        except BaseException:
            for layer in layers:
                layer.close()
            raise
        return VhdDisk(layers, writable)

    def merge(
        self,
        path: str,
        parent: str,
        stop: Callable[[], bool] = disks.never,
    ) -> None:
        # A parent that is smaller grows first.
        self.grow(parent, vhd_layer.read_head(path).footer.size_bytes)
        source, target = Layer(path), Layer(parent, True, self.kernel)
        try:
            buffer = memoryview(bytearray(target.block_bytes))
            for at, end, where in _runs(source, stop):
                if where is None:
                    continue
                start = at
                while at < end:
                    until = min(end, at - at % len(buffer) + len(buffer))
                    part = buffer[:until - at]
                    source.read(where + at - start, part)
                    target.write(at, [part])
                    at = until
            target.flush()
        finally:
            source.close()
            target.close()

    def extra_bytes(self, path: str, parent: str) -> int:
        source, target = Layer(path), Layer(parent)
        try:
            extra = len({*source.used()} - {*target.used()})
            return extra * (source.block_bytes + vhd_layer.PAGE_BYTES)
        finally:
            source.close()
            target.close()

    def relink(self, path: str, parent: str) -> None:
        above = vhd_layer.read_head(parent)
        with open(path, 'r+b', buffering=0) as file:
            head = vhd_layer.head_of(file, path)
            name = os.path.basename(parent)
            # The path is a hint; what counts is in the header.
            at = next((
                locator.offset_bytes for locator in head.header.locators
                if locator.space_bytes >= SECTOR
            ), None)
            if at is not None:
                sector = vhd_layer.path_of(name).ljust(SECTOR, b'\0')
                self.kernel.write(file.fileno(), [sector], at)
            header = vhd_layer.linked(head.header, above, name, at)
            self.kernel.write(
                file.fileno(), [header.pack()],
                head.footer.header_offset_bytes,
            )

    def hide(self, path: str, is_hidden: bool) -> None:
        with open(path, 'r+b', buffering=0) as file:
            end = vhd_layer.head_of(file, path).file_bytes - SECTOR
            footer = bytearray(os.pread(file.fileno(), SECTOR, end))
            footer[vhd_layer.HIDDEN_AT] = is_hidden
            self._set_footer(file.fileno(), footer, end)

    def grow(self, path: str, size_bytes: int) -> None:
        layout.check_size(size_bytes, os.path.basename(path))
        with open(path, 'r+b', buffering=0) as file:
            head = vhd_layer.head_of(file, path)
            fd, end = file.fileno(), head.file_bytes - SECTOR
            if size_bytes > head.footer.size_bytes:
                end = self._grow_table(file, head, size_bytes)
            footer = bytearray(os.pread(fd, SECTOR, end))
            size = max(size_bytes, head.footer.size_bytes)
            footer[CURRENT_SIZE] = size.to_bytes(8, 'big')
            cylinders, heads, sectors = layout.geometry(size)
            footer[GEOMETRY] = (
                cylinders.to_bytes(2, 'big') + bytes((heads, sectors)))
            self._set_footer(fd, footer, end)

    def _grow_table(
        self, file: Any, head: vhd_layer.Head, size_bytes: int
    ) -> int:
        """Make room in the table; return where the last footer is."""
        header, end = head.header, head.file_bytes - SECTOR
        table = vhd_layer.table_of(file, header, file.name)
        # The last block may have been short: it gets its whole length.
        used = -(-head.footer.size_bytes // header.block_bytes)
        whole = dataclasses.replace(
            head.footer, size_bytes=used * header.block_bytes)
        for _ in layout.placed(
            layout.table(table)[:used], whole, header, end,
            os.path.basename(file.name),
        ):
            pass
        entries = -(-size_bytes // header.block_bytes)
        if entries <= header.entries:
            return end
        # Blocks stay where they are: the longer table goes to the end, and
        # a footer behind it, first.
        fd, at = file.fileno(), end + SECTOR
        table = table.ljust(-(-entries * 4 // SECTOR) * SECTOR, b'\xff')
        last = os.pread(fd, SECTOR, end)
        self.kernel.write(fd, [last], at + len(table))
        self.kernel.write(fd, [table], at)
        larger = dataclasses.replace(
            header, table_offset_bytes=at, entries=entries)
        self.kernel.write(
            fd, [larger.pack()], head.footer.header_offset_bytes)
        return at + len(table)

    def _set_footer(self, fd: int, footer: bytearray, end: int) -> None:
        """Write both footers; the last, which counts, comes last."""
        total = layout.checksum(footer, layout.FOOTER_SUM_AT)
        footer[SUM] = total.to_bytes(4, 'big')
        self.kernel.write(fd, [footer], 0)
        self.kernel.write(fd, [footer], end)


def _runs(
    layer: Layer, stop: Callable[[], bool] = disks.never
) -> Iterator[tuple[int, int, int | None]]:
    """Yield runs of one file: from, until, and where they are in it."""
    at = 0
    while at < layer.size_bytes:
        if stop():
            raise disks.Stopped
        until, where = layer.run(at, layer.size_bytes)
        yield at, until, where
        at = until


def _check_chain(layers: Sequence[Layer]) -> None:
    """Refuse files that are not each other's parents."""
    for child, parent in zip(layers, [*layers[1:], None], strict=True):
        name = os.path.basename(child.path)
        needs = child.head.footer.kind == layout.DIFFERENCING
        if needs != (parent is not None):
            raise errors.Invalid(
                f'{name} is refused: it '
                + ('has a parent, which is not given' if needs
                   else 'has no parent, but one is given')
            )
        if parent is None:
            continue
        wanted, got = child.head.header.parent_uuid, parent.head.footer.uuid
        if wanted != got:
            raise errors.Invalid(
                f'{name} is refused: its parent is the vhd {wanted}, not '
                f'{got}'
            )
