# SPDX-License-Identifier: Apache-2.0
"""Paths that somebody uses without having them open."""

from __future__ import annotations

import contextlib
import os
import subprocess
import unittest
from collections.abc import Iterator

from volume import errors
from volume import ids
from volume import model
from volume.connector import disks
from volume.exports.base import Export
from volume.exports.local import LocalExporter
from volume.node import Node
from volume.testing import fixtures

SIZE = 16 << 20
COMMAND_S = 60


class LoopTest(unittest.TestCase):
    """The kernel has no descriptor, no holder and no claim of such a file."""

    def setUp(self) -> None:
        self.node = Node(fixtures.state_dir(self))
        self.exporter = LocalExporter(None, self.node)
        self.exporter.check()
        self.path = os.path.join(fixtures.directory(self), 'volume.raw')
        with open(self.path, 'wb') as f:
            f.truncate(SIZE)

    def attach(self, path: str, is_block: bool) -> str:
        attachment_id = ids.new()
        self.exporter.export(Export(
            attachment_id, ids.new(), model.Device(path, is_block),
            model.Host('h'), model.Access.WRITE, SIZE,
        ))
        return attachment_id

    @contextlib.contextmanager
    def loop(self, path: str) -> Iterator[str]:
        """Have a loop device over a file, or over another device."""
        made = subprocess.run(
            ['losetup', '--find', '--show', path], capture_output=True,
            text=True, timeout=COMMAND_S,
        )
        if made.returncode:
            self.skipTest(f'no loop device: {made.stderr.strip():.200}')
        device = made.stdout.strip()
        try:
            yield device
        finally:
            subprocess.run(
                ['losetup', '--detach', device], check=True,
                timeout=COMMAND_S,
            )

    def test_file_is_not_taken_away_under_a_loop_device(self) -> None:
        attached = self.attach(self.path, is_block=False)
        with self.loop(self.path):
            with self.assertRaisesRegex(errors.Busy, 'device loop'):
                self.exporter.unexport(attached)
            self.assertEqual({attached}, self.exporter.exported())
        self.exporter.unexport(attached)

    def test_nor_is_a_device(self) -> None:
        with self.loop(self.path) as device:
            attached = self.attach(device, is_block=True)
            with self.loop(device):
                with self.assertRaisesRegex(errors.Busy, 'device loop'):
                    self.exporter.unexport(attached)
                with self.assertRaisesRegex(errors.Busy, 'device loop'):
                    disks.need_free(self.node, device, 'v')
            self.exporter.unexport(attached)
