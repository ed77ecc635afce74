# SPDX-License-Identifier: Apache-2.0
"""The pages that say which test shows what, and the tests, are as one."""

import importlib
import pathlib
import re
import unittest

PAGES = pathlib.Path(__file__).parents[2] / 'doc/source/contributor'
ACCEPTANCE = (
    'tests.integration.test_acceptance_volumes',
    'tests.integration.test_acceptance_hosts',
    'tests.integration.test_acceptance_service',
    'tests.lab.test_acceptance',
    'tests.lab.test_power',
)
CASES = range(1, 71)
# What one of the 70 may be instead of shown.
ABSENT = ('Later. ', 'Dropped. ')
NAMED = re.compile(r'``(tests\.\w+\.\w+)\.(\w+)\.(test_\w+)``')


def tests_of(module):
    """Yield the names of a module's tests."""
    for value in vars(importlib.import_module(module)).values():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            for name in dir(value):
                if name.startswith('test_'):
                    yield name


class Acceptance(unittest.TestCase):
    def setUp(self):
        self.rows = re.findall(
            r'   \* - (\d+)\n     - ((?:.+\n)(?:       .+\n)*)'
            r'     - ((?:.+\n)(?:       .+\n)*)',
            (PAGES / 'acceptance.rst').read_text(),
        )

    def test_each_of_the_70_cases_stands_there_once(self):
        self.assertEqual(
            list(CASES), [int(number) for number, *_ in self.rows])

    def test_the_tests_that_it_names_are_those_that_there_are(self):
        named = [
            (int(number), name) for number, tests, _ in self.rows
            for name in re.findall(r'``(\w+)``', tests)
        ]
        there = [
            (int(found[1]), name) for module in ACCEPTANCE
            for name in set(tests_of(module))
            if (found := re.match(r'test_case_(\d\d)_', name))
        ]
        self.assertEqual(sorted(there), sorted(named))

    def test_those_that_it_names_in_full_are_there_as_well(self):
        for _, tests, _ in self.rows:
            found = NAMED.findall(tests)
            self.assertEqual(tests.count('``tests.'), len(found))
            for module, case, name in found:
                with self.subTest(name):
                    kind = getattr(importlib.import_module(module), case)
                    self.assertTrue(callable(getattr(kind, name)))

    def test_what_is_not_shown_says_what_it_waits_for(self):
        for number, tests, said in self.rows:
            with self.subTest(number):
                self.assertEqual(
                    tests.strip() == 'none', said.startswith(ABSENT))
                self.assertTrue(
                    said.startswith((*ABSENT, 'Changed. ', 'As it was.')))


class Hostile(unittest.TestCase):
    def test_every_test_that_the_page_names_is_there(self):
        page = (PAGES / 'hostile.rst').read_text()
        names = NAMED.findall(page)
        self.assertEqual(page.count('``tests.'), len(names))
        for module, case, name in names:
            with self.subTest(name):
                found = getattr(importlib.import_module(module), case)
                self.assertTrue(callable(getattr(found, name)))

    def test_every_row_names_a_test(self):
        page = (PAGES / 'hostile.rst').read_text()
        rows = page.count('\n   * - ') - page.count('\n   * - What comes\n')
        self.assertEqual(
            rows, len(re.findall(r'\n     - ``tests\.', page)))


if __name__ == '__main__':
    unittest.main()
