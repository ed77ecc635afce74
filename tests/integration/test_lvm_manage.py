# SPDX-License-Identifier: Apache-2.0
"""``volume-manage lvm`` as a command; what it finds, units and lab show."""

import json
import os
import unittest

from tests.integration import managing
from volume.testing import fixtures


class Command(unittest.TestCase):

    def setUp(self):
        self.directory = fixtures.state_dir(self)
        self.path = os.path.join(self.directory, 'volume.conf')
        with open(self.path, 'w') as f:
            f.write(
                f'[DEFAULT]\nstate_path = {self.directory}/state\n'
                'enabled_backends = fast, other\n'
                '[fast]\ndriver = lvm\nvolume_groups = no-such-group\n'
                f'[other]\ndriver = file\ndirectories = {self.directory}\n'
            )
        self.assertEqual(0, self.manage('db', 'upgrade')[0])

    def manage(self, *words):
        return managing.run('--config-file', self.path, *words)

    def test_group_that_is_not_there_is_named_and_ends_it_with_1(self):
        code, said, _ = self.manage(
            'lvm', 'fast', 'check', '--format', 'json')
        row, = json.loads(said)
        self.assertEqual((1, 'no-such-group'), (code, row['what']))
        self.assertTrue(row['why'] and row['remedy'])

    def test_backend_of_another_driver_is_refused_with_those_that_fit(self):
        code, _, said = self.manage('lvm', 'other', 'check')
        self.assertNotEqual(0, code)
        self.assertIn('driver = lvm; there are fast', said)
