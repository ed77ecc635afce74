# SPDX-License-Identifier: Apache-2.0
"""A service under load whose database goes away, and comes back.

It hangs, or it is killed and started again. Meanwhile every request is
answered within a bounded time; afterwards all that was accepted is done,
once, by the same process and the same threads.
"""

import json
import os
import threading
import time
import unittest

from tests import database
from tests.process import Refused
from tests.process import ServiceProcess

IS_PROOF = os.environ.get('VOLUME_PROOF') == '1'
AWAY_S = 30.0 if IS_PROOF else 5.0
CLIENTS = 6
SECTION = '[b]\ndriver = file\ndirectories = {root}/pool\nexporter = local\n'
# A short outage must be as long, for a short patience, as a long one is for
# what a service has by default.
HASTY = '' if IS_PROOF else 'database_timeout_s = 2\nlease_s = 3\n'
ANSWER_S = 60.0 if IS_PROOF else 20.0
MIB = 1 << 20
# A row may be looked for again at the next sweep after its lease.
SETTLE_S = 120


class Client(threading.Thread):
    """Makes, extends and deletes volumes, and remembers what it was told."""

    def __init__(self, service, over):
        super().__init__()
        self.service, self.over = service, over
        self.made, self.deleted, self.unsure = set(), set(), set()
        self.refusals, self.slowest_s, self.bug = [], 0.0, None

    def run(self):
        try:
            while not self.over.is_set():
                volume_id = self.ask(lambda: self.service.create(
                    size_bytes=MIB, name=self.name
                ))
                if volume_id is None:
                    continue
                self.made.add(volume_id)
                if len(self.made) % 2:
                    self.settle(volume_id)
                    self.unsure.add(volume_id)
                    if self.ask(lambda v=volume_id: self.service.call(
                        'DELETE', f'/volumes/{v}'
                    ) or 'done'):
                        self.deleted.add(volume_id)
                        self.unsure.discard(volume_id)
        except BaseException as bug:  # told to the test's thread
            self.bug = bug

    def settle(self, volume_id):
        while not self.over.is_set():
            row = self.ask(lambda: self.service.volume(volume_id))
            if row and row['status'] != 'creating':
                return
            time.sleep(0.01)

    def ask(self, request):
        """Return the answer; ``None`` if the service says: not now."""
        begun = time.monotonic()
        try:
            return request()
        except Refused as refused:
            if refused.status not in (503, 400):
                raise
            self.refusals.append(str(refused))
            self.over.wait(0.05)
            return None
        finally:
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)


class Outage(unittest.TestCase):
    database_kind = 'postgresql'

    def setUp(self):
        self.server = database.server(self.database_kind)
        self.service = ServiceProcess(self, SECTION, extra=HASTY)
        self.service.start()

    def test_a_database_that_hangs(self):
        if not IS_PROOF and self.database_kind == 'mariadb':
            self.skipTest('VOLUME_PROOF=1 runs each of them on each')
        self.load(self.server.freeze, self.server.thaw)

    def test_a_database_that_is_killed_and_started_again(self):
        if not IS_PROOF and self.database_kind == 'postgresql':
            self.skipTest('VOLUME_PROOF=1 runs each of them on each')
        self.load(self.server.kill, self.server.start)

    def load(self, away, back):
        self.addCleanup(back)
        over = threading.Event()
        clients = [Client(self.service, over) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(1.0)
        away()
        time.sleep(AWAY_S)
        back()
        self.doCleanups_of_server(back)
        time.sleep(2.0)
        # Work goes on while there are clients, not only once they are gone.
        before = sum(len(client.made) for client in clients)
        self.until(
            lambda: sum(len(client.made) for client in clients) > before + 6
        )
        over.set()
        for client in clients:
            client.join(ANSWER_S * 2)
            self.assertIsNone(client.bug)
        self.check(clients)

    def doCleanups_of_server(self, back):
        """What was thawed or started needs no second time."""
        self._cleanups = [
            each for each in self._cleanups if each[0] != back
        ]

    def check(self, clients):
        refusals = [each for client in clients for each in client.refusals]
        self.assertTrue(refusals, 'the outage was not noticed')
        for each in refusals:
            self.assertRegex(each, '^503: .*database|^400: .*status')
        self.assertLess(
            max(client.slowest_s for client in clients), ANSWER_S
        )
        self.until(self.is_settled)
        there = self.service.volumes()
        made = set().union(*(client.made for client in clients))
        deleted = set().union(*(client.deleted for client in clients))
        unsure = set().union(*(client.unsure for client in clients))
        self.assertEqual(set(), (made - deleted - unsure) - set(there))
        self.assertEqual(set(), deleted & set(there))
        # A create that was not answered with its id may be there, once.
        self.assertEqual(
            {'available'}, {row['status'] for row in there.values()}
        )
        [(claimed,)] = self.service.sql('SELECT claimed_bytes FROM pools')
        self.assertEqual(MIB * len(there), claimed)
        found = self.service.manage(
            '--format', 'json', 'reconcile', '--dry-run'
        )
        self.assertEqual([], json.loads(found.stdout), found.stderr)
        with open(self.service.log) as f:
            log = f.read()
        self.assertNotIn('Traceback', log)
        self.assertNotIn('bug', log)
        self.no_thread_has_died()

    def no_thread_has_died(self):
        """The heart still beats, and a new volume is made and ends."""
        [(heard,)] = self.service.sql('SELECT heard_at FROM services')
        self.until(lambda: self.service.sql(
            'SELECT heard_at FROM services'
        ) > [(heard,)])
        made = self.service.create(size_bytes=MIB)
        self.service.wait(made, 'available')
        self.service.call('DELETE', f'/volumes/{made}')
        self.service.wait(made, 'gone')

    def is_settled(self):
        return self.service.sql(
            "SELECT count(*) FROM jobs WHERE state = 'open'"
        ) == [(0,)]

    def until(self, is_so):
        deadline = time.monotonic() + SETTLE_S
        while not is_so():
            self.assertLess(time.monotonic(), deadline, self.service.tail())
            time.sleep(0.1)


class OutageOfMariadb(Outage):
    database_kind = 'mariadb'
