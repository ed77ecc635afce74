# SPDX-License-Identifier: Apache-2.0
"""A private MariaDB for tests; see ``tests.server``."""

from __future__ import annotations

import os
import shutil
import unittest

from sqlalchemy import make_url

from tests.server import Server

DAEMON = '/usr/sbin/mariadbd'


class Mariadb(Server):
    """MariaDB with the character set and the modes that Debian gives it.

    A kill of its process loses nothing that was committed: that needs the
    write to have reached the kernel, not the disk.
    """

    binary = 'mariadbd'
    # Small, and quick by trusting the kernel.
    settings: tuple[str, ...] = (
        '--innodb-flush-log-at-trx-commit=2', '--innodb-doublewrite=0',
        '--innodb-buffer-pool-size=32M', '--innodb-log-file-size=16M',
        '--innodb-use-native-aio=0', '--performance-schema=0',
        '--innodb-flush-method=nosync', '--sync-frm=0',
    )

    def __init__(self) -> None:
        if not os.path.exists(DAEMON):
            raise unittest.SkipTest('mariadb-server is not installed')
        if shutil.which('mariadb-install-db') is None:
            raise unittest.SkipTest('mariadb-install-db is not installed')
        super().__init__()
        self._socket = os.path.join(self.directory, 'socket')

    def url(self, name: str) -> str:
        return (
            f'mysql+pymysql://vt:{self.password}@localhost/{name}'
            f'?unix_socket={self._socket}'
        )

    def lay_out(self) -> None:
        self.run([
            'mariadb-install-db', '--no-defaults', f'--datadir={self.data}',
            '--auth-root-authentication-method=normal', '--skip-test-db',
            '--skip-name-resolve', *self.settings,
        ])

    def argv(self) -> list[str]:
        users = self.write('users.sql', (
            f"CREATE USER IF NOT EXISTS vt@localhost "
            f"IDENTIFIED BY '{self.password}';\n"
            "GRANT ALL ON *.* TO vt@localhost;\n"
            f"ALTER USER root@localhost IDENTIFIED BY '{self.password}';\n"
        ))
        return [
            DAEMON, '--no-defaults', f'--datadir={self.data}',
            f'--socket={self._socket}', '--skip-networking',
            f'--pid-file={self.directory}/pid', f'--init-file={users}',
            f'--tmpdir={self.directory}', '--max-connections=200',
            '--character-set-server=utf8mb4',
            '--collation-server=utf8mb4_general_ci', *self.settings,
        ]

    def drop(self, url: str) -> None:
        self.execute(f'DROP DATABASE IF EXISTS {make_url(url).database}')
