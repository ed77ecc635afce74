# SPDX-License-Identifier: Apache-2.0
"""Locks that live as long as the last writer, whoever started it."""

import contextlib
import contextvars
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import unittest

from volume import errors
from volume import locks
from volume.testing import fixtures

TOP = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))

# A service: takes the lock, and starts a helper that writes until it is
# ended. It says the helper's pid, as soon as the helper runs.
SERVICE = textwrap.dedent('''
    import sys, threading
    from volume.node import Node
    state_dir, heartbeat, heeds = sys.argv[1:]
    helper = """
    import os, signal, sys, time
    def heed(number, frame):
        with open(sys.argv[1], "a") as f:
            f.write(" asked")
        time.sleep(0.1)
        if {heeds}:
            with open(sys.argv[1], "a") as f:
                f.write(" finished")
            os._exit(0)
    signal.signal(signal.SIGTERM, heed)
    f = open(sys.argv[1], "w")
    f.write(str(os.getpid()))
    f.flush()
    while True:
        time.sleep(600)
    """.replace("{heeds}", heeds)
    node = Node(state_dir)
    with node.hold(exclusive=["v1"]):
        node.run(sys.executable, "-c", helper, heartbeat, timeout_s=600)
''')


class Holding(unittest.TestCase):
    """Node.hold, between threads and processes."""

    def setUp(self):
        self.node = fixtures.make_node(self)
        self.directory = os.path.join(self.node.state_dir, 'locks')

    def test_helper_of_a_killed_service_is_ended_by_the_next_owner(self):
        service, helper = self.start_service()
        service.kill()
        service.wait()
        self.assertTrue(is_running(helper), 'the helper must outlive it')
        # The kernel frees a lock before it tells that its holder has ended.
        with self.node.hold(exclusive=['v1']):
            wait_for(lambda: not is_running(helper))

    def test_helper_finishes_before_the_next_owner_begins(self):
        service, _ = self.start_service()
        service.kill()
        with self.node.hold(exclusive=['v1']):
            self.assertEqual(['asked', 'finished'], self.said())

    def test_helper_that_heeds_nothing_is_killed(self):
        service, helper = self.start_service(heeds=False)
        service.kill()
        with self.node.hold(exclusive=['v1']):
            wait_for(lambda: not is_running(helper))
            self.assertEqual(['asked'], self.said())

    def test_who_is_given_time_is_given_it_before_the_wait(self):
        inside = threading.Event()

        def work():
            with locks.hold(self.directory, ['v1'], ()):
                inside.set()
                time.sleep(0.2)

        thread = threading.Thread(target=work)
        thread.start()
        self.addCleanup(thread.join)
        inside.wait(60)
        with locks.hold(
            self.directory, ['v1'], (), wait_s=0.05, grace_s=60.0
        ):
            pass

    def test_stopped_service_is_ended_by_the_next_owner(self):
        service, helper = self.start_service()
        service.send_signal(signal.SIGSTOP)
        with self.node.hold(exclusive=['v1']):
            wait_for(lambda: not is_running(helper))
            self.assertEqual(-signal.SIGKILL, service.wait(10))

    def test_a_neighbour_that_lets_go_in_time_is_not_ended(self):
        service, helper = self.start_service()
        timer = threading.Timer(0.2, end, [helper])
        timer.start()
        self.addCleanup(timer.join)
        # Its helper ends, its command fails, and it lets go by itself.
        with self.node.hold(exclusive=['v1'], grace_s=5.0):
            pass
        self.assertNotEqual(-signal.SIGKILL, service.wait(10))

    def test_who_has_the_file_open_without_the_lock_is_not_ended(self):
        service, _ = self.start_service()
        waits = subprocess.Popen(
            ['tail', '-f', os.path.join(self.directory, 'v1')],
            stdout=subprocess.DEVNULL,
        )
        self.addCleanup(waits.wait)
        self.addCleanup(waits.kill)
        wait_for(lambda: opened(waits.pid, 'v1'))
        with self.node.hold(exclusive=['v1']):
            self.assertIsNone(waits.poll())
        self.assertEqual(-signal.SIGKILL, service.wait(10))

    def test_lock_of_another_object_ends_nobody(self):
        service, helper = self.start_service()
        with self.node.hold(exclusive=['v2'], shared=['v3']):
            self.assertTrue(is_running(helper))
        self.assertIsNone(service.poll())

    def said(self):
        """Return what the helper has told after its pid."""
        return read(os.path.join(self.node.state_dir, 'heartbeat')).split()[1:]

    def start_service(self, heeds=True):
        heartbeat = os.path.join(self.node.state_dir, 'heartbeat')
        service = subprocess.Popen(
            [sys.executable, '-c', SERVICE, self.node.state_dir, heartbeat,
             str(heeds)],
            cwd=TOP, stderr=subprocess.DEVNULL,
        )
        self.addCleanup(service.wait)
        self.addCleanup(service.kill)
        wait_for(lambda: os.path.exists(heartbeat) and read(heartbeat))
        helper = int(read(heartbeat))
        self.addCleanup(end, helper)
        return service, helper

    def test_helper_inherits_what_is_held_and_nothing_else(self):
        with self.node.hold(exclusive=['v1']):
            with self.node.hold(shared=['v2']):
                both = self.node.run('ls', '-l', '/proc/self/fd')
            one = self.node.run('ls', '-l', '/proc/self/fd')
        none = self.node.run('ls', '-l', '/proc/self/fd')
        for name, in_one in ('v1', True), ('v2', False):
            path = os.path.join(self.directory, name)
            self.assertIn(path, both)
            self.assertEqual(in_one, path in one)
            self.assertNotIn(path, none)

    def test_lock_that_nobody_else_has_is_the_standard_input(self):
        # Which is all that LVM keeps.
        with self.node.hold(exclusive=['v1'], shared=['v2']):
            first = self.node.run('readlink', '/proc/self/fd/0')
            with self.node.hold(exclusive=['v3']):
                later = self.node.run('readlink', '/proc/self/fd/0')
        after = self.node.run('readlink', '/proc/self/fd/0')
        self.assertEqual(
            [*(os.path.join(self.directory, each) for each in ('v1', 'v3')),
             '/dev/null'],
            [each.strip() for each in (first, later, after)],
        )

    def test_thread_that_works_for_a_holder_hands_its_locks_on(self):
        seen = []
        with self.node.hold(exclusive=['v1']):
            context = contextvars.copy_context()
            thread = threading.Thread(target=lambda: seen.append(
                context.run(self.node.run, 'ls', '-l', '/proc/self/fd')
            ))
            thread.start()
            thread.join(60)
        self.assertIn(os.path.join(self.directory, 'v1'), seen[0])

    def test_second_thread_waits_for_the_first(self):
        order, inside = [], threading.Event()

        def work():
            inside.wait(60)
            with self.node.hold(exclusive=['v1']):
                order.append('second')

        thread = threading.Thread(target=work)
        thread.start()
        with self.node.hold(exclusive=['v1']):
            inside.set()
            time.sleep(0.05)  # it would come first, were there no lock
            order.append('first')
        thread.join(60)
        self.assertEqual(['first', 'second'], order)

    def test_readers_share_and_a_writer_is_alone(self):
        with locks.hold(self.directory, (), ['v1']):
            with locks.hold(self.directory, (), ['v1']):
                pass
            with self.assertRaises(errors.Unavailable):
                with locks.hold(self.directory, ['v1'], (), wait_s=0.05):
                    pass
        with locks.hold(self.directory, ['v1'], ()):
            with self.assertRaises(errors.Unavailable):
                with locks.hold(self.directory, (), ['v1'], wait_s=0.05):
                    pass

    def test_refused_lock_gives_back_those_taken_before(self):
        with locks.hold(self.directory, ['v2'], ()):
            with self.assertRaises(errors.Unavailable):
                with locks.hold(self.directory, ['v1', 'v2'], (), wait_s=0.05):
                    pass
            with locks.hold(self.directory, ['v1'], (), wait_s=0.05):
                pass

    def test_both_modes_of_one_name_are_the_stronger(self):
        with locks.hold(self.directory, ['v1'], ['v1']) as descriptors:
            self.assertEqual(1, len(descriptors))
            with self.assertRaises(errors.Unavailable):
                with locks.hold(self.directory, (), ['v1'], wait_s=0.05):
                    pass

    def test_locks_are_given_back_after_a_failure(self):
        with self.assertRaises(errors.Busy):
            with self.node.hold(exclusive=['v1']):
                raise errors.Busy('x')
        with locks.hold(self.directory, ['v1'], (), wait_s=0.05):
            pass

    def test_lock_of_a_removed_file_is_no_lock(self):
        # The name was forgotten between opening the file and locking it:
        # two owners would each hold a file of their own.
        with locks.hold(self.directory, ['v1'], ()):
            locks.forget(self.directory, 'v1')
            with locks.hold(self.directory, ['v1'], ()) as descriptors:
                self.assertEqual(
                    os.stat(os.path.join(self.directory, 'v1')).st_ino,
                    os.fstat(descriptors['v1']).st_ino,
                )
        locks.forget(self.directory, 'v1')
        locks.forget(self.directory, 'v1')
        self.assertEqual([], os.listdir(self.directory))

    def test_waiter_for_a_forgotten_file_takes_the_new_one(self):
        found, waiting = [], threading.Event()

        def work():
            waiting.set()
            with locks.hold(self.directory, ['v1'], ()) as descriptors:
                path = os.path.join(self.directory, 'v1')
                found.append(os.path.samestat(
                    os.fstat(descriptors['v1']), os.stat(path)
                ))

        thread = threading.Thread(target=work)
        with locks.hold(self.directory, ['v1'], ()):
            thread.start()
            waiting.wait(60)
            locks.forget(self.directory, 'v1')
        thread.join(60)
        self.assertEqual([True], found)

    def test_many_threads_are_never_inside_together(self):
        inside, worst = [0], [0]

        def work():
            for _ in range(10):
                with self.node.hold(exclusive=['v1', 'v2']):
                    inside[0] += 1
                    worst[0] = max(worst[0], inside[0])
                    inside[0] -= 1

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual([1], worst)


