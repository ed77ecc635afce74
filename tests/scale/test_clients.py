# SPDX-License-Identifier: Apache-2.0
"""Two hundred clients at once, over sockets that they keep."""

import http.client
import itertools
import json
import selectors
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


class Client:
    """One client: it lists, makes a volume, and looks at it."""

    def __init__(self, url, number):
        self.connection = http.client.HTTPConnection(
            url.split('/')[2], timeout=WAIT_S
        )
        self.connection.connect()
        # What was refused or reset is not asked again behind our back.
        self.connection.auto_open = 0
        self.name = f'volume-{number}'
        self.volume_id = ''
        self.answered = []
        self.talk = self.work()
        self.wanted = next(self.talk)

    def fileno(self):
        return self.connection.sock.fileno()

    def work(self):
        for _ in range(1 + ROUNDS):
            yield 'GET', '/v3/volumes/detail?limit=20', None
        made = yield 'POST', '/v3/volumes', {
            'volume': {'size': 1, 'name': self.name},
        }
        self.volume_id = made['volume']['id']
        seen = yield 'GET', f'/v3/volumes/{self.volume_id}', None
        if seen['volume']['name'] != self.name:
            raise AssertionError(seen)

    def ask(self):
        method, path, body = self.wanted
        data = None if body is None else json.dumps(body)
        self.connection.request(method, path, data, HEADERS)

    def hear(self, number):
        """Take an answer; say whether there is more to ask."""
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise AssertionError(f'{answer.status}: {text[:300]}')
        if answer.getheader('Connection') == 'close':
            raise AssertionError('the connection was not kept')
        self.answered.append(number)
        try:
            self.wanted = self.talk.send(json.loads(text))
        except StopIteration:
            self.connection.close()
            return False
        return True


class Clients(unittest.TestCase):
    def setUp(self):
        self.service = process.ServiceProcess(self, (
            '[b]\ndriver = file\nexporter = local\n'
            'directories = {root}/pool\noversubscription = 1000\n'
        ))
        self.service.start()

    def test_each_of_200_is_served_in_its_turn_and_none_is_refused(self):
        clients = [
            Client(self.service.url, number) for number in range(CLIENTS)
        ]
        # All are let in first: the server takes new ones in one by one.
        for client in clients:
            client.ask()
            client.hear(0)
            client.answered.clear()
        self.talk(clients)
        self.assertEqual(
            CLIENTS * (ROUNDS + 2), sum(len(c.answered) for c in clients)
        )
        for client in clients:
            row = self.service.wait(client.volume_id, 'available', 'error')
            self.assertEqual('available', row['status'], row['reason'])
        self.assert_nobody_waits_for_ever(clients)
        self.assertLess(self.most_resident_mib(), RESIDENT_MIB)

    def talk(self, clients):
        """Have all ask at once, and each again when it has its answer.

        In one thread: with one for each, the order would be that of this
        process's scheduler, and not of the service.
        """
        numbers = itertools.count()
        with selectors.DefaultSelector() as waiting:
            for client in clients:
                client.ask()
                waiting.register(client, selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(WAIT_S)
                self.assertTrue(ready, 'nobody was answered')
                for key, _ in ready:
                    waiting.unregister(key.fd)
                    if key.fileobj.hear(next(numbers)):
                        key.fileobj.ask()
                        waiting.register(key.fileobj, selectors.EVENT_READ)

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
