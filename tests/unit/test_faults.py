# SPDX-License-Identifier: Apache-2.0
"""The fault injection itself: a fault that does not come up proves nothing."""

import itertools
import os
import unittest

from volume import errors
from volume.testing import faults
from volume.testing import fixtures


class Faults(unittest.TestCase):

    def setUp(self):
        self.state_dir = fixtures.state_dir(self)

    def node(self, *fault):
        return faults.FaultyNode(
            self.state_dir, faults.Fault(*fault) if fault else None
        )

    def path(self, name):
        return os.path.join(self.state_dir, name)

    def work(self, node):
        """Three acts: a, b and c appear one after the other."""
        for name in 'abc':
            node.write(self.path(name), b'')

    def there(self):
        return ''.join(sorted(os.listdir(self.state_dir)))

    def test_node_without_a_fault_only_counts(self):
        node = self.node()
        self.work(node)
        self.assertEqual((3, False), (node.calls, node.fired))
        self.assertEqual(['write a', 'write b', 'write c'], node.trace)

    def test_each_kind_raises_its_own_error_before_or_after_the_effect(self):
        for kind, error in (
            ('refused', errors.Unavailable), ('lost', errors.Unknown),
            ('crash', faults.Crash),
        ):
            for is_late, there in (False, 'a'), (True, 'ab'):
                for name in os.listdir(self.state_dir):
                    os.unlink(self.path(name))
                node = self.node(kind, 2, is_late)
                with self.assertRaisesRegex(error, 'act 2: write b'):
                    self.work(node)
                self.assertEqual(there, self.there())
                self.assertTrue(node.fired)

    def test_node_goes_on_after_an_error(self):
        node = self.node('refused', 1, False)
        with self.assertRaises(errors.Unavailable):
            self.work(node)
        self.work(node)
        self.assertEqual('abc', self.there())

    def test_dead_process_does_nothing_more(self):
        node = self.node('crash', 1, False)
        with self.assertRaises(faults.Crash):
            try:
                self.work(node)
            finally:
                with self.assertRaises(faults.Crash):
                    node.write(self.path('cleanup'), b'')
        self.assertEqual('', self.there())

    def test_crash_is_caught_by_no_handler_of_errors(self):
        self.assertFalse(issubclass(faults.Crash, Exception))

    def test_lost_reply_of_a_failure_is_lost_like_any_other(self):
        node = self.node('lost', 1, True)
        with self.assertRaises(errors.Unknown):
            node.read(self.path('none'))

    def test_only_named_acts_are_counted(self):
        node = self.node('refused', 1, False, 'rename')
        self.work(node)
        with self.assertRaises(errors.Unavailable):
            node.rename(self.path('a'), self.path('d'))
        self.assertEqual(['rename d'], node.trace)

    def test_arming_counts_from_the_beginning(self):
        node = self.node()
        self.work(node)
        node.arm(faults.Fault('crash', 1, False))
        with self.assertRaises(faults.Crash):
            self.work(node)
        self.assertEqual(1, node.calls)

    def test_every_write_sync_and_command_is_an_act(self):
        node = self.node()
        with node.open(self.path('f'), 'wb') as f:
            f.truncate(4096)
            f.write(b'x')
            f.punch(0, 512)
            f.sync()
        node.run('true')
        self.assertEqual(
            ['open f', 'truncate f', 'write f', 'punch f', 'sync f',
             'run true'],
            node.trace,
        )

    def test_counting_up_reaches_every_act_and_ends(self):
        reached = []
        for nth in itertools.count(1):
            node = self.node('refused', nth, False)
            try:
                self.work(node)
            except errors.Unavailable:
                reached.append(node.trace[-1])
            if not node.fired:
                break
        self.assertEqual(['write a', 'write b', 'write c'], reached)

    def test_all_faults_of_an_act_are_six(self):
        self.assertEqual(6, len(set(faults.every(1))))

    def test_fault_prints_as_the_line_that_makes_it(self):
        fault = faults.Fault('lost', 3, True)
        self.assertEqual(
            fault, eval(repr(fault), {'Fault': faults.Fault})
        )
