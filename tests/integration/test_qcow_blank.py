# SPDX-License-Identifier: Apache-2.0
"""Empty layers: qemu-img makes the first of a size, we the next ones."""

import os
import subprocess
import unittest

from tests.integration.qcow_case import MIB
from tests.integration.qcow_case import QcowCase
from volume.drivers import qcow_blank

SIZES = (512, MIB, MIB + 512, 5 << 30, 1 << 40)


class BlankTest(QcowCase):

    def setUp(self):
        super().setUp()
        self.commands = []

    def layer(self, size_bytes):
        """Return the bytes of a new volume's layer."""
        before = set(self.layers())
        act, self.node.act = self.node.act, self.note(self.node.act)
        self.driver.create(self.wish(size_bytes))
        self.node.act = act
        name, = set(self.layers()) - before
        with open(os.path.join(self.directory, 'layers', name), 'rb') as f:
            return f.read()

    def layers(self):
        return os.listdir(os.path.join(self.directory, 'layers'))

    def note(self, act):
        def noted(what, effect):
            if what.startswith('run qemu-img create'):
                self.commands.append(what)
            return act(what, effect)
        return noted

    def test_next_one_of_a_size_has_the_bytes_that_qemu_img_would_give(self):
        path = os.path.join(self.directory, 'as-qemu-img')
        for size in SIZES:
            with self.subTest(size=size):
                del self.commands[:]
                first, second = self.layer(size), self.layer(size)
                self.assertEqual(1, len(self.commands))
                subprocess.run(
                    ['qemu-img', 'create', '-q', '-f', 'qcow2', '-o',
                     'cluster_size=65536,preallocation=off', path, str(size)],
                    check=True,
                )
                with open(path, 'rb') as f:
                    self.assertEqual(f.read(), first)
                self.assertEqual(first, second)

    def test_what_is_remembered_has_a_limit(self):
        blanks = qcow_blank.Blanks(self.node)
        path = os.path.join(self.directory, 'small')
        with open(path, 'wb') as f:
            f.write(b'x')
        for size in range(qcow_blank.SIZES_MAX + 1):
            blanks.learn(path, size)
        self.assertFalse(blanks.write(path, 0))
        self.assertTrue(blanks.write(path, 1))
        with open(path, 'ab') as f:
            f.truncate(qcow_blank.LENGTH_MAX + 1)
        blanks.learn(path, 512)
        self.assertFalse(blanks.write(path, 512))


if __name__ == '__main__':
    unittest.main()
