# SPDX-License-Identifier: Apache-2.0
"""A VHD as the disk in it: read at any offset, with its chain of parents.

The caller names every file of a chain; no path that stands in a VHD is
followed. That the files belong together is told by their uuids.

Three modules go with this one: ``vhd_layout`` has the fields, ``vhd_stream``
reads a VHD that comes over a wire, and ``vhd_write`` makes one.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from volume import errors
from volume.model import Extent
from volume.model import SECTOR_BYTES as SECTOR
from volume.transfer import vhd_layout as layout
from volume.transfer.base import Opened

DEPTH_MAX = 64  # twice of what storage managers allow
PAGE_BYTES = SECTOR  # of bitmaps, read and kept: 2 MiB of the disk
PAGES = 1024
TABLE_PIECE_BYTES = 1 << 20
LOCATOR_BYTES_MAX = 4096
ENCODINGS = {
    b'W2ru': 'utf-16-le', b'W2ku': 'utf-16-le', layout.MAC_URL: 'utf-8',
}


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What a VHD says of itself; a fixed one has no header."""

    footer: layout.Footer
    header: layout.Header | None

    @property
    def needs_parent(self) -> bool:
        """Whether the disk is in other files, too."""
        return self.footer.kind == layout.DIFFERENCING


def look(file: Opened, name: str = 'vhd') -> Facts:
    """Read what a whole VHD says of itself.

    :raises Invalid: it is none, damaged, or cut off
    """
    length = file.seek(0, os.SEEK_END)
    last = layout.Footer.parse(
        layout.read_at(file, max(0, length - SECTOR), SECTOR), name)
    layout.check_size(last.size_bytes, name)
    head = layout.read_at(file, 0, SECTOR)
    if last.kind == layout.FIXED:
        if last.size_bytes > length - SECTOR:
            raise errors.Invalid(
                f'{name} is refused: it holds less than its '
                f'{last.size_bytes} bytes'
            )
        if length > SECTOR and head.startswith(layout.COOKIE):
            raise errors.Invalid(
                f'{name} is refused: it is a fixed vhd by its end and '
                'another by its start'
            )
        return Facts(last, None)
    layout.check_twins(layout.Footer.parse(head, name), last, name)
    header = layout.Header.parse(
        layout.read_at(
            file, last.header_offset_bytes, layout.HEADER_BYTES),
        last.size_bytes, name,
    )
    return Facts(last, header)


def parent_paths(file: Opened, header: layout.Header) -> list[str]:
    """Return where a VHD says that its parent is, to show to a person."""
    found = [header.parent_name] if header.parent_name else []
    for locator in header.locators:
        encoding = ENCODINGS.get(locator.platform)
        if encoding and locator.length_bytes <= LOCATOR_BYTES_MAX:
            data = layout.read_at(
                file, locator.offset_bytes, locator.length_bytes)
            found.append(layout.decode(data, encoding))
    return found


