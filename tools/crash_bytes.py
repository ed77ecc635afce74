# SPDX-License-Identifier: Apache-2.0
"""What volumes must hold: blocks that name themselves, and zeros elsewhere.

A block is made of a token, and says which: whoever finds a wrong one can see
whose it is. Contents are kept as tokens, so that a volume costs some bytes
for each block that was written.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

BLOCK_BYTES = 4096
TOKEN_BYTES = 8
ZERO = 0  # the token of a block that nobody has written
_NOISE = random.Random(1).randbytes(2 * BLOCK_BYTES)
_ZEROS = bytes(BLOCK_BYTES)

# What a block may hold; the first is the likeliest. Several if a write was
# never answered.
Values = tuple[int, ...]
NOTHING: Values = (ZERO,)


def new_token(chance: random.Random) -> int:
    return chance.getrandbits(62) + 1


def block(token: int) -> bytes:
    """Return the bytes that a token stands for."""
    if token == ZERO:
        return _ZEROS
    start = token % BLOCK_BYTES
    return (
        token.to_bytes(TOKEN_BYTES, 'big')
        + _NOISE[start:start + BLOCK_BYTES - TOKEN_BYTES]
    )


def tell(found: bytes) -> str:
    """Say what a block holds."""
    if not found.strip(b'\0'):
        return 'zeros'
    token = int.from_bytes(found[:TOKEN_BYTES], 'big')
    whole = block(token) if 0 < token < 1 << 63 else b''
    if found == whole[:len(found)]:
        return f'block {token:x}'
    return f'garbage, beginning with {found[:16].hex()}'


class Content:
    """What each block of a volume may hold; those not listed are zero."""

    def __init__(self, blocks: Mapping[int, Values] | None = None) -> None:
        self.blocks: dict[int, Values] = dict(blocks or {})

    def copy(self) -> Content:
        return Content(self.blocks)

    def write(self, tokens: Mapping[int, int], is_durable: bool) -> None:
        """Write tokens; what is not known to be durable may be lost."""
        for number, token in tokens.items():
            before = () if is_durable else self.values(number)
            self.blocks[number] = tuple(dict.fromkeys((token, *before)))

    def allow(self, number: int, values: Iterable[int]) -> None:
        """Let a block hold something else as well."""
        there = self.values(number)
        self.blocks[number] = tuple(dict.fromkeys((*there, *values)))

    def values(self, number: int) -> Values:
        return self.blocks.get(number, NOTHING)

    def compare(self, offset_bytes: int, found: bytes) -> Iterator[str]:
        """Say which blocks differ; what was uncertain is known then."""
        first = offset_bytes // BLOCK_BYTES
        count = -(-len(found) // BLOCK_BYTES)
        likely = [self.values(first + n)[0] for n in range(count)]
        wanted = b''.join(map(block, likely)) if any(likely) else (
            bytes(count * BLOCK_BYTES)
        )
        if found == wanted[:len(found)]:
            for n, token in enumerate(likely):
                if len(self.values(first + n)) > 1:
                    self.blocks[first + n] = (token,)
            return
        for n in range(count):
            part = found[n * BLOCK_BYTES:(n + 1) * BLOCK_BYTES]
            number = first + n
            for token in self.values(number):
                if part == block(token)[:len(part)]:
                    if len(self.values(number)) > 1:
                        self.blocks[number] = (token,)
                    break
            else:
                wanted_words = ' or '.join(
                    f'block {token:x}' if token else 'zeros'
                    for token in self.values(number)
                )
                yield (
                    f'at {number * BLOCK_BYTES}: {tell(part)}, not '
                    f'{wanted_words}'
                )
