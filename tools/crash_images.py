# SPDX-License-Identifier: Apache-2.0
"""The images that volumes are made from: blocks that name themselves."""

from __future__ import annotations

import os
import random

from crash_bytes import block
from crash_bytes import BLOCK_BYTES
from crash_bytes import Content
from crash_bytes import new_token
from crash_model import Thing
from demo_family import Family

MIB = 1 << 20
# Name, bytes of the disk, how many of its blocks of a MiB have data.
SIZES = (('small', 6 * MIB, 3), ('large', 32 * MIB, 28))


def make(family: Family, directory: str) -> dict[str, Thing]:
    """Make each image twice, raw and qcow2; return what they hold."""
    chance = random.Random(7)
    found = {}
    for name, size_bytes, count in SIZES:
        raw, qcow2 = (
            os.path.join(directory, f'{name}.{each}')
            for each in ('raw', 'qcow2')
        )
        thing = Thing(size_bytes, Content())
        with open(raw, 'wb') as f:
            f.truncate(size_bytes)
            for start in chance.sample(range(size_bytes // MIB), count):
                for number in range(
                    start * MIB // BLOCK_BYTES,
                    (start + 1) * MIB // BLOCK_BYTES,
                ):
                    token = new_token(chance)
                    thing.content.blocks[number] = (token,)
                    f.seek(number * BLOCK_BYTES)
                    f.write(block(token))
        family.run(
            'qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, qcow2
        )
        for path in raw, qcow2:
            found[os.path.basename(path)] = thing
    return found