class Disk(io.RawIOBase):
    """The disk in a VHD: raw, seekable, with ``readinto``.

    It has what a driver's ``Reader`` has. Not for two threads at once.
    """

    def __init__(
        self,
        files: Sequence[Opened],
        *,
        name: str = 'vhd',
        are_times_kept: bool = True,
    ) -> None:
        """Open a VHD and the files that it needs, each before its parent.

        ``are_times_kept`` says that a parent's time is what its child wrote
        down. It is false for what a XenAPI server sends: it writes down when
        the file was changed, and zero as the time of what it sends.

        :raises Invalid: one is damaged, or they do not belong together
        """
        if not 0 < len(files) <= DEPTH_MAX:
            raise errors.Invalid(
                f'{name} is refused: a chain of {len(files)} vhd files; '
                f'1 to {DEPTH_MAX} can be read'
            )
        facts = [
            look(file, _called(name, index))
            for index, file in enumerate(files)
        ]
        _check_chain(facts, name, are_times_kept)
        self._layers = [
            _layer(file, found, _called(name, index))
            for index, (file, found)
            in enumerate(zip(files, facts, strict=True))
        ]
        self.facts = facts[0]
        self.size_bytes = facts[0].footer.size_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {
            os.SEEK_SET: 0, os.SEEK_CUR: self._at,
            os.SEEK_END: self.size_bytes,
        }[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast('B')
        start = self._at
        end = max(start, min(start + len(view), self.size_bytes))
        for at, until, layer, offset in self._runs(start, end):
            part = view[at - start:until - start]
            if layer is None:
                part[:] = bytes(len(part))
            else:
                layer.read(offset, part)
        self._at = end
        return end - start

    def extents(self) -> Iterator[Extent]:
        """Yield runs in ascending order that cover ``size_bytes``.

        What was written is not zero, even if zeros were written.
        """
        start, was_zero = 0, True
        for at, _, layer, _ in self._runs(0, self.size_bytes):
            is_zero = layer is None
            if is_zero != was_zero:
                if at > start:
                    yield Extent(start, at - start, was_zero)
                start, was_zero = at, is_zero
        yield Extent(start, self.size_bytes - start, was_zero)

    def _runs(
        self, at: int, end: int
    ) -> Iterator[tuple[int, int, _Layer | None, int]]:
        """Yield runs: from, until, in which layer, where in its file."""
        while at < end:
            until, found, offset = end, None, 0
            for layer in self._layers:
                if at >= layer.size_bytes:
                    # A disk that has grown since: its parent ends here.
                    break
                stop, where = layer.run(at, until)
                until = min(until, stop)
                if where is not None:
                    found, offset = layer, where
                    break
            yield at, until, found, offset
            at = until


class _Layer:
    """One file of a chain: a fixed VHD."""

    def __init__(self, file: Opened, footer: layout.Footer, name: str) -> None:
        self._file = file
        self._name = name
        self.size_bytes = footer.size_bytes

    def run(self, at: int, end: int) -> tuple[int, int | None]:
        """Return until where bytes lie together, and where in the file.

        Without the latter they are not in this file.
        """
        return min(end, self.size_bytes), at

    def read(self, offset: int, view: memoryview) -> None:
        """Fill the view from the file."""
        self._file.seek(offset)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise errors.Corrupt(
                    f'{self._name} was cut off while it was read')
            view = view[count:]


class _Blocks(_Layer):
    """One file of a chain: a dynamic or differencing VHD."""

    def __init__(
        self,
        file: Opened,
        footer: layout.Footer,
        header: layout.Header,
        name: str,
    ) -> None:
        super().__init__(file, footer, name)
        self._header = header
        self._table = _table(file, header, name)
        end = file.seek(0, os.SEEK_END) - layout.FOOTER_BYTES
        used = array.array('I', sorted(
            block for _, block
            in layout.placed(self._table, footer, header, end, name)
        ))
        self._used = used
        self._pages: dict[tuple[int, int], int] = {}

    def run(self, at: int, end: int) -> tuple[int, int | None]:
        end = min(end, self.size_bytes)
        block_bytes = self._header.block_bytes
        block, inside = divmod(at, block_bytes)
        entry = self._table[block]
        if entry == layout.UNUSED:
            index = bisect.bisect_left(self._used, block)
            if index < len(self._used):
                end = min(end, self._used[index] * block_bytes)
            return end, None
        # A page of the bitmap at a time, and no further than its block.
        page, bit = divmod(inside // SECTOR, PAGE_BYTES * 8)
        is_set, sectors = run_of_bits(self._page(block, page), bit)
        stop = min(
            end, (block + 1) * block_bytes,
            at - at % SECTOR + sectors * SECTOR,
        )
        if not is_set:
            return stop, None
        data = entry * SECTOR + self._header.bitmap_bytes
        return stop, data + inside

    def _page(self, block: int, page: int) -> int:
        key = block, page
        bits = self._pages.get(key)
        if bits is None:
            data = bytearray(PAGE_BYTES)
            self.read(
                self._table[block] * SECTOR + page * PAGE_BYTES,
                memoryview(data),
            )
            bits = int.from_bytes(data, 'big')
            if len(self._pages) >= PAGES:
                del self._pages[next(iter(self._pages))]
            self._pages[key] = bits
        return bits


def run_of_bits(page: int, bit: int) -> tuple[bool, int]:
    """Return a bit of a page of bitmap, and how many from there are alike.

    The first bit is the highest.
    """
    left = PAGE_BYTES * 8 - bit
    mask = (1 << left) - 1
    rest = page & mask
    is_set = bool(rest >> (left - 1))
    if is_set:
        rest ^= mask
    return is_set, left - rest.bit_length()


def _check_chain(
    facts: Sequence[Facts], name: str, are_times_kept: bool
) -> None:
    """Refuse files that are not each other's parents."""
    for index, (child, parent) in enumerate(
        itertools.pairwise(facts)
    ):
        called = _called(name, index)
        if child.header is None or not child.needs_parent:
            raise errors.Invalid(
                f'{called} is refused: it has no parent, but one is given')
        wanted, got = child.header.parent_uuid, parent.footer.uuid
        if wanted != got:
            raise errors.Invalid(
                f'{called} is refused: its parent is the vhd {wanted}, not '
                f'{got}'
            )
        if are_times_kept and (
            child.header.parent_timestamp != parent.footer.timestamp
        ):
            raise errors.Invalid(
                f'{called} is refused: its parent was changed since, by '
                'their times'
            )
    if facts[-1].needs_parent:
        raise errors.Invalid(
            f'{_called(name, len(facts) - 1)} is refused: it is a '
            'differencing vhd, whose parent is elsewhere; give its parent, '
            'too'
        )
    seen = [found.footer.uuid for found in facts]
    if len(set(seen)) != len(seen):
        raise errors.Invalid(
            f'{name} is refused: its chain comes back to the same vhd')


def _layer(file: Opened, facts: Facts, name: str) -> _Layer:
    if facts.header is None:
        return _Layer(file, facts.footer, name)
    return _Blocks(file, facts.footer, facts.header, name)


def _table(
    file: Opened, header: layout.Header, name: str
) -> array.array[int]:
    entries = array.array('I')
    left, at = header.entries * 4, header.table_offset_bytes
    # In pieces: how many entries there are is only claimed.
    while left:
        data = layout.read_at(file, at, min(left, TABLE_PIECE_BYTES))
        if not data or len(data) % 4:
            raise errors.Invalid(
                f'{name} is refused: its vhd table is cut off')
        entries.extend(layout.table(data))
        left -= len(data)
        at += len(data)
    return entries


def _called(name: str, index: int) -> str:
    return f'{name}, parent {index} up,' if index else name
