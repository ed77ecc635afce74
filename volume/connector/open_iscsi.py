# SPDX-License-Identifier: Apache-2.0
"""open-iscsi: its records of targets, its logins, the sessions there are.

``iscsiadm`` takes secrets from its command line only, where every user of
the host can read them. So a record is made by it without any (mode 0600, with
whatever the host's iscsid.conf says), and the secrets are then put into the
record's own file. Sessions are read from sysfs: that is what the kernel
has, whatever records there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence

from volume import errors
from volume.connector.iscsi_paths import Way
from volume.node import CommandFailed
from volume.node import Node
from volume.node import Op

SESSIONS = '/sys/class/iscsi_session'
CONNECTIONS = '/sys/class/iscsi_connection'
# Debian's place, and that of others.
RECORDS = ('/etc/iscsi/nodes', '/var/lib/iscsi/nodes')
NAME_FILE = '/etc/iscsi/initiatorname.iscsi'

LOGIN_S = 60.0
SETTLE_S = 20.0
POLL_S = 0.1

# Exit codes of iscsiadm (include/iscsi_err.h).
SESSION_EXISTS, NOTHING_FOUND = 15, 21
GONE = frozenset({2, NOTHING_FOUND, 22})
DAEMON_CODES = frozenset({18, 20})
LOGIN_CODES: Mapping[int, type[errors.VolumeError]] = {
    4: errors.Unavailable,  # the portal does not answer
    8: errors.Unavailable,
    11: errors.Unavailable,
    19: errors.NotFound,  # the portal has no such target
    24: errors.Denied,
}
# Tried again for minutes, a portal that is gone would hold up the others.
# Nothing is logged in to at the next boot: what a host may have by then, the
# service says.
COMMON = {
    'node.startup': 'manual',
    'node.conn[0].startup': 'manual',
    'node.session.scan': 'auto',
    'node.session.initial_login_retry_max': '2',
    'node.conn[0].timeo.login_timeout': '10',
}
SECRETS = tuple(
    f'node.session.auth.{name}'
    for name in ('username', 'password', 'username_in', 'password_in')
)


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """A session that the kernel has, with the disks that came by it."""

    number: int
    target: str
    portal: str
    state: str
    disks: tuple[tuple[int, str], ...]
    """Each a LUN and a name, like ``sda``."""

    @property
    def is_up(self) -> bool:
        return self.state == 'LOGGED_IN'

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.disks]


def initiator(node: Node, iface: str) -> str:
    """Return the name by which this host is known to targets.

    :raises Unavailable: it has none
    """
    if iface != 'default':
        with contextlib.suppress(CommandFailed):
            shown = node.run('iscsiadm', '-m', 'iface', '-I', iface)
            for line in shown.splitlines():
                key, _, value = line.partition(' = ')
                if key == 'iface.initiatorname' and value != '<empty>':
                    return value
    try:
        text = node.read(NAME_FILE).decode(errors='replace')
    except errors.NotFound:
        text = ''
    match = re.search(r'^InitiatorName=(\S+)', text, re.M)
    if match is None:
        raise errors.Unavailable(
            f'{NAME_FILE} names no initiator: install open-iscsi, or run '
            '"iscsi-iname" and write its name there'
        )
    return match[1]


def sessions(node: Node) -> list[Session]:
    """Return all sessions of this host, others' as well."""
    names = _listing(node, [SESSIONS])[0]
    bases = [f'{SESSIONS}/{name}' for name in names]
    found = node.configure([
        Op.get(f'{base}/{key}') for base in bases
        for key in ('targetname', 'state')
    ])
    inside = _listing(node, [f'{base}/device' for base in bases])
    portals = _portals(node, inside)
    disks = _disks(node, bases, inside)
    sessions = []
    for i, name in enumerate(names):
        target, state = found[2 * i], found[2 * i + 1]
        if isinstance(target, str):  # else it ended while we looked
            sessions.append(Session(
                int(name.removeprefix('session')), target, portals[i],
                str(state), disks[i],
            ))
    return sessions


def record(
    node: Node, way: Way, iface: str, settings: Mapping[str, str]
) -> None:
    """Make the record of a target, secrets included.

    A record that a crash has left in pieces is thrown away first: nothing
    can be made of it.
    """
    place = ['iscsiadm', '-m', 'node', '-T', way.target, '-p', way.portal]
    forget(node, way.target, way.portal)
    try:
        node.run(*place, '-I', iface, '--op', 'new')
    except CommandFailed as failed:
        raise errors.Unavailable(
            f'open-iscsi makes no record of {way.target}: {failed}'
        ) from failed
    files = _files(node, way.target, way.portal)
    if not files:
        raise errors.Unavailable(
            f'open-iscsi has made no record of {way.target} in '
            f'{" or ".join(RECORDS)}'
        )
    for path in files:
        text = node.read(path).decode()
        # In place: the file stays the one that iscsiadm made, for root
        # alone, and no copy of a secret is ever left beside it.
        node.configure([Op.put(path, with_settings(text, settings))])


def with_settings(text: str, settings: Mapping[str, str]) -> str:
    """Return a record with other settings; no old secret stays in it."""
    changed = {**COMMON, **settings}
    kept = [
        line for line in text.splitlines()
        if (key := line.partition(' = ')[0]) not in changed
        and key not in SECRETS and not line.startswith('# END')
    ]
    kept += [f'{key} = {value}' for key, value in changed.items()]
    return '\n'.join([*kept, '# END RECORD', ''])


