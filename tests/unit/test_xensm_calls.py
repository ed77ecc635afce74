# SPDX-License-Identifier: Apache-2.0
"""What the driver claims of the server is what the server publishes.

The published datamodel and the tables extracted from the storage drivers
are read here as they are, by no code of the simulator's.
"""

import ast
import importlib.resources
import json
import pathlib
import re
import unittest

import volume
from volume import errors
from volume.xenapi import calls
from volume.xenapi import failures
from volume.xenapi import kinds
from volume.xenapi.failures import Failure

OLDEST = 'lima'  # XenServer 7.6, the oldest release that we claim
TOP = pathlib.Path(volume.__file__).parent
DATA = importlib.resources.files('volume.sim.xapi')
CALL = re.compile(
    r'(?:Async\.)?'
    r'((?:session|event|task|pool|host|secret|network|message|'
    r'SM|SR|PBD|VDI|VBD|VM)\.[a-z_]+)'
)
# Types that are in no released tree of drivers: closed, or older.
UNPUBLISHED = {'equal', 'gfs2', 'netapp', 'rawhba', 'iscsi'}


def datamodel():
    return json.loads((DATA / 'datamodel.json').read_text())


def storage_drivers():
    return json.loads((DATA / 'sm_drivers.json').read_text())


def sources():
    yield from sorted((TOP / 'drivers' / 'xensm').glob('*.py'))
    yield from sorted((TOP / 'xenapi').glob('*.py'))
    yield from sorted((TOP / 'connector').glob('xensm*.py'))
    yield TOP / 'cli' / 'manage_xensm.py'


def written():
    """Return every call that the code names, outside of the table."""
    found = set()
    for path in sources():
        if path.name == 'calls.py':
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if match := CALL.fullmatch(node.value):
                    found.add(match[1])
    return found


class Calls(unittest.TestCase):

    def setUp(self):
        self.model = datamodel()
        self.order = self.model['release_order']

    def message(self, call):
        cls, name = call.split('.')
        for message in self.model['classes'][cls]['messages']:
            if message['name'] == name:
                return message
        self.fail(f'the datamodel has no {call}')

    def test_table_lists_the_calls_that_the_code_makes(self):
        generic = {
            f'{cls}.{name}' for cls in (
                'SR', 'PBD', 'VDI', 'VBD', 'VM', 'host')
            for name in ('get_by_uuid', 'get_record')
        }
        self.assertEqual(set(), written() - set(calls.ROLE))
        self.assertLessEqual(set(calls.ROLE) - written(), generic)

    def test_each_call_is_in_the_oldest_release_and_in_the_newest(self):
        oldest = self.order.index(OLDEST)
        for call in calls.ROLE:
            life = self.message(call)['life']
            with self.subTest(call, life=life):
                if call in calls.NEWER:
                    self.assertEqual(calls.NEWER[call], life['prototyped'])
                    continue
                self.assertLessEqual(self.order.index(life['since']), oldest)
                self.assertNotIn('removed', life)

    def test_each_call_needs_the_role_that_is_claimed(self):
        for call, role in calls.ROLE.items():
            with self.subTest(call):
                self.assertEqual(self.message(call)['role'], role)

    def test_what_is_made_as_a_task_can_be(self):
        made = {'SR.create', 'SR.scan', 'PBD.plug', 'VDI.destroy',
                'VDI.resize', 'VDI.snapshot', 'VDI.clone', 'VDI.copy'}
        for call in made:
            with self.subTest(call):
                self.assertTrue(self.message(call).get('async'))

    def test_what_is_asked_again_changes_nothing(self):
        for call in calls.ROLE:
            if calls.is_read(call) and call not in calls._AGAIN:
                with self.subTest(call):
                    self.assertIn('get_', call)


