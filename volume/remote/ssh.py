# SPDX-License-Identifier: Apache-2.0
"""Addresses of nodes, and how ssh reaches them.

ssh is told everything: no configuration of a user, no agent, no password,
no forwarding, and only hosts whose key is known. The command there is one
fixed word, so nothing is ever quoted for a shell.
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse

from volume import errors
from volume.remote import wire

USER = re.compile(r'[A-Za-z_][A-Za-z0-9_.-]{0,31}')
HOST = re.compile(r'[A-Za-z0-9]([A-Za-z0-9.-]{0,253}[A-Za-z0-9])?')
HOST6 = re.compile(r'[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9]{1,15})?')
# ssh reads these as lists, with quotes, variables and percent signs.
PATH = re.compile(r'/[A-Za-z0-9/._@:+,=-]*')
COMMAND = re.compile(r'[A-Za-z0-9/._-]+( [A-Za-z0-9/._=-]+)*')
CONNECT_S = 15

# What ssh says, and what it means; first match.
MEANING: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r'REMOTE HOST IDENTIFICATION HAS CHANGED'),
     'its host key is not the one in {known}: if the machine was set up '
     'anew, put its new key there'),
    (re.compile(r'Host key verification failed|No \S+ host key is known'),
     'its host key is not in {known}: put it there, after you have compared '
     'it on the machine itself'),
    (re.compile(r'UNPROTECTED PRIVATE KEY|bad permissions'),
     'others may read the key {key}: give it mode 0600'),
    (re.compile(r'Identity file \S+ not accessible|no such identity'),
     'the key {key} cannot be read'),
    (re.compile(r'Load key|invalid format|error in libcrypto'),
     'the key {key} is none that ssh can use without a passphrase'),
    (re.compile(r'Permission denied'),
     'it refuses the key {key}: add its public half to authorized_keys of '
     'user {user} there'),
    (re.compile(r'command not found|not found|No such file'),
     'it has no {command}: install volume-service there, or correct '
     'node_command'),
    (re.compile(r'Connection timed out|No route to host|Connection refused|'
                r'Could not resolve|Name or service not known|'
                r'Network is unreachable'),
     'it cannot be reached'),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A node to be reached over SSH, and with what."""

    user: str
    host: str
    port: int
    key_file: str
    known_hosts_file: str
    command: str

    @property
    def address(self) -> str:
        host = f'[{self.host}]' if ':' in self.host else self.host
        return f'ssh://{self.user}@{host}:{self.port}'

    def argv(self) -> list[str]:
        """Return the command line of the client."""
        options = {
            'BatchMode': 'yes',
            'StrictHostKeyChecking': 'yes',
            'UserKnownHostsFile': self.known_hosts_file,
            'GlobalKnownHostsFile': '/dev/null',
            'UpdateHostKeys': 'no',
            'VerifyHostKeyDNS': 'no',
            'IdentitiesOnly': 'yes',
            'IdentityAgent': 'none',
            'PreferredAuthentications': 'publickey',
            'PasswordAuthentication': 'no',
            'KbdInteractiveAuthentication': 'no',
            'ClearAllForwardings': 'yes',
            'ForwardAgent': 'no',
            'ForwardX11': 'no',
            'PermitLocalCommand': 'no',
            'ControlMaster': 'no',
            'ControlPath': 'none',
            'EscapeChar': 'none',
            'ConnectTimeout': str(CONNECT_S),
            'ServerAliveInterval': str(int(wire.PING_S)),
            'ServerAliveCountMax': '3',
            'LogLevel': 'ERROR',
        }
        return [
            'ssh', '-F', 'none', '-T', '-p', str(self.port), '-l', self.user,
            '-i', self.key_file,
            *(f'-o{name}={value}' for name, value in options.items()),
            '--', self.host, self.command,
        ]

    def explain(self, said: str) -> str:
        """Return what it means that ssh, or the node, has said this."""
        last = ' '.join(said.split())[-300:] or 'nothing was said'
        for words, meaning in MEANING:
            if words.search(said):
                known = meaning.format(
                    known=self.known_hosts_file, key=self.key_file,
                    user=self.user, command=self.command.split()[0],
                )
                return f'{known} ({last})'
        return last


def parse(
    address: str, key_file: str, known_hosts_file: str, command: str
) -> Target:
    """Return the target of an address, ``ssh://user@host:port``.

    :raises Invalid: an option is wrong
    """
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname or '', parts.port or 22
    except ValueError as wrong:
        raise errors.Invalid(f'node {address!r:.200}: {wrong}') from wrong
    user = parts.username or 'root'
    if (
        not address.isprintable() or parts.scheme != 'ssh'
        or parts.path.strip('/') or parts.query
        or parts.fragment or parts.password is not None
        or not USER.fullmatch(user)
        or not (HOST6 if ':' in host else HOST).fullmatch(host)
    ):
        raise errors.Invalid(
            f'node {address!r:.200} is no address: give it as '
            'ssh://user@host or ssh://user@host:port'
        )
    for option, path in (
        ('node_key_file', key_file),
        ('node_known_hosts_file', known_hosts_file),
    ):
        if not PATH.fullmatch(path):
            raise errors.Invalid(
                f'{option} {path!r:.200} must be a path from the root, of '
                'plain characters'
            )
    if not COMMAND.fullmatch(command):
        raise errors.Invalid(
            f'node_command {command!r:.200} must be plain words'
        )
    return Target(user, host, port, key_file, known_hosts_file, command)


def check_files(target: Target) -> None:
    """Refuse files that are missing before ssh says so in its own way.

    What is being done waits for them, as for a node that is away: they may
    be missing just while somebody renews them.

    :raises Unavailable: the key or the file of known hosts cannot be read
    """
    for what, path in (
        ('key', target.key_file), ('known hosts', target.known_hosts_file),
    ):
        if not os.access(path, os.R_OK):
            raise errors.Unavailable(
                f'{target.address}: the file of its {what}, {path}, cannot '
                'be read by the user of this service'
            )
