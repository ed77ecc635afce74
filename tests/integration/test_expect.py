# SPDX-License-Identifier: Apache-2.0
"""What a writer is told to expect is what it then gets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from tests.integration import fill_case
from volume import model
from volume.drivers import base
from volume.drivers.file import FileDriver
from volume.flows import fill


class Hearing(base.Writer):
    """A writer that notes what it is told and what it is given."""

    def __init__(self, inner: base.Writer) -> None:
        self.inner = inner
        self.size_bytes = inner.size_bytes
        self.expected: list[model.Extent] | None = None
        self.written: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []
        self.is_committed = False

    def expect(self, extents: Iterable[model.Extent]) -> None:
        assert not self.written and not self.zeroed, 'told too late'
        self.expected = list(extents)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self.inner.seek(offset, whence)

    def write(self, data: Any, /) -> int:
        at = self.inner.tell()
        count = self.inner.write(data) or 0
        self.written.append((at, at + count))
        return count

    def tell(self) -> int:
        return self.inner.seek(0, os.SEEK_CUR)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        self.inner.zero(offset_bytes, length_bytes)
        self.zeroed.append((offset_bytes, offset_bytes + length_bytes))

    def commit(self) -> None:
        self.inner.commit()
        self.is_committed = True


class HearingDriver(FileDriver):
    """The file driver, without QEMU, with writers that note."""

    heard: Hearing

    @contextlib.contextmanager
    def writer(self, volume: model.Volume) -> Iterator[base.Writer]:
        with super().writer(volume) as inner:
            self.heard = Hearing(inner)
            yield self.heard


class Remote(fill_case.Remote):
    """It has no BlockNode: its bytes go through a writer."""

    def __init__(self, conf: Any, node: Any) -> None:
        super().__init__(conf, node)
        self.inner = HearingDriver(conf, node)
        for name in ('check', 'pools', 'create', 'delete', 'inspect', 'scan',
                     'reader', 'writer'):
            setattr(self, name, getattr(self.inner, name))


class ExpectTest(fill_case.Case):
    def setUp(self) -> None:
        super().setUp()
        self.remote: Any = self.make_driver(self.node, Remote)

    def check(self, volume: model.Volume, is_fresh: bool) -> Hearing:
        heard: Hearing = self.remote.inner.heard
        assert heard.expected is not None, 'nothing was told'
        self.assertTrue(heard.is_committed)
        at = 0
        for run in heard.expected:
            self.assertEqual(at, run.offset_bytes)
            at += run.length_bytes
        self.assertEqual(heard.size_bytes, at)
        data = [
            (run.offset_bytes, run.offset_bytes + run.length_bytes)
            for run in heard.expected if not run.is_zero
        ]
        for start, end in heard.written:
            self.assertTrue(
                any(low <= start and end <= high for low, high in data),
                f'{start} to {end} was to be zero',
            )
        if not is_fresh:
            at = 0
            for start, end in sorted(heard.written + heard.zeroed):
                self.assertEqual(at, start, 'a gap that was not told')
                at = end
            self.assertEqual(heard.size_bytes, at)
        self.assert_filled(volume)
        return heard

    def test_whatever_the_image_what_comes_was_told(self) -> None:
        for kind in 'raw', 'qcow2', 'vhd':
            for source, url in self.both(self.image(kind)):
                for is_fresh in True, False:
                    volume = self.volume(dirt=b'' if is_fresh else b'x')
                    with self.subTest(kind=kind, url=url, is_fresh=is_fresh):
                        self.fill(
                            volume, source, url, driver=self.remote,
                            declared_format=kind, fresh=is_fresh,
                        )
                        heard = self.check(volume, is_fresh)
                        self.assertTrue(
                            any(run.is_zero for run in heard.expected or ()))

    def test_what_a_copy_brings_was_told(self) -> None:
        source = self.volume()
        with open(self.path(source), 'r+b') as file:
            file.write(self.data)
        for is_fresh in True, False:
            volume = self.volume(dirt=b'' if is_fresh else b'x')
            fill.copy_volume(
                self.remote, source, self.remote, volume, node=self.node,
                fresh=is_fresh,
            )
            self.check(volume, is_fresh)
