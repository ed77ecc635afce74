# SPDX-License-Identifier: Apache-2.0
"""Block nodes: what is refused, and how layers are named."""

from __future__ import annotations

import struct
import unittest
from typing import Any

from volume import blockgraph
from volume import errors


class BlockNodeTest(unittest.TestCase):
    def file(self, name: str = '/v/a') -> dict[str, Any]:
        return {'driver': 'file', 'filename': name}

    def test_block_nodes_that_leave_something_to_guess_are_refused(
        self
    ) -> None:
        bad: list[Any] = [
            {}, {'file': self.file()}, {'driver': 'raw', 'file': {}},
            {'driver': 'qcow2', 'file': self.file()},
            {'driver': 'raw', 'file': self.file('a')},
            {'driver': 'raw', 'file': self.file('/a\0b')},
            {'driver': 'raw', 'file': 'node'},
            {'driver': 'raw', 'file': {**self.file(), 'locking': 'off'}},
            {'driver': 'raw', 'file': self.file(), 'force-share': True},
            {'driver': 'raw', 'file': self.file(), 'backing': self.file()},
            {'driver': 'qcow2', 'file': self.file(), 'backing': 'x'},
            {'driver': 'raw', 'file': {'driver': 'raw',
                                       'file': self.file()}},
            None, 'raw',
        ]
        for node in bad:
            with self.subTest(node), self.assertRaises(errors.Invalid):
                blockgraph.parse(node)

    def test_names_fit_qemu_and_differ_by_what_they_mean(self) -> None:
        base = {'driver': 'qcow2', 'file': self.file('/v/b'),
                'backing': None}
        layers = [blockgraph.parse(node) for node in (
            base,
            {'driver': 'raw', 'file': self.file('/v/b')},
            {'driver': 'qcow2', 'file': self.file(), 'backing': base},
            {'driver': 'qcow2', 'file': self.file(), 'backing': None},
        )]
        names = [n for la in layers for n in (la.name, la.name_below)]
        self.assertEqual(len(names), len(set(names)))
        self.assertTrue(all(len(name) <= 31 for name in names))

    def test_endless_chain_is_refused(self) -> None:
        node: dict[str, Any] = {
            'driver': 'qcow2', 'file': self.file(), 'backing': None
        }
        node['backing'] = node
        with self.assertRaises(errors.Invalid):
            blockgraph.parse(node)

    def test_header_of_nonsense_is_an_error_of_ours(self) -> None:
        layer = blockgraph.parse(
            {'driver': 'qcow2', 'file': self.file(), 'backing': None}
        )
        far = struct.pack('>4sIQI', b'QFI\xfb', 3, 1 << 60, 0xFFFFFFFF)
        near = struct.pack('>4sIQI', b'QFI\xfb', 3, 20, 1023) + b'\xff\0' * 99
        for head in far, near, near[:30]:
            with self.assertRaises(errors.Corrupt):
                blockgraph.check_header(layer, head)


if __name__ == '__main__':
    unittest.main()
