# SPDX-License-Identifier: Apache-2.0
"""Long calls: watched, ended in time, and not taken for done; and queues."""

import concurrent.futures
import threading
import time
import unittest

from tests import xapi
from tests import xensm
from volume import errors
from volume import ids
from volume import model
from volume.drivers.xensm import fifo
from volume.drivers.xensm import vdis
from volume.drivers.xensm.driver import XenSmDriver
from volume.sim.xapi.faults import AFTER
from volume.sim.xapi.faults import BEFORE
from volume.sim.xapi.faults import DELAY
from volume.sim.xapi.faults import Fault
from volume.testing import fixtures
from volume.xenapi import options
from volume.xenapi import tasks
from volume.xenapi.link import Link

SIZE = 8 * model.MIB
HOLD_S = 60.0


class Tasks(unittest.TestCase):

    def setUp(self):
        self.pool = xapi.simulator(self, detach_delay_s=0.0)
        self.sr_uuid = xapi.nfs_sr(self.pool)
        conf = fixtures.settings(
            XenSmDriver, addresses=[self.pool.url(0), self.pool.url(1)],
            password='secret', sr_uuid=[self.sr_uuid], timeout_s=10.0,
        )
        self.link = Link(options.read(conf), fixtures.make_node(self))
        self.addCleanup(self.link.close)
        uuid = xensm.foreign(self.pool, self.sr_uuid, b'\x5a' * SIZE)
        self.vdi = vdis.by_uuid(self.link, uuid)
        self.sr = self.vdi.sr
        self.wait()
        self.before = set(self.pool.rows.all('task'))

    def copy(self, **more):
        return tasks.run(
            self.link, 'VDI.copy', (self.vdi.ref, self.sr), 'a test', **more)

    def hold(self, method, when, until):
        """Have a call wait for an event, before or after its work."""
        hurt = self.pool._hurt

        def hurt_and_wait(name, moment, kinds):
            hurt(name, moment, kinds)
            if (name, moment) == (method, when) and DELAY in kinds:
                until.wait(HOLD_S)

        self.pool._hurt = hurt_and_wait

    def cancelled(self):
        """Return an event: somebody has asked for the end of a task."""
        asked, cancel = threading.Event(), self.pool.tasks.cancel

        def cancel_and_tell(ref):
            try:
                cancel(ref)
            finally:
                asked.set()

        self.pool.tasks.cancel = cancel_and_tell
        return asked

    def names(self):
        """Return how many VDIs there are beside the one that is copied."""
        return len(self.pool.rows.all('VDI')) - 1

    def left(self):
        """Return the records of tasks that are left."""
        return set(self.pool.rows.all('task')) - self.before

    def test_result_is_the_reference_and_the_record_is_removed(self):
        made = vdis.get(self.link, self.copy())
        self.assertEqual(SIZE, made.size_bytes)
        self.assertEqual(set(), self.left())

    def test_progress_is_told_in_percent(self):
        seen, told = [], threading.Event()

        def watch(percent):
            seen.append(percent)
            told.set()

        self.hold('VDI.copy', BEFORE, told)
        self.copy(watch=watch)
        self.assertTrue(told.is_set())
        self.assertTrue(all(0.0 <= each <= 100.0 for each in seen))

    def test_failure_has_its_meaning(self):
        self.pool.faults.add(Fault(
            'VDI.copy', 'refuse', params=('SR_BACKEND_FAILURE_44', '', 'x')))
        with self.assertRaises(errors.NoSpace):
            self.copy()
        self.assertEqual(set(), self.left())

    def test_wish_to_stop_cancels_what_can_be(self):
        def stop(percent):
            raise errors.Cancelled('a person wants it')

        self.hold('VDI.copy', BEFORE, self.cancelled())
        with self.assertRaises(errors.Cancelled):
            self.copy(watch=stop)
        self.wait()
        self.assertEqual(0, self.names())

    def test_deadline_counts_from_the_call(self):
        self.hold('VDI.copy', BEFORE, self.cancelled())
        started = time.monotonic()
        with self.assertRaisesRegex(errors.Unavailable, 'longer'):
            self.copy(deadline_s=0.2)
        self.assertLess(time.monotonic() - started, 30.0)
        self.wait()
        self.assertEqual(0, self.names())

    def test_what_ended_while_it_was_cancelled_counts_as_done(self):
        self.hold('VDI.snapshot', AFTER, self.cancelled())
        ref = tasks.run(
            self.link, 'VDI.snapshot', (self.vdi.ref,), 'a test',
            deadline_s=0.2)
        self.assertTrue(vdis.get(self.link, ref).is_snapshot)

    def test_task_that_is_lost_with_the_master_is_unknown(self):
        self.pool.faults.add(Fault(
            'VDI.copy', 'kill_master', when='before'))
        with self.assertRaises(errors.VolumeError) as lost:
            self.copy()
        self.assertIsInstance(
            lost.exception, (errors.Unknown, errors.Unavailable))
        self.assertEqual(0, self.names())

    def test_lost_events_are_asked_for_again(self):
        self.pool.faults.add(Fault('event.from', 'drop', count=2))
        self.assertTrue(vdis.get(self.link, self.copy()))

    def test_reply_that_is_lost_is_unknown(self):
        self.pool.faults.add(Fault('Async.VDI.copy', 'lose_reply'))
        with self.assertRaises(errors.Unknown):
            self.copy()
        self.wait()

    def test_no_more_tasks_at_once_than_the_server_keeps(self):
        self.link.tasks = threading.BoundedSemaphore(2)
        self.pool.faults.add(Fault(
            'VDI.copy', 'delay', params=(0.2,), count=6))
        most = 0
        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            running = [threads.submit(self.copy) for _ in range(6)]
            while not all(each.done() for each in running):
                most = max(most, len(self.pool.tasks.pending))
                time.sleep(0.01)
        self.assertEqual(6, self.names())
        self.assertLessEqual(most, 2)

    def wait(self):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            self.pool.tasks.pending or any(
                self.pool.rows.field('VBD', ref, 'currently_attached')
                for ref in self.pool.rows.all('VBD')
            )
        ):
            time.sleep(0.01)


class Queues(unittest.TestCase):

    def test_first_come_is_first_served(self):
        queue, served = fifo.Queue(1, 'x'), []
        started = threading.Semaphore(0)

        def work(name):
            started.release()
            with queue.turn():
                served.append(name)

        with queue.turn():
            threads = []
            for name in range(5):
                thread = threading.Thread(target=work, args=(name,))
                thread.start()
                threads.append(thread)
                deadline = time.monotonic() + 30
                while len(queue._waiting) <= name and (
                    time.monotonic() < deadline
                ):
                    time.sleep(0.001)
        for thread in threads:
            thread.join(30)
        self.assertEqual([0, 1, 2, 3, 4], served)

    def test_patience_ends_and_the_turn_goes_to_the_next(self):
        queue = fifo.Queue(1, ids.new())
        with queue.turn():
            with self.assertRaises(errors.Unavailable):
                with queue.turn(0.01):
                    pass
        with queue.turn(0.01):
            pass

    def test_several_may_be_let_through(self):
        queue = fifo.Queue(2, 'x')
        with queue.turn(0.01), queue.turn(0.01):
            with self.assertRaises(errors.Unavailable):
                with queue.turn(0.01):
                    pass
        with queue.turn(0.01), queue.turn(0.01):
            pass
