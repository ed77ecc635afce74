# SPDX-License-Identifier: Apache-2.0
"""nova-volume's 70 acceptance cases, by their numbers.

Each case that concerns what there is now is a test that has its number, or
stands in ``ELSEWHERE`` with the test that proves it; ``CHANGED`` says where
the claim is not to the letter. The others stand in ``LATER`` with what they
wait for.
"""

import importlib
import re
import unittest

from tests.integration import test_acceptance_hosts as hosts
from tests.integration import test_acceptance_volumes as volumes

ELSEWHERE = {
    14: 'tests.unit.test_runner.Sweeps.'
        'test_what_is_leased_or_not_due_or_anothers_is_left',
    19: 'tests.integration.test_races.Races.test_many_deletes_delete_once',
    49: 'tests.conformance.test_exports',
    52: 'tests.fault.test_flows.QcowFaults',
    61: 'tests.integration.test_service.Starts.'
        'test_a_backend_that_fails_its_check_leaves_the_others_serving',
    62: 'tests.unit.test_conf.Options.'
        'test_the_database_s_password_is_not_shown',
    67: 'tests.unit.test_backends.Sections.'
        'test_a_check_that_fails_leaves_the_others_up',
}
CHANGED = {
    6: 'nothing is exported at create: the same holds of the first attach',
    7: 'a handle takes the place of provider_location',
    14: 'any manager that serves the backend may; of another backend, none',
    29: 'it is refused before there is a row; nothing has to say error',
    33: 'there are no driver hooks: an access that cannot be undone does it',
    44: 'there is no size 0: a size is a positive number of sectors',
    49: 'an export is named by its attachment, so none can meet another',
    61: 'any backend, not only a storage repository',
    62: 'secrets of the configuration; options of SM come with xensm',
    67: 'directories of the file driver, until there is NFS',
}
LATER = {
    9: 'quota',
    43: 'lvm', 45: 'lvm', 46: 'lvm', 47: 'tgt', 48: 'tgt', 50: 'iscsi',
    53: 'xensm', 54: 'xensm', 55: 'xensm', 56: 'xensm', 57: 'xensm',
    58: 'xensm', 59: 'xensm', 60: 'xensm', 63: 'xensm', 64: 'xensm',
    65: 'xensm', 66: 'a SAN driver', 68: 'a SAN driver',
}


class TheTable(unittest.TestCase):
    """Every number is somewhere, and what is named is there."""

    def here(self):
        found = set()
        for name in (*dir(volumes.Volumes), *dir(hosts.Hosts)):
            if match := re.match(r'test_case_(\d\d)_', name):
                found.add(int(match[1]))
        return found

    def test_each_of_the_70_cases_is_here_elsewhere_or_later(self):
        parts = [self.here(), set(ELSEWHERE), set(LATER)]
        self.assertEqual(set(range(1, 71)), set.union(*parts))
        self.assertEqual(70, sum(map(len, parts)))
        self.assertLessEqual(set(CHANGED), parts[0] | parts[1])

    def test_what_is_elsewhere_is_there(self):
        for number, name in ELSEWHERE.items():
            with self.subTest(number):
                module, attributes = name, []
                while True:
                    try:
                        found = importlib.import_module(module)
                        break
                    except ModuleNotFoundError:
                        module, _, last = module.rpartition('.')
                        attributes.insert(0, last)
                for attribute in attributes:
                    found = getattr(found, attribute)
