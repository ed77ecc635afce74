# SPDX-License-Identifier: Apache-2.0
"""Who is at the door: nobody asked (``none``), or static tokens.

A tokens file is JSON, owned by the service's user with mode 0600, and keeps
only the SHA-256 of each token::

    {"tokens": [{"token_sha256": "9f86…", "user": "ops",
                 "project": "default", "roles": ["admin"]}]}

Roles: ``admin`` may do all to everything, ``member`` all to the project's
own, ``reader`` only look; ``service`` is a member that acts for others (a
compute service).
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import socket
import stat
import threading
from typing import Any, Protocol

from volume import errors
from volume.api.faults import Refused

LOG = logging.getLogger(__name__)

ROLES = frozenset({'admin', 'member', 'reader', 'service'})
FILE_BYTES_MAX = 1 << 20
TOKEN_MAX = 1024

_NAME = re.compile(r'[A-Za-z0-9_.@-]{1,64}')
_SHA256 = re.compile(r'[0-9a-f]{64}')


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """A checked caller."""

    user_id: str
    project_id: str
    roles: frozenset[str]

    @property
    def is_admin(self) -> bool:
        return 'admin' in self.roles


class Auth(Protocol):
    """Tells from a token who asks; ``mode`` is the option's value."""

    mode: str

    def identify(self, token: str | None) -> Identity:
        """Return who asks.

        :raises Refused: 401, it is nobody known
        """


class NoAuth:
    """Everybody is an administrator; a token may be ``user:project``.

    Clients send some word as a token even if told that there is no
    authentication; only one with a colon is meant to be read.
    """

    mode = 'none'

    def identify(self, token: str | None) -> Identity:
        user, colon, project = (token or '').partition(':')
        if not colon:
            user = project = 'default'
        if not _NAME.fullmatch(user) or not _NAME.fullmatch(project):
            raise Refused(401, 'the token is not like user:project')
        return Identity(user, project, frozenset({'admin'}))


class Tokens:
    """Static tokens from a file, which is read again when it changes."""

    mode = 'tokens'

    def __init__(self, path: str) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._known: list[tuple[bytes, Identity]] = []
        self._refresh()

    def identify(self, token: str | None) -> Identity:
        if not token or len(token) > TOKEN_MAX:
            raise _unknown()
        try:
            self._refresh()
        except errors.Invalid as wrong:
            # Whoever was taken out of the file must not stay in, so what
            # it said before is not used.
            LOG.error('nobody is let in: %s', wrong)
            raise errors.Unavailable(
                'the tokens file cannot be used now; the log tells why'
            ) from None
        given = hash_token(token).encode()
        found: Identity | None = None
        for known, identity in self._known:
            # Every one is compared: how long it takes tells nothing.
            if hmac.compare_digest(known, given):
                found = identity
        if found is None:
            raise _unknown()
        return found

    def _refresh(self) -> None:
        with self._guard:
            try:
                now = os.stat(self._path)
            except OSError as failed:
                self._seen = ()
                raise errors.Invalid(
                    f'tokens file {self._path} cannot be read: '
                    f'{failed.strerror}'
                ) from None
            seen = (
                now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns,
                now.st_ctime_ns,
            )
            if seen != self._seen:
                self._seen = ()
                self._known = _load(self._path)
                self._seen = seen


def is_name(text: str) -> bool:
    """Say whether a user or project may be called so."""
    return _NAME.fullmatch(text) is not None


def hash_token(token: str) -> str:
    """Return what a tokens file keeps of a token."""
    return hashlib.sha256(token.encode(errors='surrogateescape')).hexdigest()


def load(conf: Any) -> Auth:
    """Return what the options ask for.

    :raises Invalid: the tokens file is wrong
    """
    return make(conf.api.auth, conf.api.tokens_file)


def make(mode: str, tokens_file: str = '') -> Auth:
    """Return the mode's way to tell who asks.

    :raises Invalid: there is no such mode, or its file is wrong
    """
    if mode == 'none':
        return NoAuth()
    if mode == 'tokens':
        if not tokens_file:
            raise errors.Invalid('auth tokens needs the option tokens_file')
        return Tokens(tokens_file)
    raise errors.Invalid(f'auth {mode!r:.40} is neither none nor tokens')


