# SPDX-License-Identifier: Apache-2.0
"""Two services of one name and one database: the second is refused.

Their state directories differ, so no lock keeps them apart; each would take
the other's leases for those of its own earlier process.
"""

import os
import unittest

from tests.process import ServiceProcess

SECTION = '[b]\ndriver = file\ndirectories = {root}/pool\nexporter = local\n'


class Twins(unittest.TestCase):
    def make(self, database, host):
        service = ServiceProcess(self, SECTION)
        service.configure(
            SECTION, extra=f'database = sqlite:///{database}\nhost = {host}'
        )
        return service

    def test_the_second_of_one_name_does_not_start_while_the_first_lives(
        self,
    ):
        first = self.make('', 'one')
        database = os.path.join(first.root, 'shared.sqlite')
        first.configure(
            SECTION, extra=f'database = sqlite:///{database}\nhost = one'
        )
        first.start()
        second = self.make(database, 'one')
        with self.assertRaisesRegex(AssertionError, 'another option host'):
            second.start()
        second.kill()
        first.stop()
        second.start()

    def test_another_name_is_no_twin(self):
        first = self.make('', 'one')
        database = os.path.join(first.root, 'shared.sqlite')
        first.configure(
            SECTION, extra=f'database = sqlite:///{database}\nhost = one'
        )
        first.start()
        self.make(database, 'two').start()
