# SPDX-License-Identifier: Apache-2.0
"""A section that is wrong is a backend that is down, and no more than that."""

import os
import threading
import time
import unittest

from tests import sshd
from volume import backends
from volume import conf as options
from volume import errors
from volume import model
from volume import periodic
from volume.drivers import base
from volume.drivers import file
from volume.node import Node
from volume.testing import fixtures

LONG_S = 30
FAR = 'directories = /x\niscsi_portals = 192.0.2.1\n'
# All that exporters have to be told, and a place where nothing can be.
WAYS = (
    'iscsi_portals = 192.0.2.1\nnvme_portals = 192.0.2.1\n'
    'nfs_address = 192.0.2.1\naoe_interface = lo\naoe_shelves = 1-2\n'
    'directories = /dev/null/pool\n'
)


class Sections(unittest.TestCase):
    def load(self, text, names):
        directory = fixtures.state_dir(self)
        os.mkdir(os.path.join(directory, 'pool'))
        path = os.path.join(directory, 'volume.conf')
        with open(path, 'w') as f:
            f.write(
                f'[DEFAULT]\nenabled_backends = {names}\n'
                f'state_path = {directory}/state\n'
                f'[good]\ndriver = file\ndirectories = {directory}/pool\n'
                f'exporter = local\n{text.format(root=directory)}\n'
            )
        node = Node(os.path.join(directory, 'state'))
        found = backends.load(options.load([], [path]), node)
        for each in found.values():
            each.check()
        return found

    def down(self, text, name='bad'):
        """Return why a backend is down; the good one beside it serves."""
        found = self.load(text, f'{name}, good')
        self.assertTrue(found['good'].is_up, found['good'].reason)
        self.assertEqual(['pool'], list(found['good'].pools))
        self.assertFalse(found[name].is_up)
        self.assertEqual({}, found[name].pools)
        return found[name].reason

    def test_a_driver_that_is_not_installed_is_named_with_those_that_are(self):
        reason = self.down('[bad]\ndriver = tape')
        self.assertIn("section [bad]: there is no driver 'tape'", reason)
        self.assertRegex(reason, 'file, .*noop, .*qcow')

    def test_a_section_without_driver_says_so(self):
        self.assertIn('option driver is missing', self.down('[bad]\ncost=1'))

    def test_a_section_that_is_not_there_says_so(self):
        self.assertIn('option driver is missing', self.down(''))

    def test_an_exporter_that_is_not_installed_is_named(self):
        self.assertIn("exporter 'pigeon'", self.down(
            '[bad]\ndriver = file\ndirectories = /x\nexporter = pigeon'
        ))

    def test_an_exporter_that_reads_nothing_of_the_driver_is_refused(self):
        for driver, exporter, gives in (
            ('qcow', 'tgt', 'images'), ('qcow', 'lio', 'images'),
            ('qcow', 'aoe', 'images'), ('qcow', 'nfs', 'images'),
            ('qcow', 'nvmet', 'images'), ('file', 'nvmet', 'raw files'),
            ('qcow\nformat = raw', 'nvmet', 'raw files'),
        ):
            with self.subTest(driver, exporter=exporter):
                reason = self.down(
                    f'[bad]\ndriver = {driver}\nexporter = {exporter}\n{WAYS}'
                )
                self.assertRegex(reason, (
                    rf'section \[bad\]: exporter {exporter} reads raw .*, '
                    rf'and driver \w+ has {gives}.*: use exporter .*nbd'
                ))

    def test_an_exporter_that_reads_what_the_driver_gives_is_taken(self):
        for driver, exporter in (
            ('qcow', 'nbd'), ('qcow', 'local'), ('qcow\nformat = raw', 'tgt'),
            ('file', 'tgt'), ('file', 'lio'), ('file', 'nfs'),
            ('lvm\nvolume_groups = g', 'nvmet'), ('noop\npools = p', 'tgt'),
            ('rbd\npools = p', 'tgt'),
        ):
            with self.subTest(driver, exporter=exporter):
                found = self.load(
                    f'[b]\ndriver = {driver}\nexporter = {exporter}\n{WAYS}',
                    'b',
                )
                self.assertIsNotNone(found['b'].driver, found['b'].reason)

    def test_a_required_option_that_is_missing_is_named(self):
        self.assertIn(
            'option directories is missing', self.down('[bad]\ndriver = file')
        )

    def test_an_option_that_cannot_be_read_is_named(self):
        for text in (
            'cost = cheap', 'max_parallel = 0', 'max_parallel = 65',
            'reserved_percent = 101', 'oversubscription = -1',
        ):
            with self.subTest(text):
                name = text.split()[0]
                reason = self.down(
                    '[bad]\ndriver = file\nexporter = local\n'
                    f'directories = {{root}}/pool\n{text}'
                )
                self.assertIn(f'option {name} is wrong: ', reason)
                self.assertNotIn('LocationInfo', reason)

    def test_a_name_that_no_row_can_carry_is_refused(self):
        name = 'b' * 65
        self.assertIn('64 characters', self.down(
            f'[{name}]\ndriver = file\ndirectories = /x', name
        ))

    def test_a_check_that_fails_leaves_the_others_up(self):
        self.assertIn('/nowhere', self.down(
            '[bad]\ndriver = file\ndirectories = /nowhere'
        ))

    def test_a_name_that_stands_twice_is_one_backend(self):
        found = self.load('', 'good, good')
        self.assertEqual(['good'], list(found))
        self.assertTrue(found['good'].is_up)

    def test_no_backend_at_all_is_no_error(self):
        self.assertEqual({}, self.load('', ''))

    def test_what_cannot_be_loaded_is_refused_as_not_there_now(self):
        found = self.load('[bad]\ndriver = tape', 'bad, good')
        with self.assertRaisesRegex(errors.Unavailable, 'tape'):
            found['bad'].call('create', model.Volume('x', 'p', 512))

    def test_an_image_directory_may_not_hold_volumes(self):
        directory = fixtures.state_dir(self)
        for images in directory, f'{directory}/pool', f'{directory}/pool/a':
            with self.subTest(images):
                path = os.path.join(directory, 'volume.conf')
                with open(path, 'w') as f:
                    f.write(
                        '[DEFAULT]\nenabled_backends = b\n'
                        f'image_allowed_directories = {images}\n'
                        f'[b]\ndriver = file\n'
                        f'directories = {directory}/pool\n'
                    )
                found = backends.load(
                    options.load([], [path]), Node('/tmp/elsewhere')
                )
                self.assertIn('image directory', found['b'].reason)

    def test_what_cannot_be_elsewhere_is_refused(self):
        far = f'{FAR}node = ssh://storage1'
        for section, words in (
            ('driver = qcow\nexporter = lio', 'driver qcow serves this'),
            ('driver = file\nexporter = nbd', 'exporter nbd serves this'),
            ('driver = file\nexporter = local', 'exporter local serves'),
            ('driver = file\nexporter = lio\nnode_command = a;b',
             'node_command'),
            ('driver = file\nexporter = lio\nnode_key_file = key',
             'node_key_file'),
        ):
            with self.subTest(section):
                self.assertIn(words, self.down(
                    f'[bad]\n{section}\n{far}'
                ))
        self.assertIn('is no address', self.down(
            '[bad]\ndriver = file\nexporter = lio\n'
            f'{FAR}'
            'node = storage1'
        ))

    def test_node_that_cannot_be_reached_is_a_reason(self):
        self.assertIn('/none, cannot be read', self.down(
            '[bad]\ndriver = file\nexporter = lio\n'
            f'{FAR}'
            'node = ssh://storage1\nnode_key_file = /none'
        ))

    def test_sections_of_one_address_share_a_connection(self):
        text = '\n'.join(
            f'[{name}]\ndriver = file\nexporter = lio\n'
            f'{FAR}'
            f'node = {node}\n'
            for name, node in (
                ('a', 'ssh://storage1'), ('b', 'ssh://root@storage1:22'),
                ('c', 'ssh://storage2'),
            )
        )
        found = self.load(text, 'a, b, c, good')
        nodes = {name: each.node for name, each in found.items()}
        self.assertIs(nodes['a'], nodes['b'])
        self.assertEqual(3, len(set(map(id, nodes.values()))))
        self.assertIs(nodes['a'], found['a'].driver.node)
        self.assertIs(nodes['a'], found['a'].exporter.node)
        self.assertEqual('ssh://root@storage1:22', nodes['a'].address)