def check_binding(mode: str, host: str) -> None:
    """Refuse to let everybody in from elsewhere.

    ``host`` is an address, a name, or a unix socket's path.

    :raises Invalid: auth is none, and others than this machine reach it
    """
    if mode != 'none' or host.startswith(('/', 'unix:')):
        return
    if not _is_loopback(host):
        address, _, port = host.rpartition(':')
        if port.isdigit() and _is_loopback(address):
            raise errors.Invalid(
                f'listen {host:.80} has a port in it: give that by the '
                'option port, and the address alone here'
            )
        raise errors.Invalid(
            f'auth is none, and {host or "every address"} can be reached '
            'from elsewhere: everybody would be an administrator; listen on '
            '127.0.0.1 or a unix socket, or set auth = tokens'
        )


def check_host_header(auth: Auth, host: str, public_host: str) -> None:
    """Refuse a web page that has its own name point to this machine.

    A browser sends such a page's requests here; without tokens they would
    be an administrator's.

    :raises Refused: auth is none, and the name is none of ours
    """
    if auth.mode != 'none':
        return
    name = host.rpartition(']')[0].lstrip('[') if host.startswith('[') else (
        host.partition(':')[0]
    )
    if name.lower() in ('localhost', public_host.lower()) or not name:
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise Refused(
            403,
            f'host {name!r:.80} is not known here; use the address, or set '
            'the option public_url',
        ) from None


def _unknown() -> Refused:
    return Refused(
        401, 'the token is missing or not known',
        {'WWW-Authenticate': 'Keystone'},
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip('[]')).is_loopback
    except ValueError:
        pass
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(
        ipaddress.ip_address(str(each[4][0]).partition('%')[0]).is_loopback
        for each in found
    )


def _load(path: str) -> list[tuple[bytes, Identity]]:
    try:
        with open(path, 'rb') as f:
            about = os.fstat(f.fileno())
            raw = f.read(FILE_BYTES_MAX + 1)
    except OSError as failed:
        raise errors.Invalid(
            f'tokens file {path} cannot be read: {failed.strerror}'
        ) from None
    if stat.S_IMODE(about.st_mode) & 0o077:
        raise errors.Invalid(
            f'tokens file {path} can be read by others: chmod 600 {path}'
        )
    if about.st_uid not in (0, os.geteuid()):
        raise errors.Invalid(
            f'tokens file {path} belongs to user {about.st_uid}: it must be '
            'ours, or root\'s'
        )
    if len(raw) > FILE_BYTES_MAX:
        raise errors.Invalid(f'tokens file {path} is over 1 MiB')
    try:
        items = json.loads(raw)['tokens']
        assert isinstance(items, list)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise errors.Invalid(
            f'tokens file {path} is not like {{"tokens": […]}}'
        ) from None
    return [
        _entry(item, f'tokens file {path}, entry {number}')
        for number, item in enumerate(items, 1)
    ]


def _entry(item: Any, where: str) -> tuple[bytes, Identity]:
    if not isinstance(item, dict):
        raise errors.Invalid(f'{where}: it is not a JSON object')
    if unknown := set(item) - {'token_sha256', 'user', 'project', 'roles'}:
        raise errors.Invalid(
            f'{where}: {min(unknown)!r:.40} is not known; a token is kept as '
            'token_sha256'
        )
    digest = item.get('token_sha256')
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise errors.Invalid(
            f'{where}: token_sha256 is not 64 hexadecimal digits'
        )
    for key in 'user', 'project':
        if not isinstance(item.get(key), str) or not _NAME.fullmatch(
            item[key]
        ):
            raise errors.Invalid(
                f'{where}: {key} is missing, or not letters, digits, _.@-'
            )
    roles = item.get('roles')
    if not isinstance(roles, list) or not roles or not all(
        isinstance(role, str) and role in ROLES for role in roles
    ):
        raise errors.Invalid(
            f'{where}: roles is not a list of {", ".join(sorted(ROLES))}'
        )
    return digest.encode(), Identity(
        item['user'], item['project'], frozenset(roles)
    )
