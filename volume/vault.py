# SPDX-License-Identifier: Apache-2.0
"""Secrets that stand in the database: sealed by a key that does not.

The key file has one Fernet key a line. The first seals, any opens: to change
the key, put a new line on top of the file, everywhere, and restart. All
services of one database need the same file. What is sealed names the row
that it is for, and opens nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import string
from collections.abc import Mapping

from cryptography.fernet import Fernet
from cryptography.fernet import InvalidToken
from cryptography.fernet import MultiFernet

from volume import errors

ALPHABET = string.ascii_letters + string.digits
LENGTH = 16  # what the strictest initiators take for CHAP; 94 bits
FILE_BYTES_MAX = 1 << 16


def new_secret() -> str:
    """Return a random secret that every protocol of ours can carry.

    It begins with a small letter: in iSCSI what begins with 0x or 0b is a
    number (RFC 7143, 6.1), and LIO refuses such a user; NULL is none to it.
    """
    return secrets.choice(string.ascii_lowercase) + ''.join(
        secrets.choice(ALPHABET) for _ in range(LENGTH - 1)
    )


def make_key(path: str) -> None:
    """Make the key file, for this user alone, unless there is one."""
    draft = f'{path}.{secrets.token_hex(8)}.new'
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(fd, 'wb') as f:
            f.write(Fernet.generate_key() + b'\n')
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # of two at once, the first one's stays
    finally:
        os.unlink(draft)
    fd = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Vault:
    """Seals and opens small sets of texts."""

    def __init__(self, path: str) -> None:
        self._path = path

    def check(self) -> None:
        """Say whether the key file can be used.

        :raises Unavailable: it is not there, or anybody may read it
        """
        self._keys()

    def seal(self, row_id: str, texts: Mapping[str, str]) -> str:
        """Return what only this row's reader can open again."""
        plain = json.dumps({'row': row_id, 'texts': dict(texts)})
        return self._keys().encrypt(plain.encode()).decode()

    def open(self, row_id: str, sealed: str) -> dict[str, str]:
        """Return the texts that were sealed for this row.

        :raises Unavailable: the key is not there, or is another
        """
        try:
            found = json.loads(self._keys().decrypt(sealed.encode()))
        except InvalidToken:
            raise errors.Unavailable(
                f'the secrets of {row_id} were sealed with a key that is not '
                f'in {self._path}: all services of one database need the '
                'same file'
            ) from None
        if found['row'] != row_id:
            raise errors.Corrupt(
                f'the secrets of {row_id} are those of {found["row"]}'
            )
        return dict(found['texts'])

    def _keys(self) -> MultiFernet:
        try:
            with open(self._path, 'rb') as f:
                mode = os.fstat(f.fileno()).st_mode
                lines = f.read(FILE_BYTES_MAX).split()
        except OSError as failed:
            raise errors.Unavailable(
                f'the key of secrets cannot be read from {self._path!r}: '
                f'{failed.strerror}; see secrets_key_file'
            ) from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise errors.Unavailable(
                f'{self._path} may be read by others than its owner: chmod '
                'it to 0600'
            )
        try:
            return MultiFernet([Fernet(line) for line in lines])
        except ValueError:
            raise errors.Unavailable(
                f'{self._path} holds no Fernet key, or a broken line'
            ) from None
