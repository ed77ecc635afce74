# SPDX-License-Identifier: Apache-2.0
"""An AoE host in this process, on one end of a pair of network interfaces."""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import time

PATH = f'{os.environ.get("PATH", "")}:/usr/sbin:/sbin'
ETHERNET = 0x88a2
ANSWER_S = 10.0  # until nobody has answered who is to be heard
SHUT_S = 0.02  # the same of who is not
AGAIN_S = 1.0  # until it is asked again: a frame may be lost
IDENTIFY, READ, WRITE = 0xec, 0x24, 0x34
IS_WRITE, IS_LONG = 0x01, 0x40
SECTOR = 512


class Refused(OSError):
    """Nobody answers, or with an error."""


def need(test):
    """Skip a test where there is no vblade or no such network."""
    if not shutil.which('vblade', path=PATH):
        test.skipTest('no vblade')
    if os.geteuid():
        test.skipTest('no root: vblade needs a raw socket')


def make_pair(test):
    """Return the names of two interfaces that are wired to each other."""
    ends = [f'vt{os.getpid() % 100000}{end}' for end in 'ab']
    made = _ip('link', 'add', ends[0], 'type', 'veth', 'peer', 'name', ends[1])
    if made.returncode:
        test.skipTest(f'no veth: {made.stderr.strip()}')
    test.addCleanup(_ip, 'link', 'delete', ends[0])
    for end in ends:
        _ip('link', 'set', end, 'up').check_returncode()
    return ends


def _ip(*argv):
    return subprocess.run(
        ['ip', *argv], capture_output=True, text=True, timeout=30,
        env={'PATH': PATH},
    )


class Session:
    """A host with a MAC address of its choice; there is nothing to open."""

    def __init__(self, interface, mac, fields, answer_s=ANSWER_S):
        self._mac = bytes.fromhex(mac.replace(':', ''))
        self._head = struct.pack('>HB', fields['shelf'], fields['slot'])
        self._wire = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERNET)
        )
        self._wire.bind((interface, ETHERNET))
        self._answer_s = answer_s
        self._tag = 0

    def read(self, offset_bytes, length_bytes):
        found = bytearray()
        while len(found) < length_bytes:
            count = min(2, (length_bytes - len(found)) // SECTOR)
            found += self._ask(
                READ, (offset_bytes + len(found)) // SECTOR, count
            )[:count * SECTOR]
        return bytes(found)

    def write(self, offset_bytes, data):
        for at in range(0, len(data), SECTOR):
            self._ask(
                WRITE, (offset_bytes + at) // SECTOR, 1,
                data[at:at + SECTOR],
            )

    def identify(self):
        return self._ask(IDENTIFY, 0, 1)

    def close(self):
        self._wire.close()

    def _ask(self, command, sector, count, data=b''):
        self._tag += 1
        flags = IS_LONG | (IS_WRITE if command == WRITE else 0)
        tag = struct.pack('>I', self._tag)
        frame = (
            b'\xff' * 6 + self._mac + struct.pack('>HBB', ETHERNET, 0x10, 0)
            + self._head + b'\0' + tag
            + struct.pack('BBBB', flags, 0, count, command)
            + sector.to_bytes(6, 'little') + b'\0\0' + data
        )
        answer = self._answer(frame.ljust(60, b'\0'), tag)
        if answer[14] & 0x04 or answer[27] & 0x01:
            raise Refused(f'error {answer[15]}, status {answer[27]:#x}')
        return answer[36:]

    def _answer(self, frame, tag):
        """Send it, again and again as any host does, until it is answered."""
        late = time.monotonic() + self._answer_s
        while (left_s := late - time.monotonic()) > 0:
            self._wire.send(frame)
            again = time.monotonic() + min(AGAIN_S, left_s)
            while (left_s := again - time.monotonic()) > 0:
                self._wire.settimeout(left_s)
                try:
                    answer = self._wire.recv(1 << 16)
                except TimeoutError:
                    break
                is_ours = answer[:6] == self._mac and (
                    answer[16:19] == self._head and answer[20:24] == tag
                )
                if is_ours and answer[14] & 0x08:
                    return answer
        raise Refused('nobody answers')


@contextlib.contextmanager
def session(*args, **changes):
    """Have a session, closed at the end."""
    with contextlib.closing(Session(*args, **changes)) as made:
        yield made
