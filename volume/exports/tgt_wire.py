# SPDX-License-Identifier: Apache-2.0
"""What tgtd's management socket speaks, as ``tgtadm`` does.

A request is one C structure of the daemon's own machine with a text behind
it; the reply is a code with a text. The daemon closes the connection after
each. ``tgtadm`` itself is never run: it takes passwords as arguments, where
every user of the machine can read them.

The texts have no quoting: what would break out of one is refused here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from volume import errors
from volume.node import Node
from volume.node import ReplyLength

# tgtadm.h of 1.0.30 to 1.0.96: mode, op, lld, len, tid, sid, lun, cid,
# host_no, device_type, ac_dir, pack, force.
REQUEST = struct.Struct('=II64sIiQQIIIIII')
REPLY = struct.Struct('=II')  # code, and the length of all of it
LENGTH = ReplyLength(4, 4)
DRIVER = b'iscsi'
LUN = 1  # lun 0 is the daemon's own controller
TEXT_BYTES_MAX = 8 << 10  # MAX_MGT_BUFSIZE
LISTING_BYTES_MAX = 256 << 20
TIMEOUT_S = 30.0

TARGET, DEVICE, PORTAL, CONNECTION, ACCOUNT = 1, 2, 3, 6, 7
NEW, DELETE, SHOW, BIND, UNBIND, UPDATE = range(6)
INCOMING, OUTGOING = 0, 1
EVERY = -1

NO_MEMORY, NO_TARGET, NO_LUN, NO_SESSION, NO_CONNECTION = 2, 4, 5, 6, 7
TARGET_EXISTS, LUN_EXISTS = 9, 10
NO_ACL, ACCOUNT_EXISTS, NO_ACCOUNT = 13, 14, 15
INVALID = 17
TARGET_ACTIVE, LUN_ACTIVE = 19, 20

SAID = {
    1: 'unknown error', NO_MEMORY: 'out of memory', 3: 'no such driver',
    NO_TARGET: 'no such target', NO_LUN: 'no such LUN',
    NO_SESSION: 'no such session', NO_CONNECTION: 'no such connection',
    TARGET_EXISTS: 'the target exists', LUN_EXISTS: 'the LUN exists',
    12: 'the initiator is bound already', NO_ACL: 'no such initiator bound',
    ACCOUNT_EXISTS: 'the account exists', NO_ACCOUNT: 'no such account',
    16: 'too many accounts', INVALID: 'invalid request',
    18: 'there is an outgoing account', TARGET_ACTIVE: 'the target is active',
    LUN_ACTIVE: 'the LUN is active', 22: 'unsupported operation',
    23: 'unknown parameter',
}

PLAIN = re.compile(r'[^,\x00-\x1f\x7f]+')
PORTAL_LINE = re.compile(r'^Portal: (.+),\d+$', re.MULTILINE)
SESSION_LINE = re.compile(r'^Session: (\d+)$')
CONNECTION_LINE = re.compile(r'^\s*Connection: (\d+)$')


class Refused(errors.Unavailable):
    """The daemon did not do it; ``code`` says why. Nothing has changed."""

    def __init__(self, what: str, code: int) -> None:
        said = SAID.get(code, f'error {code}')
        super().__init__(f'tgtd refused to {what}: {said}')
        self.code = code


class Tgtd:
    """A running tgtd, by its socket; each method is one exchange."""

    def __init__(self, node: Node, socket_path: str) -> None:
        self._node = node
        self._path = socket_path

    # Questions.

    def listing(self) -> str:
        """Return all that it says of all targets."""
        return self._ask('list targets', TARGET, SHOW, tid=EVERY)

    def accounts(self) -> set[str]:
        """Return the names of all accounts."""
        said = self._ask('list accounts', ACCOUNT, SHOW, tid=EVERY)
        return {line.strip() for line in said.splitlines()[1:]}

    def portals(self) -> set[str]:
        """Return where it listens, as ``address:port``."""
        said = self._ask('list portals', PORTAL, SHOW, tid=EVERY)
        return set(PORTAL_LINE.findall(said))

    def connections(self, tid: int) -> list[tuple[int, int]]:
        """Return session and connection id of each, of one target.

        A connection is there until its last command has ended.
        """
        said = self._ask('list connections', CONNECTION, SHOW, tid=tid)
        found, session = [], 0
        for line in said.splitlines():
            if match := SESSION_LINE.match(line):
                session = int(match[1])
            elif match := CONNECTION_LINE.match(line):
                found.append((session, int(match[1])))
        return found

    # Deeds.

    def new_portal(self, portal: str) -> None:
        self._ask(f'listen on {portal}', PORTAL, NEW, tid=EVERY, text={
            'portal': portal,
        })

    def new_target(self, tid: int, name: str) -> None:
        self._ask(f'make target {name}', TARGET, NEW, tid=tid, text={
            'targetname': name,
        })

    def delete_target(self, tid: int, *, by_force: bool = False) -> None:
        """Remove a target; one that has sessions only by force.

        By force only when its LUN is gone: with a command in flight the
        daemon would end itself, and with it all other exports.
        """
        self._ask(
            f'delete target {tid}', TARGET, DELETE, tid=tid, force=by_force
        )

    def set_ready(self, tid: int, is_ready: bool) -> None:
        """Have a target take logins and commands, or none, whoever asks."""
        what = f'open or close target {tid}'
        self._ask(what, TARGET, UPDATE, tid=tid, text={
            'state': 'ready' if is_ready else 'offline',
        })

    def new_lun(self, tid: int, path: str) -> None:
        self._ask(f'open {path}', DEVICE, NEW, tid=tid, lun=LUN, text={
            'path': path, 'bstype': 'rdwr',
        })

    def set_lun(self, tid: int, **parameters: str) -> None:
        self._ask(
            f'set up the LUN of target {tid}', DEVICE, UPDATE, tid=tid,
            lun=LUN, text=parameters,
        )

    def delete_lun(self, tid: int) -> None:
        self._ask(
            f'close the LUN of target {tid}', DEVICE, DELETE, tid=tid,
            lun=LUN,
        )

    def new_account(self, name: str, password: str) -> None:
        self._ask(f'make account {name}', ACCOUNT, NEW, tid=EVERY, text={
            'user': name, 'password': password,
        })

    def delete_account(self, name: str) -> None:
        self._ask(f'delete account {name}', ACCOUNT, DELETE, tid=EVERY, text={
            'user': name,
        })

    def bind_account(self, tid: int, name: str, direction: int) -> None:
        self._ask(
            f'bind account {name}', ACCOUNT, BIND, tid=tid,
            direction=direction, text={'user': name},
        )

    def bind_initiator(self, tid: int, name: str) -> None:
        self._ask(f'let {name} in', TARGET, BIND, tid=tid, text={
            'initiator-name': name,
        })

    def unbind_initiator(self, tid: int, name: str) -> None:
        self._ask(f'shut {name} out', TARGET, UNBIND, tid=tid, text={
            'initiator-name': name,
        })

    def unbind_address(self, tid: int, address: str) -> None:
        self._ask(f'shut {address} out', TARGET, UNBIND, tid=tid, text={
            'initiator-address': address,
        })

    def end_connection(self, tid: int, session: int, connection: int) -> None:
        self._ask(
            f'end a connection of target {tid}', CONNECTION, DELETE, tid=tid,
            session=session, connection=connection,
        )

    # Ours alone.

    def _ask(
        self,
        what: str,
        mode: int,
        op: int,
        *,
        tid: int,
        session: int = 0,
        connection: int = 0,
        lun: int = 0,
        direction: int = INCOMING,
        force: bool = False,
        text: Mapping[str, str] | None = None,
    ) -> str:
        """Make one exchange.

        :raises Refused: it said no
        :raises Unavailable: it does not run
        :raises Unknown: it was asked, and did not answer
        """
        behind = _text(text) if text else b''
        request = REQUEST.pack(
            mode, op, DRIVER, REQUEST.size + len(behind), tid, session, lun,
            connection, 0, 0, direction, 0, force,
        )
        reply = self._node.talk(
            self._path, request + behind, timeout_s=TIMEOUT_S,
            reply_bytes_max=LISTING_BYTES_MAX, length=LENGTH,
        )
        return _read(what, reply)


def _text(fields: Mapping[str, str]) -> bytes:
    """Return the text of a request.

    :raises Invalid: a value would end before its end
    """
    for name, value in fields.items():
        if not PLAIN.fullmatch(value):
            shown = '' if name == 'password' else f' {value!r:.200}'
            raise errors.Invalid(
                f'tgtd cannot be told the {name}{shown}: it may have neither '
                'a comma nor control characters'
            )
    said = ','.join(f'{name}={value}' for name, value in fields.items())
    found = said.encode() + b'\0'
    if len(found) > TEXT_BYTES_MAX:
        raise errors.Invalid(
            f'{len(found)} bytes are too long a request for tgtd'
        )
    return found


def _read(what: str, reply: bytes) -> str:
    if len(reply) < REPLY.size:
        raise errors.Unknown(f'tgtd did not answer when asked to {what}')
    code, length = REPLY.unpack_from(reply)
    if code:
        raise Refused(what, code)
    if len(reply) < length:
        raise errors.Unknown(
            f'tgtd broke off when asked to {what}: {len(reply)} bytes of '
            f'{length}'
        )
    return reply[REPLY.size:length].rstrip(b'\0').decode(errors='replace')
