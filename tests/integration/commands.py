# SPDX-License-Identifier: Apache-2.0
"""``volume`` as a process of its own, and a service that it talks to."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
import unittest
import urllib.parse
from collections.abc import Callable
from typing import Any

from tests.integration import serving

COMMAND_S = 60
SECTIONS = """
[layers]
driver = qcow
directories = {pool}-layers
exporter = nbd
capacity_gib = 8
[broken]
driver = file
directories = /dev/null/nowhere
"""


class Cli(unittest.TestCase):
    """One service for all tests of a class; each uses names of its own."""

    settings = ''

    @classmethod
    def setUpClass(cls):
        super().setUpClass()

        class Adds:
            addCleanup = staticmethod(cls.addClassCleanup)

        adds: Any = Adds
        pool = serving.fixtures.directory(adds)
        cls.world = serving.World(
            adds, roles='api, manager', names='fast, layers, broken',
            settings=cls.settings,
            sections=SECTIONS.format(pool=pool),
        )
        # It outlives its service on purpose; not its tests.
        cls.addClassCleanup(cls.world.service.node.blockd.stop)
        cls.addClassCleanup(cls.world.service.stop)
        cls.url = f'{cls.world.service.address}/v3'

    def volume(self, *words, code=0, **settings):
        """Run a command line; say what it has printed."""
        done = run(*words, url=settings.pop('url', self.url), **settings)
        self.assertNotIn('Traceback', done.stderr)
        self.assertEqual(
            code, done.returncode,
            f'volume {" ".join(words)}: {done.stdout}{done.stderr}',
        )
        return done

    def json(self, *words, **settings):
        """Run a command line, and return the JSON that it prints."""
        done = self.volume(*words, '--format', 'json', **settings)
        self.assertEqual('', done.stderr)
        return json.loads(done.stdout)

    def refused(self, *words, code=1, **settings):
        """Run what must fail; return its one line of reasons."""
        done = self.volume(*words, code=code, **settings)
        self.assertEqual('', done.stdout)
        self.assertEqual(1, done.stderr.count('\n'), done.stderr)
        self.assertTrue(done.stderr.startswith('volume'), done.stderr)
        return done.stderr.rstrip('\n')

    def name(self):
        """Return a name that no other test uses."""
        return f'{self.id().rpartition(".")[2]}'[:200]


def environment(url='', **more):
    """Return what the process sees; nothing of the caller's own service."""
    kept = {
        key: value for key, value in os.environ.items()
        if not key.startswith('VOLUME_')
    }
    return {**kept, 'VOLUME_URL': url, 'COLUMNS': '200', **more}


def run(*words, url='', env=None, stdin='', module='volume.cli.main'):
    """Run a command line to its end."""
    return subprocess.run(
        [sys.executable, '-m', module, *words],
        env=environment(url, **(env or {})), input=stdin,
        capture_output=True, text=True, timeout=COMMAND_S,
    )


Spoil = Callable[[str, str, dict[str, Any]], dict[str, Any] | None]


class Relay:
    """Hands requests on to the service; ``spoil`` may change an answer, or
    return ``None`` to lose it. ``seen`` are the requests' method and path.
    """

    def __init__(self, test: unittest.TestCase, url: str, spoil: Spoil):
        self.seen: list[tuple[str, str]] = []
        self._target = urllib.parse.urlsplit(url)
        self._spoil = spoil
        relay = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def relay(self):
                relay._hand_on(self)

            do_GET = do_POST = do_PUT = do_DELETE = relay

            def log_message(self, *words):
                pass

        self._server = http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), Handler
        )
        self._server.daemon_threads = True
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        test.addCleanup(self._server.server_close)
        test.addCleanup(thread.join)
        test.addCleanup(self._server.shutdown)
        self.url = f'http://127.0.0.1:{self._server.server_port}/v3'

    def _hand_on(self, request):
        path = request.path
        self.seen.append((request.command, path))
        raw = request.rfile.read(int(request.headers['Content-Length'] or 0))
        target = http.client.HTTPConnection(
            self._target.hostname, self._target.port, timeout=COMMAND_S
        )
        target.request(
            request.command, path, raw or None,
            {key: value for key, value in request.headers.items()
             if key.lower() not in ('content-length', 'host')},
        )
        answer = target.getresponse()
        text = answer.read()
        target.close()
        body = self._spoil(
            request.command, path, json.loads(text) if text else {}
        )
        if body is None:
            request.close_connection = True
            return
        text = json.dumps(body).encode() if text else b''
        request.send_response(answer.status)
        for key in 'X-Openstack-Request-Id', 'Content-Type':
            if value := answer.getheader(key):
                request.send_header(key, value)
        request.send_header('Content-Length', str(len(text)))
        request.end_headers()
        request.wfile.write(text)
