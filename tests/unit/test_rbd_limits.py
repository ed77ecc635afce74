# SPDX-License-Identifier: Apache-2.0
"""Limits of an image are two words in its metadata, set one by one."""

from __future__ import annotations

import errno
import types
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.drivers.rbd.images import Images
from volume.drivers.rbd.link import Link
from volume.testing import fixtures

LIMITS = model.IoLimits(500, 1 << 20)


class Raw:
    """An image whose metadata can be set so many times."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.metadata: dict[str, str] = {}

    def metadata_set(self, key: str, value: str) -> None:
        if len(self.metadata) == self.count:
            raise OSError(errno.EPERM, 'not permitted')
        self.metadata[key] = value

    def close(self) -> None:
        """Nothing is open."""


class LimitTest(unittest.TestCase):

    def limit(self, raw: Raw) -> None:
        wire = types.SimpleNamespace(
            failures=(OSError,), close=lambda: None, ioctx=lambda pool: None,
            rbd=types.SimpleNamespace(Image=lambda *args: raw),
        )
        link = Link(
            None, fixtures.make_node(self), lambda settings: wire)
        Images(link).limit(model.Volume(ids.new(), 'p', model.MIB), LIMITS)

    def test_first_that_is_refused_has_changed_nothing(self) -> None:
        raw = Raw(0)
        with self.assertRaises(errors.Denied):
            self.limit(raw)
        self.assertEqual({}, raw.metadata)

    def test_second_that_is_refused_is_told_as_something_that_happened(
        self
    ) -> None:
        raw = Raw(1)
        with self.assertRaisesRegex(errors.Unknown, 'one limit.*forbid'):
            self.limit(raw)
        self.assertEqual(['500'], [*raw.metadata.values()])
