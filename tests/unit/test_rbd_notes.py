# SPDX-License-Identifier: Apache-2.0
"""What stands in an image's metadata, where any host may write."""

from __future__ import annotations

import unittest

from volume import model
from volume.drivers.rbd import guests
from volume.drivers.rbd import headers
from volume.drivers.rbd import images
from volume.drivers.rbd import names

A = model.Host('a', ('192.0.2.1',))
WHOLE = guests.entry(A, ['192.0.2.1'], 'rw')
BROKEN = (
    '', '{', '[]', 'null', '7', '{"a": 1}', '{"name": 7, "addresses": []}',
    '{"name": "a"}', '{"name": "a", "addresses": "192.0.2.1"}',
    '{"name": "a", "addresses": [1]}', '{"name": "b", "addresses": []}',
    '{"name": "\\ud800", "addresses": []}', '[' * 65000, '1' * 5000,
    '{"name": "a", "addresses": [], "x": ' + '[' * 900 + ']' * 900 + '}' * 9,
)


class GuestsTest(unittest.TestCase):

    def test_host_is_read_as_it_was_written(self) -> None:
        found = guests.read({names.host('a'): WHOLE, names.ID: 'x'})
        self.assertEqual(((A,), ()), (found.hosts, found.unreadable))

    def test_broken_entry_is_a_host_that_nobody_knows(self) -> None:
        for text in BROKEN:
            with self.subTest(text[:40]):
                found = guests.read({names.host('a'): text})
                self.assertEqual(
                    ((), (names.host('a'),)),
                    (found.hosts, found.unreadable))
                self.assertTrue(found)
                self.assertIn('nobody knows', str(found))

    def test_entry_under_the_key_of_another_host_is_broken(self) -> None:
        found = guests.read({names.host('b'): WHOLE})
        self.assertEqual((names.host('b'),), found.unreadable)

    def test_key_that_was_never_ours_is_nobody(self) -> None:
        for key in f'{names.HOST}zz', names.HOST, f'{names.host("a")}0':
            self.assertFalse(guests.read({key: WHOLE}))


class NotesTest(unittest.TestCase):

    def test_note_that_is_no_json_or_no_text_is_none(self) -> None:
        for text in ('{', '[' * 65000, '1' * 5000, '"\\udfff"'):
            self.assertIsNone(headers.parse(text), text[:40])
        self.assertEqual({'a': 'ä'}, headers.parse('{"a": "ä"}'))

    def test_size_that_no_image_has_is_none(self) -> None:
        for text in ('', '-1', '1e3', '٣', '9' * 20, '9' * 65000, ' 1'):
            self.assertEqual(0, images.noted_bytes(text), text[:40])
        self.assertEqual(512, images.noted_bytes('512'))
        self.assertEqual(
            images.MAX_BYTES, images.noted_bytes(str(images.MAX_BYTES)))
