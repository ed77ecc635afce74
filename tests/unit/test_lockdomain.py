# SPDX-License-Identifier: Apache-2.0
"""Who shares the locks of a machine, and what is proved of a silent one."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import unittest

from tests import database
from volume import errors
from volume import ids
from volume import takeover
from volume.core import Core
from volume.core import Settings
from volume.db import models
from volume.lockdomain import LockDomain
from volume.testing import fixtures

TOP = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
MEMBER = textwrap.dedent('''
    import sys, time
    from volume.lockdomain import LockDomain
    directory, host, owner = sys.argv[1:]
    domain = LockDomain(directory)
    domain.join(host, owner, directory + '/' + host)
    print(domain.id, flush=True)
    time.sleep(600)
''')


class Joined(unittest.TestCase):
    """What the tests here share: a domain that this process has joined."""

    def setUp(self):
        self.directory = os.path.join(fixtures.state_dir(self), 'locks')
        self.domain = LockDomain(self.directory)
        self.domain.join('here', ids.new(), '/here')

    def member(self, owner, host='there'):
        """Return another process that has joined, and the domain's id."""
        child = subprocess.Popen(
            [sys.executable, '-c', MEMBER, self.directory, host, owner],
            stdout=subprocess.PIPE, text=True, cwd=TOP,
        )
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child, child.stdout.readline().strip()


class LockDomains(Joined):
    def test_processes_of_one_directory_are_one_domain(self):
        _, found = self.member('o')
        self.assertEqual(self.domain.id, found)
        other = LockDomain(f'{self.directory}2')
        other.join('here', ids.new(), '/here')
        self.assertNotEqual(self.domain.id, other.id)
        again = LockDomain(self.directory)
        again.join('here', ids.new(), '/here')
        self.assertEqual(self.domain.id, again.id)

    def test_a_member_is_ended_even_if_it_is_stopped(self):
        child, _ = self.member('o')
        child.send_signal(signal.SIGSTOP)
        self.assertEqual(
            f'{self.directory}/there', self.domain.end('there', 'o')
        )
        self.assertEqual(-signal.SIGKILL, child.wait(10))
        # It may have been ended by another neighbour, or have died.
        self.domain.end('there', 'o')

    def test_a_member_is_ended_by_a_process_with_many_files(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE,
                        (soft, hard))
        child, _ = self.member('o')
        for _ in range(1024):
            self.addCleanup(os.close, os.open(os.devnull, os.O_RDONLY))
        self.domain.end('there', 'o')
        self.assertEqual(-signal.SIGKILL, child.wait(10))

    def test_one_that_was_started_again_is_left_alone(self):
        self.member('old')
        child, _ = self.member('new')
        with self.assertRaisesRegex(errors.Unavailable, 'started again'):
            self.domain.end('there', 'old')
        self.assertIsNone(child.poll())

    def test_a_process_that_got_the_number_of_a_dead_one_is_left_alone(self):
        child, _ = self.member('o')
        path = os.path.join(self.directory, '.members', 'there')
        with open(path) as f:
            owner, pid, started, state = f.read().splitlines()
        with open(path, 'w') as f:
            f.write(f'{owner}\n{pid}\n{int(started) - 1}\n{state}\n')
        self.domain.end('there', 'o')
        self.assertIsNone(child.poll())

    def test_who_never_joined_is_not_known_to_have_ended(self):
        with self.assertRaisesRegex(errors.Unavailable, 'left no word'):
            self.domain.end('nobody', 'o')


class TakingOver(Joined):
    """What a manager does about its neighbours' jobs."""

    def setUp(self):
        super().setUp()
        self.clock = database.Clock()
        self.db = database.make(self, self.clock)
        self.core = Core(
            db=self.db, hint=lambda *_: None, wait=lambda *_: None,
            settings=Settings(), owner='mine', owner_host='here',
        )
        self.node = fixtures.make_node(self)
        self.child, _ = self.member('o')

    def service(self, **values):
        database.add(self.db, models.Service(**{
            'host': 'there', 'owner': 'o', 'roles': ['manager'],
            'domain': self.domain.id, 'started_at': database.NOW,
            'heard_at': database.NOW, **values,
        }))

    def job(self, **values):
        row = database.job(owner='o', owner_host='there', **values)
        database.add(self.db, row)
        return row.id

    def take_over(self, after_s):
        """Look at such a time, and as often before as it is done."""
        neighbours = takeover.Neighbours(
            self.core, self.node, self.domain, silent_s=30.0, gap_s=20.0
        )
        for self.clock.now in range(
            int(database.NOW) + after_s - 40, int(database.NOW) + after_s, 10
        ):
            neighbours.look()
        self.clock.now = database.NOW + after_s
        return neighbours.look()

    def test_jobs_of_a_silent_neighbour_are_anybodys_once_it_has_ended(self):
        self.service()
        job_id = self.job()
        self.assertEqual(0, self.take_over(29))
        self.assertIsNone(self.child.poll())
        self.assertEqual(1, self.take_over(31))
        self.assertEqual(-signal.SIGKILL, self.child.wait(10))
        row = database.get(self.db, models.Job, job_id)
        # Whoever takes it knows that helpers of another may still run.
        self.assertEqual((None, 'there'), (row.owner, row.owner_host))

    def test_one_that_hangs_is_ended_even_if_it_has_no_job(self):
        """It may hold a lock that is in everybody's way."""
        self.service()
        with self.assertLogs('volume.takeover', 'WARNING') as logged:
            self.assertEqual(0, self.take_over(3600))
        self.assertEqual(-signal.SIGKILL, self.child.wait(10))
        self.assertEqual(1, len(logged.output), 'it is said once')

    def test_who_was_away_itself_lets_the_others_be_heard_of_again(self):
        self.service()
        self.job()
        neighbours = takeover.Neighbours(
            self.core, self.node, self.domain, silent_s=30.0, gap_s=20.0
        )
        for after_s in 0, 10, 20, 30, 40, 300, 310, 320:
            self.clock.now = database.NOW + after_s
            heard_at = self.clock.now if after_s < 50 else None
            if heard_at:
                self.db.write(lambda s, at=heard_at: setattr(
                    s.get(models.Service, 'there'), 'heard_at', at
                ))
            self.assertEqual(0, neighbours.look())
        self.assertIsNone(self.child.poll())
        self.clock.now = database.NOW + 331
        self.assertEqual(1, neighbours.look())

    def test_one_that_is_heard_of_keeps_what_has_run_out(self):
        self.service(heard_at=database.NOW + 3600)
        self.job()
        self.assertEqual(0, self.take_over(3600))
        self.assertIsNone(self.child.poll())

    def test_another_domain_is_left_to_its_operator(self):
        self.service(domain='elsewhere')
        self.job()
        self.assertEqual(0, self.take_over(3600))
        self.assertIsNone(self.child.poll())

    def test_what_cannot_be_ended_keeps_its_jobs(self):
        self.service(host='nobody')
        job_id = self.job()
        with self.assertLogs('volume.takeover', 'ERROR') as logged:
            self.assertEqual(0, self.take_over(3600))
        self.assertIn('are not taken over', logged.output[0])
        row = database.get(self.db, models.Job, job_id)
        self.assertEqual('o', row.owner)
