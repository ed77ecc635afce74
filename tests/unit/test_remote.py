# SPDX-License-Identifier: Apache-2.0
"""A node that is another machine, by an agent that is a child of the test."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from typing import TypeVar

from tests import sshd
from tests.unit import test_machine
from volume import errors
from volume.node import Node
from volume.node import Op
from volume.remote.node import SshNode
from volume.testing import fixtures

T = TypeVar('T')
WAIT_S = 20.0
HOSTILE = (
    'a b', "it's", '"q"', '$(id)', '`id`', 'a;b', 'a\nb', '*', '-n', '\\',
    'ü', '\udcff', '~', '&& x', '', '%s', '{"a":1}',
)


def agent_pid(node: SshNode) -> int:
    """Return the process of a node's agent."""
    return int(node.run('sh', '-c', 'echo $PPID'))


def wait_until(test: unittest.TestCase, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        test.assertLess(time.monotonic(), deadline, 'it never came')
        time.sleep(0.01)


def lives(pid: int) -> bool:
    """Say whether a process runs; one that nobody waited for does not."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rpartition(')')[2].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError):
        return False


class ConfigureTest(test_machine.ConfigureTest):
    """The kernel's settings of another machine."""

    def make_node(self) -> Node:
        return sshd.direct_node(self)


class TalkTest(test_machine.TalkTest):
    """Daemons of another machine."""

    def make_node(self) -> Node:
        return sshd.direct_node(self)


class ProcessTest(test_machine.ProcessTest):
    """Lasting processes of another machine."""

    def make_node(self) -> Node:
        return sshd.direct_node(self)


class BorrowTest(test_machine.BorrowTest):
    """Lock files of other programs on another machine."""

    def make_node(self) -> Node:
        return sshd.direct_node(self)

    def test_lost_connection_gives_it_back(self) -> None:
        with contextlib.suppress(errors.VolumeError):
            with self.node.borrow(self.lock, 30):
                self.node.close()
                self.wait_until_free()
                with self.assertRaisesRegex(
                    errors.Unavailable, 'nothing was done'
                ):
                    self.node.run('true')


class OpenedTest(test_machine.OpenedTest):
    """Open files of another machine."""

    def make_node(self) -> Node:
        return sshd.direct_node(self)


class RemoteCase(unittest.TestCase):
    def setUp(self) -> None:
        self.root = fixtures.state_dir(self)
        self.node = self.another()

    def another(self) -> SshNode:
        """Return the same node, reached by another service."""
        node = SshNode(sshd.direct_target(self.path('node')))
        self.addCleanup(node.close)
        return node

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    @contextlib.contextmanager
    def busy(
        self, node: SshNode
    ) -> Iterator[tuple[int, concurrent.futures.Future[str]]]:
        """Have a node run a long command; yield its process and future."""
        note = self.path('pid')
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note)
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            future = threads.submit(
                lambda: node.run(
                    'sh', '-c', f'echo $$ > {note}.new; '
                    f'mv {note}.new {note}; exec sleep 600',
                    timeout_s=600,
                )
            )
            wait_until(self, lambda: os.path.exists(note) or future.done())
            if future.done():
                future.result()
            with open(note) as f:
                pid = int(f.read())
            try:
                yield pid, future
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class CommandTest(RemoteCase):
    def test_arguments_arrive_as_they_are(self) -> None:
        out = self.node.run(
            sys.executable, '-c',
            'import os, sys; '
            'os.write(1, b"\\0".join(map(os.fsencode, sys.argv[1:])))',
            *HOSTILE,
        )
        expected = '\0'.join(HOSTILE).replace('\udcff', '\ufffd')
        self.assertEqual(expected, out)

    def test_input_and_exit_code_come_through(self) -> None:
        self.assertEqual('abc', self.node.run('cat', input_bytes=b'abc'))
        with self.assertRaises(errors.VolumeError) as caught:
            self.node.run(
                'sh', '-c', 'echo it is swordfish >&2; exit 7',
                secrets=['swordfish'],
            )
        failed = caught.exception
        self.assertEqual(7, failed.code)  # type: ignore[attr-defined]
        self.assertEqual(
            'it is ***\n', failed.stderr  # type: ignore[attr-defined]
        )
        self.assertEqual('sh failed with code 7: it is ***', str(failed))

    def test_missing_program_means_that_nothing_happened(self) -> None:
        with self.assertRaisesRegex(
            errors.Unavailable, '^no-such is not installed'
        ):
            self.node.run('no-such', 'x')

    def test_output_is_whole_or_refused(self) -> None:
        count = 3 << 20
        self.assertEqual(count, len(self.node.run(
            'head', '-c', str(count), '/dev/zero', output_bytes_max=count,
        )))
        with self.assertRaisesRegex(errors.Unknown, 'over 1048576 bytes'):
            self.node.run('head', '-c', str(count), '/dev/zero')
        self.node.run('true')

    def test_command_that_does_not_end_is_ended(self) -> None:
        with self.assertRaisesRegex(errors.Unknown, 'within 0.1 s'):
            self.node.run('sleep', '600', timeout_s=0.1)

    def test_progress_is_told_and_a_watcher_ends_it(self) -> None:
        heard: list[float] = []

        def watch(percent: float) -> None:
            heard.append(percent)
            if percent:
                raise errors.Cancelled('enough')

        with self.assertRaises(errors.Cancelled):
            self.node.run(
                'sh', '-c', f'echo $$ >{self.path("pid")}; '
                'echo "(42.50/100%)"; exec sleep 600',
                watch=watch, timeout_s=600,
            )
        self.assertEqual(42.5, heard[-1])
        with open(self.path('pid')) as f:
            self.assertFalse(lives(int(f.read())))
        self.node.run('true')

    def test_command_ends_with_its_connection(self) -> None:
        with self.busy(self.node) as (pid, future):
            self.node.close()
            with self.assertRaises(errors.Unknown):
                future.result(WAIT_S)
            wait_until(self, lambda: not lives(pid))
        self.node.run('true')

    def test_children_of_a_command_end_with_it(self) -> None:
        note = self.path('child')
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            done = threads.submit(
                self.node.run, 'sh', '-c',
                'sleep 600 & echo $! >$0.new; mv $0.new $0; wait', note,
                timeout_s=600,
            )
            wait_until(self, lambda: os.path.exists(note))
            self.node.close()
            self.assertIsInstance(done.exception(WAIT_S), errors.Unknown)
        with open(note) as f:
            pid = int(f.read())
        wait_until(self, lambda: not lives(pid))

    def test_command_ends_with_an_agent_that_is_killed(self) -> None:
        agent = agent_pid(self.node)
        with self.busy(self.node) as (pid, future):
            os.kill(agent, signal.SIGKILL)
            with self.assertRaises(errors.Unknown):
                future.result(WAIT_S)
            wait_until(self, lambda: not lives(pid))
        self.node.run('true')

    def test_what_is_to_last_outlives_the_connection(self) -> None:
        process = self.node.start(['sleep', '600'], self.path('log'))
        agent = agent_pid(self.node)
        self.node.close()
        wait_until(self, lambda: not lives(agent))
        self.assertTrue(self.node.is_running(process))
        self.node.end(process, 5)
        self.assertFalse(self.node.is_running(process))


