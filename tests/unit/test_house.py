# SPDX-License-Identifier: Apache-2.0
"""The rules of this tree that no linter knows."""

import ast
import configparser
import importlib
import pathlib
import re
import unittest

TOP = pathlib.Path(__file__).parents[2]
LICENCE = '# SPDX-License-Identifier: Apache-2.0'
FILE_LINES = 600
FUNCTION_LINES = 70
NO_NAMES = {'utils', 'util', 'common', 'helpers', 'helper', 'misc'}

# How often a file may swallow whatever comes: where a process must go on
# whatever a plug-in does, or where one thread hands it to another.
MAY_CATCH_ALL = {
    'volume/api/app.py': 1,
    'volume/backends.py': 1,
    'volume/concurrency.py': 1,
    'volume/drivers/rbd/watched.py': 2,
    'volume/guarded.py': 1,
    'volume/remote/agent.py': 1,
    'volume/rpc.py': 1,
    'volume/sim/xapi/pool.py': 1,
    'volume/transfer/copy.py': 1,
}

# What documents an entry point, and what proves it.
PAGES = {'volume.drivers': 'doc/source/drivers/{}.rst'}
SUITES = {'volume.drivers': 'tests/conformance/test_{}.py'}


class House(unittest.TestCase):
    """Each rule names every place that breaks it."""

    def test_every_file_says_its_licence(self):
        self.assertEqual([], [
            name for name, text in sources()
            if text.split('\n')[0] != LICENCE
        ])

    def test_no_file_is_long(self):
        self.assertEqual([], [
            f'{name}: {lines}' for name, text in sources()
            if (lines := text.count('\n')) > FILE_LINES
        ])

    def test_no_function_is_long(self):
        self.assertEqual([], [
            f'{name}:{node.lineno} {node.name}: {lines}'
            for name, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef)
            if 'alembic/versions' not in name
            and (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES
        ])

    def test_every_file_has_a_better_name_than_utils(self):
        self.assertEqual([], [
            name for name, _ in sources()
            if NO_NAMES & {*pathlib.Path(name).with_suffix('').parts}
        ])

    def test_all_errors_are_swallowed_only_where_it_is_allowed(self):
        found = {}
        for name, node in nodes(ast.ExceptHandler):
            if name.startswith('volume/') and catches_all(node):
                found.setdefault(name, []).append(node.lineno)
        self.assertEqual({}, {
            name: lines for name, lines in found.items()
            if len(lines) > MAY_CATCH_ALL.get(name, 0)
        })

    def test_nothing_goes_through_a_shell(self):
        self.assertEqual([], [
            f'{name}:{node.value.lineno}' for name, node in nodes(ast.keyword)
            if node.arg == 'shell'
        ])

    def test_nothing_of_ours_is_patched(self):
        self.assertEqual([], [
            f'{name}:{number}' for name, text in sources()
            if name.startswith('tests/') and name != 'tests/unit/test_house.py'
            for number, line in enumerate(text.split('\n'), 1)
            if re.search(r'\bmock\b.*\bpatch|\bpatch(\.object)?\(', line)
        ])

    def test_no_module_keeps_a_global_configuration(self):
        self.assertEqual([], [
            f'{name}:{node.lineno}' for name, node in nodes(ast.Attribute)
            if node.attr == 'CONF' and isinstance(node.value, ast.Name)
        ])


class Catalogue(unittest.TestCase):
    """What a plug-in needs beside its code is there."""

    def test_every_entry_point_can_be_imported(self):
        for group, name, target in entry_points():
            with self.subTest(group=group, name=name):
                module, _, attribute = target.partition(':')
                self.assertTrue(
                    hasattr(importlib.import_module(module), attribute)
                )

    def test_every_plug_in_has_its_page_and_its_suite(self):
        self.assertEqual([], [
            path
            for group, name, _ in entry_points()
            for places in (PAGES, SUITES)
            if group in places
            and not (TOP / (path := places[group].format(name))).exists()
        ])


def sources():
    """Yield each Python file of ours: its name from the top, its text."""
    for part in ('volume', 'tests', 'tools', 'doc'):
        for path in sorted((TOP / part).rglob('*.py')):
            yield str(path.relative_to(TOP)), path.read_text()


def nodes(*kinds):
    """Yield each syntax node of some kinds, with the name of its file."""
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kinds):
                yield name, node


def catches_all(handler):
    """Say if it swallows whatever comes; cleaning up and raising is fine."""
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    kinds = getattr(handler.type, 'elts', [handler.type])
    names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
    return handler.type is None or bool(names & {'Exception', 'BaseException'})


def entry_points():
    """Yield group, name and target of each entry point in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(TOP / 'setup.cfg')
    for group, lines in config['entry_points'].items():
        for line in lines.strip().splitlines():
            name, _, target = map(str.strip, line.partition('='))
            yield group, name, target
