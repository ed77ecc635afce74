# SPDX-License-Identifier: Apache-2.0
"""The write lock goes to whoever has waited longest."""

import signal
import threading
import time
import unittest

from volume import concurrency
from volume.db.fifo import FifoLock


class Interrupted(BaseException):
    pass


class Fifo(unittest.TestCase):
    def queue(self, lock, count, then):
        """Start threads, each only when the one before it waits."""
        threads = []
        for number in range(count):
            def work(number=number):
                with lock:
                    then(number)

            before = len(lock._waiting)
            threads.append(threading.Thread(target=work))
            threads[-1].start()
            while len(lock._waiting) == before:
                time.sleep(0.0005)
        return threads

    def test_it_is_handed_over_in_the_order_of_asking(self):
        lock, order = FifoLock(), []
        with lock:
            threads = self.queue(lock, 20, order.append)
        for thread in threads:
            thread.join()
        self.assertEqual(list(range(20)), order)

    def test_one_thread_at_a_time_is_inside(self):
        lock, inside, seen = FifoLock(), [], []

        def work(number):
            inside.append(number)
            seen.append(len(inside))
            inside.remove(number)

        def race():
            for number in range(200):
                with lock:
                    work(number)

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual({1}, set(seen))
        self.assertEqual(1600, len(seen))

    def test_an_error_inside_hands_it_over(self):
        lock = FifoLock()
        with self.assertRaises(ValueError), lock:
            raise ValueError
        with lock:
            pass

    @unittest.skipIf(
        concurrency.is_green(), 'a signal interrupts no greenthread'
    )
    def test_a_waiter_that_is_interrupted_leaves_the_queue(self):
        lock, order = FifoLock(), []
        held, let_go = threading.Event(), threading.Event()

        def hold():
            with lock:
                held.set()
                let_go.wait(30)

        def interrupt(number, frame):
            raise Interrupted

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait(30)
        before = signal.signal(signal.SIGUSR1, interrupt)
        me = threading.get_ident()

        def tell():
            while not lock._waiting:
                time.sleep(0.0005)
            signal.pthread_kill(me, signal.SIGUSR1)

        teller = threading.Thread(target=tell)
        teller.start()
        try:
            with self.assertRaises(Interrupted), lock:
                self.fail('the lock is held')
        finally:
            signal.signal(signal.SIGUSR1, before)
            teller.join()
        threads = self.queue(lock, 1, order.append)
        let_go.set()
        for thread in (holder, *threads):
            thread.join(30)
        self.assertEqual([0], order)
