# SPDX-License-Identifier: Apache-2.0
"""One request is followed by its id through every process that it reaches."""

import contextlib
import http.client
import json
import os
import subprocess
import unittest
import uuid

from tests import process
from tests import rabbit
from tests.integration.serving import until

SECTIONS = '[b]\ndriver = qcow\ndirectories = {root}/pool\ncapacity_gib = 8\n'
DEBUG = 'log_level = DEBUG\n'
CONNECTOR = {'host': 'node-1', 'ip': '127.0.0.1', 'secret': 'sesame'}


def ask(service, method, path, body, request_id=None):
    """Send a request under an id; return the id that came back, and what."""
    connection = http.client.HTTPConnection(
        service.url.split('/')[2], timeout=60
    )
    headers = {
        'OpenStack-API-Version': 'volume 3.54',
        'Content-Type': 'application/json',
    }
    if request_id:
        headers['X-OpenStack-Request-ID'] = request_id
    with contextlib.closing(connection):
        connection.request(method, f'/v3{path}', json.dumps(body), headers)
        answer = connection.getresponse()
        said = json.loads(answer.read() or 'null')
        assert answer.status < 300, said
        return answer.getheader('X-OpenStack-Request-Id'), said


def create(service, request_id, **wish):
    """Have a volume made; return the request's id and the volume's."""
    kept, said = ask(
        service, 'POST', '/volumes', {'volume': wish}, request_id
    )
    return kept, said['volume']['id']


def mint():
    return f'req-{uuid.uuid4()}'


def lines(path):
    with open(path) as f:
        return f.read().splitlines()


class Following(unittest.TestCase):

    def assertTells(self, log, request_id, *words):
        """Each of the words stands in a line of the request's, in order."""
        story = [line for line in lines(log) if request_id in line]
        left = list(words)
        for line in story:
            if left and left[0] in line:
                left.pop(0)
        self.assertEqual([], left, '\n'.join(story))

    def test_through_api_job_commands_and_storage_daemon(self):
        service = process.ServiceProcess(self, SECTIONS, extra=DEBUG)
        service.start()
        making = mint()
        _, volume_id = create(service, making, size=1)
        service.wait(volume_id, 'available')
        job = f'create of volume {volume_id}'
        until(lambda: [x for x in lines(service.log) if 'is done' in x], bool)
        self.assertTells(
            service.log, making, 'volume.create.start', f'{job} begins on b',
            'do step 0 of', f'{job} is done after',
        )
        self.assertTells(service.log, making, '"POST /v3/volumes" 202')
        copying = mint()
        _, copy = create(service, copying, size=2, source_volid=volume_id)
        service.wait(copy, 'available')
        attaching = mint()
        ask(service, 'POST', f'/volumes/{volume_id}/action', {
            'os-initialize_connection': {'connector': CONNECTOR},
        }, attaching)
        self.assertTells(
            service.log, attaching, f'attach of volume {volume_id} begins',
            'qmp block-export-add: done', 'is done after', 'POST',
        )
        # Nobody else's line bears the id, and no secret stands anywhere.
        self.assertFalse([
            line for line in lines(service.log)
            if attaching in line and copying in line
        ])
        self.assertNotIn('sesame', '\n'.join(lines(service.log)))

    def test_an_id_that_is_no_id_is_not_taken_over(self):
        service = process.ServiceProcess(
            self, SECTIONS, extra='log_format = json\n'
        )
        service.start()
        given = 'req-1" 200\tforged'
        kept, _ = create(service, given, size=1)
        self.assertNotEqual(given, kept)
        until(lambda: 'is done' in '\n'.join(lines(service.log)), bool)
        self.assertNotIn('forged', '\n'.join(lines(service.log)))
        # With log_format = json every line is an object.
        events = [json.loads(line) for line in lines(service.log)]
        story = [each for each in events if each['request'] == kept]
        self.assertGreaterEqual(len(story), 3, events)
        for each in story:
            self.assertEqual(
                {'time', 'level', 'logger', 'request', 'message'}, set(each)
            )

    def test_through_api_and_manager_as_processes_of_their_own(self):
        broker = rabbit.Rabbit()
        self.addCleanup(broker.remove)
        broker.start()
        api = process.ServiceProcess(self, SECTIONS)
        shared = (
            f'{DEBUG}transport_url = {broker.url}\n'
            f'database = sqlite:///{api.root}/volume.sqlite\n'
        )
        manager = process.ServiceProcess(self, SECTIONS, extra=(
            f'{shared}roles = manager\nhost = manager-1\n'
        ))
        run = start_manager(self, manager)
        until(lambda: 'backend b is up' in '\n'.join(lines(run)), bool)
        api.configure(SECTIONS, extra=f'{shared}roles = api\nhost = api-1\n')
        api.start()
        making = mint()
        until(
            lambda: api.call('GET', '/os-volume-backends')['backends'], bool
        )
        kept, volume_id = create(api, making, size=1)
        self.assertEqual(making, kept)
        api.wait(volume_id, 'available')
        self.assertTells(api.log, making, '"POST /v3/volumes" 202')
        self.assertTells(api.log, making, 'rpc cast wake to volume.manager-1')
        until(lambda: [x for x in lines(run) if 'is done' in x], bool)
        self.assertTells(run, making, f'create of volume {volume_id} begins')
        # A sweep may find the job before the hint comes.
        until(lambda: [
            x for x in lines(run) if making in x and 'rpc cast wake' in x
        ], bool)
        self.assertTells(run, making, f'of volume {volume_id} is done after')


def start_manager(test, service):
    """Start a service that has no door of its own; return its log."""
    with open(service.log, 'w') as log:
        child = subprocess.Popen(
            [f'{process.BIN}/volume-service', '--config-file',
             service.conf_file],
            stdout=log, stderr=log, env=os.environ,
        )
    test.addCleanup(child.wait)
    test.addCleanup(child.kill)
    return service.log
