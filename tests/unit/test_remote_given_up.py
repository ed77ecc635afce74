# SPDX-License-Identifier: Apache-2.0
"""Requests that nobody waits for any more, and answers that are too large."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from tests import sshd
from tests.unit.test_endings import CAREFUL
from tests.unit.test_remote import agent_pid
from tests.unit.test_remote import lives
from tests.unit.test_remote import RemoteCase
from tests.unit.test_remote import WAIT_S
from tests.unit.test_remote import wait_until
from volume import errors
from volume.remote import agent
from volume.remote import wire
from volume.remote.link import Link
from volume.testing import fixtures

# It greets, and tells of the first request only when that is cancelled.
IDLE = '''
import os, signal
from volume.remote import wire
def say(header):
    os.write(1, b''.join(map(bytes, wire.pack(header))))
os.write(1, wire.MAGIC)
say({'hello': wire.VERSION})
while wire.receive(lambda into: os.readv(0, [into]))[0]['do'] != 'cancel':
    pass
say({'id': 1, 'error': 'Unavailable', 'message': 'nothing was done'})
signal.pause()
'''


class GivingUp(Link):
    """Has something done as soon as it has given a request up."""

    def then(self) -> None:
        """Nothing, as a rule."""

    def post(self, do: str, *args: Any) -> None:
        super().post(do, *args)
        if do == 'cancel':
            self.then()


class LinkTest(unittest.TestCase):
    """One connection, and what comes late through it."""

    def setUp(self) -> None:
        self.root = fixtures.state_dir(self)

    def link(self, *argv: str) -> GivingUp:
        link = GivingUp('near', argv, str)
        link.open()
        self.addCleanup(link.close)
        return link

    def assert_late(self, ask: Callable[[], object]) -> None:
        """Ask for what comes too late, until the agent has begun it."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                with self.assertRaisesRegex(errors.Unknown, 'within 0.1 s'):
                    ask()
                return
            except errors.Unavailable as unbegun:
                self.assertIn('nothing was done', str(unbegun))
                self.assertLess(time.monotonic(), deadline)

    def agent(self) -> GivingUp:
        return self.link(*sshd.direct_target(self.root).argv())

    def test_lock_that_comes_too_late_is_given_back(self) -> None:
        link = self.agent()

        def hold(timeout_s: float) -> int:
            seen, _ = link.call('tickets', ['v'])
            return int(link.call(
                'hold', seen, ['v'], 9.0, timeout_s=timeout_s
            )[0])

        def hold_late() -> None:
            first = hold(WAIT_S)
            link.then = (  # type: ignore[method-assign]
                lambda: link.post('release', first))
            hold(0.1)

        self.assert_late(hold_late)
        link.post('release', hold(WAIT_S))
        self.assertFalse(link.is_lost)

    def test_lock_of_others_that_comes_too_late_is_given_back(self) -> None:
        link, path = self.agent(), os.path.join(self.root, 'lock')

        def borrow(timeout_s: float) -> int:
            return int(link.call(
                'borrow', path, 2 * WAIT_S, timeout_s=timeout_s
            )[0])

        first = borrow(WAIT_S)
        self.assert_late(lambda: borrow(0.1))
        link.post('release', first)
        link.post('release', borrow(WAIT_S))
        self.assertFalse(link.is_lost)

    def test_file_that_is_opened_too_late_is_closed(self) -> None:
        link = self.agent()
        path = os.path.join(self.root, 'fifo')
        os.mkfifo(path)
        pid, _ = link.call('start', ['sleep', '600'], f'{path}.log')[0]
        with open(f'/proc/{pid}/stat') as f:
            parent = f.read().rpartition(')')[2].split()[1]
        os.kill(pid, signal.SIGKILL)

        def is_open() -> bool:
            fds = f'/proc/{parent}/fd'
            with contextlib.suppress(FileNotFoundError):
                return path in [
                    os.readlink(f'{fds}/{fd}') for fd in os.listdir(fds)
                ]
            return True

        def open_late() -> None:
            with contextlib.ExitStack() as after:
                # Who opens both ends of a pipe waits for nobody, and
                # nobody waits for another beside him.
                link.then = lambda: after.callback(  # type: ignore
                    os.close, os.open(path, os.O_RDWR))
                link.call('open', path, 'rb', timeout_s=0.1)

        self.assert_late(open_late)
        wait_until(self, lambda: not is_open())

    def test_request_that_was_not_begun_is_told_as_such(self) -> None:
        link = self.link(sys.executable, '-c', IDLE)
        with self.assertRaisesRegex(errors.Unavailable, 'nothing was done'):
            link.call('write', '/x', timeout_s=0.1)
        self.assertFalse(link.is_lost)

    def test_answer_that_is_too_large_is_told_and_the_next_is_served(
        self
    ) -> None:
        link = self.agent()
        os.makedirs(os.path.join(self.root, 'd'))
        # What is no UTF-8 is told in six characters for each byte.
        for number in range(wire.HEADER_BYTES_MAX // (6 * 240) + 1):
            name = '\udcff' * 240 + f'{number:05}'
            os.mknod(os.path.join(self.root, 'd', name))
        for _ in range(3):
            with self.assertRaisesRegex(errors.Invalid, 'too large'):
                link.call(
                    'list_', os.path.join(self.root, 'd'), timeout_s=WAIT_S
                )
            self.assertEqual(
                True, link.call('exists', self.root, timeout_s=WAIT_S)[0]
            )


class QueueTest(unittest.TestCase):
    """More requests than an agent has threads."""

    def setUp(self) -> None:
        self.root = fixtures.state_dir(self)
        self.fifo = os.path.join(self.root, 'fifo')
        os.mkfifo(self.fifo)

    @contextlib.contextmanager
    def agent(self) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(
            [sys.executable, '-m', 'volume.remote.agent', '--state-path',
             self.root],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        ) as child:
            try:
                assert child.stdout
                # Under eventlet it is not.
                os.set_blocking(child.stdout.fileno(), True)
                os.read(child.stdout.fileno(), len(wire.MAGIC))
                self.hear(child)
                yield child
            finally:
                child.kill()

    def ask(self, child: subprocess.Popen[bytes], **header: object) -> None:
        assert child.stdin
        child.stdin.write(wire.pack(header)[0])
        child.stdin.flush()

    def hear(self, child: subprocess.Popen[bytes]) -> wire.Header:
        assert child.stdout
        fd = child.stdout.fileno()
        found = wire.receive(lambda into: os.readv(fd, [into]))
        assert found
        return found[0]

    def let_go(self, child: subprocess.Popen[bytes]) -> set[int]:
        """Let all go on who open the pipe, and hear their answers."""
        heard: set[int] = set()

        def are_all_heard() -> bool:
            with contextlib.suppress(OSError):  # nobody has it open now
                os.close(os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK))
            while select.select([child.stdout], [], [], 0.05)[0]:
                heard.add(self.hear(child)['id'])
            return len(heard) >= agent.THREADS_MAX

        wait_until(self, are_all_heard)
        return heard

    def test_what_is_cancelled_while_it_waits_never_begins(self) -> None:
        made = os.path.join(self.root, 'made')
        count = agent.THREADS_MAX
        with self.agent() as child:
            for number in range(1, count + 1):
                self.ask(child, id=number, do='read', args=[self.fifo, 9])
            self.ask(child, id=1000, do='mkdir', args=[made])
            for _ in range(2):
                self.ask(child, id=0, do='cancel', args=[1000])
            said = self.hear(child)
            self.assertEqual((1000, 'Unavailable'), (
                said.get('id'), said.get('error')
            ))
            self.assertIn('nothing was done', said['message'])
            self.assertEqual(set(range(1, count + 1)), self.let_go(child))
            for number in range(2000, 2000 + count):
                self.ask(child, id=number, do='exists', args=[made])
                self.assertEqual(
                    {'id': number, 'result': False}, self.hear(child)
                )

    def test_who_has_borrowed_a_lock_waits_for_nobody_who_waits_for_it(
        self,
    ) -> None:
        with self.agent() as child:
            lock = os.path.join(self.root, 'V_vg')
            self.ask(child, id=1, do='borrow', args=[lock, 30])
            held = self.hear(child)['result']
            for number in range(agent.THREADS_MAX):
                self.ask(
                    child, id=100 + number, do='read', args=[self.fifo, 9]
                )
            self.ask(child, id=2, do='exists', args=[lock], holds=[held])
            self.assertEqual({'id': 2, 'result': True}, self.hear(child))
            self.let_go(child)


