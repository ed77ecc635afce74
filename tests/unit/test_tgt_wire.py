# SPDX-License-Identifier: Apache-2.0
"""What is said to tgtd, and what is understood of its answers."""

import os
import socket
import struct
import threading
import unittest

from volume import errors
from volume import ids
from volume.exports import tgt_listing
from volume.exports import tgt_wire
from volume.exports.tgt_wire import Tgtd
from volume.testing import fixtures

LISTING = """\
Target 7: iqn.2001-04.com.example:theirs
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
        I_T nexus: 3
            Initiator: iqn.2024-01.example:one alias: none
            Connection: 0
                IP Address: 127.0.0.1
    LUN information:
        LUN: 0
            Type: controller
            Backing store path: None
        LUN: 1
            Type: disk
            Readonly: Yes
            Backing store path: /srv/a:b c
    Account information:
        in
        out (outgoing)
    ACL information:
        ALL
        iqn.2024-01.example:one
Target 8: iqn.2001-04.com.example:empty
    System information:
        Driver: iscsi
    LUN information:
        LUN: 0
            Type: controller
    Account information:
    ACL information:
"""


class Daemon(threading.Thread):
    """Something that listens as tgtd, and gives one answer."""

    def __init__(self, test, answer):
        super().__init__(daemon=True)
        self.path = os.path.join(fixtures.state_dir(test), 'socket')
        self.answer = answer
        self.asked = b''
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        test.addCleanup(self.listener.close)
        self.start()

    def run(self):
        link, _ = self.listener.accept()
        with link:
            self.asked = link.recv(1 << 16)
            link.sendall(self.answer)


def reply(code=0, text=b'', length=None):
    size = 8 + len(text) if length is None else length
    return struct.pack('=II', code, size) + text


class Exchanges(unittest.TestCase):

    def ask(self, answer):
        self.daemon = Daemon(self, answer)
        return Tgtd(fixtures.make_node(self), self.daemon.path)

    def test_request_is_the_structure_of_tgtadm(self):
        self.ask(reply()).new_target(5, 'iqn.2001-04.com.example:x')
        self.daemon.join(10)
        text = b'targetname=iqn.2001-04.com.example:x\0'
        self.assertEqual(
            struct.pack('=II', 1, 0) + b'iscsi'.ljust(64, b'\0')
            + struct.pack('=Ii', 120 + len(text), 5) + bytes(40) + text,
            self.daemon.asked,
        )

    def test_refusal_says_what_and_why(self):
        with self.assertRaisesRegex(
            tgt_wire.Refused, 'delete target 5: the target is active'
        ) as caught:
            self.ask(reply(tgt_wire.TARGET_ACTIVE)).delete_target(5)
        self.assertEqual(tgt_wire.TARGET_ACTIVE, caught.exception.code)

    def test_answer_that_breaks_off_is_no_answer(self):
        for answer in b'', b'\0\0', reply(text=b'Target', length=100):
            with self.assertRaises(errors.Unknown):
                self.ask(answer).listing()

    def test_nobody_listening_is_nothing_done(self):
        tgtd = Tgtd(fixtures.make_node(self), '/nowhere/socket.0')
        with self.assertRaises(errors.Unavailable):
            tgtd.listing()

    def test_value_that_would_be_read_as_two_is_not_sent(self):
        tgtd = Tgtd(fixtures.make_node(self), '/nowhere/socket.0')
        for value in 'a,bsoflags=sync', 'a\nb', 'a\0b', '':
            with self.assertRaises(errors.Invalid):
                tgtd.new_lun(1, value)

    def test_password_stands_in_no_message(self):
        tgtd = Tgtd(fixtures.make_node(self), '/nowhere/socket.0')
        with self.assertRaises(errors.Invalid) as caught:
            tgtd.new_account('name', 'secret,secret')
        self.assertNotIn('secret', str(caught.exception))

    def test_connections_are_told_with_their_sessions(self):
        said = (
            b'Session: 3\n    Connection: 0\n        Initiator: x\n'
            b'Session: 9\n    Connection: 1\n    Connection: 2\n'
        )
        self.assertEqual(
            [(3, 0), (9, 1), (9, 2)], self.ask(reply(text=said)).connections(1)
        )


class Listings(unittest.TestCase):

    def test_targets_are_read_with_what_they_have(self):
        first, second = tgt_listing.parse(LISTING)
        self.assertEqual(
            (7, 'iqn.2001-04.com.example:theirs', True, '/srv/a:b c', True,
             ['in', 'out'], ['ALL', 'iqn.2024-01.example:one']),
            (first.tid, first.name, first.has_lun, first.path,
             first.is_read_only, first.accounts, first.bound),
        )
        self.assertEqual(
            (8, False, '', [], []),
            (second.tid, second.has_lun, second.path, second.accounts,
             second.bound),
        )

    def test_only_those_are_read_that_contain_a_text(self):
        (found,) = tgt_listing.parse(LISTING, 'empty')
        self.assertEqual(8, found.tid)
        self.assertEqual([], list(tgt_listing.parse('')))

    def test_numbers_follow_from_the_attachment_and_leave_room(self):
        attachment = ids.new()
        numbers = list(tgt_listing.numbers(attachment))
        self.assertEqual(numbers, list(tgt_listing.numbers(attachment)))
        self.assertEqual(len(numbers), len(set(numbers)))
        for number in numbers:
            self.assertTrue(1 << 16 < number < 1 << 28, number)
