# SPDX-License-Identifier: Apache-2.0
"""Headers with absurd numbers: our inspector refuses, and stays small.

It runs inside the service, where no ``prlimit`` holds it.
"""

from __future__ import annotations

import io
import logging
import os
import random
import struct
import tracemalloc
import unittest

from tests import images
from tests.integration import hostile_case
from volume import errors
from volume.transfer import formats

ABSURD = (
    0, 1, 0xFF, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1,
    1 << 63, (1 << 64) - 512, (1 << 64) - 1,
)
ROUNDS = 2000 if os.environ.get('VOLUME_PROOF') else 40
# The head that is read is 2 MiB, and oslo's inspectors keep parts of it.
MEMORY_BYTES_MAX = 32 << 20


class Extremes(unittest.TestCase):
    def setUp(self) -> None:
        inspectors = logging.getLogger(
            'oslo_utils.imageutils.format_inspector')
        self.addCleanup(inspectors.setLevel, inspectors.level)
        inspectors.setLevel(logging.CRITICAL)  # it tells of each refusal

    def test_no_absurd_number_breaks_the_inspection(self) -> None:
        chance = random.Random(hostile_case.seed(self.id()))
        seeds = {
            name: (declared, make())
            for name, (declared, make, _) in images.HOSTILE.items()
        } | {
            'vhd': ('vhd', images.vhd(entries=(4,))),
            'vmdk': ('vmdk', images.vmdk(footer_sectors=16384)),
            'qcow2': ('qcow2', images.qcow2(extension=(0x1234, b'x' * 40))),
        }
        for name, (declared, data) in seeds.items():
            for round_ in range(ROUNDS):
                spoilt = self.spoilt(chance, data)
                for said in declared, None:
                    with self.subTest(name, round=round_, said=said):
                        self.inspect(spoilt, said)

    def inspect(self, data: bytes, said: str | None) -> None:
        try:
            info = formats.inspect(io.BytesIO(data), said)
        except errors.Invalid:
            return
        self.assertIn(info.format, formats.FORMATS)
        self.assertGreater(info.virtual_size_bytes, 0)

    def spoilt(self, chance: random.Random, data: bytes) -> bytes:
        spoilt = bytearray(data)
        for _ in range(chance.randrange(1, 3)):
            kind, order = chance.choice('IQ'), chance.choice('<>')
            number = chance.choice(ABSURD)
            end = min(len(spoilt), chance.choice((120, 600, 2200)))
            at = chance.randrange(0, max(1, end - 8)) & ~3
            if at + 8 <= len(spoilt):
                struct.pack_into(
                    order + kind, spoilt, at,
                    number & 0xFFFFFFFF if kind == 'I' else number,
                )
        for at in (0, len(spoilt) - images.SECTOR):
            footer = spoilt[at:at + images.SECTOR]
            if footer.startswith(b'conectix'):
                # Or the checksum would be all that is looked at.
                footer[64:68] = bytes(4)
                struct.pack_into(
                    '>I', spoilt, at + 64, ~sum(footer) & 0xFFFFFFFF)
        if spoilt[images.SECTOR:].startswith(b'cxsparse'):
            header = spoilt[images.SECTOR:images.SECTOR + 1024]
            header[36:40] = bytes(4)
            struct.pack_into(
                '>I', spoilt, images.SECTOR + 36, ~sum(header) & 0xFFFFFFFF)
        return bytes(spoilt)

    def test_no_image_makes_the_inspection_large(self) -> None:
        huge = images.vhd(
            size=1 << 31, block=512, count=4 << 20)
        cases = [make() for _, make, _ in images.HOSTILE.values()]
        # A table of 16 MiB, and a plain disk.
        for data in (*cases, huge, os.urandom(8 << 20)):
            image = io.BytesIO(data)
            del data
            tracemalloc.start()
            try:
                try:
                    formats.inspect(image)
                except errors.Invalid:
                    pass
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            self.assertLess(peak, MEMORY_BYTES_MAX)


if __name__ == '__main__':
    unittest.main()