class EndTest(RemoteCase):
    """Commands whose connection is gone."""

    @contextlib.contextmanager
    def careful(self) -> Iterator[None]:
        """Have a command in the middle of its work; it finishes that."""
        path = self.path('done')
        thread = threading.Thread(target=self.run_careful, args=(path,))
        thread.start()
        try:
            wait_until(self, lambda: os.path.exists(f'{path}.begun'))
            yield
            wait_until(self, lambda: os.path.exists(path))
        finally:
            self.node.close()
            thread.join()

    def run_careful(self, path: str) -> None:
        with contextlib.suppress(errors.Unknown):
            self.node.run(
                sys.executable, '-c', CAREFUL, path, '0', timeout_s=600
            )

    def test_command_finishes_when_its_connection_goes(self) -> None:
        with self.careful():
            self.node.close()

    def test_command_finishes_when_its_agent_is_killed(self) -> None:
        pid = agent_pid(self.node)
        with self.careful():
            os.kill(pid, signal.SIGKILL)

    @unittest.skipUnless(os.environ.get('VOLUME_PROOF'), 'VOLUME_PROOF=1')
    def test_agent_stays_until_a_deaf_command_is_killed(self) -> None:
        with subprocess.Popen(
            [sys.executable, '-m', 'volume.remote.agent', '--state-path',
             self.root],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as child:
            assert child.stdin and child.stdout
            note = self.path('pid')
            child.stdin.write(wire.pack({'id': 1, 'do': 'run', 'args': [
                ['sh', '-c', 'trap "" TERM; echo $$ >$0.new; mv $0.new $0; '
                 'while true; do sleep 600; done', note], 600.0, 99, False,
            ]})[0])
            child.stdin.flush()
            wait_until(self, lambda: os.path.exists(note))
            with open(note) as f:
                pid = int(f.read())
            child.stdin.close()
            self.assertEqual(0, child.wait(WAIT_S))
            self.assertFalse(lives(pid))


if __name__ == '__main__':
    unittest.main()
