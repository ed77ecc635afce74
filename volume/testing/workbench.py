# SPDX-License-Identifier: Apache-2.0
"""What the driver suites work with: things that are removed, and patterns.

A pattern is the whole content of a small volume, chosen so that a mistake
shows: bytes that differ by seed at the start, across a 64 KiB border in the
middle, and in the last sector; zeros between.
"""

from __future__ import annotations

import abc
import io
import random
import unittest
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TYPE_CHECKING

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base

if TYPE_CHECKING:
    Case = unittest.TestCase
else:
    Case = abc.ABC  # a suite is not to be run by itself

CHUNK_BYTES = 1 << 16
UPKEEP_MAX = 1000

Source = model.Volume | model.Snapshot


def pattern(seed: int, size_bytes: int) -> bytes:
    """Return a volume's content; another seed differs in each data run."""
    rng = random.Random(seed)
    image = bytearray(size_bytes)
    middle = size_bytes // 2 // CHUNK_BYTES * CHUNK_BYTES
    for start, length in (0, 4096), (middle - 2048, 4096), (-512, 512):
        start = max(0, start if start >= 0 else size_bytes + start)
        end = min(size_bytes, start + length)
        image[start:end] = rng.randbytes(end - start)
    return bytes(image)


def fill(driver: base.Driver, volume: model.Volume, image: bytes) -> None:
    """Make the volume hold the image, and durably."""
    with driver.writer(volume) as writer:
        for offset in range(0, len(image), CHUNK_BYTES):
            chunk = image[offset:offset + CHUNK_BYTES]
            if any(chunk):
                writer.seek(offset)
                write_all(writer, chunk)
            else:
                writer.zero(offset, len(chunk))
        writer.commit()


def write_all(writer: base.Writer, data: bytes) -> None:
    """Write all of it; a raw stream may take less at a time."""
    left = memoryview(data)
    while left:
        left = left[writer.write(left) or 0:]


def content(driver: base.Driver, source: Source) -> bytes:
    """Return all bytes of a volume or snapshot."""
    with driver.reader(source) as reader:
        return read_all(reader)


def read_all(reader: io.RawIOBase) -> bytes:
    image = bytearray()
    while chunk := reader.read(1 << 20):
        image += chunk
    return bytes(image)


def tend(driver: base.Driver, pool: str) -> None:
    """Do all the upkeep that there is."""
    if isinstance(driver, base.Upkeep):
        for _ in range(UPKEEP_MAX):
            if not driver.upkeep(pool):
                return
        raise AssertionError(f'upkeep had no end in {UPKEEP_MAX} pieces')


