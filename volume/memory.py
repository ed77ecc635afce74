# SPDX-License-Identifier: Apache-2.0
"""What this process takes of the machine's memory, kept small.

The C library gives threads heaps of their own, up to eight for each
processor, and what one of them has freed no other uses. With our dozens of
threads, each of which makes a long list now and then, a third of the memory
would be such leftovers. Python's threads run one at a time: two heaps do.
"""

from __future__ import annotations

import ctypes

ARENA_MAX = -8  # malloc.h: M_ARENA_MAX
ARENAS = 2


def use_few_heaps() -> bool:
    """Say whether the C library obeyed; before there are threads."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    return mallopt is not None and bool(mallopt(ARENA_MAX, ARENAS))
