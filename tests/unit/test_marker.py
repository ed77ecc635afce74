# SPDX-License-Identifier: Apache-2.0
"""A directory that has lost its pool is told from an empty pool."""

import concurrent.futures
import contextlib
import itertools
import os
import unittest

from volume import errors
from volume import ids
from volume.drivers import marker
from volume.node import Node
from volume.testing import faults
from volume.testing import fixtures


class MarkerTest(unittest.TestCase):

    def setUp(self):
        self.state = fixtures.state_dir(self)
        self.directory = fixtures.directory(self)
        self.path = os.path.join(self.directory, marker.NAME)
        self.node = Node(self.state)

    def look(self, node=None):
        marker.check(node or self.node, self.directory)
        marker.keep(node or self.node, self.directory)

    def names(self):
        return os.listdir(self.directory), os.listdir(self.state + '/pools')

    def test_pool_is_known_again_and_left_as_it_is(self):
        self.look()
        with open(self.path) as f:
            first = f.read()
        self.assertTrue(ids.is_id(first.strip()))
        self.look()
        with open(self.path) as f:
            self.assertEqual(first, f.read())
        self.assertEqual(0o700, os.stat(self.state + '/pools').st_mode & 0o777)

    def test_lost_pool_is_refused_until_it_is_back_or_given_up(self):
        self.look()
        os.rename(self.path, self.path + '-away')
        with self.assertRaisesRegex(errors.Invalid, 'mount .* remove') as told:
            self.look()
        self.assertFalse(os.path.exists(self.path))
        os.rename(self.path + '-away', self.path)
        self.look()
        os.unlink(self.path)
        os.unlink(str(told.exception).rpartition(' ')[2])
        self.look()

    def test_another_pool_in_its_place_is_refused(self):
        self.look()
        with open(self.path, 'w') as f:
            f.write(ids.new())
        with self.assertRaisesRegex(errors.Invalid, 'mount'):
            self.look()

    def test_pool_of_another_service_is_remembered_as_it_is(self):
        self.look(Node(fixtures.state_dir(self)))
        with open(self.path) as f:
            there = f.read()
        self.look()
        with open(self.path) as f:
            self.assertEqual(there, f.read())
        os.unlink(self.path)
        self.assertRaises(errors.Invalid, self.look)

    def test_marker_that_holds_no_id_is_refused(self):
        for text in '', 'x\n':
            with open(self.path, 'w') as f:
                f.write(text)
            with self.assertRaisesRegex(errors.Invalid, 'no id'):
                self.look()

    def test_who_asks_again_is_told_the_same(self):
        os.rmdir(self.directory)
        self.addCleanup(os.mkdir, self.directory)  # fixtures removes it
        told = []
        for _ in range(2):
            with self.assertRaisesRegex(errors.NotFound, self.path) as refused:
                marker.keep(self.node, self.directory)
            told.append(str(refused.exception))
        self.assertEqual(*told)

    def test_every_fault_is_healed_by_the_next_check(self):
        for nth in itertools.count(1):
            fired = False
            for fault in faults.every(nth):
                self.setUp()
                node = faults.FaultyNode(self.state, fault)
                with contextlib.suppress(faults.Crash, errors.VolumeError):
                    self.look(node)
                fired |= node.fired
                with self.subTest(fault, acts=node.trace):
                    self.look()
                    self.look()
                    self.assertEqual([1, 1], list(map(len, self.names())))
                    os.unlink(self.path)
                    self.assertRaises(errors.Invalid, self.look)
            if not fired:
                break
        self.assertGreater(nth, 8)

    def test_many_that_look_at_once_agree(self):
        for _ in range(5):
            self.setUp()
            with concurrent.futures.ThreadPoolExecutor(8) as threads:
                for done in [
                    threads.submit(self.look, Node(self.state))
                    for _ in range(8)
                ]:
                    done.result()
            self.look()
            self.assertEqual([1, 1], list(map(len, self.names())))

    def test_full_disk_is_no_reason_to_serve_nothing(self):
        node = FullNode(self.state)
        self.look(node)
        self.assertEqual([], os.listdir(self.directory))
        self.look()
        self.look(node)


class FullNode(Node):
    """A node whose disk takes no more bytes."""

    def act(self, what, effect):
        if what.startswith('write'):
            raise errors.NoSpace(what)
        return super().act(what, effect)