class Workbench(Case):
    """Makes volumes and snapshots for a test, and removes them after it."""

    size_bytes: ClassVar[int] = model.MIB
    """How large most volumes of the suite are."""

    pool_name: ClassVar[str | None] = None
    """The pool to test; the first one if this is ``None``."""

    pool_settings: ClassVar[Mapping[str, str] | None] = None
    """What ``create_pool`` needs; without it PoolAdmin is not tested."""

    host: ClassVar[model.Host] = model.Host(
        'host.example', ('127.0.0.1',), 'iqn.2024-01.example:host',
        'nqn.2014-08.org.nvmexpress:uuid:6f0c7d5e-1f6e-4a6c-9c59-5e6f1a2b3c4d',
    )
    """Who attaches, for drivers with NativeAccess."""

    @abc.abstractmethod
    def make_driver(self) -> base.Driver:
        """Return a driver that was not checked yet.

        Called again in the same test it must find the same storage: make
        the storage in ``setUp``, before ``super().setUp()``.
        """

    def make_foreign(self, pool: str, image: bytes) -> str | None:
        """Put something that is not ours into the pool; return its handle.

        ``None``, as here, leaves out the claims about foreign things.
        """
        return None

    def setUp(self) -> None:
        super().setUp()
        self.driver: Any = self.make_driver()
        self.driver.check()
        self.pool = self._choose_pool()
        before = self.handles()
        self.addCleanup(self._check_nothing_left, before)

    # What a test needs.

    def need(self, *features: type) -> Any:
        """Return the driver; skip the test if the pool lacks a feature."""
        for feature in features:
            if feature.__name__ not in self.pool.features:
                self.skipTest(f'no {feature.__name__}')
        return self.driver

    def restart(self) -> Any:
        """Forget the driver; go on with a new one on the same storage."""
        self.driver = self.make_driver()
        self.driver.check()
        return self.driver

    # Things.

    def wish(self, size_bytes: int | None = None) -> model.Volume:
        """Return a volume that is not made yet, removed with the test."""
        volume = model.Volume(
            ids.new(), self.pool.name, self.size(size_bytes)
        )
        self.addCleanup(lambda: self.driver.delete(volume))
        return volume

    def volume(
        self, seed: int | None = None, size_bytes: int | None = None
    ) -> model.Volume:
        """Make a volume, and fill it with the seed's pattern."""
        volume = self.wish(size_bytes)
        self.driver.create(volume)
        if seed is not None:
            fill(self.driver, volume, pattern(seed, volume.size_bytes))
        return volume

    def snapshot(self, volume: model.Volume) -> model.Snapshot:
        snapshot = self.snapshot_wish(volume)
        self.driver.snapshot(snapshot)
        return snapshot

    def snapshot_wish(self, volume: model.Volume) -> model.Snapshot:
        """Return a snapshot not taken yet, removed with the test."""
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        self.addCleanup(lambda: self.driver.delete_snapshot(snapshot))
        return snapshot

    def clone(
        self, source: Source, size_bytes: int | None = None
    ) -> model.Volume:
        volume = self.wish(size_bytes or source.size_bytes)
        self.driver.clone(source, volume)
        return volume

    def size(self, size_bytes: int | None = None) -> int:
        """Return the size, or the suite's, in whole grains of the pool."""
        grain = self.pool.granularity_bytes
        return -(-(size_bytes or self.size_bytes) // grain) * grain

    # Bytes.

    def fill(self, volume: model.Volume, seed: int) -> bytes:
        image = pattern(seed, volume.size_bytes)
        fill(self.driver, volume, image)
        return image

    def assert_holds(self, source: Source, image: bytes) -> None:
        """Fail unless it holds the image, and zeros behind it."""
        found = content(self.driver, source)
        self.assertLessEqual(len(image), len(found), 'it is too short')
        image += bytes(len(found) - len(image))
        if found != image:
            offset = next(
                at for at, pair in enumerate(zip(found, image, strict=True))
                if pair[0] != pair[1]
            )
            self.fail(f'wrong bytes from offset {offset} of {len(image)}')

    def assert_seed(self, source: Source, seed: int) -> None:
        self.assert_holds(source, pattern(seed, source.size_bytes))

    def assert_absent(self, source: Source) -> None:
        """Fail unless nothing is there under the name of the source."""
        with self.assertRaises(errors.NotFound):
            with self.driver.reader(source):
                pass
        self.assertNotIn(source.id, [found.id for found in self.scan()])

    def scan(self) -> list[model.Found]:
        return list(self.driver.scan(self.pool.name))

    def handles(self) -> dict[str, int]:
        """Return handle and size of everything in the pool."""
        return {found.handle: found.size_bytes for found in self.scan()}

    def found(self, thing_id: str) -> Iterator[model.Found]:
        return (found for found in self.scan() if found.id == thing_id)

    def _choose_pool(self) -> model.Pool:
        pools: dict[str, model.Pool] = {
            pool.name: pool for pool in self.driver.pools()
        }
        return pools[self.pool_name or next(iter(pools))]

    def _check_nothing_left(self, before: dict[str, int]) -> None:
        tend(self.driver, self.pool.name)
        self.assertEqual(before, self.handles(), 'the test left something')