class ManyTest(RemoteCase):
    def test_a_hundred_requests_at_once_get_their_own_answers(self) -> None:
        start = threading.Barrier(100)

        def ask(number: int) -> str:
            start.wait(WAIT_S)
            if number % 2:
                return self.node.run('echo', str(number)).strip()
            path = self.path(f'f{number}')
            self.node.write(path, str(number).encode() * 10000)
            return self.node.read(path).decode()[:len(str(number))]

        with concurrent.futures.ThreadPoolExecutor(100) as threads:
            self.assertEqual(
                list(map(str, range(100))), list(threads.map(ask, range(100)))
            )

    def test_slow_requests_keep_no_quick_one_waiting(self) -> None:
        with self.busy(self.node):
            self.assertTrue(self.node.exists(self.root))

    def test_each_request_is_one_act(self) -> None:
        acts: list[str] = []

        class Counting(SshNode):
            def act(self, what: str, effect: Callable[[], T]) -> T:
                acts.append(what)
                return effect()

        node = Counting(self.node.target)
        self.addCleanup(node.close)
        node.configure([
            Op.mkdir(self.path('d')), Op.exists(self.path('d')),
            Op.rmdir(self.path('d')),
        ])
        with node.open(self.path('f'), 'w+b') as file:
            file.write(b'x')
            file.sync()
            self.assertEqual(1, file.size_bytes)
        with node.hold(['v']):
            node.run('true')
        self.assertEqual([
            'configure mkdir, exists, rmdir', 'open f', 'write f', 'sync f',
            'size f', 'look at locks', 'lock', 'run true',
        ], acts)


