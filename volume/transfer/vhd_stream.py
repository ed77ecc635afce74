# SPDX-License-Identifier: Apache-2.0
"""A VHD that comes over a wire: read forward once, blocks as they come.

The table comes before the blocks, so that what each block is, is known when
it arrives; their order is the sender's. What was sent is whole only when
``runs`` has ended by itself: the last thing it looks at is the footer. Until
then nothing may be committed.
"""

from __future__ import annotations

import array
import uuid as uuids
from collections.abc import Iterator

from volume import errors
from volume.model import Extent
from volume.model import MIB
from volume.model import SECTOR_BYTES as SECTOR
from volume.transfer import vhd
from volume.transfer import vhd_layout as layout
from volume.transfer.base import Opened
from volume.transfer.copy import ZERO_BYTES
from volume.transfer.copy import ZEROS

PIECE_BYTES = 2 * MIB  # of data: what a page of bitmap speaks of
# What may follow the last block of a stream whose length nobody has said.
SLACK_BYTES_MAX = 64 * MIB

assert PIECE_BYTES == vhd.PAGE_BYTES * 8 * SECTOR


class Stream:
    """A VHD on its way.

    ``facts`` and ``size_bytes`` are known at once; of a fixed one, whose
    footer comes last, ``facts`` are known in the end.
    """

    def __init__(
        self,
        source: Opened,
        *,
        length_bytes: int | None = None,
        parent_uuid: str | None = None,
        takes_any_parent: bool = False,
        name: str = 'vhd',
    ) -> None:
        """Read the head of it.

        ``length_bytes`` is how much there is, if the sender has said so;
        a fixed VHD cannot be told without it. ``parent_uuid`` is the parent
        that a differencing VHD must have; without it none is taken, unless
        the caller knows otherwise whose changes they are
        (``takes_any_parent``).

        :raises Invalid: it is refused, and why
        """
        self._name = name
        self._takes_any_parent = takes_any_parent
        self._source = source
        self._length = length_bytes
        self._at = 0
        self._buffer = bytearray(PIECE_BYTES)
        self.facts: vhd.Facts | None = None
        self._table = array.array('I')
        if length_bytes is not None and length_bytes % SECTOR:
            raise self._refused(f'has {length_bytes} bytes, no whole sectors')
        self._first = self._read(SECTOR)
        if self._first.startswith(layout.COOKIE):
            self._read_head(parent_uuid)
            return
        if length_bytes is None or length_bytes <= SECTOR:
            raise errors.Invalid(
                f'{name} is refused: it does not begin as a vhd; a fixed one '
                'can be read if its length is told'
            )
        if parent_uuid is not None:
            raise self._refused('has no parent, but one is given')
        self.size_bytes = length_bytes - SECTOR
        layout.check_size(self.size_bytes, name)

    def blocks(self) -> Iterator[Extent]:
        """Yield runs that cover the disk, by which blocks will come.

        What is zero here does not come; this is known before the first byte
        of a block.
        """
        if self.facts is None:
            yield Extent(0, self.size_bytes, False)
            return
        header = self.facts.header
        assert header is not None
        start, was_zero = 0, True
        for block in range(-(-self.size_bytes // header.block_bytes)):
            at = block * header.block_bytes
            is_zero = self._table[block] == layout.UNUSED
            if is_zero != was_zero:
                if at > start:
                    yield Extent(start, at - start, was_zero)
                start, was_zero = at, is_zero
        yield Extent(start, self.size_bytes - start, was_zero)

    def runs(self) -> Iterator[tuple[int, memoryview]]:
        """Yield offsets in the disk and their bytes.

        Bytes are to be used before the next are asked for. What is not
        yielded is zero, or the parent's: of a differencing VHD zeros are
        yielded, too.

        :raises Invalid: it was cut off, or is not what its head has said
        """
        if self.facts is None:
            yield from self._fixed()
        else:
            yield from self._blocks(self.facts)

    def _read_head(self, parent_uuid: str | None) -> None:
        name = self._name
        footer = layout.Footer.parse(self._first, name)
        layout.check_size(footer.size_bytes, name)
        if footer.kind == layout.FIXED:
            raise self._refused('is fixed, but begins with a footer')
        self._skip_to(footer.header_offset_bytes, 'header')
        header = layout.Header.parse(
            self._read(layout.HEADER_BYTES), footer.size_bytes, name)
        self.facts = vhd.Facts(footer, header)
        self.size_bytes = footer.size_bytes
        self._check_parent(self.facts, header, parent_uuid)
        self._skip_to(header.table_offset_bytes, 'table')
        left = header.entries * 4
        # In pieces: how many entries there are is only claimed.
        while left:
            piece = self._read(min(left, PIECE_BYTES))
            self._table.extend(layout.table(piece))
            left -= len(piece)

    def _check_parent(
        self, facts: vhd.Facts, header: layout.Header, wanted: str | None
    ) -> None:
        if wanted is None:
            if facts.needs_parent and not self._takes_any_parent:
                raise errors.Invalid(
                    f'{self._name} is refused: it is a differencing vhd, '
                    f'whose parent {header.parent_uuid} is elsewhere'
                )
            return
        if not facts.needs_parent:
            raise self._refused('has no parent, but one is given')
        if header.parent_uuid != str(uuids.UUID(wanted)):
            raise self._refused(
                f'has the parent {header.parent_uuid}, not {wanted}')

    def _fixed(self) -> Iterator[tuple[int, memoryview]]:
        if any(self._first):
            yield 0, memoryview(self._first)
        while self._at < self.size_bytes:
            at = self._at
            length = len(self._fill(min(PIECE_BYTES, self.size_bytes - at)))
            yield from self._data(at, 0, length)
        footer = layout.Footer.parse(self._read(SECTOR), self._name)
        self._end()
        if footer.kind != layout.FIXED:
            raise self._refused(
                f'does not begin as one of type {footer.kind} does')
        if footer.size_bytes != self.size_bytes:
            raise self._refused(
                f'says that its disk has {footer.size_bytes} bytes; it has '
                f'{self.size_bytes}'
            )
        self.facts = vhd.Facts(footer, None)

    def _blocks(self, facts: vhd.Facts) -> Iterator[tuple[int, memoryview]]:
        footer, header = facts.footer, facts.header
        assert header is not None
        end = None if self._length is None else self._length - SECTOR
        for offset, block in layout.placed(
            self._table, footer, header, end, self._name
        ):
            self._skip_to(offset, f'block {block}')
            bitmap = self._read(header.bitmap_bytes)
            start = block * header.block_bytes
            length = layout.block_length(footer, header, block)
            for inside in range(0, length, PIECE_BYTES):
                piece = self._fill(min(PIECE_BYTES, length - inside))
                at = inside // PIECE_BYTES * vhd.PAGE_BYTES
                page = int.from_bytes(
                    bitmap[at:at + vhd.PAGE_BYTES], 'big')
                for low, high in _set(page, len(piece)):
                    if facts.needs_parent:
                        yield start + inside + low, piece[low:high]
                    else:
                        yield from self._data(start + inside, low, high)
        last = self._last_sector()
        layout.check_twins(
            footer, layout.Footer.parse(last, self._name), self._name)

    def _data(
        self, at: int, start: int, end: int
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield what of a run is not zero; ``at`` is where the piece lies."""
        view = memoryview(self._buffer)
        for low in range(start, end, ZERO_BYTES):
            high = min(low + ZERO_BYTES, end)
            if self._buffer.startswith(ZEROS[:high - low], low):
                if low > start:
                    yield at + start, view[start:low]
                start = high
        if start < end:
            yield at + start, view[start:end]

    def _last_sector(self) -> bytes:
        """Read what is left; return the end of it."""
        last, slack = b'', 0
        while True:
            view = self._some(PIECE_BYTES)
            if not view:
                break
            last = (last + bytes(view))[-SECTOR:]
            slack += len(view)
            if slack > SLACK_BYTES_MAX and self._length is None:
                raise self._refused('goes on and on behind its last block')
            if self._length is not None and self._at > self._length:
                break
        self._check_length()
        return last

    def _end(self) -> None:
        if self._some(1):
            raise self._refused('goes on behind its footer')
        self._check_length()

    def _check_length(self) -> None:
        if self._length is not None and self._at != self._length:
            raise self._refused(
                f'has {self._length} bytes, but {self._at} came')

    def _skip_to(self, offset: int, what: str) -> None:
        if offset < self._at:
            raise errors.Invalid(
                f'{self._name} is refused: its {what} comes too early for '
                'a stream; store the file, and read it there'
            )
        end = self._length
        if end is None:
            end = self._at + SLACK_BYTES_MAX
        if offset > end:
            raise self._refused(f'has its {what} far away, beyond any end')
        while self._at < offset:
            self._fill(min(PIECE_BYTES, offset - self._at))

    def _read(self, length: int) -> bytes:
        return bytes(self._fill(length))

    def _fill(self, length: int) -> memoryview:
        """Read exactly so much; what was read before is gone."""
        have = 0
        whole = memoryview(self._buffer)[:length]
        while have < length:
            count = self._source.readinto(whole[have:])
            if not count:
                raise self._refused(f'is cut off at byte {self._at}')
            have += count
            self._at += count
        return whole

    def _some(self, length: int) -> memoryview:
        view = memoryview(self._buffer)[:length]
        count = self._source.readinto(view) or 0
        self._at += count
        return view[:count]

    def _refused(self, why: str) -> errors.Invalid:
        return errors.Invalid(f'{self._name} is refused: the vhd {why}')


def _set(page: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of bytes whose bits are set."""
    at = 0
    while at < length:
        is_set, sectors = vhd.run_of_bits(page, at // SECTOR)
        end = min(length, at + sectors * SECTOR)
        if is_set:
            yield at, end
        at = end
