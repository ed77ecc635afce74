# SPDX-License-Identifier: Apache-2.0
"""A wire to a database server that loses a COMMIT, or the reply to it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import threading
from typing import Any

from sqlalchemy import make_url

COMMIT = b'COMMIT'
WRITES = re.compile(b'INSERT|UPDATE|DELETE')
BEHIND = {  # where the server's socket is, and what ours must be called
    'postgresql': ('host', '/.s.PGSQL.5432'),
    'mysql': ('unix_socket', ''),
}


class Wire:
    """Passes bytes on, and counts commits of writes; ``url`` leads here.

    ``plan`` says what happens to the commit of a number: ``unheard``, it is
    done and its reply is lost; ``unsent``, it does not arrive; ``late``, it
    arrives when ``let_go`` is called, long after its sender has given up.
    """

    def __init__(self, test: Any, url: str) -> None:
        self.plan: dict[int, str] = {}
        self.commits = 0
        self._random: Any = None
        self._gate = threading.Event()
        self._guard = threading.Lock()
        parsed = make_url(url)
        key, suffix = BEHIND[parsed.get_backend_name()]
        self._server = str(parsed.query[key]) + suffix
        directory = tempfile.mkdtemp(prefix='vtw', dir='/tmp')
        path = os.path.join(directory, 'wire')
        if suffix:
            os.mkdir(path)
        self.url = parsed.update_query_dict({key: path}).render_as_string(
            hide_password=False
        )
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(path + suffix)
        self._door.listen(100)
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()

        def end() -> None:
            self.let_go()
            self._door.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            self._door.close()
            shutil.rmtree(directory, ignore_errors=True)

        test.addCleanup(end)

    def spoil(self, random: Any) -> None:
        """Lose every other commit or its reply from now on, by chance."""
        self._random = random

    def mend(self) -> None:
        """Lose nothing from now on."""
        self._random = None
        self.plan.clear()

    def let_go(self) -> None:
        """Let a late commit arrive."""
        self._gate.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._server)
            except OSError:
                client.close()
                server.close()
                continue
            lost = threading.Event()
            for target in self._forth, self._back:
                threading.Thread(
                    target=target, args=(client, server, lost), daemon=True
                ).start()

    def _forth(
        self, client: socket.socket, server: socket.socket,
        lost: threading.Event,
    ) -> None:
        wrote = False
        try:
            while data := client.recv(65536):
                fate = self._fate() if wrote and COMMIT in data else ''
                wrote = COMMIT not in data and (
                    wrote or WRITES.search(data) is not None
                )
                if fate == 'unsent':
                    break
                if fate:
                    lost.set()
                if fate == 'late':
                    _end(client)
                    self._gate.wait(60)
                server.sendall(data)
        except OSError:
            pass
        if not lost.is_set():
            _end(client)
            _end(server)

    def _back(
        self, client: socket.socket, server: socket.socket,
        lost: threading.Event,
    ) -> None:
        try:
            while (data := server.recv(65536)) and not lost.is_set():
                client.sendall(data)
        except OSError:
            pass
        _end(client)
        _end(server)
        client.close()
        server.close()

    def _fate(self) -> str:
        with self._guard:
            self.commits += 1
            if self._random is not None:
                return self._random.choice(['', '', 'unheard', 'unsent'])
            return self.plan.pop(self.commits, '')


def _end(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
