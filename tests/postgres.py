# SPDX-License-Identifier: Apache-2.0
"""A private PostgreSQL for tests; see ``tests.server``."""

from __future__ import annotations

import glob
import os
import signal
import unittest

from sqlalchemy import make_url

from tests.server import Server


class Postgres(Server):
    """PostgreSQL whose texts sort as people's do, not as bytes do.

    A kill of its processes loses nothing that was committed: that needs the
    write to have reached the kernel, not the disk.
    """

    binary = 'postgres'
    end_signal = signal.SIGINT
    home = 'postgres'

    def __init__(self) -> None:
        found = sorted(glob.glob('/usr/lib/postgresql/*/bin/postgres'))
        if not found:
            raise unittest.SkipTest('postgresql is not installed')
        self._bin = os.path.dirname(found[-1])
        super().__init__()

    def url(self, name: str) -> str:
        return (
            f'postgresql+psycopg2://vt:{self.password}@/{name}'
            f'?host={self.directory}'
        )

    def lay_out(self) -> None:
        secret = self.write('password', self.password)
        self.run([
            f'{self._bin}/initdb', '--pgdata', self.data, '--username', 'vt',
            '--auth', 'scram-sha-256', '--pwfile', secret, '--no-sync',
            '--encoding', 'UTF8', '--locale', 'C.UTF-8',
            '--locale-provider', 'icu', '--icu-locale', 'en-US',
        ])

    def argv(self) -> list[str]:
        settings = {
            'listen_addresses': '', 'unix_socket_directories': self.directory,
            'fsync': 'off', 'full_page_writes': 'off',
            'shared_buffers': '32MB', 'max_connections': '200',
            'dynamic_shared_memory_type': 'mmap', 'autovacuum': 'off',
            'max_wal_size': '64MB', 'min_wal_size': '32MB',
        }
        return [
            f'{self._bin}/postgres', '-D', self.data,
            *(f'--{name}={value}' for name, value in settings.items()),
        ]

    def drop(self, url: str) -> None:
        name = make_url(url).database
        self.execute(f'DROP DATABASE IF EXISTS {name} WITH (FORCE)')