class Failures(unittest.TestCase):

    def test_each_code_is_one_that_servers_give(self):
        known = set(datamodel()['errors'])
        self.assertEqual(set(), set(failures.TABLE) - known - {'FAULT'})

    def test_each_code_of_storage_is_one_that_drivers_give(self):
        data = storage_drivers()
        known = {
            int(code) for name in (
                'sr_backend_errors_sm_head', 'sr_backend_errors_xcpng'
            ) for code in data[name]
        }
        self.assertEqual(set(), set(failures.STORAGE) - known)

    def test_each_code_makes_a_sentence_whatever_its_parameters(self):
        for code in (*failures.TABLE, 'SOMETHING_NEW'):
            for count in range(5):
                params = [f'p{at}' for at in range(count)]
                error = failures.mean('VDI.create', Failure(code, *params))
                with self.subTest(code, count=count):
                    self.assertIsInstance(error, errors.VolumeError)
                    self.assertIn(code, str(error))
                    self.assertEqual(code, failures.code(error))

    def test_what_nobody_knows_may_have_happened(self):
        for code in ('SOMETHING_NEW', 'SR_BACKEND_FAILURE_202',
                     'SR_BACKEND_FAILURE_1200', 'SR_BACKEND_FAILURE_x',
                     'INTERNAL_ERROR', 'CANNOT_CONTACT_HOST'):
            error = failures.mean('VDI.create', Failure(code, '', 'x', ''))
            self.assertIsInstance(error, errors.Unknown, code)

    def test_references_tell_nobody_much_and_are_left_out(self):
        error = failures.mean('VDI.destroy', Failure(
            'VDI_IN_USE', 'OpaqueRef:12', 'destroy'))
        self.assertIsInstance(error, errors.Busy)
        self.assertNotIn('OpaqueRef', str(error))


class Kinds(unittest.TestCase):

    def published(self):
        """Return the keys of each type, of any release."""
        found = {}
        for drivers in storage_drivers()['drivers'].values():
            for driver in drivers:
                for type in driver['handles'] or ():
                    name = type.replace('lvhd', 'lvm')
                    keys = {row[0] for row in driver['configuration'] or ()}
                    found.setdefault(name, set()).update(keys)
        return found

    def test_each_type_is_one_that_servers_have(self):
        types = {kind.type for kind in kinds.KINDS}
        self.assertEqual(set(), types - set(self.published()) - UNPUBLISHED)

    def test_each_type_that_holds_disks_is_here(self):
        no_disks = {'iso', 'udev', 'shm', 'dummy', 'tmpfs', 'ocfs', 'ocfsohba',
                    'ocfsoiscsi', 'lvmoconf', 'btrfs', '__main__'}
        types = {kind.type for kind in kinds.KINDS}
        self.assertEqual(set(), set(self.published()) - types - no_disks)

    def test_published_keys_can_be_given(self):
        # That of smb also names those of three others: a slip of its own.
        for type, keys in self.published().items():
            kind = kinds._BY_TYPE.get(type)
            if kind is None or type == 'smb':
                continue
            with self.subTest(type):
                missing = {
                    key for key in keys - set(kind.keys())
                    if not key.startswith(('sm_config', 'other_config'))
                }
                self.assertEqual(set(), missing)

    def test_lvm_answers_to_both_of_its_names(self):
        self.assertEqual('lvmoiscsi', kinds.find('LVHDoISCSI').type)
        self.assertEqual('lvm', kinds.find('lvhd').type)

    def test_pages_show_the_tables(self):
        pages = TOP.parent / 'doc' / 'source'
        for page, directive in (
            ('drivers/xensm.rst', 'xensm-types'),
            ('admin/xensm.rst', 'xensm-calls'),
        ):
            text = (pages / page).read_text()
            self.assertIn(f'\n.. {directive}::\n', text)

    def test_table_has_a_row_for_each_type(self):
        head, *rows = kinds.table()
        self.assertEqual(len(kinds.KINDS), len(rows))
        self.assertEqual({len(head)}, {len(row) for row in rows})
        self.assertTrue(all(all(cell for cell in row) for row in rows))