def forget(node: Node, target: str, portal: str = '') -> None:
    """Delete the records of a target, or those of one of its portals.

    As files: of a record in pieces iscsiadm can make nothing, and it keeps
    nothing else of a target that was never discovered.
    """
    for path in _files(node, target, portal):
        parent = os.path.dirname(path)
        node.configure([Op.unlink(path)])
        if os.path.basename(parent) != target:
            node.configure([Op.rmdir(parent)])
    for base in RECORDS:
        directory = f'{base}/{target}'
        if node.exists(directory) and not node.list(directory):
            node.configure([Op.rmdir(directory)])


def recorded(node: Node) -> list[str]:
    """Return the targets of which there are records."""
    return sorted({
        name for names in _listing(node, RECORDS) for name in names
    })


def log_in(node: Node, way: Way, iface: str) -> None:
    """Log in, and return when the session is up or refused.

    :raises Denied: the target does not take us for who we say we are
    :raises NotFound: the portal has no such target
    :raises Unavailable: the portal does not answer
    """
    try:
        node.run(
            'iscsiadm', '-m', 'node', '-T', way.target, '-p', way.portal,
            '-I', iface, '--login', timeout_s=LOGIN_S,
        )
    except CommandFailed as failed:
        if failed.code == SESSION_EXISTS:
            return
        if failed.code in DAEMON_CODES:
            raise errors.Unavailable(
                'iscsid does not answer: start it (systemctl start iscsid)'
            ) from failed
        kind = LOGIN_CODES.get(failed.code, errors.Unknown)
        raise kind(
            f'portal {way.portal} does not let us in to {way.target}: '
            f'{_words(failed)}'
        ) from failed


def log_out(node: Node, session: Session) -> None:
    """End a session; its disks go with it, and what they had to write."""
    try:
        node.run(
            'iscsiadm', '-m', 'session', '-r', str(session.number),
            '--logout', timeout_s=LOGIN_S,
        )
    except CommandFailed as failed:
        if failed.code not in GONE:
            raise errors.Unavailable(
                f'session {session.number} of {session.target} does not '
                f'end: {_words(failed)}'
            ) from failed
    late = time.monotonic() + SETTLE_S
    while node.exists(f'{SESSIONS}/session{session.number}'):
        if time.monotonic() > late:
            raise errors.Unavailable(
                f'session {session.number} of {session.target} is still '
                f'there after {SETTLE_S:g} s'
            )
        time.sleep(POLL_S)


def _portals(node: Node, inside: Sequence[list[str]]) -> list[str]:
    """Return the portal of each session, as it was asked for."""
    names = [
        next((name for name in each if name.startswith('connection')), '')
        for each in inside
    ]
    found = node.configure([
        Op.get(f'{CONNECTIONS}/{name or "-"}/persistent_{key}')
        for name in names for key in ('address', 'port')
    ])
    portals = []
    for address, port in zip(found[::2], found[1::2], strict=True):
        text = str(address or '')
        portals.append(f'[{text}]:{port}' if ':' in text else f'{text}:{port}')
    return portals


def _disks(
    node: Node, bases: Sequence[str], inside: Sequence[list[str]]
) -> list[tuple[tuple[int, str], ...]]:
    """Return the disks of each session; three looks for all of them."""
    scsi = [
        (i, f'{base}/device/{name}')
        for i, (base, names) in enumerate(zip(bases, inside, strict=True))
        for name in names if name.startswith('target')
    ]
    luns = [
        (i, name.rpartition(':')[2], f'{path}/{name}/block')
        for (i, path), names in zip(
            scsi, _listing(node, [path for _, path in scsi]), strict=True
        )
        for name in names if re.fullmatch(r'\d+(:\d+){3}', name)
    ]
    found: list[list[tuple[int, str]]] = [[] for _ in bases]
    blocks = _listing(node, [path for _, _, path in luns])
    for (i, lun, _), names in zip(luns, blocks, strict=True):
        found[i] += [(int(lun), name) for name in names]
    return [tuple(each) for each in found]


def _files(node: Node, target: str, portal: str) -> list[str]:
    """Return the files of the records of a target or portal.

    One for each portal, or a directory with one for each interface where
    the portal's group is known.
    """
    address, _, port = portal.rpartition(':')
    head = f'{address.strip("[]")},{port}'
    found = []
    for base in RECORDS:
        for name in _listing(node, [f'{base}/{target}'])[0]:
            if portal and name != head and not name.startswith(f'{head},'):
                continue
            path = f'{base}/{target}/{name}'
            about = node.about(path)
            if about and about.kind == 'directory':
                found += [
                    f'{path}/{each}' for each in _listing(node, [path])[0]
                ]
            elif about:
                found.append(path)
    return found


def _listing(node: Node, paths: Sequence[str]) -> list[list[str]]:
    return [
        found if isinstance(found, list) else []
        for found in node.configure([Op.list(path) for path in paths])
    ]


def _words(failed: CommandFailed) -> str:
    """Return what iscsiadm said of the cause."""
    match = re.search(r'reported error \(\d+ - (.*)\)', failed.stderr)
    return match[1] if match else str(failed)