class Broken:
    """A driver with a bug in each verb."""

    def __init__(self, error=None):
        self.error = error

    def check(self):
        if self.error:
            raise self.error

    def pools(self):
        return [model.Pool('p', 1, 1, True, frozenset({'Clone'}))]

    def create(self, volume):
        raise ZeroDivisionError

    def delete(self, volume):
        raise errors.Busy('in use')


class Guards(unittest.TestCase):
    def test_qemu_opens_nothing_of_another_machine(self):
        directory = fixtures.directory(self)
        for node in fixtures.make_node(self), sshd.direct_node(self):
            driver = file.FileDriver(fixtures.settings(
                file.FileDriver, directories=[directory]
            ), node)
            backend = backends.Backend('b', None, driver, None, node=node)
            backend.check()
            self.assertEqual('', backend.reason)
            pool = os.path.basename(directory)
            self.assertTrue(backend.feature(pool, 'Resize'))
            self.assertEqual(
                not node.is_remote, backend.feature(pool, 'BlockNode')
            )

    def test_a_drivers_bug_is_unknown_and_names_the_verb(self):
        backend = backends.Backend('b', None, Broken(), None)
        with self.assertLogs('volume.backends', 'ERROR') as logged:
            with self.assertRaisesRegex(
                errors.Unknown, 'backend b.*create: ZeroDivisionError'
            ):
                backend.call('create', None)
        self.assertIn('Traceback', logged.output[0])

    def test_our_own_errors_pass(self):
        backend = backends.Backend('b', None, Broken(), None)
        with self.assertRaises(errors.Busy):
            backend.call('delete', None)

    def test_a_bug_in_a_check_is_a_backend_that_is_down(self):
        backend = backends.Backend('b', None, Broken(ValueError()), None)
        backend.check()
        self.assertFalse(backend.is_up)
        self.assertIn('ValueError', backend.reason)

    def test_a_backend_that_recovers_is_up_again_without_a_reason(self):
        driver = Broken(errors.Unavailable('no answer'))
        backend = backends.Backend('b', None, driver, None)
        backend.check()
        self.assertEqual((False, 'no answer'), (backend.is_up, backend.reason))
        driver.error = None
        backend.check()
        self.assertEqual((True, ''), (backend.is_up, backend.reason))
        self.assertTrue(backend.feature('p', 'Clone'))
        self.assertFalse(backend.feature('p', 'Revert'))
        self.assertFalse(backend.feature('q', 'Clone'))

    def test_its_trouble_is_logged_once_while_it_stays_the_same(self):
        backend = backends.Backend(
            'b', None, Broken(errors.Unavailable('no answer')), None
        )
        with self.assertLogs('volume.backends', 'INFO') as logged:
            for _ in range(3):
                backend.check()
        self.assertEqual(1, len(logged.output))


class Tends(base.Upkeep):
    """A driver whose background work ends when the gate is open."""

    def __init__(self):
        self.gate = threading.Event()
        self.begun = 0

    def upkeep(self, pool):
        self.begun += 1
        self.gate.wait(LONG_S)
        return False


class Upkeep(unittest.TestCase):
    def test_one_that_hangs_keeps_no_other_waiting(self):
        stuck, quick = Tends(), Tends()
        self.addCleanup(stuck.gate.set)
        quick.gate.set()
        pools = {'p': model.Pool('p', 1, 1, True, frozenset({'Upkeep'}))}
        both = [
            backends.Backend(name, None, driver, None, '', True, pools)
            for name, driver in (('stuck', stuck), ('quick', quick))
        ]
        self.until(both, lambda: quick.begun >= 3)
        # The one is at it only once, and goes on when it is done with that.
        self.assertEqual(1, stuck.begun)
        stuck.gate.set()
        self.until(both, lambda: stuck.begun >= 2)

    def until(self, both, is_right):
        deadline = time.monotonic() + LONG_S
        while not is_right():
            self.assertLess(time.monotonic(), deadline)
            periodic.upkeep(both, wait_s=0.01)
