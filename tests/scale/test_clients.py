# SPDX-License-Identifier: Apache-2.0
"""Two hundred clients at once, over sockets that they keep."""

import contextlib
import http.client
import itertools
import json
import threading
import unittest

from tests import process

CLIENTS = 200
ROUNDS = 6
WAIT_S = 240
RESIDENT_MIB = 200  # what one client of a small service takes, and half
HEADERS = {
    'OpenStack-API-Version': 'volume 3.54',
    'Content-Type': 'application/json',
}


class Client(threading.Thread):
    """One client: it makes a volume, looks at it, and lists."""

    def __init__(self, test, url, number):
        super().__init__(daemon=True)
        self.test = test
        self.connection = http.client.HTTPConnection(
            url.split('/')[2], timeout=WAIT_S
        )
        # What was refused or reset is not asked again behind our back.
        self.connection.auto_open = 0
        self.number = number
        self.volume_id = ''
        self.failed = None
        self.answered = []

    def run(self):
        try:
            with contextlib.closing(self.connection):
                self.connection.connect()
                self.test.barrier.wait(WAIT_S)
                self.work()
        except Exception as failed:
            self.failed = failed

    def work(self):
        for _ in range(ROUNDS):
            self.ask('GET', '/v3/volumes/detail?limit=20')
        made = self.ask('POST', '/v3/volumes', {'volume': {
            'size': 1, 'name': f'volume-{self.number}',
        }})
        self.volume_id = made['volume']['id']
        seen = self.ask('GET', f'/v3/volumes/{self.volume_id}')
        if seen['volume']['name'] != f'volume-{self.number}':
            raise AssertionError(seen)

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body)
        self.connection.request(method, path, data, HEADERS)
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise AssertionError(f'{answer.status}: {text[:300]}')
        if answer.getheader('Connection') == 'close':
            raise AssertionError('the connection was not kept')
        self.answered.append(next(self.test.answers))
        return json.loads(text)


class Clients(unittest.TestCase):
    def setUp(self):
        self.service = process.ServiceProcess(self, (
            '[b]\ndriver = file\nexporter = local\n'
            'directories = {root}/pool\noversubscription = 1000\n'
        ))
        self.service.start()
        self.barrier = threading.Barrier(CLIENTS)
        self.answers = itertools.count()

    def test_each_of_200_is_served_in_its_turn_and_none_is_refused(self):
        clients = [
            Client(self, self.service.url, number)
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(WAIT_S)
        self.assertEqual(
            [], [each.failed for each in clients if each.failed]
        )
        self.assertEqual(
            CLIENTS * (ROUNDS + 2), sum(len(c.answered) for c in clients)
        )
        for client in clients:
            row = self.service.wait(client.volume_id, 'available', 'error')
            self.assertEqual('available', row['status'], row['reason'])
        self.assert_nobody_waits_for_ever(clients)
        self.assertLess(self.most_resident_mib(), RESIDENT_MIB)

    def most_resident_mib(self):
        with open(f'/proc/{self.service.process.pid}/status') as f:
            (line,) = (line for line in f if line.startswith('VmHWM'))
        return int(line.split()[1]) // 1024

    def assert_nobody_waits_for_ever(self, clients):
        """When the last gets a first answer, none has had them all."""
        last = max(client.answered[0] for client in clients)
        ahead = max(
            sum(1 for each in client.answered if each < last)
            for client in clients
        )
        self.assertLess(ahead, ROUNDS)


if __name__ == '__main__':
    unittest.main()