class Alone(unittest.TestCase):
    """One service on one state directory."""

    def test_second_process_is_refused_and_nobody_is_ended(self):
        path = os.path.join(fixtures.state_dir(self), 'lock')
        code = (
            'import sys\nfrom volume import locks\n'
            'with locks.alone(sys.argv[1], "the state directory"):\n'
            '    print("in", flush=True)\n    sys.stdin.read()'
        )
        other = subprocess.Popen(
            [sys.executable, '-c', code, path], cwd=TOP, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        with other:
            self.assertEqual('in\n', other.stdout.readline())
            with self.assertRaisesRegex(errors.Busy, 'the state directory'):
                with locks.alone(path, 'the state directory'):
                    pass
            self.assertIsNone(other.poll())
            other.stdin.close()
        self.assertEqual(0, other.returncode)
        with locks.alone(path, 'the state directory'):
            pass


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError):
        return False


def end(pid):
    """End a helper, unless it is gone or its number is another's."""
    if is_running(pid) and 'sleep(600)' in read(f'/proc/{pid}/cmdline'):
        os.kill(pid, signal.SIGKILL)


def read(path):
    with open(path) as f:
        return f.read()


def wait_for(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def opened(pid, name):
    """Say whether a process has a file of that name open."""
    fds = f'/proc/{pid}/fd'
    for fd in os.listdir(fds):
        with contextlib.suppress(FileNotFoundError):  # closed since
            if os.readlink(f'{fds}/{fd}').endswith(f'/{name}'):
                return True
    return False