class FileTest(RemoteCase):
    def test_hostile_names_arrive_as_they_are(self) -> None:
        names = [name for name in HOSTILE if name]
        for name in names:
            path = self.path(f'pool/{name}')
            self.node.make_directory(os.path.dirname(path))
            self.node.write(path, name.encode(errors='replace'))
            with self.node.open(path) as file:
                self.assertEqual(name.encode(errors='replace'), file.read())
            self.node.configure([Op.put(path, 'x')])
        self.assertEqual(sorted(names), self.node.list(self.path('pool')))
        self.assertEqual(sorted(names), sorted(os.listdir(self.path('pool'))))

    def test_errors_have_their_kinds_and_names(self) -> None:
        missing = self.path('none')
        for kind, call in (
            (errors.NotFound, lambda: self.node.size(missing)),
            (errors.NotFound, lambda: self.node.open(missing)),
            (errors.Conflict, lambda: self.node.open(self.root + '/f', 'xb')),
            (errors.Invalid, lambda: self.node.read(self.root + '/f', 2)),
        ):
            with open(self.root + '/f', 'w') as f:
                f.write('abc')
            with self.assertRaisesRegex(kind, self.root):
                call()
        with self.node.open('/dev/full', 'r+b') as file:
            with self.assertRaises(errors.NoSpace):
                file.write(b'x')

    def test_much_is_written_and_read_in_one_call(self) -> None:
        data = os.urandom(9 << 20)
        with self.node.open(self.path('f'), 'w+b') as file:
            self.assertEqual(len(data), file.write(data))
            file.seek(0)
            self.assertEqual(data, file.read())
        self.assertEqual(data, self.node.read(self.path('f'), 10 << 20))
        with self.assertRaises(errors.Invalid):
            self.node.write(self.path('g'), data)

    def test_file_is_lost_with_its_connection(self) -> None:
        with self.node.open(self.path('f'), 'w+b') as file:
            self.node.close()
            for call in (lambda: file.write(b'x'), file.sync):
                with self.assertRaises(errors.Unavailable):
                    call()
        with self.node.open(self.path('f')) as file:
            self.assertEqual(b'', file.read())

    def test_closed_files_are_closed_there(self) -> None:
        def descriptors() -> int:
            return len(os.listdir(f'/proc/{pid}/fd'))

        pid = agent_pid(self.node)
        before = descriptors()
        for _ in range(20):
            with self.node.open(self.path('f'), 'w+b'):
                pass
            left = self.node.open(self.path('f'))
            del left  # as where an exception has thrown it away
        self.node.exists('/')
        wait_until(self, lambda: descriptors() <= before)


class GreenTest(unittest.TestCase):
    """The same in a process of greenthreads."""

    def test_many_wait_at_once_and_nobody_else_does(self) -> None:
        if importlib.util.find_spec('eventlet') is None:
            self.skipTest('no eventlet')
        program = (
            'from volume import concurrency\n'
            'concurrency.start("eventlet")\n'
            'import concurrent.futures, sys\n'
            'from tests import sshd\n'
            'from volume.remote.node import SshNode\n'
            'node = SshNode(sshd.direct_target(sys.argv[1]))\n'
            'def ask(number):\n'
            '    with node.hold([f"v{number}"]):\n'
            '        path = f"{sys.argv[1]}/f{number}"\n'
            '        with node.open(path, "w+b") as file:\n'
            '            file.write(b"x" * number)\n'
            '            file.sync()\n'
            # Each waits for the next one's file; the last for nobody.
            '        node.run("sh", "-c", "until test -e $0; do sleep .05;'
            ' done", f"{sys.argv[1]}/f{min(number + 1, 20)}")\n'
            '        return node.size(path)\n'
            'with concurrent.futures.ThreadPoolExecutor(20) as threads:\n'
            '    print(list(threads.map(ask, range(1, 21))))\n'
            'node.close()\n'
        )
        done = subprocess.run(
            [sys.executable, '-c', program, fixtures.state_dir(self)],
            capture_output=True, text=True, timeout=120,
        )
        self.assertEqual(
            f'{list(range(1, 21))}\n', done.stdout, done.stderr
        )


if __name__ == '__main__':
    unittest.main()
