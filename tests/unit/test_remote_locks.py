# SPDX-License-Identifier: Apache-2.0
"""Locks of a node that several services share: who may come after whom."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import threading
import time
import unittest
from collections.abc import Iterator

from tests.unit.test_remote import agent_pid
from tests.unit.test_remote import lives
from tests.unit.test_remote import RemoteCase
from tests.unit.test_remote import WAIT_S
from tests.unit.test_remote import wait_until
from volume import errors
from volume.node import Op
from volume.remote.node import SshNode


class LockTest(RemoteCase):
    """Two services and one node: who has lost the lease is kept out."""

    def test_successor_ends_what_the_stale_owner_runs(self) -> None:
        stale, later = self.node, self.another()
        context = stale.hold(['v'])
        context.__enter__()
        with self.busy(stale) as (pid, future):
            with later.hold(['v']):
                # It has let go of all its files, and is about to vanish.
                wait_until(self, lambda: not lives(pid))
                with self.assertRaises(errors.Unknown):
                    future.result(WAIT_S)
                # In its old turn it gets nothing done any more.
                with self.assertRaisesRegex(
                    errors.Unavailable, 'nothing was done'
                ):
                    stale.write(self.path('f'), b'stale')
                later.write(self.path('f'), b'later')
        with contextlib.suppress(errors.VolumeError):
            context.__exit__(None, None, None)
        self.assertEqual(b'later', later.read(self.path('f')))

    def test_orphan_is_ended_before_the_lock_is_had(self) -> None:
        agent = agent_pid(self.node)
        with self.node.hold(['v']), self.busy(self.node) as (pid, _):
            # Its child has a child of its own, which no belt holds.
            orphan = int(self.node.run(
                'sh', '-c', 'sleep 600 >/dev/null 2>&1 & echo $!'
            ))
            os.kill(agent, signal.SIGKILL)
            wait_until(self, lambda: not lives(pid))
            self.assertTrue(lives(orphan))
            with self.another().hold(['v']):
                wait_until(self, lambda: not lives(orphan))

    def test_who_has_lost_the_lease_takes_nothing(self) -> None:
        def prove() -> None:
            raise errors.VolumeError('the job was taken over')

        later = self.another()
        with later.hold(['v']), self.busy(later) as (pid, _):
            with self.assertRaisesRegex(errors.VolumeError, 'taken over'):
                with self.node.hold(['v'], prove=prove):
                    self.fail('it has the lock')
            self.assertTrue(lives(pid))
            later.run('true')

    def test_who_was_suspended_after_the_proof_takes_nothing(self) -> None:
        # The proof still holds; then another gets the lease, and the lock.
        with contextlib.ExitStack() as stack:
            later = self.another()
            proofs: list[int] = []

            def prove() -> None:
                proofs.append(1)
                if len(proofs) > 1:
                    raise errors.VolumeError('the job was taken over')
                stack.enter_context(later.hold(['v', 'w']))

            with self.assertRaisesRegex(errors.VolumeError, 'taken over'):
                with self.node.hold(['v'], ['w'], prove=prove):
                    self.fail('it has the lock')
            self.assertEqual(2, len(proofs))
            later.run('true')

    def test_each_request_is_checked_against_the_ticket(self) -> None:
        path = self.path('f')
        with self.node.hold(['v'], ['w']):
            with self.node.open(path, 'w+b') as file:
                file.write(b'before')
                for name in 'v', 'w':
                    ticket = os.path.join(self.node.lock_dir, name)
                    with open(ticket, 'r+b') as f:
                        kept = f.read()
                        f.seek(0)
                        f.write(b'another')
                    for call in (
                        lambda: file.pwrite(b'after!', 0),
                        lambda: self.node.unlink(path),
                        lambda: self.node.run('rm', path),
                        lambda: self.node.configure([Op.unlink(path)]),
                    ):
                        with self.assertRaisesRegex(
                            errors.Unavailable, f'{name} has a later owner'
                        ):
                            call()
                    with open(ticket, 'wb') as f:
                        f.write(kept)
                file.pwrite(b'B', 0)
        self.assertEqual(b'Before', self.node.read(path))

    def test_lock_is_lost_with_the_connection(self) -> None:
        with self.node.hold(['v']):
            self.node.close()
            with self.assertRaisesRegex(errors.Unavailable, 'locks with it'):
                self.node.run('true')
        with self.node.hold(['v']):
            self.node.run('true')

    def test_neighbour_that_lets_go_in_time_is_left_alone(self) -> None:
        agent = agent_pid(self.node)
        with self.held_for_a_while(self.node):
            with self.another().hold(['v'], grace_s=9):
                self.assertTrue(lives(agent))

    def test_readers_share_and_a_writer_waits_for_its_own(self) -> None:
        other = self.another()
        with self.node.hold([], ['s']), other.hold([], ['s']):
            self.node.run('true')
            other.run('true')
        with self.node.hold(['v'], ['s']), self.node.hold(['x'], ['s']):
            self.node.run('true')
        # The next job of the same service: the first has not quite ended.
        with self.held_for_a_while(self.node):
            with self.node.hold(['v']):
                self.node.run('true')

    @contextlib.contextmanager
    def held_for_a_while(self, node: SshNode) -> Iterator[None]:
        """Have a thread hold a lock, and let go of it soon."""
        is_held = threading.Event()

        def hold() -> None:
            with node.hold(['v']):
                is_held.set()
                time.sleep(0.3)

        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            done = threads.submit(hold)
            self.assertTrue(is_held.wait(WAIT_S))
            yield
            done.result()

    def test_names_of_locks_lead_nowhere_else(self) -> None:
        for name in '../x', 'a/b', '', '.tickets', 'x' * 300, 'a\n':
            with self.assertRaises(errors.Invalid):
                with self.node.hold([name]):
                    self.fail('it has the lock')

    def test_old_locks_are_removed_and_held_ones_stay(self) -> None:
        with self.node.hold(['old', 'held', 'new']):
            pass
        directory = self.node.lock_dir
        other = self.another()
        with self.node.hold(['held']):
            for name in 'old', 'held':
                os.utime(os.path.join(directory, name), (1, 1))
            with other.hold(['x']):
                self.assertEqual(
                    {'.tickets', 'held', 'new', 'x'},
                    set(os.listdir(directory)),
                )
            self.node.run('true')


if __name__ == '__main__':
    unittest.main()
